"""The lab's questions as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from foveate import FoveateError
from foveate.evaluate.samples import read_questions
from foveate.lab.levels import level_named
from foveate.lab.questionnaire import write_questions
from foveate.lab.scales import scale_named
from foveate.picture.geometry import Size


def test_it_is_what_eval_reads(tmp_path: Path) -> None:
    """As many questions as asked for, the same from the same seed, with boxes inside the pictures."""
    level, scale = level_named("signs"), scale_named("small")
    path = write_questions(tmp_path / "a", level, scale, 20)
    again = write_questions(tmp_path / "b", level, scale, 20)
    assert path.read_text() == again.read_text()
    assert write_questions(tmp_path / "c", level, scale, 20, seed=1).read_text() != path.read_text()
    questions = read_questions(path)
    assert len(questions.samples) == 20 and all(
        s.answers and s.category and s.group for s in questions.samples
    )
    side = scale.view * level.ratio
    for sample in questions.samples:
        shown = Image.open(str(questions.picture(sample)))
        assert Size(shown.height, shown.width) == Size(side, side)
        assert sample.box is None or (0 <= sample.box.left < sample.box.right <= side)
    assert any(sample.box for sample in questions.samples)
    with pytest.raises(FoveateError, match="exists"):
        write_questions(tmp_path / "a", level, scale, 20)
