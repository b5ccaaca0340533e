"""The zoom loop over real VLM classes: boxes, crops, answers, confidences, drawings."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import GenerationConfig, TextIteratorStreamer

import foveate
from foveate.errors import FoveateError
from foveate.lab.materials import materials
from foveate.lab.objects import Pen, lettering
from foveate.picture.geometry import Box
from foveate.picture.reading import read_picture
from foveate.zoom.asking import Said, message
from foveate.zoom.looking import QUESTION, REGION, Answered, Budget, Given, Proposal
from foveate.zoom.vlm import VLM
from foveate.zoom.zoom import Relevant, Zoom
from tests.support import picture
from tests.vlms import VLMS

SMALL = Budget(min_pixels=1, min_side=4)


@cache
def vlm(name: str) -> VLM:
    return VLMS[name]()


def zoom(name: str, region: Any = "answer", budget: Budget = SMALL) -> Zoom:
    return Zoom(vlm(name).model, vlm(name).processor, region, budget)


class Saying(VLM):
    """A VLM whose words are given; everything else is real."""

    def __init__(self, name: str, *words: str) -> None:
        super().__init__(vlm(name).model, vlm(name).processor)
        self.words = list(words)

    def answer(self, conversations: Any, **generation: Any) -> list[Said]:
        return [Said(self.words.pop(0), 1.0) for _ in conversations]


@pytest.mark.parametrize("name", VLMS)
def test_given_box(name: str) -> None:
    """The crop is the box's own pixels, and the answer is that of the model shown picture and crop."""
    whole, model = picture(60, 90), vlm(name)
    found = zoom(name).ask(whole, "What is this?", box=(20.2, 9.8, 70, 50), max_new_tokens=6)
    assert found.regions == [Box(20, 10, 70, 50)]
    assert np.array_equal(np.asarray(found.crops[0]), np.asarray(whole)[10:50, 20:70])
    first, zoomed = (
        model.answer([message(*parts)], max_new_tokens=6)[0]
        for parts in (
            (whole, "What is this?"),
            (whole, REGION, found.crops[0], QUESTION.replace("{question}", "What is this?")),
        )
    )
    assert (found.first, found.zoomed) == (first, zoomed)
    assert (found.text, found.confidence) == (zoomed.text, zoomed.confidence)
    assert first.text != zoomed.text


@pytest.mark.parametrize("name", VLMS)
def test_relevance_proposes(name: str) -> None:
    found = zoom(name, "relevance").ask(picture(60, 90), "What is this?", max_new_tokens=2)
    (proposal,) = found.proposals
    assert proposal.heat and max(weight for _, weight in proposal.heat) == 1
    assert len({box for box, _ in proposal.heat}) > 1
    assert found.regions or "not smaller" in (proposal.problem or "")


@pytest.mark.parametrize("name", VLMS)
def test_words_without_a_box_leave_the_whole_picture(name: str) -> None:
    """Random weights write no box: the first answer stays, with the reason."""
    found = zoom(name).ask(picture(60, 90), "What is this?", max_new_tokens=4)
    (proposal,) = found.proposals
    assert proposal.said is not None and proposal.box is None and proposal.problem
    assert found.zoomed is None and found.regions == [] and found.crops == []
    assert found.text == found.first.text
    assert found.to_dict()["problems"] == [proposal.problem]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "foveate-llava"])
def test_confidence_is_the_mean_probability(name: str) -> None:
    """Recomputed from one forward pass over prompt and answer."""
    model = vlm(name)
    conversations = [message(picture(60, 90), "What is this?"), message(picture(60, 90, 1), "Why?")]
    inputs = model.inputs(conversations)
    answers = model.answer(conversations, max_new_tokens=5)
    for i, conversation in enumerate(conversations):
        alone = model.inputs([conversation])
        ids = model.model.generate(**alone, do_sample=False, max_new_tokens=5)
        length = alone["input_ids"].shape[1]
        kinds = {k: v for k, v in alone.items() if k == "mm_token_type_ids"}
        more = {k: torch.nn.functional.pad(v, (0, ids.shape[1] - length)) for k, v in kinds.items()}
        rest = {k: v for k, v in alone.items() if k not in ("input_ids", "attention_mask", *kinds)}
        with torch.no_grad():
            logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more, **rest).logits[
                0, length - 1 : -1
            ]
        chosen = logits.softmax(-1).gather(1, ids[0, length:, None])[:, 0]
        assert abs(answers[i].confidence - float(chosen.mean())) < 1e-4
    assert len(inputs["input_ids"]) == 2


def test_confidence_of_the_best_beam() -> None:
    model = vlm("llava")
    conversation = message(picture(60, 90), "What is this?")
    for beams in (1, 3):
        (said,) = model.answer([conversation], max_new_tokens=5, num_beams=beams)
        inputs = model.inputs([conversation])
        output = model.model.generate(**inputs, max_new_tokens=5, num_beams=beams, do_sample=False)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            given = {**inputs, "input_ids": output, "attention_mask": torch.ones_like(output)}
            logits = model.model(**given).logits[0, length - 1 : -1]
        chosen = logits.softmax(-1).gather(1, output[0, length:, None])[:, 0]
        assert abs(said.confidence - float(chosen.mean())) < 1e-4
    with pytest.raises(FoveateError, match="num_return_sequences"):
        model.answer([conversation], num_beams=2, num_return_sequences=2)


def test_only_the_last_answer_is_streamed() -> None:
    for more in ({"box": (20, 10, 70, 50)}, {"no_zoom": True}):
        streamer = TextIteratorStreamer(vlm("llava").processor.tokenizer, skip_prompt=True)
        found = zoom("llava").ask(picture(60, 90), "What?", max_new_tokens=6, streamer=streamer, **more)
        special = {"skip_special_tokens": True}
        ids = vlm("llava").processor.tokenizer("".join(streamer), add_special_tokens=False)["input_ids"]
        assert vlm("llava").processor.tokenizer.decode(ids, **special).strip() == found.text


def test_a_picture_that_the_processor_does_not_take() -> None:
    with pytest.raises(FoveateError, match="does not accept the picture or the text"):
        zoom("qwen3_vl").ask(picture(2, 500), "What?")


def test_tokens_behind_the_end_do_not_count() -> None:
    model = vlm("llava")
    end = model.model.generation_config.eos_token_id
    said = model._said(torch.tensor([[7, end, 3, 3], [7, 8, 9, end]]))
    assert said.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize(
    ("name", "words", "options", "box"),
    [
        ("llava", "[0.2, 0.5, 0.6, 1.0]", {}, Box(18, 30, 54, 60)),
        ("llava", "[0.2, 0.6, 0.5, 1.0]", {"form": "unit_xxyy"}, Box(18, 30, 54, 60)),
        ("llava", "[0.2, 0.5, 0.6, 0.7]", {"frame": "padded"}, Box(18, 30, 54, 48)),
        ("qwen3_vl", '{"bbox_2d": [200, 500, 600, 1000]}', {}, Box(18, 30, 54, 60)),
        # The picture of 90 x 60 pixels is shown as 84 x 56: boxes count those.
        ("qwen2_5_vl", '{"bbox_2d": [14, 28, 42, 56]}', {}, Box(15, 30, 45, 60)),
    ],
)
def test_conventions(name: str, words: str, options: dict[str, Any], box: Box) -> None:
    propose = Answered(extend=0, **options)
    found = propose(Saying(name, words), picture(60, 90), "What is this?")
    assert found.box == box
    assert found.said == words


def test_the_model_is_told_its_convention() -> None:
    seen: list[str] = []

    class Listening(Saying):
        def answer(self, conversations: Any, **generation: Any) -> list[Said]:
            seen.extend(part["text"] for m in conversations[0] for part in m["content"] if "text" in part)
            return super().answer(conversations, **generation)

    Answered()(Listening("qwen3_vl", "no"), picture(60, 90), "Who?")
    Answered(form="unit_xxyy")(Listening("llava", "no"), picture(60, 90), "Who?")
    assert '"Who?"' in seen[0] and '{"bbox_2d": [left, top, right, bottom]}, each from 0 to 1000' in seen[0]
    assert "[left, right, top, bottom], each from 0 to 1." in seen[1]


def test_a_model_that_learnt_to_say_where() -> None:
    """From end to end: a model that was taught one box and one answer zooms there and answers."""
    model = VLMS["llava"]()
    whole, question = picture(60, 90), "Who?"
    where = Answered().prompt.replace("{question}", question)
    where = where.replace("{box}", "[left, top, right, bottom], each from 0 to 1")
    box = Box(9, 18, 45, 48)
    crop = whole.crop(tuple(box))
    lessons = [
        (message(whole, where), "[0.1, 0.3, 0.5, 0.8]"),
        (message(whole, question), "a dog"),
        (message(whole, REGION, crop, QUESTION.replace("{question}", question)), "a cat"),
    ]
    teach(model, lessons)
    found = Zoom(model.model, model.processor, Answered(extend=0), SMALL).ask(whole, question)
    assert found.proposals[0].said == "[0.1, 0.3, 0.5, 0.8]"
    assert found.regions == [box]
    assert (found.first.text, found.text) == ("a dog", "a cat")
    assert found.confidence > 0.5


def teach(model: VLM, lessons: list[tuple[list[dict[str, Any]], str]]) -> None:
    batches = []
    for conversation, answer in lessons:
        inputs = dict(model.inputs([conversation]))
        ids = model.processor.tokenizer(answer + "</s>", add_special_tokens=False, return_tensors="pt")
        prompt = inputs["input_ids"]
        inputs["input_ids"] = torch.cat([prompt, ids["input_ids"]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        batches.append(
            {
                **inputs,
                "labels": inputs["input_ids"].masked_fill(
                    torch.arange(inputs["input_ids"].shape[1]) < prompt.shape[1], -100
                ),
            }
        )
    optimizer = torch.optim.Adam(model.model.parameters(), lr=3e-3)
    model.model.train()
    for _ in range(150):
        loss = sum(model.model(**batch).loss for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss) < 0.05:
            break
    model.model.eval()


def test_boxes_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    """A photograph stored on its side: the box is in pixels of the upright picture."""
    upright = picture(90, 60)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, "PNG", exif=exif)
    found = zoom("llava").ask(stored.getvalue(), "What?", box=(10, 50, 40, 80), max_new_tokens=1)
    assert found.picture.size == (60, 90)
    assert np.array_equal(np.asarray(found.crops[0]), np.asarray(upright)[50:80, 10:40])


def test_no_zoom() -> None:
    found = zoom("llava").ask(picture(60, 90), "What?", no_zoom=True, max_new_tokens=3)
    assert found.proposals == [] and found.zoomed is None
    assert found.text == found.first.text


def test_turns_go_deeper() -> None:
    """Each proposal is about the crop before it; the model is shown the last crop."""
    seen: list[Image.Image] = []

    def lower_right(vlm: VLM, shown: Image.Image, question: str) -> Proposal:
        seen.append(shown)
        return Proposal(Box(shown.width / 2, shown.height / 2, shown.width, shown.height))

    budget = Budget(turns=3, min_pixels=1, max_pixels=900, min_side=4)
    whole = picture(80, 80)
    found = zoom("llava", lower_right, budget).ask(whole, "What?", max_new_tokens=1)
    assert found.regions == [Box(40, 40, 80, 80), Box(60, 60, 80, 80), Box(70, 70, 80, 80)]
    assert [shown.size for shown in seen] == [(80, 80), (30, 30), (20, 20)]  # 40 x 40 is more than 900 pixels
    assert np.array_equal(np.asarray(found.crops[-1]), np.asarray(whole)[70:, 70:])


def test_a_region_stays_within_the_one_before() -> None:
    """Also where it grows to the least side."""
    boxes = iter([Box(0, 0, 40, 40), Box(38, 38, 40, 40)])

    def propose(vlm: VLM, shown: Image.Image, question: str) -> Proposal:
        return Proposal(next(boxes))

    budget = Budget(turns=2, min_pixels=1, min_side=16)
    found = zoom("llava", propose, budget).ask(picture(100, 100), "What?", max_new_tokens=1)
    assert found.regions == [Box(0, 0, 40, 40), Box(24, 24, 40, 40)]


@pytest.mark.parametrize(
    ("box", "why"),
    [((500, 500, 600, 600), "outside"), ((0, 0, float("nan"), 9), "finite"), ((5, 5), "2 numbers")],
)
def test_a_proposers_box_is_checked(box: Any, why: str) -> None:
    found = zoom("llava", lambda vlm, shown, question: Proposal(box)).ask(
        picture(100, 100), "What?", max_new_tokens=1
    )
    assert found.regions == [] and why in str(found.proposals[0].problem)


def test_looking_stops_where_nothing_is_left_out() -> None:
    budget = Budget(turns=5, min_pixels=1, min_side=20)
    propose = Given((40, 40, 60, 60))
    found = zoom("llava", propose, budget).ask(picture(80, 80), "What?", max_new_tokens=1)
    assert len(found.regions) == 1
    assert found.proposals[-1].box is None
    whole = zoom("llava", Given((0, 0, 80, 80))).ask(picture(80, 80), "What?", max_new_tokens=1)
    assert whole.regions == [] and "not smaller" in str(whole.proposals[0].problem)


def test_pixels_of_the_crop() -> None:
    budget = Budget(min_pixels=2500, max_pixels=3600, min_side=4)
    small = zoom("llava", budget=budget).ask(picture(80, 80), "?", box=(0, 0, 20, 20), max_new_tokens=1)
    large = zoom("llava", budget=budget).ask(picture(200, 200), "?", box=(0, 0, 180, 120), max_new_tokens=1)
    assert small.crops[0].size == (50, 50)
    assert large.crops[0].size == (73, 49)
    assert large.regions == [Box(0, 0, 180, 120)]


def test_a_sliver_gets_a_side() -> None:
    """Regions are never thinner than the budget says, nor than a fiftieth of their length."""
    found = zoom("llava", budget=Budget(min_pixels=1, min_side=2)).ask(
        picture(60, 1000), "?", box=(0, 30, 900, 31), max_new_tokens=1
    )
    assert found.regions == [Box(0, 21, 900, 39)]


@pytest.mark.parametrize(
    "box", [(100, 0, 120, 10), (5, 5, 5, 9), (float("nan"), 0, 1, 1), (0, 0, 5)], ids=str
)
def test_wrong_boxes_are_refused(box: Any) -> None:
    with pytest.raises(FoveateError, match=r"box \[.*\] in a picture of 90 x 60 pixels"):
        zoom("llava").ask(picture(60, 90), "What?", box=box)


@pytest.mark.parametrize("box", ["abcd", 5, (None,) * 4], ids=str)
def test_boxes_that_are_no_numbers_are_refused(box: Any) -> None:
    with pytest.raises(FoveateError, match="give left, top, right, bottom"):
        zoom("llava").ask(picture(60, 90), "What?", box=box)


def test_a_proposer_that_proposes_nothing_of_the_kind_is_named() -> None:
    with pytest.raises(FoveateError, match="returns a Proposal, not tuple"):
        zoom("llava", lambda vlm, image, question: (0, 0, 5, 5)).ask(picture(60, 90), "What?")


def test_what_generate_returns_is_not_the_callers_to_say() -> None:
    ask = zoom("llava").ask
    image, more = picture(60, 90), {"return_dict_in_generate": False, "output_logits": False}
    plain = ask(image, "What?", no_zoom=True, max_new_tokens=3)
    assert ask(image, "What?", no_zoom=True, max_new_tokens=3, **more).text == plain.text
    several = GenerationConfig(num_return_sequences=2, num_beams=2)
    with pytest.raises(FoveateError, match="num_return_sequences"):
        ask(image, "What?", no_zoom=True, max_new_tokens=3, generation_config=several)


def test_wrong_input_is_refused() -> None:
    llava = vlm("llava")
    with pytest.raises(FoveateError, match="proposer 'eyes': choose answer, relevance or tool"):
        Zoom(llava.model, llava.processor, "eyes")
    with pytest.raises(FoveateError, match="empty"):
        zoom("llava").ask(picture(60, 90), "  ")
    with pytest.raises(FoveateError, match="stands for a picture"):
        zoom("llava").ask(picture(60, 90), "What is in <image>?")
    with pytest.raises(FoveateError, match="not a processor of a VLM"):
        Zoom(llava.model, llava.processor.tokenizer)
    with pytest.raises(FoveateError, match="min_pixels"):
        Budget(min_pixels=10, max_pixels=5)
    with pytest.raises(FoveateError, match="unknown box format"):
        Answered(form="xywh")
    template, llava.processor.chat_template = llava.processor.chat_template, None
    try:
        with pytest.raises(FoveateError, match="no chat template"):
            Zoom(llava.model, llava.processor)
    finally:
        llava.processor.chat_template = template


def test_a_given_box_of_fractions_is_refused() -> None:
    with pytest.raises(FoveateError, match="smaller than a pixel: its numbers look like fractions"):
        zoom("llava").ask(picture(60, 90), "What is it?", box=(0.12, 0.3, 0.45, 0.62))


def test_drawing(tmp_path: Path) -> None:
    out = tmp_path / "zoom.png"
    found = zoom("llava", Relevant()).ask(picture(60, 90), "What?", box=(20, 10, 70, 50), max_new_tokens=3)
    drawing = found.show(out)
    assert Image.open(io.BytesIO(found._repr_png_())).tobytes() == drawing.tobytes()  # in a notebook
    assert found.account.regions == found.regions
    assert found.account.heat() == found.proposals[0].heat
    with Image.open(out) as written:
        assert written.size == drawing.size
    red = np.asarray(drawing)[..., 0].astype(int) - np.asarray(drawing)[..., 1]
    assert (red[:450, :650] > 100).any(), "no region is drawn on the picture"
    long = zoom("llava").ask(picture(60, 900), "What?", box=(0, 10, 900, 40), max_new_tokens=3)
    assert long.show().height < 400, "a crop of 30 : 1 is not drawn as one"
    unzoomed = zoom("llava").ask(picture(60, 90), "What?", no_zoom=True, max_new_tokens=3)
    assert unzoomed.show().width > 600
    with pytest.raises(FoveateError, match="pictures are written as"):
        found.show(tmp_path / "zoom.txt")
    assert json.loads(json.dumps(found.to_dict()))["regions"] == [[20, 10, 70, 50]]


def test_sampling_reaches_generate() -> None:
    torch.manual_seed(0)
    one = zoom("llava").ask(picture(60, 90), "?", no_zoom=True, max_new_tokens=8, do_sample=True)
    greedy = zoom("llava").ask(picture(60, 90), "?", no_zoom=True, max_new_tokens=8)
    assert one.text != greedy.text


def test_public_name() -> None:
    assert foveate.Zoom is Zoom


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "thing"),
    [
        ("what colour is the sign?", Box(3985, 2460, 5312, 2910)),
        ("what digit is on the red shape?", Box(2630, 2250, 3240, 2850)),
    ],
)
def test_relevance_finds_things_in_a_photograph(question: str, thing: Box) -> None:
    """The embedded model, which can read: in 16 megapixels, relevance marks the sign that was asked about."""
    model = foveate.load(device="cpu", dtype="float32")
    signs = read_picture(Path(__file__).parents[2] / "examples" / "dandelions.jpg").convert("RGB")
    pen = Pen(signs, np.random.default_rng(4), materials("test"))
    pen.sign("yellow", lettering("NORTH", "DejaVuSans-Bold", 260, (1.0, 1.0)), 3780, 2250)
    pen.plain("circle", "red", Box(2650, 2250, 3230, 2830), [("digit", 260)])
    pen.plain("square", "blue", Box(4400, 300, 4900, 800), [("letter", 240)])
    data = io.BytesIO()
    signs.save(data, "JPEG", quality=85)
    signs = read_picture(data.getvalue())
    found = Relevant()(VLM(model.model, model.processor), signs, question).box
    assert found is not None
    x, y = (found.left + found.right) / 2, (found.top + found.bottom) / 2
    assert thing.contains(Box(x, y, x, y))  # a token of this model covers half of the digit's circle
    assert found.width * found.height < signs.width * signs.height / 40
