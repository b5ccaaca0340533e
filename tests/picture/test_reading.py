"""Reading pictures: what is none gives one clear sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import FoveateError
from foveate.model.processing import FoveateImageProcessor
from foveate.picture.reading import read_picture, read_size
from foveate.tiny import tiny_model
from tests.support import picture


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_broken_files(tmp_path: Path) -> None:
    whole = png(picture(30, 40))
    files = {
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "text.jpg": b"I am a text",
        "head.png": whole[:8],
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FoveateError, match=f"{name} cannot be read as a picture"):
            read_picture(path)
        with pytest.raises(FoveateError, match="the bytes given cannot be read as a picture"):
            read_picture(content)
    with pytest.raises(FoveateError, match="is a folder: give one picture"):
        read_picture(tmp_path)
    with pytest.raises(FoveateError, match="no picture at"):
        read_picture(tmp_path / "nothing.png")


@pytest.mark.parametrize("shape", [(3,), (0, 4, 3), (4, 0), (5, 5, 2), (5, 5, 7), (1, 2, 3, 4), ()], ids=str)
def test_arrays_that_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(FoveateError, match=r"an array of shape .* is not a picture: expected \(H, W\)"):
        read_picture(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("thing", [3, None, {"a": 1}, object()], ids=lambda thing: type(thing).__name__)
def test_things_that_are_no_pictures(thing: Any) -> None:
    with pytest.raises(FoveateError, match="a picture must be a path, bytes, an array or a PIL image, not"):
        read_picture(thing)


def test_through_the_processor(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    made = tiny_model()
    with pytest.raises(FoveateError, match=r"empty\.png cannot be read as a picture"):
        made.processor(images=str(tmp_path / "empty.png"), text="<image>")
    with pytest.raises(FoveateError, match="is a folder"):
        made.ask(tmp_path, "What?")


def test_values_keep_their_scale() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.asarray(read_picture(ramp))
    assert expected.shape == (16, 16, 3)
    for same in (
        ramp.astype(np.float32) / 255,
        ramp.astype(np.float64),
        ramp.astype(np.uint16) * 257,
        ramp.astype(np.int64),
        np.where(np.arange(256).reshape(16, 16) == 0, np.nan, ramp.astype(np.float32) / 255),
        torch.from_numpy(ramp).numpy(),
        ramp[..., None],
    ):
        assert np.array_equal(np.asarray(read_picture(same)), expected)
    wide = Image.fromarray(ramp.astype(np.int32) * 257)
    assert wide.mode == "I"
    assert np.array_equal(np.asarray(read_picture(wide)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation: int, tmp_path: Path) -> None:
    """A camera's note of how it was held is followed once, and is not there afterwards."""
    steps = np.zeros((8, 16, 3), np.uint8)
    steps[:4, :8] = 255  # white in the upper left corner
    turned = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(steps).save(tmp_path / "it.png", exif=exif)
    for name in ("it.tif", "it.jpg"):
        Image.fromarray(steps).save(tmp_path / name, exif=exif)
        shown = read_picture(tmp_path / name)
        assert read_size(tmp_path / name) == (shown.height, shown.width)
    upright = read_picture(tmp_path / "it.png")
    assert upright.size == ((8, 16) if orientation > 4 else (16, 8))
    corners = np.asarray(upright)[[0, 0, -1, -1], [0, -1, 0, -1], 0].reshape(2, 2)
    assert tuple(np.argwhere(corners == 255)[0]) == turned[orientation]
    assert upright.getexif().get(0x0112, 1) == 1
    assert read_picture(upright).size == upright.size


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (60_000, 3)])
@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_slivers_take_little_memory(size: tuple[int, int], fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of 60,000 pixels a side would need 10 GB."""
    made: list[int] = []
    resize, new = Image.Image.resize, Image.new

    def spy_resize(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        resized = resize(image, *args, **kwargs)
        made.append(resized.width * resized.height)
        return resized

    def spy_new(mode: str, extent: tuple[int, int], *args: Any) -> Image.Image:
        made.append(extent[0] * extent[1])
        return new(mode, extent, *args)

    picture = new("RGB", size, (255, 0, 0))
    monkeypatch.setattr(Image.Image, "resize", spy_resize)
    monkeypatch.setattr(Image, "new", spy_new)
    pixels = FoveateImageProcessor("llava", {"fit": fit})(picture)["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    assert made and max(made) <= 336 * 336
    red = FoveateImageProcessor("llava")(new("RGB", (9, 9), (255, 0, 0)))["pixel_values"][0, :, :1, :1]
    assert (pixels[0] == red).all(0).any()


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_frugal_way_paints_the_same(fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((1200, 900), Image.Resampling.BICUBIC)
    processor = FoveateImageProcessor("llava", {"fit": fit})
    usual = processor(picture)["pixel_values"]
    monkeypatch.setattr("foveate.model.processing.MOST_PIXELS", 1)
    frugal = processor(picture)["pixel_values"]
    differs = (usual - frugal).abs().amax(1) > 0.02  # (1, 336, 336): along the edge of the padding only
    assert differs.float().mean() < 0.02 and (fit == "pad" or not differs.any())
