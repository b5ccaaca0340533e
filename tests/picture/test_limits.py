"""Small files that hold many pixels, odd shapes, and how much memory large pictures take."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import FoveateError, Limits
from foveate.methods import usable_methods
from foveate.model.processing import FoveateImageProcessor
from foveate.picture.geometry import Box, Size, padded_square, squashed
from foveate.picture.reading import bands, read_picture, read_size, to_array
from foveate.picture.source import Look, pixels_of
from tests.support import picture

STATUS = Path("/proc/self/status")
FEW = Limits(max_pixels=1000)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that says its size, and has no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def icon(width: int, height: int) -> bytes:
    """An icon of 256 x 256 pixels, by its own header."""
    inner = bare_png(width, height)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


@pytest.mark.parametrize(
    "form", ["png", "gif", "webp", "tif", "jpg", "bmp", "array", "tensor", "lazy", "bytes"]
)
def test_pixels_are_counted_before_they_are_decoded(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"it.{form if form in ('gif', 'webp', 'tif', 'jpg', 'bmp') else 'png'}"
    picture(26, 40).save(path)
    given: Any = {
        "array": lambda: np.zeros((26, 40, 3), np.uint8),
        "tensor": lambda: torch.zeros(3, 26, 40, dtype=torch.uint8),
        "lazy": lambda: Image.open(path),
        "bytes": path.read_bytes,
    }.get(form, lambda: path)()
    assert read_picture(given, Limits(max_pixels=1040)).size == (40, 26)
    if form == "lazy":
        given = Image.open(path)
    monkeypatch.setattr(type(Image.open(path)), "load", lambda self: pytest.fail("decoded"))
    for read in (read_picture, read_size):
        with pytest.raises(FoveateError, match=r"40 x 26 pixels are more than max_pixels 1000.*--max-pixels"):
            read(given, FEW)


def test_a_bomb_is_refused_by_default(tmp_path: Path) -> None:
    """And by our sentence: Pillow's own bound is neither in the way nor heard."""
    for size in ((13_300, 13_300), (60_000, 60_000), (1, 200_000_000)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(
                FoveateError, match=f"{size[0]} x {size[1]} pixels are more than max_pixels 134217728"
            ):
                read_picture(bare_png(*size))
            assert read_size(bare_png(*size), Limits(max_pixels=2**40)) == Size(size[1], size[0])
    with pytest.raises(FoveateError, match=r"12000 x 11500 pixels are more"):
        read_picture(icon(12_000, 11_500))
    with pytest.raises(FoveateError, match="cannot be read as a picture"):
        read_picture(icon(256, 256))


def test_pixels_between_pillows_bound_and_ours(tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    Image.new("1", (10_000, 9_500)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(path) == Size(9_500, 10_000)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_text_that_unpacks_to_gigabytes(kind: bytes) -> None:
    packed = zlib.compress(bytes(80_000_000), 9)
    body = b"a\0\0" + packed if kind != b"iTXt" else b"a\0\1\0\0\0" + packed
    data = bare_png(4, 4, chunk(kind, body))
    before = _peak() if STATUS.exists() else 0
    with pytest.raises(FoveateError, match="the bytes given cannot be read"):
        read_picture(data)
    if STATUS.exists():
        assert _peak() - before < 40_000_000 or before > 10**9


def _peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_of_several_frames_the_first(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 4), (0, 0, level)) for level in (200, 20, 60)]
    for name in ("it.gif", "it.tif", "it.webp", "it.png"):
        options = {"lossless": True} if name == "it.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(read_picture(tmp_path / name))[0, 0].tolist() == [0, 0, 200]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "F"]
)
def test_bands_change_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = picture(50, 7)
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (50, 7)).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.random.default_rng(0).random((50, 7), dtype=np.float32))
    elif mode in ("RGBA", "LA", "PA"):
        image = noise.convert("RGBA")
        image.putalpha(picture(50, 7, seed=1).convert("L"))
        image = image.convert(mode)
    else:
        image = noise.convert(mode)
    whole = np.asarray(read_picture(image))
    monkeypatch.setattr("foveate.picture.reading.BAND", 20)
    assert np.array_equal(np.asarray(read_picture(image)), whole)
    if mode not in ("I;16", "F", "LA", "PA", "RGBA"):
        assert np.array_equal(whole, np.asarray(image.convert("RGB")))
    assert np.array_equal(to_array(noise), np.asarray(noise))
    assert [top for top, _ in bands(noise)] == list(range(0, 50, 2))


@pytest.mark.parametrize("size", [(30, 200), (200, 30), (41, 40), (1, 90), (1000, 700)])
def test_padding_in_bands_changes_nothing(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture pasted onto a page of its own, and this resized at once."""
    monkeypatch.setattr("foveate.picture.reading.BAND", 700)
    image, processor = picture(*size), FoveateImageProcessor()
    canvas = padded_square(Size(*size), 336)
    left, top, right, bottom = (int(n) for n in canvas.source)
    page = Image.new("RGB", (right - left, bottom - top), tuple(int(255 * m) for m in processor.image_mean))
    page.paste(image, (-left, -top))
    assert np.array_equal(
        np.asarray(processor.paint(image, canvas)),
        np.asarray(page.resize((336, 336), Image.Resampling.BICUBIC)),
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (90, 3)])
@pytest.mark.parametrize("upsampled", [False, True])
def test_views_do_not_depend_on_their_bands(
    size: tuple[int, int], upsampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, norms = torch.from_numpy(to_array(picture(*size))), torch.tensor([[0.5] * 3, [0.25] * 3])
    look = Look(squashed(Size(*size), Size(56, 56)), Box(10, 20, 38, 48), upsampled)
    whole = pixels_of(pixels, norms, look, Size(56, 56))
    for most in (1, 300, 5000):
        monkeypatch.setattr("foveate.picture.source.MOST", most)
        assert torch.allclose(pixels_of(pixels, norms, look, Size(56, 56)), whole, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_pictures_of_no_pixels(shape: tuple[int, int]) -> None:
    for empty in (Image.new("RGB", shape), np.zeros((*shape, 3), np.uint8), bare_png(*shape)):
        with pytest.raises(FoveateError):
            read_picture(empty)


GROWTH = """
import sys
from pathlib import Path

def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024

import foveate
from foveate.tiny import tiny_model

model = tiny_model(sys.argv[1])
model.ask(sys.argv[2], "What is it?", max_new_tokens=1)
before = peak()
for path in sys.argv[3:]:
    model.ask(path, "What is it?", max_new_tokens=1)
print(before, peak())
"""


def grown(method: str, *paths: Path) -> tuple[int, int]:
    """Peak of memory in bytes before and after a fresh process asks about pictures; the first warms it up."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GROWTH, method, *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.split()[-2:]
    return int(before), int(after)


needs_status = pytest.mark.skipif(not STATUS.exists(), reason="reads the peak of memory from /proc")


@needs_status
def test_a_large_picture_is_in_memory_once(tmp_path: Path) -> None:
    """9 megapixels: 4 bytes a pixel as Pillow's, and 2 while it is read or 3 as the original for CoRoI."""
    picture(8, 8).save(tmp_path / "small.png")
    Image.fromarray(np.full((3000, 3000), 40_000, np.uint16)).save(tmp_path / "deep.png", compress_level=1)
    before, after = grown("coroi", tmp_path / "small.png", tmp_path / "deep.png")
    assert after - before < 9_000_000 * (4 + 3) + 50_000_000


SHAPES = {"flat.png": (5_000_000, 1), "tall.png": (1, 5_000_000), "dot.png": (1, 1)}


@needs_status
@pytest.mark.slow
@pytest.mark.parametrize("method", usable_methods()[0])
def test_large_pictures_and_slivers_take_little_memory(method: str, tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "small.png")
    for name, size in SHAPES.items():
        Image.new("RGB", size, (9, 200, 9)).save(tmp_path / name, compress_level=1)
    _, after = grown(method, *(tmp_path / name for name in ("small.png", *SHAPES)))
    assert after < 0.9e9
    Image.fromarray(np.full((10_000, 10_000), 40_000, np.uint16)).save(
        tmp_path / "deep.png", compress_level=1
    )
    before, after = grown(method, tmp_path / "small.png", tmp_path / "deep.png")
    assert after - before < 100_000_000 * (4 + 3) + 50_000_000  # as above


def test_png_of_a_bare_header_is_what_it_says() -> None:
    with Image.open(io.BytesIO(bare_png(7, 5))) as image:
        assert image.size == (7, 5)
