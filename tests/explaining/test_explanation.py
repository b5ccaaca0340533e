"""Explanations of answers: where the truth is known, of every method, of other VLMs, and in all forms."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate import Foveate, FoveateError, Zoom
from foveate.ask.engine import Gate
from foveate.explaining import explanation
from foveate.explaining.explanation import Explanation
from foveate.explaining.faithfulness import Faithfulness, Probe, elsewhere, measure
from foveate.explaining.maps import Raster, pixels_of
from foveate.explaining.own import Own
from foveate.explaining.relevance import answer_relevance, interpret, propagate, relevance
from foveate.explaining.story import Story, continued, forced
from foveate.methods import METHODS
from foveate.methods.chain_of_spot import ChainOfSpot
from foveate.picture.geometry import Box, Size, whole
from foveate.tiny import tiny_model
from tests.command import foveate as run
from tests.conftest import ROOT
from tests.support import awake, chat, gap, picture
from tests.vlms import VLMS

SIGNS = ROOT / "examples" / "signs.jpg"
SCALE = 4  # by which it is shrunk here
# As examples/signs.py draws them, in pixels of the shrunk picture.
THINGS = {"sign": Box(15, 580, 202, 668), "circle": Box(550, 550, 695, 695), "square": Box(575, 75, 700, 200)}
QUICK = Probe(draws=1)


@pytest.fixture(scope="module")
def signs() -> Image.Image:
    """The example's picture at a quarter of its size."""
    shown = Image.open(SIGNS)
    return shown.resize((shown.width // SCALE, shown.height // SCALE))


@pytest.fixture(scope="module")
def embedded() -> Foveate:
    return foveate.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def word(embedded: Foveate, signs: Image.Image) -> Explanation:
    """Of the word on the sign."""
    return embedded.explain(signs, "what word is on the sign?", probe=Probe(draws=2))


def awake_model(method: str, **options: Any) -> Foveate:
    made = tiny_model(method, options)
    awake(made.model)
    return made


def on(explained: Explanation, box: Box, number: int = 0) -> float:
    """The fraction of relevance that lies on a part of the picture."""
    mask = pixels_of([box], explained.size)
    raster = explained.raster
    density = np.repeat(
        np.repeat(explained.density[number], np.diff(raster.rows), 0), np.diff(raster.columns), 1
    )
    return float(density[mask].sum() / density.sum())


def share(box: Box, size: Size) -> float:
    """The fraction of the picture's area."""
    return float(pixels_of([box], size).mean())


# A truth that is known.


@pytest.mark.parametrize(
    ("question", "answer", "thing"),
    [
        ("what word is on the sign?", "open", "sign"),
        ("what digit is on the red shape?", "9", "circle"),
        ("what letter is on the blue shape?", "e", "square"),
    ],
)
def test_an_answer_rests_on_what_was_asked_about(
    embedded: Foveate, signs: Image.Image, question: str, answer: str, thing: str
) -> None:
    """Its part of the picture, 3 to 4 %, has at least 6 times as much relevance as its area says."""
    explained = embedded.explain(signs, question, probe=Probe(draws=2))
    assert explained.answer == answer
    own = on(explained, THINGS[thing])
    assert own > 6 * share(THINGS[thing], explained.size)
    assert all(on(explained, box) < own / 2 for name, box in THINGS.items() if name != thing)
    (found,) = explained.faithfulness
    assert found.changed and not any(found.random_changed)
    assert found.score > 0.4 and abs(found.random_fall) < 0.1


def test_each_letter_rests_on_itself(word: Explanation) -> None:
    """Four letters side by side: the relevance of each lies further right than that of the one before."""
    assert [one.text for one in word.words] == ["o", "p", "e", "n"]
    raster = word.raster
    middles = (raster.columns[:-1] + raster.columns[1:]) / 2
    centres = []
    for number in range(1, 5):
        on_sign = word.density[number] * (word.density[number] > 0.5 * word.density[number].max())
        centres.append(float((on_sign.sum(0) * middles).sum() / on_sign.sum()))
    assert centres == sorted(centres)
    assert all(THINGS["sign"].left <= centre <= THINGS["sign"].right for centre in centres)


def test_a_lie_is_found_out(embedded: Foveate, signs: Image.Image) -> None:
    """The same part moved to another thing: hiding that changes nothing, and scores nothing."""
    talk = embedded.chat(signs)
    answer = talk.ask("what word is on the sign?")
    story = Story(signs, talk.messages[:-1], talk.areas, answer.tokens)
    own, size = Own(embedded.model, embedded.processor), Size(signs.height, signs.width)
    answered = forced(own, own.prepared(story.messages), story.answer)
    claims = {name: ([box], pixels_of([box], size)) for name, box in THINGS.items()}
    found = {one.claim: one for one in measure(own, story, answered, claims, Probe(draws=1))}
    assert found["sign"].score > 0.5 and found["sign"].changed
    assert abs(found["circle"].score) < 0.1 and not found["circle"].changed
    assert [one.boxes for one in found.values()] == [[box] for box in THINGS.values()]


# Every method, every VLM.


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_explained(method: str, tmp_path: Path) -> None:
    made = awake_model(method)
    explained = made.explain(picture(61, 97), "Why?", probe=QUICK, max_new_tokens=3)
    size = Size(61, 97)
    assert explained.size == size and explained.model == made.model.method.title
    turns = 2 if method == "chain_of_spot" else 1
    assert len(explained.tokens) >= turns * made.plan(picture(61, 97)).tokens // 2
    boxes = [token.box for token in explained.tokens if token.box is not None]
    assert boxes and all(box == box.clipped(size) and box.width > 0 < box.height for box in boxes)
    assert explained.parts and all(box == box.clipped(size) for box in explained.parts)
    assert sum(token.relevance for token in explained.tokens) == pytest.approx(1, abs=1e-4)
    assert sum(explained.shares) <= 1.0001
    for one in explained.words:
        assert 0 <= one.probability <= 1 and 0 < one.on_picture < 1
        assert sum(one.tokens) == pytest.approx(1, abs=1e-4)
        assert sum(one.parts) <= 1.0001
    assert explained.faithfulness[0].claim == "relevance"
    assert method == "inf_llava" or explained.views[0].box == whole(size)
    again = Explanation.of(json.loads(json.dumps(explained.to_dict())), explained.picture)
    assert again == explained
    explained.save(tmp_path / "explained.png")
    explained.save(tmp_path / "explained.html")
    explained.save(tmp_path / "explained.json")
    assert json.loads((tmp_path / "explained.json").read_text()) == explained.to_dict()


def test_what_methods_have_of_their_own(tmp_path: Path) -> None:
    """Kept tokens, gates, chains, and the box that the model wrote."""
    routed = awake_model("slime", gamma=0.5).explain(picture(112, 112), "Why?", probe=QUICK, max_new_tokens=2)
    assert not all(token.kept for token in routed.tokens)
    assert all(token.relevance == 0 for token in routed.tokens if not token.kept)
    assert routed.gates.keys() == {"MLP", "query former"} and sum(routed.gates.values()) == pytest.approx(1)
    gated = awake_model("llava_hr").explain(picture(60, 60), "Why?", probe=QUICK, max_new_tokens=2)
    assert [*gated.gates] == ["block 1", "block 2"] and all(-1 <= gate <= 1 for gate in gated.gates.values())
    assert [view.role for view in gated.views] == ["high resolution", "low resolution"]
    chained = awake_model("coroi").explain(picture(90, 60), "Why?", probe=QUICK, max_new_tokens=2)
    assert [chain.name for chain in chained.chains] == ["2x", "3x", "4x"]
    assert [box for chain in chained.chains for box in chain.boxes] == chained.regions


def test_a_crop_is_explained_where_it_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chain-of-Spot's second view: its tokens lie in the box that the model wrote."""
    made = awake_model("chain_of_spot")
    monkeypatch.setattr(
        ChainOfSpot, "region", lambda self, said, size: foveate.picture.boxes.ReadBox(Box(20, 10, 60, 50))
    )
    explained = made.explain(picture(61, 97), "Why?", probe=Probe(draws=1), max_new_tokens=2)
    area = Box(20, 10, 60, 50)
    assert explained.regions == [area]
    assert [(view.role, view.box) for view in explained.views] == [
        ("global", whole(Size(61, 97))),
        ("crop", area),
    ]
    crop = [token.box for token in explained.tokens[16:]]
    assert crop == [
        Box(20 + 10 * c, 10 + 10 * r, 30 + 10 * c, 20 + 10 * r) for r in range(4) for c in range(4)
    ]
    assert [one.claim for one in explained.faithfulness] == ["relevance", "regions"]
    assert explained.faithfulness[1].area == 1600 / (61 * 97)


@pytest.mark.parametrize("crop", ["original", "padded"])
def test_what_is_hidden_is_hidden_in_the_crop(crop: str) -> None:
    """A crop of the hidden picture = the crop with its part hidden, padding and all."""
    options = {"crop": crop, "box_format": "unit_xyxy" if crop == "padded" else "unit_xxyy"}
    method = tiny_model("chain_of_spot", options).model.method
    assert isinstance(method, ChainOfSpot)
    shown, mask = picture(61, 97), np.zeros((61, 97), dtype=bool)
    mask[5:40, 30:70] = True
    colour = (9, 8, 7)
    hidden = np.array(shown)
    hidden[mask] = colour
    boxes = [Box(20.4, 10.2, 60.7, 50.1), Box(0, 0, 97, 61)]
    boxes += [Box(-3.5, -18, 90, 79)] if crop == "padded" else []
    for box in boxes:
        cut, area = method.crop(shown, box), method.area(box, Size(61, 97))
        assert (area.width, area.height) == cut.size
        story = Story(shown, chat("Why?", shown, cut), [whole(Size(61, 97)), area], [5])
        first, second = (part["image"] for part in story.masked(mask, colour).messages[0]["content"][:2])
        assert np.array_equal(np.array(first), hidden)
        assert np.array_equal(np.array(second), np.array(method.crop(Image.fromarray(hidden), box)))


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "idefics3"]
)
def test_any_vlm_is_explained(name: str) -> None:
    vlm = VLMS[name]()
    explained = Zoom(vlm.model, vlm.processor).explain(
        picture(60, 90), "Why?", no_zoom=True, probe=QUICK, max_new_tokens=3
    )
    assert explained.model == type(vlm.model).__name__ and len(explained.faithfulness) == 1
    assert sum(token.relevance for token in explained.tokens) == pytest.approx(1, abs=1e-4)
    assert Explanation.of(explained.to_dict(), explained.picture) == explained
    assert "<title>Why?</title>" in explained.page()


def test_a_closer_look_is_explained() -> None:
    vlm = VLMS["qwen3_vl"]()
    explained = Zoom(vlm.model, vlm.processor).explain(
        picture(120, 160), "Why?", box=(40, 20, 100, 80), probe=QUICK, max_new_tokens=3
    )
    assert explained.regions == [Box(40, 20, 100, 80)]
    assert [view.role for view in explained.views] == ["whole", "crop"]
    inside = [
        token.box for token in explained.tokens if token.box and Box(40, 20, 100, 80).contains(token.box)
    ]
    assert len(inside) > 16  # the crop is enlarged
    assert {one.claim for one in explained.faithfulness} == {"relevance", "regions"}


def test_foveates_own_are_explained_alike_by_zoom(
    embedded: Foveate, signs: Image.Image, word: Explanation
) -> None:
    closer = Zoom(embedded.model, embedded.processor)
    explained = closer.explain(signs, "what word is on the sign?", no_zoom=True, probe=Probe(draws=0))
    assert (
        explained.answer == word.answer and explained.tokens == word.tokens and explained.words == word.words
    )
    assert explained.faithfulness == []


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str) -> None:
    half = awake_model(method)
    half.model.bfloat16()
    found = half.explain(picture(60, 60), "Why?", words=1, probe=QUICK, max_new_tokens=1)
    assert np.isfinite(found.density).all() and found.density.max() > 0
    assert sum(token.relevance for token in found.tokens) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bits", [pytest.param("8bit", marks=pytest.mark.slow), "4bit"])
def test_quantised(bits: Any, signs: Image.Image) -> None:
    small = foveate.load(device="cpu", quantize=bits)
    explained = small.explain(signs, "what digit is on the red shape?", probe=Probe(draws=1), words=2)
    assert explained.answer == "9" and explained.faithfulness[0].changed
    assert on(explained, THINGS["circle"]) > 6 * share(THINGS["circle"], explained.size)


# The numbers.


@pytest.mark.parametrize("method", ["anyres", "coroi", "slime"])
def test_rows_of_an_answer_are_those_of_whole_maps(method: str) -> None:
    """By the book: all attention maps and gradients at once, for each token of an answer."""
    made = awake_model(method)
    own = Own(made.model, made.processor)
    prepared = own.prepared(chat("Why?", picture(60, 90)))
    answer = [70, 90, 80]
    inputs = continued(prepared.inputs, answer[:-1])
    rows = answer_relevance(made.model, inputs, torch.tensor(answer))
    decoder = made.model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    for number, token in enumerate(answer):
        seen: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output[1]))
            for layer in decoder.layers
        ]
        logits = made.model(**inputs, use_cache=False).logits[0, number - 3]
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(logits[token], seen)
        sigma = torch.eye(inputs["input_ids"].shape[1])[None]
        for attention, gradient in zip(seen, gradients, strict=True):
            sigma = propagate(sigma, interpret(attention.detach(), gradient))
        assert gap(rows[number], sigma[0, number - 3]) <= 1e-5 * float(rows[number].abs().max())
    decoder.set_attn_implementation(before)


def test_the_first_row_is_that_of_the_most_likely_token(embedded: Foveate, signs: Image.Image) -> None:
    own = Own(embedded.model, embedded.processor)
    prepared = own.prepared(chat("what word is on the sign?", signs))
    answer = embedded.ask(signs, "what word is on the sign?").tokens
    assert forced(own, prepared, answer).best == answer  # greedy: the tokens are those that were written
    one = answer_relevance(embedded.model, prepared.inputs, torch.tensor(answer[:1]))
    assert gap(one, relevance(embedded.model, prepared.inputs)) < 1e-6


def test_how_many_tokens_are_explained_at_once_does_not_matter(
    embedded: Foveate, signs: Image.Image, word: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanation, "AT_ONCE", 3)
    again = embedded.explain(signs, "what word is on the sign?", probe=Probe(draws=0))
    for one, other in zip(word.words, again.words, strict=True):
        assert one.tokens == pytest.approx(other.tokens, abs=1e-5)
        assert one.on_picture == pytest.approx(other.on_picture, abs=1e-5)
    few = embedded.explain(signs, "what word is on the sign?", words=2, probe=Probe(draws=0))
    assert [one.text for one in few.words] == ["o", "p"]
    assert few.notes == ["the last 2 tokens of the answer are not explained"]


def test_density_is_relevance_per_pixel() -> None:
    """A part over half of a cell, and one over two cells; every pixel counted once."""
    raster = Raster(Size(30, 60), cells=6)
    assert (raster.rows.tolist(), raster.columns.tolist()) == ([0, 10, 20, 30], [0, 10, 20, 30, 40, 50, 60])
    found = raster.density([Box(0, 0, 5, 10), Box(10, 10, 30, 20)], torch.tensor([[3.0, 4.0]]))[0]
    assert found[0, 0] == 3 / 100 and found[1, 1] == found[1, 2] == 2 / 100
    assert (found * raster.areas).sum() == pytest.approx(7)
    odd = Raster(Size(37, 1001))
    spread = odd.density([Box(0.5, 0.25, 1000.5, 36.75), Box(0, 0, 1001, 37)], torch.tensor([[1.0, 2.0]]))[0]
    assert (spread * odd.areas).sum() == pytest.approx(3) and odd.areas.sum() == 37 * 1001
    assert Raster(Size(1, 1)).areas.tolist() == [[1]]
    assert Raster(Size(2, 5000)).density([], torch.zeros(1, 0)).sum() == 0


def test_the_highest_cells() -> None:
    raster = Raster(Size(30, 60), cells=6)
    density = np.zeros((3, 6))
    density[1, 1:4], density[2, 0] = (5, 6, 4), 1
    chosen = raster.highest(density, 2 / 18)
    assert raster.boxes(chosen) == [Box(10, 10, 30, 20)]
    assert raster.highest(density, 0.5).sum() == 4  # what has no relevance is not chosen
    assert pixels_of(raster.boxes(chosen), Size(30, 60)).sum() == 200


def test_random_parts_have_the_same_area_and_lie_elsewhere() -> None:
    mask = np.zeros((40, 50), dtype=bool)
    mask[5:15, 30:50] = True
    rng = np.random.default_rng(0)
    places = [elsewhere(mask, rng) for _ in range(20)]
    assert all(place.sum() == mask.sum() for place in places)
    assert max((place & mask).sum() for place in places) <= 0.1 * mask.sum()
    assert len({place.tobytes() for place in places}) > 15
    again = elsewhere(mask, np.random.default_rng(0))
    assert np.array_equal(again, places[0])  # seeded
    assert elsewhere(np.ones((3, 3), dtype=bool), rng).all()


def test_scores_of_faithfulness() -> None:
    found = Faithfulness("relevance", [Box(0, 0, 1, 1)], 0.1, 0.9, 0.3, True, [0.9, 0.7], [False, False])
    assert (round(found.fall, 6), round(found.random_fall, 6), round(found.score, 6)) == (0.6, 0.1, 0.5)
    assert Faithfulness.of(json.loads(json.dumps(found.to_dict()))) == found


# Files.


def test_the_page_needs_nothing_and_runs_nothing_that_was_typed(word: Explanation) -> None:
    nasty = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> <image> & \u2028'
    page = replace(word, question=nasty, answer=nasty, notes=[nasty], gates={nasty: 0.5}).page()
    assert not re.search(r"<(?:link|iframe|object|embed)|src=\"(?!data:)|@import|url\(", page)
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    assert page.count("<script") == 2 and "<img src=x" not in page
    assert unescape(re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)[1]) == nasty  # type: ignore[index]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not opened")
def test_the_page_draws_itself(word: Explanation, tmp_path: Path) -> None:
    """In headless Chromium: its script runs to the end, and all layers are there."""
    word.save(tmp_path / "word.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    opened = subprocess.run(
        [str(CHROMIUM), *flags, (tmp_path / "word.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown = opened.stdout
    assert f"{word.size.width} x {word.size.height} pixels" in shown  # written by the script's last line
    assert len(re.findall(r'class="box views"', shown)) == len(word.views) == 10
    assert len(re.findall(r'class="box hidden"', shown)) == len(word.faithfulness[0].boxes)
    assert re.search(r'id="map"[^>]*href="data:image/png', shown)
    assert len(re.findall(r'id="layer-', shown)) == 4


def test_only_known_endings_are_written(word: Explanation, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"pictures are written as"):
        word.save(tmp_path / "word.txt")
    with pytest.raises(FoveateError, match="there is no folder"):
        word.save(tmp_path / "nowhere" / "word.html")
    with pytest.raises(FoveateError, match="a picture of 747 x 747 pixels, not of 10 x 20"):
        Explanation.of(word.to_dict(), picture(20, 10))
    assert [*tmp_path.iterdir()] == []


def test_an_explanation_is_a_picture_in_a_notebook(word: Explanation) -> None:
    assert word._repr_png_().startswith(b"\x89PNG")
    assert word.show().width == 1200


# Doors.


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signs: Image.Image) -> None:
    monkeypatch.chdir(tmp_path)
    signs.save("signs.png")
    asked = ["explain", "signs.png", "what digit is on the red shape?", "--draws", 1, "--dtype", "float32"]
    result = run(*asked, "--out", "a.html", "--out", "a.png", "--out", "a.json")
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["what digit is on the red shape?", "9"]
    assert lines[-3:] == ["written to a.html", "written to a.png", "written to a.json"]
    assert any(
        line.startswith("without the most relevant part, 5 % of the picture: another") for line in lines
    )
    assert Image.open("a.png").width == 1200
    value = json.loads(Path("a.json").read_text())
    assert Explanation.of(value, signs).answer == "9"
    printed = run(*asked, "--json", "--draws", 0)
    assert json.loads(printed.stdout)["faithfulness"] == []


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--out", "a.pdf2"), "pictures are written as .png, .jpg or .webp"),
        (("--share", "0.9"), "share must be above 0 and at most 0.5 of the picture, not 0.9"),
        (("--zoom", "answer", "--quantize", "4bit"), "--quantize is for models that Foveate reads"),
        (("--out", "no/a.html"), "there is no folder"),
    ],
)
def test_wrong_input_is_one_sentence(
    more: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(20, 30).save("it.png")
    result = run("explain", "it.png", "Why?", *more)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1 and problem in result.stderr


def test_what_cannot_be_explained(embedded: Foveate) -> None:
    with pytest.raises(FoveateError, match="there is no answer to explain: ask a question first"):
        embedded.chat(picture(20, 30)).explain()
    for wrong in ({"draws": -1}, {"seed": -1}, {"share": 0.0}):
        with pytest.raises(FoveateError, match="must be"):
            Probe(**wrong)
    with pytest.raises(FoveateError, match="words must be at least 1"):
        embedded.explain(picture(20, 30), "what word is on the sign?", words=0)
    with pytest.raises(FoveateError, match="unknown reading 'chafer'"):
        embedded.explain(picture(20, 30), "what word is on the sign?", reading="chafer")  # type: ignore[arg-type]


def test_a_picture_of_one_pixel(embedded: Foveate) -> None:
    explained = embedded.explain(picture(1, 1), "what word is on the sign?", probe=Probe(draws=1))
    assert (
        explained.density.shape[1:] == (1, 1)
        and Explanation.of(explained.to_dict(), picture(1, 1)) == explained
    )
    assert "<title>" in explained.page() and explained.show().width == 1200


@pytest.mark.parametrize("method", ["coroi", "slime"])
def test_in_inference_mode(method: str) -> None:
    with torch.inference_mode():
        explained = awake_model_outside(method).explain(
            picture(40, 50), "Why?", words=1, probe=Probe(draws=0), max_new_tokens=1
        )
    assert explained.words[0].on_picture > 0


def awake_model_outside(method: str) -> Foveate:
    """A model made in inference mode has no gradients."""
    with torch.inference_mode(False):
        return awake_model(method)


def test_the_last_answer_of_a_chat_is_explained(embedded: Foveate, signs: Image.Image) -> None:
    talk = embedded.chat(signs)
    talk.ask("what digit is on the red shape?")
    answer = talk.ask("what word is on the sign?")
    explained = talk.explain(probe=Probe(draws=0))
    assert (explained.question, explained.answer) == ("what word is on the sign?", answer.text)
    assert [token.kept for token in explained.tokens] == [True] * embedded.plan(signs).tokens


def test_who_explains_is_alone() -> None:
    gate, order = Gate(), []

    def ask() -> None:
        with gate.shared():
            order.append("asked")

    with gate.alone():
        other = Thread(target=ask)
        other.start()
        with gate.shared():  # the same thread may
            order.append("explained")
        other.join(0.2)
        assert other.is_alive() and order == ["explained"]
    other.join(10)
    assert order == ["explained", "asked"]
    with gate.shared():
        waiting: Callable[[], Any] = gate.alone
        alone = Thread(target=lambda: waiting().__enter__())
        alone.start()
        alone.join(0.2)
        assert alone.is_alive()
    alone.join(10)
    assert not alone.is_alive()
