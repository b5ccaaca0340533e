"""What Foveate relies on of transformers, torch and peft that is not promised: one test each, by its name."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    MistralConfig,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from foveate import upstream
from foveate.lab.packing import Sample, pack
from foveate.lab.reading import read as read_in_parts
from foveate.lab.reading import seen
from foveate.model import registration
from foveate.model.cost import FlopCounter
from foveate.model.modeling import EncodedPictures, FoveateOutput
from foveate.model.rendering import marked_answers
from foveate.tiny import tiny_model, tiny_text
from foveate.zoom.vlm import _loads_by_itself
from tests.support import chat, checkpoint_activations, gap, picture


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_text()).eval()


@pytest.fixture(scope="module")
def read(llm: LlamaForCausalLM) -> Any:
    """Two rows of four tokens, read with a cache."""
    return llm(input_ids=torch.arange(10, 18).view(2, 4), use_cache=True)


@pytest.mark.parametrize(
    "kind", [CausalLMOutputWithPast, GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput, FoveateOutput]
)
def test_cache_has_one_name_in_all_outputs(kind: type) -> None:
    names = {field.name for field in fields(kind)} & {*upstream.CACHE_NAMES}
    assert names == {upstream.CACHE}


def test_cache_is_handed_in_by_that_name(llm: LlamaForCausalLM) -> None:
    assert upstream.CACHE in inspect.signature(llm.forward).parameters
    assert upstream.CACHE in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert upstream.CACHE in llm._skip_keys_device_placement


def test_a_template_s_marks_are_spans_of_its_text() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}"
        "{% generation %}{{ m['content'] }}{{ end }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    roles = ("user", "assistant", "user", "assistant")
    said = [
        {"role": role, "content": word} for role, word in zip(roles, ("Why?", "So.", "", "No"), strict=True)
    ]
    spans = marked_answers(template, said, end="|")
    assert ["Why?So.|No|"[start:end] for start, end in spans] == ["So.|", "No|"]


def test_templates_are_rendered_with_the_one_that_is_given() -> None:
    """In an environment of transformers: without its filter the JSON would have `\\u00e9`."""
    made = []

    def compiled(source: str) -> Any:
        made.append(source)
        return upstream.template_environment().from_string(source + "{{ ['é']|tojson }}")

    said = [{"role": "user", "content": "Why?"}]
    texts, _ = upstream.rendered(compiled, [said, said], "{{ messages[0].content }}")
    assert texts == ['Why?["é"]'] * 2
    assert made == ["{{ messages[0].content }}"]


def test_cache_keys_and_values(read: Any) -> None:
    """Per layer 2 x (2 rows, 2 heads, 4 tokens, 12 wide) in float32."""
    assert upstream.cache_bytes(read[upstream.CACHE]) == 4 * 2 * (2 * 2 * 4 * 12) * 4


def test_generate_takes_a_configuration_or_arguments() -> None:
    assert upstream.generation_arguments({"num_beams": 2}, cache=1) == {
        "do_sample": False,
        "num_beams": 2,
        "cache": 1,
    }
    config = GenerationConfig(do_sample=True, num_beams=2)
    made = upstream.generation_arguments(
        {"generation_config": config, "num_beams": 3, "streamer": 4}, cache=1
    )
    both = made.pop("generation_config")
    assert made == {"streamer": 4, "cache": 1}  # arguments that are not part of a configuration
    assert (both.do_sample, both.num_beams, config.num_beams) == (True, 3, 2)


def test_checkpointing_is_told_to_modules_by_their_attribute(llm: LlamaForCausalLM) -> None:
    class Tower(nn.Module):
        gradient_checkpointing = False

    model = LlamaForCausalLM(tiny_text())
    model.tower = Tower()
    checkpoint_activations(model)
    assert model.tower.gradient_checkpointing and callable(model.tower._gradient_checkpointing_func)
    checkpoint_activations(model, False)
    assert not model.tower.gradient_checkpointing


def test_cache_that_holds_all(read: Any) -> None:
    cache = read[upstream.CACHE]
    assert upstream.holds_all(cache, 2)
    assert not upstream.holds_all(cache, 1)
    assert not upstream.holds_all(None, 2)
    assert not upstream.holds_all(DynamicCache(config=sliding()), 2)


def sliding() -> Any:
    return tiny_text(layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=4)


def test_cache_rows_are_selected_in_place(llm: LlamaForCausalLM) -> None:
    ids = torch.arange(10, 18).view(2, 4)
    cache = llm(input_ids=ids, use_cache=True)[upstream.CACHE]
    upstream.keep_rows(cache, torch.tensor([1]))
    assert upstream.holds_all(cache, 1)
    mask = torch.ones(1, 5, dtype=torch.long)
    after = llm(input_ids=torch.tensor([[20]]), attention_mask=mask, **{upstream.CACHE: cache}).logits
    whole = llm(input_ids=torch.tensor([[*ids[1], 20]])).logits
    assert gap(after[:, -1], whole[:, -1]) < 1e-5


def test_decoder_layers(llm: LlamaForCausalLM) -> None:
    assert upstream.decoder_layers(llm.get_decoder()) is llm.model.layers
    assert upstream.decoder_layers(nn.Linear(1, 1)) is None


@torch.no_grad()
def test_a_layer_of_llama_is_its_parts() -> None:
    """`lab.reading` takes layers apart: its answers about one picture are those of the whole LLM."""
    torch.manual_seed(0)
    config = tiny_text(num_key_value_heads=4, rms_norm_eps=1e-2)
    llm = LlamaForCausalLM(config).eval()
    for name, parameter in llm.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2)
    visual = torch.randn(5, llm.config.hidden_size)
    texts = [[10, 11, 12, 13], [20, 21, 22]]
    packed = pack([[Sample(ids, 1)] for ids in texts], 0, 0, 3)
    found = read_in_parts(llm, seen([visual], None, torch.tensor([0, 0])), packed)
    embed = llm.get_input_embeddings()
    wholes = [llm(inputs_embeds=torch.cat([visual, embed(torch.tensor(ids))])[None]).logits for ids in texts]
    assert found.labels.tolist() == [11, 12, 13, 21, 22]
    assert gap(found.logits, torch.cat([whole[0, 5:-1] for whole in wholes])) < 1e-4


def test_attn_implementation_is_known_and_set(llm: LlamaForCausalLM) -> None:
    decoder = llm.get_decoder()
    assert decoder.config._attn_implementation == "sdpa"
    with upstream.eager_attention(decoder):
        assert decoder.config._attn_implementation == "eager"
    assert decoder.config._attn_implementation == "sdpa"


def test_self_attn_returns_its_map_second(llm: LlamaForCausalLM) -> None:
    with upstream.eager_attention(llm.get_decoder()), upstream.attention_maps(llm.model.layers[1]) as maps:
        llm(input_ids=torch.tensor([[10, 11, 12]]))
    (attention,) = maps  # (B, H, T, T)
    assert attention.shape == (1, 4, 3, 3)
    assert gap(attention.sum(-1), torch.ones(1, 4, 3)) < 1e-5
    assert not attention.triu(1).any()


def test_version_of_a_tensor_counts_changes() -> None:
    tensor = torch.zeros(2)
    before = upstream.changes(tensor)
    tensor += 1
    assert upstream.changes(tensor) == before + 1
    with torch.inference_mode():
        assert upstream.changes(torch.zeros(2)) == 0


def test_linear4bit_packs_nothing_without_support_avx512bf16_for_cpu() -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    made = nn.Sequential(layers.Linear4bit(64, 48, bias=False, compute_dtype=torch.float32)).to("cpu").eval()
    assert "support_avx512bf16_for_cpu" in vars(made[0])
    upstream.keep_packing(made)
    with torch.inference_mode():
        made(torch.ones(1, 64))
    assert not made[0].support_avx512bf16_for_cpu and not made[0].weight.is_inference()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_takes_mm_encoder_outputs_and_repeats_pooler_output(beams: int) -> None:
    made = tiny_model("llava")
    messages = chat("What is it?", picture(60, 90))
    kwargs = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = dict(made.processor.apply_chat_template(messages, **kwargs))
    calls: list[Any] = []

    def note(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        calls.append(given.get("mm_encoder_outputs"))

    hook = made.model.register_forward_pre_hook(note, with_kwargs=True)
    made.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, num_beams=beams, do_sample=False)
    hook.remove()
    handed = [given["image"] for given in calls if given]
    assert [type(image) for image in handed] == [EncodedPictures]  # in the prefill and in no other pass
    assert len(handed[0].pooler_output) == beams


def test_replace_image_token_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "image_idx" in inspect.signature(ProcessorMixin.replace_image_token).parameters
    made = tiny_model("llava")
    monkeypatch.setattr(made.processor, "replace_image_token", lambda *args, **kwargs: "<image>" * 7)
    inputs = made.processor(images=[picture(60, 90)], text="<image>")
    assert inputs["input_ids"][0].count(made.processor.image_token_id) == 7


def test_get_text_with_replacements() -> None:
    texts, _ = tiny_model("llava").processor.get_text_with_replacements(["a<image>b"], ["<image>" * 2])
    assert texts == ["a<image><image>b"]


@pytest.mark.parametrize(
    ("module", "auto"),
    [
        ("configuration_auto", "AutoConfig"),
        ("modeling_auto", "AutoModelForImageTextToText"),
        ("image_processing_auto", "AutoImageProcessor"),
        ("processing_auto", "AutoProcessor"),
    ],
)
def test_auto_classes_are_in_their_modules(module: str, auto: str) -> None:
    import transformers

    found = getattr(importlib.import_module(f"{registration.AUTO}.{module}"), auto)
    assert found is getattr(transformers, auto)
    assert callable(found.register)


def test_mapping_of_image_text_to_text() -> None:
    assert _loads_by_itself("qwen2_vl") and _loads_by_itself("llava_next")
    assert not any(_loads_by_itself(kind) for kind in ("llava", "foveate", "llama", "nothing", None))


class Ordered(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.tensor([10 + index, 11])
        return {"input_ids": ids, "labels": ids}


def test_trainer_asks_get_train_sampler(tmp_path: Path, llm: LlamaForCausalLM) -> None:
    class Reversed(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return [3, 2, 1, 0]

    trainer = Reversed(llm, TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=Ordered())
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"][:, 0].tolist() == [13, 12, 11, 10]


def test_get_decay_parameter_names(tmp_path: Path, llm: LlamaForCausalLM) -> None:
    trainer = Trainer(llm, TrainingArguments(str(tmp_path), use_cpu=True))
    decaying = set(trainer.get_decay_parameter_names(llm))
    assert "model.layers.0.mlp.up_proj.weight" in decaying
    assert not any("norm" in name for name in decaying)


def test_trainer_leaves_training_args_bin(tmp_path: Path, llm: LlamaForCausalLM) -> None:
    """A pickle, which is deleted; its absence from transformers is not a fault."""
    Trainer(llm, TrainingArguments(str(tmp_path), use_cpu=True)).save_model(str(tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written <= {"config.json", "generation_config.json", "model.safetensors", "training_args.bin"}


def test_peft_puts_adapters_around_base_layer(llm: LlamaForCausalLM) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    from foveate.train.parts import ADAPTER

    model = LlamaForCausalLM(tiny_text())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["model.layers.0.mlp.up_proj"]), model)
    names = {name for name, _ in model.named_parameters()}
    assert f"model.layers.0.mlp.up_proj{ADAPTER}.weight" in names
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    adapted = model.model.layers[0].mlp.up_proj
    assert isinstance(adapted, LoraLayer) and callable(adapted.merge)
    assert isinstance(adapted.get_base_layer(), nn.Linear)


@torch.no_grad()
def test_rows_of_their_own_lengths_are_read_as_each_alone(llm: LlamaForCausalLM) -> None:
    """Slots: rows of 4 and 6 tokens and a free one; each reads a token, in a place of its own."""
    prompts = [torch.arange(10, 14)[None], torch.arange(20, 26)[None]]
    alone = [llm(input_ids=prompt, use_cache=True)[upstream.CACHE] for prompt in prompts]
    states = [upstream.states_of(cache) for cache in alone]
    layers = []
    for keys, values in states[0]:
        layers.append(
            upstream.SlotLayer(
                *(part.new_full((3, part.shape[1], 9, part.shape[3]), 7.0) for part in (keys, values))
            )
        )
    for row, one in enumerate(states):
        for layer, (keys, values) in zip(layers, one, strict=True):
            layer.keys[row, :, : keys.shape[2]], layer.values[row, :, : keys.shape[2]] = keys[0], values[0]
    columns = torch.tensor([4, 6])
    for layer in layers:
        layer.columns, layer.rows, layer.used = columns, torch.arange(2), 7
    tokens = torch.tensor([[30], [31]])
    together = llm(
        input_ids=tokens,
        attention_mask=(torch.arange(7) <= columns[:, None]).long(),
        position_ids=columns[:, None],
        **{upstream.CACHE: upstream.cache_of(layers)},
    ).logits
    for row, cache in enumerate(alone):
        expected = llm(input_ids=tokens[row : row + 1], **{upstream.CACHE: cache}).logits
        assert gap(together[row : row + 1], expected) < 1e-5


@torch.no_grad()
def test_a_layer_with_room_is_read_as_one_that_grows(llm: LlamaForCausalLM) -> None:
    ids = torch.arange(10, 18)[None]
    known = upstream.states_of(llm(input_ids=ids[:, :5], use_cache=True)[upstream.CACHE])
    layers = [
        upstream.RoomLayer(
            *(
                torch.cat([part, part.new_full((1, part.shape[1], 3, part.shape[3]), 7.0)], 2)
                for part in layer
            ),
            3,
        )
        for layer in known
    ]
    output = llm(input_ids=ids[:, 5:], use_cache=True, **{upstream.CACHE: upstream.cache_of(layers)})
    assert gap(output.logits, llm(input_ids=ids).logits[:, 5:]) < 1e-5
    assert upstream.states_of(output[upstream.CACHE])[0][0].shape[2] == 8


def test_states_are_those_of_caches_that_keep_all_tokens() -> None:
    sliding = MistralConfig(sliding_window=4, num_hidden_layers=1)
    assert upstream.states_of(DynamicCache(config=sliding)) is None


def test_fingerprint_of_a_data_set_is_that_of_its_rows() -> None:
    from datasets import Dataset

    one, same, other = (Dataset.from_dict({"a": rows}) for rows in ([1, 2], [1, 2], [1, 3]))
    assert one._fingerprint == same._fingerprint != other._fingerprint


def test_flops_are_those_of_torchs_own_counter(llm: LlamaForCausalLM) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(10, 18).view(2, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        llm(input_ids=ids)
    with torch.no_grad(), FlopCounter() as ours:
        llm(input_ids=ids)
    assert ours.total == theirs.get_total_flops() > 0


def test_image_new_shares_pixels(tmp_path: Path) -> None:
    """A plain image with a file's pixels, without its file and without a copy."""
    picture(8, 9).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        plain = opened._new(opened.im)
    assert type(plain) is Image.Image and plain.im is opened.im
    assert plain.tobytes() == picture(8, 9).tobytes()


def test_a_processor_for_pictures_alone_needs_no_part_for_videos() -> None:
    from transformers import InternVLProcessor

    from tests.vlms import internvl

    whole = internvl().processor
    values = {"image_seq_length": 4, "video_processor": {}}
    made = upstream.pictures_alone(InternVLProcessor, whole.image_processor, whole.tokenizer, values)
    assert isinstance(made, InternVLProcessor) and type(made).__name__ == "InternVLProcessor"
    assert made.video_processor is None and made.image_seq_length == 4
    image = picture(50, 40)
    ours, theirs = (p(images=image, text=p.image_token)["input_ids"] for p in (made, whole))
    assert ours == theirs
    with pytest.raises(TypeError, match="image_processor"):
        upstream.pictures_alone(InternVLProcessor, whole.tokenizer, whole.tokenizer, {})


def test_processors_by_type_of_model() -> None:
    assert upstream.processors_by_type()["qwen3_vl"] == "Qwen3VLProcessor"
    assert "gpt2" not in upstream.processors_by_type()
