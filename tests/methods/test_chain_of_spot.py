"""Chain-of-Spot beyond what all methods are tested for: boxes, crops, turns, lessons, files of regions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList, TextIteratorStreamer

from foveate import Foveate, FoveateError, load
from foveate.ask.engine import Engine, Said
from foveate.data.dataset import Samples
from foveate.data.formats import read_conversations
from foveate.data.regions import Regions
from foveate.methods.base import Cut, Reply, TowerGeometry, Turn
from foveate.methods.chain_of_spot import MOST_PIXELS, PADDING, ChainOfSpot
from foveate.model.cost import reference_config, shared_pricer
from foveate.picture.boxes import Frame, box_format, write_box
from foveate.picture.geometry import Box, Size
from foveate.shipped import find
from foveate.tiny import tiny_model
from foveate.train.prepare import prepare
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from tests.methods.conftest import fresh
from tests.support import picture
from tests.train.support import stage, write_recipe
from tests.vlms import VLMS

RELEASED = {"wording": "released", "box_format": "unit_xyxy", "crop": "padded"}
BOX = "[0.1, 0.5, 0.25, 0.75]"  # left, right, top, bottom of the padded square


def method(**options: Any) -> ChainOfSpot:
    return ChainOfSpot(TowerGeometry(56, 14), options)


def told(said: str, image: Image.Image, **options: Any) -> tuple[list[Turn], Reply]:
    """The turns of a conversation in which the model says `said`, and its end."""
    talk = method(**options).converse(image, "What is it?")
    turns = [next(talk)]
    turns.append(talk.send(said))
    with pytest.raises(StopIteration) as stop:
        talk.send("A dog.")
    return turns, stop.value.value


# What is asked, and what is looked at.


def test_the_crop_is_of_the_original_pixels() -> None:
    image = picture(100, 200)
    (first, second), end = told(f"It is here: {BOX}", image)
    assert first.text == "To answer the question: What is it?, where is the region of interest in the image?"
    assert second.text == "The region of interest in the image is <image>. Answer the question: What is it?."
    assert (first.pictures, first.inner, second.inner) == ([image], True, False)
    assert end == Reply("A dog.", [Box(20, 0, 100, 100)], [])  # 50 rows of padding above
    assert np.array_equal(np.asarray(second.pictures[0]), np.asarray(image)[0:100, 20:100])


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("The whole image.", "no list of numbers"),
        ("[0.1, 0.5, 0.25]", "3 numbers"),
        ("[nan, 0.5, 0.25, 0.75]", "not finite"),
        ("[0.5, 0.5, 0.2, 0.8]", "no area"),
        ("[12, 30, 80, 95]", "outside"),
        ("[0.1, 0.5, 0.0, 0.2]", "outside"),  # padding alone
        ("[0.1, " * 400, "400 numbers"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"crop": "padded"}])
def test_what_is_no_box_shows_the_whole_picture_and_says_why(
    said: str, why: str, options: dict[str, Any]
) -> None:
    image = picture(100, 200)
    (_, second), end = told(said, image, **options)
    assert second.pictures == [image]
    assert end.regions == [Box(0, 0, 200, 100)]
    assert len(end.notes) == 1 and why in end.notes[0] and len(end.notes[0]) < 250


def test_small_regions_grow_and_boxes_may_be_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(100, 100)
    assert told("[0.5, 0.51, 0.5, 0.52]", image)[1].regions == [Box(43, 44, 57, 58)]
    assert told("[0.2, 0.4, 0.2, 0.4]", image, extend=0.5)[1].regions == [Box(15, 15, 45, 45)]
    assert told("[0, 1, 0, 1]", picture(1, 1))[1].regions == [Box(0, 0, 1, 1)]
    assert told("[0, 0.1, 0.4, 0.6]", picture(1, 300))[1].regions == [Box(0, 0, 30, 1)]
    padded = picture(200, 300)  # 50 rows of padding above and below
    assert told("[0.5, 0.4, 0.501, 0.6]", padded, **RELEASED)[1].regions == [Box(143, 70, 157, 130)]
    _, end = told("[0.1, 0.0, 0.9, 0.168]", padded, **RELEASED)  # less than a row of the picture
    assert end.regions == [Box(0, 0, 300, 200)] and "outside the picture" in end.notes[0]
    monkeypatch.setattr("foveate.methods.chain_of_spot.LEAST_SIDE", 50)
    assert told("[0.5, 0.5, 0.503, 0.503]", padded, **RELEASED, extend=1.0)[1].regions == [
        Box(125, 75, 175, 125)
    ]


@pytest.mark.parametrize("name", ["qwen_vl", "qwen2_5_vl", "internvl", "unit_xyxy"])
def test_other_box_formats(name: str) -> None:
    image = picture(100, 200)
    text = write_box(Box(20, 10, 100, 90), box_format(name), Frame.padded(Size(100, 200)))
    assert told(text, image, box_format=name)[1].regions == [Box(20, 10, 100, 90)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"box_format": "corners"}, "corners"),
        ({"extend": -1.0}, "extend"),
        ({"parser": "authors"}, "belongs to crop: padded"),
        ({**RELEASED, "parser": "authors", "extend": 0.1}, "extend must be 0"),
        ({"suffix": "See <image>."}, "suffix"),
        ({"wording": "ours"}, "paper, released"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FoveateError, match=words):
        method(**options)


# The released model's crop.


def square(image: Image.Image) -> Image.Image:
    """The picture padded to a square, in full."""
    side = max(image.size)
    page = Image.new("RGB", (side, side), PADDING)
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (50, 50), (33, 91), (1, 7)])
def test_the_padded_crop_is_what_pil_cuts_from_the_square(size: tuple[int, int]) -> None:
    """Also beyond the square, where it is black."""
    image, spot, rng = picture(*size), method(**RELEASED, parser="authors"), np.random.default_rng(0)
    side = max(size)
    for _ in range(60):
        x0, x1 = sorted(rng.uniform(-0.3, 1.3, 2).round(3))
        y0, y1 = sorted(rng.uniform(-0.3, 1.3, 2).round(3))
        box, _ = spot.region(f"[{x0}, {y0}, {x1}, {y1}]", Size(*size))
        expected = square(image).crop((x0 * side, y0 * side, x1 * side, y1 * side))
        if box is not None and 0 not in expected.size:
            assert np.array_equal(np.asarray(spot.crop(image, box)), np.asarray(expected))


def test_pixel_coordinates_make_no_huge_picture() -> None:
    image, spot = picture(40, 60), method(**RELEASED, parser="authors")
    huge = "[-1e306, 0.0, 1e306, 0.5]"
    for text in ("[12, 30, 800, 950]", "[-1e6, -1e6, 1e6, 1e6]", "[0, 0, 1e9, 0.5]", huge):
        box, problem = spot.region(text, Size(40, 60))
        assert problem is None and box is not None
        crop = spot.crop(image, box)
        assert crop.width * crop.height <= MOST_PIXELS * 1.01
        spot.plan(crop.height, crop.width)
    assert told("[12, 30, 80, 95]", image, **RELEASED)[1].notes  # and the strict parser takes none of it


def test_the_authors_parser_in_a_conversation() -> None:
    image = picture(40, 60)
    for said in ("[0.5, 0.5, 0.5, 0.5]", "[0.055,0.249,0.863,0.779]", "words"):
        _, end = told(said, image, **RELEASED, parser="authors")
        assert end.regions == [Box(0, 0, 60, 40)] and len(end.notes) == 1
    (_, second), end = told("[0.5, 0.1, 0.5, 0.9]", image, **RELEASED, parser="authors")
    assert second.pictures[0].getcolors() == [(48, PADDING)]  # no width: padding is all that shows
    _, end = told("[0.0, 0.0, 1.0, 0.1]", image, **RELEASED, parser="authors")
    assert end.regions == [] and "padding" in end.notes[0]


# Asking.


@pytest.fixture(autouse=True)
def _short_regions() -> None:
    """Not here, where they are what is tested."""


@pytest.fixture(scope="module")
def made() -> Foveate:
    return fresh("chain_of_spot")


@pytest.fixture
def boxed(made: Foveate, monkeypatch: pytest.MonkeyPatch) -> Foveate:
    """A model whose reply to the first instruction reads as a box that depends on it."""

    def region(self: ChainOfSpot, text: str, size: Size) -> Any:
        from foveate.picture.boxes import ReadBox

        left = len(text.encode()) % (size.width // 2)
        return ReadBox(Box(left, 0, left + size.width // 2, size.height // 2))

    monkeypatch.setattr(ChainOfSpot, "region", region)
    return made


def test_each_question_has_its_own_box_in_a_batch(boxed: Foveate) -> None:
    sizes, questions = (
        [(60, 100), (33, 45), (200, 90)],
        ["What?", "Where is the smallest of them?", "Why so?"],
    )
    pairs = [(picture(*size, seed=i), q) for i, (size, q) in enumerate(zip(sizes, questions, strict=True))]
    more = {"max_new_tokens": 7, "repetition_penalty": 1.3}
    alone = [boxed.ask(*pair, **more) for pair in pairs]
    together = boxed.ask_all(pairs, **more)
    anew = Foveate(boxed.model, boxed.processor, keep_context=False).ask_all(pairs, **more)
    for answers in (together, anew):
        assert [a.text for a in answers] == [a.text for a in alone]
        assert [a.regions for a in answers] == [a.regions for a in alone]
    assert len({tuple(a.regions[0]) for a in alone}) == 3
    for answer in together:
        assert answer.crops[0].size == (answer.regions[0].width, answer.regions[0].height)


def test_the_first_picture_is_encoded_and_read_once(boxed: Foveate) -> None:
    views: list[int] = []
    hook = boxed.model.vision_tower.register_forward_pre_hook(lambda m, args: views.append(len(args[0])))
    answer = Foveate(boxed.model, boxed.processor).ask(picture(60, 90), "What is it?", max_new_tokens=5)
    hook.remove()
    assert views == [1, 1]
    assert answer.ledger.visual_tokens == 32 and answer.ledger.kept_tokens > 16


def test_only_the_answer_is_streamed_and_the_box_is_bounded(
    boxed: Foveate, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamer = TextIteratorStreamer(boxed.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    never = [boxed.processor.tokenizer.eos_token_id]
    monkeypatch.setattr(boxed.model.generation_config, "suppress_tokens", never)
    answer = boxed.ask(picture(60, 90), "What is it?", max_new_tokens=90, streamer=streamer)
    assert "".join(streamer).strip() == answer.text
    assert answer.ledger.new_tokens == 64 + 90  # a first reply that never ends is cut off


def test_what_is_asked_of_the_answer_is_not_asked_of_the_region(
    made: Foveate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound on the answer must not cut off the box."""
    said: list[str] = []
    region = ChainOfSpot.region
    monkeypatch.setattr(
        ChainOfSpot, "region", lambda s, text, size: said.append(text) or region(s, text, size)
    )
    image = picture(60, 90)
    made.ask(image, "What is it?", max_new_tokens=100)
    one = made.ask(image, "What is it?", max_new_tokens=1)
    first = made.processor.tokenizer.encode("A", add_special_tokens=False)
    made.ask(image, "What is it?", max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, ids: first)
    made.ask(image, "What is it?", max_new_tokens=80, min_new_tokens=70)
    seen = {token for token in made.processor.tokenizer.encode(said[0], add_special_tokens=False)}
    ends, reads = {"stop_strings": [said[0][2]]}, {"tokenizer": made.processor.tokenizer}
    for form in (
        {**ends, **reads},
        {"generation_config": GenerationConfig(**ends, bad_words_ids=[[token] for token in seen]), **reads},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(1)])},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 50.0},
        {"bad_words_ids": [[token] for token in seen]},
        {"suppress_tokens": [*seen]},
        {"begin_suppress_tokens": [*seen]},
        {"sequence_bias": [[[token], -100.0] for token in seen]},
    ):
        made.ask(image, "What is it?", max_new_tokens=2, **form)
    assert len(said[0]) > 10 and said == said[:1] * 13
    assert len(made.processor.tokenizer.encode(one.text, add_special_tokens=False)) <= 1


@pytest.mark.parametrize("reply", ["see <image>", "<image> [0.1, 0.5, 0.2, 0.8]"])
def test_a_reply_that_names_the_mark_of_pictures_shows_none(
    made: Foveate, monkeypatch: pytest.MonkeyPatch, reply: str
) -> None:
    say, texts = Engine.say, iter([[reply, "[0.1, 0.5, 0.2, 0.8]"], ["a dog", "a cat"]])

    def says(*args: Any, **more: Any) -> list[Said]:
        said = say(*args, **more)
        return [replace(one, text=text) for one, text in zip(said, next(texts), strict=True)]

    monkeypatch.setattr(Engine, "say", says)
    pairs = [(picture(60, 90, seed=i), "What is it?") for i in range(2)]
    spotted, other = made.ask_all(pairs, max_new_tokens=3)
    assert len(spotted.crops) == len(other.crops) == 1
    assert bool(spotted.notes) == ("[" not in reply) and not other.notes


def test_follow_up_questions(boxed: Foveate) -> None:
    talk = boxed.chat(picture(60, 90))
    talk.ask("What is it?", max_new_tokens=5)
    answer = talk.ask("Sure?", max_new_tokens=5)
    assert answer.ledger.views == 0 and answer.ledger.kept_tokens > 32
    assert answer.crops == []


def test_the_drawing_has_box_and_crop(boxed: Foveate, tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 89, 29), fill=(0, 200, 0))
    answer = boxed.ask(image, "What is it?", max_new_tokens=5)
    with_crop = answer.show(tmp_path / "it.png")
    answer.crops = []
    without = answer.show()
    assert with_crop.size != without.size or np.asarray(with_crop).tolist() != np.asarray(without).tolist()
    assert (tmp_path / "it.png").stat().st_size > 0

    def green(page: Image.Image) -> int:  # beside the picture, where the views are
        return int((np.asarray(page)[:, 660:] == (0, 200, 0)).all(-1).sum())

    assert green(with_crop) > 1000


def test_notes_are_told(made: Foveate) -> None:
    answer = made.ask(picture(40, 60), "What is it?", max_new_tokens=4)
    assert "no region was found" in answer.notes[0]
    assert answer.to_dict()["notes"] == answer.notes
    assert answer.regions == [Box(0, 0, 60, 40)]


def test_a_llava_model_asks_in_two_turns(tmp_path: Path) -> None:
    """Another method of the same parameters may be named; others are refused."""
    tiny_model("llava", {"fit": "crop", "projector_depth": 1}).save(tmp_path / "llava")
    named = load(tmp_path / "llava", method="chain_of_spot", device="cpu", options={"wording": "released"})
    assert isinstance(named.model.method, ChainOfSpot)
    options = named.processor.image_processor.planner().options
    assert (options.projector_depth, options.wording) == (1, "released")
    assert len(named.ask(picture(40, 60), "What is it?", max_new_tokens=3).crops) == 1
    assert load(tmp_path / "llava", device="cpu").model.config.method == "llava"
    with pytest.raises(FoveateError, match="adapter"):
        load(tmp_path / "llava", method="slime", device="cpu")


def test_transformers_llava_asks_in_two_turns(tmp_path: Path) -> None:
    theirs = VLMS["llava"]()
    theirs.model.save_pretrained(tmp_path)
    theirs.processor.save_pretrained(tmp_path)
    named = load(tmp_path, method="chain_of_spot", device="cpu")
    assert isinstance(named.model.method, ChainOfSpot)
    assert len(named.ask(picture(40, 60), "What is it?", max_new_tokens=3).crops) == 1
    assert load(tmp_path, device="cpu").model.config.method == "llava"


def test_price() -> None:
    pricer, size = shared_pricer(reference_config("chain_of_spot")), Size(480, 640)
    first, second = pricer.turns(size)
    kept, anew = pricer.price(size), pricer.price(size, keep_context=False)
    assert (first.views, second.views, kept.views, anew.views) == (1, 1, 2, 3)
    assert kept.prefill_flops == first.prefill_flops + second.prefill_flops
    assert second.prefill_flops / (anew.prefill_flops - first.prefill_flops) < 0.52
    assert anew.encode_flops == 3 * first.encode_flops
    assert kept.kv_bytes == anew.kv_bytes == 2 * first.kv_bytes


# Training.


def data(folder: Path, questions: int = 3, records: int = 2) -> Path:
    """LLaVA records with `questions` about a picture of 100 x 60 pixels each, and one without a picture."""
    folder.mkdir(exist_ok=True)
    made = []
    for i in range(records):
        picture(60, 100, seed=i).save(folder / f"{i}.png")
        turns = []
        for k in range(questions):
            turns.append({"from": "human", "value": ("<image>\n" if not k else "") + f"Question {i}{k}?"})
            turns.append({"from": "gpt", "value": f"answer {i}{k}"})
        made.append({"id": f"coco/{i}", "image": f"{i}.png", "conversations": turns})
    text = [{"from": "human", "value": "Spell it."}, {"from": "gpt", "value": "i-t"}]
    made.append({"id": "text", "conversations": text})
    (folder / "data.json").write_text(json.dumps(made))
    return folder / "data.json"


def squares(folder: Path, entries: dict[str, Any]) -> Path:
    (folder / "regions.json").write_text(json.dumps(entries))
    return folder / "regions.json"


def samples(folder: Path, entries: dict[str, Any], **options: Any) -> Samples:
    path = data(folder)
    processor = fresh("chain_of_spot", **options).processor
    records = np.array([[0, i] for i in range(3)])
    return Samples([read_conversations(path)], records, processor, [Regions(squares(folder, entries))])


def said(made: Samples, index: int) -> str:
    """The text of an item, without placeholders."""
    item = made[index]
    ids = item["input_ids"][item["input_ids"] != made.processor.image_token_id]
    return made.processor.tokenizer.decode(ids)


ALL = {f"00000{i}_coco_{i}_q{k}": {"params": [5, 10 + 20 * k, 30]} for i in range(2) for k in range(3)}


def test_one_random_question_a_visit(tmp_path: Path) -> None:
    made = samples(tmp_path, ALL)
    seen: Counter[int] = Counter()
    for epoch in range(60):
        made.set_epoch(epoch)
        text = said(made, 0)
        number = next(k for k in range(3) if f"answer 0{k}" in text)
        seen[number] += 1
        assert text.count("Question 0") == text.count(f"Question 0{number}?") == 2
        assert sum(f"answer 0{k}" in text for k in range(3)) == 1
        assert text == said(made, 0)  # the same in every process of the epoch
    assert min(seen.values()) > 8 and len(seen) == 3
    item = made[0]
    assert len(item["image_sizes"]) == 2 and item["image_sizes"].tolist() == [[60, 100], [30, 30]]
    assert "Spell it." in said(made, 2) and "pixel_values" not in made[2]


def test_both_answers_are_learnt_and_nothing_else(tmp_path: Path) -> None:
    made = samples(tmp_path, {"000000_coco_0_q1": ALL["000000_coco_0_q1"]})
    item = made[0]
    learnt = made.processor.tokenizer.decode(item["input_ids"][item["labels"] >= 0])
    assert learnt == " [0.3, 0.6, 0.25, 0.55]</s> answer 01</s>"
    assert torch.equal(item["labels"][item["labels"] >= 0], item["input_ids"][item["labels"] >= 0])
    assert made.measure(0)[0] == len(item["input_ids"])
    crop = np.asarray(Image.open(tmp_path / "0.png"))[5:35, 30:60]
    views = made.processor.image_processor(Image.fromarray(crop))["pixel_values"]
    assert torch.equal(item["pixel_values"][1:], views)


def test_an_answer_without_loss_is_no_lesson(tmp_path: Path) -> None:
    path = data(tmp_path)
    records = json.loads(path.read_text())
    records[0]["conversations"][3]["loss"] = False
    path.write_text(json.dumps(records))
    messages = read_conversations(path).messages(0)
    known: dict[int | None, Box] = {k: Box(0, 0, 30, 30) for k in range(3)}
    lessons = method(others="append").lessons(messages, lambda: Size(60, 100), known)
    assert len(lessons) == 2
    for lesson in lessons:
        unlearnt = [m["content"][0]["text"] for m in lesson if not m.get("loss", True)]
        assert unlearnt == ["answer 01"]


def test_where_the_region_comes_from(tmp_path: Path) -> None:
    two = {key: ALL[key] for key in ("000000_coco_0_q0", "000000_coco_0_q2")}
    path, size = data(tmp_path), Size(60, 100)
    messages = read_conversations(path).messages(0)
    known = Regions(squares(tmp_path, two)).of(0, "coco/0")

    def regions(source: str, known: dict[int | None, Box] = known) -> list[str]:
        lessons = method(region_from=source).lessons(messages, lambda: size, known)
        return [lesson[1]["content"][0]["text"] for lesson in lessons]

    assert regions("question") == ["[0.1, 0.4, 0.25, 0.55]", "[0.5, 0.8, 0.25, 0.55]"]
    assert regions("questions") == ["[0.1, 0.8, 0.25, 0.55]"] * 3
    assert regions("centre") == ["[0.25, 0.75, 0.35, 0.65]"] * 3
    assert regions("image") == []
    assert regions("image", {None: Box(0, 0, 50, 60)}) == ["[0.0, 0.5, 0.2, 0.8]"] * 3


def test_other_questions_may_be_appended(tmp_path: Path) -> None:
    made = samples(tmp_path, ALL, others="append", **RELEASED)
    text = said(made, 0)
    assert all(f"answer 0{k}</s>" in text for k in range(3))
    assert text.count("Now answer the following questions based on the raw image: ") == 1
    assert made.measure(0)[0] == len(made[0]["input_ids"])


def conversation() -> list[dict[str, Any]]:
    asked = [{"type": "image", "image": ""}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}
    return [{"role": "user", "content": asked}, answer]


def test_lessons_show_what_asking_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extension works alike in both, whatever the crop is cut from; least sides are those of the original."""
    image, box = picture(100, 200), Box(40, 20, 80, 60)
    for options, least in (({}, 14), ({"extend": 0.5}, 14), ({}, 60)):
        monkeypatch.setattr("foveate.methods.chain_of_spot.LEAST_SIDE", least)
        for crop in ("original",) if least == 60 else ("original", "padded"):
            made = method(crop=crop, box_format="unit_xyxy", **options)
            (lesson,) = made.lessons(conversation(), lambda: Size(100, 200), {0: box})
            cut = lesson[2]["content"][1]["image"]
            (_, second), _ = told(
                lesson[1]["content"][0]["text"], image, crop=crop, box_format="unit_xyxy", **options
            )
            shown = cut.make(image)
            assert Size(shown.height, shown.width) == cut.size
            assert np.array_equal(np.asarray(shown), np.asarray(second.pictures[0]))


@pytest.mark.parametrize("form", ["unit_xxyy", "unit_xyxy", "internvl", "qwen2_5_vl"])
def test_boxes_are_taught_that_can_be_read(form: str) -> None:
    """A pixel of a huge picture is less than three decimals can tell."""
    for crop in ("original", "padded"):
        made = method(box_format=form, crop=crop)
        for box in (Box(100, 600, 101, 602), Box(3999, 0, 4000, 3000), Box(0, 2999.5, 4000, 3000)):
            (lesson,) = made.lessons(conversation(), lambda: Size(3000, 4000), {0: box})
            found = made.region(lesson[1]["content"][0]["text"], Size(3000, 4000)).box
            assert found is not None and Box(*found.rounded()).contains(Box(*box.rounded()))


def taught(size: Size, box: Box, **options: Any) -> str:
    """The box that a lesson has the model write."""
    (lesson,) = method(**options).lessons(conversation(), lambda: size, {0: box})
    return lesson[1]["content"][0]["text"]


@pytest.mark.parametrize("crop", ["original", "padded"])
@pytest.mark.parametrize(
    ("size", "box", "form", "text"),
    [
        (Size(94, 68), Box(43.25, 93.5, 126.375, 176.625), "unit_xyxy", "[0.598, 0.995, 0.862, 1.0]"),
        (Size(94, 68), Box(43.25, 93.5, 126.375, 176.625), "unit_xxyy", "[0.598, 0.862, 0.995, 1.0]"),
        (Size(480, 640), Box(639, 100.4, 689, 150.4), "unit_xyxy", "[0.998, 0.282, 1.0, 0.36]"),
        (Size(480, 640), Box(639, 100.4, 689, 150.4), "internvl", "<box>[[998, 282, 1000, 360]]</box>"),
        (Size(50, 50), Box(10.3, 20.6, 10.4, 20.7), "unit_xyxy", "[0.206, 0.412, 0.208, 0.414]"),
        (Size(3000, 4000), Box(100, 600, 102.4, 602.4), "unit_xyxy", "[0.025, 0.275, 0.026, 0.276]"),
        (Size(3000, 4000), Box(100, 600.4, 101, 900.3), "qwen2_5_vl", '{"bbox_2d": [100, 1100, 101, 1400]}'),
    ],
)
def test_boxes_are_taught_as_they_are(size: Size, box: Box, form: str, text: str, crop: str) -> None:
    """Fractions of a pixel too, as long as its numbers differ."""
    assert taught(size, box, box_format=form, crop=crop) == text


def test_only_the_side_that_could_not_be_read_is_widened() -> None:
    size = Size(3000, 4000)
    assert taught(size, Box(100, 600.5, 101, 900.5), box_format="unit_xyxy") == "[0.024, 0.275, 0.026, 0.35]"
    assert taught(size, Box(100.5, 600, 900.5, 601)) == "[0.025, 0.225, 0.274, 0.276]"
    assert taught(size, Box(100.5, 600, 101, 601), box_format="internvl") == (
        "<box>[[24, 274, 26, 276]]</box>"
    )


@pytest.mark.parametrize("form", ["unit_xxyy", "unit_xyxy", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("crop", ["original", "padded"])
def test_whatever_its_size_a_taught_box_can_be_read(form: str, crop: str) -> None:
    rng, widened = np.random.default_rng(0), 0
    for _ in range(300):
        height, width = (int(n) for n in 2 ** rng.uniform(0, 13, 2))
        size = Size(height, width)
        left, top = rng.uniform(0, 1, 2) * (width, height)
        across, down = 10 ** rng.uniform(-2, 2, 2)
        box = Box(left, top, min(left + across, width), min(top + down, height))
        text = taught(size, box, box_format=form, crop=crop)
        assert method(box_format=form, crop=crop).region(text, size).box is not None, (size, box)
        plain = write_box(box, box_format(form), Frame.padded(size))
        if method(box_format=form, crop=crop).region(plain, size).box is None:
            widened += 1
        else:
            assert text == plain
    assert 10 < widened < 290


def test_a_line_that_is_cut_from_the_padded_square_is_padding() -> None:
    """As the authors' program cuts it: half a row rounds to none."""
    image = picture(94, 68)
    box = Box(43.25, 93.5, 126.375, 176.625)
    (lesson,) = method(**RELEASED).lessons(conversation(), lambda: Size(94, 68), {0: box})
    cut = lesson[2]["content"][1]["image"]
    assert cut.size == Size(1, 25) and cut.make(image).getcolors() == [(25, PADDING)]


def test_parts_of_a_text_are_told_apart() -> None:
    messages = conversation()
    messages[0]["content"].insert(0, {"type": "text", "text": "Look at this:"})
    (lesson,) = method().lessons(messages, lambda: Size(60, 100), {0: Box(0, 0, 30, 30)})
    assert "question: Look at this: What?," in lesson[0]["content"][-1]["text"]


def test_questions_without_an_answer_are_not_counted_as_learnt(tmp_path: Path) -> None:
    path = data(tmp_path)
    records = json.loads(path.read_text())
    records[0]["conversations"].pop()
    path.write_text(json.dumps(records))
    processor, regions = fresh("chain_of_spot").processor, Regions(squares(tmp_path, ALL))
    made = Samples([read_conversations(path)], np.array([[0, 0]]), processor, [regions])
    assert made.measure(0)[1] == ["record 0, question 2: the record has 2 answered questions, counted from 0"]


def test_samples_without_a_region_are_left_out_and_named(tmp_path: Path) -> None:
    entries = {
        "000000_coco_0_q0": {"params": [5, 5, 20]},
        "000001_coco_1_q0": {"params": [5, 5]},
        "000001_coco_1_q1": {"params": ["x", 0, 4]},
        "000001_coco_1_q2": {"params": [500, 500, 20]},  # outside: found out beside the picture
        "000001_coco_1": {"params": [0, 0, 9]},
        "000001_coco_1_q4": {"boxes": [0, 0, 9]},
        "000001_coco_1_q5": {"params": [0, 0, 0]},
        "000001_coco_1_q6": {"params": [0, float("nan"), 3]},
    }
    made = samples(tmp_path, entries)
    regions = made.regions[0]
    assert regions is not None
    assert (len(regions), regions.malformed, len(regions.named)) == (2, 6, 5)
    assert (
        "'000001_coco_1_q0': params must be [top, left, side], finite numbers, not [5, 5]" in regions.report()
    )
    assert "has no params" in regions.report() and "the key is not" in regions.report()
    assert [made.measure(i)[0] > 0 for i in range(3)] == [True, False, True]
    with pytest.raises(FoveateError, match=r"sample 1 \(id coco/1\): nothing can be learnt"):
        made[1]


def test_the_suffix_follows_the_second_instruction(tmp_path: Path) -> None:
    image, suffix = picture(40, 60), "\nAnswer with one word."
    (first, second), _ = told("[0.1, 0.5, 0.2, 0.8]", image, suffix=suffix)
    assert second.text.endswith(f"What is it?.{suffix}") and suffix not in first.text
    messages = read_conversations(data(tmp_path)).messages(0)
    (lesson, *_) = method(suffix=suffix).lessons(messages, lambda: Size(60, 100), {0: Box(0, 0, 30, 30)})
    assert lesson[2]["content"][-1]["text"].endswith(suffix)
    assert suffix not in lesson[0]["content"][-1]["text"]


def test_a_key_that_comes_twice_counts_once(tmp_path: Path) -> None:
    path, region = tmp_path / "regions.json", '{"params": [1, 2, %d]}'
    path.write_text(f'{{"000000_coco_0_q0": {region % 9}, "000000_coco_0_q0": {region % 5}}}')
    regions = Regions(path)
    assert regions.of(0, "coco/0") == {0: Box(2, 1, 11, 10)}
    assert regions.malformed == 1 and "record 0: a second region of question 0" in regions.report()


def test_files_of_regions_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "regions.json"
    for text, words in (
        ("[1, 2]", "a JSON object of keys"),
        ("{", "not valid JSON"),
        ('{"a": 1}', "holds no regions; 'a': the key is not"),
    ):
        path.write_text(text)
        with pytest.raises(FoveateError, match=words):
            Regions(path)
    for missing, words in (("none.json", "no file of regions"), (__file__, "must end in")):
        with pytest.raises(FoveateError, match=words):
            Regions(tmp_path / missing)
    with pytest.raises(FoveateError, match="another data file"):
        samples(tmp_path, {"000000_coco_7_q0": {"params": [1, 2, 9]}})[0]


def test_boxes_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "regions.jsonl"
    good = {"index": 0, "id": "coco/0", "number": 1, "box": [1, 2, 30, 40], "question": "What?"}
    lines = [
        json.dumps(good),
        json.dumps({**good, "number": None, "box": [0, 0, 9, 9.5]}),
        json.dumps({**good, "number": 2, "box": None, "problem": "the picture is missing"}),
        json.dumps({**good, "box": [5, 5, 5, 9]}),
        json.dumps({**good, "number": True}),
        "{",
        "[]",
    ]
    path.write_text("\n".join(lines) + "\n\n")
    regions = Regions(path)
    assert regions.of(0, "coco/0") == {1: Box(1, 2, 30, 40), None: Box(0, 0, 9, 9.5)}
    assert regions.of(3, "coco/3") == {}
    assert (len(regions), regions.malformed) == (2, 5)
    assert "line 3: it has no box: the picture is missing" in regions.report()


def test_a_part_that_is_cut_out_has_the_size_that_was_said(tmp_path: Path) -> None:
    """Lengths are counted before any picture is read."""
    image, rng = picture(60, 100), np.random.default_rng(1)
    messages = read_conversations(data(tmp_path)).messages(0)
    for options in ({}, {"extend": 0.3}, RELEASED):
        for _ in range(40):
            left, top = rng.uniform(-20, 90, 2)
            box = Box(left, top, left + rng.uniform(1, 80), top + rng.uniform(1, 80))
            for lesson in method(**options).lessons(messages, lambda: Size(60, 100), {0: box}):
                cut = lesson[2]["content"][1]["image"]
                assert isinstance(cut, Cut)
                assert cut.make(image).size == (cut.size.width, cut.size.height)


def recipe(folder: Path, **source: Any) -> Path:
    path = data(folder / "data", records=5)
    entries = {f"00000{i}_coco_{i}_q{k}": {"params": [5, 10, 30]} for i in range(4) for k in range(2)}
    entries |= {"000003_coco_3_q1": {"params": [500, 500, 20]}, "000000_coco_0_q7": {"params": [5, 10, 30]}}
    entries |= {"000099_zz_q0": {"params": [5, 10, 30]}}
    regions = str(squares(folder / "data", {**entries, "bad": 1}))
    made = stage(["language_model"], path, steps=3, batch=4, micro_batch=4, template="vicuna_v1")
    made["data"][0] |= {"regions": regions, **source}
    return write_recipe(folder, {"spot": made}, method="chain_of_spot")


def test_training_runs_and_reports(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    out = io.StringIO()
    train(recipe(tmp_path), console=Console(file=out, width=500))
    shown = out.getvalue()
    assert "7 regions in" in shown and "4 malformed entries left out: 'bad': the key" in shown
    assert "record 3, question 1: the box lies outside the picture; there is no record 99" in shown
    assert "record 0, question 7: the record has 3 answered questions, counted from 0" in shown
    assert "5 samples of up to" in shown and "1 left out because their regions are unknown" in shown
    again = load(tmp_path / "run" / "model", device="cpu")
    assert isinstance(again.model.method, ChainOfSpot)
    with pytest.raises(FoveateError, match="give the file as regions"):
        prepare(load_recipe(recipe(tmp_path, regions=None)), "spot")
    with pytest.raises(FoveateError, match="leave them out"):
        prepare(load_recipe(recipe(tmp_path), ["model.method=llava"]), "spot")


def test_recipe_is_the_paper_s() -> None:
    made = load_recipe("chain_of_spot")
    spot = made.stages["spot"]
    assert (spot.trains, spot.lr, spot.batch, spot.epochs) == (["language_model"], 2e-5, 1024, 1)
    assert spot.max_length == 2048 - 2 + 2 * 576
    assert made.model.load == "liuhaotian/llava-v1.5-7b" and made.model.method == "chain_of_spot"


def test_recipe_s_alternatives_load() -> None:
    """The commands in its header."""
    text = find("recipe", "chain_of_spot").read_text().split("\noutput:")[0]
    text = text.replace("\\\n#", " ").replace("#", " ")
    commands = [
        line.split() for line in text.splitlines() if "foveate train" in line and "torchrun" not in line
    ]
    found = [load_recipe(words[2], words[3:]) for words in commands]
    assert len(found) == 6
    options = [one.model.options for one in found]
    assert {one.get("region_from", "question") for one in options} == {
        "question",
        "questions",
        "image",
        "centre",
    }
    for one in found:
        if one.model.method == "chain_of_spot":
            spot = method(**one.model.options)
            assert spot.learns_regions == (one.stages["spot"].data[0].regions is not None)
