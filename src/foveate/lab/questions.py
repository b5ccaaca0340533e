"""Questions about a scene, with answers, the region to look at, and the answers to guess from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from foveate.lab.levels import FINE
from foveate.lab.objects import COLOURS, PLAIN, SIGN, Thing
from foveate.lab.scenes import Scene
from foveate.picture.geometry import Box

ABSENT = "none"  # the answer if the question is about nothing in the picture
CAPTION = "caption"  # a further kind, which is not measured


@dataclass(frozen=True)
class Question:
    """One question about one scene.

    Attributes:
        kind: one of `foveate.lab.levels.KINDS`, or `CAPTION`.
        text: the question.
        answer: lower case.
        region: box of the object that must be read, pixels of the picture; None if the question is about the
            whole picture, or if showing the region would give the answer away.
        candidates: the answers that fit some object of this scene: the choice of a guesser who sees every
            glyph but not what it belongs to. Empty: no object bears on the answer.
    """

    kind: str
    text: str
    answer: str
    region: Box | None
    candidates: tuple[str, ...]

    @property
    def fine(self) -> bool:
        return self.kind in FINE


def ask_about(scene: Scene, wanted: Mapping[str, int], rng: np.random.Generator) -> list[Question]:
    """Up to `wanted[kind]` different questions of every kind; objects are named by one unique attribute.

    Every answer that a kind has in this scene is equally likely to be asked for, however often it is right:
    otherwise most counts would be 1.
    """
    asked = []
    for kind, count in wanted.items():
        possible = _KINDS[kind](scene)
        times = Counter(question.answer for question in possible)
        for _ in range(min(count, len(possible))):
            weights = np.array([1 / times[question.answer] for question in possible])
            asked.append(possible.pop(int(rng.choice(len(possible), p=weights / weights.sum()))))
    return asked


def caption(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every object's words in any order, with its place: the first is the text, the others are the answer."""
    captions = []
    for thing in scene.things:
        texts = [text for text in (thing.letter, thing.digit, thing.word) if text is not None]
        words = [thing.colour, thing.shape, scene.cell(thing), *texts]
        first, *rest = (words[i] for i in rng.permutation(len(words)))
        captions.append(Question(CAPTION, first, " ".join(rest), None, ()))
    return captions


def chance(questions: Iterable[Question]) -> dict[str, float]:
    """Per kind, the accuracy of always giving that kind's most frequent answer."""
    return {
        kind: Counter(q.answer for q in group).most_common(1)[0][1] / len(group)
        for kind, group in by_kind(questions).items()
    }


def in_scene_guess(questions: Iterable[Question]) -> dict[str, float]:
    """Per kind, the accuracy of guessing among what is in the scene: glyphs seen, none bound to objects."""
    questions = list(questions)
    blind = chance(questions)
    line = {}
    for kind, group in by_kind(questions).items():
        hits = [q.candidates.count(q.answer) / len(q.candidates) for q in group if q.candidates]
        line[kind] = float(np.mean(hits)) if hits else blind[kind]
    return line


def by_kind(questions: Iterable[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.kind, []).append(question)
    return groups


def _references(scene: Scene) -> list[tuple[str, Thing]]:
    """`the circle` and `the red shape` for every object that is the only circle or the only red shape."""
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    named = [(f"the {thing.shape}", thing) for thing in scene.things if shapes[thing.shape] == 1]
    named += [(f"the {thing.colour} shape", thing) for thing in scene.things if colours[thing.colour] == 1]
    return named


def _reading(kind: str) -> Callable[[Scene], list[Question]]:
    def ask(scene: Scene) -> list[Question]:
        written = tuple(text for thing in scene.things if (text := getattr(thing, kind)) is not None)
        return [
            Question(kind, f"what {kind} is on {name} ?", getattr(thing, kind), thing.box, written)
            for name, thing in _references(scene)
            if getattr(thing, kind) is not None
        ]

    return ask


def _rev(scene: Scene) -> list[Question]:
    """`what colour has letter k ?`, if only one object carries a k."""
    colours = tuple(thing.colour for thing in scene.things if thing.word is None)
    asked = []
    for kind in ("letter", "digit"):
        seen = Counter(getattr(thing, kind) for thing in scene.things)
        for thing in scene.things:
            text = getattr(thing, kind)
            if text is not None and seen[text] == 1:
                asked.append(Question("rev", f"what colour has {kind} {text} ?", thing.colour, None, colours))
    return asked


def _attr(scene: Scene) -> list[Question]:
    shapes = tuple(thing.shape for thing in scene.things)
    colours = tuple(thing.colour for thing in scene.things)
    asked = []
    for name, thing in _references(scene):
        if name.endswith(" shape"):
            asked.append(Question("attr", f"what shape is {thing.colour} ?", thing.shape, None, shapes))
        else:
            asked.append(Question("attr", f"what colour is {name} ?", thing.colour, None, colours))
    return asked


def _count(scene: Scene) -> list[Question]:
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    plural = {shape: f"{shape}{'es' if shape.endswith('s') else 's'}" for shape in PLAIN}
    asked = [
        Question("count", f"how many {many} are there ?", str(shapes[one]), None, ())
        for one, many in plural.items()
    ]
    asked += [
        Question("count", f"how many {colour} shapes are there ?", str(colours[colour]), None, ())
        for colour in COLOURS
    ]
    return [*asked, Question("count", "how many shapes are there ?", str(len(scene.things)), None, ())]


def _where(scene: Scene) -> list[Question]:
    cells = tuple(scene.cell(thing) for thing in scene.things)
    return [
        Question("where", f"where is {name} ?", scene.cell(thing), None, cells)
        for name, thing in _references(scene)
    ]


def _absent(scene: Scene) -> list[Question]:
    """Questions about something absent: the answer is `none`."""
    shapes = {thing.shape for thing in scene.things}
    colours = {thing.colour for thing in scene.things}
    names = [f"the {shape}" for shape in PLAIN if shape not in shapes]
    names += [f"the {colour} shape" for colour in COLOURS if colour not in colours]
    asked = [
        Question("absent", f"what {kind} is on {name} ?", ABSENT, None, ())
        for name in names
        for kind in ("letter", "digit")
    ]
    if SIGN not in shapes:
        asked.append(Question("absent", f"what word is on the {SIGN} ?", ABSENT, None, ()))
    return asked


_KINDS: dict[str, Callable[[Scene], list[Question]]] = {
    "letter": _reading("letter"),
    "digit": _reading("digit"),
    "word": _reading("word"),
    "rev": _rev,
    "attr": _attr,
    "count": _count,
    "where": _where,
    "absent": _absent,
}
