"""An explanation: where a model looked, what its answer rests on, and how faithful that is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError
from foveate.explaining.drawing import drawn
from foveate.explaining.faithfulness import PROBE, Faithfulness, Probe, measure
from foveate.explaining.maps import Raster, pixels_of
from foveate.explaining.page import page
from foveate.explaining.relevance import Reading, answer_relevance
from foveate.explaining.story import Prepared, Story, Subject, continued, forced
from foveate.files import write
from foveate.model.text import pictures_of
from foveate.picture.account import Account, Spread
from foveate.picture.geometry import Box, Size
from foveate.picture.reading import drawing_path, png, write_drawing

AT_ONCE = 8  # tokens of an answer that are explained in one pass
MOST = 0.5  # of the picture's area: larger regions are not hidden, as no other part of equal area is left
PAGES, VALUES = (".html", ".htm"), (".json",)


@dataclass(frozen=True)
class SeenView:
    """A view that the model was shown.

    Attributes:
        role: what it is.
        box: the part of the picture that it shows, in original pixels.
        size: of the view, in pixels.
        picture: as the model was shown it; None if the explanation was read from JSON.
    """

    role: str
    box: Box
    size: Size
    picture: Image.Image | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, role: str, box: Box, picture: Image.Image) -> SeenView:
        """From a view as a picture."""
        return cls(role, _plain(box), Size(picture.height, picture.width), picture)


@dataclass(frozen=True)
class VisualToken:
    """A visual token of the LLM's sequence.

    Attributes:
        box: its part of the picture, in original pixels; None if it shows nothing of it.
        kept: whether the LLM saw it.
        relevance: of the whole answer's relevance over all visual tokens, the fraction that is its own.
    """

    box: Box | None
    kept: bool
    relevance: float


@dataclass(frozen=True)
class Word:
    """A token of the answer.

    Attributes:
        text: what it adds to the answer.
        probability: given all before it.
        on_picture: the fraction of its relevance that lies on visual tokens; the rest lies on text.
        tokens: per visual token its fraction of that.
        parts: per part of the picture its fraction of that; the rest has no place in the picture.
    """

    text: str
    probability: float
    on_picture: float
    tokens: list[float] = field(repr=False)
    parts: list[float] = field(repr=False)


@dataclass(frozen=True)
class Trail:
    """Parts of the picture that were looked at one after the other."""

    name: str
    boxes: list[Box]


@dataclass
class Explanation:
    """Where a model looked in a picture, and what its answer rests on. All boxes are in original pixels.

    Attributes:
        model: what answered.
        question: what was asked.
        answer: the text.
        probability: of the answer's tokens, their geometric mean.
        size: (height, width) of the picture.
        views: that the model was shown, in its order.
        regions: parts that it chose to look at; None if it chose none.
        chains: parts that it looked at one after the other.
        gates: name -> its value, a mean over the picture; 0 is closed.
        notes: sentences about what it did.
        tokens: the visual tokens, in the order of the LLM's sequence.
        parts: the parts of the picture over which relevance is spread. Most methods have one a visual token;
            where tokens read many places, they are finer.
        shares: (M) of the answer's relevance over all visual tokens, each part's fraction.
        words: tokens of the answer that are explained: those of its text.
        faithfulness: what hiding parts of the picture does; empty if it was not measured.
        picture: what it was about.
    """

    model: str
    question: str
    answer: str
    probability: float
    size: Size
    views: list[SeenView]
    regions: list[Box] | None
    chains: list[Trail]
    gates: dict[str, float]
    notes: list[str]
    tokens: list[VisualToken] = field(repr=False)
    parts: list[Box] = field(repr=False)
    shares: list[float] = field(repr=False)
    words: list[Word]
    faithfulness: list[Faithfulness]
    picture: Image.Image = field(repr=False, compare=False)

    @cached_property
    def raster(self) -> Raster:
        """The cells of `density`."""
        return Raster(self.size)

    @cached_property
    def density(self) -> np.ndarray:
        """Relevance per pixel (1 + words, rows, columns): of the whole answer, then of each word."""
        shares = torch.tensor([self.shares, *(word.parts for word in self.words)], dtype=torch.float64)
        return self.raster.density(self.parts, shares)

    def weights(self, word: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Per cell (rows, columns) the relevance, the highest 1; and whether the LLM saw it.

        Of the whole answer, or of one word. A cell was seen if a visual token that was not dropped shows it.
        """
        density = self.density[0 if word is None else word + 1]
        kept = [token.box for token in self.tokens if token.kept and token.box is not None]
        seen = self.raster.density(kept, torch.ones(1, len(kept)))[0] > 0
        return density / (density.max() or 1), seen

    def show(self, out: str | Path | None = None) -> Image.Image:
        """A picture of it: relevance, regions, words, views. Also written to the file `out` if given."""
        drawing = drawn(self)
        if out is not None:
            write_drawing(drawing, out)
        return drawing

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return png(self.show())

    def page(self) -> str:
        """One HTML file that needs nothing else: zoom, layers, and what lies under the pointer."""
        return page(self)

    def save(self, out: str | Path) -> None:
        """Writes it as its name ends: `.html`, `.json`, or a picture. Raises `FoveateError`."""
        kind = explained_as(out)
        if kind == "picture":
            self.show(out)
        else:
            text = self.page() if kind == "page" else json.dumps(self.to_dict(), ensure_ascii=False, indent=1)
            write(Path(out), text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the pixels."""
        return {
            "model": self.model,
            "question": self.question,
            "answer": self.answer,
            "probability": self.probability,
            "size": list(self.size),
            "views": [
                {"role": view.role, "box": _numbers(view.box), "size": list(view.size)} for view in self.views
            ],
            "regions": None if self.regions is None else [_numbers(box) for box in self.regions],
            "chains": [
                {"name": chain.name, "boxes": [_numbers(box) for box in chain.boxes]} for chain in self.chains
            ],
            "gates": self.gates,
            "notes": self.notes,
            "tokens": [{**vars(token), "box": token.box and _numbers(token.box)} for token in self.tokens],
            "parts": [_numbers(box) for box in self.parts],
            "shares": self.shares,
            "words": [dict(vars(word)) for word in self.words],
            "faithfulness": [one.to_dict() for one in self.faithfulness],
        }

    @classmethod
    def of(cls, value: Mapping[str, Any], picture: Image.Image) -> Explanation:
        """From what `to_dict` gives, and the picture. Raises `FoveateError` for one of another size."""
        size = Size(*value["size"])
        if (picture.height, picture.width) != size:
            raise FoveateError(
                f"the explanation is of a picture of {size.width} x {size.height} pixels, not of "
                f"{picture.width} x {picture.height}"
            )
        regions = value["regions"]
        return cls(
            **{name: value[name] for name in ("model", "question", "answer", "probability", "shares")},
            size=size,
            views=[SeenView(v["role"], Box(*v["box"]), Size(*v["size"])) for v in value["views"]],
            regions=None if regions is None else [Box(*box) for box in regions],
            chains=[Trail(c["name"], [Box(*box) for box in c["boxes"]]) for c in value["chains"]],
            gates=dict(value["gates"]),
            notes=list(value["notes"]),
            tokens=[
                VisualToken(t["box"] and Box(*t["box"]), t["kept"], t["relevance"]) for t in value["tokens"]
            ],
            parts=[Box(*box) for box in value["parts"]],
            words=[Word(**word) for word in value["words"]],
            faithfulness=[Faithfulness.of(one) for one in value["faithfulness"]],
            picture=picture,
        )


def explained_as(out: str | Path) -> str:
    """`page`, `values` or `picture`, by a file's ending. Raises `FoveateError` if it cannot be written."""
    suffix = Path(out).suffix.lower()
    if suffix not in (*PAGES, *VALUES):
        drawing_path(out)
        return "picture"
    parent = Path(out).absolute().parent
    if not parent.is_dir():
        raise FoveateError(f"{out}: there is no folder {parent}")
    return "page" if suffix in PAGES else "values"


def _numbers(box: Box) -> list[float]:
    return [float(n) for n in box]


@dataclass(frozen=True)
class Told:
    """What is known of an answer before it is explained.

    Attributes:
        model: what answered.
        question: what was asked.
        answer: the text.
        account: where the method looked.
        views: that the model was shown.
    """

    model: str
    question: str
    answer: str
    account: Account
    views: Sequence[SeenView]


@torch.inference_mode(False)  # tensors made in it cannot be part of a graph
def explain(
    subject: Subject,
    story: Story,
    told: Told,
    *,
    words: int = 32,
    reading: Reading = "chefer",
    probe: Probe = PROBE,
) -> Explanation:
    """Explains an answer.

    Relevance of the answer's tokens is propagated through the LLM to the visual tokens, and from these to the
    picture as `Subject.prepared` says. Of the whole answer it is the sum over its words.

    Args:
        subject: the model.
        story: the conversation and its answer.
        told: what is known of the answer.
        words: how many of the answer's tokens are explained, its first ones.
        reading: of equation 5, as in `foveate.explaining.relevance`.
        probe: how faithfulness is measured.

    Raises:
        FoveateError: a model whose relevance cannot be propagated or placed; an answer of no token.
    """
    if words < 1:
        raise FoveateError(f"words must be at least 1, not {words}")
    ids = list(story.answer)
    if subject.image_token_id in ids:  # in a reply, it stands for no picture
        ids = ids[: ids.index(subject.image_token_id)]
    if not ids:
        raise FoveateError("the answer has no token that could be explained")
    story = Story(story.picture, story.messages, story.areas, ids)
    tokenizer, size = subject.processor.tokenizer, Size(story.picture.height, story.picture.width)
    prepared = subject.prepared(story.messages)
    answered = forced(subject, prepared, ids)
    special = set(tokenizer.all_special_ids)
    spoken = [place for place, token in enumerate(ids) if token not in special][:words] or [0]
    visual, on_picture = _relevance(subject, prepared, ids, spoken, reading)  # (K, n), (K,)
    total = visual.sum(1, keepdim=True)
    fractions = torch.cat(
        [visual.sum(0, keepdim=True) / total.sum().clamp(min=1e-30), visual / total.clamp(min=1e-30)]
    )
    places, parts, shares = _in_picture(prepared.spread(fractions), story)
    kept = torch.ones(len(places), dtype=torch.bool) if prepared.kept is None else prepared.kept
    pieces = _pieces(tokenizer, ids)
    made = Explanation(
        model=told.model,
        question=told.question,
        answer=told.answer,
        probability=answered.probability,
        size=size,
        views=list(told.views),
        regions=None if told.account.regions is None else [_plain(box) for box in told.account.regions],
        chains=[Trail(chain.name, [_plain(box) for box in chain.boxes]) for chain in told.account.chains],
        gates=dict(told.account.gates),
        notes=list(told.account.notes),
        tokens=[
            VisualToken(box, bool(keep), share)
            for box, keep, share in zip(places, kept.tolist(), fractions[0].tolist(), strict=True)
        ],
        parts=parts,
        shares=shares[0].tolist(),
        words=[
            Word(
                pieces[place],
                float(answered.log_probabilities[place].exp()),
                float(on_picture[row]),
                fractions[row + 1].tolist(),
                shares[row + 1].tolist(),
            )
            for row, place in enumerate(spoken)
        ],
        faithfulness=[],
        picture=story.picture,
    )
    left = sum(token not in special for token in ids) - len(made.words)
    if left > 0:
        made.notes.append(f"the last {left} tokens of the answer are not explained")
    if probe.draws:
        claims = _claims(made, probe)
        made.faithfulness = measure(subject, story, answered, claims, probe)
    return made


def _relevance(
    subject: Subject, prepared: Prepared, ids: Sequence[int], spoken: Sequence[int], reading: Reading
) -> tuple[Tensor, Tensor]:
    """Relevance of visual tokens to some tokens of the answer (K, n), and the fraction on these, (K,)."""
    prompt = prepared.inputs["input_ids"][0].cpu()
    there = prompt == subject.image_token_id
    rows = []
    for start in range(0, spoken[-1] + 1, AT_ONCE):
        chosen = ids[start : min(start + AT_ONCE, spoken[-1] + 1)]
        inputs = continued(prepared.inputs, ids[: start + len(chosen) - 1])
        found = answer_relevance(subject.model, inputs, torch.tensor(chosen), reading).float().cpu()
        for number, row in enumerate(found):
            row[len(prompt) - 1 + start + number] -= 1  # Sigma starts as the identity
            rows.append(row[: len(prompt) + start + number])
    rows = [rows[place] for place in spoken]
    visual = torch.stack([row[: len(prompt)][there] for row in rows])
    if not bool(visual.isfinite().all()):
        raise FoveateError("the relevance of image tokens is not finite: use dtype float32")
    visual = visual.clamp(min=0)  # readings that keep signs
    everything = torch.stack([row.clamp(min=0).sum() for row in rows])
    return visual, visual.sum(1) / everything.clamp(min=1e-30)


def _in_picture(spreads: Sequence[Spread], story: Story) -> tuple[list[Box | None], list[Box], Tensor]:
    """What is spread over the pictures of a conversation, over the one that it is about."""
    size = Size(story.picture.height, story.picture.width)
    tokens: list[Box | None] = []
    parts: list[Box] = []
    shares: list[Tensor] = []
    for spread, shown, area in zip(spreads, pictures_of(story.messages), story.areas, strict=True):
        across, down = float(area.width) / shown.width, float(area.height) / shown.height

        def carried(
            box: Box | None, area: Box = area, across: float = across, down: float = down
        ) -> Box | None:
            if box is None:
                return None
            left, top, right, bottom = (float(n) for n in box)
            x, y = float(area.left), float(area.top)
            return Box(x + left * across, y + top * down, x + right * across, y + bottom * down).inside(size)

        tokens += [carried(box) for box in spread.tokens]
        boxes = [carried(box) for box in spread.parts]
        there = torch.tensor(
            [number for number, box in enumerate(boxes) if box is not None], dtype=torch.long
        )
        parts += [box for box in boxes if box is not None]
        shares.append(spread.shares[:, there])
    return tokens, parts, torch.cat(shares, 1)


def _plain(box: Box) -> Box:
    return Box(*(float(n) for n in box))


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text."""
    said = [tokenizer.decode(ids[:n], skip_special_tokens=False) for n in range(len(ids) + 1)]
    return [
        after[len(before) :] if after.startswith(before) else tokenizer.decode([token])
        for before, after, token in zip(said, said[1:], ids, strict=False)
    ]


def _claims(made: Explanation, probe: Probe) -> dict[str, tuple[list[Box], np.ndarray]]:
    """What the explanation says mattered: the most relevant part, and the regions that were chosen."""
    claims = {}
    boxes = made.raster.boxes(made.raster.highest(made.density[0], probe.share))
    if boxes:
        claims["relevance"] = (boxes, pixels_of(boxes, made.size))
    else:
        made.notes.append("the answer rests on nothing in the picture: there is nothing to hide")
    if made.regions:
        mask = pixels_of(made.regions, made.size)
        if 0 < mask.mean() <= MOST:
            claims["regions"] = (list(made.regions), mask)
        else:
            made.notes.append(
                f"the regions are {100 * mask.mean():.0f} % of the picture: they are not hidden, as no other "
                "part is as large"
            )
    return claims
