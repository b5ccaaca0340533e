"""An explanation as one picture: relevance over the picture, of the whole answer and of each word; the views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from foveate.picture.drawing import (
    GAP,
    INNER,
    MARGIN,
    PAPER,
    WIDTH,
    Shown,
    contact_sheet,
    lay_out,
    mark_regions,
)

if TYPE_CHECKING:
    from foveate.explaining.explanation import Explanation
    from foveate.explaining.faithfulness import Faithfulness

WORDS, WORD_SIDE, WORDS_HEIGHT = 12, 280, 330  # words that are drawn, the side of each, the height of all
VIEWS = 16  # that are drawn


def drawn(explained: Explanation) -> Image.Image:
    """The picture of an explanation."""
    answer = f"A  {explained.answer or '(no text)'}"
    caption = [(f"Q  {explained.question}", False), (answer, True)]
    caption += [(line, False) for line in sentences(explained)]
    views = [Shown(view.role, view.picture) for view in explained.views if view.picture is not None]
    page = lay_out(
        explained.picture,
        explained.regions or [],
        views[:VIEWS] or [Shown("whole", explained.picture)],
        caption,
        explained.heat(),
        numbered=False,
    )
    if len(explained.words) < 2:
        return page
    words = [
        Shown(
            f"{word.text.strip() or word.text!r}  {word.probability:.2f}",
            mark_regions(explained.picture, [], WORD_SIDE, WORD_SIDE, explained.heat(number)),
        )
        for number, word in enumerate(explained.words[:WORDS])
    ]
    strip = contact_sheet(words, INNER, WORDS_HEIGHT, numbered=False)
    whole = Image.new("RGB", (WIDTH, page.height + strip.height + GAP), PAPER)
    whole.paste(page, (0, 0))
    whole.paste(strip, (MARGIN, page.height))
    return whole


def sentences(explained: Explanation) -> list[str]:
    """What an explanation says in words, one sentence each."""
    on_picture = sum(word.on_picture for word in explained.words) / len(explained.words)
    kept = sum(token.kept for token in explained.tokens)
    dropped = f", {len(explained.tokens) - kept} dropped" if kept < len(explained.tokens) else ""
    lines = [
        f"{explained.model}   |   probability {explained.probability:.2f}   |   {kept} visual tokens{dropped}, "
        f"on which {100 * on_picture:.0f} % of the relevance lies"
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
        f"{found.probability:.2f} to {found.hidden:.2f}; without as much elsewhere: another answer {others} of "
        f"{len(found.random)} times, on average to {found.probability - found.random_fall:.2f}"
    )
