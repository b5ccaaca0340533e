"""Any VLM of transformers behind one signature: conversations in, texts with confidences out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin, StoppingCriteriaList

from foveate.devices import usable_device, usable_dtype
from foveate.errors import (
    FoveateError,
    check_text,
    first_line,
    missing_extra,
    one_sentence,
    report_keys,
)
from foveate.model.config import FoveateConfig
from foveate.model.positions import LastPosition, check_lengths, positions_of
from foveate.model.processing import FoveateProcessor
from foveate.model.rendering import check_template
from foveate.picture.boxes import BOX_FORMATS
from foveate.picture.geometry import Size
from foveate.picture.reading import Transparency
from foveate.upstream import generation_arguments, keep_packing, template_variables
from foveate.versions import names_versions
from foveate.zoom.asking import Messages, Said, Tool, message
from foveate.zoom.tools import CONVENTIONS, with_tools

if TYPE_CHECKING:
    from foveate.model.adapters import Adapter

PER_TOKEN = {"return_dict_in_generate": True, "output_logits": True}  # needed for the confidence
ONE_ANSWER = "num_return_sequences: only one answer to each question is supported"


class VLM:
    """A model and its processor, as `AutoModelForImageTextToText` and `AutoProcessor` load them.

    Args:
        model: on its device; includes Foveate's own.
        processor: with a chat template.
        max_positions: the longest text in tokens; by default what the LLM has positions for. Foveate's own
            models know it themselves.

    Raises:
        FoveateError: a processor without chat template or without a token for pictures.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, max_positions: int | None = None
    ) -> None:
        name = type(processor).__name__
        if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_token_id"):
            raise FoveateError(f"{name} is not a processor of a VLM: give the one that AutoProcessor loads")
        if processor.chat_template is None:
            raise FoveateError(
                f"{name} has no chat template: set processor.chat_template, or put chat_template.jinja into "
                "the model's folder"
            )
        keep_packing(model)  # regions may need gradients
        self.model, self.processor = model, processor
        own = isinstance(model.config, FoveateConfig)  # whose methods may drop tokens: it counts itself
        if own and max_positions is not None:
            raise FoveateError("max_positions: give it to foveate.load, this model counts its own tokens")
        self.positions = None if own else max_positions or positions_of(model.config)

    @classmethod
    @names_versions
    def load(
        cls,
        model: str | Path | None,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        max_positions: int | None = None,
        **hub: Any,
    ) -> VLM:
        """Loads a folder or hub id that `foveate.load` reads, else any that transformers loads.

        Folders of type `llava` in transformers' layout are read by `foveate.load` if it supports their vision
        towers and options, and otherwise by transformers.

        Args:
            model: by default the embedded model.
            device: as for `foveate.load`.
            dtype: as for `foveate.load`.
            trust_remote_code: whether Python code in the model's folder may run.
            max_positions: the longest text in tokens; by default what the LLM has positions for.
            **hub: as for `foveate.load`.

        Raises:
            FoveateError: there is no such model, or it is not a VLM.
        """
        from foveate.ask.foveate import load
        from foveate.model.adapters import with_base
        from foveate.model.folders import Hub, found, read_json

        place = Hub.of(hub, "VLM.load")
        device = usable_device(device)
        number_format = usable_dtype(dtype, device)
        if model is None:
            own = load(None, device=device, dtype=number_format, max_positions=max_positions, **hub)
            return cls(own.model, own.processor)
        given = found(model, place)
        folder, adapter = with_base(given, place.parts())
        config = read_json(folder / "config.json")
        own_code = trust_remote_code and "auto_map" in config and config.get("model_type") != "foveate"
        if own_code or _loads_by_itself(config.get("model_type")):
            loaded = _by_transformers(folder, adapter, device, number_format, trust_remote_code)
            return cls(*loaded, max_positions)
        try:
            own = load(
                given,
                device=device,
                dtype=number_format,
                max_positions=max_positions,
                **place.parts().arguments(),
            )
        except FoveateError as refusal:
            if config.get("model_type") != "llava" or "vision_config" not in config:
                raise
            try:
                loaded = _by_transformers(folder, adapter, device, number_format, trust_remote_code)
                return cls(*loaded, max_positions)
            except FoveateError as error:
                raise FoveateError(f"{refusal}; and by transformers: {error}") from error
        return cls(own.model, own.processor)

    @property
    def transparency(self) -> Transparency:
        """What transparent pictures show, as in `read_picture`."""
        own = isinstance(self.processor, FoveateProcessor)
        return self.processor.image_processor.transparency if own else "white"

    @property
    def image_token_id(self) -> int:
        """Id of the token in `input_ids` that stands for one feature of a picture at each occurrence.

        Read from the model's config: processors such as Gemma 3's give the mark before these tokens.

        Raises `FoveateError` if neither config nor processor has one.
        """
        config = self.model.config
        named = [getattr(config, n) for n in ("image_token_id", "image_token_index") if hasattr(config, n)]
        for token in (*named, self.processor.image_token_id):
            if token is not None:
                return int(token)
        raise FoveateError(
            f"{type(self.model).__name__} has no token for pictures: set config.image_token_id"
        )

    @property
    def form(self) -> str:
        """The box format of the model's type; `unit_xyxy` for types that have none."""
        return self._type if self._type in BOX_FORMATS else "unit_xyxy"

    @property
    def convention(self) -> str:
        """The tool convention of the model's type; `qwen3_vl` for types that have none."""
        return self._type if self._type in CONVENTIONS else "qwen3_vl"

    @property
    def _type(self) -> str:
        return str(self.model.config.model_type).removesuffix("_moe")

    def _takes_tools(self) -> bool:
        """Whether the chat template offers tools to the model."""
        template = self.processor.chat_template
        if isinstance(template, dict):
            template = template.get("default", "")
        return "tools" in template_variables(template)

    def check_question(self, question: str) -> None:
        """Raises `FoveateError` for an empty text, and for one with a token that stands for a picture."""
        check_text(question, "the question")
        soft = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        for token in (self.processor.image_token, soft):  # they differ for Gemma 3
            if token in question:
                raise FoveateError(f"the question contains {token}, which stands for a picture: leave it out")

    def inputs(self, conversations: Sequence[Messages], tools: Sequence[Tool] = ()) -> BatchFeature:
        """The model's inputs for conversations that wait for an answer, padded on the left.

        Tools go through the chat template; where it takes none, a system message offers them.

        Raises `FoveateError` for pictures and texts that the processor does not accept, and for more than
        the LLM has positions for.
        """
        names: dict[str, Any] = {"add_generation_prompt": True}
        if tools and self._takes_tools():
            names["tools"] = [dict(tool) for tool in tools]
        elif tools:
            conversations = [with_tools(one, tools) for one in conversations]
        check_template(self.processor, conversations, names)
        try:
            inputs = self.processor.apply_chat_template(
                list(conversations),
                **names,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
        except (ValueError, TypeError) as error:
            what = f"{type(self.processor).__name__} does not accept the picture or the text"
            raise FoveateError(f"{what}: {error}") from error
        if self.positions is not None:
            check_lengths(inputs["attention_mask"].sum(1), self.positions, answer=1)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    @names_versions
    @torch.no_grad()
    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 256,
        tools: Sequence[Tool] = (),
        **generation: Any,
    ) -> list[Said]:
        """The model's answers; greedy decoding unless `generation`, arguments of `generate`, says otherwise.

        Calls of tools stay in the text, as the model writes them.

        Raises `FoveateError` for several answers to each, or answers of no token.
        """
        if max_new_tokens < 1:
            raise FoveateError(f"max_new_tokens must be at least 1, it is {max_new_tokens}")
        if generation.get("num_return_sequences", 1) != 1:
            raise FoveateError(ONE_ANSWER)
        inputs = self.inputs(conversations, tools)
        padding = self.processor.tokenizer.pad_token_id
        if self.positions is not None:
            end = LastPosition(inputs["attention_mask"].sum(1), inputs["input_ids"].shape[1], self.positions)
            generation["stopping_criteria"] = StoppingCriteriaList(
                [*(generation.get("stopping_criteria") or []), end]
            )
        output = self.model.generate(
            **inputs,
            **generation_arguments(
                {"pad_token_id": padding, **generation}, **PER_TOKEN, max_new_tokens=max_new_tokens
            ),
        )
        if len(output.sequences) != len(conversations):
            raise FoveateError(ONE_ANSWER)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]  # (B, T)
        beams = output.get("beam_indices")  # (B, T) rows of the logits, -1 after the end
        if beams is None:
            beams = torch.arange(len(new), device=new.device)[:, None].expand_as(new)
        probability = torch.stack(
            [
                logits[rows.clamp(min=0)].float().softmax(-1).gather(1, tokens[:, None])[:, 0]
                for logits, rows, tokens in zip(output.logits, beams.T, new.T, strict=False)
            ],
            dim=1,
        )
        said = self._said(new)[:, : probability.shape[1]]
        confidence = (probability * said).sum(1) / said.sum(1)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Said(text.strip(), sure, length, ids=tuple(ids[:length]))
            for text, sure, ids, length in zip(
                texts, confidence.tolist(), new.tolist(), said.sum(1).tolist(), strict=True
            )
        ]

    def _said(self, new: Tensor) -> Tensor:
        """(B, T) bool: up to and including the first token that ends an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ended = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype))
        return ended.cumsum(1) - ended.long() == 0

    def drawn(self, picture: Image.Image) -> tuple[Image.Image, Size]:
        """The picture, and the size at which the model is shown it, which boxes in pixels count."""
        shown = self.shown(self.inputs([message(picture, "?")]), Size(picture.height, picture.width))
        return picture, shown

    def shown(self, inputs: Mapping[str, Tensor], picture: Size) -> Size:
        """The size at which the model is shown a picture, if it depends on the picture's; else the picture's.

        Models like Qwen's give boxes in pixels of this size.
        """
        if "image_grid_thw" not in inputs:
            return picture
        _, rows, columns = (int(n) for n in inputs["image_grid_thw"][0])
        patch = self.processor.image_processor.patch_size
        return Size(rows * patch, columns * patch)


def _by_transformers(
    folder: Path, adapter: Adapter | None, device: str, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor of the Auto classes. Raises `FoveateError` with the folder's name."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from foveate.model.adapters import merge
    from foveate.model.checkpoints import read_files, weight_map

    weight_map(folder)  # which transformers follows wherever it leads
    try:
        with one_sentence(f"{folder} cannot be loaded as a VLM"):
            network, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise missing_extra("torchvision", "detector", f"the processor in {folder}") from error
        raise FoveateError(f"{folder} cannot be loaded as a VLM: {first_line(error)}") from error
    report_keys(folder, info["missing_keys"], (), [key for key, *_ in info["mismatched_keys"]])
    if adapter is not None:
        network = merge(network, adapter, read_files)
    return network.to(device).eval(), processor


def is_vlm(model_type: object) -> bool:
    """Whether transformers has a VLM of its own of this type."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from foveate.model.config import FoveateConfig

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    return model_type != FoveateConfig.model_type and (
        CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )


def _loads_by_itself(model_type: object) -> bool:
    """Whether to use transformers' own class at once. Not for `llava`, which other layouts also use."""
    return model_type != "llava" and is_vlm(model_type)
