"""Opens the page of `foveate demo` in an installed Chromium and takes the pictures of docs/demo.md.

python docs/images/screenshots.py [FOLDER]
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from threading import Thread

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import foveate
from foveate.demo.app import application, listening, server
from foveate.tiny import tiny_model

HERE = Path(__file__).parent
QUESTION = "what digit is on the red shape?"


def ask(page: Page, address: str, columns: int) -> None:
    page.goto(address)
    page.click(f"text={QUESTION}")
    page.wait_for_function("document.querySelector('#question textarea').value.startsWith('what digit')")
    if columns == 2:
        page.click("#second input")
        page.click("ul[role=listbox] li:has-text('coroi')")
    page.press("#question textarea", "Enter")
    for column in range(columns):
        page.wait_for_selector(f"#column-{column} .seen img", state="attached")
    page.wait_for_function("document.querySelector('#question textarea').value === ''")


def main(folder: Path) -> None:
    models = {"embedded": foveate.load(device="cpu", dtype="float32"), "random coroi": tiny_model("coroi")}
    app = server(application(models, foveate.Limits(), 16, "127.0.0.1", examples=True))
    with listening("127.0.0.1", 0) as at, sync_playwright() as playwright:
        thread = Thread(target=app.run, kwargs={"sockets": [at]})
        thread.start()
        while not app.started:
            time.sleep(0.1)
        address = f"http://127.0.0.1:{at.getsockname()[1]}/"
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, columns, size in (("desktop", 2, (1500, 1060)), ("phone", 1, (390, 844))):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, device_scale_factor=1)
            ask(page, address, columns)
            top = "document.querySelector('#column-0').scrollIntoView()"
            page.evaluate(top if name == "phone" else "window.scrollTo(0, 0)")
            time.sleep(2)
            path = folder / f"{name}.png"
            page.screenshot(path=path)
            with Image.open(path) as shown:
                small = shown.convert("RGB").quantize(128, dither=Image.Dither.NONE)
            small.save(path, optimize=True)
            page.close()
        browser.close()
        app.should_exit = True
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "page")
