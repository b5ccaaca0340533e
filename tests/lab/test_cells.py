"""Training and measuring, on a lab so small that it learns nothing: what is kept, shared and reproduced."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ConvNextModel
from typer.testing import CliRunner

from foveate.ask.conversation import Chat
from foveate.ask.engine import Engine, Said
from foveate.ask.foveate import load
from foveate.data.dataset import cut_out, encode
from foveate.errors import FoveateError
from foveate.lab import conversing, training
from foveate.lab import data as stores
from foveate.lab.cell import Bench, Cell, make_bench
from foveate.lab.cli import app
from foveate.lab.comparing import MARKS
from foveate.lab.controls import CONTROLS, GivenRegion, controls
from foveate.lab.conversing import make_student, under
from foveate.lab.data import view_key
from foveate.lab.experiment import Experiment, StageSpec, Variant, read_experiment
from foveate.lab.levels import level_named
from foveate.lab.packing import Packed
from foveate.lab.parts import load_parts
from foveate.lab.reading import Answers, read
from foveate.lab.report import markdown
from foveate.lab.run import run
from foveate.lab.scales import SCALES
from foveate.lab.scenes import make_scene
from foveate.lab.student import Student
from foveate.lab.training import train_cell
from foveate.methods import METHODS, method_class
from foveate.methods.base import TowerGeometry, Widths
from foveate.picture.geometry import Box, Size, whole
from foveate.picture.source import Source, view_of, views_of
from tests.support import gap

ALL = ("llava", "anyres", *CONTROLS)


def cell(method: str, steps: int = 4, seed: int = 0, **options: object) -> Cell:
    return Cell(method, seed, "words", "nano", steps, options, points=1)


@pytest.mark.parametrize("method", ["llava", "llava_hr", "coroi", "chain_of_spot", "slime", "inf_llava"])
def test_rows_train_in_bfloat16_to_the_same_loss(bench: Bench, tmp_path: Path, method: str) -> None:
    losses: list[list[float]] = []
    for bf16 in (False, True):
        losses.append([])
        result = train_cell(
            cell(method),
            replace(bench, folder=tmp_path / str(bf16), bf16=bf16),
            lambda step, steps, loss: losses[-1].append(loss),
        )
        assert result["bf16"] == bf16
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


def test_controls_are_known_only_where_they_are_asked_for() -> None:
    before = dict(METHODS)
    with controls():
        assert set(CONTROLS) <= set(METHODS)
        with controls():
            pass
        assert set(CONTROLS) <= set(METHODS)
    assert before == METHODS
    with pytest.raises(FoveateError, match="unknown method 'oracle'"):
        method_class("oracle")


@pytest.mark.parametrize("method", ALL)
def test_every_method_trains_and_is_measured(method: str, bench: Bench) -> None:
    with controls():
        result = train_cell(cell(method), bench)
    assert set(result["accuracy"]) == {*(q.kind for q in bench.test.asked), "fine", "coarse"}
    assert all(0 <= value <= 1 for value in result["accuracy"].values())
    assert result["tflop"] > 0 and 0 < result["tokens"] <= result["cost"]["visual_tokens"]
    pictures = result["marks"].split(" ")
    for marks, asked in zip(pictures, bench.test.questions, strict=True):
        assert sorted(marks.lower()) == sorted(MARKS[question.kind] for question in asked)
    for kind, count in result["questions"].items():
        assert "".join(pictures).count(MARKS[kind].upper()) == round(count * result["accuracy"][kind])


@pytest.mark.parametrize("method", ALL)
def test_only_what_a_stage_trains_moves(method: str, bench: Bench) -> None:
    with controls():
        student = Student(cell(method, steps=16), bench)
        student.ready()
        before = {key: tensor.clone() for key, tensor in student.model.state_dict().items()}
        first, second = student.stages()
        for stage, llm_moves in ((first, False), (second, True)):
            optimise = student.optimiser(stage)
            loss = student.forward(bench.train, student.rows(bench.train, [0, 1, 2])).loss
            optimise.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in student.model.connector.parameters())
            optimise.step()
            after = student.model.state_dict()
            moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
            own = {"vision_tower"} if student.builds_tower else set()
            assert moved == {"connector", *own} | ({"language_model"} if llm_moves else set())


def test_an_interrupted_cell_ends_where_an_uninterrupted_one_does(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    wanted = cell("llava", steps=8)
    whole = train_cell(wanted, replace(bench, folder=tmp_path / "whole"))
    other = replace(bench, folder=tmp_path / "cut")

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_cell(wanted, other, stop)
    seen: list[int] = []
    again = train_cell(wanted, other, lambda step, steps, loss: seen.append(step))
    assert seen == [5, 6, 7, 8]
    assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    folders = [replace(bench, folder=tmp_path / name).cells("nano") for name in ("whole", "cut")]
    paths = [folder / wanted.key / "weights.pt" for folder in folders]
    a, b = (torch.load(path, weights_only=True) for path in paths)
    assert all(gap(a[key], b[key]) < 1e-6 for key in a)


BASE = StageSpec(0.5, ("connector", "language_model"), regions=True, method="llava")
STARTED = (BASE, StageSpec(0.5, ("connector", "language_model")))


@pytest.mark.slow
def test_rows_that_start_from_the_same_model_train_it_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of steps, and to the same weights as a row that trains it for itself."""
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    seen: list[int] = []

    def trained(folder: str, row: Cell) -> dict[str, torch.Tensor]:
        seen.clear()
        into = replace(bench, folder=tmp_path / folder)
        result = train_cell(row, into, lambda step, *_: seen.append(step))
        assert len(result["losses"]) == 3
        return torch.load(into.cells("nano") / row.key / "weights.pt", weights_only=True)

    first, second = (
        replace(cell("chain_of_spot", steps=6, **options), stages=STARTED)
        for options in ({}, {"region_from": "centre"})
    )
    trained("shared", first)
    assert seen == [1, 2, 3, 4, 5, 6]
    after = trained("shared", second)
    assert seen == [4, 5, 6]
    alone = trained("alone", second)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(after[key], alone[key]) for key in alone)


@pytest.mark.parametrize("captions", [False, True])
def test_where_to_look_may_be_learnt_beside_the_questions(bench: Bench, captions: bool) -> None:
    """In the words of the row's method, about objects, whatever regions the row learns later."""
    row = replace(cell("chain_of_spot", region_from="centre"), stages=STARTED)
    student = make_student(row, bench)
    base = under(student, student.stages()[0]._replace(captions=captions))
    assert base.method.title == "LLaVA-1.5"
    asked = next(q for q in bench.train.questions[0] if q.region is not None)
    box = [round(float(n) * 1000 / bench.train.size.width) for n in asked.region or ()]
    said = [(q.text, q.answer) for q in base.bench.train.captions[0]]
    words = f"To answer the question: {asked.text}, where is the region of interest in the image?"
    assert (words, "<box>[[{}, {}, {}, {}]]</box>".format(*box)) in said
    about = sum(q.region is not None for q in bench.train.questions[0])
    assert len(said) == about + (len(bench.train.captions[0]) if captions else 0)
    assert base.bench.train.pictures is bench.train.pictures
    learnt = base.loss(base.bench.train, [0, 1], captions=True)
    assert learnt.isfinite() and learnt != base.loss(base.bench.train, [0, 1])
    llava = make_student(replace(cell("llava"), stages=STARTED), bench)
    with pytest.raises(FoveateError, match=r"LLaVA-1\.5 does not ask where to look: regions must be false"):
        under(llava, llava.stages()[0])


def test_names_of_cells_stay() -> None:
    """A folder of results works with later versions."""
    paper = (
        StageSpec(0.25, ("connector.projector",), captions=True, options={"chain": False}),
        StageSpec(0.75, ("connector", "language_model")),
    )
    made = Cell("coroi", 0, "words", "tiny", 1000, {"layers": [0, 1]}, paper, batch=16)
    assert made.key == "coroi-words-1000-seed0-batch16-6fde55"


def test_a_finished_cell_is_not_trained_again(bench: Bench) -> None:
    first = train_cell(cell("llava"), bench)
    steps: list[int] = []
    assert train_cell(cell("llava"), bench, lambda step, *_: steps.append(step)) == first
    assert not steps


def test_the_same_seed_gives_the_same_result_and_another_seed_another(bench: Bench, tmp_path: Path) -> None:
    results = [
        train_cell(cell("llava", seed=seed), replace(bench, folder=tmp_path / str(n)))["losses"]
        for n, seed in enumerate((0, 0, 1))
    ]
    weights = [
        torch.load(
            replace(bench, folder=tmp_path / str(n)).cells("nano")
            / cell("llava", seed=seed).key
            / "weights.pt"
        )
        for n, seed in enumerate((0, 0, 1))
    ]
    key = "connector.projector.0.weight"
    assert results[0] == results[1] and torch.equal(weights[0][key], weights[1][key])
    assert not torch.equal(weights[0][key], weights[2][key])


def test_methods_share_the_features_of_equal_views(bench: Bench) -> None:
    with controls():
        for method, files in (("llava", 1), ("pooled", 10), ("anyres", 10), ("resampler", 10)):
            Student(cell(method), bench).ready()
            made = list(bench.folder.glob(f"features/{bench.train.key}-*/*.npy"))
            assert len(made) == files, method
    assert not list(bench.folder.glob("features/*/*.part"))


def test_cached_features_are_those_of_the_model(bench: Bench) -> None:
    student = Student(cell("anyres"), bench)
    student.ready()
    cached = student.features[bench.train.key].gather(student.plan, [3, 1])
    pictures = [bench.train.pictures[i] for i in (3, 1)]
    pixels = student.processor.image_processor(pictures)["pixel_values"]
    with torch.no_grad():
        direct = student.model.encode_views(pixels)
    assert gap(cached, direct) < 0.02 * float(direct.abs().max())  # bfloat16


@pytest.mark.parametrize(("memory", "said"), [(2**30, "kept in memory"), (0, "encoded at every step")])
def test_without_room_on_the_disk_features_are_kept_elsewhere(
    memory: int, said: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = Student(cell("anyres"), bench)
    on_disk.ready()
    expected = on_disk.features[bench.train.key].gather(on_disk.plan, [0, 2])
    monkeypatch.setattr(stores, "SPARE", 2**60)
    student = Student(cell("anyres"), replace(bench, folder=bench.folder / "full"))
    for features in student.features.values():
        features.memory = memory
    assert said in str(student.ready())
    assert gap(student.features[bench.train.key].gather(student.plan, [0, 2]), expected) == 0
    assert not list((bench.folder / "full").rglob("*.npy"))


def test_oracle_sees_the_region_at_the_pictures_own_pixels() -> None:
    with controls():
        oracle = method_class("oracle")(TowerGeometry(48, 8))
    assert isinstance(oracle, GivenRegion)
    for box in (Box(0, 0, 30, 20), Box(60, 70, 90, 100), Box(120, 130, 143, 143), Box(10, 10, 70, 40)):
        plan = oracle.plan_for(144, 144, box)
        left, top, right, bottom = plan.regions[1]
        assert 0 <= left <= box.left and box.right <= right <= 144
        assert 0 <= top <= box.top and box.bottom <= bottom <= 144
        assert right - left == max(48, box.width)
    whole = oracle.plan(144, 144)
    assert view_key(whole, whole.views[0]) == view_key(whole, whole.views[1])


def test_pooled_tokens_are_means_of_the_tiles_under_them() -> None:
    """Features that tell their place in the picture: every pooled token must come from its own place."""
    with controls():
        pooled = method_class("pooled")(TowerGeometry(48, 8), {"with_global": False})
    connector = pooled.build_connector(Widths(2, 2))
    connector.tile_projector = torch.nn.Identity()
    plan = pooled.plan(144, 144)
    rows, columns = torch.meshgrid(torch.arange(18.0), torch.arange(18.0), indexing="ij")
    places = torch.stack([rows, columns], -1)  # of every patch of the 3 x 3 tiles
    views = [torch.zeros(36, 2)]
    for view in plan.views[1:]:
        top, left = int(view.box.top) // 8, int(view.box.left) // 8
        views.append(places[top : top + 6, left : left + 6].reshape(36, 2))
    tokens = connector(torch.stack(views), [plan], None).tokens
    grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).reshape(36, 2)
    assert torch.equal(tokens, 3.0 * grid + 1)


@pytest.mark.parametrize(("method", "inside"), [("convnet", "model.encoder"), ("llava_hr", "convnext")])
def test_a_convnet_starts_from_the_prepared_one(method: str, inside: str, bench: Bench) -> None:
    assert bench.parts.convnet is not None
    prepared = ConvNextModel.from_pretrained(bench.parts.convnet, dtype=torch.float32).encoder.stages
    with controls():
        student = Student(cell(method), bench)
    given = student.model.vision_tower.get_submodule(f"{inside}.stages").state_dict()
    assert given.keys() == prepared.state_dict().keys()
    assert all(torch.equal(given[key], tensor) for key, tensor in prepared.state_dict().items())
    assert student.builds_tower == (method == "llava_hr")


def test_without_a_prepared_convnet_the_control_says_so(bench: Bench) -> None:
    bare = replace(bench, parts=replace(bench.parts, convnet=None))
    with controls(), pytest.raises(FoveateError, match="foveate lab prepare"):
        Student(cell("convnet"), bare)


def test_queries_and_keys_of_the_resampler_meet_at_their_places() -> None:
    """Before anything is learnt, a query looks most at the patches that lie under it."""
    with controls():
        resampler = method_class("resampler")(TowerGeometry(48, 8))
    connector = resampler.build_connector(Widths(96, 96))
    own, tiles = connector.places[0], connector.places[1:].flatten(0, 1)  # (36, D), (9 * 36, D)
    nearest = (own @ tiles.T).argmax(1)  # each query covers 3 x 3 patches
    tile, patch = nearest // 36, nearest % 36
    rows, columns = 6 * (tile // 3) + patch // 6, 6 * (tile % 3) + patch % 6
    assert torch.equal(rows // 3, torch.arange(6).repeat_interleave(6))
    assert torch.equal(columns // 3, torch.arange(6).repeat(6))


def test_questions_about_one_region_share_a_row(bench: Bench) -> None:
    with controls():
        student = Student(cell("oracle"), bench)
    student.ready()
    rows = student.rows(bench.train, [0, 1])
    asked = [*bench.train.questions[0], *bench.train.questions[1]]
    assert sorted(q.text for row in rows for q in row.asked) == sorted(q.text for q in asked)
    assert all(q.region == row.region for row in rows for q in row.asked)
    assert len({(row.picture, row.region) for row in rows}) == len(rows) < len(asked)
    student.model.eval()
    apart = [row._replace(asked=[question]) for row in rows for question in row.asked]
    losses = []
    for some in (rows, apart):
        seen = student.forward(bench.train, some)
        losses.append(seen.answers.logits.detach())
    assert gap(*losses) < 1e-4


@pytest.mark.parametrize("method", ["coroi", "slime", "oracle", "anyres", "llava_hr"])
def test_what_the_lab_reads_is_what_the_model_reads(method: str, bench: Bench) -> None:
    """Questions packed behind a picture that is read once have the logits of the model's own forward."""
    options = {"coroi": {"layers": [0, 1], "scales": [2, 3]}, "slime": {"gamma": 0.6}}
    with controls():
        student = Student(cell(method, **options.get(method, {})), bench)
    student.ready()
    student.model.eval()
    for parameter in student.model.connector.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    rows = student.rows(bench.train, [0, 1])[:9]
    with torch.no_grad():
        found = student.forward(bench.train, rows).answers
        expected = []
        for row in rows:
            samples = [[bench.samples[q.text, q.answer] for q in row.asked]]
            encoded = student._connect(bench.train, [row], samples, [row.picture], [0])
            for sample in samples[0]:
                visual = student.plan.tokens
                ids = torch.tensor([[student.model.config.image_token_id] * visual + sample.ids])
                logits = student.model(input_ids=ids, mm_encoder_outputs={"image": encoded}).logits[0]
                expected.append(logits[visual + sample.answer - 1 : -1])
    assert gap(found.logits, torch.cat(expected)) < 1e-4
    assert len(found.labels) == sum(len(part) for part in expected)


def test_parts_that_are_encoded_once_are_those_that_would_be_looked_at(bench: Bench) -> None:
    """CoRoI's windows: in bfloat16 on disk, and exactly the same pixels."""
    student = Student(cell("coroi", layers=[0, 1]), bench)
    looks = student.method.looks(student.plan)
    assert len(looks) == 4**2 + 5**2 == len({*looks})
    student.ready()
    source = student._source(bench.train, [2, 0])
    kept = source.look([(1, looks[3]), (0, looks[-1])], student.method.tower.side)
    assert not source.memory[0]
    fresh = Source(source.pictures, source.norms, source.encode)
    direct = fresh.look([(1, looks[3]), (0, looks[-1])], student.method.tower.side)
    assert gap(kept, direct) < 0.02 * float(direct.abs().max())
    pictures = torch.from_numpy(np.array(bench.train.pictures[:2]))
    together = views_of(pictures, source.norms[0], looks[5], student.method.tower.side)
    for view, picture in zip(together, pictures, strict=True):
        assert torch.equal(view, view_of(picture, source.norms[0], looks[5], student.method.tower.side))


@pytest.mark.parametrize("others", ["drop", "append"])
def test_a_lesson_has_the_tokens_of_the_processor(bench: Bench, others: str) -> None:
    student = make_student(cell("chain_of_spot", others=others), bench)
    drills = student._drilled(bench.train, [1], True)[0]
    lessons = student._of_picture(bench.train, 1, True)
    assert len(drills) == len(lessons)
    for drill, lesson in zip(drills, lessons, strict=True):
        encoded = encode(student.processor, cut_out(lesson, student.processor.image_processor.read))
        visual = student.plan.tokens
        assert drill.sample.ids == encoded["input_ids"][visual:].tolist()
        learnt = [i for start, end in drill.sample.learnt for i in range(start, end)]
        assert learnt == (encoded["labels"][visual:] != -100).nonzero()[:, 0].tolist()
        for n, part in enumerate(drill.shown, 1):
            pixels = encoded["pixel_values"][n][None]
            assert gap(part.features.float(), student.model.encode_views(pixels)) < 0.05


def test_lessons_that_share_a_picture_have_the_loss_of_lessons_of_their_own(bench: Bench) -> None:
    student = make_student(cell("chain_of_spot"), bench)
    student.ready()
    student.model.eval()
    with torch.no_grad():
        together = student.loss(bench.train, [0, 1], captions=True)
        lessons = [lesson for i in (0, 1) for lesson in student._of_picture(bench.train, i, True)]
        read_one = student.processor.image_processor.read
        batch = student.collate([encode(student.processor, cut_out(lesson, read_one)) for lesson in lessons])
        apart = student.model(**batch, use_cache=False).loss
    assert abs(float(together - apart)) < 2e-3  # features in bfloat16


def test_pooled_tiles_may_have_more_tokens(bench: Bench) -> None:
    """A map of 18 x 18 patches pooled to 9 x 9, in the order of the picture."""
    with controls():
        method = method_class("pooled")(TowerGeometry(48, 8), {"rows": 9, "with_global": False})
    assert method.plan(144, 144).tokens == 81
    connector = method.build_connector(Widths(1, 1))
    connector.tile_projector = torch.nn.Identity()
    rows = torch.arange(18.0)[:, None].expand(18, 18)
    plan = method.plan(144, 144)
    views = [torch.zeros(36, 1)]
    views += [
        rows[int(v.box.top) // 8 :, int(v.box.left) // 8 :][:6, :6].reshape(36, 1) for v in plan.views[1:]
    ]
    tokens = connector(torch.stack(views), [plan], None).tokens.view(9, 9)
    assert torch.equal(tokens, (2 * torch.arange(9.0) + 0.5)[:, None].expand(9, 9))


def test_region_boxes_survive_the_disk(bench: Bench) -> None:
    read = [q for q in bench.train.asked if q.kind in ("letter", "digit", "word")]
    assert read and all(isinstance(q.region, Box) for q in read)
    assert bench.train.size == Size(144, 144)
    again = make_bench("words", "nano", bench.folder, bench.parts)
    assert again.train.questions == bench.train.questions
    assert np.array_equal(again.train.pictures, bench.train.pictures)


def test_a_report_tells_everything(prepared: Path) -> None:
    variants = (Variant("llava"), Variant("pooled"))
    path = run(Experiment(variants, "easy", "nano", seeds=(0, 1), steps=2), prepared).report
    assert path is not None
    text = path.read_text(encoding="utf-8")
    for expected in ("LLaVA-1.5", "pooled tiles", "*chance*", "*in-scene guess*", "where"):
        assert expected in text
    results = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(results) == 4 and markdown(results) == text
    assert path.with_suffix(".png").stat().st_size > 1000
    for result in results:
        assert result["command"] in text
    fine = [[cell["accuracy"]["fine"] for cell in results[begin : begin + 2]] for begin in (0, 2)]
    more = sum(b - a for a, b in zip(*fine, strict=True)) / 2
    assert f"| pooled tiles | {100 * more:+.1f} (" in text


EXPERIMENT = """
level: easy
scale: nano
seeds: [0, 1]
steps: 8
variants:
  - method: llava
  - method: pooled
    label: tiles alone
    options: {with_global: false}
  - method: pooled
    label: in turns
    stages:
      - {part: 0.25, trains: [connector.tile_projector], captions: true, options: {with_global: false}}
      - {part: 0.25, trains: [connector.global_projector]}
      - {part: 0.5, trains: [connector, language_model]}
"""


def test_how_often_the_object_was_found_is_told(prepared: Path) -> None:
    """Six windows of half the side hold some objects, and others not."""
    windows = {"scales": [2], "rois": 6, "distinct": True, "layers": [0]}
    variants = (Variant("llava"), Variant("coroi", options=windows))
    path = run(Experiment(variants, "easy", "nano", steps=2), prepared).report
    assert path is not None
    blind, chain = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert blind["looked"] is None and 0 < chain["looked"]["overlap"] < chain["looked"]["found"] < 1
    assert "region: found | region: overlap" in path.read_text(encoding="utf-8")


def test_a_method_may_be_told_where_to_look(prepared: Path) -> None:
    windows = {"scales": [2], "rois": 1, "layers": [0]}
    variants = (Variant("coroi", options=windows), Variant("coroi", "told", windows, told=True))
    path = run(Experiment(variants, "easy", "nano", steps=2), prepared).report
    assert path is not None
    free, told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert told["looked"]["found"] > 0.9 > free["looked"]["found"]
    with pytest.raises(FoveateError, match=r"told: LLaVA-1\.5 does not look again at the original picture"):
        run(Experiment((Variant("llava", told=True),), "easy", "nano", steps=2), prepared)


def test_taught_boxes_are_said_in_tenths(bench: Bench) -> None:
    """Outwards, so each holds its object; in lessons, in the stage that teaches boxes, and when told."""
    student = make_student(replace(cell("chain_of_spot"), grid=10), bench)
    question = next(q for q in bench.train.questions[0] if q.region is not None)
    (lesson, *_) = student._lessons(Image.fromarray(bench.train.pictures[0]), [question])
    pointed = student.pointing(bench.train, False).captions[0]
    for said in (lesson[1]["content"][0]["text"], *(q.answer for q in pointed)):
        assert all(int(number) % 100 == 0 for number in re.findall(r"\d+", said)), said
    side, size = bench.train.size.width / 10, bench.train.size
    for row in bench.train.questions:
        for box in (q.region for q in row if q.region is not None):
            taught = student._taught(box, size)
            assert taught.contains(box) and student._taught(taught, size) == taught
            assert taught.width < box.width + 2 * side and taught.height < box.height + 2 * side
    assert student._taught(whole(size), size) == whole(size)


def test_a_grid_is_for_methods_that_say_where_to_look(bench: Bench) -> None:
    with pytest.raises(FoveateError, match=r"grid: LLaVA-1\.5 does not say where to look"):
        make_student(replace(cell("llava"), grid=10), bench)
    with pytest.raises(FoveateError, match="grid must be from 2 to 1000, not 1"):
        Variant("chain_of_spot", grid=1)
    exact, tenths = cell("chain_of_spot"), replace(cell("chain_of_spot"), grid=10)
    assert tenths.key != exact.key and "grid" not in exact.record and tenths.record["grid"] == 10


def test_tokens_that_a_router_dropped_are_not_counted(prepared: Path) -> None:
    variants = tuple(Variant("slime", f"gamma {gamma}", {"gamma": gamma}) for gamma in (0.5, 1.0))
    path = run(Experiment(variants, "easy", "nano", steps=2), prepared).report
    assert path is not None
    half, all_ = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    full = all_["cost"]["visual_tokens"]
    assert all_["tokens"] == full and 0.3 * full < half["tokens"] < 0.8 * full
    assert f"| 10 | {round(half['tokens'])} |" in path.read_text(encoding="utf-8")


def test_a_method_that_asks_twice_is_measured_in_conversations(bench: Bench, tmp_path: Path) -> None:
    result = train_cell(cell("chain_of_spot"), bench)
    assert {*(q.kind for q in bench.test.asked)} <= set(result["accuracy"])
    assert 0 <= result["looked"]["overlap"] <= result["looked"]["found"] <= 1
    assert result["cost"]["visual_tokens"] == 72
    assert bench.parts.reader.config.vocab_size == len(bench.parts.tokenizer)  # others start from it, too


def test_the_whole_picture_for_want_of_a_box_is_no_find(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(cell("chain_of_spot"), bench)
    for reply, found in (("no idea", 0), ("[[0, 0, 1000, 1000]]", 1)):

        def says(self: Engine, talks: Any, *args: Any, text: str = reply, **more: Any) -> list[Said]:
            return [Said(text) for _ in talks]

        monkeypatch.setattr(Engine, "say", says)
        monkeypatch.setattr(Chat, "answer", answered)
        graded = student.grade(bench.test, range(2))
        assert {len(g.regions or []) for g in graded} == {found}


def answered(self: Chat, question: str, asked: Any, end: Any) -> SimpleNamespace:
    ledger = SimpleNamespace(visual_tokens=0)
    return SimpleNamespace(text=end.text, ledger=ledger, notes=end.notes, regions=end.regions)


@pytest.mark.parametrize("others", ["drop", "append"])
@pytest.mark.parametrize(("spoilt", "right"), [(None, True), ("box", True), ("answer", False)])
def test_a_conversation_that_is_told_the_region_is_measured_on_its_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, spoilt: str | None, right: bool, others: str
) -> None:
    """By a model that says the lessons word for word, but for one token."""
    student = make_student(replace(cell("chain_of_spot", others=others), told=True), bench)

    def says(llm: Any, visual: Any, packed: Packed, *more: Any) -> Answers:
        answers = read(llm, visual, packed, *more)
        said, texts = answers.labels.clone(), answers.row * 100 + answers.block
        for text in texts.unique():
            places = (texts == text).nonzero()[:, 0]
            ends = places[answers.labels[places] == 2]
            if spoilt is not None:
                said[places[0] if spoilt == "box" else ends[0] + 1] += 1
        return answers._replace(logits=F.one_hot(said).float())

    monkeypatch.setattr(conversing, "read", says)
    graded = student.grade(bench.test, range(3))
    assert [g.question for g in graded] == [q for i in range(3) for q in bench.test.questions[i]]
    assert {g.right for g in graded} == {right} and {g.tokens for g in graded} == {72}


def test_an_experiment_is_a_file(prepared: Path, tmp_path: Path) -> None:
    file = tmp_path / "turns.yaml"
    file.write_text(EXPERIMENT)
    arguments = ["run", str(file), "--folder", str(prepared)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    report = prepared / "reports" / "turns"
    text = (report / "report.md").read_text(encoding="utf-8")
    results = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert "| LLaVA-1.5 | 2 |" in text and "| tiles alone | 2 |" in text and "| in turns | 2 |" in text
    words = shlex.split(results[-1]["command"])
    assert words[-4:] == ["--rows", "in turns", "--seeds", "1"]
    done = CliRunner().invoke(app, [*words[2:], "--folder", str(prepared)], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads((report / "report.json").read_text(encoding="utf-8")) == results[-1:]
    for arguments, said in (
        (["--rows", "none"], "unknown rows none"),
        (["--seeds", ""], "at least one seed"),
    ):
        error = CliRunner().invoke(app, ["run", str(file), *arguments]).exception
        assert isinstance(error, FoveateError) and said in str(error)


def test_a_row_of_an_experiment_becomes_a_model(prepared: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "level: easy\nscale: nano\nsteps: 2\nvariants: [{method: llava}, {method: llava, label: one layer, "
        "options: {projector_depth: 1}}]"
    )
    chosen = ["--seed", "1", "--folder", str(prepared)]
    arguments = ["export", str(tmp_path / "model"), "--experiment", str(file), "--row", "one layer", *chosen]
    _refused(arguments, f"run `foveate lab run {file} --rows 'one layer' --seeds 1` first")
    trained = ["run", str(file), "--rows", "one layer", "--seeds", "1", "--folder", str(prepared)]
    for words in (trained, arguments):
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    weights = next(prepared.glob("cells/*/llava-easy-2-seed1-*/weights.pt"))
    model = load(tmp_path / "model", device="cpu", dtype="float32").model
    assert model.method.options.projector_depth == 1
    held = model.state_dict()
    for key, tensor in torch.load(weights, weights_only=True).items():
        torch.testing.assert_close(held[key], tensor.half().float())


def test_stages_train_what_they_name_under_their_options(bench: Bench) -> None:
    stages = (
        StageSpec(0.5, ("connector.tile_projector",), captions=True, options={"with_global": False}),
        StageSpec(0.5, ("connector", "language_model")),
    )
    with controls():
        student = Student(replace(cell("pooled", steps=4), stages=stages), bench)
        student.ready()
        first, second = student.stages()
        learner = under(student, first)
        assert not learner.method.options.with_global and under(student, second) is student
        learner.model.train()
        optimise = learner.optimiser(first)
        loss = learner.forward(bench.train, learner.rows(bench.train, [0, 1], captions=True)).loss
        loss.backward()
        optimise.step()
        before = {key: tensor.clone() for key, tensor in student.model.state_dict().items()}
        student.take(learner)
        after = student.model.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == {key for key in before if key.startswith("connector.tile_projector")}
        with pytest.raises(FoveateError, match="no module 'ear'"):
            student.optimiser(first._replace(trains=("ear",)))


def test_a_method_starts_from_another_one(bench: Bench) -> None:
    """Chain-of-Spot from LLaVA-1.5, which reads the same words and hands over connector and LLM."""
    first = StageSpec(0.5, ("connector", "language_model"), method="llava", options={"projector_depth": 2})
    stages = (first, StageSpec(0.5, ("language_model",)))
    student = make_student(replace(cell("chain_of_spot", steps=4), stages=stages), bench)
    base = under(student, student.stages()[0])
    assert base.method.title == "LLaVA-1.5"
    assert set(base.trained()) == set(student.trained())
    base.model.train()
    optimise = base.optimiser(student.stages()[0])
    base.loss(bench.train, [0, 1]).backward()
    optimise.step()
    student.take(base)
    held = student.model.state_dict()
    for key, tensor in base.trained().items():
        torch.testing.assert_close(held[key], tensor, rtol=0, atol=0)
    other = make_student(replace(cell("llava"), stages=(replace(first, part=1.0),)), bench)
    with pytest.raises(FoveateError, match=r"LLaVA-1\.5 cannot start from chain_of_spot"):
        under(other, other.stages()[0]._replace(method="chain_of_spot"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (EXPERIMENT.replace("part: 0.5", "part: 0.6"), "must add up to 1"),
        (EXPERIMENT.replace("scale: nano", "scale: huge"), "unknown scale 'huge'"),
        (EXPERIMENT.replace("trains: [connector, language_model]", "trains: []"), "trains is empty"),
        ("level: easy\nvariants: []", "at least one method"),
        ("level: easy\nvariant: []", "unknown key 'variant'"),
    ],
)
def test_wrong_experiments_are_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(FoveateError, match=said):
        read_experiment(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("batch", [None, 3])
def test_a_cells_command_makes_the_same_cell(prepared: Path, batch: int | None) -> None:
    variant = Variant("pooled", options={"with_global": False})
    path = run(Experiment((variant,), "easy", "nano", (3,), 2, batch), prepared).report
    assert path is not None
    assert "nano-easy-2" + ("-batch3" if batch else "") == path.parent.name
    assert ("2 steps of 3 pictures" in path.read_text(encoding="utf-8")) == (batch == 3)
    result = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))[0]
    assert result["cell"]["batch"] == batch
    words = shlex.split(result["command"])
    assert words[:2] == ["foveate", "lab"]
    done = CliRunner().invoke(app, [*words[2:], "--folder", str(prepared)], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == [result]
    other = Cell("pooled", 3, "easy", "nano", 2, {"with_global": True})
    assert other.key not in str(list(prepared.glob("cells/*/*")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--methods", "llava", "--scale", "huge"], "unknown scale 'huge': choose one of tiny"),
        (["--methods", "llava", "--level", "hard"], "unknown level 'hard': choose one of easy"),
        (["--methods", "llava", "--seeds", "a"], "--seeds a"),
        (["--methods", "llava", "--seeds", ""], "at least one seed"),
        (["--methods", "llava", "--batch", "1000000"], "batch must be from 1 to"),
        (["--methods", ""], "at least one method"),
        (["--methods", "llava", "--option", "fit"], "METHOD.KEY=VALUE"),
        (["--methods", "llava", "--option", "llava.fat=1"], "unknown key 'fat'"),
        (["--methods", "llava", "--option", "anyres.fit=pad"], "which --methods does not name"),
        (["--methods", "llava,llava"], "are the same"),
        (["--methods", "llava", "--methods", "llava"], "are the same"),
        (["--methods", "llava", "--budget", "soon"], "expected a time such as 90s, 20m or 3h"),
        ([], "a file with an experiment, or --methods, or both"),
        (["--methods", "llava", "--rows", "llava"], "--rows needs a file"),
    ],
)
def test_wrong_input_is_one_sentence(words: list[str], said: str, prepared: Path) -> None:
    _refused(["run", "--scale", "nano", "--folder", str(prepared), *words], said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "nowhere.yaml"], "no experiment at nowhere.yaml"),
        (["run", "nowhere.yaml", "--level", "easy"], "--level is for --methods"),
        (["run", "nowhere.yaml", "-o", "llava.fit=pad"], "which --methods does not name"),
        (["export", "out"], "either --method, or --experiment with --row"),
        (["export", "out", "--method", "llava", "--row", "LLaVA-1.5"], "either --method, or --experiment"),
        (["export", "out", "--experiment", "nowhere.yaml"], "either --method, or --experiment"),
        (["export", "out", "--experiment", "nowhere.yaml", "--row", "a"], "no experiment at nowhere.yaml"),
        (
            ["export", "out", "--experiment", "a.yaml", "--row", "a", "--steps", "2"],
            "--steps is for --methods",
        ),
    ],
)
def test_a_file_says_it_alone(words: list[str], said: str, prepared: Path) -> None:
    _refused([*words, "--folder", str(prepared)], said)


def _refused(arguments: list[str], said: str) -> None:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, FoveateError) and said in str(error)


def test_parts_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "other", SCALES["nano"])
    with pytest.raises(FoveateError, match="foveate lab prepare --scale other"):
        load_parts("other", tmp_path)


def test_scenes_on_a_photograph_of_ones_own(tmp_path: Path) -> None:
    """The objects are the same, the background is not; each is a picture to ask about."""
    Image.new("RGB", (120, 100), (0, 0, 255)).save(tmp_path / "blue.png")
    Image.new("RGB", (120, 80)).save(tmp_path / "small.png")
    words = ["show", str(tmp_path / "scenes.png"), "--count", "2", "--pictures", str(tmp_path / "apart")]
    for background in ([], ["--background", str(tmp_path / "blue.png")]):
        assert CliRunner().invoke(app, [*words, *background], catch_exceptions=False).exit_code == 0
    level, scale = level_named("easy"), SCALES["tiny"]
    for i in range(2):
        scene = make_scene(level, scale.view, scale.magnify, "test", 0, i)
        with Image.open(tmp_path / "apart" / f"{i}.png") as shown:
            picture = np.asarray(shown).astype(int)
        outside = np.ones(picture.shape[:2], dtype=bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box.rounded()
            outside[top - 2 : bottom + 2, left - 2 : right + 2] = False
        assert picture.shape == scene.picture.shape
        assert np.median(picture[outside], axis=0)[2] > np.median(picture[outside], axis=0)[0] + 50
    _refused([*words, "--background", str(tmp_path / "small.png")], "needs 90 x 90 pixels or more")


def test_scenes_can_be_looked_at(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["show", str(tmp_path / "scenes.png"), "--count", "2"], catch_exceptions=False
    )
    assert done.exit_code == 0 and (tmp_path / "scenes.png").stat().st_size > 10_000
