"""Foveate's own models as they are explained: each method carries relevance to the picture itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.explaining.story import Prepared
from foveate.methods.base import Rerun
from foveate.model.modeling import EncodedPictures, FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.text import pictures_of
from foveate.picture.account import Account, Spread

VISION = ("pixel_values", "image_sizes", "query_ids", "query_mask", "source_pixels", "source_norms")


def rerun(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    picture: Image.Image,
    features: Callable[[], Tensor] | None = None,
) -> Rerun:
    """The parts of a model, to run them on a picture once more.

    Args:
        model: the network, on its device.
        processor: the model's.
        picture: upright, as read.
        features: of its views, where they are known.
    """
    images = processor.image_processor
    plan = images.plan(picture.height, picture.width)

    def views() -> Tensor:
        return torch.from_numpy(images.views(picture, plan)).to(model.device, model.dtype)

    @cache
    @torch.no_grad()
    def encoded() -> Tensor:
        return model.encode_views(views())

    return Rerun(model.vision_tower, model.connector, plan, views, features or encoded)


@dataclass(frozen=True)
class Own:
    """A model of Foveate's that is explained."""

    model: FoveateForConditionalGeneration
    processor: FoveateProcessor

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @torch.no_grad()
    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> Prepared:
        """The pictures are encoded here, once for all passes over the conversation."""
        inputs = self.processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)
        vision = {name: inputs[name] for name in VISION if name in inputs}
        encoded: EncodedPictures = self.model.get_image_features(**vision)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        kept = None if encoded.kept is None else torch.cat(list(encoded.kept)).cpu()

        def spread(relevance: Tensor) -> list[Spread]:
            pictures = pictures_of(messages)
            runs = [rerun(self.model, self.processor, picture) for picture in pictures]
            shares = relevance.split([run.plan.tokens for run in runs], 1)
            accounts = encoded.accounts or [Account()] * len(runs)
            return [self.model.method.spread(*one) for one in zip(runs, shares, accounts, strict=True)]

        return Prepared({**text, "mm_encoder_outputs": {"image": encoded}}, kept, spread)
