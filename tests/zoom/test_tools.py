"""Crops that a model asks for by calling a tool: words are given, everything else is real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import TextIteratorStreamer

from foveate.errors import FoveateError
from foveate.picture.geometry import Box, Size
from foveate.zoom.asking import Call, Messages, Said, Tool
from foveate.zoom.looking import MISTAKES, NO_LOOKS, QUESTION, SPENT, Budget, ByTool
from foveate.zoom.tools import CONVENTIONS, LAST, Convention, calls_in, told_call
from foveate.zoom.vlm import VLM
from foveate.zoom.zoom import Zoom
from tests.support import picture
from tests.vlms import VLMS

SMALL = Budget(turns=2, min_pixels=1, min_side=4)
# In the manner of Qwen's: tools in the system message, a tool's result in tags in a message of the user's.
TEMPLATE = (
    "{% if tools %}system: {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</s>{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}user: <tool_response>{% else %}{{ m['role'] }}: "
    "{% endif %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'tool' %}</tool_response>{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Scripted(VLM):
    """A VLM whose words are given; its prompts are rendered and its pictures are processed."""

    def __init__(self, name: str, *words: str, template: str | None = None, tokens: int = 1) -> None:
        made = VLMS[name]()
        super().__init__(made.model, made.processor, max_positions=2**20)
        if template is not None:
            self.processor.chat_template = template
        self.words, self.tokens = list(words), tokens
        self.prompts: list[str] = []
        self.lengths: list[int] = []
        self.seen: list[list[Image.Image]] = []
        self.bounds: list[int] = []

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 256,
        tools: Sequence[Tool] = (),
        **generation: Any,
    ) -> list[Said]:
        inputs = self.inputs(conversations, tools)
        self.lengths.append(inputs["input_ids"].shape[1])
        self.prompts.append(self.processor.tokenizer.decode(inputs["input_ids"][0]))
        (conversation,) = conversations
        self.seen.append(
            [part["image"] for m in conversation for part in m["content"] if part["type"] == "image"]
        )
        self.bounds.append(max_new_tokens)
        return [Said(self.words.pop(0), 0.5, self.tokens)]


def call(name: str = "image_zoom_in_tool", **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def zoom(model: VLM, budget: Budget | None = SMALL, **settings: Any) -> Zoom:
    return Zoom.of(model, ByTool(**settings), budget)


def test_qwen3_vl_asks_for_crops_and_crops_of_crops() -> None:
    """Boxes in thousandths of the numbered picture; crops are the original's own pixels."""
    model = Scripted(
        "qwen3_vl",
        "a dog",
        "Closer. " + call(bbox_2d=[200, 100, 800, 900], label="the thing", img_idx=0),
        call(bbox_2d=[0, 0, 500, 500], label="its head", img_idx=1),
        "It is a cat.",
        template=TEMPLATE,
    )
    whole = picture(100, 200)
    found = zoom(model).ask(whole, "Who?", max_new_tokens=9)
    assert (found.first.text, found.text, found.confidence) == ("a dog", "It is a cat.", 0.5)
    assert found.regions == [Box(40, 10, 160, 90), Box(40, 10, 100, 50)]
    for region, crop in zip(found.regions, found.crops, strict=True):
        left, top, right, bottom = region.rounded()
        assert np.array_equal(np.asarray(crop), np.asarray(whole)[top:bottom, left:right])
    assert [proposal.label for proposal in found.proposals] == ["the thing", "its head"]
    assert [len(pictures) for pictures in model.seen] == [1, 1, 2, 3]
    schema = json.dumps(CONVENTIONS["qwen3_vl"].tool["function"]["name"])
    assert [schema in prompt for prompt in model.prompts] == [False, True, True, True]
    assert model.prompts[-1].count("<tool_response><|vision_start|>") == 2
    assert LAST not in model.prompts[2] and LAST in model.prompts[3]
    assert "Closer. <tool_call>" in model.prompts[2]
    assert set(model.bounds) == {9}
    assert found.to_dict()["problems"] == [] and found.show().width > 600


def test_deepeyes_counts_pixels_as_shown() -> None:
    """90 x 60 pixels are shown as 84 x 56; the crop comes from the user, the answer stands in tags."""
    words = (
        "<think>small</think>" + call(bbox_2d=[14, 28, 42, 56]),
        "<think>now</think><answer> a cat </answer>",
    )
    model = Scripted("qwen2_5_vl", "?", *words)
    found = zoom(model, convention="deepeyes").ask(picture(60, 90), "Who?")
    assert found.regions == [Box(15, 30, 45, 60)] and found.text == "a cat"
    assert "</s>user: <tool_response>\n<|vision_start|>" in model.prompts[-1]


def test_pixel_reasoner_counts_from_one() -> None:
    again = {"name": "crop_image_normalized", "target_image": 2}
    words = (
        call("crop_image_normalized", bbox_2d=[0.5, 0, 1, 1], target_image=1),
        call(**again, bbox_2d=[0, 0, 1, 0.5]),
        "a cat",
    )
    found = zoom(Scripted("qwen2_5_vl", "?", *words), convention="pixel_reasoner").ask(picture(60, 90), "?")
    assert found.regions == [Box(45, 0, 90, 60), Box(45, 0, 90, 30)] and found.text == "a cat"


def test_the_convention_is_that_of_the_models_type() -> None:
    assert ByTool().of(VLMS["qwen3_vl"]()) is CONVENTIONS["qwen3_vl"]
    own = Convention("look", "Looks.", {"box": {"type": "array"}}, ("box",), box="box", scale="unit")
    model = Scripted("llava", "?", call("look", box=[0, 0, 0.5, 1]), "a cat", template=None)
    found = zoom(model, convention=own).ask(picture(60, 90), "?")
    assert found.regions == [Box(0, 0, 45, 60)] and found.text == "a cat"
    assert "system: " in model.prompts[1] and '"name": "look"' in model.prompts[1], (
        "its template has no tools"
    )


NONSENSE = {
    "no JSON": ("<tool_call>zoom!</tool_call>", "the call is not JSON"),
    "a list": ("<tool_call>[1]</tool_call>", "must be a JSON object with name"),
    "huge": (f"<tool_call>{'9' * 5000}</tool_call>", "the call is not JSON"),
    "deep": (f"<tool_call>{'[' * 50000}</tool_call>", "the call is not JSON"),
    "no arguments": ('<tool_call>{"name": "image_zoom_in_tool"}</tool_call>', "must be a JSON object"),
    "broken": ('<tool_call>{"name": "image_zoom_in_tool", "arguments": "{"}</tool_call>', "are not JSON"),
    "another tool": (call("search", query="cats"), "there is no tool 'search', only image_zoom_in_tool"),
    "no box": (call(label="it", img_idx=0), "the argument bbox_2d is missing"),
    "three numbers": (call(bbox_2d=[1, 2, 3], img_idx=0), "bbox_2d: the list has 3 numbers"),
    "words": (call(bbox_2d="left", img_idx=0), "bbox_2d: the text holds no list"),
    "fractions": (call(bbox_2d=[0.1, 0.2, 0.6, 0.7], img_idx=0), "looks like a fraction"),
    "not finite": (call(bbox_2d=[0, 0, float("inf"), 9], img_idx=0), "bbox_2d:"),
    "outside": (call(bbox_2d=[1200, 0, 1500, 90], img_idx=0), "outside"),
    "empty": (call(bbox_2d=[5, 5, 5, 900], img_idx=0), "no area"),
    "all of it": (call(bbox_2d=[0, 0, 1000, 1000], img_idx=0), "not smaller"),
    "no such picture": (call(bbox_2d=[0, 0, 500, 500], img_idx=1), "img_idx must be a number from 0 to 0"),
    "no number": (call(bbox_2d=[0, 0, 500, 500], img_idx="0"), "img_idx must be a number"),
    "no whole number": (call(bbox_2d=[0, 0, 500, 500], img_idx=float("nan")), "img_idx must be a number"),
}


@pytest.fixture(scope="module")
def qwen() -> Scripted:
    return Scripted("qwen3_vl", template=TEMPLATE)


@pytest.mark.parametrize(("said", "why"), NONSENSE.values(), ids=list(NONSENSE))
def test_nonsense_is_answered_and_the_model_goes_on(qwen: Scripted, said: str, why: str) -> None:
    qwen.words = ["a dog", said, call(bbox_2d=[0, 0, 500, 500], label="it", img_idx=0), "a cat"]
    qwen.prompts.clear()
    found = zoom(qwen).ask(picture(60, 90), "Who?")
    assert f"<tool_response>Error: {found.proposals[0].problem}.</tool_response>" in qwen.prompts[2]
    assert why in str(found.proposals[0].problem)
    assert found.regions == [Box(0, 0, 45, 30)] and found.text == "a cat"


def test_nonsense_without_end(qwen: Scripted) -> None:
    """The answer to the whole picture stays, and the model is not asked for ever."""
    qwen.words = ["a dog", *["<tool_call>zoom!</tool_call>"] * 99]
    found = zoom(qwen).ask(picture(60, 90), "Who?")
    assert (found.text, found.zoomed, found.regions) == ("a dog", None, [])
    assert len(qwen.words) == 99 - MISTAKES
    assert found.problems == ["the call is not JSON"] * MISTAKES


def test_a_model_that_does_not_stop_is_asked_without_the_tool(qwen: Scripted) -> None:
    closer = call(bbox_2d=[0, 0, 500, 500], label="it", img_idx=0)
    qwen.words, more = ["a dog", closer, closer, *[closer] * MISTAKES, "a cat"], len(qwen.prompts)
    found = zoom(qwen).ask(picture(60, 90), "Who?")
    assert found.text == "a cat" and len(found.regions) == SMALL.turns and not qwen.words
    assert found.problems == [NO_LOOKS] * MISTAKES
    assert QUESTION.replace("{question}", "Who?") in qwen.prompts[-1]
    assert "image_zoom_in_tool" not in qwen.prompts[-1] and len(qwen.prompts) - more == 7


def test_a_model_that_does_not_call(qwen: Scripted) -> None:
    qwen.words = ["a dog", "a cat"]
    found = zoom(qwen).ask(picture(60, 90), "Who?")
    assert (found.text, found.zoomed) == ("a dog", None)
    assert found.problems == ["the model did not call image_zoom_in_tool"]
    assert found.proposals[0].said == "a cat"


def test_several_calls_in_one_reply(qwen: Scripted) -> None:
    both = call(bbox_2d=[0, 0, 500, 500], img_idx=0) + call(bbox_2d=[500, 500, 1000, 1000], img_idx=0)
    qwen.words = ["a dog", both + call(bbox_2d=[0, 500, 500, 1000], img_idx=0), "a cat"]
    found = zoom(qwen).ask(picture(60, 90), "Who?")
    assert found.regions == [Box(0, 0, 45, 30), Box(45, 30, 90, 60)] and found.text == "a cat"
    assert found.problems == [NO_LOOKS]


def test_an_empty_answer_is_asked_for_again(qwen: Scripted) -> None:
    qwen.words = ["a dog", call(bbox_2d=[0, 0, 500, 500], img_idx=0), "<think>hm</think>", "a cat"]
    assert zoom(qwen).ask(picture(60, 90), "Who?").text == "a cat"


def test_tokens_of_the_closer_look_are_bounded(qwen: Scripted) -> None:
    """Its requests get no more than what is left; without any, the first answer stays."""
    closer = call(bbox_2d=[0, 0, 500, 500], img_idx=0)
    qwen.words, qwen.tokens = ["a dog", closer, closer], 6
    qwen.bounds.clear()
    found = zoom(qwen, Budget(turns=4, min_pixels=1, min_side=4, tokens=10)).ask(picture(60, 90), "Who?")
    assert qwen.bounds == [256, 10, 4] and found.text == "a dog"
    assert (found.regions, found.crops, found.zoomed) == ([], [], None) and found.problems[-1] == SPENT
    qwen.tokens = 1


def test_tokens_of_answered_looks_are_bounded() -> None:
    model = Scripted("llava", "[0.2, 0.2, 0.6, 0.8]", "a dog", tokens=8)
    found = Zoom.of(model, budget=Budget(min_pixels=1, tokens=8)).ask(picture(60, 90), "Who?")
    assert model.bounds == [8, 256]
    assert (found.text, found.regions, found.problems) == ("a dog", [], [SPENT])


def test_a_random_model_calls_nothing() -> None:
    """Through `generate`: the first answer stays."""
    made = VLMS["qwen3_vl"]()
    found = Zoom(made.model, made.processor, "tool").ask(picture(60, 90), "What?", max_new_tokens=4)
    assert found.zoomed is None and found.text == found.first.text
    assert found.first.tokens == 4 and "did not call" in found.problems[0]
    with pytest.raises(FoveateError, match="streamer: a model that calls tools"):
        Zoom(made.model, made.processor, "tool").ask(
            picture(60, 90), "What?", streamer=TextIteratorStreamer(made.processor.tokenizer)
        )


def test_calls_are_found_in_the_text() -> None:
    one = Call("look", {"a": 1})
    said = '{"name": "look", "arguments": {"a": 1}}'
    assert calls_in(f"Well. <tool_call>{said}</tool_call> and <tool_call>\n{said}") == [one, one]
    assert calls_in(f"<tool_call>{said}</tool_call> was a thought</think>No.") == []
    assert calls_in(f"<think><tool_call>{said}</tool_call> goes on") == []
    assert calls_in("a plain answer") == []
    assert told_call("look", '{"a": 1}', "7") == Call("look", {"a": 1}, None, "7")


def test_wrong_conventions_are_refused() -> None:
    with pytest.raises(FoveateError, match="tool convention 'eyes': choose one of qwen3_vl, deepeyes"):
        ByTool("eyes")
    with pytest.raises(FoveateError, match="a convention's arguments lack bbox_2d, image"):
        Convention("look", "", {}, (), picture="image")
    with pytest.raises(FoveateError, match="role must be tool or user"):
        Convention("look", "", {"bbox_2d": {}}, (), role="system")  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="tokens of at least 1"):
        Budget(tokens=0)


def test_the_size_that_is_shown() -> None:
    whole = picture(60, 90)
    assert VLMS["qwen2_5_vl"]().drawn(whole) == (whole, Size(56, 84))
    assert VLMS["llava"]().drawn(whole) == (whole, Size(60, 90))


def test_a_conversation_that_grows_too_long(qwen: Scripted) -> None:
    """The crop's tokens do not fit: the first answer stays, with the reason."""
    qwen.words = ["a dog", "a cat"]
    zoom(qwen).ask(picture(60, 90), "Who?")
    before, qwen.positions = qwen.positions, qwen.lengths[-1] + 9
    qwen.words = ["a dog", call(bbox_2d=[0, 0, 500, 500], img_idx=0)]
    try:
        found = zoom(qwen).ask(picture(60, 90), "Who?")
    finally:
        qwen.positions = before
    assert (found.text, found.zoomed, found.regions) == ("a dog", None, [])
    assert "positions: take a smaller picture" in found.problems[-1] and not qwen.words
