"""Many questions about one picture as one sequence: [visual tokens][question 1][question 2] ...

Every question sees the visual tokens and itself, and counts its positions as if it came alone after them, so
its logits are those of its own conversation, while the visual tokens pass the LLM once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.lab.questions import CAPTION, Question

IGNORED = -100  # label without loss
VISUAL, PADDING = 0, -1  # block numbers; questions count from 1


class Sample(NamedTuple):
    """A question and its answer as token ids; `answer` is where the answer starts.

    `earlier`: starts and ends of parts before it that are also learnt.
    """

    ids: list[int]
    answer: int
    earlier: tuple[tuple[int, int], ...] = ()

    @property
    def learnt(self) -> list[tuple[int, int]]:
        """Starts and ends of the parts that are learnt."""
        return [*self.earlier, (self.answer, len(self.ids))]


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences.

    Attributes:
        input_ids: (B, T), placeholders first.
        labels: (B, T), `IGNORED` outside answers.
        attention_mask: (B, 1, T, T) bool, True if a token sees another.
        position_ids: (B, T).
        blocks: (B, T): `VISUAL`, the question's number from 1, `PADDING`.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    blocks: Tensor

    def to(self, device: str | torch.device) -> Packed:
        return Packed(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: getattr(self, name) for name in names}


def encode(question: Question, tokenizer: Any) -> Sample:
    """The question, its answer, and the token that ends it; a caption may continue and has no end."""
    asked = tokenizer(question.text, add_special_tokens=False).input_ids
    answer = tokenizer(question.answer, add_special_tokens=False).input_ids
    end = [] if question.kind == CAPTION else [tokenizer.eos_token_id]
    return Sample([*asked, *answer, *end], len(asked))


def pack(
    samples: Sequence[Sequence[Sample]],
    visual: int,
    placeholder: int,
    padding: int,
    visual_positions: Tensor | None = None,
) -> Packed:
    """Packs the questions of every picture after `visual` placeholders.

    Args:
        samples: per picture its questions.
        visual: visual tokens of each picture.
        placeholder: id of a visual token.
        padding: id that pads shorter rows.
        visual_positions: (B, visual) increasing positions of the visual tokens; by default 0, 1, 2, ...
    """
    rows = len(samples)
    length = max(sum(len(sample.ids) for sample in row) for row in samples)
    ids = torch.full((rows, length), padding)
    labels = torch.full((rows, length), IGNORED)
    blocks = torch.full((rows, length), PADDING)
    offsets = torch.zeros((rows, length), dtype=torch.long)
    for b, row in enumerate(samples):
        start = 0
        for number, sample in enumerate(row, 1):
            end = start + len(sample.ids)
            ids[b, start:end] = torch.tensor(sample.ids)
            for first, last in sample.learnt:
                labels[b, start + first : start + last] = ids[b, start + first : start + last]
            blocks[b, start:end] = number
            offsets[b, start:end] = torch.arange(end - start)
            start = end
    if visual_positions is None:
        visual_positions = torch.arange(visual).expand(rows, visual)
    first_text = visual_positions[:, -1:] + 1 if visual else torch.zeros((rows, 1), dtype=torch.long)
    blocks = torch.cat([torch.full((rows, visual), VISUAL), blocks], dim=1)  # (B, T)
    return Packed(
        input_ids=torch.cat([torch.full((rows, visual), placeholder), ids], dim=1),
        labels=torch.cat([torch.full((rows, visual), IGNORED), labels], dim=1),
        attention_mask=visible(blocks),
        position_ids=torch.cat([visual_positions, first_text + offsets], dim=1),
        blocks=blocks,
    )


def portions(lengths: Sequence[int], most: int) -> list[range]:
    """Cuts texts of these lengths into runs of at most `most` tokens, or of one text.

    Attention costs the square of a row's length: several short rows are cheaper than a long one.
    """
    runs: list[range] = []
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if total and total + length > most:
            runs.append(range(start, i))
            start, total = i, 0
        total += length
    return [*runs, range(start, len(lengths))]


def visible(blocks: Tensor) -> Tensor:
    """(B, T) block numbers -> (B, 1, T, T): a token sees earlier ones of its block, and visual ones."""
    causal = blocks.new_ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool).tril()
    own = blocks[:, :, None] == blocks[:, None, :]
    return (causal & (own | (blocks == VISUAL)[:, None, :]))[:, None]


def all_right(logits: Tensor, packed: Packed) -> list[list[bool]]:
    """Per picture and question, whether greedy decoding would give exactly the answer.

    logits (B, T, vocabulary). True if every token of the answer is the most likely one after those before it.
    """
    guesses = logits[:, :-1].argmax(-1)  # (B, T - 1)
    labels, blocks = packed.labels[:, 1:], packed.blocks[:, 1:]
    wrong = (labels != IGNORED) & (guesses != labels)
    most = int(blocks.max())
    missed = torch.stack([(wrong & (blocks == number)).any(1) for number in range(1, most + 1)], dim=1)
    asked = torch.stack([(blocks == number).any(1) for number in range(1, most + 1)], dim=1)
    return [
        [not bad for bad, there in zip(row, present, strict=True) if there]
        for row, present in zip(missed.tolist(), asked.tolist(), strict=True)
    ]
