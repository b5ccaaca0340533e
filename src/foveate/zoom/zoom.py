"""Zooming with any VLM: find the region of interest, crop it in original pixels, answer from both.

This is Chain-of-Spot's procedure (arXiv 2403.12966, section 3.3) around a model that was never trained for
it. A proposer says where to look: the model itself in words (`Answered`), the relevance of its image tokens
(`Relevant`), the caller (`Given`), or any function of the same signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from foveate.errors import FoveateError
from foveate.explaining.explanation import Explanation, SeenView, Told, explain
from foveate.explaining.faithfulness import PROBE, Probe
from foveate.explaining.relevance import Reading
from foveate.explaining.story import Story
from foveate.picture.account import Account
from foveate.picture.boxes import BOX_FORMATS, BoxFormat, Frame, box_format, checked_box, fitted, read_box
from foveate.picture.drawing import Shown, lay_out
from foveate.picture.geometry import Box, Size
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import Picture, png, read_picture, write_drawing
from foveate.zoom.relevance import Highlighter, RegionRule
from foveate.zoom.subject import explained_by
from foveate.zoom.vlm import VLM, Messages, Said, message

WHERE = (
    'To answer the question: "{question}", where is the region of interest in the image? Answer with {box}.'
)
REGION, QUESTION = "The region of interest in the image is", "Answer the question: {question}"
UNITS = {
    "unit": "each from 0 to 1",
    "thousand": "each from 0 to 1000",
    "pixels": "in pixels",
}
LONGEST = 50  # times the shorter side; processors refuse much longer pictures
REGION_TOKENS = 64  # bound on the model's answer to where the region is


@dataclass(frozen=True)
class Budget:
    """Bounds on what zooming may cost.

    Attributes:
        turns: how often to look closer; each further crop lies within the one before.
        min_pixels: crops with fewer pixels are enlarged to about this number, for models that show a small
            picture by few tokens.
        max_pixels: crops with more are shrunk.
        min_side: least side of a region in original pixels, unless the picture is smaller.
    """

    turns: int = 1
    min_pixels: int = 336 * 336
    max_pixels: int = 1344 * 1344
    min_side: int = 16

    def __post_init__(self) -> None:
        if self.turns < 1 or self.min_side < 1:
            raise FoveateError(f"a budget needs turns and min_side of at least 1, not {self}")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise FoveateError(f"a budget needs 1 <= min_pixels <= max_pixels, not {self}")


@dataclass(frozen=True)
class Proposal:
    """Where to look in a picture, or why nowhere.

    Attributes:
        box: in pixels of the picture looked at; None for nowhere.
        problem: why there is no box.
        said: what the model said, if it was asked.
        heat: parts of the picture with their relevance, 0 to 1, if it was measured.
    """

    box: Box | None
    problem: str | None = None
    said: str | None = None
    heat: list[tuple[Box, float]] = field(default_factory=list, repr=False)


Proposer = Callable[[VLM, Image.Image, str], Proposal]


@dataclass(frozen=True)
class Answered:
    """The model is asked where to look.

    Attributes:
        form: name of one of `foveate.picture.boxes.BOX_FORMATS`; by default the model's own if it has one,
            else `unit_xyxy`.
        frame: whether coordinates span the picture or the square that it is padded to.
        extend: fraction by which the box's width and height grow, about its centre.
        prompt: with {question} and {box}; {box} is replaced by the answer's format.
    """

    form: str | None = None
    frame: Literal["picture", "padded"] = "picture"
    extend: float = 0.1
    prompt: str = WHERE

    def __post_init__(self) -> None:
        if self.form is not None:
            box_format(self.form)
        if self.frame not in ("picture", "padded"):
            raise FoveateError(f"frame must be picture or padded, not {self.frame!r}")
        if self.extend < 0:
            raise FoveateError(f"extend must not be negative, it is {self.extend}")
        if "{question}" not in self.prompt:
            raise FoveateError("the prompt for the region must contain {question}")

    def __call__(self, vlm: VLM, picture: Image.Image, question: str) -> Proposal:
        form = box_format(self.form or _own_form(vlm))
        size = Size(picture.height, picture.width)
        words = self.prompt.replace("{box}", _described(form)).replace("{question}", question)
        conversation = message(picture, words)
        frame = Frame.padded(size) if self.frame == "padded" else Frame.whole(size)
        if form.scale == "pixels":
            frame = Frame(size, frame.area, vlm.shown(vlm.inputs([conversation]), size))
        (said,) = vlm.answer([conversation], max_new_tokens=REGION_TOKENS)
        reading = read_box(said.text, form, frame)
        if reading.box is None:
            return Proposal(None, reading.problem, said.text)
        return Proposal(fitted(reading.box, size, extend=self.extend), said=said.text)


def _own_form(vlm: VLM) -> str:
    model_type = vlm.model.config.model_type.removesuffix("_moe")
    return model_type if model_type in BOX_FORMATS else "unit_xyxy"


def _described(form: BoxFormat) -> str:
    names = ("left", "top", "right", "bottom")
    ordered = names if form.order == "xyxy" else (names[0], names[2], names[1], names[3])
    return f"{form.template.format(*ordered)}, {UNITS[form.scale]}"


@dataclass(frozen=True)
class Relevant:
    """Looks where the image tokens that the answer rests on lie."""

    rule: RegionRule = RegionRule()  # noqa: RUF009  it is frozen

    def __call__(self, vlm: VLM, picture: Image.Image, question: str) -> Proposal:
        (found,) = Highlighter(vlm, self.rule)([picture], [question])
        return Proposal(found.box, heat=found.heat)


@dataclass(frozen=True)
class Given:
    """Looks at a given region: left, top, right, bottom in original pixels of the upright picture."""

    box: tuple[float, float, float, float] | Box

    def __call__(self, vlm: VLM, picture: Image.Image, question: str) -> Proposal:
        try:
            values = [float(n) for n in self.box]
        except (TypeError, ValueError):
            raise FoveateError(f"box {self.box!r}: give left, top, right, bottom in pixels") from None
        reading = checked_box(values, Size(picture.height, picture.width))
        if reading.box is not None and min(reading.box.width, reading.box.height) < 1:
            return Proposal(None, "the box is smaller than a pixel: its numbers look like fractions")
        return Proposal(reading.box, reading.problem)


PROPOSERS: dict[str, Callable[[], Proposer]] = {"answer": Answered, "relevance": Relevant}


@dataclass
class ZoomAnswer:
    """A model's answers without and with a closer look.

    Attributes:
        text: its answer, from the closest look.
        confidence: mean probability of that answer's tokens.
        regions: where it looked closer, in original pixels of the upright picture; each lies in the one
            before.
        first: the answer to the whole picture.
        zoomed: the answer with the crop; None if there was no crop.
        proposals: one per turn, in the pixels of the region before; the last may say why none follows.
        crops: of the regions, as shown to the model.
        question: what was asked.
        picture: what it was asked about.
    """

    first: Said
    zoomed: Said | None
    regions: list[Box]
    proposals: list[Proposal] = field(repr=False)
    crops: list[Image.Image] = field(repr=False)
    question: str
    picture: Image.Image = field(repr=False)

    @property
    def text(self) -> str:
        return (self.zoomed or self.first).text

    @property
    def confidence(self) -> float:
        return (self.zoomed or self.first).confidence

    @property
    def account(self) -> Account:
        """Where the model looked, in the form that methods report it."""
        heat = self.proposals[0].heat if self.proposals else []
        problems = [proposal.problem for proposal in self.proposals if proposal.problem]
        notes = [f"no closer look: {problem}" for problem in problems]
        return Account(regions=self.regions, heat=lambda: heat, notes=notes)

    def show(self, out: str | Path | None = None) -> Image.Image:
        """The picture with its regions and the crops beside it; also written to the file `out` if given."""
        account = self.account
        views = [Shown("crop", crop) for crop in self.crops] or [Shown("whole", self.picture)]
        caption = [(f"Q  {self.question}", False)]
        for how, said in (("whole picture", self.first), ("with the crop", self.zoomed)):
            if said is not None:
                last = said is (self.zoomed or self.first)
                caption.append((f"A  {said.text or '(no text)'}   ({how}, {said.confidence:.2f})", last))
        caption += [(note, False) for note in account.notes]
        drawing = lay_out(self.picture, self.regions, views, caption, account.heat())
        if out is not None:
            write_drawing(drawing, out)
        return drawing

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return png(self.show())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "question": self.question,
            "answer": self.text,
            "confidence": self.confidence,
            "regions": [list(box.rounded()) for box in self.regions],
            "first": _told(self.first),
            "zoomed": self.zoomed and _told(self.zoomed),
            "problems": [proposal.problem for proposal in self.proposals if proposal.problem],
        }


def _told(said: Said) -> dict[str, Any]:
    return {"text": said.text, "confidence": said.confidence}


def _closer(answer: ZoomAnswer) -> Messages:
    """The conversation with the last crop."""
    asked = QUESTION.replace("{question}", answer.question)
    return message(answer.picture, REGION, answer.crops[-1], asked)


class Zoom:
    """Asks a VLM twice: about the whole picture, and about the picture and a crop of its region of interest.

    Args:
        model: any that `AutoModelForImageTextToText` loads, on its device; includes Foveate's own.
        processor: the model's, with a chat template.
        region: `answer` (the model says where to look), `relevance` (of its image tokens), or a function of
            (VLM, picture, question) that returns a `Proposal`.
        budget: how often, and how large crops are.
        max_positions: the longest text in tokens; by default what the LLM has positions for.
        limits: on the pictures that are read.

    Raises:
        FoveateError: an unknown proposer, a processor without chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        region: str | Proposer = "answer",
        budget: Budget = Budget(),
        max_positions: int | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        if isinstance(region, str):
            if region not in PROPOSERS:
                raise FoveateError(f"unknown region proposer {region!r}: choose {' or '.join(PROPOSERS)}")
            region = PROPOSERS[region]()
        self.vlm, self.region = VLM(model, processor, max_positions), region
        self.budget, self.limits = budget, limits

    def ask(
        self,
        picture: Picture,
        question: str,
        *,
        box: tuple[float, float, float, float] | None = None,
        no_zoom: bool = False,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> ZoomAnswer:
        """Asks one question about a picture.

        Args:
            picture: path, URL, bytes, array or PIL image, as `read_picture` takes it; the answer keeps it.
            question: not empty.
            box: look here (left, top, right, bottom in original pixels) instead of asking the proposer.
            no_zoom: only the whole picture.
            max_new_tokens: bound on each answer.
            **generation: further arguments of transformers' `generate`; greedy decoding without any.

        Raises:
            FoveateError: a picture that cannot be read, an empty question, a box outside the picture.
        """
        self.vlm.check_question(question)
        whole = read_picture(picture, self.limits, self.vlm.transparency)
        if box is not None:
            problem = Given(box)(self.vlm, whole, question).problem
            if problem:
                size = f"{whole.width} x {whole.height} pixels"
                raise FoveateError(f"box {list(box)} in a picture of {size}: {problem}")
        generation = {"max_new_tokens": max_new_tokens, **generation}
        turns = 0 if no_zoom else 1 if box is not None else self.budget.turns
        looks = self._looks(whole, question, self.region if box is None else Given(box), turns)
        regions = [region for _, region in looks if region is not None]
        crops = [self._crop(whole, region) for region in regions]
        # Only the final answer is streamed.
        quiet = {name: value for name, value in generation.items() if name != "streamer" or not crops}
        (first,) = self.vlm.answer([message(whole, question)], **quiet)
        answer = ZoomAnswer(first, None, regions, [proposal for proposal, _ in looks], crops, question, whole)
        if crops:
            (answer.zoomed,) = self.vlm.answer([_closer(answer)], **generation)
        return answer

    def explain(
        self,
        picture: Picture,
        question: str,
        *,
        box: tuple[float, float, float, float] | None = None,
        no_zoom: bool = False,
        words: int = 32,
        reading: Reading = "chefer",
        probe: Probe = PROBE,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> Explanation:
        """Asks one question about a picture, and explains the answer: where it looked and what it rests on.

        Explained is the last answer: with the crop, where there was one.

        Args:
            picture: as for `ask`; so are question, box and no_zoom.
            question: not empty.
            box: look here instead of asking the proposer.
            no_zoom: only the whole picture.
            words: how many of the answer's tokens are explained, its first ones.
            reading: of attention and gradient, as in `foveate.explaining.relevance`.
            probe: how it is measured whether the explanation is faithful; `Probe(draws=0)` leaves that out.
            max_new_tokens: bound on each answer.
            **generation: as for `ask`.

        Raises:
            FoveateError: as for `ask`; a model whose relevance cannot be propagated or placed.
        """
        answer = self.ask(
            picture, question, box=box, no_zoom=no_zoom, max_new_tokens=max_new_tokens, **generation
        )
        everything = Box(0, 0, *answer.picture.size)
        views = [SeenView.of("whole", everything, answer.picture)]
        messages, areas, said = message(answer.picture, question), [everything], answer.first
        if answer.zoomed is not None:
            views.append(SeenView.of("crop", answer.regions[-1], answer.crops[-1]))
            messages, said = _closer(answer), answer.zoomed
            areas.append(answer.regions[-1])
        story = Story(answer.picture, messages, areas, said.tokens)
        account = answer.account if answer.regions else replace(answer.account, regions=None)
        told = Told(type(self.vlm.model).__name__, question, said.text, account, views)
        subject = explained_by(self.vlm)
        return explain(subject, story, told, words=words, reading=reading, probe=probe)

    def _looks(
        self, picture: Image.Image, question: str, propose: Proposer, turns: int
    ) -> list[tuple[Proposal, Box | None]]:
        """Proposals and their regions, each within the one before; None ends them."""
        looks: list[tuple[Proposal, Box | None]] = []
        area, seen = Box(0, 0, *picture.size), picture
        for _ in range(turns):
            proposal = propose(self.vlm, seen, question)
            if not isinstance(proposal, Proposal):
                raise FoveateError(f"a proposer returns a Proposal, not {type(proposal).__name__}")
            region = None
            if proposal.box is not None:
                shown = Size(seen.height, seen.width)
                inside, problem = checked_box([float(n) for n in proposal.box], shown)
                if inside is not None:
                    region = self._within(inside, shown, area)
                    problem = (
                        "the region is not smaller than what was seen before" if region is None else None
                    )
                if problem is not None:
                    proposal = Proposal(None, problem, proposal.said, proposal.heat)
            looks.append((proposal, region))
            if region is None:
                break
            area, seen = region, self._crop(picture, region)
        return looks

    def _within(self, box: Box, shown: Size, area: Box) -> Box | None:
        """A box in pixels of a shown area, converted to the picture's; None if it is the whole area."""
        x, y = area.width / shown.width, area.height / shown.height
        found = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
        least = max(self.budget.min_side, round(max(found.width, found.height) / LONGEST))
        part = fitted(found, Size(int(area.height), int(area.width)), minimum=least)
        if part.width * part.height >= area.width * area.height:
            return None
        return Box(part.left + area.left, part.top + area.top, part.right + area.left, part.bottom + area.top)

    def _crop(self, picture: Image.Image, region: Box) -> Image.Image:
        crop = picture.crop(region.rounded())
        pixels = crop.width * crop.height
        wanted = min(max(pixels, self.budget.min_pixels), self.budget.max_pixels)
        if wanted == pixels:
            return crop
        scale = math.sqrt(wanted / pixels)
        size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
        return crop.resize(size, Image.Resampling.BICUBIC)
