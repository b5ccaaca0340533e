"""Reading pictures: a path, bytes, an array or a PIL image all become the same upright RGB image."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from foveate.errors import FoveateError
from foveate.picture.geometry import Size

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def read_picture(picture: Picture | Any) -> Image.Image:
    """An upright RGB `PIL.Image` from a path, URL, bytes, array (H, W), (H, W, 3 or 4) or PIL image.

    EXIF orientation is applied; 16-bit and floating-point greys are scaled to 8 bits.
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
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else _to_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise FoveateError(f"{name} is broken and cannot be read as a picture: {error}") from error


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
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FoveateError(f"{path} cannot be read as a picture: {error}") from error
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
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise FoveateError(f"{name} cannot be read as a picture: {what}") from error
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise FoveateError(
            f"an array of shape {array.shape} is not a picture: expected (H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.dtype != np.uint8:
        array = _to_bytes(array)
    return Image.fromarray(array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which PIL would clip at 255
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Floats in 0..1 and 16-bit integers keep their scale; wider ranges are divided by their maximum."""
    values = np.nan_to_num(values.astype(np.float64))
    top = float(values.max(initial=0.0))
    scale = 1.0 if top <= 1.0 else 255.0 if top <= 255.0 else 65535.0 if top <= 65535.0 else top
    return np.clip(values / scale * 255.0, 0, 255).round().astype(np.uint8)
