"""The classes that vLLM loads: a model in vLLM's Transformers backend, and how its pictures are prepared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.clients.vllm import (
    MISSING,
    PER_PICTURE,
    begun,
    check_encoded,
    check_method,
    check_turn,
    field_sizes,
    fullest_picture,
    further_turns,
    renamings,
)
from foveate.errors import FoveateError
from foveate.methods import method_class
from foveate.methods.base import IMAGE_TOKEN, Method, TowerGeometry
from foveate.model.modeling import EncodedPictures
from foveate.model.processing import FoveateProcessor

try:
    from vllm.logger import init_logger
    from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
    from vllm.model_executor.models.transformers.multimodal import (
        MultiModalDummyInputsBuilder,
        MultiModalProcessingInfo,
        MultiModalProcessor,
    )
    from vllm.model_executor.models.utils import WeightsMapper
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.multimodal.parse import ImageSize, MultiModalDataParser
except ImportError as error:
    raise FoveateError(f"{MISSING} ({error})") from error

log = init_logger(__name__)


def method_of(config: Any) -> Method:
    """The method of a model's configuration. Raises `FoveateError` if vLLM cannot run it."""
    method = method_class(config.method)(TowerGeometry.of(config.vision_config), config.options)
    check_method(method)
    return method


class PictureParser(MultiModalDataParser):
    """Reads pictures as the processor does, which knows what transparent ones and those of 16 bits show.

    Args:
        read: a picture -> RGB.
        **more: of vLLM's own parser.
    """

    def __init__(self, read: Callable[[Any], Image.Image], **more: Any) -> None:
        super().__init__(**more)
        self.read = read

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, Image.Image):
            data = self.read(data)
        elif isinstance(data, (list, tuple)):
            data = [self.read(item) if isinstance(item, Image.Image) else item for item in data]
        return super()._parse_image_data(data)


class PictureInfo(MultiModalProcessingInfo):
    """How pictures are read, how many a prompt may show, and the most tokens that one of them can have."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        # Pictures come as they are in their files, not converted: `PictureParser` reads them.
        ctx.get_mm_config().media_io_kwargs.setdefault("image", {}).setdefault("image_mode", None)

    @cached_property
    def method(self) -> Method:
        return method_of(self.get_hf_config())

    def get_hf_processor(self, **kwargs: object) -> FoveateProcessor:
        """The processor, with the options of the model's configuration, which vLLM's user may change."""
        processor = self.ctx.get_hf_processor(FoveateProcessor, **kwargs)
        config = self.get_hf_config()
        processor.image_processor.method, processor.image_processor.options = config.method, config.options
        return processor

    def get_data_parser(self) -> PictureParser:
        return PictureParser(
            lambda picture: self.get_hf_processor().image_processor.read(picture),
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        check_method(self.method)
        return {"image": None}

    @cached_property
    def fullest(self) -> ImageSize:
        height, width = fullest_picture(self.method.plan, self.method.tower.image_size)
        return ImageSize(width=width, height=height)

    def get_image_size_with_most_features(self) -> ImageSize:
        return self.fullest


class PictureProcessor(MultiModalProcessor):
    """Pictures and a prompt's tokens -> the model's inputs, one entry for each picture."""

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        check_turn(self.info.method, inputs.mm_data_items.get_all_counts().get("image", 0))
        return super().apply(inputs, *args, **kwargs)

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        return begun(prompt, self.info.get_tokenizer())

    def _unpad_images(self, hf_inputs: Any) -> None:
        """Nothing: views are not padded, and `image_sizes` are those of the original pictures."""

    def _get_num_image_patches(self, hf_inputs: Any, mm_data: Any, num_images: int) -> Tensor:
        """Views per picture, (P,)."""
        plans = [self.info.method.plan(height, width) for height, width in hf_inputs["image_sizes"].tolist()]
        return torch.tensor([len(plan.views) for plan in plans])

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if "num_image_patches" in hf_inputs:
            views = hf_inputs["num_image_patches"].tolist()
            for name, sizes in field_sizes(views).items():
                fields[name] = MultiModalFieldConfig.flat_from_sizes(
                    "image", torch.tensor(sizes), keep_on_cpu=name in PER_PICTURE
                )
        return fields


@MULTIMODAL_REGISTRY.register_processor(
    PictureProcessor, info=PictureInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class FoveateVllm(TransformersMultiModalForCausalLM):
    """A `FoveateModel` with vLLM's own layers, attention and head."""

    hf_to_vllm_mapper: WeightsMapper

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        method = method_of(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.model.modules():  # buffers made like a parameter are on the meta device, too
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device_config.device)
        if further_turns(method):
            log.warning(
                "vLLM answers in the first turn of %s alone: serve it with `foveate serve` for all of them",
                method.title,
            )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return IMAGE_TOKEN

    def _create_hf_to_vllm_mapper(self) -> None:
        super()._create_hf_to_vllm_mapper()
        ours = {re.compile(key): new for key, new in renamings(self.text_config).items()}
        self.hf_to_vllm_mapper = WeightsMapper(orig_to_new_regex=ours) | self.hf_to_vllm_mapper

    def _get_features(self, modality: str, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Per picture its visual tokens (n, D)."""
        encoded: EncodedPictures = self.model.get_image_features(pixel_values, **kwargs)
        check_encoded(self.model.method, encoded.kept is not None, encoded.injection is not None)
        return encoded.pooler_output
