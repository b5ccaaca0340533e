"""Original pictures that are looked at again: any part of them, as a tower sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import FoveateError
from foveate.picture.geometry import Box, Size, padded_square, squashed
from foveate.picture.source import Look, Source
from tests.support import picture, source_of

SIDE, SMALL = Size(336, 336), Size(56, 56)  # of views


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float, by Pillow's filter of that name in floating point: another implementation."""
    size = (width, height)
    channels = [Image.fromarray(image[..., c].astype(np.float32), "F") for c in range(3)]
    return np.stack([np.asarray(c.resize(size, Image.Resampling.BILINEAR)) for c in channels], -1)


@pytest.mark.parametrize("size", [(700, 500), (33, 31), (1000, 40), (1, 1)])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_window_is_cut_from_the_picture_resized_as_a_whole(size: tuple[int, int], scale: int) -> None:
    image = picture(*size)
    look = Look(squashed(Size(*size), SIDE), Box(70, 42, 70 + 336 // scale, 42 + 336 // scale))
    got = source_of(image).pixels(0, look, SIDE).permute(1, 2, 0)
    whole = resized(np.array(image), 336 * scale, 336 * scale)
    left, top = 70 * scale, 42 * scale
    assert np.abs(got.numpy() - whole[top : top + 336, left : left + 336]).max() < 1e-3


def test_padding_and_the_enlarged_low_resolution_picture() -> None:
    image = picture(60, 200)
    source = source_of(image)
    page = np.full((200, 200, 3), 127.0)  # 255 x the mean, rounded down
    page[70:130] = np.array(image)
    canvas = padded_square(Size(60, 200), 336)
    for box in (Box(0, 0, 168, 168), Box(14, 84, 182, 252), Box(168, 168, 336, 336)):
        left, top = 2 * box.left, 2 * box.top
        got = source.pixels(0, Look(canvas, box), SIDE).permute(1, 2, 0).numpy()
        assert np.abs(got - resized(page, 672, 672)[top : top + 336, left : left + 336]).max() < 1e-3
        got = source.pixels(0, Look(canvas, box, upsampled=True), SIDE).permute(1, 2, 0).numpy()
        whole = resized(resized(page, 336, 336), 672, 672)
        assert np.abs(got - whole[top : top + 336, left : left + 336]).max() < 1e-3


def test_a_source_remembers_and_calls_once() -> None:
    called: list[int] = []
    image = torch.from_numpy(np.array(picture(80, 80)))
    norms = torch.ones(1, 2, 3)

    def encode_views(views: Tensor) -> Tensor:
        called.append(len(views))
        return views.flatten(2)

    memory: dict[Look, Tensor] = {}
    source = Source([image, image], norms.expand(2, -1, -1), encode_views, [memory, memory])
    canvas = squashed(Size(80, 80), SMALL)
    one, other = Look(canvas, Box(0, 0, 28, 28)), Look(canvas, Box(14, 0, 42, 28))
    first = source.look([(0, one), (1, one), (1, other)], SMALL)
    again = source.look([(0, other), (1, one)], SMALL)
    assert called == [2]
    assert source.encoded == [1, 1]
    assert [len(looks) for looks in source.looked] == [2, 2]
    assert torch.equal(first[0], first[1])
    assert torch.equal(again, first[[2, 0]])
    assert list(memory) == [other, one]  # what was asked for last is the last to be forgotten
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in memory.values())


def test_pictures_and_what_belongs_to_them_must_agree() -> None:
    pixels, norms = torch.zeros(27, dtype=torch.uint8), torch.ones(1, 2, 3)
    with pytest.raises(FoveateError, match="image_sizes call for 12 source_pixels, not 27"):
        Source.unpacked(pixels, torch.tensor([[2, 2]]), norms, lambda views: views)
    with pytest.raises(FoveateError, match="2 original pictures with 1 norms"):
        Source([pixels, pixels], norms, lambda views: views)


def test_autocast_leaves_pixels_alone() -> None:
    source = source_of(picture(300, 500))
    look = Look(squashed(Size(300, 500), Size(168, 168)), Box(14, 28, 84, 98))
    exact = source.pixels(0, look, Size(56, 56))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(source.pixels(0, look, Size(56, 56)), exact)
