"""An explanation as one picture: relevance of the whole answer and of each word, regions and views."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from foveate.picture.drawing import (
    GAP,
    HEAT,
    INNER,
    MARGIN,
    PAPER,
    WIDTH,
    Shown,
    contact_sheet,
    lay_out,
    mark_regions,
)
from foveate.picture.geometry import Box

if TYPE_CHECKING:
    from foveate.explaining.explanation import Explanation
    from foveate.explaining.faithfulness import Faithfulness

WORDS, WORD_SIDE, WORDS_HEIGHT = 12, 280, 330  # words that are drawn, the side of each, the height of all
VIEWS = 16  # that are drawn
SIDE = 1400  # pixels of the picture's longer side, at most
GAMMA = 0.6  # below 1, so that weak relevance is visible, too
TINT, DARK, DARKEST = 0.3, 0.55, 0.3


def drawn(explained: Explanation) -> Image.Image:
    """The picture of an explanation."""
    answer = f"A  {explained.answer or '(no text)'}"
    caption = [(f"Q  {explained.question}", False), (answer, True)]
    caption += [(line, False) for line in sentences(explained)]
    views = [Shown(view.role, view.picture) for view in explained.views if view.picture is not None]
    small = explained.picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    scale = small.width / explained.picture.width, small.height / explained.picture.height
    regions = [_scaled(box, *scale) for box in explained.regions or []]
    shown = views[:VIEWS] or [Shown("whole", small)]
    page = lay_out(glowing(small, explained), regions, shown, caption, numbered=False)
    if len(explained.words) < 2:
        return page
    words = [
        Shown(
            f"{word.text.strip() or word.text!r}  {word.probability:.2f}",
            mark_regions(glowing(small, explained, number), [], WORD_SIDE, WORD_SIDE),
        )
        for number, word in enumerate(explained.words[:WORDS])
    ]
    strip = contact_sheet(words, INNER, WORDS_HEIGHT, numbered=False, sized=False)
    whole = Image.new("RGB", (WIDTH, page.height + strip.height + GAP), PAPER)
    whole.paste(page, (0, 0))
    whole.paste(strip, (MARGIN, page.height))
    return whole


def _scaled(box: Box, across: float, down: float) -> Box:
    left, top, right, bottom = (float(n) for n in box)
    return Box(left * across, top * down, right * across, bottom * down)


def glowing(picture: Image.Image, explained: Explanation, word: int | None = None) -> Image.Image:
    """A picture, lit and coloured where relevance is high; grey and dark elsewhere.

    Of the whole answer, or of one word. Darkest is what no visual token that the LLM saw shows.
    """
    weights, seen = explained.weights(word)
    light = np.where(seen, weights**GAMMA, 0.0)

    def grown(cells: np.ndarray) -> np.ndarray:
        """(h, w, 1), 0 to 1"""
        made = Image.fromarray(np.round(255 * cells).astype(np.uint8))
        return (
            np.asarray(made.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float32)[..., None]
            / 255
        )

    pixels, lit = np.asarray(picture.convert("RGB"), dtype=np.float32), grown(light)
    grey = pixels.mean(-1, keepdims=True) * (DARKEST + (DARK - DARKEST) * grown(seen.astype(float)))
    warm = (1 - TINT) * pixels + TINT * np.array(HEAT, dtype=np.float32)
    return Image.fromarray((grey + (warm - grey) * lit).round().clip(0, 255).astype(np.uint8))


def sentences(explained: Explanation) -> list[str]:
    """What an explanation says in words, one sentence each."""
    on_picture = sum(word.on_picture for word in explained.words) / len(explained.words)
    kept = sum(token.kept for token in explained.tokens)
    dropped = f", {len(explained.tokens) - kept} dropped" if kept < len(explained.tokens) else ""
    lines = [
        f"{explained.model}   |   probability {explained.probability:.2f}   |   "
        f"{100 * on_picture:.0f} % of the relevance lies on {kept} visual tokens{dropped}"
    ]
    if explained.gates:
        gates = ", ".join(f"{name} {value:.2f}" for name, value in explained.gates.items())
        lines.append(f"gates: {gates}")
    return lines + [faithful(one) for one in explained.faithfulness] + list(explained.notes)


def faithful(found: Faithfulness) -> str:
    """The result of one measurement."""
    what = {"relevance": "the most relevant part", "regions": "the regions"}.get(found.claim, found.claim)
    changed = "another answer" if found.changed else "the same answer"
    others = sum(found.random_changed)
    return (
        f"without {what}, {100 * found.area:.0f} % of the picture: {changed}, probability "
        f"{found.probability:.2f} to {found.hidden:.2f}; without as much elsewhere: another answer {others} "
        f"of {len(found.random)} times, on average to {found.probability - found.random_fall:.2f}"
    )
