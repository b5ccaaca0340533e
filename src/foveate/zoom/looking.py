"""A closer look, as steps: where to look, the crop of the original pixels, the answer with it.

Who says where to look: the model in words (`Answered`), the model by calling a tool (`ByTool`), the caller
(`Given`), or a function. What the steps ask is that of `foveate.zoom.asking`: the model may be here or on a
server. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from PIL import Image

from foveate.errors import FoveateError
from foveate.picture.boxes import BoxFormat, Frame, box_format, checked_box, fitted, read_box
from foveate.picture.geometry import Box, Size
from foveate.zoom.asking import Ask, Call, Messages, Model, Said, Sight, Steps, Unavailable, answered, message
from foveate.zoom.tools import LAST, Convention, calls_in, convention

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
TOOL_TURNS = 4  # crops that a model may ask for by a tool, by default
MISTAKES = 3  # calls of a tool that make no sense, after which the model is asked without it
NO_LOOKS = "no closer look is left: answer the question"
SPENT = "the budget's tokens are used up"


@dataclass(frozen=True)
class Budget:
    """Bounds on what zooming may cost.

    Attributes:
        turns: how often to look closer; each further crop lies within the one before, except where the model
            calls a tool, which may crop any picture that it was shown.
        min_pixels: crops with fewer pixels are enlarged to about this number, for models that show a small
            picture by few tokens.
        max_pixels: crops with more are shrunk.
        min_side: least side of a region in original pixels, unless the picture is smaller.
        tokens: that the model may write for the closer look: all but its answer to the whole picture.
    """

    turns: int = 1
    min_pixels: int = 336 * 336
    max_pixels: int = 1344 * 1344
    min_side: int = 16
    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.turns < 1 or self.min_side < 1 or self.tokens < 1:
            raise FoveateError(f"a budget needs turns, min_side and tokens of at least 1, not {self}")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise FoveateError(f"a budget needs 1 <= min_pixels <= max_pixels, not {self}")

    def within(self, box: Box, shown: Size, area: Box) -> Box | None:
        """A box in pixels of a shown area, converted to the picture's; None if it is the whole area."""
        x, y = area.width / shown.width, area.height / shown.height
        found = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
        least = max(self.min_side, round(max(found.width, found.height) / LONGEST))
        part = fitted(found, Size(int(area.height), int(area.width)), minimum=least)
        if part.width * part.height >= area.width * area.height:
            return None
        return Box(part.left + area.left, part.top + area.top, part.right + area.left, part.bottom + area.top)

    def crop(self, picture: Image.Image, region: Box) -> Image.Image:
        """A region of a picture, enlarged or shrunk to the bounds on its pixels."""
        return self.sized(picture.crop(region.rounded()))

    def sized(self, crop: Image.Image) -> Image.Image:
        """A crop, enlarged or shrunk to the bounds on its pixels."""
        pixels = crop.width * crop.height
        wanted = min(max(pixels, self.min_pixels), self.max_pixels)
        if wanted == pixels:
            return crop
        scale = math.sqrt(wanted / pixels)
        size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
        return crop.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Proposal:
    """Where to look in a picture, or why nowhere.

    Attributes:
        box: in pixels of the picture looked at; None for nowhere.
        problem: why there is no box.
        said: what the model said, if it was asked.
        heat: parts of the picture with their relevance, 0 to 1, if it was measured.
        label: what the model calls the region, if it was told.
    """

    box: Box | None
    problem: str | None = None
    said: str | None = None
    heat: list[tuple[Box, float]] = field(default_factory=list, repr=False)
    label: str | None = None


@dataclass(frozen=True)
class Talk:
    """A conversation that waits for an answer about one picture.

    Attributes:
        messages: all of it; the last one is the user's question. The picture may be a part of another form
            than `message` makes, as long as whoever is asked knows it.
        picture: upright and RGB, as it is cropped.
        question: the text of the last message.
        place: the indices of the message and of its part that show the picture.
    """

    messages: Messages
    picture: Image.Image = field(repr=False)
    question: str
    place: tuple[int, int] = (0, 0)

    @classmethod
    def about(cls, picture: Image.Image, question: str) -> Talk:
        """One question about a picture."""
        return cls(message(picture, question), picture, question)

    def asking(self, *parts: Image.Image | str) -> Messages:
        """The conversation with these texts and pictures in place of the question."""
        (where, which), last = self.place, len(self.messages) - 1
        shown = [self.messages[where]["content"][which]] if where == last else []
        return [*self.messages[:-1], {"role": "user", "content": [*shown, *message(*parts)[0]["content"]]}]

    def redrawn(self, drawn: Image.Image) -> Talk:
        """The same with this copy in place of whatever shows the picture."""
        where, which = self.place
        content = list(self.messages[where]["content"])
        content[which] = {"type": "image", "image": drawn}
        messages = list(self.messages)
        messages[where] = {**messages[where], "content": content}
        return replace(self, messages=messages)

    def closer(self, crop: Image.Image) -> Messages:
        """The question about the picture and a crop of it."""
        return self.asking(REGION, crop, QUESTION.replace("{question}", self.question))


Proposer = Callable[[Any, Image.Image, str], Proposal]  # of (model, picture, question)


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

    def __call__(self, model: Model, picture: Image.Image, question: str) -> Proposal:
        return answered(model, self.steps(model, picture, question), REGION_TOKENS)

    def steps(
        self, model: Sight, picture: Image.Image, question: str, talk: Talk | None = None
    ) -> Steps[Proposal]:
        """Args: talk: the conversation that the question is asked in, if it is about the whole picture."""
        form = box_format(self.form or model.form)
        size = Size(picture.height, picture.width)
        words = self.prompt.replace("{box}", _described(form)).replace("{question}", question)
        frame = Frame.padded(size) if self.frame == "padded" else Frame.whole(size)
        talk = talk or Talk.about(picture, question)
        if form.scale == "pixels":
            drawn, counted = model.drawn(picture)
            frame, talk = Frame(size, frame.area, counted), talk.redrawn(drawn)
        said = yield Ask(talk.asking(words), most=REGION_TOKENS, where=True)
        reading = read_box(said.text, form, frame)
        if reading.box is None:
            return Proposal(None, reading.problem, said.text)
        return Proposal(fitted(reading.box, size, extend=self.extend), said=said.text)


def _described(form: BoxFormat) -> str:
    names = ("left", "top", "right", "bottom")
    ordered = names if form.order == "xyxy" else (names[0], names[2], names[1], names[3])
    return f"{form.template.format(*ordered)}, {UNITS[form.scale]}"


@dataclass(frozen=True)
class ByTool:
    """The model asks for crops itself, by calling a tool that it was trained on.

    Attributes:
        convention: a name in `foveate.zoom.tools.CONVENTIONS`, or a convention of one's own; by default that
            of the model's type, else `qwen3_vl`.
    """

    convention: str | Convention | None = None

    def __post_init__(self) -> None:
        if isinstance(self.convention, str):
            convention(self.convention)

    def of(self, model: Sight) -> Convention:
        """The convention that a model is asked in."""
        if isinstance(self.convention, Convention):
            return self.convention
        return convention(self.convention or model.convention)


@dataclass(frozen=True)
class Given:
    """Looks at a given region: left, top, right, bottom in original pixels of the upright picture."""

    box: tuple[float, float, float, float] | Box

    def __call__(self, model: Any, picture: Image.Image, question: str) -> Proposal:
        try:
            values = [float(n) for n in self.box]
        except (TypeError, ValueError):
            raise FoveateError(f"box {self.box!r}: give left, top, right, bottom in pixels") from None
        reading = checked_box(values, Size(picture.height, picture.width))
        if reading.box is not None and min(reading.box.width, reading.box.height) < 1:
            return Proposal(None, "the box is smaller than a pixel: its numbers look like fractions")
        return Proposal(reading.box, reading.problem)


@dataclass(frozen=True)
class Looked:
    """A model's answers without and with a closer look.

    Attributes:
        first: the answer to the whole picture.
        zoomed: the answer with the crop; None if there was no crop.
        regions: where it looked closer, in original pixels of the upright picture; each lies in the one
            before, except where it called a tool.
        proposals: one per turn, in the pixels of the region before; the last may say why none follows.
        crops: of the regions, as shown to the model.
    """

    first: Said
    zoomed: Said | None
    regions: list[Box]
    proposals: list[Proposal] = field(repr=False)
    crops: list[Image.Image] = field(repr=False)

    @property
    def text(self) -> str:
        """The answer, from the closest look."""
        return (self.zoomed or self.first).text

    @property
    def confidence(self) -> float | None:
        """Mean probability of that answer's tokens; None if a server does not tell it."""
        return (self.zoomed or self.first).confidence

    @property
    def problems(self) -> list[str]:
        """Why there was no closer look, or none that went further."""
        return [proposal.problem for proposal in self.proposals if proposal.problem]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "answer": self.text,
            "confidence": self.confidence,
            "regions": [list(box.rounded()) for box in self.regions],
            "first": self.first.to_dict(),
            "zoomed": self.zoomed and self.zoomed.to_dict(),
            "problems": self.problems,
        }


class _Spent(Exception):
    """The budget's tokens are used up."""

    def __init__(self) -> None:
        super().__init__(SPENT)


class _Purse:
    """The tokens that are left for a closer look."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def ask(self, ask: Ask) -> Steps[Said]:
        """One request of the closer look, within what is left. Raises `_Spent` if nothing is."""
        if self.left < 1:
            raise _Spent
        most = self.left if ask.most is None else min(ask.most, self.left)
        said = yield replace(ask, most=most)
        self.left -= most if said.tokens is None else said.tokens
        return said


def _asked(steps: Steps[Proposal], purse: _Purse) -> Steps[Proposal]:
    """A proposal of the model's; without a box if it cannot be asked for one."""
    try:
        ask = next(steps)
        while True:
            ask = steps.send((yield from purse.ask(ask)))
    except StopIteration as end:
        found: Proposal = end.value
        return found
    except Unavailable:
        raise
    except (_Spent, FoveateError) as error:
        return Proposal(None, str(error))


def look(
    model: Sight, talk: Talk, propose: Proposer | ByTool, budget: Budget, turns: int | None = None
) -> Steps[Looked]:
    """The steps of a closer look.

    Args:
        model: is asked.
        talk: the question.
        propose: says where to look.
        budget: bounds on its cost.
        turns: how often to look closer, instead of the budget's; 0: not at all.
    """
    turns = budget.turns if turns is None else turns
    purse = _Purse(budget.tokens)
    if isinstance(propose, ByTool) and turns:
        return (yield from _by_tool(model, talk, propose.of(model), budget, turns, purse))
    proposals, regions = yield from _proposed(model, talk, propose, budget, turns, purse)
    crops = [budget.crop(talk.picture, region) for region in regions]
    first = yield Ask(talk.messages, last=not crops)
    zoomed = None
    if crops:
        try:
            zoomed = yield from purse.ask(Ask(talk.closer(crops[-1]), last=True))
        except Unavailable:
            raise
        except (_Spent, FoveateError) as error:  # with the crop it is too long for the model
            return Looked(first, None, [], [*proposals, Proposal(None, str(error))], [])
    return Looked(first, zoomed, regions, proposals, crops)


def _proposed(
    model: Sight, talk: Talk, propose: Proposer | ByTool, budget: Budget, turns: int, purse: _Purse
) -> Steps[tuple[list[Proposal], list[Box]]]:
    """Proposals and their regions, each within the one before; one without a region ends them."""
    proposals: list[Proposal] = []
    regions: list[Box] = []
    area, seen = Box(0, 0, *talk.picture.size), talk.picture
    for turn in range(turns):
        if isinstance(propose, Answered):
            asked = propose.steps(model, seen, talk.question, None if turn else talk)
            proposal = yield from _asked(asked, purse)
        else:
            assert not isinstance(propose, ByTool)
            proposal = propose(model, seen, talk.question)
        if not isinstance(proposal, Proposal):
            raise FoveateError(f"a proposer returns a Proposal, not {type(proposal).__name__}")
        region = None
        if proposal.box is not None:
            region, problem = _placed(proposal.box, Size(seen.height, seen.width), area, budget)
            if problem is not None:
                proposal = replace(proposal, box=None, problem=problem)
        proposals.append(proposal)
        if region is None:
            break
        regions.append(region)
        area, seen = region, budget.crop(talk.picture, region)
    return proposals, regions


def _placed(box: Box, shown: Size, area: Box, budget: Budget) -> tuple[Box | None, str | None]:
    """A box in pixels of a shown area as a region of the picture; or why it is none."""
    inside, problem = checked_box([float(n) for n in box], shown)
    if inside is None:
        return None, problem
    region = budget.within(inside, shown, area)
    return region, "the region is not smaller than what was seen before" if region is None else None


class _View(NamedTuple):
    """A picture that the model was shown.

    Attributes:
        image: its pixels.
        area: its place in the original.
        frame: what boxes in it are measured in.
        given: the copy of it that the model got.
    """

    image: Image.Image
    area: Box
    frame: Frame
    given: Image.Image

    @classmethod
    def of(cls, image: Image.Image, area: Box, asked: Convention, model: Sight) -> _View:
        given, counted = model.drawn(image) if asked.scale == "pixels" else (image, None)
        return cls(image, area, Frame.whole(Size(image.height, image.width), counted), given)


def _by_tool(
    model: Sight, talk: Talk, asked: Convention, budget: Budget, turns: int, purse: _Purse
) -> Steps[Looked]:
    """The model calls its tool until it answers, makes no sense, or has used up what it may."""
    first = yield Ask(talk.messages)
    views = [_View.of(talk.picture, Box(0, 0, *talk.picture.size), asked, model)]
    messages = (talk.redrawn(views[0].given) if asked.scale == "pixels" else talk).messages
    proposals: list[Proposal] = []
    zoomed, mistakes = None, 0
    try:
        while mistakes < MISTAKES and zoomed is None:
            said = yield from purse.ask(Ask(messages, tools=(asked.tool,)))
            calls = said.calls or tuple(calls_in(said.text))
            if not calls:
                zoomed = said._replace(text=asked.final(said.text))
                break
            results = []
            for call in calls:
                proposal, view = _called(call, said.text, asked, views, budget, turns, model)
                proposals.append(proposal)
                if view is None:
                    mistakes += 1
                    parts: list[dict[str, Any]] = [{"type": "text", "text": f"Error: {proposal.problem}."}]
                else:
                    views.append(view)
                    last = [{"type": "text", "text": LAST}] if len(views) > turns else []
                    parts = [{"type": "image", "image": view.given}, *last]
                results.append(asked.result(call, parts))
            messages = [*messages, asked.reply(said), *results]
        closer = views[1:]
        if closer and not (zoomed and zoomed.text):  # without the tool it cannot but answer
            zoomed = yield from purse.ask(Ask(talk.closer(closer[-1].image)))
    except Unavailable:
        raise
    except (_Spent, FoveateError) as error:  # a conversation that has grown too long for the model
        closer, zoomed = [], None
        proposals.append(Proposal(None, str(error)))
    if not closer:
        if not proposals:
            said_text = zoomed.text if zoomed else None
            proposals.append(Proposal(None, f"the model did not call {asked.name}", said_text))
        zoomed = None
    return Looked(first, zoomed, [v.area for v in closer], proposals, [v.image for v in closer])


def _called(
    call: Call, text: str, asked: Convention, views: list[_View], budget: Budget, turns: int, model: Sight
) -> tuple[Proposal, _View | None]:
    """What a call asks for, and the crop; or why there is none, as the model is told."""
    if len(views) > turns:
        return Proposal(None, NO_LOOKS, text), None
    place, found = asked.read(call, [view.frame for view in views])
    region, problem = None, found.problem
    if found.box is not None:
        seen = views[place]
        region, problem = _placed(found.box, Size(seen.image.height, seen.image.width), seen.area, budget)
    if region is None:
        return Proposal(None, problem, text), None
    label = (call.arguments or {}).get("label")
    proposal = Proposal(found.box, said=text, label=label if isinstance(label, str) else None)
    return proposal, _View.of(budget.crop(views[0].image, region), region, asked, model)
