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
from foveate.pictures import read_picture
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
    with pytest.raises(FoveateError, match=r"an array of shape .* is no picture: expected \(H, W\)"):
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
    upright = read_picture(tmp_path / "it.png")
    assert upright.size == ((8, 16) if orientation > 4 else (16, 8))
    corners = np.asarray(upright)[[0, 0, -1, -1], [0, -1, 0, -1], 0].reshape(2, 2)
    assert tuple(np.argwhere(corners == 255)[0]) == turned[orientation]
    assert upright.getexif().get(0x0112, 1) == 1
    assert read_picture(upright).size == upright.size
