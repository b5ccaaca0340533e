"""transformers' Trainer for one stage: learning rates per module, our order of samples, safe checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from foveate.data.dataset import Samples
from foveate.data.sampling import EpochSampler
from foveate.train.parts import learning_rate
from foveate.train.recipe import Stage

COMPLETE = "complete"  # file that marks a complete checkpoint


class StageTrainer(Trainer):
    """A Trainer with the stage's order of samples and learning rates."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *, stage: Stage, sampler: EpochSampler, **kwargs: Any) -> None:
        self.stage, self.sampler = stage, sampler
        super().__init__(**kwargs)
        vars(self.model.config).pop("use_cache", None)  # set by the Trainer, and would be saved

    # The Trainer calls this for the order of samples; it has no public interface for it.
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss. If only the connector trains, a batch without pictures has gradient zero."""
        loss = super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)
        if not loss.requires_grad:
            loss = loss + 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """A group of parameters per learning rate and weight decay; norms and biases never decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(model))  # the Trainer's rule: no norms, no biases
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    decay = self.stage.weight_decay if name in decaying else 0.0
                    groups.setdefault((learning_rate(name, self.stage), decay), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {"params": params, "lr": lr, "weight_decay": decay}
                    for (lr, decay), params in groups.items()
                ],
                **settings,
            )
        return self.optimizer


class EveryGradient(TrainerCallback):
    """Gives what trains and got no gradient in a step a gradient of zero, as it has on several devices.

    The optimizer would leave it out otherwise, and the result would depend on the number of devices.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class Epochs(TrainerCallback):
    """Gives sampler and samples the epoch.

    accelerate does not do so if several devices resume within an epoch.
    """

    def __init__(self, sampler: EpochSampler, samples: Samples) -> None:
        self.told = (sampler, samples)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.told:
            one.set_epoch(int(state.epoch or 0))


class SafeCheckpoints(TrainerCallback):
    """Marks a checkpoint once it is complete, and only then deletes the one before."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            folder = Path(str(args.output_dir))
            newest = folder / f"checkpoint-{state.global_step}"
            (newest / COMPLETE).touch()
            for other in folder.glob("checkpoint-*"):
                if other != newest:
                    shutil.rmtree(other)
        processes.wait_for_everyone()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from; None if there is no complete one."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def trained(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the stage's last step."""
    state = _state(checkpoint)
    return state.global_step >= state.max_steps > 0


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Gives a Trainer's model the weights of a checkpoint, and the Trainer its losses."""
    for weights in sorted(checkpoint.glob("*.safetensors")):
        trainer.model.load_state_dict(load_file(weights), strict=False)
    trainer.state = _state(checkpoint)


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


class Report(TrainerCallback):
    """A progress bar on a terminal, a line per logged step elsewhere."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.start()
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, loss=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        loss = f"loss {float(logs['loss']):.4f}"
        self.progress.update(self.task, loss=loss)
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: step {state.global_step} of {state.max_steps}, {loss}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
