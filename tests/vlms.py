"""Tiny random VLMs of transformers' own classes, each with a real processor and a tokenizer of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    set_seed,
)

from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.zoom.vlm import VLM

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHORT = {"max_position_embeddings": 4096, "initializer_range": 0.2}
LANGUAGE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    **SHORT,
}


class _OnevisionPictures(LlavaOnevisionProcessor):
    """Without the part for videos, which needs torchvision; so are the next ones."""

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, None, **kwargs)


class _InternPictures(InternVLProcessor):
    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, None, **kwargs)


class _Qwen25Pictures(Qwen2_5_VLProcessor):
    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, None, **kwargs)


class _Qwen3Pictures(Qwen3VLProcessor):
    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, None, **kwargs)


class _PixtralPictures(LlavaProcessor):
    """As PixtralProcessor, which needs torchvision: each picture has its own rows, a mark after each."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        height, width = (int(n) // self.patch_size for n in image_inputs["image_sizes"][image_idx])
        return (self.image_token * width + "<break>") * height


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, and special ones."""
    first = ["<unk>", "<s>", "</s>", "<pad>", *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*first, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[AddedToken(token, special=True) for token in special],
        **named,
    )


def llava() -> VLM:
    """LLaVA: one view, 16 tokens, the middle of the picture."""
    set_seed(0)
    tokens = tiny_tokenizer()
    image = tokens.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=tiny_vision(),
        text_config=tiny_text(),
        image_token_index=image,
        image_seq_length=16,
    )
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**sizes),
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return VLM(LlavaForConditionalGeneration(config).eval(), processor)


def llava_siglip() -> VLM:
    """LLaVA with a tower that has no class token, as llava-interleave: every feature is taken."""
    set_seed(0)
    tokens = tokenizer("<image>")
    config = LlavaConfig(
        vision_config=_siglip(28, 7),
        text_config=Qwen2Config(**LANGUAGE, vocab_size=len(tokens)),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        tokens,
        patch_size=7,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return VLM(LlavaForConditionalGeneration(config).eval(), processor)


def llava_pixtral() -> VLM:
    """LLaVA with Pixtral's tower: one view of the picture's own shape."""
    set_seed(0)
    tokens = tokenizer("<image>", "<break>")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**vision, image_size=64, patch_size=8, initializer_range=0.2),
        text_config=Qwen2Config(**LANGUAGE, vocab_size=len(tokens)),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    processor = _PixtralPictures(
        PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        tokens,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return VLM(LlavaForConditionalGeneration(config).eval(), processor)


def llava_onevision(
    side: int = 28,
    patch: int = 7,
    tilings: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3)),
) -> VLM:
    """LLaVA-OneVision: the whole picture, and tiles joined, unpadded, with a newline after each row."""
    set_seed(0)
    tokens = tokenizer("<image>", "<video>")
    pinpoints = [[rows * side, columns * side] for rows, columns in tilings]
    config = LlavaOnevisionConfig(
        vision_config=_siglip(side, patch),
        text_config=Qwen2Config(**LANGUAGE, vocab_size=len(tokens)),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    processor = _OnevisionPictures(
        images,
        tokens,
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return VLM(LlavaOnevisionForConditionalGeneration(config).eval(), processor)


def llava_next() -> VLM:
    """LLaVA-NeXT: as LLaVA-OneVision, and without its newline after the whole picture."""
    set_seed(0)
    tokens = tiny_tokenizer()
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        vision_config=tiny_vision(),
        text_config=tiny_text(),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints),
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return VLM(LlavaNextForConditionalGeneration(config).eval(), processor)


def gemma3() -> VLM:
    """Gemma 3: one view, 2 x 2 patches pooled to a token, after a mark that its processor names instead."""
    set_seed(0)
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<soft>"}
    tokens = tokenizer(*marks.values(), **marks)
    config = Gemma3Config(
        vision_config=_siglip(56, 7).to_dict(),
        text_config={
            **LANGUAGE,
            "vocab_size": len(tokens),
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        mm_tokens_per_image=16,
        boi_token_index=tokens.convert_tokens_to_ids(marks["boi_token"]),
        eoi_token_index=tokens.convert_tokens_to_ids(marks["eoi_token"]),
        image_token_index=tokens.convert_tokens_to_ids(marks["image_token"]),
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokens,
        image_seq_length=16,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # made as zeros
    return VLM(model, processor)


def internvl() -> VLM:
    """InternVL: tiles of the picture's own shape and a thumbnail, four patches shuffled into one token."""
    set_seed(0)
    tokens = tokenizer(
        "<IMG_CONTEXT>",
        "<img>",
        "</img>",
        "<video>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    views = {"image_size": [28, 28], "patch_size": [7, 7]}
    config = InternVLConfig(
        vision_config={**vision, **views, "model_type": "internvl_vision"},
        text_config=Qwen2Config(**LANGUAGE, vocab_size=len(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = _InternPictures(
        images, tokens, image_seq_length=4, chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    )
    return VLM(InternVLForConditionalGeneration(config).eval(), processor)


def idefics3() -> VLM:
    """Idefics3, as SmolVLM's first release: tiles between marks of their own, then the whole."""
    set_seed(0)
    places = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokens = tokenizer(*marks, *places)
    config = Idefics3Config(
        vision_config={**_siglip(28, 7).to_dict(), "model_type": "idefics3_vision"},
        text_config=LlamaConfig(**LANGUAGE, vocab_size=len(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=3,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
    template = TEMPLATE.replace("IMAGE", "<image>")
    processor = Idefics3Processor(images, tokens, image_seq_len=4, chat_template=template)
    return VLM(Idefics3ForConditionalGeneration(config).eval(), processor)


def qwen2_5_vl() -> VLM:
    """Qwen2.5-VL: the picture's own shape, 2 x 2 patches to a token, positions in three parts."""
    set_seed(0)
    tokens = _qwen_tokenizer()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    config = Qwen2_5_VLConfig(
        vision_config={
            **vision,
            "patch_size": 7,
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        text_config=_qwen_text("qwen2_5_vl_text", tokens, [2, 2, 2]),
        **_qwen_ids(tokens),
    )
    processor = _Qwen25Pictures(_qwen_images(7), tokens, chat_template=_qwen_template())
    return VLM(Qwen2_5_VLForConditionalGeneration(config).eval(), processor)


def qwen3_vl() -> VLM:
    """Qwen3-VL: as Qwen2.5-VL, and features of the tower's lower layers are added in the LLM's first ones."""
    set_seed(0)
    tokens = _qwen_tokenizer()
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    config = Qwen3VLConfig(
        vision_config={
            **vision,
            "patch_size": 7,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
            "initializer_range": 0.2,
        },
        text_config={**_qwen_text("qwen3_vl_text", tokens, [2, 2, 2]), "head_dim": 12},
        **_qwen_ids(tokens),
    )
    processor = _Qwen3Pictures(_qwen_images(7), tokens, chat_template=_qwen_template())
    return VLM(Qwen3VLForConditionalGeneration(config).eval(), processor)


def foveate_model(method: str) -> VLM:
    """One of Foveate's own."""
    made = tiny_model(method)
    return VLM(made.model, made.processor)


VLMS: dict[str, Callable[[], VLM]] = {
    "llava": llava,
    "llava_siglip": llava_siglip,
    "llava_pixtral": llava_pixtral,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
    "internvl": internvl,
    "idefics3": idefics3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "foveate-llava": lambda: foveate_model("llava"),
    "foveate-anyres": lambda: foveate_model("anyres"),
}


def write(vlm: VLM, folder: Path, tokenizer: bool = True) -> Path:
    """Writes configuration and processor as released models have them, and no weights.

    The tests' processors are written as their own classes, with all that these take.
    """
    vlm.model.config.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    kind = type(vlm.processor)
    kind = kind.__mro__[1] if kind.__name__.startswith("_") else kind
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    for name in signature(kind.__init__).parameters:
        value = vars(vlm.processor).get(name)
        if isinstance(value, int | str) and name != "chat_template":
            values[name] = value
    path.write_text(json.dumps({**values, "processor_class": kind.__name__}))
    for file in () if tokenizer else folder.glob("tokenizer*"):
        file.unlink()
    return folder


def _siglip(side: int, patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
    )


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


def _qwen_ids(tokens: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    return {f"{k}_token_id": tokens.convert_tokens_to_ids(v) for k, v in {**names, **marks}.items()}


def _qwen_text(model_type: str, tokens: PreTrainedTokenizerFast, sections: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    return {**LANGUAGE, "vocab_size": len(tokens), "model_type": model_type, "rope_parameters": rope}


def _qwen_images(patch: int) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    )


def _qwen_template() -> str:
    return TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
