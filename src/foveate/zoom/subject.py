"""Any VLM as it is explained: its image tokens have the places that its processor gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from foveate.errors import FoveateError
from foveate.explaining.own import Own
from foveate.explaining.story import Prepared, Subject
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.text import pictures_of
from foveate.picture.account import Spread, placed
from foveate.picture.geometry import Size
from foveate.remembered import Remembered
from foveate.zoom.places import token_places
from foveate.zoom.vlm import VLM

SIZES = 16  # number of picture sizes whose image token places are kept


@dataclass(frozen=True)
class Placed:
    """A VLM of transformers that is explained.

    All relevance of an image token stays in its place, that of the patches it is made of; what the vision
    tower's attention and a connector carry between patches is not followed.
    """

    vlm: VLM
    places: Remembered = field(repr=False)

    @property
    def model(self) -> PreTrainedModel:
        return self.vlm.model

    @property
    def processor(self) -> ProcessorMixin:
        return self.vlm.processor

    @property
    def image_token_id(self) -> int:
        return self.vlm.image_token_id

    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> Prepared:
        inputs = self.vlm.inputs([[dict(message) for message in messages]])
        sizes = [Size(picture.height, picture.width) for picture in pictures_of(messages)]

        def spread(relevance: Tensor) -> list[Spread]:
            places = [self.places(size) for size in sizes]
            counts = [len(one) for one in places]
            if sum(counts) != relevance.shape[1]:
                raise FoveateError(
                    f"{type(self.model).__name__} shows {len(sizes)} pictures by {relevance.shape[1]} tokens "
                    f"in this prompt and by {counts} alone: explain it without a closer look"
                )
            starts = [0, *accumulate(counts)]
            return [
                placed(one, relevance[:, start : start + len(one)])
                for one, start in zip(places, starts, strict=False)
            ]

        return Prepared(inputs, None, spread)


def explained_by(vlm: VLM) -> Subject:
    """How a VLM is explained: Foveate's own by their methods."""
    if isinstance(vlm.model, FoveateForConditionalGeneration) and isinstance(vlm.processor, FoveateProcessor):
        return Own(vlm.model, vlm.processor)
    return Placed(vlm, Remembered(partial(token_places, vlm), most=SIZES))
