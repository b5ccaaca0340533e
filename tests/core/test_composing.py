"""Any Hugging Face vision tower and any causal LM, with their weights, in one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
    set_seed,
)
from transformers import CLIPImageProcessorPil as ClipImageProcessor

from foveate import FoveateError, FoveateForConditionalGeneration, compose, load
from foveate.methods import METHODS
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from tests.support import chat, gap, greedy, pictures, rows

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VIEW = {"image_size": 56, "patch_size": 14}
TOWERS = {
    "clip": lambda: tiny_vision(),
    "siglip": lambda: SiglipVisionConfig(**SIZES, **VIEW),
    "dinov2": lambda: Dinov2Config(**{**SIZES, **VIEW, "mlp_ratio": 2}),
    "dinov2 with registers": lambda: Dinov2WithRegistersConfig(**{**SIZES, **VIEW, "mlp_ratio": 2}),
    "vit": lambda: ViTConfig(**SIZES, **VIEW),
}

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 266,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
LANGUAGE_MODELS = {
    "llama": lambda: tiny_text(),
    "llama tied": lambda: tiny_text(tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=12, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=12, query_pre_attn_scalar=12),
    "gpt_neox": lambda: GPTNeoXConfig(**TEXT),
}


def prepare(made: Any, *sizes: tuple[int, int]) -> dict[str, Any]:
    chats = [chat(f"What is {'x' * i}?", image) for i, image in enumerate(pictures(*sizes))]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return dict(made.processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True}))


# Vision towers.


def reference(tower: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Patch tokens of a hidden state of the whole tower."""
    hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]
    return hidden[:, hidden.shape[1] - 16 :]


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_cut_tower_equals_whole_tower(name: str, tmp_path: Path) -> None:
    set_seed(0)
    tower = AutoModel.from_config(TOWERS[name]()).eval()
    tower.save_pretrained(tmp_path)
    pixels = torch.randn(3, 3, 56, 56)
    for part in (tmp_path, tower):
        made = compose(part, tiny_text(), tokenizer=tiny_tokenizer())
        assert torch.equal(made.model.encode_views(pixels), reference(tower, pixels, -2))
    fewer = compose(tower, tiny_text(), tokenizer=tiny_tokenizer(), vision_feature_layer=1)
    assert torch.equal(fewer.model.encode_views(pixels), reference(tower, pixels, 1))
    size = sum(p.numel() for p in tower.parameters())
    assert name == "vit" or sum(p.numel() for p in fewer.model.vision_tower.parameters()) < size * 0.7
    assert len(greedy(made.model, prepare(made, (40, 60), (60, 60)))) == 2


@torch.no_grad()
def test_vision_part_of_a_pair(tmp_path: Path) -> None:
    set_seed(0)
    words = {**SIZES, "vocab_size": 99}
    pairs = {
        "clip": CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**words), vision_config=tiny_vision())),
        "siglip": SiglipModel(
            SiglipConfig(text_config=SiglipTextConfig(**words), vision_config=TOWERS["siglip"]())
        ),
    }
    for name, pair in pairs.items():
        folder = tmp_path / name
        pair.eval().save_pretrained(folder)
        ClipImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1]).save_pretrained(folder)
        made = compose(folder, tiny_text(), tokenizer=tiny_tokenizer())
        pixels = torch.randn(2, 3, 56, 56)
        assert torch.equal(made.model.encode_views(pixels), reference(pair.vision_model, pixels, -2))
        assert made.processor.image_processor.image_mean == [0.5, 0.4, 0.3]
        assert made.processor.image_processor.image_std == [0.2, 0.2, 0.1]


@pytest.mark.parametrize(("layer", "layers"), [(-1, 3), (-2, 2), (1, 1), (3, 3)], ids=lambda n: str(n))
def test_only_layers_that_are_read_are_built(layer: int, layers: int) -> None:
    made = compose(tiny_vision(), tiny_text(), tokenizer=tiny_tokenizer(), vision_feature_layer=layer)
    assert len(made.model.vision_tower.model.encoder.layers) == layers


@pytest.mark.parametrize("layer", [-4, 0, 4])
def test_layers_that_are_not_there(layer: int) -> None:
    with pytest.raises(FoveateError, match=f"vision_feature_layer {layer}: the tower has 3 layers"):
        compose(tiny_vision(), tiny_text(), tokenizer=tiny_tokenizer(), vision_feature_layer=layer)


# Language models.


@torch.no_grad()
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_keep_their_weights(name: str, tmp_path: Path) -> None:
    set_seed(0)
    lm = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[name]()).eval()
    lm.save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    made = compose(tiny_vision(), tmp_path / "lm")
    ids = torch.arange(10, 60)[None]
    assert torch.equal(made.model(input_ids=ids).logits, lm(input_ids=ids).logits)
    assert made.model.config.tie_word_embeddings == lm.config.tie_word_embeddings
    batch = prepare(made, (40, 60), (90, 30))
    together = rows(made.model(**batch).logits, batch["attention_mask"])
    for i, size in enumerate(((40, 60), (90, 30))):
        alone = prepare(made, *[(1, 1)] * i, size)
        assert gap(rows(made.model(**alone).logits, alone["attention_mask"])[i], together[i]) < 1e-4
    made.save(tmp_path / "ours")
    again = FoveateForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**batch).logits, made.model(**batch).logits)
    assert greedy(again, batch) == greedy(made.model, batch)
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert tied == lm.config.tie_word_embeddings


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_vocabulary_without_image_token_grows(name: str) -> None:
    set_seed(0)
    config = LANGUAGE_MODELS[name]()
    config.vocab_size = 265
    lm = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = tiny_tokenizer()
    inner = tokenizer.backend_tokenizer
    inner = type(inner).from_str(inner.to_str().replace('"<image>"', '"<else>"'))
    tokenizer = type(tokenizer)(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    assert "<image>" not in tokenizer.get_vocab()
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    made = compose(tiny_vision(), lm, tokenizer=tokenizer)
    image = made.model.config.image_token_id
    assert made.processor.tokenizer.convert_tokens_to_ids("<image>") == image == 266
    tables = (made.model.get_input_embeddings(), made.model.get_output_embeddings())
    assert [len(table.weight) for table in tables] == [267, 267]
    for key, value in made.model.language_model.state_dict().items():
        assert torch.equal(value[: len(before[key])], before[key]), key
    assert len(greedy(made.model, prepare(made, (40, 60)))) == 1


@pytest.fixture
def toy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "toy", "tests.methods.toy:Toy")
        yield


@torch.no_grad()
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_injection_in_every_language_model(name: str, toy: None) -> None:
    """Injected hidden states are reached in each, or it says that they cannot be."""
    set_seed(0)
    made = compose(tiny_vision(), LANGUAGE_MODELS[name](), "toy", tokenizer=tiny_tokenizer())
    batch = prepare(made, (40, 60), (90, 30))
    logits = made.model(**batch).logits
    for injector in made.model.connector.injected.values():
        torch.nn.init.zeros_(injector.project.weight)
        torch.nn.init.zeros_(injector.project.bias)
    assert gap(made.model(**batch).logits, logits) > 0.01
    assert len(greedy(made.model, batch)) == 2


# What does not fit.


def test_what_compose_refuses(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="compose needs a tokenizer"):
        compose(tiny_vision(), tiny_text())
    with pytest.raises(FoveateError, match="unknown chat template 'vicuna'"):
        compose(tiny_vision(), tiny_text(), tokenizer=tiny_tokenizer(), template="vicuna")
    with pytest.raises(FoveateError, match="unknown method 'lava'"):
        compose(tiny_vision(), tiny_text(), "lava", tokenizer=tiny_tokenizer())
    with pytest.raises(FoveateError, match="no model folder at"):
        compose(tmp_path / "nothing", tiny_text(), tokenizer=tiny_tokenizer())
    tiny_text().save_pretrained(tmp_path / "bare")
    with pytest.raises(FoveateError, match="holds no weights"):
        compose(tiny_vision(), tmp_path / "bare", tokenizer=tiny_tokenizer())
    AutoModelForCausalLM.from_config(tiny_text()).save_pretrained(tmp_path / "bare")
    with pytest.raises(FoveateError, match="no tokenizer that transformers can read"):
        compose(tiny_vision(), tmp_path / "bare")
    tiny_vision().save_pretrained(tmp_path / "eye")
    with pytest.raises(FoveateError, match="holds no weights"):
        compose(tmp_path / "eye", tiny_text(), tokenizer=tiny_tokenizer())
    (tmp_path / "eye" / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(FoveateError, match=r"eye/model\.safetensors is broken"):
        compose(tmp_path / "eye", tiny_text(), tokenizer=tiny_tokenizer())
    tower = AutoModel.from_config(tiny_vision())
    weights = tower.state_dict()
    lost = weights.pop("encoder.layers.0.mlp.fc1.weight")
    save_file(weights, tmp_path / "eye" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FoveateError, match=r"lacks encoder\.layers\.0\.mlp\.fc1\.weight"):
        compose(tmp_path / "eye", tiny_text(), tokenizer=tiny_tokenizer())
    weights["encoder.layers.0.mlp.fc1.weight"] = lost[:5].clone()
    save_file(weights, tmp_path / "eye" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FoveateError, match=r"has the wrong shape for encoder\.layers\.0\.mlp\.fc1\.weight"):
        compose(tmp_path / "eye", tiny_text(), tokenizer=tiny_tokenizer())
    with pytest.raises(FoveateError, match="has no square image_size"):
        compose(tiny_vision(image_size=[56, 28]), tiny_text(), tokenizer=tiny_tokenizer())
    with pytest.raises(FoveateError, match="has no patches"):
        compose(tiny_vision(image_size=7), tiny_text(), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("plain", "</s>")]
)
def test_generation_stops_where_the_template_ends_an_answer(template: str, end: str) -> None:
    made = tiny_model(template=template)
    stops = made.model.generation_config.eos_token_id
    assert made.processor.tokenizer.convert_tokens_to_ids(end) in (
        stops if isinstance(stops, list) else [stops]
    )


def test_tokens_can_be_added(tmp_path: Path) -> None:
    made = tiny_model("llava")
    words = made.model.get_input_embeddings().weight.shape[0]
    made.model.resize_token_embeddings(words + 3, mean_resizing=False)
    assert made.model.get_output_embeddings().weight.shape[0] == words + 3
    made.save(tmp_path)
    again = load(tmp_path, device="cpu")
    assert again.model.config.text_config.vocab_size == words + 3
    (picture,) = pictures((30, 20))
    assert (
        again.ask(picture, "What?", max_new_tokens=3).text
        == made.ask(picture, "What?", max_new_tokens=3).text
    )
