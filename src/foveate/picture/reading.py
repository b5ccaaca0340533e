"""Reading pictures: a path, bytes, an array or a PIL image all become the same upright RGB image."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from foveate.errors import FoveateError
from foveate.picture.geometry import Size

WIDEST = 65535  # of 16 bits
BAND = 256  # rows of an array that are converted at once
OVERSHOOT = 0.5  # how far below 0 a resized picture of floats may reach; above, it may reach 2
# What EXIF orientation asks for; the last four exchange height and width.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
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

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def read_picture(picture: Picture | Any) -> Image.Image:
    """An upright RGB `PIL.Image` from a path, URL, bytes, array (H, W), (H, W, 3 or 4) or PIL image.

    EXIF orientation is applied. What is transparent becomes white. The type of values says their scale: 8
    bits, 16 bits, true and false, floats from 0 to 1; other integers hold 0 to 255.
    Raises `FoveateError` for missing, empty or broken files and for arrays that are not pictures.
    """
    if isinstance(picture, Image.Image):
        image, name = picture, "picture"
        if 0 in image.size:
            raise FoveateError("the picture is empty: it has no pixels")
    elif isinstance(picture, np.ndarray):
        image, name = _from_array(picture), "array"
    elif isinstance(picture, (bytes, bytearray)):
        image, name = _open(io.BytesIO(picture), "the bytes given"), "bytes"
    elif isinstance(picture, str) and picture.startswith(("http://", "https://", "data:")):
        from huggingface_hub.errors import HfHubHTTPError
        from transformers.image_utils import load_image

        try:
            image, name = load_image(picture), picture[:60]
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise FoveateError(f"no picture could be read from {picture[:60]}: {error}") from error
    elif isinstance(picture, (str, os.PathLike)):
        path = Path(picture)
        if path.is_dir():
            raise FoveateError(f"{path} is a folder: give one picture")
        if not path.is_file():
            raise FoveateError(f"no picture at {path}")
        image, name = _open(path, str(path)), str(path)
    else:
        raise FoveateError(
            f"a picture must be a path, bytes, an array or a PIL image, not {type(picture).__name__}"
        )
    turn = TURNS.get(_orientation(image))
    try:
        upright = _to_rgb(image)
    except FoveateError as error:
        raise FoveateError(f"{name}: {error}") from error
    except Exception as error:  # whatever Pillow's plugins raise for broken data
        raise FoveateError(f"{name} is broken and cannot be read as a picture: {_reason(error)}") from error
    if turn is not None:
        upright = upright.transpose(turn)
        upright.info = {}  # it would say that the picture has yet to be turned
    return upright


def read_size(path: str | os.PathLike[str]) -> Size:
    """Height and width of a picture's file as shown upright; for most formats without reading the pixels."""
    path = Path(path)
    if not path.is_file():
        raise FoveateError(
            f"{path} is a folder: give one picture" if path.is_dir() else f"no picture at {path}"
        )
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":  # Pillow rotates these itself, some before they are loaded
                image.load()
            turned = _orientation(image) in SIDEWAYS
            width, height = image.size
    except Exception as error:  # whatever Pillow's plugins raise for broken data
        raise FoveateError(f"{path} cannot be read as a picture: {_reason(error)}") from error
    return Size(width, height) if turned else Size(height, width)


def drawing_path(out: str | os.PathLike[str]) -> Path:
    """`out` as a path at which a picture can be written. Raises `FoveateError` if it cannot be."""
    path = Path(out)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise FoveateError(f"{path}: pictures are written as .png, .jpg or .webp")
    if not path.absolute().parent.is_dir():
        raise FoveateError(f"{path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise FoveateError(f"{path} is a folder or cannot be written: choose another file")
    return path


def write_drawing(drawing: Image.Image, out: str | os.PathLike[str]) -> None:
    """Writes a drawing. Raises `FoveateError` if `out` cannot be written."""
    path = drawing_path(out)
    try:
        drawing.save(path)
    except OSError as error:
        raise FoveateError(f"{path} cannot be written: {error.strerror}") from error


def png(drawing: Image.Image) -> bytes:
    """A drawing as the bytes of a PNG file."""
    out = io.BytesIO()
    drawing.save(out, format="PNG")
    return out.getvalue()


def _open(source: Any, name: str) -> Image.Image:
    try:
        image = Image.open(source)
        image.load()
    except Exception as error:  # whatever Pillow's plugins raise for broken data
        raise FoveateError(f"{name} cannot be read as a picture: {_reason(error)}") from error
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its format is unknown"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _orientation(image: Image.Image) -> int:
    """What EXIF or XMP says of how the camera was held; 1 where it says nothing that makes sense."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except ODD:  # a tag must not cost the picture
        return 1
    return found if isinstance(found, int) else 1


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise FoveateError(
            f"an array of shape {array.shape} is not a picture: expected (H, W), (H, W, 3) or (H, W, 4)"
        )
    return Image.fromarray(_to_bytes(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; what is transparent shows white paper, as viewers do."""
    if image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    elif image.mode.startswith("I"):  # Pillow would clip it at 255
        image = Image.fromarray(_to_bytes(_sixteen_bits(image)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # which Pillow turns into LA alone
        image = image.convert("LA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB")


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    """Values of a picture of mode I;16, or of mode I, as which Pillow opens some files of 16 bits."""
    values = np.asarray(image)
    if values.dtype.kind == "u":  # of either byte order
        return values
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > WIDEST or (image.format is None and most < 256):
        raise FoveateError(
            f"a picture of Pillow's mode {image.mode} with values from {least} to {most} does not say its "
            "scale: give 8 bits (mode L) or 16 bits (mode I;16)"
        )
    return values.astype(np.uint16)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """8 bits of an array; its type says the scale. Works on bands of rows: a large array is not copied whole.

    Raises `FoveateError` for types and values that are not those of a picture.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    kind = values.dtype
    if kind == np.uint8:
        return values
    if kind == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if kind == np.uint16:
        return ((np.arange(WIDEST + 1) + 128) // 257).astype(np.uint8)[values]
    if not (np.issubdtype(kind, np.integer) or np.issubdtype(kind, np.floating)):
        raise FoveateError(
            f"an array of {kind} is not a picture: give uint8, uint16, bool, or floats from 0 to 1"
        )
    whole = np.issubdtype(kind, np.integer)
    made = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), BAND):
        band = values[start : start + BAND]
        if not whole:
            band = np.nan_to_num(band.astype(np.float64), posinf=np.inf, neginf=-np.inf)
        least, most = band.min(), band.max()
        if least < (0 if whole else -OVERSHOOT) or most > (255 if whole else 2):
            raise FoveateError(_scale_of(kind, values, whole))
        made[start : start + BAND] = band if whole else (band.clip(0, 1) * 255).round()
    return made


def _scale_of(kind: np.dtype, values: np.ndarray, whole: bool) -> str:
    """What to do with values that are not on the scale of their type."""
    least, most = np.nanmin(values), np.nanmax(values)
    held = f"an array of {kind} with values from {least:.6g} to {most:.6g}"
    if least < 0:
        rest = "add 1 and divide by 2" if not whole and least >= -1 and most <= 1 else "bring them into it"
        return f"{held}: expected {'0 to 255' if whole else '0 to 1'}; {rest}"
    if whole:
        return f"{held}: expected 0 to 255; give 16 bits as uint16"
    scale = 255 if most <= 255 else WIDEST if most <= WIDEST else most
    return f"{held}: expected 0 to 1; divide them by {scale:.6g}"
