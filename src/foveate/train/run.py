"""Follows a recipe: checks all of it, then trains stage after stage, resuming an earlier run.

    <output>/recipe.yaml                        the recipe with its changes and all defaults
    <output>/stages/<stage>/data.json           fingerprints of the stage's data
    <output>/stages/<stage>/checkpoint-N/       to resume from; deleted when the stage is done
    <output>/stages/<stage>/tensorboard/        loss, learning rate, gradient norm
    <output>/stages/<stage>/trainer_state.json  the same numbers, as transformers' Trainer keeps them
    <output>/stages/<stage>/model/              result of a stage before the last
    <output>/model/                             the trained model

A model folder gets its name only once it is completely written: it marks the stage as done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from foveate.errors import FoveateError, require
from foveate.files import alone, explained, write
from foveate.shipped import find
from foveate.train.recipe import Recipe, Stage, difference, load_recipe, to_dict
from foveate.versions import names_versions

if TYPE_CHECKING:
    from foveate.model.modeling import FoveateForConditionalGeneration
    from foveate.train.prepare import Prepared
    from foveate.train.trainer import StageTrainer

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@names_versions
def train(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    resume: bool | None = None,
    console: Console | None = None,
    dry_run: bool = False,
) -> Path:
    """Trains by a recipe and returns the folder of the run; the model is in its subfolder `model`.

    Everything is checked before anything is written. Under torchrun or accelerate, every process calls this.

    Args:
        recipe_path: the YAML file, or the name of one that comes with Foveate.
        overrides: changes such as `stages.pretrain.lr=1e-4`.
        resume: True resumes the run in the output folder, False refuses if there is one, None resumes if
            there is one.
        console: for the table of what trains and the progress; nothing is shown without one.
        dry_run: only checks, and shows what would train; weights are found, but not read.

    Raises:
        FoveateError: a wrong recipe, model or data, an output folder that holds something else, missing
            packages or devices.
    """
    recipe = load_recipe(recipe_path, overrides)
    _check_packages(recipe)
    from foveate.train.models import find_weights, typed

    recipe = typed(recipe)
    output = Path(recipe.output)
    try:
        _check_output(recipe, resume)
    except OSError as error:
        raise FoveateError(f"output {str(output)[:200]}: {error.strerror}") from error
    processes = _processes()
    if console is None or not processes.is_main_process:
        console = Console(quiet=True)
    names = [name for name in recipe.stages if not _result(recipe, name).is_dir()]
    if (output / "model").is_dir():
        console.print(f"the run in {output} is complete: nothing to do")
        return output
    from foveate.train.prepare import prepare

    with console.status("checking model and data"):
        stages = [prepare(recipe, name) for name in names]
        for stage in stages:
            _refuse_changed_data(recipe, stage)
        if dry_run:
            find_weights(recipe.model)
        model = None if dry_run else _start(recipe, stages[0])
    if model is None:
        for stage in stages:
            _show(stage, stage.skeleton, console)
        done = f"everything is well with {find('recipe', recipe_path)}; nothing was written"
        console.print(done, highlight=False, markup=False, soft_wrap=True)
        return output
    processes.wait_for_everyone()  # all have checked the output folder before anyone writes to it
    with alone(output) if processes.is_main_process else nullcontext(), explained(output):
        if processes.is_main_process:
            if names != [name for name in recipe.stages if not _result(recipe, name).is_dir()]:
                raise FoveateError(f"another run has just trained in {output}: run the command again")
            _write_recipe(recipe)
        _train_stage(recipe, stages[0], model, console)
        del model  # two models may not fit
        for stage in stages[1:]:
            _train_stage(recipe, stage, _start(recipe, stage), console)
    console.print(f"model written to {output / 'model'}")
    return output


def _check_packages(recipe: Recipe) -> None:
    lora = any(stage.lora for stage in recipe.stages.values())
    for package in ("accelerate", "tensorboard", *(["peft"] if lora else [])):
        require(package, "train", "training")


def _check_output(recipe: Recipe, resume: bool | None) -> None:
    """Raises `FoveateError` unless the output folder is new or holds a run of this recipe."""
    output = Path(recipe.output)
    found = output / "recipe.yaml"
    if not found.is_file():
        if resume:
            raise FoveateError(f"there is no run in {output} to resume: check output, or start a new run")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FoveateError(f"{output} exists already and holds no run: choose another output")
        parent = next(folder for folder in output.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise FoveateError(f"output {output}: {parent} is not a folder that can be written to")
        return
    if resume is False:
        raise FoveateError(f"{output} holds a run already: choose another output, or resume that run")
    try:
        before = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise FoveateError(f"{found} is broken: choose another output, or delete that run")
    changed = difference(before, to_dict(recipe))
    if changed:
        raise FoveateError(f"{output} holds a run in which {changed}: choose another output, or undo that")


def _processes() -> Any:
    """The processes of this run, one per device."""
    import torch
    from accelerate import PartialState

    gpus = torch.cuda.device_count()
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        raise FoveateError(
            f"{gpus} GPUs are visible to one process: start it as `torchrun --nproc-per-node {gpus} -m "
            f"foveate train ...`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    return PartialState(cpu=_on_cpu())


def _on_cpu() -> bool:
    import torch

    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def _write_recipe(recipe: Recipe) -> None:
    write(Path(recipe.output) / "recipe.yaml", _text(recipe))


def _text(recipe: Recipe) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _note(recipe: Recipe, prepared: Prepared, model: FoveateForConditionalGeneration) -> None:
    """Writes down in a model's configuration what trained it. Its card says so."""
    from foveate.train.prepare import SAMPLES

    data = {Path(name).name: digest for name, digest in prepared.data.items() if name != SAMPLES}
    run = {"stage": prepared.name, "recipe": hashlib.sha256(_text(recipe).encode()).hexdigest(), "data": data}
    model.config.trained = [*(model.config.trained or []), run]


def _refuse_changed_data(recipe: Recipe, prepared: Prepared) -> None:
    """Raises `FoveateError` if a stage's checkpoint was trained on other data."""
    from foveate.train.prepare import changed_data
    from foveate.train.trainer import newest_checkpoint

    folder = _folder(recipe, prepared.name)
    if newest_checkpoint(folder) is None:
        return
    noted = folder / "data.json"
    try:
        before = json.loads(noted.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise FoveateError(f"{noted} is missing or broken: choose another output, or delete {folder}")
    changed = changed_data(before, prepared.data)
    if changed:
        raise FoveateError(
            f"stages.{prepared.name}: {changed} changed since the run in {recipe.output} began: choose "
            f"another output, undo that, or delete {folder}"
        )


def _folder(recipe: Recipe, name: str) -> Path:
    return Path(recipe.output) / "stages" / name


def _result(recipe: Recipe, name: str) -> Path:
    """Where a stage's model goes."""
    last = name == list(recipe.stages)[-1]
    return Path(recipe.output) / "model" if last else _folder(recipe, name) / "model"


def _train_stage(
    recipe: Recipe, prepared: Prepared, model: FoveateForConditionalGeneration, console: Console
) -> None:
    from accelerate import PartialState
    from transformers import set_seed

    from foveate.data.dataset import errors_of_workers
    from foveate.devices import DTYPES
    from foveate.train.parts import add_adapters, merge_adapters, round_weights, select, train_exactly
    from foveate.train.trainer import load_checkpoint, newest_checkpoint, trained

    stage, where = prepared.stage, f"stages.{prepared.name}"
    if stage.lora is not None:
        set_seed(recipe.seed)  # for the adapters' first weights
        add_adapters(model, stage, where)
    select(model, stage, where)
    train_exactly(model)
    _show(prepared, model, console)
    checkpoint = newest_checkpoint(_folder(recipe, prepared.name))
    if checkpoint:
        console.print(f"resuming from {checkpoint}")
    if PartialState().is_main_process:
        folder = _folder(recipe, prepared.name)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "data.json", json.dumps(prepared.data, indent=1))
    trainer = _trainer(recipe, prepared, model, console)
    if checkpoint and trained(checkpoint):  # one more step would follow otherwise
        load_checkpoint(trainer, checkpoint)
    else:
        with errors_of_workers():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if _saves_whole(stage):
        if stage.lora is not None:
            merge_adapters(model)
        round_weights(model, DTYPES[recipe.model.dtype])
    model.stop_at(prepared.processor.answer_end())
    _note(recipe, prepared, model)
    _save(recipe, prepared, trainer)


def _saves_whole(stage: Stage) -> bool:
    """Whether a stage's result is a whole model, not an adapter."""
    return stage.lora is None or stage.lora.save is None


def _start(recipe: Recipe, prepared: Prepared) -> FoveateForConditionalGeneration:
    """The model that a stage starts from, with the stage's options."""
    from foveate.train.models import first_model, load_model

    names = list(recipe.stages)
    before = names.index(prepared.name) - 1
    if before < 0:
        return first_model(recipe, prepared.options)
    return load_model(_result(recipe, names[before]), recipe.model, prepared.options)


def _show(prepared: Prepared, model: FoveateForConditionalGeneration, console: Console) -> None:
    console.print(_table(prepared, model))
    console.print(_amounts(prepared), highlight=False, markup=False)


def _table(prepared: Prepared, model: FoveateForConditionalGeneration) -> Table:
    """What trains, and the learning rates."""
    from foveate.train.parts import parts

    stage = prepared.stage
    table = Table(title=f"stage {prepared.name}")
    table.add_column("module")
    for column in ("parameters", "train", "learning rate"):
        table.add_column(column, justify="right")
    for part in parts(model, stage):
        rates = ", ".join(f"{rate:g}" for rate in part.lrs)
        table.add_row(part.name, f"{part.parameters:,}", f"{part.trainable:,}", rates or "frozen")
    return table


def _amounts(prepared: Prepared) -> str:
    stage = prepared.stage
    shown = int((prepared.samples.pictures() > 0).sum())
    devices = stage.batch // (stage.micro_batch * prepared.accumulation)
    left_out = f", {prepared.left_out} longer ones left out" if prepared.left_out else ""
    if prepared.useless:
        left_out += f", {prepared.useless} left out because their regions are unknown"
    if prepared.missing:
        left_out += f", {prepared.missing} left out because their pictures are missing"
    regions = "".join(f"{r.report()}\n" for r in prepared.samples.regions if r is not None)
    return (
        f"{regions}"
        f"{len(prepared.samples)} samples of up to {prepared.lengths.max()} tokens, {shown} with pictures"
        f"{left_out}\n{stage.batch} samples a step: micro-batch {stage.micro_batch}, "
        f"accumulation {prepared.accumulation}, devices {devices}"
    )


def _trainer(
    recipe: Recipe, prepared: Prepared, model: FoveateForConditionalGeneration, console: Console
) -> StageTrainer:
    from accelerate import PartialState
    from torch.utils.tensorboard import SummaryWriter
    from transformers import PrinterCallback, TrainingArguments
    from transformers.integrations import TensorBoardCallback

    from foveate.data.dataset import Collator
    from foveate.data.sampling import EpochSampler
    from foveate.train.scoring import Scoring
    from foveate.train.trainer import Epochs, EveryGradient, Report, SafeCheckpoints, StageTrainer

    stage, folder = prepared.stage, _folder(recipe, prepared.name)
    sampler = EpochSampler(
        prepared.lengths, prepared.samples.pictures(), stage.batch, stage.group_by, recipe.seed
    )
    writer = SummaryWriter(str(folder / "tensorboard")) if PartialState().is_main_process else None
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=stage.micro_batch,
        gradient_accumulation_steps=prepared.accumulation,
        num_train_epochs=stage.epochs,
        max_steps=stage.steps or -1,
        learning_rate=stage.lr,
        lr_scheduler_type=SCHEDULES[stage.schedule],
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.bf16,
        **(_checkpointing() if stage.checkpoint_activations else {}),
        use_cpu=_on_cpu(),
        # Some towers have parameters that no forward pass uses, such as a mask token.
        ddp_find_unused_parameters=any(p.requires_grad for p in model.vision_tower.parameters()),
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=not _on_cpu(),
        remove_unused_columns=False,
        logging_steps=stage.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_steps,
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
    )
    trainer = StageTrainer(
        stage=stage,
        sampler=sampler,
        model=model,
        args=arguments,
        train_dataset=prepared.samples,
        data_collator=Collator(prepared.processor.tokenizer.pad_token_id),
        callbacks=[
            Epochs(sampler, prepared.samples),
            EveryGradient(),
            SafeCheckpoints(),
            TensorBoardCallback(writer),
            Report(console, prepared.name),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if prepared.questions is not None:
        trainer.add_callback(Scoring(trainer, prepared, writer, folder / "scores.jsonl", console))
    return trainer


def _checkpointing() -> dict[str, Any]:
    """The Trainer's arguments for checkpointed activations, which transformers renamed."""
    from transformers import TrainingArguments

    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _save(recipe: Recipe, prepared: Prepared, trainer: StageTrainer) -> None:
    """Writes a stage's result under another name, then gives it its own."""
    from accelerate import PartialState

    processes = PartialState()
    folder, result = _folder(recipe, prepared.name), _result(recipe, prepared.name)
    unfinished = result.with_name("model.unfinished")
    if processes.is_main_process:
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        shutil.rmtree(unfinished, ignore_errors=True)
    processes.wait_for_everyone()
    if _saves_whole(prepared.stage):
        trainer.save_model(str(unfinished))
    elif processes.is_main_process:
        from foveate.train.adapter import base_of, write_adapter

        write_adapter(trainer.model, prepared.stage, base_of(recipe, prepared.name), unfinished)
    if processes.is_main_process:
        (unfinished / "training_args.bin").unlink(missing_ok=True)  # the Trainer's own file, a pickle
        prepared.processor.save_pretrained(unfinished)
        unfinished.rename(result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    processes.wait_for_everyone()
