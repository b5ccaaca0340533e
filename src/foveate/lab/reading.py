"""The LLM on many questions about a few pictures, without the work that nobody reads.

What the model's own forward computes for [visual tokens][question][answer], in three parts: the tokens that
all questions of a picture read first (the stem), those that belong to one row alone (the branch), and the
texts. A stem passes the LLM once a picture. Behind the last layer only the tokens before an answer's are
read, so there the others are only keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from foveate.lab.kernels import gated, normed, turned
from foveate.lab.packing import IGNORED, PADDING, VISUAL, Packed, visible

Change = Callable[[Tensor], Tensor]  # of a layer's output (R, B, D), where a method injects


class Seen(NamedTuple):
    """Visual tokens of R rows about P pictures.

    Attributes:
        stem: (P, S, D) the first tokens, the same for all rows of a picture.
        owners: (R,) picture of each row.
        branch: (R, B, D) the tokens after them, of each row.
        kept: (R, B) bool, False for tokens that do not exist in a row.
    """

    stem: Tensor
    owners: Tensor
    branch: Tensor
    kept: Tensor

    @property
    def tokens(self) -> Tensor:
        """(R,) how many visual tokens each row has."""
        return self.stem.shape[1] + self.kept.sum(1)


def seen(
    tokens: Sequence[Tensor], kept: Sequence[Tensor] | None, owners: Tensor, closed: bool = True
) -> Seen:
    """Finds what the rows of a picture share. Per row its tokens (n, D), and which of them exist (n,); or per
    picture, if its rows read the same.

    `closed`: tokens that do not exist are left out, as far as rows of one length allow.
    """
    rows = torch.stack(list(tokens))  # (R, n, D)
    if len(rows) < len(owners):
        empty = torch.ones(len(owners), 0, dtype=torch.bool, device=rows.device)
        return Seen(rows, owners, rows[owners, :0], empty)
    there = torch.ones_like(rows[..., 0], dtype=torch.bool) if kept is None else torch.stack(list(kept))
    pictures = int(owners.max()) + 1
    first = owners.new_zeros(pictures)
    first[owners.flip(0)] = torch.arange(len(owners), device=rows.device).flip(0)  # a picture's first row
    with torch.no_grad():
        same = there.clone()
        if pictures < len(owners):
            same &= (rows == rows[first[owners]]).all(-1)
        stem = int(same.all(0).long().cumprod(0).sum())
    kept_of_branch = there[:, stem:]
    most = int(kept_of_branch.sum(1).max()) if kept_of_branch.shape[1] else 0
    branch = rows[:, stem:]
    if closed and most < branch.shape[1]:  # tokens that no row has are left out, the rest moves up
        order = (~kept_of_branch).long().argsort(dim=1, stable=True)[:, :most]
        branch = branch.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
        kept_of_branch = kept_of_branch.gather(1, order)
    return Seen(rows[first, :stem], owners, branch, kept_of_branch)


class Answers(NamedTuple):
    """What a batch of texts is asked for: tokens to be learnt, row after row.

    Attributes:
        logits: (n, vocabulary) of the tokens before them.
        labels: (n,).
        row, block: (n,) where each stands.
    """

    logits: Tensor
    labels: Tensor
    row: Tensor
    block: Tensor

    @property
    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits.float(), self.labels)

    def right(self, second: int | None = None) -> list[list[bool]]:
        """Per row and question, whether greedy decoding would give exactly what is learnt of it.

        `second`: token that ends each answer, if a text has several: only the second one counts.
        """
        rows, blocks = 1 + int(self.row.max()), int(self.block.max())
        missed = torch.zeros(rows, blocks, dtype=torch.bool, device=self.row.device)
        there = torch.zeros_like(missed)
        there[self.row, self.block - 1] = True
        wrong = self.logits.argmax(-1).ne(self.labels)
        if second is not None:
            wrong &= _ended(self.labels == second, self.row * (blocks + 1) + self.block) == 1
        missed[self.row[wrong], self.block[wrong] - 1] = True
        return [
            [not bad for bad, asked in zip(*pair, strict=True) if asked]
            for pair in zip(missed.tolist(), there.tolist(), strict=True)
        ]


def read(
    llm: LlamaForCausalLM,
    visual: Seen,
    packed: Packed,
    shown: Tensor | None = None,
    placeholder: int = -1,
    changes: Mapping[int, Change] | None = None,
) -> Answers:
    """The LLM's answers to packed texts about visual tokens.

    Args:
        llm: of any size, in training or not.
        visual: what the rows see before their texts.
        packed: the texts, of R rows, without visual tokens before them.
        shown: (n, D) visual tokens within the texts.
        placeholder: id that stands for each of them.
        changes: decoder layer -> what changes the visual tokens of all rows behind it.
    """
    stem, owners, branch, kept = visual
    packed = packed.to(stem.device)
    texts = llm.get_input_embeddings()(packed.input_ids)  # (R, T, D)
    if shown is not None:
        texts = texts.masked_scatter((packed.input_ids == placeholder)[..., None], shown)
    rest = torch.cat([branch, texts], 1)  # (R, B + T, D)
    stem_places = torch.arange(stem.shape[1], device=stem.device)[None]
    places = (stem.shape[1] + kept.long().cumsum(1) - 1).clamp(min=0)
    places = torch.cat([places, visual.tokens[:, None] + packed.position_ids], 1)
    turns, of_stem = (llm.model.rotary_emb(rest, where) for where in (places, stem_places))
    mask = _visible(stem.shape[1], kept, packed.blocks)
    asked, wanted = _asked(packed.labels)
    layers = llm.model.layers
    for number, layer in enumerate(layers):
        assert isinstance(layer, LlamaDecoderLayer)
        last = number + 1 == len(layers)
        keys, values = _keys_values(layer, rest, turns)
        if stem.shape[1]:
            key, value = _keys_values(layer, stem, of_stem)
            keys = torch.cat([key[owners], keys], 2)
            values = torch.cat([value[owners], values], 2)
            if not last:
                stem = _passed(layer, stem, of_stem, key, value)
        if last:  # only what is read behind it
            places = rest.shape[1] - texts.shape[1] + asked  # (R, A)
            rest, mask = (_rows(part, places) for part in (rest, mask[:, 0]))
            turns = tuple(_rows(part.expand(len(places), -1, -1), places) for part in turns)
            mask = mask[:, None]
        rest = _passed(layer, rest, turns, keys, values, mask)
        if changes and number in changes and not last:
            own = rest.shape[1] - texts.shape[1]
            if stem.shape[1]:  # from here on, every row has visual tokens of its own
                rest = torch.cat([stem[owners], rest], 1)
                own += stem.shape[1]
                turns = tuple(
                    torch.cat([part.expand(len(rest), -1, -1), rows], 1)
                    for part, rows in zip(of_stem, turns, strict=True)
                )
                kept = F.pad(kept, (stem.shape[1], 0), value=True)
                stem, mask = stem[:, :0], _visible(0, kept, packed.blocks)
            rest = torch.cat([changes[number](rest[:, :own]), rest[:, own:]], 1)
    logits = llm.lm_head(_normed(llm.model.norm, rest[wanted]))
    row, _ = wanted.nonzero(as_tuple=True)
    labels, blocks = (part[:, 1:].gather(1, asked)[wanted] for part in (packed.labels, packed.blocks))
    return Answers(logits, labels, row, blocks)


def _ended(ends: Tensor, text: Tensor) -> Tensor:
    """(n,): how many answers of the same text end before each token; `text` (n,) is in order."""
    before = F.pad(ends.long().cumsum(0), (1, 0))[:-1]
    return before - before[torch.searchsorted(text, text)]


def _asked(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(R, T) -> (R, A) places before those with a label, and (R, A) bool, False for padding."""
    there = labels[:, 1:] != IGNORED
    most = int(there.sum(1).max())
    places = (~there).long().argsort(dim=1, stable=True)[:, :most]
    return places, there.gather(1, places)


def _visible(stem: int, kept: Tensor, blocks: Tensor) -> Tensor:
    """(R, 1, B + T, S + B + T): what the tokens after the stem see."""
    before = torch.full((len(blocks), stem), VISUAL, device=blocks.device)
    branch = torch.where(kept, VISUAL, PADDING)
    return visible(torch.cat([before, branch, blocks], 1))[:, :, stem:]


def _rows(part: Tensor, places: Tensor) -> Tensor:
    """(R, n, D) -> (R, A, D)"""
    return part.gather(1, places[..., None].expand(-1, -1, part.shape[2]))


def _heads(layer: LlamaDecoderLayer, x: Tensor) -> Tensor:
    """(R, n, D) -> (R, heads, n, D / heads)"""
    return x.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)


def _keys_values(
    layer: LlamaDecoderLayer, hidden: Tensor, turns: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    attention, x = layer.self_attn, _normed(layer.input_layernorm, hidden)
    key = _heads(layer, attention.k_proj(x))
    return _turned(key, turns), _heads(layer, attention.v_proj(x))


def _turned(x: Tensor, turns: tuple[Tensor, ...]) -> Tensor:
    """Rotary positions of queries or keys."""
    return turned(x, *(part[:, None] for part in turns))


def _normed(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return normed(x, norm.weight, norm.variance_epsilon)


def _passed(
    layer: LlamaDecoderLayer,
    hidden: Tensor,
    turns: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """What leaves a decoder layer of these tokens; without a mask they see what is before them."""
    attention = layer.self_attn
    query = _turned(_heads(layer, attention.q_proj(_normed(layer.input_layernorm, hidden))), turns)
    found = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None)
    hidden = hidden + attention.o_proj(found.transpose(1, 2).flatten(2))
    x, mlp = _normed(layer.post_attention_layernorm, hidden), layer.mlp
    return hidden + mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))
