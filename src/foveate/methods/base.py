"""What a method is: options, a plan from a picture's size, a connector, and how it converses.

Everything else (reading pictures, running towers, placing visual tokens in the LLM, generating, training,
loading checkpoints) is the same for all methods and lives outside this folder.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from foveate.errors import FoveateError, report_keys
from foveate.methods.layouts import Export, Layout
from foveate.options import Retiring, build_options
from foveate.picture.account import Account, Spread, placed
from foveate.picture.geometry import Box, Size, ViewPlan
from foveate.picture.source import Look

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


IMAGE_TOKEN = "<image>"  # stands for a picture in texts, and for one visual token in `input_ids`


@dataclass(frozen=True)
class MethodOptions(Retiring):
    """Options that every method has."""

    max_visual_tokens: int | None = None  # upper bound on `ViewPlan.tokens`, for comparisons at equal budget

    def __post_init__(self) -> None:
        if self.max_visual_tokens is not None and self.max_visual_tokens < 1:
            raise FoveateError(f"max_visual_tokens must be at least 1, not {self.max_visual_tokens}")


@dataclass(frozen=True)
class TowerGeometry:
    """Side of the tower's square input and of its patches, in pixels."""

    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size or self.patch_size < 1:
            raise FoveateError(
                f"a tower with image_size {self.image_size} and patch_size {self.patch_size} has no patches"
            )

    @property
    def side(self) -> Size:
        return Size(self.image_size, self.image_size)

    @property
    def grid(self) -> Size:
        """Rows and columns of patch tokens per view."""
        return Size(self.image_size // self.patch_size, self.image_size // self.patch_size)

    @property
    def tokens(self) -> int:
        return self.grid.height * self.grid.width

    @classmethod
    def of(cls, vision_config: PreTrainedConfig) -> TowerGeometry:
        """Reads it off a vision tower's configuration. Raises `FoveateError` if its input is not square."""
        sides = {}
        for name in ("image_size", "patch_size"):
            value = vision_config.to_dict().get(name)
            if isinstance(value, (list, tuple)):
                value = value[0] if len(set(value)) == 1 else None
            if not isinstance(value, int):
                raise FoveateError(f"vision tower {vision_config.model_type!r} has no square {name}")
            sides[name] = value
        return cls(**sides)


class Widths(NamedTuple):
    """Channels of the vision features and of the LLM, and how many decoder layers it has."""

    vision: int  # C
    text: int  # D
    layers: int = 0  # 0: unknown; only connectors with injectors ask


# What a connector reads as the question: the user's text in the message that shows the picture; all text of
# the sample except answers that are learnt; or all text of the sample.
QueryText: TypeAlias = Literal["question", "prompt", "sequence"]


class Query(NamedTuple):
    """The question about each picture, as `Method.query_text` says; several if a connector allows it."""

    embeds: Tensor  # (Q, T, D), rows of the LLM's input embedding
    mask: Tensor  # (Q, T), 1 for tokens, 0 for padding
    owners: tuple[int, ...] | None = None  # picture of each question; None: one question each, in order

    def owners_of(self, pictures: int) -> Sequence[int]:
        """The picture of each question."""
        return range(pictures) if self.owners is None else self.owners


@dataclass
class VisualTokens:
    """What a connector hands to the LLM, picture after picture.

    Attributes:
        tokens: (T, D); picture p has `plans[p].tokens` rows. With several questions about a picture, each
            question has them, and what is said of pictures below is said of questions.
        kept: (T,) bool, False for tokens that the LLM must not see; None keeps all.
        injection: whatever the method's injectors read in the LLM's layers.
        separators: (T,) bool, rows that the LLM's own embedding of the separator token replaces.
        accounts: per picture where the method looked; None if it sees all of its views.
    """

    tokens: Tensor
    kept: Tensor | None = None
    injection: Any = None
    separators: Tensor | None = None
    accounts: list[Account] | None = None


class Injector(nn.Module):
    """Changes the hidden states that leave one decoder layer during prefill."""

    def forward(self, hidden: Tensor, injection: Any, visual: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D). `visual` (B, T) marks the places of visual tokens.

        When a model is priced, `hidden` and `injection` have no values, only `visual` has.
        """
        raise NotImplementedError


class Connector(nn.Module):
    """Vision features -> visual tokens of the LLM. The trainable part of a method.

    Initialise parameters in the constructor, and keep tables in persistent buffers: a checkpoint is loaded
    into a model built without memory, and only the tensors in the checkpoint are filled.

    Attributes:
        shares_pictures: whether it takes several questions about one picture, `Query.owners`: then it returns
            tokens for each question, question after question. Otherwise pictures are repeated for it.
    """

    shares_pictures: ClassVar[bool] = False

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        """features (V, N, C): all views of the batch, picture after picture, in the order of their plans.

        Where the method `reads_source`, a fourth argument follows: `source`, a
        `foveate.picture.source.Source`.
        """
        raise NotImplementedError

    def injectors(self) -> Mapping[int, Injector]:
        """Decoder layer (0-based) -> module that changes its output. Empty for most methods."""
        return {}


class Rerun(NamedTuple):
    """One picture and the parts of a model, to run them on it once more."""

    tower: nn.Module
    connector: Connector
    plan: ViewPlan
    views: Callable[[], Tensor]  # makes (V, 3, h, w), normalised
    features: Callable[[], Tensor]  # makes (V, N, C), what the tower makes of the views


@dataclass
class Turn:
    """One message to the model: a text, and pictures at the placeholders in it.

    Attributes:
        text: what the user says. Without `<image>` in it, the pictures come first.
        pictures: what the user shows.
        inner: an intermediate step: its reply is not streamed.
        max_new_tokens: bound on the reply, instead of the caller's.
        areas: per picture the part of the conversation's picture that it shows, in original pixels; may reach
            beyond it. None: each shows all of it.
    """

    text: str
    pictures: list[Image.Image] = field(default_factory=list)
    inner: bool = False
    max_new_tokens: int | None = None
    areas: Sequence[Box] | None = None


@dataclass
class Reply:
    """The end of a conversation: the answer, and where the method looked, in original pixels."""

    text: str
    regions: list[Box] | None = None  # None: those of the views or of the connector
    notes: list[str] = field(default_factory=list)  # sentences about how it was found


@dataclass(frozen=True)
class Cut:
    """A part of a picture, cut out when needed.

    Attributes:
        picture: the picture it is cut from, as in messages.
        size: of the part, in pixels.
        make: picture -> part.
    """

    picture: Any
    size: Size
    make: Callable[[Image.Image], Image.Image]


class Method(ABC):
    """Base class of all methods; a subclass's file follows its paper."""

    title: ClassVar[str]
    idea: ClassVar[str]  # one line for the table of methods
    paper: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    layouts: ClassVar[tuple[Layout, ...]] = ()  # other people's checkpoints of this method
    uses_query: ClassVar[bool] = False  # whether the connector reads the question
    tiny: ClassVar[Mapping[str, Any]] = {}  # options for the parts of `foveate.tiny`

    def __init__(self, tower: TowerGeometry, options: Mapping[str, Any] | None = None) -> None:
        self.tower = tower
        self.options = build_options(self.Options, options or {}, where=f"options of method {self.title}")

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        """Options that read a square picture, `ratio` views wide, at its own resolution."""
        return {}

    @classmethod
    def options_with(cls, convnet: Path) -> dict[str, Any]:
        """Options that start a method's ConvNeXt from the one in a folder."""
        return {}

    @abstractmethod
    def plan(self, height: int, width: int) -> ViewPlan:
        """The plan for a picture of this size, in whole numbers, before any pixel is touched."""

    def build_tower(self, vision_config: PreTrainedConfig, layer: int) -> nn.Module:
        """The tower: views (V, 3, h, w) -> features (V, N, C)."""
        from foveate.towers.vit import VisionTower

        return VisionTower(vision_config, layer)

    @property
    def tower_weights(self) -> str | None:
        """Folder or hub id of further weights that `fill_tower` needs."""
        return None

    def fill_tower(
        self,
        tower: nn.Module,
        pretrained: PreTrainedModel | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Puts pretrained weights into a tower of `build_tower`; layers that never run are left out.

        Args:
            tower: the tower as built.
            pretrained: the given vision tower; None if only its configuration was given.
            weights: the tensors of `tower_weights`.

        Raises:
            FoveateError: weights that are missing.
        """
        if pretrained is None:
            return
        place = dict(tower.named_children()).get("model")
        if place is None:
            raise FoveateError("this method builds its own tower: give vision as a configuration")
        wanted, given = place.state_dict(), pretrained.state_dict()
        report_keys("the vision tower", wanted.keys() - given.keys())
        place.load_state_dict({key: given[key] for key in wanted})

    @abstractmethod
    def build_connector(self, widths: Widths) -> Connector:
        """A fresh connector."""

    def export(self) -> Export:
        """How transformers' own class for this method is written. Raises `FoveateError` if it has none."""
        raise FoveateError(f"transformers has no class of its own for {self.title}: only Foveate reads it")

    def account(self, run: Rerun) -> Account:
        """Further details about a picture that need another run of the tower or connector.

        Called only for drawings and explanations.
        """
        return Account()

    def converse(self, picture: Image.Image, question: str) -> Generator[Turn, str, Reply]:
        """The conversation about one picture: yields turns, receives the model's replies, returns the end.

        A method that asks twice (first where to look, then the question) overrides this; earlier turns stay
        in the context of later ones.
        """
        text = yield Turn(question, [picture])
        return Reply(text)

    def turn_sizes(self, picture: Size) -> list[Size]:
        """Per turn of `converse` the size of the picture that it shows, as far as known beforehand."""
        return [picture]

    @property
    def learns_regions(self) -> bool:
        """Whether training needs the regions of interest of a picture's questions."""
        return False

    def lessons(
        self,
        messages: Sequence[Mapping[str, Any]],
        size: Callable[[], Size],
        regions: Mapping[int | None, Box],
    ) -> list[list[dict[str, Any]]]:
        """The lessons of a conversation; training draws one at random at each visit.

        Args:
            messages: of a training sample, its pictures as paths.
            size: returns the size of its first picture.
            regions: region of each question by number, in original pixels as annotated; key None: for all.

        Returns:
            Conversations whose pictures may be `Cut`s; empty if the sample cannot be used.
        """
        return [[dict(message) for message in messages]]

    @property
    def query_text(self) -> QueryText:
        """The text that the connector reads if `uses_query`."""
        return "question"

    @property
    def reads_source(self) -> bool:
        """Whether the connector looks at parts of the original pictures, at their own resolution."""
        return False

    def looks(self, plan: ViewPlan) -> list[Look]:
        """All parts of a picture that the connector may look at, if they are few and known beforehand.

        Training on pictures of one size can then encode them once. Empty: they are not known.
        """
        return []

    @property
    def only_here(self) -> str | None:
        """Why a server that encodes each picture once, without its question, cannot run the method.

        None if it can. A method with options that change this says which.
        """
        if self.uses_query:
            return "as its connector reads the question"
        return "as its connector looks at the original picture" if self.reads_source else None

    def token_boxes(self, plan: ViewPlan) -> list[Box | None]:
        """Per visual token its part of the picture, in original pixels; None for tokens without one.

        By default one view's grid, or the grids of all views in order. Raises `FoveateError` if the tokens
        are neither.
        """
        per_view = plan.tokens if len(plan.views) == 1 else self.tower.tokens
        if plan.tokens == per_view * len(plan.views) and math.isqrt(per_view) ** 2 == per_view:
            grids = [(i, view.size) for i, view in enumerate(plan.views)]
            return [plan.to_picture(i, box) for i, size in grids for box in square_grid(size, per_view)]
        raise FoveateError(
            f"{self.title} does not say where its visual tokens look: choose another way to give the region"
        )

    def spread(self, run: Rerun, relevance: Tensor, account: Account) -> Spread:
        """Carries relevance of a picture's visual tokens to the picture.

        By default all of a token's relevance stays in its box of `token_boxes`, clipped to the picture. A
        tower's own attention between patches is not followed: a token stands for the patch it is made of.

        Args:
            run: the picture.
            relevance: (K, n) on the CPU, of its n visual tokens, K times.
            account: the connector's, of the answer that is explained.
        """
        size = run.plan.picture
        return placed([box and box.inside(size) for box in self.token_boxes(run.plan)], relevance)

    def describe_options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.options)

    def _within_budget(self, tokens: int) -> bool:
        budget = self.options.max_visual_tokens
        return budget is None or tokens <= budget

    def _refuse_budget(self, least: int) -> FoveateError:
        return FoveateError(
            f"{self.title} needs at least {least} visual tokens for this picture, "
            f"max_visual_tokens allows {self.options.max_visual_tokens}"
        )


def square_grid(size: Size, cells: int) -> list[Box]:
    """A view cut into `cells` equal boxes, with as many rows as columns, row by row."""
    side = math.isqrt(cells)
    return grid_boxes(size, Size(side, side))


def grid_boxes(size: Size, cells: Size) -> list[Box]:
    """A view cut into rows and columns of equal boxes, row by row."""
    return [
        Box(
            Fraction(c * size.width, cells.width),
            Fraction(r * size.height, cells.height),
            Fraction((c + 1) * size.width, cells.width),
            Fraction((r + 1) * size.height, cells.height),
        )
        for r in range(cells.height)
        for c in range(cells.width)
    ]


def flat(features: Tensor) -> Tensor:
    """(V, N, C) -> (V N, C)"""
    return torch.flatten(features, 0, 1)
