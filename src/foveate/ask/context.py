"""State kept from one turn of a conversation to the next, so that the LLM need not read it again.

A turn's prompt begins with what was said before. `Context` keeps the LLM's key and value cache over parallel
conversations, and knows the token in each of its columns. Only the part of the next prompt after the common
prefix is read; columns outside the prefix are masked. Replies are the same as when everything is read again,
because every token keeps its position.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate import upstream
from foveate.model.modeling import EncodedPictures, FoveateForConditionalGeneration


@dataclass(frozen=True)
class Passage:
    """A conversation up to where the model continues.

    Attributes:
        ids: its tokens, one placeholder for each visual token.
        pictures: per picture all that its visual tokens depend on.
        places: per picture its first placeholder and the one after its last.
    """

    ids: list[int]
    pictures: list[Hashable]
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class Written:
    """What the model wrote, and how many tokens it read for it.

    Attributes:
        ids: the new tokens, including the one that ends the answer.
        read: tokens of the prompt read now.
        kept: tokens of the prompt found in the cache.
    """

    ids: list[int]
    read: int
    kept: int


@dataclass
class _Row:
    ids: list[int]  # tokens of a conversation that the cache holds or a connector dropped
    columns: list[int]  # column of each in the cache; -1 if dropped
    pictures: list[Hashable]


class Context:
    """The key and value cache of parallel conversations after their last turn; empty at first."""

    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.cache: DynamicCache | None = None
        self.held = torch.zeros(0, 0, dtype=torch.long)  # (B, W) the token in each column of the cache

    def clear(self) -> None:
        self.rows, self.cache = [], None

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only some of the conversations."""
        if self.cache is not None and len(rows) < len(self.rows):
            upstream.keep_rows(self.cache, torch.tensor(rows, device=self.held.device))
            self.held = self.held[list(rows)]
            self.rows = [self.rows[row] for row in rows]

    def known(self, row: int, prompt: Passage) -> int:
        """The number of a prompt's first tokens in the cache; its last token never counts."""
        if self.cache is None:
            return 0
        before = self.rows[row]
        most = min(len(before.ids), len(prompt.ids) - 1)
        for i, (start, _) in enumerate(prompt.places):
            if prompt.pictures[i : i + 1] != before.pictures[i : i + 1]:
                most = min(most, start)
                break
        return next((i for i in range(most) if before.ids[i] != prompt.ids[i]), most)

    def go_on(
        self,
        model: FoveateForConditionalGeneration,
        prompts: Sequence[Passage],
        known: Sequence[int],
        encoded: EncodedPictures | None,
        **generation: Any,
    ) -> list[Written]:
        """Reads the new part of each prompt and lets the model write.

        Args:
            model: the model whose cache this is.
            prompts: one for each conversation.
            known: the result of `known` for each.
            encoded: the pictures after the known tokens, conversation after conversation.
            **generation: arguments of transformers' `generate`; greedy decoding by default.
        """
        cache, self.cache = self.cache, None  # dropped if generation is interrupted, never half-written
        visible = visible_tokens(prompts, known, encoded)
        width = max(sum(row) for row in visible)
        past = 0 if cache is None else self.held.shape[1]
        ids = torch.zeros(len(prompts), past + width, dtype=torch.long, device=model.device)
        mask = torch.zeros_like(ids)
        columns: list[list[int]] = []
        if cache is not None:
            ids[:, :past] = self.held
        for row, (prompt, first, seen) in enumerate(zip(prompts, known, visible, strict=True)):
            before = self.rows[row].columns[:first] if first else []
            there = torch.tensor([c for c in before if c >= 0], dtype=torch.long, device=model.device)
            mask[row, there] = 1
            new = [token for token, keep in zip(prompt.ids[first:], seen, strict=True) if keep]
            start = past + width - len(new)
            ids[row, start:], mask[row, start:] = torch.tensor(new, device=model.device), 1
            # Masked columns repeat a token of the prompt: a repetition penalty must find nothing else there.
            text = next((n for n in prompt.ids if n != model.config.image_token_id), prompt.ids[-1])
            ids[row] = ids[row].where(mask[row].bool(), text)
            place = iter(range(start, past + width))
            columns.append(before + [next(place) if keep else -1 for keep in seen])
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs={"image": compacted(encoded)} if encoded else {},
            **upstream.generation_arguments(
                generation, return_dict_in_generate=True, **{upstream.CACHE: cache}
            ),
        )
        sequences = output.sequences[:: len(output.sequences) // len(prompts)]  # the first of several answers
        ends = _ends(model, generation)
        written = [_until(row.tolist(), ends, len(prompts) > 1) for row in sequences[:, past + width :]]
        self._keep(output.get(upstream.CACHE), sequences, prompts, columns, written, past + width)
        return [
            Written(new, sum(seen), sum(c >= 0 for c in row[:first]))
            for new, seen, row, first in zip(written, visible, columns, known, strict=True)
        ]

    def _keep(
        self,
        cache: Any,
        sequences: Tensor,
        prompts: Sequence[Passage],
        columns: Sequence[list[int]],
        written: Sequence[list[int]],
        length: int,
    ) -> None:
        """Notes what the cache holds now, if it can be resumed."""
        if not upstream.holds_all(cache, len(prompts)):  # or several beams or answers
            return
        held = cache.get_seq_length()
        if held != sequences.shape[1] - 1:
            return
        self.cache, self.held, self.rows = cache, sequences[:, :held], []
        for prompt, places, new in zip(prompts, columns, written, strict=True):
            fed = new[: held - length]
            self.rows.append(
                _Row(prompt.ids + fed, places + list(range(length, length + len(fed))), prompt.pictures)
            )


ONE_ANSWER = ("num_beams", "num_return_sequences")  # must be 1 to resume a cache
OWN_CACHE = (*upstream.CACHE_NAMES, "cache_implementation", "assistant_model", "prompt_lookup_num_tokens")


def can_go_on(model: FoveateForConditionalGeneration, generation: Mapping[str, Any]) -> bool:
    """Whether generation with these arguments can start from a cache and leave one."""
    config = upstream.settings_of(model.generation_config, generation)
    single = all(config.get(name) in (None, 1) for name in ONE_ANSWER)
    return single and config.get("use_cache") is not False and not any(config.get(n) for n in OWN_CACHE)


def visible_tokens(
    prompts: Sequence[Passage], known: Sequence[int], encoded: EncodedPictures | None
) -> list[list[bool]]:
    """Per prompt, the mask of tokens after the known ones that the LLM gets: not the dropped ones."""
    kept = iter(encoded.kept if encoded is not None and encoded.kept is not None else [])
    visible = []
    for prompt, first in zip(prompts, known, strict=True):
        seen = [True] * (len(prompt.ids) - first)
        for start, end in prompt.places:
            if start >= first and encoded is not None and encoded.kept is not None:
                seen[start - first : end - first] = next(kept).tolist()
        visible.append(seen)
    return visible


def compacted(encoded: EncodedPictures) -> EncodedPictures:
    """The pictures without dropped tokens."""
    if encoded.kept is None:
        return encoded
    tokens = [t[keep] for t, keep in zip(encoded.pooler_output, encoded.kept, strict=True)]
    return EncodedPictures(tokens, injection=encoded.injection, pictures=encoded.pictures)


def _ends(model: FoveateForConditionalGeneration, generation: Mapping[str, Any]) -> set[int]:
    config = upstream.settings_of(model.generation_config, generation)
    ends = config.get("eos_token_id")
    return {ends} if isinstance(ends, int) else set(ends or ())


def _until(ids: list[int], ends: set[int], several: bool) -> list[int]:
    """A conversation's reply; what follows its end is padding, if other replies are longer."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return ids if stop is None or not several else ids[: stop + 1]
