"""Reading pictures: a path, URL, bytes, array, tensor or PIL image all become the same upright RGB image.

Pixels are converted in bands of rows, so that a large picture is in memory once, not several times.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from PIL import ExifTags, Image

from foveate.errors import FoveateError, installed
from foveate.picture.fetching import decode, fetch, local_path, named, scheme
from foveate.picture.geometry import Size
from foveate.picture.limits import LIMITS, Limits

WIDEST = 65535  # of 16 bits
BAND = 2**18  # pixels that are converted at once
OVERSHOOT = 0.5  # how far below 0 a resized picture of floats may reach; above, it may reach 2
CHANNELS = (1, 3, 4)
# What EXIF orientation asks for; the last four exchange height and width.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
SIDEWAYS = (5, 6, 7, 8)
# What Pillow raises for EXIF data that makes no sense.
ODD = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    struct.error,
)
# Formats that Pillow opens and that are not read here: an outside program draws the first, and the others
# hold pictures of sizes that their headers do not tell.
REFUSED = ("EPS", "ICNS", "IPTC", "BLP")
CONVERT = "convert it to PNG or JPEG"
# How files begin that are no pictures Pillow can read, and what to do with them.
KINDS = (
    (b"%PDF", "it is a PDF: turn its pages into PNG first, with pdftoppm for example"),
    (b"%!PS", f"it is PostScript: {CONVERT}"),
    (b"<svg", f"it is SVG, a drawing without pixels: {CONVERT} first"),
    (b"<!doctype html", "it is a web page: give the address of the picture itself"),
    (b"<html", "it is a web page: give the address of the picture itself"),
    (b"version https://git-lfs", "it is a pointer of Git LFS: run git lfs pull"),
    (b"\xff\x0a", f"it is JPEG XL: {CONVERT}"),
    (b"\0\0\0\x0cJXL ", f"it is JPEG XL: {CONVERT}"),
)
HEIC = ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0AK")  # PNG, JPEG, GIF, WebP, TIFF

Transparency = Literal["white", "bare"]
Picture = str | os.PathLike[str] | bytes | IO[bytes] | Mapping[str, Any] | Image.Image | np.ndarray


def read_picture(
    picture: Picture | Any, limits: Limits = LIMITS, transparency: Transparency = "white"
) -> Image.Image:
    """An upright RGB `PIL.Image`; the one given if it is that already.

    Args:
        picture: a path; an http, https, data or file URL; bytes or an open file; an array (H, W),
            (H, W, C) or (C, H, W) with 1, 3 or 4 channels; a torch tensor, (C, H, W) where both could be
            meant; `datasets`' {"bytes", "path"}; or a PIL image.
        limits: on its pixels, unless it is decoded already, and on what is fetched.
        transparency: `white` lays what is transparent on white paper, as viewers do; `bare` leaves out the
            transparency and shows the colours under it, as the authors of released checkpoints read pictures.

    EXIF orientation is applied. The type of values says their scale: 8
    bits, 16 bits, true and false, floats from 0 to 1; other integers hold 0 to 255. Of several frames the
    first is read.

    Raises:
        FoveateError: missing, empty, broken or too large pictures, and arrays that are not pictures.
    """
    given = _given(picture, limits)
    if isinstance(given, np.ndarray):
        return _from_array(given, limits, transparency)
    if isinstance(given, Image.Image):
        with _one_sentence("the picture"):
            return _upright(given, "the picture", limits, transparency)
    name, source = given
    with _one_sentence(name), source as file:
        return _upright(_opened(file, name, limits), name, limits, transparency, ours=True)


def read_size(picture: Picture | Any, limits: Limits = LIMITS) -> Size:
    """Height and width of a picture as shown upright; for most formats without decoding its pixels.

    Takes and raises what `read_picture` does, except that broken pixels may go unnoticed.
    """
    given = _given(picture, limits)
    if isinstance(given, (np.ndarray, Image.Image)):
        image = read_picture(given, limits)
        return Size(image.height, image.width)
    name, source = given
    with _one_sentence(name), source as file:
        image = _opened(file, name, limits)
        if image.format == "TIFF":  # Pillow rotates these itself, some before they are loaded
            image.load()
        turned = _orientation(image) in SIDEWAYS
        width, height = image.size
    return Size(width, height) if turned else Size(height, width)


def count_pixels(picture: Picture | Any, limits: Limits = LIMITS) -> int:
    """Width x height of a picture, of a file's head alone. Takes and raises what `read_size` does."""
    given = _given(picture, limits)
    if isinstance(given, (np.ndarray, Image.Image)):
        image = read_picture(given, limits)
        return image.width * image.height
    name, source = given
    with _one_sentence(name), source as file:
        width, height = _opened(file, name, limits).size
    return width * height


def fetched(picture: str, limits: Limits = LIMITS) -> str | Mapping[str, Any]:
    """The bytes of a picture behind an http(s) URL, under its name; a path or another URL as it is.

    For those who read a picture more than once: it is fetched now and not again.
    """
    if scheme(picture) in ("http", "https"):
        return {"bytes": fetch(picture, limits), "path": picture}
    return picture


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in bands of whole rows: the number of the first, and the band."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def to_array(image: Image.Image, out: np.ndarray | None = None) -> np.ndarray:
    """The bytes (H, W, 3) of an RGB image, which Pillow alone would hold three times on the way.

    `out`: where to write them, by default a new array.
    """
    if out is None:
        out = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top, band in bands(image):
        out[top : top + band.height] = np.asarray(band)
    return out


def drawing_path(out: str | os.PathLike[str]) -> Path:
    """`out` as a path at which a picture can be written. Raises `FoveateError` if it cannot be."""
    path = Path(out)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise FoveateError(f"{path}: pictures are written as .png, .jpg or .webp")
    try:
        if not path.absolute().parent.is_dir():
            raise FoveateError(f"{path}: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise FoveateError(f"{path} is a folder or cannot be written: choose another file")
    except OSError as error:  # a name too long
        raise FoveateError(f"{named(str(path))} cannot be written: {_reason(error)}") from error
    return path


def write_drawing(drawing: Image.Image, out: str | os.PathLike[str]) -> None:
    """Writes a drawing. Raises `FoveateError` if `out` cannot be written."""
    path = drawing_path(out)
    try:
        drawing.save(path)
    except (OSError, ValueError) as error:
        raise FoveateError(f"{path} cannot be written: {_reason(error)}") from error


def png(drawing: Image.Image) -> bytes:
    """A drawing as the bytes of a PNG file."""
    out = io.BytesIO()
    drawing.save(out, format="PNG")
    return out.getvalue()


Source = tuple[str, Any]  # its name in messages, and a context manager that opens it


def _given(picture: Any, limits: Limits) -> np.ndarray | Image.Image | Source:
    """An array, an image, or a file to be opened."""
    if isinstance(picture, (Image.Image, np.ndarray)):
        return picture
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return "the bytes given", io.BytesIO(picture)
    if isinstance(picture, str):
        kind = scheme(picture)
        if kind in ("http", "https"):
            return named(picture), io.BytesIO(fetch(picture, limits))
        if kind == "data":
            return named(picture), io.BytesIO(decode(picture, limits))
        if kind == "file":
            return _file(local_path(picture))
        if kind is not None:
            raise FoveateError(
                f"{named(picture)}: pictures are read from http, https, data and file URLs, not from {kind}"
            )
        return _file(picture)
    if isinstance(picture, os.PathLike):
        return _file(os.fsdecode(picture))
    if isinstance(picture, Mapping) and ("bytes" in picture or "path" in picture):
        return _of_mapping(picture, limits)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(picture, torch.Tensor):
        return _of_tensor(picture, torch)
    if hasattr(picture, "read"):
        return _of_stream(picture)
    if hasattr(picture, "__array__"):  # of other libraries
        with _one_sentence(f"the {type(picture).__name__} given"):
            return np.asarray(picture)
    raise FoveateError(
        "a picture must be a path, bytes, an array or a PIL image, not "
        f"{type(picture).__name__}; also a URL, an open file, a tensor"
    )


def _of_mapping(picture: Mapping[str, Any], limits: Limits) -> np.ndarray | Image.Image | Source:
    """What `datasets` gives for a picture that it does not decode."""
    data, path = picture.get("bytes"), picture.get("path")
    if isinstance(data, (bytes, bytearray, memoryview)):
        return named(path) if isinstance(path, str) else "the bytes given", io.BytesIO(data)
    if data is None and isinstance(path, (str, os.PathLike)):
        return _given(path, limits)
    raise FoveateError('a picture given as a dict must be {"bytes": bytes, "path": text}; one may be None')


def _of_tensor(tensor: Any, torch: Any) -> np.ndarray:
    with _one_sentence("the tensor given"):
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # which numpy does not know
            tensor = tensor.float()
        array = tensor.numpy()
    channels_first = array.ndim == 3 and array.shape[0] in CHANNELS
    return array.transpose(1, 2, 0) if channels_first else array


def _of_stream(stream: Any) -> Source:
    """An open file, read from its start where it can go there."""
    with _one_sentence("the open file given"):
        if stream.seekable():
            stream.seek(0)
        data = stream.read()
    if not isinstance(data, bytes):
        raise FoveateError('the open file given holds text: open it with mode "rb"')
    return "the open file given", io.BytesIO(data)


def _file(path: str) -> Source:
    """A file that is there. Pipes and devices are refused: reading them might never end."""
    name = named(path)
    if not path:
        raise FoveateError("the picture's path is empty")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # a name too long, with a zero byte, that cannot be encoded
        letters = path.strip()
        if letters.startswith(BASE64) and len(letters) > 100:
            raise FoveateError(
                f"no picture at {name}: it looks like base64; write data:image/png;base64, before it, or "
                "give the decoded bytes"
            ) from None
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        why = "" if missing else f": {_reason(error)}"
        raise FoveateError(f"no picture at {name}{why}") from None
    if stat.S_ISDIR(mode):
        raise FoveateError(f"{name} is a folder: give one picture")
    if not stat.S_ISREG(mode):
        raise FoveateError(f"{name} is a device or a pipe: give a file")
    with _one_sentence(name):
        return name, open(path, "rb")


def _opened(file: IO[bytes], name: str, limits: Limits) -> Image.Image:
    """As `Image.open`, but with `limits` in place of Pillow's own bound, and saying what a file is."""
    head = file.read(512)
    if not head:
        raise FoveateError(f"{name} cannot be read as a picture: it is empty")
    brands = _brands(head)
    if any(brand in HEIC for brand in brands) and "avif" not in brands:
        if not installed("pillow_heif"):
            raise FoveateError(
                f"{name} cannot be read as a picture: it is HEIC; pip install pillow-heif, or {CONVERT}"
            )
        from pillow_heif import register_heif_opener

        register_heif_opener()
    why = None
    tried: set[str] = set()
    for prepare in (Image.preinit, Image.init):
        prepare()
        for kind in [kind for kind in Image.ID if kind not in tried]:
            tried.add(kind)
            factory, accept = Image.OPEN[kind]
            try:
                accepted = accept is None or accept(head[:16])
            except (IndexError, struct.error):  # a file too short to be one
                continue
            if isinstance(accepted, str):  # the format is known, but Pillow was built without it
                why = accepted
            elif accepted:
                try:
                    if kind == "ICO":  # which Pillow decodes when it opens it
                        for width, height in _icon_sizes(file):
                            limits.check(name, width, height)
                    file.seek(0)
                    return _checked(factory(file, ""), name, limits)
                except (SyntaxError, IndexError, TypeError, struct.error):  # another format's file
                    continue
    raise FoveateError(f"{name} cannot be read as a picture: {_kind(head, brands) or why or UNKNOWN}")


UNKNOWN = "its format is unknown"


def _checked(image: Image.Image, name: str, limits: Limits) -> Image.Image:
    """An image that has not been decoded yet and may be."""
    if image.format in REFUSED:
        raise FoveateError(f"{name} cannot be read as a picture: {image.format} is not read; {CONVERT}")
    limits.check(name, *image.size)
    return image


def _icon_sizes(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """What the pictures of an icon say of their sizes; its own header has one byte for each."""
    file.seek(4)
    (count,) = struct.unpack("<H", file.read(2))
    places = [entry[0] for entry in struct.iter_unpack("<12xI", file.read(16 * count))]
    for place in places:
        file.seek(place)
        head = file.read(24)
        if head.startswith(b"\x89PNG"):
            yield struct.unpack(">II", head[16:24])
        else:  # a bitmap of the picture and its mask
            width, height = struct.unpack("<ii", head[4:12])
            yield max(1, abs(width)), max(1, abs(height) // 2)


def _brands(head: bytes) -> list[str]:
    """What a file of the MP4 family says it is."""
    if head[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[at : at + 4].decode("latin-1") for at in (8, *range(16, end - 3, 4))]


def _kind(head: bytes, brands: list[str]) -> str | None:
    """What a file is that Pillow does not know, and what to do."""
    if "avif" in brands:
        return f"it is AVIF, which this Pillow does not read: pip install -U pillow, or {CONVERT}"
    if brands:
        return "it is a film: give one of its pictures"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = start.lower()
    if lower.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in lower:
        lower = lower[lower.index(b"<svg") :]
    return next((what for mark, what in KINDS if lower.startswith(mark.lower())), None)


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Whatever Pillow's plugins raise for broken data becomes one sentence with the picture's name."""
    try:
        yield
    except FoveateError as error:
        if str(error).startswith(name):
            raise
        raise FoveateError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise FoveateError(
            f"{name} cannot be read as a picture: it has more pixels than Pillow reads of this format; "
            f"raise PIL.Image.MAX_IMAGE_PIXELS, or {CONVERT}"
        ) from error
    except Exception as error:  # whatever Pillow's plugins raise for broken data
        raise FoveateError(f"{name} cannot be read as a picture: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return named((said.splitlines() or [""])[0]) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """What EXIF or XMP says of how the camera was held; 1 where it says nothing that makes sense."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except ODD:  # a tag must not cost the picture
        return 1
    return found if isinstance(found, int) else 1


def _upright(
    image: Image.Image, name: str, limits: Limits, transparency: Transparency, ours: bool = False
) -> Image.Image:
    """An image, 8-bit RGB, turned as its file says. One of `ours` is closed when its pixels are copied."""
    if type(image) is Image.Image:  # decoded already
        if 0 in image.size:
            raise FoveateError(f"{name} is empty: it has no pixels")
    else:
        _checked(image, name, limits)
    image.load()  # which turns TIFF already
    turn = TURNS.get(_orientation(image))
    if turn is None and image.mode == "RGB" and not image.has_transparency_data:
        plain = type(image) is Image.Image
        return image if plain else image._new(image.im)  # the same pixels, without the file they are from
    pixels = _rgb_of(image, transparency)
    if ours:
        image.close()  # Pillow has 4 bytes for each pixel: they are not kept beside those of the result
    return _image_of(pixels if turn is None else turn(pixels))


def _image_of(pixels: np.ndarray) -> Image.Image:
    """Bytes (H, W, 3) in any order of memory as an image."""
    height, width = pixels.shape[:2]
    made, rows = Image.new("RGB", (width, height)), max(1, BAND // width)
    for top in range(0, height, rows):
        made.paste(Image.fromarray(np.ascontiguousarray(pixels[top : top + rows])), (0, top))
    return made


def _from_array(array: np.ndarray, limits: Limits, transparency: Transparency) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[0] in CHANNELS and shape[2] not in CHANNELS:
        array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise FoveateError(
            f"an array of shape {shape} is not a picture: expected (H, W), (H, W, C) or (C, H, W) with 1, 3 "
            "or 4 channels"
        )
    height, width = array.shape[:2]
    limits.check("the array", width, height)
    made = Image.new("RGB", (width, height))
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        values = _to_bytes(array[top : top + rows], partial(_extremes, array))
        made.paste(_band_to_rgb(Image.fromarray(values), transparency), (0, top))
    return made


def _extremes(array: np.ndarray) -> tuple[float, float]:
    return np.nanmin(array), np.nanmax(array)


def _rgb_of(image: Image.Image, transparency: Transparency) -> np.ndarray:
    """The bytes (H, W, 3) of an image of any mode."""
    if image.mode == "I":
        _check_sixteen_bits(image)
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top, band in bands(image):
        if image.mode == "F":
            band = Image.fromarray(_to_bytes(np.asarray(band), image.getextrema))
        elif image.mode.startswith("I"):  # Pillow would clip it at 255
            band = Image.fromarray(_to_bytes(np.asarray(band).astype(np.uint16), image.getextrema))
        pixels[top : top + band.height] = np.asarray(_band_to_rgb(band, transparency))
    return pixels


def _band_to_rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    if image.mode == "La":  # which Pillow turns into LA alone
        image = image.convert("LA")
    if transparency == "bare" or not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB")


def _check_sixteen_bits(image: Image.Image) -> None:
    """Refuses values of mode I, as which Pillow opens some files of 16 bits, that are not 16 bits."""
    least, most = cast(tuple[int, int], image.getextrema())
    if least < 0 or most > WIDEST or (image.format is None and most < 256):
        raise FoveateError(
            f"a picture of Pillow's mode {image.mode} with values from {least} to {most} does not say its "
            "scale: give 8 bits (mode L) or 16 bits (mode I;16)"
        )


def _to_bytes(values: np.ndarray, extremes: Callable[[], Any]) -> np.ndarray:
    """8 bits of a band of an array; its type says the scale.

    `extremes` finds the least and the largest value of the whole, for messages. Raises `FoveateError` for
    types and values that are not those of a picture.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    kind = values.dtype
    if kind == np.uint8:
        return np.ascontiguousarray(values)
    if kind == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if kind == np.uint16:
        return ((np.arange(WIDEST + 1) + 128) // 257).astype(np.uint8)[values]
    whole = np.issubdtype(kind, np.integer)
    if not (whole or np.issubdtype(kind, np.floating)):
        raise FoveateError(
            f"an array of {kind} is not a picture: give uint8, uint16, bool, or floats from 0 to 1"
        )
    if not whole:
        values = np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=-np.inf)
    least, most = values.min(), values.max()
    if least < (0 if whole else -OVERSHOOT) or most > (255 if whole else 2):
        raise FoveateError(_scale_of(kind, extremes(), whole))
    return values.astype(np.uint8) if whole else (values.clip(0, 1) * 255).round().astype(np.uint8)


def _scale_of(kind: np.dtype, extremes: tuple[float, float], whole: bool) -> str:
    """What to do with values that are not on the scale of their type."""
    least, most = extremes
    held = f"an array of {kind} with values from {least:.6g} to {most:.6g}"
    if least < 0:
        rest = "add 1 and divide by 2" if not whole and least >= -1 and most <= 1 else "bring them into it"
        return f"{held}: expected {'0 to 255' if whole else '0 to 1'}; {rest}"
    if whole:
        return f"{held}: expected 0 to 255; give 16 bits as uint16"
    scale = 255 if most <= 255 else WIDEST if most <= WIDEST else most
    return f"{held}: expected 0 to 1; divide them by {scale:.6g}"
