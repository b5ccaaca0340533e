"""How large the networks are and how long they are trained. A scale is data: a new one is one more entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate.errors import FoveateError

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig


CONVNET_STRIDE = 8  # pixels


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up over 5 % of the steps and a cosine to zero."""

    steps: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.lr <= 0:
            raise FoveateError(f"a schedule needs positive steps, batch and lr, not {self}")


@dataclass(frozen=True)
class Scale:
    """Sizes of the stand-ins for CLIP and for Vicuna, and their training data.

    Attributes:
        summary: one line for tables.
        view, patch: side of the tower's input and of its patches, pixels.
        magnify: factor on the levels' sizes of objects and glyphs.
        vision_width, vision_layers, vision_heads: of the tower.
        text_width, text_layers, text_heads: of the LLM.
        tower, convnet, reader: pre-training of tower, ConvNeXt and LLM; batches of crops and of texts.
        tower_scenes, tower_test_scenes: pictures that the tower's crops come from, in training and in
            measuring.
        levels: names of the levels that tower and LLM are pre-trained for.
        page_sizes: factors on the size of the glyphs on pages.
        uneven: largest aspect ratio of the windows that the tower sees in pre-training; above 1, some extend
            beyond the picture, as padded views do.
        cell: training of a method; batches of pictures with all their questions.
        warm_up: fraction of a cell's steps in which only new modules train, with captions.
        cell_llm_lr: learning rate of the LLM's weights in a cell.
        scenes, test_scenes: pictures of a level for training and for measuring.
        parts: name of the scale whose prepared networks it takes; None: its own.
    """

    summary: str
    view: int
    patch: int
    magnify: float
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    tower: Schedule
    convnet: Schedule
    reader: Schedule
    tower_scenes: int
    cell: Schedule
    cell_llm_lr: float
    scenes: int
    test_scenes: int
    levels: tuple[str, ...] = ("easy", "near", "words", "dense")
    page_sizes: tuple[float, ...] = (1.0,)
    uneven: float = 1.0
    warm_up: float = 0.25
    tower_test_scenes: int = 800
    parts: str | None = None

    def __post_init__(self) -> None:
        if self.view % self.patch:
            raise FoveateError(f"a view of {self.view} pixels cannot be divided into patches of {self.patch}")
        if min(self.tower_scenes, self.tower_test_scenes, self.scenes, self.test_scenes) < 1:
            raise FoveateError("a scale needs at least one scene of each kind")

    def vision_config(self) -> CLIPVisionConfig:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=2 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.view,
            patch_size=self.patch,
        )

    def convnet_config(self) -> ConvNextConfig:
        """A ConvNeXt as wide as the tower, `CONVNET_STRIDE` pixels to a feature."""
        from transformers import ConvNextConfig

        widths = [self.vision_width // 4, self.vision_width // 2, self.vision_width]
        return ConvNextConfig(
            patch_size=CONVNET_STRIDE >> (len(widths) - 1),
            num_stages=len(widths),
            hidden_sizes=widths,
            depths=[1, 2, 2],
            layer_scale_init_value=0.1,
        )

    def grid(self, convolutional: bool = False) -> int:
        """Rows of features per view, of the tower or of the ConvNeXt."""
        return self.view // (CONVNET_STRIDE if convolutional else self.patch)

    def text_config(self, vocabulary: int) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.text_width,
            intermediate_size=3 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )


SCALES: dict[str, Scale] = {
    "tiny": Scale(
        summary="views of 48 pixels and 36 tokens, networks of half a million parameters",
        view=48,
        patch=8,
        magnify=1.0,
        vision_width=96,
        vision_layers=4,
        vision_heads=3,
        text_width=96,
        text_layers=3,
        text_heads=3,
        tower=Schedule(steps=6000, batch=64, lr=2e-3),
        convnet=Schedule(steps=2500, batch=64, lr=3e-3),
        reader=Schedule(steps=2600, batch=32, lr=2e-3),
        tower_scenes=8000,
        cell=Schedule(steps=500, batch=32, lr=2e-3),
        cell_llm_lr=1e-3,
        scenes=8000,
        test_scenes=1000,
    ),
    "small": Scale(
        summary="views of 112 pixels and 49 tokens, networks of two million parameters: the embedded model's",
        view=112,
        patch=16,
        magnify=7 / 3,
        vision_width=128,
        vision_layers=4,
        vision_heads=4,
        text_width=128,
        text_layers=4,
        text_heads=4,
        tower=Schedule(steps=20000, batch=32, lr=1.5e-3),
        convnet=Schedule(steps=5000, batch=32, lr=2e-3),
        reader=Schedule(steps=2600, batch=32, lr=1.5e-3),
        tower_scenes=4000,
        cell=Schedule(steps=1700, batch=16, lr=1.5e-3),
        cell_llm_lr=7e-4,
        scenes=8000,
        test_scenes=1000,
        levels=("signs", "words"),
        page_sizes=(0.7, 1.0, 1.5, 2.0, 3.0),
        uneven=1.6,
    ),
    "base": Scale(
        summary="views of 224 pixels and 256 tokens, networks of 80 million parameters, for one GPU",
        view=224,
        patch=14,
        magnify=14 / 3,
        vision_width=512,
        vision_layers=12,
        vision_heads=8,
        text_width=512,
        text_layers=8,
        text_heads=8,
        tower=Schedule(steps=60000, batch=256, lr=5e-4),
        convnet=Schedule(steps=20000, batch=256, lr=5e-4),
        reader=Schedule(steps=10000, batch=128, lr=5e-4),
        tower_scenes=20000,
        cell=Schedule(steps=4000, batch=64, lr=5e-4),
        cell_llm_lr=1e-4,
        scenes=50000,
        test_scenes=2000,
        uneven=1.6,
    ),
}


SCALES["nano"] = replace(
    SCALES["tiny"],
    summary="the networks of tiny, so few pictures and steps that nothing is learnt: whether a row runs",
    cell=Schedule(steps=16, batch=8, lr=2e-3),
    scenes=64,
    test_scenes=16,
    parts="tiny",
)


def scale_named(name: str) -> Scale:
    """Raises `FoveateError` for unknown names."""
    if name not in SCALES:
        raise FoveateError(f"unknown scale {name!r}: choose one of {', '.join(SCALES)}")
    return SCALES[name]
