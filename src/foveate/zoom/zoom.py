"""Zooming with any VLM: find the region of interest, crop it in original pixels, answer from both.

This is Chain-of-Spot's procedure (arXiv 2403.12966, section 3.3) around a model that was never trained for
it; its steps are those of `foveate.zoom.looking`. A proposer says where to look: the model itself in words
(`Answered`) or by calling a tool (`ByTool`), the relevance of its image tokens (`Relevant`), the caller
(`Given`), or any function of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from foveate.errors import FoveateError
from foveate.explaining.explanation import Explanation, SeenView, Told, explain
from foveate.explaining.faithfulness import PROBE, Probe
from foveate.explaining.relevance import Reading
from foveate.explaining.story import Story
from foveate.picture.account import Account
from foveate.picture.drawing import Shown, lay_out
from foveate.picture.geometry import Box
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import Picture, png, read_picture, write_drawing
from foveate.zoom.asking import Model, answered
from foveate.zoom.looking import (
    TOOL_TURNS,
    Answered,
    Budget,
    ByTool,
    Given,
    Looked,
    Proposal,
    Proposer,
    Talk,
    look,
)
from foveate.zoom.relevance import Highlighter, RegionRule
from foveate.zoom.server import SECONDS, SERVED, Server
from foveate.zoom.subject import explained_by
from foveate.zoom.vlm import VLM
from foveate.zoom.wire import Served


@dataclass(frozen=True)
class Relevant:
    """Looks where the image tokens that the answer rests on lie."""

    rule: RegionRule = RegionRule()  # noqa: RUF009  it is frozen

    def __call__(self, vlm: VLM, picture: Image.Image, question: str) -> Proposal:
        (found,) = Highlighter(vlm, self.rule)([picture], [question])
        return Proposal(found.box, heat=found.heat)


PROPOSERS: dict[str, Callable[[], Proposer | ByTool]] = {
    "answer": Answered,
    "relevance": Relevant,
    "tool": ByTool,
}


@dataclass(frozen=True)
class ZoomAnswer(Looked):
    """A model's answers without and with a closer look; attributes as those of `Looked`, and

    Attributes:
        question: what was asked.
        picture: what it was asked about.
    """

    question: str
    picture: Image.Image = field(repr=False)

    @property
    def account(self) -> Account:
        """Where the model looked, in the form that methods report it."""
        heat = self.proposals[0].heat if self.proposals else []
        notes = [f"no closer look: {problem}" for problem in self.problems]
        return Account(regions=self.regions, heat=lambda: heat, notes=notes)

    def show(self, out: str | Path | None = None) -> Image.Image:
        """The picture with its regions and the crops beside it; also written to the file `out` if given."""
        account = self.account
        views = [Shown("crop", crop) for crop in self.crops] or [Shown("whole", self.picture)]
        caption = [(f"Q  {self.question}", False)]
        for how, said in (("whole picture", self.first), ("with the crop", self.zoomed)):
            if said is not None:
                last = said is (self.zoomed or self.first)
                sure = "" if said.confidence is None else f", {said.confidence:.2f}"
                caption.append((f"A  {said.text or '(no text)'}   ({how}{sure})", last))
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
        return {"question": self.question, **super().to_dict()}


class Zoom:
    """Asks a VLM twice: about the whole picture, and about the picture and a crop of its region of interest.

    Args:
        model: any that `AutoModelForImageTextToText` loads, on its device; includes Foveate's own.
        processor: the model's, with a chat template.
        region: `answer` (the model says where to look), `relevance` (of its image tokens), `tool` (the model
            asks for crops by calling a tool), `Answered` or `ByTool` with settings of your own, or a function
            of (VLM, picture, question) that returns a `Proposal`.
        budget: how often, and how large crops are; by default one look, or four by a tool.
        max_positions: the longest text in tokens; by default what the LLM has positions for.
        limits: on the pictures that are read.

    Raises:
        FoveateError: an unknown proposer, a processor without chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        region: str | Proposer | ByTool = "answer",
        budget: Budget | None = None,
        max_positions: int | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self._set(VLM(model, processor, max_positions), region, budget, limits)

    @classmethod
    def of(
        cls,
        model: Model,
        region: str | Proposer | ByTool = "answer",
        budget: Budget | None = None,
        limits: Limits = LIMITS,
    ) -> Zoom:
        """A zoom around a `VLM`, or anything else that answers as one; the rest as above."""
        made = cls.__new__(cls)
        made._set(model, region, budget, limits)
        return made

    @classmethod
    def remote(
        cls,
        url: str,
        model: str,
        *,
        key: str | None = None,
        region: str | Proposer | ByTool = "answer",
        served: Served = SERVED,
        budget: Budget | None = None,
        limits: Limits = LIMITS,
        seconds: float = SECONDS,
        retries: int = 2,
    ) -> Zoom:
        """A zoom around a model on a server of OpenAI's protocol: vLLM, SGLang, llama.cpp, a hosted API.

        Args:
            url: of the server, up to and with `/v1`.
            model: its name there.
            key: for servers that ask for one.
            region: as above, except `relevance`, which is measured inside a model.
            served: how the model writes boxes and calls tools, which a server does not tell.
            budget: as above.
            limits: on the pictures that are read.
            seconds: bound on each request, its answer included.
            retries: how often a request is repeated that failed in passing.

        Raises:
            FoveateError: not an address, `relevance`, the client `openai` missing.
        """
        server = Server(url, model, key, served=served, seconds=seconds, retries=retries)
        return cls.of(server, region, budget, limits)

    def _set(
        self, model: Model, region: str | Proposer | ByTool, budget: Budget | None, limits: Limits
    ) -> None:
        if isinstance(region, str):
            if region not in PROPOSERS:
                *names, last = PROPOSERS
                raise FoveateError(f"unknown region proposer {region!r}: choose {', '.join(names)} or {last}")
            region = PROPOSERS[region]()
        if isinstance(region, Relevant) and not isinstance(model, VLM):
            raise FoveateError(
                "relevance is measured inside a model, which a server does not let us: choose answer or tool"
            )
        self.vlm, self.region, self.limits = model, region, limits
        self.budget = budget or Budget(turns=TOOL_TURNS if isinstance(region, ByTool) else 1)

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
            **generation: further arguments of transformers' `generate`, or of a server's request; greedy
                decoding without any.

        Raises:
            FoveateError: a picture that cannot be read, an empty question, a box outside the picture.
        """
        self.vlm.check_question(question)
        whole = read_picture(picture, self.limits, self.vlm.transparency)
        propose, turns = self.region, 0 if no_zoom else self.budget.turns
        if box is not None:
            propose, turns = Given(box), min(turns, 1)
            problem = Given(box)(self.vlm, whole, question).problem
            if problem:
                size = f"{whole.width} x {whole.height} pixels"
                raise FoveateError(f"box {list(box)} in a picture of {size}: {problem}")
        if isinstance(propose, ByTool) and turns and "streamer" in generation:
            raise FoveateError(
                "streamer: a model that calls tools may go on after any reply; leave it out, or choose answer"
            )
        steps = look(self.vlm, Talk.about(whole, question), propose, self.budget, turns)
        found = answered(self.vlm, steps, max_new_tokens, **generation)
        return ZoomAnswer(**vars(found), question=question, picture=whole)

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
            FoveateError: as for `ask`; a model on a server, or one that looks by calling a tool; one whose
                relevance cannot be propagated or placed.
        """
        if not isinstance(self.vlm, VLM):
            raise FoveateError("a server does not let us look into its model: load it here to explain it")
        if isinstance(self.region, ByTool) and box is None and not no_zoom:
            raise FoveateError(
                "what a model said between calls of a tool is not explained: choose answer or relevance"
            )
        answer = self.ask(
            picture, question, box=box, no_zoom=no_zoom, max_new_tokens=max_new_tokens, **generation
        )
        everything = Box(0, 0, *answer.picture.size)
        views = [SeenView.of("whole", everything, answer.picture)]
        talk, areas, said = Talk.about(answer.picture, question), [everything], answer.first
        messages = talk.messages
        if answer.zoomed is not None:
            views.append(SeenView.of("crop", answer.regions[-1], answer.crops[-1]))
            messages, said = talk.closer(answer.crops[-1]), answer.zoomed
            areas.append(answer.regions[-1])
        story = Story(answer.picture, messages, areas, said.ids)
        account = answer.account if answer.regions else replace(answer.account, regions=None)
        told = Told(type(self.vlm.model).__name__, question, said.text, account, views)
        subject = explained_by(self.vlm)
        return explain(subject, story, told, words=words, reading=reading, probe=probe)
