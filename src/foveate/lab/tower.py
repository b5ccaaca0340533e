"""Pre-training of the tower, the stand-in for CLIP: a `CLIPVisionModel` that says what lies on every patch.
The stand-in for CLIP-ConvNeXt, a `ConvNextModel` for methods that have one, learns the same.

It learns to read on pages (see `pages`). Then it sees windows of the pictures at every zoom from their own
resolution to the base view, and learns for each patch the shape and colour of the object there and the
nearest glyph on it, with its place in its word. The glyph is a label of every patch of the object if the
window shows it, its place if the window shows the start of the word. The object's place in the picture is a
label if the window shows the whole picture. Otherwise the label is that it is unknown. Glyphs are legible at
their own size, and too small in the base view: that is what the methods are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, ConvNextModel, PreTrainedModel

from foveate.lab.data import CPU
from foveate.lab.levels import LEVELS
from foveate.lab.materials import DIGITS, LETTERS, Split, materials
from foveate.lab.objects import COLOURS, SHAPES
from foveate.lab.optimise import optimiser, warm_cosine
from foveate.lab.pages import make_page, page_labels
from foveate.lab.scales import Scale
from foveate.lab.scenes import CELLS, Scene, make_scene
from foveate.lab.words import PLACES
from foveate.model.processing import CLIP_MEAN, CLIP_STD

UNKNOWN = -100  # label without loss
NOTHING = 0  # class of patches without an object, without a glyph, of an unknown cell, outside words
GLYPHS = LETTERS.lower() + DIGITS
CLASSES = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "glyph": 1 + len(GLYPHS),
    "cell": 1 + len(CELLS),
    "place": 1 + len(PLACES),
}
NOTHING_WEIGHT = 0.06  # in the loss; most patches show background
UNKNOWN_WEIGHT = {"cell": 0.3, "place": 0.2}  # in the loss, for an unknown cell or place
VISIBLE = 0.6  # least fraction of a glyph's area inside the window to be read

# Zooms of windows, as original pixels per pixel of the view, and their probabilities; 0: everything.
ZOOMS = (1.0, 1.5, 2.0, 0.0)
CHANCES = (0.55, 0.15, 0.10, 0.20)
UNEVEN, OUTSIDE = 0.5, 0.4  # probabilities of an uneven window, and of one beyond the scene's border
STRIDED = 0.3  # fraction of views of everything with every n-th pixel instead of a smooth reduction
MEASURED = ("shape", "colour", "letter", "digit", "cell", "place")

READING = 0.33  # fraction of the steps with pages alone
ALIGNED, ASTRAY = (
    0.02,
    0.18,
)  # fractions of the steps at which glyphs start to leave patches' centres, and lie anywhere
PAGES = 0.2  # fraction of pages in a batch after that


class Window(NamedTuple):
    """A part of a scene, in its pixels; black beyond the scene."""

    left: int
    top: int
    width: int
    height: int


def whole_of(scene: Scene) -> Window:
    height, width = scene.picture.shape[:2]
    return Window(0, 0, width, height)


def random_window(rng: np.random.Generator, whole: int, side: int, uneven: float = 1.0) -> Window:
    """A window of about `side` x `side` pixels in a scene of `whole` x `whole`.

    With `uneven` above 1 it may be wider or higher by up to that factor, and may extend beyond the scene.
    """
    if uneven == 1.0:
        left, top = rng.integers(whole - side + 1, size=2)
        return Window(int(left), int(top), side, side)
    stretch = uneven ** (rng.uniform(-0.5, 0.5) if rng.random() < UNEVEN else 0.0)
    width, height = min(round(side * stretch), whole), min(round(side / stretch), whole)
    out = rng.uniform(0, 0.5, 2) * (rng.random(2) < OUTSIDE)
    left = rng.integers(-round(out[0] * width), whole - width + round(out[0] * width) + 1)
    top = rng.integers(-round(out[1] * height), whole - height + round(out[1] * height) + 1)
    return Window(int(left), int(top), width, height)


def crop(scene: Scene, window: Window, view: int, stride: bool = False) -> np.ndarray:
    """The window as the tower sees it, (view, view, 3) bytes."""
    left, top, width, height = window
    if stride:
        return scene.picture[top : top + height : height // view, left : left + width : width // view]
    part = Image.fromarray(scene.picture).crop((left, top, left + width, top + height))
    return np.asarray(part.resize((view, view), Image.Resampling.BICUBIC))


def patch_labels(scene: Scene, window: Window, grid: int) -> np.ndarray:
    """The labels of every patch of the window: (labels, grid * grid) classes in the order of `CLASSES`."""
    middles = (np.arange(grid) + 0.5) / grid
    x = np.tile(window.left + middles * window.width, grid)  # (N,) in pixels of the picture
    y = np.repeat(window.top + middles * window.height, grid)
    labels = np.zeros((len(CLASSES), grid * grid), dtype=np.int64)
    labels[3] = UNKNOWN
    everything = window == whole_of(scene)
    for thing in scene.things:
        x0, y0, x1, y1 = (float(n) for n in thing.box)
        here = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        if not here.any():
            continue
        labels[0, here] = 1 + SHAPES.index(thing.shape)
        labels[1, here] = 1 + list(COLOURS).index(thing.colour)
        labels[3, here] = 1 + CELLS.index(scene.cell(thing)) if everything else NOTHING
        shown = [i for i, glyph in enumerate(thing.glyphs) if _visible(glyph.box, window) >= VISIBLE]
        if shown:
            boxes = [thing.glyphs[i].box for i in shown]
            centres = np.array([[(b.left + b.right) / 2, (b.top + b.bottom) / 2] for b in boxes])
            apart = np.hypot(x[here, None] - centres[:, 0], y[here, None] - centres[:, 1])  # (n, glyphs)
            nearest = np.array(shown)[apart.argmin(1)]  # nearest glyph of the object
            classes = np.array([1 + GLYPHS.index(glyph.character) for glyph in thing.glyphs])
            labels[2, here] = classes[nearest]
            if thing.word is not None and shown[0] == 0:  # the window shows the start of the word
                labels[4, here] = 1 + nearest
    return labels


def _visible(box: tuple, window: Window) -> float:
    left, top, right, bottom = (float(n) for n in box)
    width = min(right, window.left + window.width) - max(left, window.left)
    height = min(bottom, window.top + window.height) - max(top, window.top)
    return max(width, 0) * max(height, 0) / ((right - left) * (bottom - top))


def normalised(pictures: np.ndarray) -> Tensor:
    """(V, h, w, 3) bytes -> (V, 3, h, w), like the image processor."""
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


class PatchHead(nn.Module):
    """Predicts the labels from every patch token; discarded after pre-training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, sum(CLASSES.values()))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(V, N, C) -> per label (V, N, classes)."""
        return self.classify(self.norm(tokens)).split(list(CLASSES.values()), dim=-1)


class CropSampler:
    """Endless batches of pages and of windows of scenes, with the labels of `grid` x `grid` patches."""

    def __init__(self, scenes: list[Scene], scale: Scale, grid: int, seed: int) -> None:
        self.scenes, self.scale, self.grid = scenes, scale, grid
        self.rng = np.random.default_rng([seed, len(scenes)])
        self.stock = materials("tower")

    def batch(self, size: int, progress: float) -> tuple[Tensor, Tensor]:
        """Pixels (size, 3, view, view) and labels (size, labels, N), `UNKNOWN` if there is none.

        `progress` is the completed fraction of the pre-training.
        """
        pages = size if progress < READING else round(PAGES * size)
        drawn = [self._page(progress) if i < pages else self._window() for i in range(size)]
        pictures, labels = zip(*drawn, strict=True)
        return normalised(np.stack(pictures)), torch.from_numpy(np.stack(labels))

    def _page(self, progress: float) -> tuple[np.ndarray, np.ndarray]:
        grown = min(max((progress - ALIGNED) / (ASTRAY - ALIGNED), 0.0), 1.0)
        reach = round(grown * self.scale.patch / 2)
        magnify = self.scale.magnify * (1.0 if grown < 1 else self.rng.choice(self.scale.page_sizes))
        page = make_page(self.rng, self.stock, self.scale.view, self.scale.patch, magnify, reach)
        labels = page_labels(page, self.grid, GLYPHS)
        unknown = np.full_like(labels[:1], UNKNOWN)
        return page.picture, np.concatenate([unknown, labels, unknown, unknown])

    def _window(self) -> tuple[np.ndarray, np.ndarray]:
        scene, view = self.scenes[self.rng.integers(len(self.scenes))], self.scale.view
        side, whole = round(ZOOMS[self.rng.choice(len(ZOOMS), p=CHANCES)] * view), len(scene.picture)
        everything = side == 0 or side >= whole
        window = whole_of(scene) if everything else random_window(self.rng, whole, side, self.scale.uneven)
        stride = everything and self.rng.random() < STRIDED
        return crop(scene, window, view, stride), patch_labels(scene, window, self.grid)


def patch_loss(predicted: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross entropy, summed over the labels (V, labels, N)."""
    loss = torch.zeros((), device=labels.device)
    for i, (name, logits) in enumerate(zip(CLASSES, predicted, strict=True)):
        if (labels[:, i] == UNKNOWN).all():
            continue
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[NOTHING] = UNKNOWN_WEIGHT.get(name, NOTHING_WEIGHT)
        loss = loss + F.cross_entropy(
            logits.flatten(0, 1), labels[:, i].flatten(), weight, ignore_index=UNKNOWN
        )
    return loss


def tower_scenes(scale: Scale, split: Split, count: int, seed: int = 0) -> list[Scene]:
    """Scenes of the scale's levels in turn."""
    levels = [LEVELS[name] for name in scale.levels]
    return [
        make_scene(levels[i % len(levels)], scale.view, scale.magnify, split, seed, i) for i in range(count)
    ]


def patch_tokens(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """(V, 3, h, w) -> (V, N, C): a ViT's tokens without the class token, or a ConvNet's map in rows."""
    hidden = model(pixels).last_hidden_state
    return hidden[:, 1:] if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)


def train_tower(
    scale: Scale,
    convolutional: bool = False,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
    device: torch.device = CPU,
) -> tuple[PreTrainedModel, PatchHead]:
    """Pre-trains a ViT, or a ConvNeXt; `report` gets step and loss after each step."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if convolutional:
        schedule, model = scale.convnet, ConvNextModel(scale.convnet_config())
    else:
        schedule, model = scale.tower, CLIPVisionModel(scale.vision_config())
    model.to(device)
    head = PatchHead(scale.vision_width).to(device)
    sampler = CropSampler(
        tower_scenes(scale, "tower", scale.tower_scenes), scale, scale.grid(convolutional), seed
    )
    optimise = optimiser([(model, schedule.lr), (head, schedule.lr)])
    rates = warm_cosine(optimise, schedule.steps)
    for step in range(1, schedule.steps + 1):
        pixels, labels = sampler.batch(schedule.batch, (step - 1) / schedule.steps)
        loss = patch_loss(head(patch_tokens(model, pixels.to(device))), labels.to(device))
        optimise.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        optimise.step()
        rates.step()
        report(step, loss.item())
    return model.eval(), head.eval()


@torch.no_grad()
def legibility(
    model: PreTrainedModel, head: PatchHead, scale: Scale, scenes: list[Scene], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Accuracy of the labels in `MEASURED` over patches with something on them, per zoom."""
    grid = scale.grid(convolutional=isinstance(model, ConvNextModel))
    rng = np.random.default_rng(seed)
    table = {}
    for zoom in (1.0, 1.5, 2.0, 3.0, 4.0):
        side = round(zoom * scale.view)
        fitting = [scene for scene in scenes if len(scene.picture) >= side]
        right: dict[str, list[np.ndarray]] = {name: [] for name in MEASURED}
        for batch in _chunks(fitting, 128):
            windows = [random_window(rng, len(scene.picture), side) for scene in batch]
            pictures = [crop(s, w, scale.view) for s, w in zip(batch, windows, strict=True)]
            labels = np.stack([patch_labels(s, w, grid) for s, w in zip(batch, windows, strict=True)])
            pixels = normalised(np.stack(pictures)).to(model.device)
            guesses = head(patch_tokens(model, pixels))
            # "nothing" is left out: these patches show something
            best = [(g[..., 1:].argmax(-1) + 1).cpu().numpy() for g in guesses]
            kinds = list(labels.swapaxes(0, 1))
            is_letter = (kinds[2] > 0) & (kinds[2] <= len(LETTERS))
            is_digit = kinds[2] > len(LETTERS)
            for name, i, where in (
                ("shape", 0, kinds[0] > 0),
                ("colour", 1, kinds[1] > 0),
                ("letter", 2, is_letter),
                ("digit", 2, is_digit),
                ("cell", 3, kinds[3] > 0),
                ("place", 4, kinds[4] > 0),
            ):
                right[name].append((best[i] == kinds[i])[where])
        table[f"{zoom:g}"] = {
            name: float(np.concatenate(hits).mean()) for name, hits in right.items() if sum(map(len, hits))
        }
    return table


def _chunks(items: list[Scene], size: int) -> Iterator[list[Scene]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
