"""Chain-of-Spot: the model first says where to look, then answers from the picture and that part of it.

Paper: Liu et al., Chain-of-Spot: Interactive Reasoning Improves Large Vision-Language Models,
arXiv 2403.12966. Authors' code: dongyh20/Chain-of-Spot (a fork of LLaVA-1.5).

    picture -> one square view -> MLP        plan, ChainOfSpotConnector   section 4.1, as in LLaVA-1.5
    Inst.1 -> where to look                  converse, Wording.where      equations 2 and 7
    str([w0, w1, h0, h1])                    region                       equation 8
    crop, zoomed like the first picture      crop                         section 3.3
    Inst.2 -> the answer                     converse, Wording.answer     equations 3 and 9
    one random question of a picture at      lessons                      sections 3.3 and 4.1
    each visit, both answers are learnt
    where its region comes from              regions_for                  table 3a

Where we differ from the authors' code and why:

- `wording: released` puts the question in quotes and asks "what is the region", as the released model is
  asked (training had "where is"); `wording: paper` is equations 7 and 9.
- `box_format: unit_xxyy` is the order of equation 8, `unit_xyxy` that of the released model.
- `parser: strict` is the grammar of `foveate.picture.boxes`; a reply that is not a box leads to the whole
  picture, with the reason in the answer's notes. `parser: authors` cuts off the first and the last character
  and splits at ", ": lists without brackets lose digits, other spellings fail, and failures go unnoticed.
- `crop: original` cuts out original pixels; `crop: padded` cuts them from the picture padded to a square,
  black beyond it, as in the released model's training. Pixel coordinates do not make huge pictures, and a box
  without area means the whole picture; the authors' program stops at such boxes.
- Questions whose region is missing or malformed are left out of training; the authors train them with the
  full picture.
- A side that is too short for two different numbers is taught wider than it is, so that it can be read back;
  the authors teach a box without area.
- The paper freezes the projector and learns one question of a picture; the authors' code trains it and
  appends the other questions (`others: append`).
- The second turn keeps the LLM's cache of the first (`foveate.ask.context`), and the first picture is encoded
  once; the authors generate twice from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError
from foveate.layers import Activation, mlp_projector
from foveate.methods.base import (
    IMAGE_TOKEN,
    Connector,
    Cut,
    Method,
    MethodOptions,
    Query,
    Reply,
    Turn,
    VisualTokens,
    Widths,
    flat,
)
from foveate.methods.layouts import HF_PROJECTOR, Layout, connector_options, hf_activation, known_projector
from foveate.picture.boxes import Frame, ReadBox, box_format, checked_box, fitted, read_box, write_box
from foveate.picture.geometry import Box, Size, View, ViewPlan, padded_square, whole

PADDING = (122, 116, 104)  # CLIP's mean colour, the padding of the released model
MOST_PIXELS = 2**25  # of a crop that reaches beyond the picture: 100 MB
LONGEST = 2**14  # side of such a crop
FARTHEST = 2.0**31  # bound on coordinates, which PIL's pictures cannot exceed
FINEST = 1000  # least resolution of box formats over the whole picture
CENTRE = 0.5  # fraction of each side for the central crop: a quarter of the picture
LEAST_SIDE = 14  # of a crop, in original pixels: one patch of the tower at full resolution
REGION_TOKENS = 64  # bound on the reply to the first instruction; boxes of all formats are shorter


@dataclass(frozen=True)
class Wording:
    """The two instructions; {q} is the question, `<image>` marks a picture."""

    where: str
    answer: str
    learnt: str  # the first instruction in training


WORDINGS = {
    "paper": Wording(
        where="To answer the question: {q}, where is the region of interest in the image?",
        answer=f"The region of interest in the image is {IMAGE_TOKEN}. Answer the question: {{q}}.",
        learnt="To answer the question: {q}, where is the region of interest in the image?",
    ),
    "released": Wording(
        where='To answer the question: "{q}", what is the region of interest in the image?',
        answer=f'The region of interest in the image is {IMAGE_TOKEN}\n. Answer the question: "{{q}}"',
        learnt='To answer the question: "{q}", where is the region of interest in the image?',
    ),
}
FURTHER = "Now answer the following questions based on the raw image: "  # before the first appended question


@dataclass(frozen=True)
class ChainOfSpotOptions(MethodOptions):
    retired: ClassVar[Mapping[str, Any]] = {"least_side": 14, "region_tokens": 64}
    projector_depth: int = 2  # linear layers of the projector
    activation: Activation = "gelu"  # between them
    wording: Literal["paper", "released"] = "paper"  # of the two instructions
    box_format: str = "unit_xxyy"  # a name in foveate.picture.boxes.BOX_FORMATS
    parser: Literal["strict", "authors"] = "strict"  # what is read as a box
    crop: Literal["original", "padded"] = "original"  # whether the crop is cut from the padded square
    extend: float = 0.0  # fraction by which a region's sides grow before it is cut out
    suffix: str = ""  # text after the second instruction, as the authors add for MMBench and ScienceQA
    region_from: Literal["question", "questions", "image", "centre"] = "question"  # in training, table 3a
    others: Literal["drop", "append"] = "drop"  # in training, the picture's other questions

    def __post_init__(self) -> None:
        super().__post_init__()
        box_format(self.box_format)
        if self.extend < 0:
            raise FoveateError(f"extend must be at least 0, not {self.extend}")
        if self.parser == "authors" and (self.crop, self.box_format) != ("padded", "unit_xyxy"):
            raise FoveateError("parser: authors belongs to crop: padded and box_format: unit_xyxy")
        if self.parser == "authors" and self.extend:
            raise FoveateError("parser: authors takes boxes as they are: extend must be 0")
        if IMAGE_TOKEN in self.suffix:
            raise FoveateError(f"suffix: {IMAGE_TOKEN} stands for a picture: leave it out")


class ChainOfSpotConnector(Connector):
    def __init__(self, widths: Widths, depth: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.projector = mlp_projector(widths.vision, widths.text, depth, activation)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        return VisualTokens(flat(self.projector(features)))  # (V, N, C) -> (V N, D)


class ChainOfSpot(Method):
    title = "Chain-of-Spot"
    idea = "asks the model where to look, and shows it that part of the picture as a second view"
    paper = "arXiv 2403.12966"
    Options = ChainOfSpotOptions
    options: ChainOfSpotOptions

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        """Options with boxes of whole numbers, which are easier to learn."""
        return {"box_format": "internvl"}

    @property
    def learns_regions(self) -> bool:
        return self.options.region_from != "centre"

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        """One view of the picture, or of the crop, padded to a square."""
        if not self._within_budget(self.tower.tokens):
            raise self._refuse_budget(self.tower.tokens)
        picture = Size(height, width)
        view = View(0, whole(self.tower.side), "global")
        return ViewPlan(picture, (padded_square(picture, self.tower.image_size),), (view,), self.tower.tokens)

    def build_connector(self, widths: Widths) -> ChainOfSpotConnector:
        return ChainOfSpotConnector(widths, self.options.projector_depth, self.options.activation)

    # Asking: equations 2 and 3.

    def converse(self, picture: Image.Image, question: str) -> Generator[Turn, str, Reply]:
        options, wording, notes = self.options, WORDINGS[self.options.wording], []
        first = wording.where.format(q=question)
        said = yield Turn(first, [picture], inner=True, max_new_tokens=REGION_TOKENS)
        size = Size(picture.height, picture.width)
        box, problem = self.region(said, size)
        if box is None:
            notes.append(
                f"no region was found, the whole picture is looked at twice: {problem} in {_brief(said)}"
            )
            crop, region, area = picture, whole(size), whole(size)
        else:
            crop, region, area = self.crop(picture, box), self.shown(box, size), self.area(box, size)
            if region.width <= 0 or region.height <= 0:
                notes.append(f"the region lies in the padding: {_brief(said)}")
        answer = yield Turn(wording.answer.format(q=question) + options.suffix, [crop], areas=[area])
        return Reply(answer, [region] if region.width > 0 and region.height > 0 else [], notes)

    def turn_sizes(self, picture: Size) -> list[Size]:
        """The second size assumes a region of a quarter of the picture; any other costs the same."""
        return [picture, Size(max(picture.height // 2, 1), max(picture.width // 2, 1))]

    def region(self, text: str, picture: Size) -> ReadBox:
        """The box that the model wrote, in original pixels; it may cross the border if the crop may."""
        if self.options.parser == "authors":
            return authors_region(text, picture)
        return self._strict_region(text, picture)

    def _strict_region(self, text: str, picture: Size) -> ReadBox:
        if self.options.crop == "original":
            return read_box(text, box_format(self.options.box_format), Frame.padded(picture))
        square, offset = _square(picture)
        box, problem = read_box(text, box_format(self.options.box_format), Frame.whole(square))
        if box is None:
            return ReadBox(None, problem)
        box = _moved(self._fitted_in_square(box, square), offset.left, offset.top)
        if not _overlap(Box(*box.rounded()), picture):
            return ReadBox(None, "the box lies outside the picture")
        return ReadBox(box)

    def crop(self, picture: Image.Image, box: Box) -> Image.Image:
        """The region's pixels; `plan` resizes them like the first picture."""
        size = Size(picture.height, picture.width)
        if self.options.crop == "padded":
            return _cut_square(picture, box)
        return picture.crop(self._fitted(box, size).rounded())

    def shown(self, box: Box, picture: Size) -> Box:
        """The part of the picture that a crop shows."""
        return box.clipped(picture) if self.options.crop == "padded" else self._fitted(box, picture)

    def area(self, box: Box, picture: Size) -> Box:
        """What a crop is cut from, in original pixels: whole ones, padding included."""
        if self.options.crop == "original":
            return self._fitted(box, picture)
        left, top, right, bottom = _in_square(box, picture)
        _, offset = _square(picture)
        return _moved(Box(left, top, max(right, left + 1), max(bottom, top + 1)), offset.left, offset.top)

    def _fitted(self, box: Box, picture: Size) -> Box:
        return fitted(box, picture, extend=self.options.extend, minimum=LEAST_SIDE)

    def _fitted_in_square(self, box: Box, square: Size) -> Box:
        """As `_fitted`, in pixels of the padded square; a box that is large enough is not rounded."""
        if not self.options.extend and min(box.width, box.height) >= min(LEAST_SIDE, square.width):
            return box
        return fitted(box, square, extend=self.options.extend, minimum=LEAST_SIDE)

    # Training: section 3.3.

    def lessons(
        self,
        messages: Sequence[Mapping[str, Any]],
        size: Callable[[], Size],
        regions: Mapping[int | None, Box],
    ) -> list[list[dict[str, Any]]]:
        """Two turns for each question about the picture with a known region."""
        shown = [part for m in messages for part in m["content"] if part["type"] == "image"]
        if len(shown) != 1:
            return super().lessons(messages, size, regions)
        opening = [dict(m) for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        asked = [_words(m) for m in turns[::2]]
        answers = [(_words(m), bool(m.get("loss", True))) for m in turns[1::2]]
        pairs = [(question, *answer) for question, answer in zip(asked, answers, strict=False)]
        picture, made = size(), []
        for k, box in self.regions_for(len(pairs), picture, regions).items():
            if not pairs[k][2]:  # an answer that is not learnt is no lesson
                continue
            made.append(opening + self._lesson(shown[0]["image"], picture, box, pairs, k))
        return made

    def regions_for(self, questions: int, picture: Size, regions: Mapping[int | None, Box]) -> dict[int, Box]:
        """The region of each question that has one, as `region_from` selects it."""
        every = range(questions)
        source = self.options.region_from
        if source == "centre":
            dx, dy = picture.width * (1 - CENTRE) / 2, picture.height * (1 - CENTRE) / 2
            middle = Box(dx, dy, picture.width - dx, picture.height - dy)
            return {k: middle for k in every}
        found = {k: box for k, raw in regions.items() if (box := self._annotated(raw, picture)) is not None}
        if source == "image":
            return {k: found[None] for k in every} if None in found else {}
        mine = {k: found[k] for k in every if k in found}
        if source == "questions" and mine:
            boxes = list(mine.values())
            around = Box(
                min(box.left for box in boxes),
                min(box.top for box in boxes),
                max(box.right for box in boxes),
                max(box.bottom for box in boxes),
            )
            return {k: around for k in every}
        return mine

    def _annotated(self, box: Box, picture: Size) -> Box | None:
        """An annotated box as used in training; None if it shows nothing of the picture."""
        checked = checked_box([float(n) for n in box], picture).box
        if checked is None or self.options.crop == "original":
            return checked
        right, bottom = min(box.right, picture.width), min(box.bottom, picture.height)
        return Box(box.left, box.top, right, bottom)  # left and top may lie in the padding

    def _written(self, box: Box, picture: Size) -> str:
        """The text that teaches a region, widened if it could not be read back.

        Only a side that is too short is widened: inside the picture, or into the padding of a picture that is
        thinner than that.
        """
        square, offset = _square(picture)
        finest = math.ceil(2 * square.width / FINEST)  # pixels that give two numbers in any format
        wide = fitted(box, picture, minimum=finest)
        beyond = fitted(_moved(box, -offset.left, -offset.top), square, minimum=finest)
        for tried in (
            box,
            box._replace(left=wide.left, right=wide.right),
            box._replace(top=wide.top, bottom=wide.bottom),
            wide,
            _moved(beyond, offset.left, offset.top),
        ):
            text = write_box(tried, box_format(self.options.box_format), Frame.padded(picture))
            if self._strict_region(text, picture).box is not None:
                break
        return text

    def _lesson(
        self, path: Any, picture: Size, box: Box, pairs: Sequence[tuple[str, str, bool]], k: int
    ) -> list[dict[str, Any]]:
        """`pairs`: question, answer, and whether the answer is learnt."""
        wording, (question, answer, _) = WORDINGS[self.options.wording], pairs[k]
        where = self._written(box, picture)
        if self.options.crop == "padded":
            if self.options.extend:  # else any size, as the authors do, down to a line of padding
                square, offset = _square(picture)
                inside = _moved(box, -offset.left, -offset.top)
                box = _moved(fitted(inside, square, extend=self.options.extend), offset.left, offset.top)
            left, top, right, bottom = _in_square(box, picture)
            size = Size(max(bottom - top, 1), max(right - left, 1))
        else:
            part = self._fitted(box, picture)
            size = Size(int(part.height), int(part.width))
        cut = Cut(path, size, partial(self.crop, box=box))
        before, after = wording.answer.format(q=question).split(IMAGE_TOKEN)
        lesson = [
            _said("user", {"type": "image", "image": path}, wording.learnt.format(q=question)),
            _said("assistant", where),
            _said(
                "user",
                before,
                {"type": "image", "image": cut},
                after.removeprefix("\n") + self.options.suffix,
            ),
            _said("assistant", answer),
        ]
        if self.options.others == "append":
            for i, (asked, replied, learnt) in enumerate(pair for j, pair in enumerate(pairs) if j != k):
                said = _said("assistant", replied) | ({} if learnt else {"loss": False})
                lesson += [_said("user", asked if i else FURTHER + asked), said]
        return lesson


def authors_region(text: str, picture: Size) -> ReadBox:
    """The box as the authors' evaluation reads it, in original pixels; may reach beyond the padded square.

    A box that stops their program (without width and height) is not a box here.
    """
    side, offset = max(picture), padded_square(picture, max(picture)).source
    try:
        x0, y0, x1, y1 = (float(part) * side for part in text.strip()[1:-1].split(", ")[:4])
    except ValueError:
        return ReadBox(None, "the authors' parser finds no box")
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
        return ReadBox(None, "the authors' parser finds no box that can be cut out")
    if (round(x0), round(y0)) == (round(x1), round(y1)):
        return ReadBox(None, "the box has no area")
    x0, y0, x1, y1 = (min(max(n, -FARTHEST), FARTHEST) for n in (x0, y0, x1, y1))
    return ReadBox(_moved(Box(x0, y0, x1, y1), offset.left, offset.top))


def _cut_square(picture: Image.Image, box: Box) -> Image.Image:
    """A part of the picture padded to a square: `PADDING` around the picture, black beyond the square.

    Corners are rounded in the square's pixels, as PIL's `crop` does. Parts of more than `MOST_PIXELS` pixels
    or with sides longer than `LONGEST` are shrunk.
    """
    size = Size(picture.height, picture.width)
    square = padded_square(size, max(size)).source
    left, top, right, bottom = _in_square(box, size)
    across, down = max(right - left, 1), max(bottom - top, 1)
    scale = min(1.0, math.sqrt(MOST_PIXELS / (across * down)), LONGEST / max(across, down))
    across, down = max(round(across * scale), 1), max(round(down * scale), 1)
    if right == left or bottom == top:  # no width or no height: only padding is visible
        return Image.new("RGB", (across, down), PADDING)
    page = Image.new("RGB", (across, down))

    def place(low: float, high: float, start: int, length: int) -> tuple[int, int]:
        ends = (round((n - start) * scale) for n in (low, high))
        first, last = (min(max(n, 0), length) for n in ends)
        return first, last

    x, y = place(0, max(size), left, across), place(0, max(size), top, down)
    page.paste(PADDING, (x[0], y[0], x[1], y[1]))
    inside = _moved(box, 0, 0).clipped(size)
    if inside.width <= 0 or inside.height <= 0:
        return page
    first_x, first_y = int(left + square.left), int(top + square.top)  # the part's corner, original pixels
    part = Box(max(first_x, 0), max(first_y, 0), min(right + int(square.left), size.width), 0)
    part = part._replace(bottom=min(bottom + int(square.top), size.height))
    if part.width <= 0 or part.height <= 0:
        return page
    piece = picture.crop(part.rounded())
    if scale < 1:
        piece = piece.resize((max(round(piece.width * scale), 1), max(round(piece.height * scale), 1)))
    page.paste(piece, (round((part.left - first_x) * scale), round((part.top - first_y) * scale)))
    return page


def _square(picture: Size) -> tuple[Size, Box]:
    """The padded square: its size, and its place in the picture's pixels."""
    side = max(picture)
    return Size(side, side), padded_square(picture, side).source


def _in_square(box: Box, picture: Size) -> tuple[int, int, int, int]:
    """A box of original pixels in whole pixels of the padded square."""
    _, offset = _square(picture)
    return _moved(box, -offset.left, -offset.top).rounded()


def _moved(box: Box, dx: Any, dy: Any) -> Box:
    return Box(box.left + dx, box.top + dy, box.right + dx, box.bottom + dy)


def _overlap(box: Box, picture: Size) -> bool:
    part = box.clipped(picture)
    return part.width > 0 and part.height > 0


def _brief(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


def _words(message: Mapping[str, Any]) -> str:
    return " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text")


def _said(role: str, *parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": texts}


ChainOfSpot.layouts = (
    Layout(
        name="llava-hf/llava-1.5-*",
        family="hf",
        only_named=True,
        recognises=lambda config: config.get("model_type") == "llava" and "vision_config" in config,
        options=lambda config, preprocessor: hf_activation(config),
        keys=HF_PROJECTOR,
    ),
    Layout(
        name="Zuyan/llava-CoS-*",
        family="original",
        only_named=True,
        recognises=lambda config: known_projector(config) and config.get("image_aspect_ratio") == "pad",
        options=lambda config, preprocessor: {
            "projector_depth": connector_options(config)["projector_depth"],
            "wording": "released",
            "box_format": "unit_xyxy",
            "crop": "padded",
        },
        keys={
            r"^model\.mm_projector\.(\d)\.": r"connector.projector.\1.",
            r"^model\.mm_projector\.(weight|bias)$": r"connector.projector.0.\1",
        },
        template="vicuna_v1",
    ),
)
