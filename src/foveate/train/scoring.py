"""Scores while a stage trains: what the model answers to held-out questions, every so many steps.

A loss can fall while a model learns one answer for everything. The line of each score says how often the most
frequent answer comes, and what it would score alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import Trainer, TrainerCallback

from foveate.ask.foveate import Foveate
from foveate.evaluate.models import Own
from foveate.evaluate.run import asked, score
from foveate.train.prepare import Prepared


class Scoring(TrainerCallback):
    """Asks the model a stage's questions, and reports the scores.

    The first process asks, the others wait. Training goes on as if nothing had been asked.

    Args:
        trainer: whose model is asked.
        prepared: the stage, with its questions.
        writer: of TensorBoard, in the first process.
        file: gets one JSON line for each score.
        console: shows it.
    """

    def __init__(
        self, trainer: Trainer, prepared: Prepared, writer: Any, file: Path, console: Console
    ) -> None:
        assert prepared.stage.eval_data is not None and prepared.questions is not None
        self.trainer, self.prepared = trainer, prepared
        self.writer, self.file, self.console = writer, file, console
        self.data, (self.questions, self.metrics) = prepared.stage.eval_data, prepared.questions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.data.steps
        if every is not None and state.global_step % every == 0 and state.global_step < state.max_steps:
            self._score(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._score(state)

    def _score(self, state: Any) -> None:
        processes = PartialState()
        if processes.is_main_process:
            self._report(state, self._found())
        processes.wait_for_everyone()

    def _found(self) -> dict[str, Any]:
        model: Any = self.trainer.model
        model.stop_at(self.prepared.processor.answer_end())
        answering = Own(Foveate(model, self.prepared.processor))
        records: list[dict[str, Any]] = []
        limits, count = self.prepared.processor.image_processor.limits, len(self.questions.samples)
        with _asking(model), self.trainer.autocast_smart_context_manager():
            for begin in range(0, count, self.data.batch):
                numbers = range(begin, min(begin + self.data.batch, count))
                new = self.data.max_new_tokens
                records += asked(answering, self.questions, numbers, new, limits, answering.transparency)
        return {**score(self.questions.samples, records, self.metrics), "records": records}

    def _report(self, state: Any, found: dict[str, Any]) -> None:
        most, name = found["most_frequent"], self.prepared.name
        # Not by the Trainer's own log, which would count as that of the loss.
        means = {f"eval_{key}": own["mean"] for key, own in found["scores"].items()}
        state.log_history.append({"step": state.global_step, **means})
        for key, mean in means.items():
            self.writer.add_scalar(f"eval/{key.removeprefix('eval_')}", mean, state.global_step)
        with self.file.open("a", encoding="utf-8") as file:
            shown = [
                {key: record[key] for key in ("id", "question", "prediction", "answers", "scores")}
                for record in found.pop("records")
            ]
            line = {"step": state.global_step, **found, "samples": shown}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        scores = ", ".join(
            f"{own['title']} {_percent(own['mean'])} (always one answer: {_percent(most['always'][key])})"
            for key, own in found["scores"].items()
        )
        texts = [f"{name}: step {state.global_step} of {state.max_steps}, {scores}"]
        share = f"{_percent(most['share'])} of the answers are {most['prediction']!r}"
        texts.append(f"  {share}{': the model has learnt one answer' if most['one_answer'] else ''}")
        texts += [
            f"  {sample['question']!r:.60} -> {sample['prediction']!r:.60}, not {sample['answers'][0]!r:.60}"
            if sample["answers"] and not any(sample["scores"].values())
            else f"  {sample['question']!r:.60} -> {sample['prediction']!r:.60}"
            for sample in shown[: self.data.shown]
        ]
        for text in texts:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _asking(model: torch.nn.Module) -> Iterator[None]:
    """For answers in the middle of training: without dropout, and with the random numbers as they were."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
