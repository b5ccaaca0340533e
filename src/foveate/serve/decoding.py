"""The LLM's part of a server: prompts are read in batches, and rows write a token each at a time.

A row that has read its prompt takes a slot, writes, and leaves; others join and leave between two tokens. Its
keys and values stay where they are meanwhile. Rows of an LLM whose cache is of another kind, and rows that
must not depend on any other, have a cache of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate import upstream
from foveate.model.modeling import EncodedPictures, FoveateForConditionalGeneration
from foveate.serve.prefixes import Known, States

WIDER = 128  # columns by which slots grow


@dataclass
class Part:
    """What a row reads now: the visible tokens of its prompt that are not known.

    Attributes:
        ids: at least one.
        known: the tokens before.
        encoded: the pictures among `ids`, without dropped tokens; None if there are none.
        before: how many visible tokens are known.
    """

    ids: list[int]
    known: Known = field(default_factory=Known)
    encoded: EncodedPictures | None = None
    before: int = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.known.columns


@dataclass(frozen=True)
class Read:
    """One row of a batch that was read: where its states are.

    Attributes:
        states: per layer keys and values (B, heads, T, width).
        row: its number.
        stretches: first and last column, and the one after it, of each stretch that it has.
    """

    states: Sequence[tuple[Tensor, Tensor]]
    row: int
    stretches: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return sum(end - start for start, end in self.stretches)


class Place(Protocol):
    """Where a row's keys and values are."""

    def states(self) -> States:
        """Per layer keys and values (heads, T, width) of what the row has read."""


class Own:
    """The cache of one row, as the LLM itself makes it.

    Args:
        cache: of a batch of one.
        length: tokens in it.
    """

    def __init__(self, cache: Any, length: int) -> None:
        self.cache, self.length = cache, length

    def states(self) -> States:
        states = upstream.states_of(self.cache)
        assert states is not None
        return [(keys[0], values[0]) for keys, values in states]

    @property
    def shared(self) -> bool:
        """Whether its states can go into slots, and be kept."""
        return upstream.states_of(self.cache) is not None

    def read(self) -> Read:
        states = upstream.states_of(self.cache)
        assert states is not None
        return Read(states, 0, ((0, self.length),))

    def step(self, model: FoveateForConditionalGeneration, token: int) -> Tensor:
        """Reads a token; returns the logits (V,) of the next."""
        device = model.device
        output = model(
            input_ids=torch.tensor([[token]], device=device),
            attention_mask=torch.ones(1, self.length + 1, dtype=torch.long, device=device),
            position_ids=torch.tensor([[self.length]], device=device),
            use_cache=True,
            **{upstream.CACHE: self.cache},
        )
        self.cache, self.length = output[upstream.CACHE], self.length + 1
        return output.logits[0, -1].float()


class Slot:
    """A row's place among others.

    Attributes:
        index: its row in the slots' tensors; another one after rows before it have left.
        length: tokens in it.
    """

    def __init__(self, slots: Slots, index: int, length: int) -> None:
        self.slots, self.index, self.length = slots, index, length

    def states(self) -> States:
        return self.slots.states(self)


class Slots:
    """Keys and values of the rows that write, each in a slot of its own.

    Args:
        model: whose rows they are.
        most: bytes that they take, unless a row alone takes more.
    """

    def __init__(self, model: FoveateForConditionalGeneration, most: int) -> None:
        self.model, self.most = model, most
        self.taken: list[Slot] = []
        self.cache: Any = None
        self.bytes_per_token = 0  # of one row, in all layers

    def __len__(self) -> int:
        return len(self.taken)

    @property
    def size(self) -> tuple[int, int]:
        """Slots that there are, and tokens that each has room for."""
        if self.cache is None:
            return 0, 0
        keys = self.cache.layers[0].keys
        return keys.shape[0], keys.shape[2]

    def join(self, read: Read) -> Slot:
        """A slot for a row that has been read."""
        length = read.length
        one = [(keys[0], values[0]) for keys, values in read.states]
        self.bytes_per_token = sum(part[:, 0].nbytes for layer in one for part in layer)
        self._grow(len(self.taken) + 1, length + 1, one)
        slot = Slot(self, len(self.taken), length)
        for layer, states in zip(self.cache.layers, read.states, strict=True):
            for held, part in zip((layer.keys, layer.values), states, strict=True):
                at = 0
                for start, end in read.stretches:
                    held[slot.index, :, at : at + end - start] = part[read.row, :, start:end]
                    at += end - start
        self.taken.append(slot)
        return slot

    def leave(self, slot: Slot) -> None:
        """Frees a slot; the last one's row moves into it. The last row of all gives back what is much."""
        last = self.taken.pop()
        if last is not slot:
            for layer in self.cache.layers:
                for held in (layer.keys, layer.values):
                    held[slot.index, :, : last.length] = held[last.index, :, : last.length]
            last.index = slot.index
            self.taken[slot.index] = last
        if not self.taken and math.prod(self.size) * self.bytes_per_token > self.most // 4:
            self.cache = None

    def states(self, slot: Slot) -> States:
        return [
            (layer.keys[slot.index, :, : slot.length], layer.values[slot.index, :, : slot.length])
            for layer in self.cache.layers
        ]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Reads one token of each row, in the order of `taken`; returns the logits (B, V) of the next."""
        lengths = [slot.length for slot in self.taken]
        used = max(lengths) + 1
        self._grow(len(lengths), used, self.states(self.taken[0]))
        device = self.model.device
        columns = torch.tensor(lengths, device=device)
        rows = torch.arange(len(lengths), device=device)
        for layer in self.cache.layers:
            layer.columns, layer.rows, layer.used = columns, rows, used
        output = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=(torch.arange(used, device=device) <= columns[:, None]).long(),
            position_ids=columns[:, None],
            use_cache=True,
            **{upstream.CACHE: self.cache},
        )
        for slot in self.taken:
            slot.length += 1
        return output.logits[:, -1].float()

    def _grow(self, slots: int, tokens: int, states: States) -> None:
        """Makes room for so many rows of so many tokens."""
        there, wide = self.size
        if slots <= there and tokens <= wide:
            return
        wide = wide if tokens <= wide else -(-tokens // WIDER) * WIDER
        fit = self.most // (wide * self.bytes_per_token)
        there = there if slots <= there else max(slots, min(2 * there, fit))
        rows, made = len(self.taken), []
        for i, layer in enumerate(states):
            new = [part.new_zeros(there, part.shape[0], wide, part.shape[2]) for part in layer]
            if rows:
                old = self.cache.layers[i]
                for held, part in zip(new, (old.keys, old.values), strict=True):
                    held[:rows, :, : part.shape[2]] = part[:rows]
            made.append((new[0], new[1]))
        self.cache = upstream.cache_of([upstream.SlotLayer(*layer) for layer in made])


def read(
    model: FoveateForConditionalGeneration, parts: Sequence[Part]
) -> tuple[Tensor, Sequence[Own | Read]]:
    """Reads the parts of several rows at once.

    Args:
        model: the model.
        parts: of several rows only if their pictures have nothing to inject, and the LLM keeps plain states.

    Returns:
        The logits (B, V) of the next tokens; and where each row's states are: those of one row alone that
        knew nothing are a cache of its own.
    """
    device, image = model.device, model.config.image_token_id
    width, past = max(len(part.ids) for part in parts), max(part.before for part in parts)
    ids = torch.full((len(parts), width), int(image == 0))  # any token that is no placeholder
    mask = torch.zeros(len(parts), past + width, dtype=torch.long)
    for row, part in enumerate(parts):
        ids[row, width - len(part.ids) :] = torch.tensor(part.ids)
        mask[row, past - part.before : past] = 1
        mask[row, past + width - len(part.ids) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    encoded = [part.encoded for part in parts if part.encoded is not None]
    given: dict[str, Any] = {"mm_encoder_outputs": {"image": _joined(encoded)}} if encoded else {}
    if past:
        given[upstream.CACHE] = upstream.cache_of(_with_room(parts, past, width))
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        logits_to_keep=1,
        use_cache=True,
        **given,
    )
    cache, logits = output[upstream.CACHE], output.logits[:, -1].float()
    if len(parts) == 1 and not past:
        return logits, [Own(cache, width)]
    states = upstream.states_of(cache)
    assert states is not None
    return logits, [
        Read(states, row, ((past - part.before, past), (past + width - len(part.ids), past + width)))
        for row, part in enumerate(parts)
    ]


def _joined(encoded: Sequence[EncodedPictures]) -> EncodedPictures:
    """The pictures of several rows in one."""
    if len(encoded) == 1:
        return encoded[0]
    tokens = [token for one in encoded for token in one.pooler_output]
    return EncodedPictures(pooler_output=tokens, pictures=len(tokens))


def _with_room(parts: Sequence[Part], past: int, width: int) -> list[upstream.RoomLayer]:
    """Layers with the known states of several rows, padded on the left, and room for what they read."""
    first = next(part.known for part in parts if part.before)
    layers = []
    for i, (keys, values) in enumerate(first.nodes[0][0].states):
        pair = [
            like.new_empty(len(parts), like.shape[0], past + width, like.shape[2]) for like in (keys, values)
        ]
        for row, part in enumerate(parts):
            start = past - part.before
            for held in pair:
                held[row, :, :start] = 0
            part.known.write(i, pair[0][row, :, start:], pair[1][row, :, start:])
        layers.append(upstream.RoomLayer(pair[0], pair[1], width))
    return layers
