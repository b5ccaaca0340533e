"""A level's pictures and questions on disk, made once from a seed and shared by every method."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from foveate.errors import FoveateError
from foveate.files import LOCK, UNFINISHED, explained, read_json, write
from foveate.lab.levels import Level
from foveate.lab.materials import SPLITS, Split
from foveate.lab.questions import Question, ask_about, caption
from foveate.lab.scenes import make_scene
from foveate.picture.geometry import Box, Canvas, Size, View, ViewPlan, whole
from foveate.picture.source import Look, views_of

GENERATION = 3  # part of the names of data: raised whenever the same seed draws other pictures or questions
SPARE = 200 * 2**20  # bytes left free on the disk
CPU = torch.device("cpu")
T = TypeVar("T")
Tell = Callable[[str, int, int], None]  # what, done, in all


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


Encode = Callable[[Tensor], Tensor]  # normalised views (V, 3, h, w) -> features (V, N, C)


@dataclass(frozen=True)
class Examples:
    """Pictures (n, H, W, 3) bytes, and per picture its questions and its captions."""

    key: str
    pictures: np.ndarray
    questions: list[list[Question]]
    captions: list[list[Question]]

    @property
    def size(self) -> Size:
        return Size(*self.pictures.shape[1:3])

    @cached_property
    def asked(self) -> list[Question]:
        """The questions of all pictures, in order."""
        return [question for row in self.questions for question in row]


def examples(
    folder: Path,
    level: Level,
    view: int,
    magnify: float,
    split: Split,
    count: int,
    seed: int = 0,
    tell: Tell = silent,
) -> Examples:
    """Reads a set of pictures with questions, or makes and stores it, and tells how far it is.

    Raises:
        FoveateError: the disk is full.
    """
    key = examples_key(level, view, magnify, split, count, seed)
    kept = folder / "data" / key
    if not (kept / "texts.json").is_file():
        with explained(kept):
            kept.mkdir(parents=True, exist_ok=True)
            with FileLock(kept / LOCK):  # another run may be making them: they are waited for
                if not (kept / "texts.json").is_file():
                    _make_examples(kept, level, view, magnify, split, count, seed, tell)
    anew = f"delete the folder {kept}, and its scenes are drawn anew"
    texts = read_json(kept / "texts.json", anew)
    questions, captions = (
        [[_question(values) for values in row] for row in texts[name]] for name in ("questions", "captions")
    )
    try:
        pictures = np.load(kept / "pictures.npy", mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise FoveateError(f"{kept / 'pictures.npy'} is broken: {anew}") from error
    return Examples(key, pictures, questions, captions)


def examples_key(level: Level, view: int, magnify: float, split: Split, count: int, seed: int = 0) -> str:
    """The name of a set of pictures."""
    described = repr((GENERATION, asdict(replace(level, questions={})), dict(level.questions), view, magnify))  # type: ignore[arg-type]
    return _digest(described, split, str(seed), str(count))


def _make_examples(
    kept: Path, level: Level, view: int, magnify: float, split: Split, count: int, seed: int, tell: Tell
) -> None:
    side = view * level.ratio
    pictures = _new_array(kept / "pictures.npy", (count, side, side, 3), np.uint8)
    texts: dict[str, list[list[dict[str, Any]]]] = {"questions": [], "captions": []}
    for i in range(count):
        scene = make_scene(level, view, magnify, split, seed, i)
        pictures[i] = scene.picture
        rng = np.random.default_rng([seed, SPLITS.index(split), i, 1])
        texts["questions"].append([asdict(question) for question in ask_about(scene, level.questions, rng)])
        texts["captions"].append([asdict(said) for said in caption(scene, rng)])
        tell(f"drawing pictures to {split}", i + 1, count)
    write(kept / "texts.json", json.dumps(texts))


def _question(values: dict[str, Any]) -> Question:
    region = None if values["region"] is None else Box(*values["region"])
    return Question(**{**values, "region": region, "candidates": tuple(values["candidates"])})


class Features:
    """Features of a frozen tower for every view of every picture, bfloat16, one file per view.

    Methods whose plans share a view share its file. If the disk has no room for another file, its views are
    kept in memory or, beyond `memory` bytes, encoded at every use.

    Args:
        folder: where the files are kept.
        data: the pictures.
        tower: names the tower's weights; part of every file's name.
        encode: the tower.
        prepare: picture and plan -> normalised views (V, 3, h, w); the image processor's `views`.
        norms: (2, 3) mean and standard deviation, for parts of pictures.
        memory: bytes that may be kept in memory.
        tell: is told how far it is.
        device: where parts of pictures are cut out. Features are kept in main memory.
    """

    def __init__(
        self,
        folder: Path,
        data: Examples,
        tower: str,
        encode: Encode,
        prepare: Callable[[np.ndarray, ViewPlan], np.ndarray],
        norms: np.ndarray,
        memory: int = 4 * 2**30,
        tell: Tell = silent,
        device: torch.device = CPU,
    ) -> None:
        self.folder, self.data, self.tower = folder / "features" / f"{data.key}-{tower}", data, tower
        self.encode, self.prepare, self.memory, self.tell = encode, prepare, memory, tell
        self.device, self.norms = device, torch.from_numpy(np.asarray(norms)).to(device)
        self.kept: dict[str, Tensor] = {}
        self.fallback: str | None = None  # says why features are not on disk

    def ready(self, plan: ViewPlan, looks: Sequence[Look] = ()) -> None:
        """Encodes what is missing of all pictures, or waits for another run that does.

        Args:
            plan: its views.
            looks: parts of the pictures, at the size of its views.
        """
        views = {view_key(plan, view): view for view in plan.views}
        parts = {look_key(plan, look): look for look in looks}
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK):
                self._fill(
                    views, plan, lambda shown, some: self._encode(replace(plan, views=tuple(shown)), some)
                )
                self._fill(parts, plan, lambda shown, some: self._look(plan, shown, some))

    def _fill(
        self,
        wanted: Mapping[str, T],
        plan: ViewPlan,
        encode: Callable[[Sequence[T], range], Tensor],
    ) -> None:
        """Encodes those of `wanted` that are missing: `encode` makes (n, V, N, C) of V of them."""
        missing = {
            key: shown for key, shown in wanted.items() if key not in self.kept and not self._open(key)
        }
        if not missing:
            return
        new = self._room(list(missing), self._shape(plan))
        if new is None:
            return
        for start in range(0, len(self.data.pictures), 64):
            some = range(start, min(start + 64, len(self.data.pictures)))
            features = encode(list(missing.values()), some)  # (n, V, N, C)
            for i, tensor in enumerate(new.values()):
                tensor[some.start : some.stop] = features[:, i]
            self.tell(f"encoding {len(missing)} views", some.stop, len(self.data.pictures))
        for key, tensor in new.items():
            self.kept[key] = tensor
            if (unfinished := self._unfinished(key)).is_file():
                unfinished.rename(self.folder / f"{key}.npy")

    def sizes(self, plan: ViewPlan, looks: Sequence[Look] = ()) -> dict[str, int]:
        """The files that `ready` makes, and their bytes for each picture."""
        keys = [view_key(plan, view) for view in plan.views] + [look_key(plan, look) for look in looks]
        return dict.fromkeys(keys, 2 * int(np.prod(self._shape(plan)[1:])))

    def gather(self, plan: ViewPlan, indices: Iterable[int]) -> Tensor:
        """(n V, N, C) float32: the plan's views of these pictures, picture after picture."""
        indices = list(indices)
        keys = [view_key(plan, view) for view in plan.views]
        if all(key in self.kept for key in keys):
            features = torch.stack([self.kept[key][indices] for key in keys], dim=1)
        else:
            features = self._encode(plan, indices)
        return features.flatten(0, 1).float()

    def _look(self, plan: ViewPlan, looks: Sequence[Look], some: range) -> Tensor:
        """(n, V, N, C) bfloat16"""
        pictures = torch.from_numpy(np.array(self.data.pictures[some.start : some.stop])).to(self.device)
        found = []
        for look in looks:
            views = views_of(pictures, self.norms, look, plan.views[0].size)
            found.append(self.encode(views).to("cpu", torch.bfloat16))
        return torch.stack(found, 1)

    def gather_looks(self, plan: ViewPlan, wanted: Sequence[tuple[int, Look]]) -> Tensor | None:
        """(n, N, C) float32: parts of pictures; None if they are not kept."""
        places: dict[str, list[int]] = {}
        for place, (_, look) in enumerate(wanted):
            places.setdefault(look_key(plan, look), []).append(place)
        if not all(key in self.kept for key in places):
            return None
        found = torch.empty(len(wanted), *self.kept[next(iter(places))].shape[1:])
        for key, mine in places.items():
            found[mine] = self.kept[key][[wanted[place][0] for place in mine]].float()
        return found

    def _encode(self, plan: ViewPlan, indices: Iterable[int]) -> Tensor:
        """(n, V, N, C) bfloat16"""
        views = [self.prepare(self.data.pictures[i], plan) for i in indices]
        features = self.encode(torch.from_numpy(np.concatenate(views))).to("cpu", torch.bfloat16)
        return features.unflatten(0, (len(views), len(plan.views)))

    def _shape(self, plan: ViewPlan) -> tuple[int, ...]:
        blank = torch.zeros(1, 3, *plan.views[0].size)
        return (len(self.data.pictures), *self.encode(blank).shape[1:])

    def _unfinished(self, key: str) -> Path:
        return self.folder / f"{key}{UNFINISHED}"

    def _open(self, key: str) -> bool:
        path = self.folder / f"{key}.npy"
        if not path.is_file():
            return False
        try:
            self.kept[key] = _bfloat16(np.lib.format.open_memmap(path))
        except (ValueError, EOFError) as error:
            raise FoveateError(f"{path} is broken: delete it, and its view is encoded anew") from error
        return True

    def _room(self, keys: list[str], shape: tuple[int, ...]) -> dict[str, Tensor] | None:
        """Space for this number of views: on disk, else in memory, else none."""
        count = len(keys) * int(np.prod(shape)) * 2
        paths = {key: self._unfinished(key) for key in keys}
        if shutil.disk_usage(self.folder).free > count + SPARE:
            try:
                return {key: _bfloat16(_new_array(path, shape, np.uint16)) for key, path in paths.items()}
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise  # else another program was faster
        for path in paths.values():  # also of an interrupted run
            path.unlink(missing_ok=True)
        if count <= self.memory:
            self.memory -= count
            self.fallback = f"{self.folder} has no room for {count / 1e9:.1f} GB of features: kept in memory"
            return {key: torch.empty(shape, dtype=torch.bfloat16) for key in keys}
        self.fallback = (
            f"{self.folder} has no room for {count / 1e9:.1f} GB of features: encoded at every step"
        )
        return None


def view_key(plan: ViewPlan, view: View) -> str:
    """A name for what a view shows, the same for equal views of different methods."""
    canvas = plan.canvases[view.canvas]
    full = whole(plan.picture)
    filled = canvas.source.clipped(plan.picture) != canvas.source or canvas.content != whole(canvas.size)
    shown = Canvas(canvas.size, canvas.source, canvas.content, canvas.fill if filled else "black")
    return _digest(repr((full, shown, view.box, view.stride)))


@lru_cache(maxsize=4096)
def look_key(plan: ViewPlan, look: Look) -> str:
    """A name for a part of the pictures."""
    return _digest(repr((plan.picture, plan.views[0].size, look)))


def _new_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file that has all of its space. Raises `OSError` if the disk lacks it.

    A file without its space ends the process (SIGBUS) when the disk is full.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # zeros take space everywhere
            step = 2**24
            for start in range(array.offset, size, step):
                file.seek(start)
                file.write(bytes(min(step, size - start)))
    return array


def _bfloat16(content: np.ndarray) -> Tensor:
    """numpy has no bfloat16: files hold its 16 bits."""
    return torch.from_numpy(content).view(torch.bfloat16)


def _digest(*texts: str) -> str:
    return blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()
