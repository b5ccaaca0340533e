"""What the tower and the LLM are pre-trained on: labels lie where their objects are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.errors import FoveateError
from foveate.lab.levels import KINDS, LEVELS
from foveate.lab.materials import materials
from foveate.lab.objects import COLOURS, SHAPES, SIGN, Glyph, Thing
from foveate.lab.packing import encode
from foveate.lab.pages import make_page, page_labels
from foveate.lab.parts import ASSETS, PARTS, load_parts, prepare
from foveate.lab.questions import ask_about, caption
from foveate.lab.reader import BAG, LONGEST, Descriptions, bag_embeddings, comprehension, sketch
from foveate.lab.scales import SCALES, Scale, Schedule
from foveate.lab.scenes import CELLS, Scene
from foveate.lab.tower import (
    CLASSES,
    GLYPHS,
    UNKNOWN,
    CropSampler,
    Window,
    crop,
    normalised,
    patch_labels,
    random_window,
    tower_scenes,
)
from foveate.lab.words import PLACES, lab_tokenizer
from foveate.model.processing import FoveateImageProcessor
from foveate.picture.geometry import Box

WHOLE = Window(0, 0, 144, 144)


def a_scene() -> Scene:
    """A red circle with a k over pixels 16 to 48, and a blue sign with `at` over 64 to 96, 72 to 88."""
    rng = np.random.default_rng(0)
    circle = Thing("circle", "red", Box(16, 16, 48, 48), "k", None, None, (Glyph("k", Box(28, 28, 36, 36)),))
    letters = (Glyph("a", Box(66, 76, 78, 86)), Glyph("t", Box(80, 76, 92, 86)))
    sign = Thing("sign", "blue", Box(64, 72, 96, 88), None, None, "at", letters)
    return Scene(rng.integers(0, 256, (144, 144, 3), dtype=np.uint8), (circle, sign))


def test_patches_are_labelled_with_what_lies_on_them() -> None:
    labels = patch_labels(a_scene(), WHOLE, 18).reshape(len(CLASSES), 18, 18)
    shape, colour, glyph, cell, place = labels
    circle, sign = 1 + SHAPES.index("circle"), 1 + SHAPES.index("sign")
    assert (shape[2:6, 2:6] == circle).all() and (shape == circle).sum() == 16
    assert (shape[9:11, 8:12] == sign).all() and (shape == sign).sum() == 8
    assert (colour[2:6, 2:6] == 1 + list(COLOURS).index("red")).all()
    assert (glyph[2:6, 2:6] == 1 + GLYPHS.index("k")).all()
    assert (glyph[9:11, 8:10] == 1 + GLYPHS.index("a")).all()
    assert (glyph[9:11, 10:12] == 1 + GLYPHS.index("t")).all()
    assert ((shape > 0) == (glyph > 0)).all()
    assert (cell[2:6, 2:6] == 1 + CELLS.index("top-left")).all()
    assert (cell[9:11, 8:12] == 1 + CELLS.index("centre")).all()
    assert (cell[shape == 0] == UNKNOWN).all()
    assert (place[9:11, 8:10] == 1).all() and (place[9:11, 10:12] == 2).all() and (place > 0).sum() == 8


def test_a_part_of_the_picture_does_not_tell_places() -> None:
    """Neither where in the picture an object is, nor where in its word a letter, if its first is cut off."""
    labels = patch_labels(a_scene(), Window(48, 48, 48, 48), 6)
    assert (labels[3][labels[0] > 0] == 0).all() and (labels[4] > 0).any()
    cut = patch_labels(a_scene(), Window(79, 48, 48, 48), 6)  # the t alone
    assert (cut[4][cut[0] > 0] == 0).all() and (cut[2] == 1 + GLYPHS.index("t")).any()


def test_a_glyph_outside_the_window_is_not_asked_for() -> None:
    shape, _, glyph, *_ = patch_labels(a_scene(), Window(36, 0, 48, 48), 6)  # without its k
    assert (shape > 0).any() and not (glyph > 0).any()
    glyph = patch_labels(a_scene(), Window(30, 0, 48, 48), 6)[2]  # three quarters of the k
    assert (glyph[glyph > 0] == 1 + GLYPHS.index("k")).all() and (glyph > 0).any()


def test_windows_are_what_the_image_processor_would_show() -> None:
    scene = a_scene()
    processor = FoveateImageProcessor("llava", image_size=48, patch_size=8)
    expected = processor([scene.picture], return_tensors="pt")["pixel_values"]
    found = normalised(crop(scene, WHOLE, 48)[None])
    assert float((found - expected).abs().max()) < 1e-5
    assert np.array_equal(crop(scene, WHOLE, 48, stride=True), scene.picture[::3, ::3])
    assert np.array_equal(crop(scene, Window(5, 9, 48, 48), 48), scene.picture[9:57, 5:53])
    beyond = crop(scene, Window(-12, 100, 48, 48), 48)
    assert not beyond[:, :12].any() and not beyond[44:].any()
    assert np.array_equal(beyond[:44, 12:], scene.picture[100:, :36])


def test_uneven_windows_are_stretched_and_stand_out() -> None:
    rng = np.random.default_rng(0)
    windows = [random_window(rng, 144, 48, 1.6) for _ in range(400)]
    ratios = [w.width / w.height for w in windows]
    assert 1.4 < max(ratios) < 1.7 and 0.6 < min(ratios) < 0.7
    outside = [w for w in windows if min(w[:2]) < 0 or max(w.left + w.width, w.top + w.height) > 144]
    assert 0.05 < len(outside) / 400 < 0.35
    plain = [random_window(rng, 144, 48) for _ in range(20)]
    assert all(w[2:] == (48, 48) and min(w) >= 0 and max(w[:2]) <= 96 for w in plain)


@pytest.mark.parametrize("astray", [0, 4])
def test_pages_start_with_glyphs_in_the_middle_of_patches(astray: int) -> None:
    rng, stock = np.random.default_rng(0), materials("tower")
    off = []
    for _ in range(20):
        page = make_page(rng, stock, 48, 8, 1.0, astray)
        assert page.picture.shape == (48, 48, 3)
        centres = (page.boxes[:, :2] + page.boxes[:, 2:]) / 2
        off.append(np.abs((centres - 4 + 4) % 8 - 4).max(1))
        colour, glyph = page_labels(page, 6, GLYPHS)
        assert (colour > 0).all() and 0 < (glyph > 0).sum() < 36
    far = np.concatenate(off).max()
    assert far <= 0.5 if astray == 0 else far > 2.5


def test_batches_move_from_pages_to_scenes() -> None:
    scale = SCALES["nano"]
    sampler = CropSampler(tower_scenes(scale, "tower", 8), scale, 6, 0)
    pixels, early = sampler.batch(10, 0.0)
    assert pixels.shape == (10, 3, 48, 48) and early.shape == (10, len(CLASSES), 36)
    assert (early[:, 0] == UNKNOWN).all()  # pages have no shapes
    late = sampler.batch(10, 0.9)[1]
    assert (late[:2, 0] == UNKNOWN).all() and (late[2:, :3] != UNKNOWN).all()


def test_descriptions_fit_their_questions() -> None:
    tokenizer = lab_tokenizer()
    source = Descriptions(tokenizer, list(LEVELS), 0)
    for _ in range(8):
        ids, positions, _, questions = source.batch(4)
        assert ids.shape[2] == BAG and positions.shape == ids.shape[:2]
        assert (positions.diff(dim=1) > 0).all() and int(positions.max()) <= LONGEST
        for bags, row in zip(ids, questions, strict=True):
            known = set(bags[bags >= 0].tolist())
            for question in row:
                if question.kind in ("letter", "digit", "where"):
                    sample = source.sample(question)
                    assert set(sample.ids[sample.answer : -1]) <= known


def test_captions_say_everything_about_every_object() -> None:
    tokenizer = lab_tokenizer()
    scene = tower_scenes(SCALES["nano"], "tower", 4)[3]
    said = caption(scene, np.random.default_rng(0))
    for thing, words in zip(scene.things, said, strict=True):
        texts = [text for text in (thing.letter, thing.digit, thing.word) if text is not None]
        expected = sorted([thing.colour, thing.shape, scene.cell(thing), *texts])
        assert sorted([words.text, *words.answer.split()]) == expected
        sample = encode(words, tokenizer)
        assert tokenizer.eos_token_id not in sample.ids
        assert tokenizer.decode(sample.ids[: sample.answer]) == words.text


def test_bags_are_sums_of_embeddings() -> None:
    embedding = torch.nn.Embedding(10, 4)
    found = bag_embeddings(torch.tensor([[[1, 2, -1], [-1, -1, -1]]]), embedding, noise=0.0)
    assert torch.allclose(found[0, 0], embedding.weight[1] + embedding.weight[2])
    assert torch.equal(found[0, 1], torch.zeros(4))


@pytest.mark.parametrize("level", LEVELS)
def test_sketches_are_scenes_without_pictures(level: str) -> None:
    rng = np.random.default_rng(0)
    cells, kinds = set(), set()
    for _ in range(60):
        scene = sketch(LEVELS[level], rng)
        cells |= {scene.cell(thing) for thing in scene.things}
        kinds |= {q.kind for q in ask_about(scene, LEVELS[level].questions, rng)}
    assert cells == set(CELLS) and kinds == set(LEVELS[level].questions)


def test_prepared_parts_are_noted_and_named_by_their_weights(prepared: Path) -> None:
    place = prepared / "parts" / "nano"
    notes = {p: json.loads((place / p / "prepared.json").read_text(encoding="utf-8")) for p in PARTS}
    assert set(notes["reader"]["accuracy"]) == set(KINDS) - {"absent"}
    for part in ("tower", "convnet"):
        assert set(notes[part]["accuracy"]) == {"1", "1.5", "2", "3", "4"}
    parts = load_parts("nano", prepared)
    again = load_parts("nano", prepared)
    keys = [(p.tower_key, p.reader_key, p.convnet_key) for p in (parts, again)]
    assert keys[0] == keys[1] and len({*keys[0]}) == 3 and parts.convnet == place / "convnet"
    assert parts.reader.config.vocab_size == len(parts.tokenizer)


def test_what_is_prepared_is_not_made_again(prepared: Path) -> None:
    steps: list[str] = []
    prepare("nano", SCALES["nano"], prepared, report=lambda part, *_: steps.append(part))
    assert not steps
    with pytest.raises(FoveateError, match="unknown parts ear"):
        prepare("nano", SCALES["nano"], prepared, parts=["ear"])


def test_a_cut_word_goes_on_without_places() -> None:
    """The letters after a cut come in order, and every bag with a place comes before them."""
    source = Descriptions(lab_tokenizer(), ["words"], seed=0)
    box, cut = Box(0, 0, 1, 1), 0
    thing = Thing(SIGN, "red", box, None, None, "acehk", ())
    scene = Scene(np.zeros((3, 3, 3), dtype=np.uint8), (thing,))
    for _ in range(40):
        bags = [bag for bag in source._bags(scene, [thing], overview=False) if bag]
        placed = [len(set(bag) & set(PLACES)) == 1 for bag in bags]
        assert placed == sorted(placed, reverse=True)
        letters = [next(word for word in bag if len(word) == 1) for bag in bags]
        seen = list(dict.fromkeys(letters))
        assert seen == list("acehk")
        cut += not all(placed)
    assert 5 < cut < 25


def test_wrong_scales_and_schedules_are_refused() -> None:
    values = {**SCALES["tiny"].__dict__, "patch": 7}
    with pytest.raises(ValueError, match="patches of 7"):
        Scale(**values)
    with pytest.raises(ValueError, match="positive steps"):
        Schedule(0, 4, 1e-3)


def test_the_packaged_reader_finds_what_it_is_asked_for(tmp_path: Path) -> None:
    """Far above the in-scene guess: an LLM that cannot retrieve would make every method look alike."""
    parts = load_parts("tiny", tmp_path)
    found = comprehension(parts.reader.eval(), parts.tokenizer, SCALES["tiny"].levels, batches=3)
    assert min(found[kind] for kind in ("letter", "digit", "rev", "attr", "where")) > 0.8
    place = ASSETS / "tiny"
    assert sum(file.stat().st_size for file in place.rglob("*")) < 4 * 2**20
