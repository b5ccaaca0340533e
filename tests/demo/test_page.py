"""The page in a browser: upload, ask, see answer and regions, an error as an error; and on a phone."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

import foveate
import foveate.demo.page
from foveate import Limits
from foveate.demo.app import application, listening, server
from foveate.tiny import tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not opened"),
    pytest.mark.skipif(
        find_spec("playwright") is None, reason="playwright is not installed: no page is opened"
    ),
]
SIGNS = Path(foveate.__file__).parent / "demo" / "signs.jpg"
PATIENCE = 120_000  # milliseconds: machines of tests are slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of two models on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        models = {"embedded": foveate.load(device="cpu", dtype="float32"), "noise": tiny_model("coroi")}
        limits = Limits(max_pixels=1000 * 1000, max_bytes=2**20)
        made = server(application(models, limits, 32, "127.0.0.1", examples=True))
        with listening("127.0.0.1", 0) as at:
            thread = Thread(target=made.run, kwargs={"sockets": [at]})
            thread.start()
            while not made.started:
                time.sleep(0.05)
            yield f"http://127.0.0.1:{at.getsockname()[1]}/"
            made.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@contextmanager
def opened(browser: Any, address: str, **how: Any) -> Iterator[Any]:
    context = browser.new_context(**how)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#question textarea")
    yield page
    context.close()


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#picture input[type=file]", str(path))
    page.wait_for_selector("#picture img")


def ask(page: Any, question: str) -> None:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def answers(page: Any, column: int = 0) -> list[str]:
    return [
        one.inner_text().strip() for one in page.query_selector_all(f"#column-{column} .said .bot .message")
    ]


def errors(page: Any) -> str:
    page.wait_for_selector(".toast-body")
    return " ".join(one.inner_text() for one in page.query_selector_all(".toast-body"))


def test_upload_ask_and_look(browser: Any, address: str) -> None:
    with opened(browser, address, viewport={"width": 1400, "height": 1000}) as page:
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.reload()
        page.wait_for_selector("#question textarea")
        upload(page, SIGNS)
        ask(page, "what word is on the sign?")
        page.wait_for_selector("#column-0 .seen img")
        assert answers(page) == ["open"]
        switches = page.query_selector_all("#column-0 .layers input")
        assert len(switches) == 10 and all(switch.is_checked() for switch in switches)
        before = page.get_attribute("#column-0 .seen img", "src")
        page.click("#column-0 .layers label:has-text('1 global')")
        page.wait_for_function(
            "before => document.querySelector('#column-0 .seen img').src !== before", arg=before
        )
        assert not page.is_checked("#column-0 .layers label:has-text('1 global') input")
        # A second question about the same picture: nothing is encoded again.
        ask(page, "what digit is on the red shape?")
        page.wait_for_function("document.querySelectorAll('#column-0 .said .bot .message').length === 2")
        page.wait_for_function("document.querySelector('#question textarea').value === ''")
        assert answers(page) == ["open", "9"]
        page.click("#column-0 button:has-text('Views and costs')")
        ledger = page.inner_text("#column-0 .costs table")
        assert re.search(r"views encoded now\s+0\b", ledger) and re.search(r"visual tokens\s+511\b", ledger)
        assert len(page.query_selector_all("#column-0 .views img")) == 10
        page.click("#column-0 .why")
        page.wait_for_selector("#column-0 .explained img")
        assert "without the most relevant part" in page.inner_text("#column-0 .notes")
        assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
        assert problems == []


def test_a_late_look_leaves_an_answer(browser: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question may be answered before the picture has been looked at. A new picture empties the page."""
    begun, answered, read = Event(), Event(), foveate.demo.page.read

    def waiting(*given: Any) -> Any:
        if not begun.is_set():  # the look at the new picture, not the question
            begun.set()
            answered.wait(PATIENCE / 1000)
        return read(*given)

    with opened(browser, address) as page:
        monkeypatch.setattr("foveate.demo.page.read", waiting)
        with page.expect_response(re.compile("/run/|/api/")) as looked:
            upload(page, SIGNS)
            assert begun.wait(PATIENCE / 1000)
            ask(page, "what word is on the sign?")
            page.wait_for_selector("#column-0 .seen img")
            answered.set()
        looked.value.finished()
        page.wait_for_timeout(500)
        assert page.query_selector("#column-0 .seen img") and answers(page) == ["open"]
        page.click("#picture button[aria-label='Remove Image'], #picture button[aria-label='Clear']")
        page.wait_for_selector("#column-0 .seen img", state="detached")
        upload(page, SIGNS)  # the same picture again is a new beginning
        assert answers(page) == []
        ask(page, "what digit is on the red shape?")
        page.wait_for_selector("#column-0 .seen img")
        assert answers(page) == ["9"]


def test_errors_are_shown_as_errors(browser: Any, address: str, tmp_path: Path) -> None:
    with opened(browser, address) as page:
        ask(page, "what word is on the sign?")
        assert "there is no picture: upload or paste one" in errors(page)
        page.reload()
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no picture at all")
        page.wait_for_selector("#question textarea")
        page.set_input_files("#picture input[type=file]", str(broken))
        shown = page.inner_text("#status [role=alert]")
        assert "broken.png cannot be read as a picture" in shown and "/" not in shown
        page.reload()
        page.wait_for_selector("#question textarea")
        upload(page, SIGNS)
        ask(page, "what is <image> <b>this</b>?")
        assert "the question contains <image>, which stands for a picture" in errors(page)
        assert answers(page) == []


def test_two_models_on_a_phone(browser: Any, address: str) -> None:
    """Examples and lists by keyboard and finger; nothing is wider than the screen."""
    with opened(
        browser, address, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    ) as page:
        page.tap("text=what digit is on the red shape?")
        page.wait_for_selector("#picture img")
        page.wait_for_function("document.querySelector('#question textarea').value.startsWith('what digit')")
        page.tap("#second input")
        page.tap("ul[role=listbox] li:has-text('noise')")
        page.press("#question textarea", "Enter")
        for column in (0, 1):
            page.wait_for_selector(f"#column-{column} .seen img", state="attached")  # it is below the screen
        assert answers(page) == ["9"]
        assert page.inner_text("#column-1 .title").strip() == "noise"
        chains = [one.inner_text().strip() for one in page.query_selector_all("#column-1 .layers label")]
        assert chains == ["1 global", "chain 2x", "chain 3x", "chain 4x"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
