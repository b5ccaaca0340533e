"""How many pixels of a picture a model on a server sees, by the tokens that pictures of several sizes take.

A model that shows large pictures smaller takes no more tokens from some size on. The pixels that it sees then
are those tokens times the pixels of one, which is known from the sizes below. A model with one fixed view
takes the same tokens for every picture: its patches are taken to have 14 pixels a side, as those of LLaVA's
towers. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping

SIDES = (224, 448, 896, 1792)  # of the square pictures that are tried
PATCH = 14 * 14  # pixels of a token, where nothing tells it
SAME = 1.05  # counts that differ by less are the same


def seen_pixels(counts: Mapping[int, int]) -> int | None:
    """The pixels of a square picture that a model sees at most; None if it sees every size that was tried.

    Args:
        counts: side of a square picture in pixels -> tokens that a prompt takes more with it than without.
    """
    known = sorted((side, tokens) for side, tokens in counts.items() if tokens > 0)
    if not known:
        return None
    most = max(tokens for _, tokens in known)
    full = next(place for place, (_, tokens) in enumerate(known) if tokens * SAME >= most)
    if full == len(known) - 1 and len(known) > 1:
        return None
    if full == 0:
        return most * PATCH
    side, tokens = known[full - 1]
    return round(most * side * side / tokens)
