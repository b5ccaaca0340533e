"""Drawings of an answer."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from foveate.picture.drawing import chain_sheet
from foveate.picture.geometry import Box


@pytest.mark.parametrize("count", [1, 4, 8, 57, 529])
def test_chains_of_any_length_are_drawn(count: int) -> None:
    """Every view is seen whole, beside the picture and above the next chain's."""
    image, view = Image.new("RGB", (80, 60)), Image.new("RGB", (56, 56), (9, 200, 9))
    boxes = [Box(n % 40, n % 30, n % 40 + 20, n % 30 + 20) for n in range(count)]
    one, two = (np.asarray(chain_sheet(image, [("2x", boxes, [view] * count)] * chains)) for chains in (1, 2))
    assert two.shape == (2 * one.shape[0], *one.shape[1:])
    green = (one == (9, 200, 9)).all(-1)
    assert not green[:, :330].any()
    assert not green[-10:].any()
    corners = green[:-1, :-1] & ~green[1:, :-1] & ~green[:-1, 1:]  # of views, at their right end below
    assert int(corners[:, 340:].sum()) >= count
