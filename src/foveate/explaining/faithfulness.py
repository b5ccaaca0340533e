"""Is an explanation faithful? What it says mattered is hidden, then random parts of the same size and shape.

The original answer is put into the model's mouth after each hidden picture (teacher forcing): its probability
should fall more where the explanation points than elsewhere. The answer changes if another token becomes the
most likely one at some place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import FoveateError
from foveate.explaining.story import Forced, Story, Subject, forced
from foveate.picture.geometry import Box
from foveate.picture.reading import to_array

TRIES = 32  # places that are drawn for one random part
APART = 0.1  # a random part shares at most this much with the explained one, if it can


@dataclass(frozen=True)
class Probe:
    """How faithfulness is measured.

    Attributes:
        share: of the picture's area that is hidden, where the most relevant part is measured.
        draws: random parts; 0 measures nothing.
        seed: of their places.
    """

    share: float = 0.05
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise FoveateError(f"share must be above 0 and at most 0.5 of the picture, not {self.share}")
        if self.draws < 0:
            raise FoveateError(f"draws must be at least 0, not {self.draws}")
        if self.seed < 0:
            raise FoveateError(f"seed must be at least 0, not {self.seed}")


PROBE = Probe()


@dataclass(frozen=True)
class Faithfulness:
    """What hiding a part of the picture does to the answer, against random parts of equal area.

    Attributes:
        claim: what is said to have mattered: `relevance` or `regions`.
        boxes: the hidden part, in original pixels.
        area: as a fraction of the picture.
        probability: of the answer (geometric mean over its tokens) with the whole picture.
        hidden: the same with the part hidden.
        changed: whether the answer is another one then.
        random: the same probability for each random part.
        random_changed: likewise.
    """

    claim: str
    boxes: list[Box]
    area: float
    probability: float
    hidden: float
    changed: bool
    random: list[float]
    random_changed: list[bool]

    @property
    def fall(self) -> float:
        """By how much the probability falls."""
        return self.probability - self.hidden

    @property
    def random_fall(self) -> float:
        """By how much it falls for random parts, on average."""
        return self.probability - float(np.mean(self.random))

    @property
    def score(self) -> float:
        """How much more it falls than for random parts: above 0 for a faithful explanation, at most 1."""
        return self.fall - self.random_fall

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        own = {**vars(self), "boxes": [[float(n) for n in box] for box in self.boxes]}
        return {**own, "fall": self.fall, "random_fall": self.random_fall, "score": self.score}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Faithfulness:
        """From what `to_dict` gives."""
        own = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**{**own, "boxes": [Box(*box) for box in value["boxes"]]})


def measure(
    subject: Subject,
    story: Story,
    answered: Forced,
    claims: Mapping[str, tuple[list[Box], np.ndarray]],
    probe: Probe,
) -> list[Faithfulness]:
    """Hides what each claim names, and random parts.

    Args:
        subject: the model.
        story: the conversation and its answer.
        answered: how the model takes the answer with the whole picture.
        claims: per claim the part in boxes and as a mask (H, W).
        probe: how.
    """
    colour = to_array(story.picture).mean((0, 1)).round().astype(np.uint8)
    rng = np.random.default_rng(probe.seed)

    def after(mask: np.ndarray) -> tuple[float, bool]:
        hidden = story.masked(mask, colour)
        taken = forced(subject, subject.prepared(hidden.messages), story.answer)
        return taken.probability, taken.best != answered.best

    found = []
    for claim, (boxes, mask) in claims.items():
        hidden, changed = after(mask)
        random = [after(elsewhere(mask, rng)) for _ in range(probe.draws)]
        found.append(
            Faithfulness(
                claim,
                boxes,
                float(mask.mean()),
                answered.probability,
                hidden,
                changed,
                [probability for probability, _ in random],
                [different for _, different in random],
            )
        )
    return found


def elsewhere(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask (H, W) of the same shape at a random place, so of the same area to the pixel.

    What leaves the picture on one side comes back on the other. Of the places that are drawn, the first is
    taken that has at most `APART` of its area in common with the mask, else the one with the least.
    """
    best, least = mask, 2.0
    for _ in range(TRIES):
        shift = (int(rng.integers(mask.shape[0])), int(rng.integers(mask.shape[1])))
        moved = np.roll(mask, shift, (0, 1))
        common = float((moved & mask).sum() / max(mask.sum(), 1))
        if common < least:
            best, least = moved, common
        if least <= APART:
            break
    return best
