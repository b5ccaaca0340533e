"""Runs: they learn, resume exactly after kill -9, and refuse bad input before they write."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

import foveate
from foveate import FoveateError, FoveateForConditionalGeneration
from foveate.composing import compose
from foveate.data.toy import write_toy_data
from foveate.methods import METHODS
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.train import run as train_run
from foveate.train.run import train
from foveate.train.trainer import COMPLETE, newest_checkpoint
from tests import forked
from tests.command import foveate as command_line
from tests.support import picture
from tests.train.support import losses, same, stage, two_stages, weights, write_recipe


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Sums come out the same in this process and in those that it starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    train(two_stages(folder, method="anyres"))
    return folder


def changed(name: str, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[key], after[key]) for key in before if key.startswith(name))


def test_each_stage_trains_its_parts(finished: Path) -> None:
    run = finished / "run"
    first, last = weights(run / "stages" / "pretrain" / "model"), weights(run / "model")
    start = dict(tiny_model("anyres", seed=42).model.state_dict())
    assert [changed(part, start, first) for part in ("connector", "vision_tower", "language_model")] == [
        True,
        False,
        False,
    ]
    assert all(changed(part, first, last) for part in ("connector", "vision_tower", "language_model"))


def test_a_finished_run(finished: Path) -> None:
    run = finished / "run"
    found = losses(run, "finetune")
    assert len(found) == 15  # 36 samples, 3 epochs, 8 a step
    assert found[-1] < found[0] - 1
    assert sorted(path.name for path in run.iterdir()) == ["model", "recipe.yaml", "stages"]
    for name in ("pretrain", "finetune"):
        folder = run / "stages" / name
        assert not list(folder.glob("checkpoint-*"))
        assert list(folder.glob("tensorboard/events.*"))
    loaded = foveate.load(run / "model", device="cpu", dtype="float32")
    assert "use_cache" not in loaded.model.config.to_dict()
    answer = loaded.ask(picture(60, 80), "What colour is the square?", max_new_tokens=4)
    assert answer.ledger.new_tokens > 0
    ends = loaded.model.generation_config.eos_token_id
    assert loaded.processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    assert train(finished / "recipe.yaml") == run  # nothing left to do
    assert losses(run, "finetune") == found


def test_tensorboard_has_the_losses(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "run" / "stages" / "finetune" / "tensorboard")).Reload()
    written = [scalar.value for scalar in events.Scalars("train/loss")]
    assert written == pytest.approx(losses(finished / "run", "finetune"))


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(3, id="in the first epoch", marks=pytest.mark.slow),
        pytest.param(9, id="in the second"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(finished: Path, tmp_path: Path, checkpoint: int) -> None:
    recipe, run = two_stages(tmp_path, method="anyres"), tmp_path / "run"
    marker = run / "stages" / "finetune" / f"checkpoint-{checkpoint}" / COMPLETE
    process = forked.foveate("train", recipe)
    deadline = time.monotonic() + 120
    while not marker.exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "model").exists()
    left = newest_checkpoint(run / "stages" / "finetune")
    assert left is not None
    stale = run / "stages" / "finetune" / "checkpoint-99"
    stale.mkdir()  # as a kill while it is written leaves it
    output = io.StringIO()
    train(recipe, console=Console(file=output, width=200))
    assert f"resuming from {left}" in output.getvalue()
    assert "stage pretrain" not in output.getvalue()
    assert losses(run, "finetune") == losses(finished / "run", "finetune")
    assert same(weights(run / "model"), weights(finished / "run" / "model"))


class Unplugged(io.StringIO):
    """Output that fails at a word, and with it the run."""

    def __init__(self, word: str = "step 5 of") -> None:
        super().__init__()
        self.word = word

    def write(self, text: str) -> int:
        if self.word in text:
            raise InterruptedError
        return super().write(text)


@pytest.mark.parametrize("lora", [None, {"on": ["language_model.model"], "rank": 4, "alpha": 8.0}])
def test_a_run_killed_after_its_last_step_takes_no_more(tmp_path: Path, lora: Any) -> None:
    """Killed by `kill -9` when the last checkpoint is complete, and the model is not written yet."""
    data = write_toy_data(tmp_path / "toy", 36)
    trains = ["connector"] if lora else ["connector", "language_model"]
    settings = {"steps": 3, "schedule": "constant", "save_steps": 3, "lora": lora}
    recipe = write_recipe(tmp_path, {"all": stage(trains, data, **settings)})

    def dying() -> None:
        train_run._save = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        train(recipe)

    assert forked.Forked(dying).wait() == -signal.SIGKILL
    last = newest_checkpoint(tmp_path / "run" / "stages" / "all")
    assert last is not None and last.name == "checkpoint-3" and not (tmp_path / "run" / "model").exists()
    train(recipe)
    train(recipe, [f"output={tmp_path / 'whole'}"])
    assert losses(tmp_path / "run", "all") == losses(tmp_path / "whole", "all")
    assert same(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


def other_answer(folder: Path) -> None:
    path = folder / "toy" / "toy.json"
    path.write_text(path.read_text().replace("red", "blue").replace("green", "red"))


def other_size(folder: Path) -> None:
    for path in (folder / "toy" / "pictures").iterdir():
        picture(200, 50).save(path)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [(other_answer, "toy.json"), (other_size, "the pictures that are found, or their sizes")],
)
def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, spoil: Any, what: str) -> None:
    data = write_toy_data(tmp_path / "toy", 16)
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data, epochs=4)}, method="anyres")
    with pytest.raises(InterruptedError):
        train(recipe, console=Console(file=Unplugged(), width=200))
    spoil(tmp_path)
    with pytest.raises(FoveateError, match=f"stages.all: .*{what} changed since the run in .* began"):
        train(recipe)


def test_a_stage_with_adapters_goes_on(tmp_path: Path) -> None:
    """Adapters, their optimizer and the random numbers of their dropout come back."""
    data = write_toy_data(tmp_path / "toy", 16)
    lora = {"on": ["language_model.model"], "rank": 4, "alpha": 8.0, "dropout": 0.3}
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data, epochs=4, lora=lora)})
    with pytest.raises(InterruptedError):
        train(recipe, console=Console(file=Unplugged(), width=200))
    assert newest_checkpoint(tmp_path / "run" / "stages" / "all") is not None
    train(recipe)
    train(recipe, [f"output={tmp_path / 'whole'}"])
    assert len(losses(tmp_path / "whole", "all")) == 8
    assert losses(tmp_path / "run", "all") == losses(tmp_path / "whole", "all")
    assert same(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 12)
    trains = ["connector", "language_model", "vision_tower"]
    without_regions = {"chain_of_spot": {"region_from": "centre"}}  # the toy data have none
    options = without_regions.get(method, {})
    train(write_recipe(tmp_path, {"all": stage(trains, data, steps=8)}, method=method, options=options))
    found = losses(tmp_path / "run", "all")
    assert found[-1] < found[0] - 1


# Those whose connectors are like another one's, layer for layer.
ALIKE = ("llava", "anyres", "chain_of_spot")
SMALL_STEPS = {"bf16": True, "lr": 2e-5, "steps": 3, "schedule": "constant", "warmup_ratio": 0.0}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE[1:] else ()) for name in METHODS]
)
def test_what_trains_is_exact_in_a_model_of_bfloat16(method: str, tmp_path: Path) -> None:
    """Steps too small for bfloat16 add up; what is frozen stays in it; the folder is in it."""
    data = write_toy_data(tmp_path / "toy", 12)
    trains = ["connector", "language_model.model.layers.0"]
    adapters = {"on": ["vision_tower", "language_model.model.layers.1"], "rank": 2, "alpha": 4.0}
    more = {**SMALL_STEPS, "save_steps": 2, "lora": adapters}
    options = {"region_from": "centre"} if method == "chain_of_spot" else {}
    recipe = write_recipe(
        tmp_path, {"all": stage(trains, data, **more)}, method=method, options=options, dtype="bfloat16"
    )
    with pytest.raises(InterruptedError):
        train(recipe, console=Console(file=Unplugged("step 3 of"), width=200))
    checkpoint = newest_checkpoint(tmp_path / "run" / "stages" / "all")
    assert checkpoint is not None
    start = {
        name: p.bfloat16() for name, p in tiny_model(method, options, seed=42).model.state_dict().items()
    }
    kept = {
        name.replace(".base_layer", ""): p for name, p in load_file(checkpoint / "model.safetensors").items()
    }
    learnt = [n for n in kept if n.startswith(tuple(trains)) and not n.endswith(".positions")]
    assert sum(float(kept[n].ne(start[n].float()).float().mean()) for n in learnt) / len(learnt) > 0.8
    frozen = [name for name, p in kept.items() if p.dtype == torch.bfloat16]
    assert frozen and not {*learnt, *(name for name in kept if "lora_" in name)} & {*frozen}
    assert all(torch.equal(kept[name], start[name]) for name in frozen)
    train(recipe)
    assert {p.dtype for name, p in weights(tmp_path / "run" / "model").items() if "position" not in name} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bfloat16_weights_need_bfloat16_arithmetic(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 4)
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data)}, dtype="bfloat16")
    with pytest.raises(
        FoveateError, match=r"stages.all: model.dtype bfloat16 .*: set bf16 to true, or model.dtype"
    ):
        train(recipe)


def test_options_change_for_one_stage(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 8)
    stages = {
        "narrow": stage(["connector"], data, steps=1, options={"grids": [[1, 1]]}, template="plain"),
        "wide": stage(["connector"], data, steps=1),
    }
    train(write_recipe(tmp_path, stages, method="anyres", options={"max_visual_tokens": 60}))
    narrow, wide = (
        foveate.load(tmp_path / "run" / path, device="cpu", dtype="float32")
        for path in ("stages/narrow/model", "model")
    )
    for loaded, grids in ((narrow, {(1, 1)}), (wide, {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)})):
        for options in (loaded.model.config.options, loaded.processor.image_processor.options):
            assert {tuple(grid) for grid in options["grids"]} == grids
            assert options["max_visual_tokens"] == 60
    assert narrow.processor.chat_template != wide.processor.chat_template


def test_a_run_starts_from_a_model_folder(finished: Path, tmp_path: Path) -> None:
    """Checkpointed activations change nothing; LoRA leaves an ordinary folder."""
    data = write_toy_data(tmp_path / "toy", 8)
    model = {"tiny": False, "method": None, "template": None, "load": str(finished / "run" / "model")}
    results = []
    for name, more in (("plain", {}), ("checkpointed", {"checkpoint_activations": True})):
        folder = tmp_path / name
        folder.mkdir()
        train(write_recipe(folder, {"all": stage(["language_model"], data, steps=2, **more)}, **model))
        results.append(weights(folder / "run" / "model"))
    assert same(*results)
    lora = {"on": ["language_model.model"], "rank": 4, "alpha": 8.0}
    folder = tmp_path / "lora"
    folder.mkdir()
    train(write_recipe(folder, {"all": stage([], data, steps=4, lora=lora, bf16=True)}, **model))
    before, after = weights(finished / "run" / "model"), weights(folder / "run" / "model")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(key.startswith("language_model.model.layers.") for key in moved)


def test_parts_from_folders(tmp_path: Path) -> None:
    """Vision tower and LLM come with their weights; the new connector is the same for the same seed."""
    tower, llm = CLIPVisionModel(tiny_vision()), LlamaForCausalLM(tiny_text())
    tower.save_pretrained(tmp_path / "tower")
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    data = write_toy_data(tmp_path / "toy", 8)
    spec = {"tiny": False, "vision": str(tmp_path / "tower"), "text": str(tmp_path / "llm")}
    results = []
    for name in "ab":
        (tmp_path / name).mkdir()
        stages = {"align": stage(["connector"], data, steps=1)}
        train(write_recipe(tmp_path / name, stages, vision_feature_layer=-1, **spec))
        results.append(weights(tmp_path / name / "run" / "model"))
    assert same(*results)
    start = {f"vision_tower.model.{key}": p for key, p in tower.state_dict().items()}
    start |= {f"language_model.{key}": p for key, p in llm.state_dict().items()}
    kept = [key for key in results[0] if not key.startswith("connector.")]
    assert len(kept) > 60 and all(torch.equal(results[0][key], start[key]) for key in kept)
    (tmp_path / "llm" / "model.safetensors").unlink()
    with pytest.raises(FoveateError, match="llm holds no weights"):
        train(tmp_path / "a" / "recipe.yaml", [f"output={tmp_path / 'c'}"])
    assert not (tmp_path / "c").exists()


def test_long_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 12)
    output = io.StringIO()
    recipe = write_recipe(
        tmp_path, {"all": stage(["connector"], data, steps=1, max_length=80)}, method="anyres"
    )
    train(recipe, console=Console(file=output, width=200))
    assert ", 0 with pictures, 10 longer ones left out" in output.getvalue()
    assert "connector" in output.getvalue() and "frozen" in output.getvalue()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FoveateError, match="all 12 samples are longer than max_length 8; raise it"):
        train(recipe, ["stages.all.max_length=8"])


def test_missing_pictures_are_counted_and_may_be_left_out(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 24)
    pictures = tmp_path / "toy" / "pictures"
    for i in (1, 3, 6, 8):
        (pictures / f"{i:05d}.png").unlink()
    (pictures / "00007.png").write_bytes(b"no picture")
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data, steps=1)})
    with pytest.raises(FoveateError) as error:
        train(recipe)
    said = str(error.value)
    assert said.startswith("stages.all: 5 of 24 samples have pictures that are missing or broken: ")
    assert all(f"(id {i:05d})" in said for i in (1, 3, 6)) and "(id 00007)" not in said
    assert "; ... (missing_pictures=leave_out" in said and "\n" not in said
    output = io.StringIO()
    train(recipe, ["stages.all.missing_pictures=leave_out"], console=Console(file=output, width=200))
    assert "19 samples of up to" in output.getvalue()
    assert ", 5 left out because their pictures are missing" in output.getvalue()
    for path in pictures.iterdir():
        path.unlink()
    records = [r for r in json.loads(data.read_text()) if "image" in r]
    data.write_text(json.dumps(records))
    with pytest.raises(FoveateError, match="no sample has its pictures; check images"):
        train(recipe, ["stages.all.missing_pictures=leave_out", f"output={tmp_path / 'none'}"])


def test_samples_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    made = compose(
        tiny_vision(), tiny_text(max_position_embeddings=270), "anyres", tokenizer=tiny_tokenizer()
    )
    made.save(tmp_path / "model")
    data = write_toy_data(tmp_path / "toy", 12)
    spec = {"tiny": False, "method": None, "template": None, "load": str(tmp_path / "model")}
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data, steps=1)}, **spec)
    with pytest.raises(
        FoveateError, match=r"^stages.all: \d+ of 12 samples are longer than the LLM's 270"
    ) as error:
        train(recipe)
    said = str(error.value)
    longest = re.search(r"the longest has (\d+) tokens: max_length=270 leaves them out", said)
    assert longest is not None and f"model.max_positions={longest[1]} lets them through" in said
    train(recipe, ["stages.all.max_length=270"], dry_run=True)
    train(recipe, [f"model.max_positions={longest[1]}"])
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["max_positions"] == int(
        longest[1]
    )


def broken(folder: Path) -> None:
    """A picture that cannot be read, though its size can."""
    whole = io.BytesIO()
    picture(60, 60).save(whole, "JPEG")
    for path in (folder / "toy" / "pictures").iterdir():
        path.write_bytes(whole.getvalue()[:-200])


def wrong_count(folder: Path) -> None:
    path = folder / "toy" / "toy.json"
    records = json.loads(path.read_text())
    records[3]["conversations"][0]["value"] += "<image>"
    path.write_text(json.dumps(records))


def missing(folder: Path) -> None:
    (folder / "toy" / "pictures" / "00003.png").unlink()


BAD = [
    (
        ["stages.pretrain.trains=[conector]"],
        None,
        "trains: 'conector' matches no module; did you mean connector",
    ),
    (["stages.finetune.trains=[]"], None, "stages.finetune: 'trains' is empty"),
    (
        ["stages.finetune.freezes=[connector, language_model, vision_tower]"],
        None,
        "leaves nothing of 'trains'",
    ),
    (["model.method=lava"], None, "unknown method 'lava'"),
    (["stages.finetune.options.fits=pad"], None, "unknown key 'fits'; did you mean 'fit'"),
    (["model.options.fit=stretch"], None, "fit: 'stretch' is not one of pad, crop, squash"),
    (["stages.finetune.template=alpaca"], None, "unknown chat template 'alpaca'"),
    (["stages.finetune.data.0.path=none.json"], None, "no data file at none.json"),
    (["model.tiny=false", "model.load=nowhere", "model.method=null"], None, "no model folder at nowhere"),
    ([], wrong_count, "toy.json sample 3 .id 00003.: 2 <image> in its texts for 1 pictures"),
    ([], missing, "toy.json sample 3 .id 00003.: no picture at .*00003.png"),
]


@pytest.mark.parametrize(("changes", "spoil", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, changes: list[str], spoil: Any, message: str
) -> None:
    recipe = two_stages(tmp_path, n=8)
    if spoil:
        spoil(tmp_path)
    with pytest.raises(FoveateError, match=message) as error:
        train(recipe, changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_stops_the_run_with_a_sentence(tmp_path: Path, workers: int) -> None:
    recipe = two_stages(tmp_path, n=8)
    broken(tmp_path)
    with pytest.raises(
        FoveateError,
        match=r"^[^\n]*toy.json sample \d \(id 0000\d\): [^\n]*cannot be read as a picture[^\n]*$",
    ):
        train(recipe, [f"stages.pretrain.workers={workers}"])
    assert not list((tmp_path / "run").rglob("model*"))


def test_the_command_ends_with_a_sentence_and_code_2(tmp_path: Path) -> None:
    recipe = two_stages(tmp_path, n=8)
    wrong_count(tmp_path)
    done = command_line("train", recipe)
    assert done.code == 2
    assert "2 <image> in its texts for 1 pictures" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


MARKS = ("<|im_end|>", "<|eot_id|>")
UNENDED = (  # chat templates with the answer marked, and the end of it missing, outside, or of several tokens
    ("", "the chat template writes nothing behind an answer at which it would stop"),
    ("{% endgeneration %}</s>", "leaves the end of an answer, '</s>', outside of what it marks"),
    ("###END{% endgeneration %}", "ends answers with '###END', which is not one token of this LLM but 6"),
)


def without(tokenizer: Any, marks: tuple[str, ...]) -> Any:
    """The tokenizer without some special tokens: it splits their texts into bytes."""
    kept = [t for t in tokenizer.extra_special_tokens if t not in marks]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in marks]
    state["model"]["vocab"] = {t: i for t, i in state["model"]["vocab"].items() if t not in marks}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=kept,
    )


@pytest.mark.parametrize(("template", "mark"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_an_end_mark_that_is_not_one_token_is_refused(tmp_path: Path, template: str, mark: str) -> None:
    lacking = without(tiny_tokenizer(), MARKS)
    message = f"the chat template {template} ends answers with '{re.escape(mark)}', which is not one token"
    with pytest.raises(FoveateError, match=message):
        compose(tiny_vision(), tiny_text(), tokenizer=lacking, template=template)
    made = compose(tiny_vision(), tiny_text(), tokenizer=lacking)
    made.save(tmp_path / "model")
    with pytest.raises(FoveateError, match=f"^{message}.*: name another template, such as vicuna_v1"):
        foveate.load(tmp_path / "model", template=template)
    data = write_toy_data(tmp_path / "toy", 8)
    spec = {"tiny": False, "method": None, "load": str(tmp_path / "model")}
    recipe = write_recipe(
        tmp_path, {"all": stage(["connector"], data, steps=1)}, **{**spec, "template": template}
    )
    with pytest.raises(FoveateError, match=message):
        train(recipe)
    assert not (tmp_path / "run").exists()
    tiny_model().save(tmp_path / "other")
    asked = foveate.load(tmp_path / "other", template=template)
    assert asked.processor.tokenizer.convert_tokens_to_ids(mark) in asked.model.generation_config.eos_token_id


@pytest.mark.parametrize(("end", "message"), UNENDED)
def test_an_end_that_is_never_learnt_is_refused(tmp_path: Path, end: str, message: str) -> None:
    tiny_model().save(tmp_path / "model")
    end = end if "endgeneration" in end else end + "{% endgeneration %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}\nA:"
        "{% generation %}{{ m['content'][0]['text'] }}"
        + end
        + "{% else %}\nQ:{% for p in m['content'] %}{{ p['text'] or '<image>' }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    data = write_toy_data(tmp_path / "toy", 8)
    spec = {"tiny": False, "method": None, "load": str(tmp_path / "model"), "template": None}
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data, steps=1)}, **spec)
    with pytest.raises(FoveateError, match=f"stages.all: .*{message}"):
        train(recipe)


def test_a_dry_run_shows_what_would_train_and_writes_nothing(tmp_path: Path) -> None:
    lora = "{on: [language_model.model.layers], rank: 4, alpha: 8}"
    changes = ["stages.pretrain.steps=1", "stages.finetune.steps=1", "stages.finetune.trains=[connector]"]
    changes += [f"stages.finetune.lora={lora}"]
    recipe, said = two_stages(tmp_path, n=8), {}
    before = sorted(tmp_path.rglob("*"))
    for dry_run in (True, False):
        console = Console(file=io.StringIO(), width=200)
        assert train(recipe, changes, console=console, dry_run=dry_run) == tmp_path / "run"
        assert isinstance(console.file, io.StringIO)
        said[dry_run] = console.file.getvalue().splitlines()
        assert (tmp_path / "run" / "model").is_dir() != dry_run
        if dry_run:
            assert sorted(tmp_path.rglob("*")) == before
    assert f"everything is well with {recipe}; nothing was written" in said[True]
    shown = [line for line in said[False] if line[:1] in "┃│" or "a step:" in line or "samples of" in line]
    assert len(shown) > 10
    assert [line for line in said[True] if line in shown] == shown


def test_a_dry_run_misses_weights(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path / "model")
    changes = ["model.tiny=false", "model.method=null", f"model.load={tmp_path / 'model'}"]
    recipe = two_stages(tmp_path, n=8)
    train(recipe, changes, dry_run=True)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FoveateError, match="model holds no weights"):
        train(recipe, changes, dry_run=True)


def test_other_folders_are_left_alone(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for changes, resume, message in (
        ([f"output={tmp_path / 'mine'}"], None, "exists already and holds no run: choose another output"),
        ([f"output={tmp_path / 'new'}"], True, "there is no run in .* to resume"),
        ([], False, "holds a run already"),
        (
            ["stages.finetune.lr=1e-5"],
            None,
            "holds a run in which stages.finetune.lr was 0.01 and is now 1e-05",
        ),
    ):
        with pytest.raises(FoveateError, match=message):
            train(recipe, changes, resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_stage_may_leave_a_part_of_the_method_alone(tmp_path: Path) -> None:
    """The first one leaves the chain alone, as in the recipe."""
    data = write_toy_data(tmp_path / "toy", 4)
    settings = {"batch": 2, "micro_batch": 2, "steps": 2}
    stages = {
        "pretrain": stage(["connector.projector"], data, **settings, options={"chain": False}),
        "finetune": stage(["connector", "language_model"], data, **settings),
    }
    train(write_recipe(tmp_path, stages, method="coroi"))
    result = FoveateForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    before = FoveateForConditionalGeneration.from_pretrained(
        tmp_path / "run" / "stages" / "pretrain" / "model"
    )
    changed = {
        name
        for (name, p), (_, q) in zip(
            result.connector.named_parameters(), before.connector.named_parameters(), strict=True
        )
        if not torch.equal(p, q)
    }
    assert any(name.startswith("attentions.0.value") for name in changed)
    assert result.config.options.get("rois", 4) == 4
    assert not before.method.reads_source


def test_pictures_of_more_pixels_than_the_recipe_allows(tmp_path: Path) -> None:
    recipe = two_stages(tmp_path, 6)
    with pytest.raises(FoveateError, match=r"more than max_pixels 2000.*model\.max_pixels in a recipe"):
        train(recipe, ["model.max_pixels=2000"], dry_run=True)
    train(recipe, ["model.max_pixels=20000"], dry_run=True)
