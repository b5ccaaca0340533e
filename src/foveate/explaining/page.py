"""An explanation as one HTML file that needs nothing else: no script, style or picture from anywhere."""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from foveate.explaining.drawing import sentences

if TYPE_CHECKING:
    from foveate.explaining.explanation import Explanation
    from foveate.picture.geometry import Box

SIDE = 2048  # pixels of the picture's longer side, at most
VIEW_SIDE = 256  # of a view's
VIEWS = 40  # that are shown


def page(explained: Explanation) -> str:
    """The file's text."""
    template = resources.files("foveate.explaining").joinpath("page.html.jinja").read_text(encoding="utf-8")
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    views = [
        {"role": view.role, "size": view.size, "picture": _data_url(view.picture, VIEW_SIDE)}
        for view in explained.views[:VIEWS]
        if view.picture is not None
    ]
    return made.render(
        explained=explained,
        sentences=sentences(explained),
        picture=_data_url(explained.picture, SIDE),
        views=views,
        values=_values(explained),
    )


def _values(explained: Explanation) -> dict[str, Any]:
    """What the page's script reads: boxes in original pixels, and maps of bytes."""
    raster = explained.raster
    _, seen = explained.weights()
    maps = [_bytes(one) for one in explained.density]
    regions = explained.regions or []
    return {
        "size": [explained.size.width, explained.size.height],
        "columns": raster.columns.tolist(),
        "rows": raster.rows.tolist(),
        "maps": maps,
        "seen": _bytes(seen),
        "words": [
            {"text": word.text, "probability": word.probability, "picture": word.on_picture}
            for word in explained.words
        ],
        "tokens": [
            [None if token.box is None else _rounded(token.box), token.kept, token.relevance]
            for token in explained.tokens
        ],
        "boxes": [
            *({"layer": "views", "name": view.role, "box": _rounded(view.box)} for view in explained.views),
            *(
                {"layer": "regions", "name": f"region {number}", "box": _rounded(box)}
                for number, box in enumerate(regions, 1)
            ),
            *(
                {"layer": "hidden", "name": f"hidden to test {one.claim}", "box": _rounded(box)}
                for one in explained.faithfulness
                for box in one.boxes
            ),
        ],
        "chains": [
            {"name": chain.name, "boxes": [_rounded(box) for box in chain.boxes]}
            for chain in explained.chains
        ],
    }


def _bytes(density: np.ndarray) -> str:
    """A map as base64 of one byte a cell, the highest 255."""
    scaled = np.round(255 * density / (density.max() or 1)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode()


def _rounded(box: Box) -> list[float]:
    return [round(float(n), 2) for n in box]


def _data_url(picture: Image.Image, side: int) -> str:
    """A copy of the picture, not larger than it is."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
