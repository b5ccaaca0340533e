"""Reading pictures: what is none gives one clear sentence."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import FoveateError
from foveate.model.processing import FoveateImageProcessor
from foveate.picture.geometry import Size
from foveate.picture.limits import Limits
from foveate.picture.reading import count_pixels, drawing_path, read_picture, read_size
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
        ramp.astype(np.float64) / 255,
        ramp.astype(np.float16) / np.float16(255),
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


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
SCALED = {  # value -> what its 8 bits are
    "uint8 as is": (np.array([[0, 1, 255]], np.uint8), [0, 1, 255]),
    "uint16, dark": (np.array([[0, 256, 514]], np.uint16), [0, 1, 2]),
    "uint16, one bit": (np.array([[0, 1, 1]], np.uint16), [0, 0, 0]),
    "uint16, bright": (np.array([[65535, 65407, 32896]], np.uint16), [255, 255, 128]),
    "uint16, other bytes": (np.array([[0, 256, 65535]], ">u2"), [0, 1, 255]),
    "float, other bytes": (np.array([[0, 0.2, 1]], ">f4"), [0, 51, 255]),
    "int, other bytes": (np.array([[0, 200, 255]], ">i4"), [0, 200, 255]),
    "bool": (np.array([[True, False, True]]), [255, 0, 255]),
    "int of 0 and 1": (np.array([[0, 1, 1]], np.int64), [0, 1, 1]),
    "int8": (np.array([[0, 1, 127]], np.int8), [0, 1, 127]),
    "uint32": (np.array([[0, 200, 255]], np.uint32), [0, 200, 255]),
    "float a little over": (np.array([[0, 0.5, 1.000001]], np.float32), [0, 128, 255]),
    "float, overshoot": (np.array([[-0.1, 0.5, 1.2]], np.float64), [0, 128, 255]),
    "float, nan": (np.array([[np.nan, 0.2, 1]], np.float32), [0, 51, 255]),
}


@pytest.mark.parametrize("name", SCALED)
def test_the_type_says_the_scale(name: str) -> None:
    """And never the largest value, of which there may be any in a picture."""
    values, expected = SCALED[name]
    assert np.asarray(read_picture(values))[0, :, 0].tolist() == expected
    colour = np.stack([values] * 3, -1)
    assert np.asarray(read_picture(colour))[0, :, 1].tolist() == expected


REFUSED = {
    "float of 255": (RAMP * 255, "divide them by 255"),
    "float of 16 bits": (RAMP.astype(np.float32) * 65535, "divide them by 65535"),
    "float of anything": (RAMP * 1e6, r"divide them by 1e\+06"),
    "float, infinite": (np.where(RAMP > 0.9, np.inf, RAMP), "divide them by inf"),
    "float, normalised": (RAMP * 2 - 1, "from -1 to 1: expected 0 to 1; add 1 and divide by 2"),
    "float, standardised": (RAMP * 5 - 2, "from -2 to 3: expected 0 to 1"),
    "int of 16 bits": ((RAMP * 65535).astype(np.int32), "expected 0 to 255; give 16 bits as uint16"),
    "int below 0": ((RAMP * 255).astype(np.int16) - 9, "from -9 to 246: expected 0 to 255"),
    "complex": (RAMP.astype(np.complex64), "an array of complex64 is not a picture"),
    "text": (np.full((4, 4), "a"), "is not a picture"),
    "objects": (np.full((4, 4), None), "an array of object is not a picture"),
    "dates": (np.zeros((4, 4), "datetime64[s]"), "is not a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_off_their_scale_are_refused(name: str) -> None:
    values, problem = REFUSED[name]
    with pytest.raises(FoveateError, match=problem):
        read_picture(values)


def test_files_of_sixteen_bits(tmp_path: Path) -> None:
    """Whatever mode Pillow opens them in, and however dark they are."""
    for top in (200, 40_000):
        deep = np.linspace(0, top, 256).reshape(16, 16).astype(np.uint16)
        expected = ((deep.astype(np.int64) + 128) // 257).astype(np.uint8)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        Image.fromarray(deep).save(tmp_path / "deep.tif")
        for name in ("deep.png", "deep.tif"):
            assert np.array_equal(np.asarray(read_picture(tmp_path / name))[..., 0], expected), (top, name)
    with pytest.raises(FoveateError, match="does not say its scale: give 8 bits"):
        read_picture(Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("ending", ["png", "webp", "gif", "memory"])
def test_what_is_transparent_is_white(mode: str, ending: str, tmp_path: Path) -> None:
    """Black letters on nothing stay black letters."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 4))
    if mode == "RGB":  # one colour stands for nothing
        image = Image.new("RGB", (8, 4), (9, 200, 9))
        image.paste((0, 0, 0), (0, 0, 4, 4))
        image.info["transparency"] = (9, 200, 9)
    elif mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 4, 4))
        image.info["transparency"] = 1
    else:
        image = image.convert(mode)
    given: Any = image
    if ending != "memory":
        if (mode, ending) in (("RGB", "webp"), ("RGB", "gif"), ("P", "webp"), ("LA", "gif")):
            image = image.convert("RGBA")
        given = tmp_path / f"it.{ending}"
        image.save(given, **({"lossless": True} if ending == "webp" else {}))
    shown = np.asarray(read_picture(given))
    assert (shown[:, :4] == 0).all()
    assert (shown[:, 4:] == 255).all()


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_rarer_modes_with_transparency(mode: str) -> None:
    image = Image.new({"La": "LA", "RGBa": "RGBA"}.get(mode, mode), (2, 2), 0)
    assert (np.asarray(read_picture(image.convert(mode))) == 255).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_of_either_byte_order(mode: str) -> None:
    image = Image.frombytes(mode, (2, 1), np.array([0, 514], ">u2" if mode == "I;16B" else "<u2").tobytes())
    assert np.asarray(read_picture(image))[0, :, 0].tolist() == [0, 2]


def test_half_transparent_is_half_white() -> None:
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert np.asarray(read_picture(image))[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("it.png", "it.jpg", "it.webp"):
        Image.new("RGB", (16, 8)).save(tmp_path / name, exif=exif)
        assert read_picture(tmp_path / name).size == (16, 8)
        assert read_size(tmp_path / name) == Size(8, 16)


def orientation_tag(kind: int, rest: bytes) -> bytes:
    """EXIF data with one tag, the orientation, of a type and cut where `rest` ends."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0" + bytes([kind]) + b"\0\0\0\x01" + rest


ODD_EXIF = {
    "no header": b"nonsense",
    "cut": b"Exif\0\0MM\0*\0\0",
    "an offset beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "a type that is none": orientation_tag(99, b"\0\x06"),
    "orientation as text": orientation_tag(2, b"a\0\0\0"),
    "orientation by nothing": orientation_tag(5, b"\0\0"),
}


@pytest.mark.parametrize("name", ODD_EXIF)
def test_an_odd_tag_never_costs_the_picture(name: str, tmp_path: Path) -> None:
    for file in ("it.jpg", "it.png", "it.webp"):
        Image.new("RGB", (16, 8), (200, 9, 9)).save(tmp_path / file, exif=ODD_EXIF[name])
        assert read_picture(tmp_path / file).size == (16, 8)
        assert read_size(tmp_path / file) == Size(8, 16)


@pytest.mark.parametrize(
    "ending", ["png", "tif", "gif", "webp", "jpg", "bmp", "ico", "tga", "pcx", "ppm", "jp2", "dds", "sgi"]
)
def test_whatever_a_broken_file_raises_is_one_sentence(ending: str, tmp_path: Path) -> None:
    """Random bytes changed, cut and inserted in real files of many formats."""
    buffer = io.BytesIO()
    image = picture(24, 32)
    kind = {"tif": "TIFF", "jpg": "JPEG", "jp2": "JPEG2000"}.get(ending, ending.upper())
    image.save(buffer, kind)
    rng = np.random.default_rng(0)
    path = tmp_path / f"it.{ending}"
    for _ in range(40):
        data = bytearray(buffer.getvalue())
        for place in rng.integers(0, min(len(data), 200), 6):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        for read in (read_picture, read_size):
            try:
                read(path)
            except FoveateError as error:
                assert "\n" not in str(error) and "cannot be read" in str(error)


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


def test_every_form_of_a_picture(tmp_path: Path) -> None:
    """Each is the same picture."""
    image = picture(30, 40)
    pixels, data = np.asarray(image), png(image)
    path = tmp_path / "it.png"
    path.write_bytes(data)
    written = io.BytesIO()
    image.save(written, "png")  # its position is its end
    torn = Image.open(path)

    class OfOtherLibrary:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return pixels

    forms: dict[str, Any] = {
        "path": path,
        "text": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "stream": io.BytesIO(data),
        "written stream": written,
        "open file": path.open("rb"),
        "lazy image": torn,
        "array": pixels,
        "channels first": pixels.transpose(2, 0, 1),
        "tensor": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        "tensor, channels last": torch.from_numpy(pixels.copy()),
        "float tensor": torch.from_numpy(pixels.copy()).float() / 255,
        "tensor with a gradient": (torch.from_numpy(pixels.copy()).float() / 255).requires_grad_(),
        "of another library": OfOtherLibrary(),
        "datasets, bytes": {"bytes": data, "path": None},
        "datasets, bytes first": {"bytes": data, "path": "nothing/at/all.png"},
        "datasets, path": {"bytes": None, "path": str(path)},
        "datasets, path alone": {"path": path},
    }
    for name, form in forms.items():
        assert np.array_equal(np.asarray(read_picture(form)), pixels), name
    forms["open file"].close()
    assert read_size(forms["tensor"]) == read_size(forms["datasets, bytes"]) == Size(30, 40)


def test_tensors_are_channels_first_where_both_could_be_meant() -> None:
    assert read_picture(torch.zeros(3, 5, 4)).size == (4, 5)
    assert read_picture(torch.zeros(1, 5, 7)).size == (7, 5)
    assert read_picture(torch.zeros(4, 5, 7)).size == (7, 5)
    assert read_picture(torch.zeros(5, 7)).size == (7, 5)
    assert read_picture(torch.zeros(3, 5, 7, dtype=torch.bfloat16)).size == (7, 5)
    for wrong in (torch.zeros(2, 5, 7), torch.zeros(1, 3, 5, 7), torch.zeros(3)):
        with pytest.raises(FoveateError, match="is not a picture: expected"):
            read_picture(wrong)
    with pytest.raises(FoveateError, match="the tensor given cannot be read"):
        read_picture(torch.zeros(3, 5, 7, device="meta"))


FTYP = b"\0\0\0\x18ftyp"
OTHERS = {
    "it.heic": (FTYP + b"heic\0\0\0\0mif1heic", "it is HEIC; pip install pillow-heif"),
    "it.mp4": (FTYP + b"isom\0\0\0\0isommp42", "it is a film: give one of its pictures"),
    "it.svg": (
        b'<?xml version="1.0"?>\n<!-- made -->\n<svg width="9"/>',
        "it is SVG, a drawing without pixels",
    ),
    "bare.svg": (b"\xef\xbb\xbf <svg>", "it is SVG"),
    "it.pdf": (b"%PDF-1.7\n", "it is a PDF: turn its pages into PNG"),
    "it.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%!\n",
        "EPS is not read; convert",
    ),
    "it.ps": (b"%!PS-Adobe-3.0\n", "cannot be read as a picture"),
    "it.html": (b"<HTML>", "it is a web page"),
    "it.jxl": (b"\xff\x0a\0\0", "it is JPEG XL"),
    "it.jpg": (
        b"version https://git-lfs.github.com/spec/v1\noid 1",
        "a pointer of Git LFS: run git lfs pull",
    ),
    "it.txt": (b"I am a text", "its format is unknown"),
    "none.png": (b"", "it is empty"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_something_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.picture.reading.installed", lambda module: False)
    (tmp_path / name).write_bytes(OTHERS[name][0])
    for read in (read_picture, read_size):
        with pytest.raises(FoveateError, match=OTHERS[name][1]) as caught:
            read(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    code = base64.b64encode(png(picture(40, 40))).decode()
    paths: dict[Any, str] = {
        str(tmp_path / "pipe.png"): "is a device or a pipe: give a file",
        "/dev/zero": "is a device or a pipe: give a file",
        tmp_path / "dangling.png": "no picture at",
        tmp_path / "loop.png": "no picture at",
        "x" * 300 + ".png": "File name too long",
        "a\0b.png": "null byte|null character",
        "a\udc80.png": "no picture at a",
        "two\nlines.png": r"two\\nlines\.png",
        "": "path is empty",
        code: "it looks like base64; write data:image/png;base64, before it",
        code[:200]: "it looks like base64",
        tmp_path / "a.png" / "b.png": "no picture at",
    }
    for path, problem in paths.items():
        for read in (read_picture, read_size):
            with pytest.raises(FoveateError, match=problem) as caught:
                read(path)
            said = str(caught.value)
            assert "\n" not in said and len(said) < 400
            said.encode()  # can be printed


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"bytes": None, "path": None}, 'must be {"bytes": bytes, "path": text}; one may be None'),
        ({"bytes": "text", "path": None}, "must be"),
        ({"bytes": b"", "path": "cat.png"}, r"cat\.png cannot be read as a picture: it is empty"),
        (io.StringIO("text"), 'holds text: open it with mode "rb"'),
        ([1, 2], "a picture must be a path, bytes, an array or a PIL image, not list"),
    ],
)
def test_things_that_almost_are_pictures(given: Any, problem: str) -> None:
    with pytest.raises(FoveateError, match=problem):
        read_picture(given)


@pytest.mark.parametrize(
    "error",
    [
        *(struct.error, TypeError, NotImplementedError, RuntimeError, AttributeError, EOFError, zlib.error),
        *(OverflowError, MemoryError, KeyError, ZeroDivisionError, AssertionError, SystemError, OSError),
    ],
)
def test_whatever_a_decoder_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.png"
    picture(8, 8).save(path)
    opened = Image.open(path)

    def broken(self: Any) -> None:
        raise error("so it is\nand more")

    monkeypatch.setattr(type(opened), "load", broken)
    for given, name in ((path, "it.png"), (path.read_bytes(), "the bytes given"), (opened, "the picture")):
        with pytest.raises(FoveateError, match=f"{name} cannot be read as a picture: ") as caught:
            read_picture(given)
        assert "\n" not in str(caught.value)


def test_an_upright_rgb_image_is_not_copied() -> None:
    image = picture(8, 8)
    assert read_picture(image) is image
    model = tiny_model()
    assert model.chat(image).picture is not image  # it lasts, and its owner may draw on it


def test_a_drawing_of_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="cannot be written: File name too long"):
        drawing_path(tmp_path / ("x" * 300 + ".png"))


def test_pixels_are_counted_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20)).save(path)
    assert count_pixels(np.zeros((4, 5, 3), dtype=np.uint8)) == 20
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert count_pixels(path) == count_pixels(path.read_bytes()) == 600
    with pytest.raises(FoveateError, match="more than max_pixels 599"):
        count_pixels(path, Limits(max_pixels=599))


@pytest.mark.parametrize("length", range(1, 17))
def test_a_few_bytes_are_of_no_format(length: int) -> None:
    """Formats are told by their first bytes, which Pillow's plugins take for granted."""
    for head in (bytes(16), b"A" * 16, b"\xff" * 16):
        with pytest.raises(FoveateError, match="cannot be read as a picture: its format is unknown"):
            read_picture(head[:length])
