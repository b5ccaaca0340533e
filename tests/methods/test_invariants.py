"""What must hold for every method. Each that is known is tested, and a toy that uses every seam at once.

    pytest tests/methods/test_invariants.py --method NAME --method-option KEY=VALUE

tests one alone, above all that of another package.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn

from foveate import Foveate, FoveateForConditionalGeneration, FoveateProcessor
from foveate.ask.answer import Answer
from foveate.picture.geometry import Box, Size, ViewPlan
from foveate.train.parts import add_adapters, merge_adapters, select
from foveate.train.recipe import DataFile, Lora, Stage
from tests.methods.conftest import LOOKS, READ_LAST, fresh
from tests.support import (
    chat,
    gap,
    greedy,
    largest_gap,
    picture,
    pictures,
    right_padded,
    rows,
    source_of,
)

Tiny = Callable[[str], Foveate]
SIZES = ((60, 100), (200, 90), (33, 33), (448, 57))
QUESTIONS = ("What is it?", "How many?", "Where is the smallest of them?", "Why?")
CLOSE = 1e-4  # float32, logits of up to 10


def prepare(processor: FoveateProcessor, chats: list[Any], **kwargs: Any) -> dict[str, Tensor]:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return dict(processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True}, **kwargs))


def chats() -> list[Any]:
    images = pictures(*SIZES)
    asked = [chat(question, image) for question, image in zip(QUESTIONS, images, strict=True)]
    return [*asked, chat("Which of the two?", images[2], images[0]), chat("No picture?")]


def training_batch(processor: FoveateProcessor) -> dict[str, Tensor]:
    """All chats with an answer that is learnt."""
    answered = [[*c, {"role": "assistant", "content": [{"type": "text", "text": "It is."}]}] for c in chats()]
    batch = prepare(processor, answered)
    image = processor.image_token_id
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == image)
    return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)}


@torch.no_grad()
def test_batch_equals_single(method: str, tiny: Tiny) -> None:
    model, processor = tiny(method).model, tiny(method).processor
    batch = prepare(processor, chats())
    together, answers = rows(model(**batch).logits, batch["attention_mask"]), greedy(model, batch)
    for i, one in enumerate(chats()):
        alone = prepare(processor, [one])
        assert gap(model(**alone).logits[0], together[i]) < CLOSE
        assert greedy(model, alone)[0] == answers[i]


@torch.no_grad()
def test_questions_about_one_picture_are_as_if_each_had_its_own(method: str, tiny: Tiny) -> None:
    """Whether the connector takes them at once or pictures are repeated for it, in any order."""
    model, owners = tiny(method).model, [1, 0, 1, 1]
    images = pictures(*SIZES[:2])
    batch = tiny(method).processor.image_processor(images, return_tensors="pt")
    features, sizes = model.encode_views(batch["pixel_values"]), batch["image_sizes"]
    views = features.split([len(plan.views) for plan in model.plans(sizes)])
    texts, mask = torch.arange(20).view(4, 5) + 7, torch.ones(4, 5, dtype=torch.long)
    mask[2, 3:] = 0
    source, repeated = None, None
    if model.method.reads_source:
        source = source_of(*images)
        source.encode = model.encode_views
        repeated = source.repeated(owners)
    together = model.connect(features, sizes, texts, mask, source, owners)
    apart = model.connect(torch.cat([views[p] for p in owners]), sizes[owners], texts, mask, repeated)
    for ours, theirs in zip(together.pooler_output, apart.pooler_output, strict=True):
        assert gap(ours, theirs) < CLOSE
    assert (together.kept is None) == (apart.kept is None) and together.pictures == apart.pictures == 4
    for ours, theirs in zip(together.kept or [], apart.kept or [], strict=True):
        assert torch.equal(ours, theirs)
    if together.accounts is not None:
        regions = [[account.regions for account in found.accounts] for found in (together, apart)]
        assert regions[0] == regions[1]
    if together.injection is not None:
        hidden = torch.randn(1, sum(len(part) for part in together.pooler_output), 48)
        visual = torch.ones(hidden.shape[:2], dtype=torch.bool)
        for injector in model.connector.injectors().values():
            both = (injector(hidden, found.injection, visual) for found in (together, apart))
            assert gap(*both) < CLOSE


@torch.no_grad()
def test_padding_side_does_not_matter(method: str, tiny: Tiny) -> None:
    model, processor = tiny(method).model, tiny(method).processor
    left = prepare(processor, chats())
    right = right_padded(left)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    expected = rows(model(**left).logits, left["attention_mask"])
    assert largest_gap(rows(model(**right).logits, right["attention_mask"]), expected) < CLOSE


@torch.no_grad()
def test_cached_decoding_equals_one_pass(method: str, tiny: Tiny) -> None:
    """Logits of every decoding step are those of one pass over the finished sequence."""
    model, processor = tiny(method).model, tiny(method).processor
    batch = prepare(processor, chats())
    steps = 6
    out = model.generate(
        **batch,
        do_sample=False,
        min_new_tokens=steps,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=[processor.image_token_id],
    )
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, steps), value=1)
    whole = {**batch, "input_ids": out.sequences, "attention_mask": mask}
    expected = model(**whole).logits[:, -steps - 1 : -1]
    assert gap(torch.stack(out.logits, 1), expected) < CLOSE
    uncached = greedy(model, batch, steps, use_cache=False, suppress_tokens=[processor.image_token_id])
    assert uncached == out.sequences[:, -steps:].tolist()


@torch.no_grad()
def test_processor_count_is_model_count(method: str, tiny: Tiny) -> None:
    model, processor = tiny(method).model, tiny(method).processor
    rng = np.random.default_rng(0)
    sizes = [tuple(int(n) for n in 2 ** rng.uniform(0, 10, 2)) for _ in range(40)]
    sizes += [(1, 1), (1, 1000), (1000, 1), (56, 56), (57, 56), (56, 57), (112, 168)]
    for height, width in sizes:
        image = picture(height, width)
        inputs = processor(images=image, text="<image>", queries=["What?"], return_tensors="pt")
        plan = processor.image_processor.plan(height, width)
        of_pictures = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        visual = model.get_image_features(**of_pictures)
        placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
        counts = {placeholders, plan.tokens, len(visual.pooler_output[0])}
        assert len(counts) == 1, f"{height} x {width}: {counts}"
        assert len(inputs["pixel_values"]) == len(plan.views)
        assert visual.kept is None or visual.kept[0].shape == (plan.tokens,)
        assert model.plans([(height, width)]) == [plan]


@torch.no_grad()
def test_saving_and_loading_changes_no_bit(method: str, tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny(method).model, tiny(method).processor
    tiny(method).save(tmp_path)
    again = FoveateForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor_again = FoveateProcessor.from_pretrained(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    for name in ("method", "options", "vision_feature_layer", "image_token_id", "tie_word_embeddings"):
        assert getattr(again.config, name) == getattr(model.config, name)
    batch, batch_again = prepare(processor, chats()), prepare(processor_again, chats())
    assert batch.keys() == batch_again.keys()
    assert all(torch.equal(batch[key], batch_again[key]) for key in batch)
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert greedy(model, batch) == greedy(again, batch)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def shown(answer: Answer) -> Any:
    """All of an answer but the time that it took."""
    ledger = copy.deepcopy(answer.ledger)
    ledger.seconds.clear()
    chains = [(chain.name, chain.boxes, chain.pixels().tolist()) for chain in answer.chains]
    return answer.text, answer.notes, answer.regions, answer.heat, chains, answer.plan, ledger


@torch.no_grad()
@pytest.mark.parametrize("copied", [pickled, pytest.param(copy.deepcopy, marks=pytest.mark.slow)])
def test_a_copy_answers_alike(method: str, copied: Callable[[Any], Any]) -> None:
    """And with weights of its own, in hooks and remembered functions, too."""
    made = fresh(method)
    image, short = picture(60, 100), {"max_new_tokens": 4}
    talk, batch = made.chat(image), prepare(made.processor, chats())
    answer = talk.ask(QUESTIONS[2], **short)
    logits, written = made.model(**batch).logits, greedy(made.model, batch)
    price = made.engine.pricer.vision(Size(60, 100))
    again, model, processor, planner, talk = copied(
        (made, made.model, made.processor, made.model.method, talk)
    )
    answer_again, pricer = copied(answer), copied(made.engine.pricer)
    assert model is again.model and talk.engine is again.engine
    assert shown(answer_again) == shown(answer)
    assert np.array_equal(np.asarray(answer_again.show()), np.asarray(answer.show()))
    for p in made.model.parameters():
        p.zero_()
    made.model.connector = made.model.method = None
    batch_again = prepare(processor, chats())
    assert all(torch.equal(batch[key], batch_again[key]) for key in batch)
    assert torch.equal(model(**batch_again).logits, logits)
    assert greedy(model, batch_again) == written
    assert [planner.plan(*size) for size in SIZES] == model.plans(SIZES)
    assert pricer.vision(Size(60, 100)) == price
    new = again.chat(image)
    assert shown(new.ask(QUESTIONS[2], **short)) == shown(answer)
    assert shown(new.ask(QUESTIONS[3], **short)) == shown(talk.ask(QUESTIONS[3], **short))


def test_text_alone_does_not_touch_vision(method: str) -> None:
    made = fresh(method)
    model, processor = made.model, made.processor

    def touched(*_: Any) -> None:
        raise AssertionError("vision ran")

    for part in (model.vision_tower, model.connector):
        for module in part.modules():
            module.register_forward_pre_hook(touched)
    batch = prepare(processor, [chat("Why?"), chat("And why is that so?")])
    assert not {"pixel_values", "image_sizes", "query_ids"} & batch.keys()
    assert len(greedy(model, batch)) == 2
    model.train()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None for p in [*model.vision_tower.parameters(), *model.connector.parameters()])
    with pytest.raises(AssertionError, match="vision ran"):
        model(**prepare(processor, chats()))


def test_gradient_reaches_every_parameter(method: str) -> None:
    """Nothing is built that is not used: neither layers after the selected one nor parts of a connector."""
    made = fresh(method)
    model = made.model.train().requires_grad_(True)
    model(**training_batch(made.processor)).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []
    assert sum(p.numel() for p in model.connector.parameters()) > 0


def test_frozen_parts_get_no_gradient(method: str) -> None:
    made = fresh(method)
    model = made.model.train().requires_grad_(False)
    model.connector.requires_grad_(True)
    model(**training_batch(made.processor)).loss.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {f"connector.{name}" for name, _ in model.connector.named_parameters()}


def test_boxes_map_back_exactly(method: str, tiny: Tiny) -> None:
    images = tiny(method).processor.image_processor
    for size in [*SIZES, (1, 1), (1, 300), (997, 1009)]:
        plan = images.plan(*size)
        for i, view in enumerate(plan.views):
            for box in (Box(0, 0, *reversed(view.size)), Box(Fraction(1, 3), 2, Fraction(50, 7), 11)):
                assert plan.to_view(i, plan.to_picture(i, box)) == box
            inside = Box(0, 0, Fraction(size[1], 2), Fraction(size[0], 3))
            assert plan.to_picture(i, plan.to_view(i, inside)) == inside
            region = plan.regions[i]
            assert 0 <= region.left <= region.right <= size[1]
            assert 0 <= region.top <= region.bottom <= size[0]


def covered(plan: ViewPlan, regions: list[Box]) -> bool:
    """Whether the boxes together show the whole picture: one of them holds each cell between their edges."""
    xs = {Fraction(0), Fraction(plan.picture.width), *(x for r in regions for x in (r.left, r.right))}
    ys = {Fraction(0), Fraction(plan.picture.height), *(y for r in regions for y in (r.top, r.bottom))}
    cells = [((a + b) / 2, (c + d) / 2) for a, b in pairwise(sorted(xs)) for c, d in pairwise(sorted(ys))]
    return all(any(r.left <= x <= r.right and r.top <= y <= r.bottom for r in regions) for x, y in cells)


def test_views_cover_the_picture(method: str, tiny: Tiny) -> None:
    images = tiny(method).processor.image_processor
    for size in [*SIZES, (1, 1), (1, 300), (997, 1009), (56, 56)]:
        plan = images.plan(*size)
        assert plan.picture == Size(*size)
        assert covered(plan, list(plan.regions))
        tiles = [region for view, region in zip(plan.views, plan.regions, strict=True) if view.role == "tile"]
        assert not tiles or covered(plan, tiles)
        if tiles:  # and the check is one: without any tile something is missing
            largest = max(range(len(tiles)), key=lambda i: tiles[i].width * tiles[i].height)
            assert not covered(plan, tiles[:largest] + tiles[largest + 1 :])


def files(folder: Path) -> dict[str, Path]:
    """The same scene in the formats that pictures come in."""
    made = {}
    steps = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    scene = Image.fromarray(np.kron(steps, np.ones((9, 9), np.uint8)))
    colour = Image.merge("RGB", (scene, scene.rotate(180), scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the camera was held upright
    alpha = Image.linear_gradient("L").resize(colour.size)
    deep = Image.fromarray(np.asarray(scene).astype(np.uint16) * 257)
    for name, image, options in (
        ("rgb.png", colour, {}),
        ("rotated.jpg", colour, {"exif": rotated}),
        ("alpha.png", Image.merge("RGBA", (*colour.split(), alpha)), {}),
        ("grey.png", scene, {}),
        ("grey_alpha.png", Image.merge("LA", (scene, alpha)), {}),
        ("deep.png", deep, {}),
        ("palette.png", colour.quantize(16), {}),
        ("transparent_palette.png", colour.quantize(16), {"transparency": 3}),
        ("bits.png", scene.convert("1"), {}),
        ("cmyk.jpg", colour.convert("CMYK"), {}),
        ("moving.gif", colour, {"save_all": True, "append_images": [colour.rotate(180)]}),
    ):
        made[name] = folder / name
        image.save(folder / name, **options)
    return made


def test_every_way_to_give_a_picture(method: str, tiny: Tiny, tmp_path: Path) -> None:
    images = tiny(method).processor.image_processor
    for name, path in files(tmp_path).items():
        expected = images(str(path))
        data = path.read_bytes()
        ways = {"path": path, "bytes": data, "PIL": Image.open(path), "stream": Image.open(io.BytesIO(data))}
        if name in ("rgb.png", "alpha.png", "grey.png", "deep.png"):
            ways["array"] = np.asarray(Image.open(path))
        if name == "rgb.png":
            pixels = np.asarray(Image.open(path))
            ways |= {"channels first": pixels.transpose(2, 0, 1), "floats": pixels.astype(np.float32) / 255}
        for way, given in ways.items():
            got = images(given)
            assert torch.equal(got["image_sizes"], expected["image_sizes"]), f"{name} as {way}"
            assert torch.equal(got["pixel_values"], expected["pixel_values"]), f"{name} as {way}"
    assert images(str(tmp_path / "rotated.jpg"))["image_sizes"].tolist() == [[72, 54]]
    assert images(str(tmp_path / "rgb.png"))["image_sizes"].tolist() == [[54, 72]]
    assert torch.equal(
        images(str(tmp_path / "deep.png"))["pixel_values"], images(str(tmp_path / "grey.png"))["pixel_values"]
    )


def test_pictures_in_messages(method: str, tiny: Tiny, tmp_path: Path) -> None:
    processor = tiny(method).processor
    image = picture(40, 70)
    image.save(tmp_path / "it.png")
    expected = prepare(processor, [chat("What?", image)])
    for part in (
        {"type": "image", "image": str(tmp_path / "it.png")},
        {"type": "image", "path": str(tmp_path / "it.png")},
        {"type": "image", "url": str(tmp_path / "it.png")},
        {"type": "image", "image": np.asarray(image)},
    ):
        given = [[{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]]
        got = prepare(processor, given)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@torch.no_grad()
def test_bfloat16(method: str, tiny: Tiny) -> None:
    made = tiny(method)
    model = copy.deepcopy(made.model).to(torch.bfloat16)
    batch = prepare(made.processor, chats()[:3])
    expected, got = made.model(**batch).logits, model(**batch).logits
    assert got.dtype == torch.bfloat16
    assert torch.isfinite(got).all()
    seen = batch["attention_mask"].bool()
    together = torch.stack([expected[seen].flatten(), got[seen].float().flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.98
    assert len(greedy(model, batch)) == 3


@torch.no_grad()
def test_one_call_of_the_tower_for_all_views(method: str) -> None:
    made = fresh(method)
    called: dict[nn.Module, int] = {}

    def count(module: nn.Module, *_: Any) -> None:
        called[module] = called.get(module, 0) + 1

    for module in made.model.vision_tower.modules():
        module.register_forward_hook(count)
    batch = prepare(made.processor, chats())
    for run in (lambda: made.model(**batch), lambda: greedy(made.model, batch)):
        called.clear()
        run()
        again = LOOKS.get(method, 0)
        assert called[made.model.vision_tower] >= 1 + min(again, 1)
        if method in LOOKS or not made.model.method.reads_source:
            assert called[made.model.vision_tower] <= 1 + again
        with_weights = [m for m in made.model.vision_tower.modules() if list(m.parameters(recurse=False))]
        read_as_tensors = [m for m in with_weights if isinstance(m, nn.Embedding)]
        assert [m for m in with_weights if m not in called and m not in read_as_tensors] == []


def test_no_layer_behind_the_selected_one(method: str, tiny: Tiny) -> None:
    model = tiny(method).model
    config = model.config.vision_config
    layers = [m for m in model.vision_tower.modules() if type(m).__name__ == "CLIPEncoderLayer"]
    assert len(layers) == config.num_hidden_layers - (method not in READ_LAST)
    assert not any("post_layernorm" in name for name, _ in model.vision_tower.named_parameters())


def test_adapters_on_every_linear_layer_learn_and_merge(method: str) -> None:
    """A layer that is read instead of called has an adapter without a gradient, and other merged outputs."""
    model, processor = fresh(method).model, fresh(method).processor
    batch = training_batch(processor)
    stage = Stage(
        trains=[],
        data=[DataFile("x.json")],
        lr=1e-3,
        lora=Lora(on=["vision_tower", "connector", "language_model"], rank=2, alpha=2.0, dropout=0.0),
    )
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    add_adapters(model, stage, "s")
    select(model, stage, "s")
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * linear and all(p.requires_grad for p in adapters.values())
    torch.manual_seed(0)
    for name, p in adapters.items():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    model(**batch).loss.backward()
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        adapted = model(**batch).logits
        merge_adapters(model)
        assert not [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert gap(model(**batch).logits, adapted) < CLOSE


class Rounded(nn.Linear):
    """A linear layer of 8-bit weights, which only its own `forward` can read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias
        del self.in_features, self.out_features

    def real(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.real().to(x), self.bias)


@torch.no_grad()
def test_linear_layers_may_be_quantised(method: str) -> None:
    """The same outputs as with the rounded weights in ordinary layers."""
    made = fresh(method)
    batch = prepare(made.processor, chats())
    expected = copy.deepcopy(made.model)
    for name, layer in list(made.model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            rounded = Rounded(layer)
            setattr(made.model.get_submodule(parent), child, rounded)
            expected.get_submodule(name).weight.copy_(rounded.real())
    assert gap(made.model(**batch).logits, expected(**batch).logits) < CLOSE
    assert greedy(made.model, batch) == greedy(expected, batch)
