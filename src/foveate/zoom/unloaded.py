"""A VLM of transformers by its configuration alone: what a picture costs it, before any weights.

Its processor reads a blank picture, so that tokens are those that it writes; its network runs on `meta`, with
torch's formulas for FLOPs. Only values that do not come from weights, such as the shape of a grid, are real.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from foveate import upstream
from foveate.errors import FoveateError, first_line, installed, missing_extra, one_sentence
from foveate.model.checkpoints import config_of
from foveate.model.cost import FlopCounter
from foveate.model.folders import checked, read_json, shown
from foveate.picture.geometry import Size
from foveate.picture.limits import LIMITS, Limits
from foveate.zoom.places import resolution
from foveate.zoom.vlm import is_vlm

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
NARROW = 200  # as in Qwen's processors
SPECIAL = re.compile(r"[<\[].+[>\]]")  # how special tokens look


@dataclass(frozen=True)
class Price:
    """What a question about one picture costs a VLM.

    Attributes:
        views: pictures that the vision tower encodes.
        visual_tokens: places for features of the picture in the LLM's sequence.
        picture_tokens: these and the marks around them; all that the picture adds to the sequence.
        effective_height, effective_width: the finest resolution at which the whole picture is seen, pixels;
            None where the inputs of the tower do not tell.
        part: (height, width) of the part that is seen, in original pixels, where it is not the whole picture.
        encode_flops: vision tower and connector.
        prefill_flops: LLM over `picture_tokens` and the text.
        decode_flops: LLM per generated token.
        kv_bytes: key and value cache after the prefill, in bfloat16.
        notes: sentences about what was found.
    """

    views: int
    visual_tokens: int
    picture_tokens: int
    effective_height: int | None
    effective_width: int | None
    part: Size | None
    encode_flops: int
    prefill_flops: int
    decode_flops: int
    kv_bytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "part": self.part and list(self.part), "notes": list(self.notes)}


@dataclass(frozen=True)
class Shown:
    """What a processor makes of one blank picture."""

    inputs: BatchFeature
    visual_tokens: int
    picture_tokens: int
    views: int
    seen: Size | None
    part: Size | None


class Unloaded:
    """Prices pictures for the VLM in a folder, whose weights are not read and need not be there.

    Args:
        folder: with `config.json` and the processor's configuration. Without a tokenizer, the marks around a
            picture's tokens are not counted.
        limits: on the pictures' sizes.

    Raises:
        FoveateError: no VLM that transformers has a class for, or no processor for it.
    """

    def __init__(self, folder: Path, limits: Limits = LIMITS) -> None:
        from transformers import AutoModelForImageTextToText

        self.folder, self.limits = checked(folder), limits
        kind = read_json(folder / "config.json").get("model_type")
        if not is_vlm(kind):
            raise FoveateError(f"{shown(folder)} is of type {kind!r}, which is not a VLM of transformers")
        self.config = config_of(folder)
        self.processor = _processor(folder, self.config)
        self.alone = isinstance(self.processor.tokenizer, _StandIn)
        what = f"{shown(folder / 'config.json')}: its network cannot be built"
        with one_sentence(what), torch.device("meta"):
            network = AutoModelForImageTextToText.from_config(
                self.config, dtype=torch.bfloat16, trust_remote_code=False
            )
        self.network: PreTrainedModel = network.eval().requires_grad_(False)

    def price(self, picture: Size, text_tokens: int = 64) -> Price:
        """The cost of a question about a picture of this size.

        Raises `FoveateError` for a size beyond the limits, or one that the processor or the network refuses.
        """
        self.limits.check("the picture", picture.width, picture.height)
        if max(picture) > NARROW * min(picture):  # some processors scale by the shorter side alone
            raise FoveateError(
                f"a picture of {picture.width} x {picture.height} pixels is too narrow to price a VLM with: "
                f"its sides may differ by a factor of {NARROW}"
            )
        found = self.shown(picture)
        with one_sentence(f"{self.name} cannot be priced"):
            features, encode = self._encode(found.inputs)
            prefill, decode, kv = self._language(found.picture_tokens + text_tokens)
        notes = []
        if self.alone:
            notes.append("the folder has no tokenizer: marks around the picture's tokens are not counted")
        if features not in (None, found.visual_tokens):
            notes.append(
                f"the network makes {features} features of the picture, and the processor leaves "
                f"{found.visual_tokens} places for them: config and processor do not belong together"
            )
        return Price(
            views=found.views,
            visual_tokens=found.visual_tokens,
            picture_tokens=found.picture_tokens,
            effective_height=found.seen.height if found.seen else None,
            effective_width=found.seen.width if found.seen else None,
            part=found.part,
            encode_flops=encode,
            prefill_flops=prefill,
            decode_flops=decode,
            kv_bytes=kv,
            notes=tuple(notes),
        )

    @property
    def name(self) -> str:
        """The network's class, for messages."""
        return type(self.network).__name__

    def shown(self, picture: Size) -> Shown:
        """What the processor makes of a picture of this size, with no text around it."""
        inputs = self._read(np.zeros((*picture, 3), dtype=np.uint8))
        ids = inputs["input_ids"][0]
        place = self._place(ids)
        tokens = int((ids == place).sum())
        if not tokens:
            raise FoveateError(f"{self.name} gives a picture no tokens in the LLM's sequence: not priced")
        pixels = inputs["pixel_values"] if "pixel_values" in inputs else torch.empty(0)
        views, seen, part = 1, None, None
        if "image_grid_thw" in inputs:
            _, rows, columns = (int(n) for n in inputs["image_grid_thw"][0])
            patch = self.processor.image_processor.patch_size
            seen = Size(rows * patch, columns * patch)
        elif pixels.ndim >= 4 and pixels.shape[-3] == 3:
            views = pixels.flatten(0, -4).shape[0]
            found = resolution(picture, pixels, lambda array: self._read(array)["pixel_values"].float())
            if found is not None:
                seen, part = found.size, None if found.part == picture else found.part
        return Shown(inputs, tokens, tokens if self.alone else len(ids), views, seen, part)

    def _read(self, pixels: np.ndarray) -> BatchFeature:
        """The processor's inputs for one picture (h, w, 3) and no other text."""
        what = f"{type(self.processor).__name__} does not accept a picture of {pixels.shape[1]} x "
        what = f"{what}{pixels.shape[0]} pixels"
        try:
            with one_sentence(what):
                return self.processor(
                    images=Image.fromarray(pixels),
                    text=self.processor.image_token,
                    return_tensors="pt",
                    add_special_tokens=False,
                )
        except MemoryError as error:
            raise FoveateError(f"{what}: what it makes of one does not fit into memory") from error

    def _place(self, ids: Tensor) -> int:
        """The id of a feature's place; processors such as Gemma 3's name the mark before these instead."""
        if self.alone:  # ids are made up: there are more places than marks of any kind
            special = set(self.processor.tokenizer.added_tokens_decoder)
            return Counter(n for n in ids.tolist() if n in special).most_common(1)[0][0]
        config = self.config
        named = [getattr(config, n) for n in ("image_token_id", "image_token_index") if hasattr(config, n)]
        return next(int(n) for n in (*named, self.processor.image_token_id) if n is not None)

    def _encode(self, inputs: BatchFeature) -> tuple[int | None, int]:
        """Number of features, None if they are not rows of one width, and FLOPs of tower and connector."""
        dtype = self.network.dtype
        given = {key: value for key, value in inputs.items() if key not in OF_THE_TEXT}
        given |= {key: value.to(dtype) for key, value in given.items() if value.is_floating_point()}
        with torch.no_grad(), FlopCounter() as counter, _Known():
            found = self.network.get_image_features(**given)
        features = found.pooler_output if hasattr(found, "pooler_output") else found
        rows = features if isinstance(features, list | tuple) else [features]
        if not all(isinstance(row, Tensor) for row in rows):
            return None, counter.total
        return sum(row[..., 0].numel() for row in rows), counter.total

    def _language(self, tokens: int) -> tuple[int, int, int]:
        """FLOPs of the prefill, FLOPs of a further token, bytes of the cache."""
        decoder, head = self.network.get_decoder(), self.network.get_output_embeddings()
        width, cached = decoder.config.hidden_size, upstream.CACHE
        embeds = torch.zeros(1, tokens, width, device="meta", dtype=self.network.dtype)
        with torch.no_grad():
            with FlopCounter() as prefill:
                out = decoder(inputs_embeds=embeds, use_cache=True)
                head(out.last_hidden_state[:, -1:])
            cache = out[cached]
            kv = upstream.cache_bytes(cache)
            with FlopCounter() as decode:
                head(decoder(inputs_embeds=embeds[:, :1], **{cached: cache}).last_hidden_state)
        return prefill.total, decode.total, kv


class _Known(TorchDispatchMode):
    """Keeps values that do not come from weights on the CPU, so that the network's code can read them.

    Whatever meets a tensor on `meta` becomes one.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        meta = any(tensor.is_meta for tensor in tensors)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta" if meta else "cpu")
        if meta:
            args, kwargs = tree_map(_on_meta, (args, kwargs))
        return func(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _processor(folder: Path, config: Any) -> Any:
    """The processor of a folder, for pictures alone: parts for videos and sound may be missing.

    Raises `FoveateError` if the folder names none that transformers has, or its files make no sense.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    if not any((folder / file).is_file() for file in PROCESSORS):
        raise FoveateError(f"{shown(folder)} has neither {PROCESSORS[0]} nor {PROCESSORS[1]}")
    values = read_json(folder / PROCESSORS[0])
    files = [values, *(read_json(folder / name) for name in (PROCESSORS[1], "tokenizer_config.json"))]
    known = upstream.processors_by_type()
    usual = known.get(config.model_type)
    name = next((file["processor_class"] for file in files if file.get("processor_class")), usual)
    kind = getattr(transformers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, ProcessorMixin):
        if name in known.values() and not installed("torchvision"):
            raise missing_extra("torchvision", "detector", f"{name}, the processor in {shown(folder)},")
        raise FoveateError(
            f"{shown(folder)} names {shown(name)} as its processor, which transformers has not"
        )
    what = f"{shown(folder)}: its processor cannot be made"
    try:
        with one_sentence(what):
            images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            if any((folder / file).is_file() for file in TOKENIZERS):
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            else:
                tokenizer = _stand_in()
            return upstream.pictures_alone(kind, images, tokenizer, values)
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise missing_extra("torchvision", "detector", f"the processor in {shown(folder)}") from error
        raise FoveateError(f"{what}: {first_line(error)}") from error


class _StandIn(PreTrainedTokenizerFast):
    """A tokenizer of bytes that has every special token that a processor asks for."""

    def __getattr__(self, name: str) -> Any:
        token = name.removesuffix("_id")
        if not token.endswith("_token") or token.startswith("_") or token in self.SPECIAL_TOKENS_ATTRIBUTES:
            return super().__getattr__(name)
        text = f"<{token}>"
        number = self.convert_tokens_to_ids(text)
        return text if name == token else number

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        for token in [tokens] if isinstance(tokens, str) else tokens:
            if SPECIAL.fullmatch(token) and token not in self.get_vocab():
                self.add_tokens([token], special_tokens=True)
        return super().convert_tokens_to_ids(tokens)


def _stand_in() -> _StandIn:
    alphabet = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _StandIn(tokenizer_object=made, **marks)
