"""The class that lmms-eval loads for `--model foveate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from foveate.ask.foveate import load
from foveate.clients.lmms import MISSING, Request, Settings, answer, batches, read_options
from foveate.errors import FoveateError

try:
    from accelerate import Accelerator
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise FoveateError(f"{MISSING} ({error})") from error

OF_LMMS_EVAL = ("max_batch_size",)  # passed to every model; no batch is searched for here


class FoveateLmms(lmms):
    """A Foveate model in lmms-eval, in the chat protocol.

    With `accelerate launch`, each process holds a whole model and answers its share of the questions.

    Args:
        pretrained: folder or hub id, as for `foveate.load`; by default the embedded model.
        batch_size: questions answered together.
        device: as for `foveate.load`; ignored where there are several processes, each of which has its own.
        max_new_tokens: for tasks without a bound.
        options: changes to the method's options, a mapping in braces.
        **more: the other arguments of `foveate.load`.

    Raises:
        FoveateError: as `foveate.load`; a batch size that is not a whole number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 256,
        options: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise FoveateError(f"--batch_size must be a whole number of at least 1, not {batch_size!r}")
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        given = {name: value for name, value in more.items() if name not in OF_LMMS_EVAL}
        self.foveate = load(
            None if pretrained is None else str(pretrained),
            device=device,
            options=read_options(options),
            **given,
        )

    @property
    def device(self) -> torch.device:
        return self.foveate.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers questions in batches; answers come in the order of `requests`."""
        asked = [self._request(*request.args) for request in requests]
        results: list[GenerationResult | None] = [None] * len(asked)
        with tqdm(total=len(asked), disable=self.rank != 0, desc="Foveate") as progress:
            for batch in batches(asked, self.batch_size):
                for i, reply in zip(batch, answer(self.foveate, [asked[i] for i in batch]), strict=True):
                    ledger = reply.ledger
                    counts = TokenCounts(ledger.prompt_tokens + ledger.kept_tokens, ledger.new_tokens)
                    results[i] = GenerationResult(reply.text, counts)
                    self.cache_hook.add_partial("generate_until", (asked[i].where,), reply.text)
                    progress.update()
        return [result for result in results if result is not None]

    def _request(
        self, context: str, messages: Any, settings: Mapping[str, Any] | None, doc: int, task: str, split: str
    ) -> Request:
        documents = self.task_dict[task][split]
        return Request(
            lambda: messages(documents[doc]),
            Settings.of(settings or {}, task, self.max_new_tokens),
            f"task {task}, document {doc}",
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        raise _refused("loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise _refused("generate_until_multi_round")

    def generate_visual_cot(self, requests: Sequence[Instance]) -> NoReturn:
        raise _refused("generate_visual_cot")


def _refused(kind: str) -> FoveateError:
    return FoveateError(
        f"the model foveate answers in words: choose tasks of output_type generate_until, not {kind}"
    )
