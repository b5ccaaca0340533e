"""The lab's objects on photographs: drawn where and as large as is said, asked about, counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.errors import FoveateError
from foveate.lab.materials import materials
from foveate.lab.objects import COLOURS, SIGN
from foveate.lab.photographs import KINDS, PARTS, Trial, by_part, draw_on, measure_photographs, photographs_in
from foveate.tiny import tiny_model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [PARTS[0], PARTS[-1]])
@pytest.mark.parametrize("size", [(900, 600), (500, 800)])
def test_objects_are_as_large_as_asked_for(kind: str, part: float, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (90, 110, 100))
    thing = draw_on(picture, kind, part, np.random.default_rng(0))
    box = thing.box
    assert 0 < box.left < box.right < size[0] and 0 < box.top < box.bottom < size[1]
    found = float(box.width * box.height) / (size[0] * size[1])
    assert found < 1.3 * part
    assert found > 0.75 * part or box.width > 0.9 * size[0]  # a long word in a narrow picture is smaller
    changed = np.argwhere((np.asarray(picture) != (90, 110, 100)).any(-1))
    assert (changed.min(0) >= (box.top, box.left)).all() and (changed.max(0) < (box.bottom, box.right)).all()
    written = getattr(thing, kind)
    assert written is not None and "".join(g.character for g in thing.glyphs) == written
    assert (thing.shape == SIGN) == (kind == "word") and thing.colour in COLOURS
    if kind == "word":
        assert written.upper() in materials("test").words


def test_tiny_pictures_have_no_room() -> None:
    with pytest.raises(FoveateError, match="2 x 2 pixels has no room"):
        draw_on(Image.new("RGB", (2, 2)), "letter", 0.25, np.random.default_rng(0))


def test_a_report_counts_every_answer(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    model = tiny_model("llava", {})
    told: list[tuple[int, int]] = []
    path = measure_photographs(
        model, "random weights", photographs_in(tmp_path), tmp_path / "out", report=lambda *n: told.append(n)
    )
    total = len(PARTS) * len(KINDS)
    assert told[-1] == (total, total)
    values = json.loads((tmp_path / "out" / "photographs.json").read_text(encoding="utf-8"))
    assert len(values) == total
    assert all(value["right"] == (value["reply"] == value["answer"]) for value in values)
    text = path.read_text(encoding="utf-8")
    assert "random weights" in text and text.count("(0/1)") + text.count("(1/1)") == total
    assert (tmp_path / "out" / "photographs.png").is_file()


def test_answers_are_sorted_by_the_objects_size() -> None:
    def trial(part: float, reply: str) -> Trial:
        return Trial("a.jpg", (10, 10), part, (0, 0, 1, 1), "word", "?", "cat", reply, 0.1)

    table = by_part([trial(0.24, "cat"), trial(0.11, "cat"), trial(0.12, "cats")])
    assert table[4]["word"] == [True] and table[9]["word"] == [True, False] and list(table) == [4, 9]


def test_a_folder_without_pictures_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no picture files here"):
        photographs_in(tmp_path)
