"""SliME: what the tests of all methods do not ask."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

import foveate
from foveate import Foveate, FoveateError, FoveateForConditionalGeneration
from foveate.composing import compose
from foveate.data.dataset import Collator, encode
from foveate.data.toy import write_toy_data
from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.slime import Slime
from foveate.model.cost import reference_config, shared_pricer
from foveate.model.text import chat_template
from foveate.picture.geometry import Size
from foveate.shipped import find
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.train.models import typed
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.upstream import CACHE
from tests.methods.conftest import fresh
from tests.methods.slime_release import released_names, write_release
from tests.methods.test_invariants import CLOSE, prepare
from tests.methods.test_seams import VISION, calls
from tests.support import chat, gap, greedy, picture
from tests.train.support import stage, write_recipe

PAPER = TowerGeometry(336, 14)


def made(**options: Any) -> Foveate:
    """A tiny model whose similarities differ enough for gamma to matter."""
    return tiny_model("slime", {"temperature": 4.0, **options})


def encoded(model: Any, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model.get_image_features(**{name: batch[name] for name in VISION if name in batch})


# Dropped tokens.


@torch.no_grad()
def test_a_smaller_gamma_makes_prefill_and_cache_shorter() -> None:
    lengths = []
    for gamma in (1.0, 0.75, 0.5):
        m = made(gamma=gamma)
        batch = prepare(m.processor, [chat("What is it?", picture(112, 168))])
        kept = encoded(m.model, batch).kept
        left = batch["input_ids"].shape[1] - (0 if kept is None else int((~kept[0]).sum()))
        with calls(m.model.language_model) as seen:
            out = m.model.generate(**batch, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        assert seen[0]["inputs_embeds"].shape[1] == left
        assert out[CACHE].get_seq_length() == left + 2
        lengths.append(left)
    assert lengths[0] > lengths[1] > lengths[2]


@torch.no_grad()
def test_short_form_is_the_masked_form() -> None:
    """Greedy text against whole passes in which dropped tokens are only masked; logits at every step."""
    m = made(gamma=0.6)
    image = m.processor.image_token_id
    batch = prepare(m.processor, [chat("What?", picture(100, 160)), chat("And how many?", picture(60, 60))])
    assert all(int((~kept).sum()) > 0 for kept in encoded(m.model, batch).kept)
    quiet = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "suppress_tokens": [image]}
    out = m.model.generate(**batch, **quiet, return_dict_in_generate=True, output_logits=True)
    whole = dict(batch)
    for step in range(6):
        logits = m.model(**whole).logits[:, -1]
        assert gap(out.logits[step], logits) < CLOSE
        logits[:, [image, m.processor.tokenizer.eos_token_id]] = -torch.inf
        best = logits.argmax(-1, keepdim=True)
        whole["input_ids"] = torch.cat([whole["input_ids"], best], 1)
        whole["attention_mask"] = torch.cat([whole["attention_mask"], torch.ones_like(best)], 1)
    assert out.sequences.tolist() == whole["input_ids"].tolist()


@torch.no_grad()
def test_at_least_one_local_token_is_kept_and_never_nan() -> None:
    m = made(gamma=1e-9, temperature=1e-3)
    for size in ((1, 1), (1, 5000), (5000, 1), (60, 100)):
        batch = prepare(m.processor, [chat("Which?", picture(*size))])
        out = encoded(m.model, batch)
        assert torch.isfinite(out.pooler_output[0]).all()
        assert int(out.kept[0][17:].sum()) == 1  # after 16 global tokens and the separator
        assert torch.isfinite(m.model(**batch).logits).all()


@torch.no_grad()
def test_a_question_without_tokens_drops_nothing() -> None:
    m = made(gamma=0.5, router_text="question")
    empty, said = (m.processor(images=[picture(60, 100)], text="<image>", queries=[q]) for q in ("", "What?"))
    inputs = {name: torch.as_tensor(said[name]) for name in ("pixel_values", "image_sizes")}
    nothing = {"query_ids": torch.zeros(1, 3, dtype=torch.long), "query_mask": torch.zeros(1, 3)}
    assert encoded(m.model, {**inputs, **nothing}).kept[0].all()
    assert m.model.get_image_features(**inputs).kept is None
    assert empty["query_mask"].sum() == 0
    assert encoded(m.model, {**inputs, **{k: empty[k] for k in nothing}}).kept[0].all()
    assert not encoded(m.model, {**inputs, **{k: said[k] for k in nothing}}).kept[0].all()


# A bound on the visual tokens.


@torch.no_grad()
def test_a_bound_keeps_the_tokens_that_matter_most() -> None:
    image = picture(112, 168)
    whole = made(gamma=1.0 - 1e-6)
    batch = prepare(whole.processor, [chat("What is it?", image)])
    plan = whole.plan(image)
    (tokens,), (account,) = (getattr(encoded(whole.model, batch), n) for n in ("pooler_output", "accounts"))
    heat = torch.tensor([weight for _, weight in account.heat()])
    assert plan.tokens == 16 + 1 + 6 * 4
    for bound in (41, 30, 18):
        m = made(gamma=1.0 - 1e-6, max_visual_tokens=bound)
        m.model.load_state_dict(whole.model.state_dict())
        assert m.plan(image).tokens == bound
        batch = prepare(m.processor, [chat("What is it?", image)])
        assert int((batch["input_ids"] == m.processor.image_token_id).sum()) == bound
        best = heat.argsort(descending=True)[: bound - 17].sort().values
        expected = torch.cat([tokens[:17], tokens[17:][best]])
        assert gap(encoded(m.model, batch).pooler_output[0], expected) < 1e-5
    with pytest.raises(FoveateError, match="SliME needs at least 18 visual tokens"):
        made(max_visual_tokens=17).plan(image)


@torch.no_grad()
def test_without_a_question_a_bound_spreads_evenly() -> None:
    m, whole = made(max_visual_tokens=17 + 8), made()
    inputs = dict(m.processor(images=[picture(112, 168)], text="<image>", return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    some, every = (x.model.get_image_features(**inputs).pooler_output[0] for x in (m, whole))
    assert torch.equal(some[17:], every[17:][::3])


@torch.no_grad()
def test_a_bound_in_a_batch() -> None:
    """One picture is cut, one is not, one has no question."""
    m = made(max_visual_tokens=30, gamma=0.9)
    images = [picture(112, 168), picture(60, 60), picture(112, 168, seed=1)]
    batch = prepare(m.processor, [chat("What?", image) for image in images])
    batch["query_mask"][2] = 0
    together = encoded(m.model, batch)
    for i, image in enumerate(images):
        one = prepare(m.processor, [chat("What?", image)])
        one["query_mask"] *= i != 2
        alone = encoded(m.model, one)
        assert gap(together.pooler_output[i], alone.pooler_output[0]) < 1e-5
        assert torch.equal(together.kept[i], alone.kept[0])


# Either half alone.


@torch.no_grad()
def test_global_and_local_tokens_alone() -> None:
    both = made(gamma=1.0)
    image = picture(112, 168)
    batch = prepare(both.processor, [chat("What?", image)])
    tokens = encoded(both.model, batch).pooler_output[0]
    for option, part, views in (
        ("use_global_only", tokens[:16], 1),
        ("use_local_only", tokens[17:], 6),
    ):
        m = made(gamma=1.0, **{option: True})
        m.model.load_state_dict(both.model.state_dict())
        batch = prepare(m.processor, [chat("What?", image)])
        assert len(batch["pixel_values"]) == views
        assert gap(encoded(m.model, batch).pooler_output[0], part) < 1e-5
        assert len(m.ask(image, "What?", max_new_tokens=3).regions) == views
    comma = both.processor.tokenizer(",", add_special_tokens=False)["input_ids"]
    assert torch.equal(tokens[16], both.model.get_input_embeddings().weight[comma[-1]])


def test_the_separator_trains_as_the_comma() -> None:
    m = made()
    batch = prepare(m.processor, [chat("What", picture(60, 100))])
    torch.cat(m.model.get_image_features(**{n: batch[n] for n in VISION}).pooler_output)[16].sum().backward()
    rows = m.model.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert rows == m.processor.tokenizer(",", add_special_tokens=False)["input_ids"]


def test_a_model_without_a_comma_says_so() -> None:
    m = made()
    m.model.config.separator_token_id = None
    with pytest.raises(FoveateError, match="separator_token_id None is not a token of the LLM"):
        m.ask(picture(9, 9), "What?")


# Noise.


@torch.no_grad()
def test_noise_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind by itself: switched on it changes the visual tokens or which are kept, in training only."""
    image = picture(112, 168)
    for kind, noise, options in (("gate", 0.0, {}), ("router", 3.0, {"experts": "mlp"})):
        monkeypatch.setattr("foveate.methods.slime.ROUTER_NOISE", noise)
        m = made(gamma=0.5, **options)
        m.model.connector.adapter.gate.normal_()
        batch = prepare(m.processor, [chat("What?", image)])
        for training in (False, True):
            m.model.train(training)
            torch.manual_seed(0)
            one, other = (encoded(m.model, batch) for _ in range(2))
            same_tokens = torch.equal(one.pooler_output[0], other.pooler_output[0])
            same_kept = torch.equal(one.kept[0], other.kept[0])
            assert same_tokens == (not training or kind != "gate")
            assert same_kept == (not training or kind != "router")


# What the router reads.


@pytest.mark.parametrize("reads", ["question", "prompt", "sequence"])
def test_what_the_router_reads(reads: str) -> None:
    """The answer only where the authors' training is asked for; never more than the text."""
    m = made(router_text=reads)
    tokenizer, image = m.processor.tokenizer, picture(60, 100)
    texts = []
    for answer in ("Yes.", "A secret!"):
        messages = [
            *chat("Is it?", image),
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        item = encode(m.processor, messages)
        texts.append(tokenizer.decode(item["query_ids"][0]))
        assert m.processor.image_token_id not in item["query_ids"]
    if reads == "question":
        assert texts == ["Is it?", "Is it?"]
    if reads == "prompt":
        assert texts[0] == texts[1]
        assert texts[0].endswith("Is it? ASSISTANT:")
        assert texts[0].startswith("<s>A chat between")
    if reads == "sequence":
        assert "Yes." in texts[0]
        assert "A secret!" in texts[1]
    items = [
        encode(
            m.processor, [*chat(q, image), {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
        )
        for q in ("Is it?", "Or is it not?")
    ]
    batch = Collator(tokenizer.pad_token_id)(items)
    assert batch["query_ids"].shape == batch["query_mask"].shape == (2, int(batch["query_mask"].sum(1).max()))


@pytest.mark.parametrize("template", ["vicuna_v1", "llama3", "mistral", "chatml"])
def test_texts_with_answers_read_as_training_does(template: str) -> None:
    """As other trainers make their inputs: the template first, then the processor."""
    m = made(router_text="prompt")
    m.processor.chat_template = chat_template(template)
    image = picture(60, 100)
    says = ("Yes.", "A secret, isn't it?")
    samples = [
        [
            *chat("Is it?", image),
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "I am."},
        ][:n]
        for answer in says
        for n in (2, 4)
    ]
    texts = m.processor.apply_chat_template(samples)
    starts = {text.startswith(m.processor.tokenizer.bos_token) for text in texts}
    for add in {True, False} - starts or {False}:
        inputs = m.processor(
            images=[image] * 4, text=texts, padding=True, return_tensors="pt", add_special_tokens=add
        )
    for row, (ids, mask) in enumerate(zip(inputs["query_ids"], inputs["query_mask"], strict=True)):
        item = encode(m.processor, samples[row])
        assert ids[mask.bool()].tolist() == item["query_ids"][0].tolist()
    assert torch.equal(inputs["query_ids"][:2], inputs["query_ids"][2:])  # whatever was answered


@torch.no_grad()
def test_asking_reads_the_same_text_as_a_batch() -> None:
    """`ask` finds the text by another way than the processor; both see the same tokens."""
    for reads in ("question", "prompt"):
        m = made(router_text=reads, gamma=0.5)
        seen: list[Query] = []
        hook = m.model.connector.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[2]))
        image = picture(60, 100)
        batch = prepare(m.processor, [chat("What is it?", image)])
        m.model(**batch)
        answer = m.ask(image, "What is it?", max_new_tokens=4)
        hook.remove()
        assert torch.equal(seen[0].embeds, seen[1].embeds)
        kept = encoded(m.model, batch).kept[0]
        assert answer.ledger.visual_tokens == int(kept.sum()) < len(kept)


@torch.no_grad()
def test_two_pictures_of_one_sample_share_its_text() -> None:
    m = made()
    batch = prepare(
        m.processor, [chat("Which?", picture(9, 9), picture(60, 90)), chat("Why so?", picture(9, 9))]
    )
    ids = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["query_ids"], batch["query_mask"], strict=True)
    ]
    assert ids[0] == ids[1] != ids[2]


# Views.


def test_a_small_picture_is_blown_up() -> None:
    assert len(Slime(PAPER).plan(336, 336).views) == 3
    assert Slime(PAPER).plan(300, 400).canvases[1].content.height == 336


@pytest.mark.parametrize(
    ("queries", "tokens"),
    [(64, 577 + 6 * 64), (144, 577 + 6 * 144), (196, 577 + 6 * 196), (None, 577 + 6 * 144)],
)
def test_queries_per_tile(queries: int | None, tokens: int) -> None:
    assert Slime(PAPER, {"queries": queries}).plan(3000, 4000).tokens == tokens


def test_the_paper_slices_finer() -> None:
    plan = Slime(PAPER, {"grids": "paper"}).plan(2016, 2016)
    assert plan.tiles == Size(6, 6)
    assert plan.to_picture(0, (0, 0, 336, 336)) == (0, 0, 2016, 2016)
    wide = Slime(PAPER).plan(100, 200)
    assert wide.to_picture(0, (0, 0, 336, 336)) == (0, 0, 200, 100)


def test_it_scales_down() -> None:
    """A tower of 48 pixels and 36 tokens: 3 x 3 queries a tile, and grids of any size."""
    small = TowerGeometry(48, 8)
    assert Slime(small).side == 3
    plan = Slime(small, Slime.options_for(3)).plan(144, 144)
    assert plan.tiles == Size(3, 3)
    assert plan.tokens == 36 + 1 + 9 * 9
    assert Slime(small, {"queries": 4, "grid_limit": 3}).plan(96, 96).tokens == 36 + 1 + 4 * 4
    connector = Slime(small, {"heads": 2}).build_connector(Widths(32, 48))
    assert connector.compressor.heads == 2


# Options that are wrong, and pictures that are odd.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma must be above 0 and at most 1, not 0.0"),
        ({"gamma": 1.01}, "gamma must be above 0 and at most 1"),
        ({"gamma": -1}, "gamma must be above 0"),
        ({"gamma": float("nan")}, "gamma: expected number"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"queries": 143}, "queries must be a square number"),
        ({"queries": 0}, "queries must be a square number"),
        ({"queries": 625}, "queries 625 are more than the tower's 576 tokens"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"grid_limit": 1}, "grid_limit must be at least 2 with grids authors"),
        ({"grids": "paper", "grid_limit": 0}, "grid_limit must be at least 1 with grids paper"),
        ({"grids": "uhd"}, "'uhd' is not one of authors, paper"),
        ({"use_global_only": True, "use_local_only": True}, "exclude each other"),
        ({"router_text": "answer"}, "'answer' is not one of question, prompt, sequence"),
        ({"max_visual_tokens": 0}, "max_visual_tokens must be at least 1"),
        ({"gama": 0.5}, "did you mean 'gamma'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Slime(PAPER, options)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(FoveateError, match="heads 3 and 4 must divide the vision tower's width 32"):
        tiny_model("slime", {"heads": 3})


def test_odd_pictures(tmp_path: Path) -> None:
    """Formats with surprises, and shapes: an answer each, from a plan that covers the picture."""
    m = made(gamma=0.5)
    colour = picture(40, 60)
    files = {"cmyk.jpg": colour.convert("CMYK"), "palette.png": colour.quantize(8), "gif.gif": colour}
    files["deep.png"] = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    for name, image in files.items():
        more = {"save_all": True, "append_images": [colour.rotate(90)]} if name == "gif.gif" else {}
        image.save(tmp_path / name, **({"transparency": 3} if name == "palette.png" else {}), **more)
    for name in files:
        assert m.ask(tmp_path / name, "What?", max_new_tokens=2).ledger.visual_tokens > 17
    for size in ((1, 1), (1, 5000), (5000, 1)):
        answer = m.ask(picture(*size), "What?", max_new_tokens=2)
        assert 17 < answer.ledger.visual_tokens < m.plan(picture(*size)).tokens


# What the drawing and the price show.


def test_the_heat_lies_where_tokens_were_kept(tmp_path: Path) -> None:
    m = made(gamma=0.5)
    image = picture(112, 168)
    answer = m.ask(image, "What?", max_new_tokens=2)
    kept = encoded(m.model, prepare(m.processor, [chat("What?", image)])).kept[0]
    assert [weight > 0 for _, weight in answer.heat] == kept[17:].tolist()
    assert max(weight for _, weight in answer.heat) == 1
    corner = answer.heat[0][0], answer.heat[-1][0]
    assert [box.rounded() for box in corner] == [(0, 0, 28, 28), (140, 84, 168, 112)]
    drawn = answer.show(tmp_path / "seen.png")
    plain = made(gamma=1.0).ask(image, "What?", max_new_tokens=2)
    assert plain.heat == []
    assert (tmp_path / "seen.png").is_file()
    seen, unseen = np.asarray(drawn)[24:400, 24:640], np.asarray(plain.show())[24:400, 24:640]
    assert np.abs(seen.astype(int) - unseen).mean() > 5


def test_the_price_is_the_most_it_can_cost() -> None:
    picture_size = Size(3000, 4000)
    cost = shared_pricer(reference_config("slime")).price(picture_size)
    assert (cost.views, cost.visual_tokens) == (7, 577 + 6 * 144)
    less = shared_pricer(reference_config("slime", {"max_visual_tokens": 800})).price(picture_size)
    assert less.visual_tokens == 800
    assert less.prefill_flops < cost.prefill_flops
    alone = shared_pricer(reference_config("slime", {"use_global_only": True})).price(picture_size)
    assert (alone.views, alone.visual_tokens) == (1, 576)


# Training.


def test_every_stage_trains_its_part_alone(tmp_path: Path) -> None:
    """The four runs, from a fresh start: exactly the named part changes, and the last one learns."""
    data = write_toy_data(tmp_path / "toy", 24)
    recipe = typed(load_recipe("slime"))
    assert list(recipe.stages) == ["adapter-mlp", "adapter-former", "compressor", "joint"]
    stages = {
        name: stage(given.trains, data, steps=3, options=given.options, freezes=given.freezes)
        for name, given in recipe.stages.items()
    }
    stages["joint"]["steps"] = 12
    train(write_recipe(tmp_path, stages, method="slime", options={"queries": 4}))
    before = tiny_model("slime", {"queries": 4}, seed=42, template="chatml").model.state_dict()
    expected = {
        "adapter-mlp": "connector.adapter.mlp.",
        "adapter-former": "connector.adapter.former.",
        "compressor": "connector.compressor.",
    }
    for name, part in expected.items():
        folder = tmp_path / "run" / "stages" / name / "model"
        after = foveate.load(folder, device="cpu", dtype="float32").model.state_dict()
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        assert changed == {key for key in after if key.startswith(part) and not key.endswith("positions")}
        before = after
    last = foveate.load(tmp_path / "run" / "model", device="cpu", dtype="float32")
    after = last.model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert {
        "connector.adapter.gate",
        "connector.compressor.queries",
        "language_model.lm_head.weight",
    } <= changed
    assert not any(key.startswith("vision_tower.") for key in changed)
    assert not last.model.method.options.use_local_only
    history = json.loads((tmp_path / "run/stages/joint/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_the_paper_s_other_models() -> None:
    """The changes in the recipe's head, as commands: values of Table 7, and LoRA as the authors' script."""
    text = find("recipe", "slime").read_text()
    found = {}
    for name, command in re.findall(r"# *(Llama3-\S+)[^\n]*:\n#\n((?:# {5}[^\n]*\n)+)", text):
        words = shlex.split(re.sub(r"^# {5}", "", command, flags=re.MULTILINE).replace("\\\n", ""))
        assert words[:3] == ["foveate", "train", "slime"]
        found[name] = load_recipe("slime", words[3:])
    vicuna = load_recipe("slime")
    rates = {
        name: [s.lr for s in recipe.stages.values()]
        for name, recipe in {"Vicuna-7B": vicuna, **found}.items()
    }
    assert rates == {
        "Vicuna-7B": [1e-3, 1e-3, 1e-3, 2e-5],
        "Llama3-8B": [1e-3, 1e-3, 1e-3, 1e-5],
        "Llama3-70B": [1e-3, 1e-3, 1e-3, 1e-4],
    }
    for recipe in (vicuna, *found.values()):
        assert [s.batch for s in recipe.stages.values()] == [256, 256, 256, 128]
        for s in recipe.stages.values():
            assert (s.schedule, s.warmup_ratio, s.weight_decay, s.epochs, s.bf16) == (
                "cosine",
                0.03,
                0,
                1,
                True,
            )
    lora = found["Llama3-70B"].stages["joint"]
    assert lora.lora is not None
    assert (lora.lora.rank, lora.lora.alpha) == (128, 256)
    assert lora.trains == ["connector"]


# Released checkpoints.


def release(folder: Path, kind: str) -> tuple[Foveate, Path, Path]:
    """A model, its released folder, and that of the tower which it names."""
    return write_release(folder / "model", folder / "tower", kind), folder / "model", folder / "tower"


@pytest.mark.parametrize("kind", ["bin", "safetensors", "one"])
def test_released_checkpoints_load(kind: str, tmp_path: Path) -> None:
    m, model, _ = release(tmp_path, kind)
    loaded = foveate.load(model, device="cpu", dtype="float32")
    assert (loaded.model.config.method, loaded.model.method.options.gamma) == ("slime", 0.9)
    ours = m.model.state_dict()
    assert ours.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.model.state_dict().items())
    batch = prepare(m.processor, [chat("What?", picture(60, 100))])
    again = prepare(loaded.processor, [chat("What?", picture(60, 100))])
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert greedy(m.model, batch) == greedy(loaded.model, again)
    loaded.save(tmp_path / "ours")
    converted = foveate.load(tmp_path / "ours", device="cpu", dtype="float32")
    assert greedy(converted.model, batch) == greedy(m.model, batch)
    paper = FoveateForConditionalGeneration.from_pretrained(model, options={"gate": "paper"})
    assert paper.connector.adapter.noise.abs().sum() == 0  # the dead W_noise


def test_a_wrong_key_is_named(tmp_path: Path) -> None:
    _, model, _ = release(tmp_path, "one")
    weights = load_file(model / "model.safetensors")
    lost = "model.sampler.post_qformer.query"
    for change, message in (
        ({lost: None}, r"lacks connector\.compressor\.queries"),
        ({"model.sampler.post_qformer.kv_proj.weight": torch.zeros(2)}, "has unexpected model.sampler"),
        ({lost: torch.zeros(9, 32)}, r"the wrong shape for connector\.compressor\.queries"),
    ):
        changed = {key: t for key, t in {**weights, **change}.items() if t is not None}
        save_file(changed, model / "model.safetensors")
        with pytest.raises(FoveateError, match=message):
            FoveateForConditionalGeneration.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "mm_resampler_type": "qformer"}))
    with pytest.raises(FoveateError, match="mm_resampler_type must be 'cosine', not 'qformer'"):
        FoveateForConditionalGeneration.from_pretrained(model)


def test_llama_3_gets_its_template(tmp_path: Path) -> None:
    """Its tokenizer has its own template, which has no pictures."""
    _, model, tower = release(tmp_path, "one")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert foveate.load(model, device="cpu").processor.chat_template.count("USER") == 1
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 128256}))
    from foveate.model.checkpoints import recognise

    released = recognise(model, tower)
    assert released is not None
    assert released.template == "llama3"


def test_a_connector_of_single_stages(tmp_path: Path) -> None:
    """mm_projector.bin alone after the first runs, sampler.bin beside it after the compressor's."""
    m, model, _ = release(tmp_path, "one")
    stage_folder = tmp_path / "stage"
    stage_folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    settings = {"use_global_only": True, "mm_learnable_gated": 1, "mm_resampler_topp": 1.0}
    (stage_folder / "config.json").write_text(json.dumps({**config, **settings}))
    weights = {
        released_names(key): t for key, t in m.model.state_dict().items() if key.startswith("connector.")
    }
    weights["model.mm_projector.w_noise"] = torch.zeros(32, 2)
    projector = {key: t for key, t in weights.items() if "mm_projector" in key}

    def composed(**more: Any) -> Foveate:
        return compose(tiny_vision(), tiny_text(), connector=stage_folder, tokenizer=tiny_tokenizer(), **more)

    with pytest.raises(FoveateError, match=r"has none of the files mm_projector\.bin, sampler\.bin"):
        composed()
    torch.save(projector, stage_folder / "mm_projector.bin")
    got = composed(options={"gamma": 0.5})
    options = got.model.method.options
    assert (options.experts, options.use_global_only, options.gamma) == ("query_former", True, 0.5)
    ours, theirs = m.model.connector.state_dict(), got.model.connector.state_dict()
    same = {key for key in ours if torch.equal(ours[key], theirs[key])}
    assert {key for key in ours if key.startswith("adapter.")} <= same
    assert "compressor.queries" not in same  # fresh
    torch.save({k: t for k, t in weights.items() if "sampler" in k}, stage_folder / "sampler.bin")
    theirs = composed().model.connector.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(FoveateError, match=r"method is llava, but .* was made for slime"):
        composed(method="llava")
    torch.save({k: t for k, t in projector.items() if "ln_q" not in k}, stage_folder / "mm_projector.bin")
    with pytest.raises(FoveateError, match=r"lacks connector\.adapter\.former\.query_norm"):
        composed()


@torch.no_grad()
@pytest.mark.parametrize("through", ["arguments", "configuration"])
def test_bounds_on_the_length_count_the_whole_prompt(through: str) -> None:
    """Dropped tokens count as asked: the output, which has them, is as long as `max_length` says."""
    made = fresh("slime", gamma=0.5)
    chat_ = [chat("What is it?", picture(200, 90))]
    inputs = dict(
        made.processor.apply_chat_template(
            chat_, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )
    length = inputs["input_ids"].shape[1]
    kept = made.model.get_image_features(
        **{k: inputs[k] for k in ("pixel_values", "image_sizes", "query_ids", "query_mask")}
    ).kept
    assert kept is not None and not kept[0].all()
    bounds = {"max_length": length + 7, "min_length": length + 7, "do_sample": False}
    given = (
        bounds
        if through == "arguments"
        else {"generation_config": GenerationConfig(**bounds, eos_token_id=2)}
    )
    assert made.model.generate(**inputs, **given).shape[1] == length + 7
