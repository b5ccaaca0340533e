"""An answer: the model's text, where it looked, what it cost, and a drawing of all this."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from foveate.picture.account import Account, Chain
from foveate.picture.drawing import Shown, draw, shown_views
from foveate.picture.geometry import Box, ViewPlan
from foveate.picture.reading import png, write_drawing

if TYPE_CHECKING:
    from foveate.ask.engine import Engine


@dataclass
class Ledger:
    """What one answer cost.

    Attributes:
        views: pictures shown to the vision tower, including those from the cache.
        encoded_views: views encoded now.
        visual_tokens: visual tokens that the LLM read, after a method dropped some.
        prompt_tokens: all tokens that the LLM read, visual ones included.
        kept_tokens: prompt tokens that it had read in an earlier turn and found in its cache.
        new_tokens: generated.
        tflop: vision, prefill and decoding, in 10^12 floating point operations.
        kv_megabytes: key and value cache after the longest prefill.
        seconds: wall time by phase: `prepare` (pictures to tensors), `encode`, `generate`.
    """

    views: int = 0
    encoded_views: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0
    tflop: float = 0.0
    kv_megabytes: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prepare": 0.0, "encode": 0.0, "generate": 0.0}
    )

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def add(self, turn: Ledger) -> None:
        """Adds the costs of a further turn."""
        self.views += turn.views
        self.encoded_views += turn.encoded_views
        self.visual_tokens += turn.visual_tokens
        self.prompt_tokens += turn.prompt_tokens
        self.kept_tokens += turn.kept_tokens
        self.new_tokens += turn.new_tokens
        self.tflop += turn.tflop
        self.kv_megabytes = max(self.kv_megabytes, turn.kv_megabytes)
        for phase, seconds in turn.seconds.items():
            self.seconds[phase] += seconds


@dataclass
class Answer:
    """The model's text, where it looked, and what it cost.

    Attributes:
        text: the answer.
        ledger: the costs.
        question: what was asked.
        account: where the method looked.
        picture: what it was asked about.
        plan: the views that the picture was cut into.
        crops: pictures that a method with several turns showed the model after the first one.
        tokens: ids of the answer's tokens, including the one that ends it.
    """

    text: str
    ledger: Ledger
    question: str
    account: Account = field(repr=False)
    picture: Image.Image = field(repr=False)
    plan: ViewPlan = field(repr=False)
    crops: list[Image.Image] = field(repr=False)
    tokens: list[int] = field(repr=False)
    _engine: Engine = field(repr=False)

    @property
    def regions(self) -> list[Box]:
        """Parts of the picture that were looked at, in original pixels."""
        return list(self.plan.regions) if self.account.regions is None else self.account.regions

    @property
    def heat(self) -> list[tuple[Box, float]]:
        """Parts of the picture, in original pixels, with a weight from 0 (dropped) to 1, for methods that
        keep what matters to the question; else empty."""
        return self.account.heat()

    @property
    def chains(self) -> list[Chain]:
        """Parts of the picture looked at one after the other, for methods that do so; else empty."""
        return self.account.chains

    @property
    def notes(self) -> list[str]:
        """Sentences about how the method came to the answer, for example why it found no region."""
        return self.account.notes

    def show(self, out: str | Path | None = None) -> Image.Image:
        """A picture of what the model saw: regions and views. Also written to the file `out` if given."""
        drawing = _drawn(self)
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
            "regions": [list(box.rounded()) for box in self.regions],
            "notes": self.notes,
            "ledger": asdict(self.ledger),
        }


def _drawn(answer: Answer) -> Image.Image:
    engine = answer._engine
    processor, plan, ledger = engine.processor.image_processor, answer.plan, answer.ledger
    canvases = [processor.paint(answer.picture, canvas) for canvas in plan.canvases]
    costs = (
        f"{plan.picture.width} x {plan.picture.height} pixels, "
        f"seen at {plan.effective.width} x {plan.effective.height}   |   "
        f"{ledger.views} view{'' if ledger.views == 1 else 's'}, {ledger.visual_tokens} visual tokens, "
        f"{ledger.tflop:.3g} TFLOP, "
        f"{ledger.total_seconds:.2f} s"
    )
    caption = [(f"Q  {answer.question}", False), (f"A  {answer.text or '(no text)'}", True), (costs, False)]
    account = engine.account(answer.picture).joined(answer.account)
    caption += [(note, False) for note in account.notes]
    own_views = [Shown(role, processor.shown(pixels)) for role, pixels in account.views]
    regions = answer.regions
    if answer.crops:  # their numbers follow those of the whole picture's views
        regions = [*plan.regions, *(region for region in regions if region not in plan.regions)]
    for crop in answer.crops:
        of_crop = engine.plan(crop)
        painted = [processor.paint(crop, canvas) for canvas in of_crop.canvases]
        own_views += shown_views(of_crop, painted, role="crop")
    chains = [
        (chain.name, chain.boxes, [processor.shown(view) for view in chain.pixels()])
        for chain in account.chains
    ]
    return draw(answer.picture, regions, plan, canvases, caption, account.heat(), own_views, chains)
