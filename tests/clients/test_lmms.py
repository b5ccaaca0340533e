"""lmms-eval: what it asks is what `ask` asks. The program itself runs where it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from foveate import Foveate, FoveateError
from foveate.ask.context import Context
from foveate.clients.lmms import MISSING, MODEL, Request, Settings, answer, batches, question_of, read_options
from foveate.methods import method_names
from foveate.tiny import tiny_model
from tests.support import picture

TASK = {"max_new_tokens": 4, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def settings(**given: Any) -> Settings:
    return Settings.of(given, "mme", 256)


def request(*parts: Any, **given: Any) -> Request:
    """A user's message, as lmms-eval writes it, with pictures under `url`."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
        for part in parts
    ]
    return Request(
        lambda: [{"role": "user", "content": content}], settings(**{**TASK, **given}), "task mme, document 3"
    )


def prompts(model: Foveate, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every prompt that the model reads from now on."""
    seen: list[list[int]] = []
    real = Context.go_on

    def noted(self: Context, model: Any, prompts: Any, *args: Any, **more: Any) -> Any:
        seen.extend(prompt.ids for prompt in prompts)
        return real(self, model, prompts, *args, **more)

    monkeypatch.setattr(Context, "go_on", noted)
    return seen


# Answers


@pytest.mark.parametrize("method", method_names())
def test_it_asks_as_ask_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of the method's turns, in a batch, and between other conversations."""
    model = tiny_model(method)
    images = [picture(60, 100), picture(90, 40, seed=1)]
    seen = prompts(model, monkeypatch)
    expected = [model.ask(image, f"What is {i}?", max_new_tokens=4) for i, image in enumerate(images)]
    alone = seen.copy()
    seen.clear()
    two = request(*images, "Which of the two?")
    asked = [request(images[0], "What is 0?"), two, request(images[1], "What is 1?")]
    first, several, second = answer(model, asked)
    assert [first.text, second.text] == [one.text for one in expected]
    assert [first.ledger.new_tokens, second.ledger.new_tokens] == [one.ledger.new_tokens for one in expected]
    assert sorted(seen[:-1]) == sorted(alone)
    assert several.text == answer(model, [two])[0].text
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": "Which of the two?"})
    assert seen[-1] == model.processor.prompt([{"role": "user", "content": content}]).ids


def test_a_text_places_its_pictures() -> None:
    images = [picture(9, 9), picture(8, 8)]
    (message,) = request(*images, "First <image>\nthen <image> and?").read()
    assert [part.get("text", part.get("image")) for part in message["content"]] == [
        "First ",
        images[0],
        "then ",
        images[1],
        " and?",
    ]
    (message,) = request(images[0], "<image>\nWhat?").read()
    assert question_of([message]) == (images[0], "What?")
    with pytest.raises(
        FoveateError, match="task mme, document 3: its texts hold <image> 1 times, and it has 2 pict"
    ):
        request(*images, "One <image>?").read()


def test_what_is_not_a_picture_and_a_text_is_asked_as_it_stands() -> None:
    image = picture(9, 9)
    assert question_of(request(image, "What?").read()) == (image, "What?")
    for parts in (("What?",), ("What?", image), (image, image, "What?"), (image, "Look.", "What?"), (image,)):
        assert question_of(request(*parts).read()) is None
    system = [{"role": "system", "content": "Be brief."}, *request(image, "What?").read()]
    assert question_of(system) is None


def test_other_media_are_refused() -> None:
    clip = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(
        FoveateError, match=r"task t, document 0: a part of a message must be .* not of type 'video'"
    ):
        Request(lambda: clip, settings(), "task t, document 0").read()


def test_errors_name_the_documents() -> None:
    model = tiny_model("llava")
    with pytest.raises(FoveateError, match="task mme, document 3: no picture at nowhere"):
        answer(model, [request(Path("nowhere.png"), "What?")])


def test_batches_share_their_settings_and_keep_the_order() -> None:
    asked = [request("a.png", "?", max_new_tokens=4 + i % 2) for i in range(7)]
    assert list(batches(asked, 3)) == [[0, 2, 4], [6], [1, 3, 5]]


# generation_kwargs


def test_arguments_are_those_of_generate() -> None:
    assert settings(**TASK).arguments == {"do_sample": False, "num_beams": 1, "max_new_tokens": 4}
    assert settings().arguments == {"do_sample": False, "max_new_tokens": 256}
    assert settings(max_gen_toks=9, until=None).arguments["max_new_tokens"] == 9
    drawn = settings(temperature=0.7, top_p=0.9, top_k=3).arguments
    assert drawn == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "max_new_tokens": 256}
    assert settings(temperature=0.7, do_sample=False).arguments["do_sample"] is False
    assert settings(temperature=0, do_sample=True).arguments["do_sample"] is False
    assert settings(do_sample=True).arguments["do_sample"] is True
    assert settings(repetition_penalty=1.2).arguments["repetition_penalty"] == 1.2


def test_an_answer_ends_before_the_first_end() -> None:
    wanted = settings(until=["\n\n", "Q:"], stop_sequences="END")
    assert wanted.cut("yes Q: no\n\nEND") == "yes"
    assert wanted.cut("END") == ""
    assert settings(until=[]).cut("a\n\nb") == "a\n\nb"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, it is 0"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number, not '8'"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"until": [""]}, r"until must be texts that end an answer, not \[''\]"),
        ({"skip_special_tokens": False, "a": 1}, "a, skip_special_tokens cannot be honoured: remove it from"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(FoveateError, match=f"generation_kwargs of task mme.*{problem}"):
        settings(**given)


def test_what_the_method_decides_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    settings(image_aspect_ratio="pad")
    assert "image_aspect_ratio=pad is not used: the method decides it" in caplog.text


def test_options_are_a_mapping() -> None:
    read = read_options("{max_visual_tokens: 1000, grids: [[1, 2]]}")
    options = tiny_model("anyres", read).model.method.options
    assert (options.max_visual_tokens, options.grids) == (1000, ((1, 2),))
    assert read_options(None) == {}
    with pytest.raises(FoveateError, match="model_args options must be a mapping in braces"):
        read_options("1000")


# The program


def test_the_entry_point_is_there() -> None:
    found = {point.name: point.value for point in entry_points(group="lmms_eval.models")}
    assert found["foveate"] == "foveate.clients.lmms:manifest"
    assert (
        Path(importlib.import_module("foveate.clients").__file__ or "").with_name("lmms_model.py").is_file()
    )
    assert MODEL.startswith("foveate.clients.lmms_model.")


def test_without_lmms_eval_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "foveate.clients.lmms_model", raising=False)
    with pytest.raises(FoveateError) as error:
        importlib.import_module("foveate.clients.lmms_model")
    assert str(error.value).startswith(MISSING)


@pytest.fixture
def lmms_model(tmp_path: Path) -> Callable[..., Any]:
    """The class as lmms-eval finds and makes it."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.models import get_model

    tiny_model("llava").save(tmp_path / "model")

    def make(arguments: str = "", **more: Any) -> Any:
        text = f"pretrained={tmp_path / 'model'},device=cpu,dtype=float32{arguments}"
        return get_model("foveate").create_from_arg_string(text, {"batch_size": 2, "device": None, **more})

    return make


def test_it_answers_in_order(lmms_model: Callable[..., Any]) -> None:
    from lmms_eval.api.instance import Instance

    model = lmms_model(",options={max_visual_tokens: 500}")
    assert model.foveate.model.method.options.max_visual_tokens == 500
    images = [picture(20 + i, 30, seed=i) for i in range(3)]
    model.task_dict = {"t": {"test": images}}

    def messages(image: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": image}, {"type": "text", "text": "What?"}]
        return [{"role": "user", "content": content}]

    asked = [
        Instance(
            "generate_until",
            ("What?", messages, {"max_new_tokens": 4 - i % 2}, i, "t", "test"),
            0,
            {"task": "t", "doc_id": i, "repeats": 1},
        )
        for i in range(3)
    ]
    found = model.generate_until(asked)
    expected = [model.foveate.ask(image, "What?", max_new_tokens=4 - i % 2) for i, image in enumerate(images)]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.token_counts.output_tokens for one in found] == [one.ledger.new_tokens for one in expected]


def test_what_it_cannot_do_is_one_sentence(lmms_model: Callable[..., Any]) -> None:
    model = lmms_model()
    for kind in ("loglikelihood", "generate_until_multi_round", "generate_visual_cot"):
        with pytest.raises(FoveateError, match=f"choose tasks of output_type generate_until, not {kind}"):
            getattr(model, kind)([])
    with pytest.raises(FoveateError, match="--batch_size must be a whole number of at least 1, not 'auto'"):
        lmms_model(batch_size="auto")
    with pytest.raises((FoveateError, TypeError), match="nothing"):
        lmms_model(",nothing=1")


@pytest.mark.slow
def test_the_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks of `tools/lmms_parity.py`, on one method with several turns, in one and two processes."""
    pytest.importorskip("lmms_eval")
    parity = importlib.import_module("tools.lmms_parity")
    monkeypatch.setattr(
        "sys.argv", ["lmms_parity", str(tmp_path / "report.md"), "--methods", "chain_of_spot"]
    )
    parity.main()
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| chain")]
    assert [row.split(" | ")[1:4] for row in rows] == [
        ["1", "10 of 10", "8 of 8"],
        ["2", "10 of 10", "8 of 8"],
    ]
