"""How hard the pictures are. A level is data: a new one is one more entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

from foveate.errors import FoveateError

FINE = ("letter", "digit", "word", "rev")  # kinds of questions that need the small glyphs
COARSE = ("attr", "count", "where", "absent")
KINDS = FINE + COARSE


@dataclass(frozen=True)
class Level:
    """What a picture holds. Pixels are those of a scale with `magnify` 1.

    Attributes:
        summary: one line for tables.
        ratio: side of the picture, divided by the side of the tower's view.
        objects: fewest and most objects.
        side: smallest and largest side of an object, pixels.
        glyph: smallest and largest font size, pixels; a capital's height is about 0.73 of it.
            No glyph is larger than half of its object.
        both: whether every plain object carries a letter and a digit.
        signs: probability that an object is a sign with a word.
        wild: photographs in any colours, contrast and grain; otherwise pale, with uniform grain.
        questions: questions per picture of each kind; kinds that a picture does not allow are left out.
    """

    summary: str
    ratio: int
    objects: tuple[int, int]
    side: tuple[int, int]
    glyph: tuple[int, int]
    both: bool = False
    signs: float = 0.0
    wild: bool = False
    questions: MappingProxyType[str, int] = field(
        default_factory=lambda: MappingProxyType(
            {"letter": 1, "digit": 1, "rev": 1, "attr": 1, "count": 1, "where": 2}
        )
    )

    def __post_init__(self) -> None:
        if self.ratio < 2:
            raise FoveateError(
                f"ratio {self.ratio} leaves nothing to see beyond the base view: use 2 or more"
            )
        for name in ("objects", "side", "glyph"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise FoveateError(f"{name} must be two increasing positive numbers, not {low}, {high}")
        if unknown := set(self.questions) - set(KINDS):
            raise FoveateError(f"unknown kinds of questions {sorted(unknown)}: known are {', '.join(KINDS)}")


_WITH_WORDS = MappingProxyType(
    {"letter": 1, "digit": 1, "word": 2, "rev": 1, "attr": 1, "count": 1, "where": 2}
)

LEVELS: dict[str, Level] = {
    "easy": Level("one letter or digit an object, 3x", 3, (4, 6), (32, 38), (10, 11)),
    "near": Level("one smaller letter or digit an object, 2x", 2, (3, 5), (22, 26), (8, 9)),
    "words": Level(
        "letters, digits and words of 3 to 5 letters, 3x", 3, (5, 7), (28, 34), (10, 11), signs=0.35,
        questions=_WITH_WORDS,
    ),
    "dense": Level(
        "a letter and a digit an object, and words, 4x", 4, (5, 8), (32, 38), (10, 11), both=True, signs=0.3,
        questions=_WITH_WORDS,
    ),
    "signs": Level(
        "letters, digits and words of any size on photographs of any colours, 3x", 3, (1, 5), (20, 80),
        (7, 36), signs=0.4, wild=True, questions=MappingProxyType({**_WITH_WORDS, "where": 1, "absent": 1}),
    ),
}  # fmt: skip


def level_named(name: str) -> Level:
    """Raises `FoveateError` for unknown names."""
    if name not in LEVELS:
        raise FoveateError(f"unknown level {name!r}: choose one of {', '.join(LEVELS)}")
    return LEVELS[name]
