"""Same numbers as transformers' own LLaVA classes, on the same weights read from both layouts in the wild."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil as ClipImageProcessor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)

from foveate import FoveateForConditionalGeneration, FoveateProcessor
from foveate.methods.anyres import AnyRes, token_sources
from foveate.methods.base import TowerGeometry
from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision
from tests.parity.golden import Measure
from tests.support import chat, gap, greedy, largest_gap, pictures, right_padded, rows

TINY_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
REAL_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SIZES = ((60, 100), (200, 90), (33, 33), (56, 56), (448, 57))


@dataclass
class Pair:
    """The same weights in transformers' class and, loaded from a folder, in ours."""

    theirs: Any
    their_processor: Any
    ours: FoveateForConditionalGeneration
    our_processor: FoveateProcessor
    folder: Path


def theirs(kind: str) -> tuple[Any, Any]:
    """transformers' own model and processor at random weights: `crop` and `pad` are LLaVA-1.5."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    set_seed(1)
    parts = {
        "vision_config": tiny_vision(),
        "text_config": tiny_text(),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    common = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE,
    }
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    if kind == "next":
        config = LlavaNextConfig(**parts, image_grid_pinpoints=TINY_PINPOINTS)
        images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=TINY_PINPOINTS)
        return LlavaNextForConditionalGeneration(config).eval(), LlavaNextProcessor(
            images, tokenizer, **common
        )
    images = LlavaImageProcessorPil(**size, do_pad=True) if kind == "pad" else ClipImageProcessor(**size)
    config = LlavaConfig(**parts, image_seq_length=16)
    return LlavaForConditionalGeneration(config).eval(), LlavaProcessor(images, tokenizer, **common)


def as_released_by_4(folder: Path) -> None:
    """Rewrites a folder as the hub's llava-hf folders are: transformers 4's key names and file names."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        key.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
        for key, tensor in tensors.items()
    }
    half = len(renamed) // 2  # in two shards, as they come
    shards = {"model-00001-of-00002.safetensors": list(renamed)[:half]}
    shards["model-00002-of-00002.safetensors"] = list(renamed)[half:]
    for name, keys in shards.items():
        save_file({key: renamed[key] for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    processor = json.loads((folder / "processor_config.json").read_text())
    images = processor.pop("image_processor")
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


@pytest.fixture(
    scope="module",
    params=[(k, v) for k in ("crop", "pad", "next") for v in (5, 4)],
    ids="{0[0]}-v{0[1]}".format,
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    kind, version = request.param
    model, processor = theirs(kind)
    folder = tmp_path_factory.mktemp(f"{kind}{version}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if version == 4:
        as_released_by_4(folder)
    ours = FoveateForConditionalGeneration.from_pretrained(folder).eval()
    yield Pair(model, processor, ours, FoveateProcessor.from_pretrained(folder), folder)


def prompts(count: int) -> list[str]:
    return [f"USER: <image>\nWhat {'x' * 3 * i} is it? ASSISTANT:" for i in range(count)]


def both(pair: Pair, images: Any, text: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    given = {"images": images, "text": text, "padding": True, "return_tensors": "pt", **kwargs}
    a, b = pair.their_processor(**given), pair.our_processor(**given)
    assert a["input_ids"].tolist() == b["input_ids"].tolist()
    assert a["attention_mask"].tolist() == b["attention_mask"].tolist()
    return dict(a), dict(b)


def views(pixels: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """transformers pads each picture's views to the most of the batch, (P, most, 3, h, w) -> (V, 3, h, w)."""
    if pixels.ndim == 4:
        return pixels
    return torch.cat([picture[:count] for picture, count in zip(pixels, counts, strict=True)])


@torch.no_grad()
def test_batch_of_mixed_sizes(pair: Pair, measure: Measure) -> None:
    a, b = both(pair, pictures(*SIZES), prompts(len(SIZES)))
    counts = [len(plan.views) for plan in pair.ours.plans(b["image_sizes"])]
    measure("pixels", gap(views(a["pixel_values"], counts), b["pixel_values"]), 0.0)
    mask = a["attention_mask"]
    measure(
        "logits", largest_gap(rows(pair.theirs(**a).logits, mask), rows(pair.ours(**b).logits, mask)), 1e-5
    )
    assert greedy(pair.theirs, a) == greedy(pair.ours, b)


@torch.no_grad()
def test_right_padding(pair: Pair) -> None:
    a, b = both(pair, pictures(*SIZES), prompts(len(SIZES)))
    a, b = right_padded(a), right_padded(b)
    mask = a["attention_mask"]
    assert mask[:, 0].all() and not mask[:, -1].all()
    assert largest_gap(rows(pair.theirs(**a).logits, mask), rows(pair.ours(**b).logits, mask)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_each_size_alone(pair: Pair, index: int) -> None:
    a, b = both(pair, [pictures(*SIZES)[index]], [prompts(len(SIZES))[index]])
    assert gap(pair.theirs(**a).logits, pair.ours(**b).logits) < 1e-5
    assert greedy(pair.theirs, a) == greedy(pair.ours, b)


@torch.no_grad()
def test_several_pictures_in_one_prompt(pair: Pair) -> None:
    text = ["USER: <image>\n<image>\nCompare them. ASSISTANT:", "USER: Only <image> one. ASSISTANT:"]
    a, b = both(pair, [pictures(*SIZES[:2]), pictures(SIZES[4])], text)
    mask = a["attention_mask"]
    assert largest_gap(rows(pair.theirs(**a).logits, mask), rows(pair.ours(**b).logits, mask)) < 1e-5
    assert greedy(pair.theirs, a) == greedy(pair.ours, b)


@torch.no_grad()
def test_text_only(pair: Pair) -> None:
    a, b = both(pair, None, ["USER: Say something. ASSISTANT:", "USER: More. ASSISTANT:"])
    mask = a["attention_mask"]
    assert largest_gap(rows(pair.theirs(**a).logits, mask), rows(pair.ours(**b).logits, mask)) < 1e-5


def test_beams_and_several_answers(pair: Pair) -> None:
    a, b = both(pair, pictures(*SIZES[:3]), prompts(3))
    for kwargs in (
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        set_seed(3)
        x = pair.theirs.generate(**a, max_new_tokens=8, **kwargs)
        set_seed(3)
        y = pair.ours.generate(**b, max_new_tokens=8, **kwargs)
        assert x.tolist() == y.tolist(), kwargs
        assert len(y) == 3 * kwargs.get("num_return_sequences", 1)


@torch.no_grad()
def test_loss(pair: Pair) -> None:
    a, b = both(pair, pictures(*SIZES), prompts(len(SIZES)))
    labels = a["input_ids"].masked_fill(a["attention_mask"] == 0, -100)
    x, y = pair.theirs(**a, labels=labels).loss, pair.ours(**b, labels=labels).loss
    assert abs(float(x) - float(y)) < 1e-5


@torch.no_grad()
def test_pictures_encoded_before(pair: Pair) -> None:
    _, b = both(pair, pictures(*SIZES[:2]), prompts(2))
    raw = pair.ours(**b).logits
    names = ("pixel_values", "image_sizes")
    encoded = pair.ours.get_image_features(**{name: b[name] for name in names})
    rest = {name: value for name, value in b.items() if name not in names}
    given = {**rest, "mm_encoder_outputs": {"image": encoded}}
    assert gap(pair.ours(**given).logits, raw) == 0.0
    assert greedy(pair.ours, given) == greedy(pair.ours, b)


def test_streaming(pair: Pair) -> None:
    a, b = both(pair, pictures(SIZES[1]), prompts(1))
    tokenizer = pair.our_processor.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = {**b, "streamer": streamer, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    thread = Thread(target=pair.ours.generate, kwargs=arguments)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(greedy(pair.theirs, a)[0])


def test_pipeline(pair: Pair) -> None:
    chats = [chat(f"What {'x' * i} is it?", image) for i, image in enumerate(pictures(*SIZES[:4]))]

    def answers(model: Any, processor: Any, **kwargs: Any) -> list[str]:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        options = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 6}}
        return [answer[0]["generated_text"] for answer in pipe(chats, **options, **kwargs)]

    expected = answers(pair.theirs, pair.their_processor)
    assert len(set(expected)) > 1
    assert answers(pair.ours, pair.our_processor) == expected
    # transformers' own AnyRes cannot be batched here where pictures have different numbers of views; ours can
    assert answers(pair.ours, pair.our_processor, batch_size=2) == expected


def test_pipeline_from_a_folder(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save_pretrained(tmp_path)
    pair.our_processor.save_pretrained(tmp_path)
    message = chat("What is it?", pictures(SIZES[0])[0])
    options = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 6}}
    given = pipeline("image-text-to-text", model=pair.theirs, processor=pair.their_processor)(
        message, **options
    )
    ours = pipeline("image-text-to-text", model=str(tmp_path))(message, **options)
    assert ours[0]["generated_text"] == given[0]["generated_text"]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (2, 3000), (57, 1)], ids=str)
def test_extreme_sizes(pair: Pair, size: tuple[int, int]) -> None:
    """A line of pixels is not an error; if its tiles keep no row of tokens, the global view remains."""
    a, b = both(pair, pictures(size), prompts(1))
    assert gap(a["pixel_values"].flatten(0, -4), b["pixel_values"]) == 0.0
    assert gap(pair.theirs(**a).logits, pair.ours(**b).logits) < 1e-5


# The count of AnyRes tokens, at the sizes of the released models.


def real_anyres() -> AnyRes:
    return AnyRes(TowerGeometry(336, 14))


@pytest.fixture(scope="module")
def real_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, image_grid_pinpoints=REAL_PINPOINTS)
    return LlavaNextProcessor(
        images,
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module")
def real_geometry() -> LlavaNextForConditionalGeneration:
    """transformers' model with views of 336 pixels and patches of 14, but thin."""
    vision = tiny_vision(
        image_size=336, hidden_size=4, intermediate_size=4, num_attention_heads=1, num_hidden_layers=1
    )
    text = tiny_text(
        hidden_size=4, intermediate_size=4, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1
    )
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=REAL_PINPOINTS)
    return LlavaNextForConditionalGeneration(config).eval()


def random_sizes(count: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(0)
    exponents = (
        torch.rand(count, 2, generator=generator) * 7 + 4
    )  # 16 to 2048 pixels, evenly in the logarithm
    return [tuple(int(n) for n in row) for row in (2**exponents).tolist()]


def test_token_counts_of_200_random_sizes(real_processor: LlavaNextProcessor) -> None:
    sizes = random_sizes(200)
    counted = real_processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    planned = [real_anyres().plan(*size).tokens for size in sizes]
    assert planned == counted
    assert len({tuple(real_anyres().plan(*size).tiles) for size in sizes}) == 5


@torch.no_grad()
def test_features_of_200_random_sizes(real_geometry: LlavaNextForConditionalGeneration) -> None:
    """Not only the count: the rows that transformers' model packs are those that the plan orders."""
    model, method = real_geometry.model, real_anyres()
    for size in random_sizes(200):
        plan = method.plan(*size)
        features = torch.arange(len(plan.views) * 576, dtype=torch.float32).view(-1, 576, 1).expand(-1, -1, 4)
        packed, _ = model.pack_image_features(
            [features], torch.tensor([size]), "default", image_newline=torch.full((4,), -1.0)
        )
        assert packed[0][:, 0].long().tolist() == token_sources(plan, method.tower.grid).tolist(), size
        assert len(packed[0]) == plan.tokens


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5000), st.integers(1, 5000))
@example(1, 4000)
@example(4000, 1)
@example(1, 1)
@example(1, 100_000)
def test_token_counts_of_extreme_sizes(real_processor: LlavaNextProcessor, height: int, width: int) -> None:
    """transformers' formula holds to the end: a line may keep no tile tokens, never no global view."""
    counted = real_processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    assert real_anyres().plan(height, width).tokens == counted >= 576
