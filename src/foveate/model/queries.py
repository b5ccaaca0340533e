"""The questions that connectors read, as tensors: by themselves, and along with the tokens of a text.

Trainers that know transformers' own inputs alone, such as trl's for GRPO, hand on `mm_token_type_ids`. They
say per token of a text what it stands for: 0 a word, 1 a part of a picture. A picture's question travels
there, in the places of its visual tokens: 2 + the id of each of its tokens, then 1 in those that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from foveate.errors import FoveateError


def padded_queries(rows: Iterable[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Questions to pictures as `query_ids` and `query_mask` (P, longest), padded on the left."""
    rows = list(rows)
    longest = max(map(len, rows), default=0)
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def carried(
    rows: Sequence[Sequence[int]], counts: Sequence[int], visual: Sequence[Sequence[bool]]
) -> list[list[int]] | None:
    """Questions as `mm_token_type_ids`.

    Args:
        rows: per picture the tokens of its question.
        counts: per picture its visual tokens.
        visual: per text, per token whether it is a visual one; their order is that of the pictures.

    Returns:
        Per text and token what it stands for; None if a question is longer than its picture's tokens.
    """
    if any(len(row) > count for row, count in zip(rows, counts, strict=True)):
        return None
    marks = (
        mark
        for row, count in zip(rows, counts, strict=True)
        for mark in [*(2 + token for token in row), *[1] * (count - len(row))]
    )
    return [[next(marks) if one else 0 for one in text] for text in visual]


def read_carried(marks: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`query_ids` and `query_mask` (P, longest) out of `mm_token_type_ids` (B, T), as `carried` wrote them.

    Args:
        marks: also of texts that have been padded, cut behind their pictures or gone on with since.
        counts: per picture its visual tokens.

    Raises:
        FoveateError: marks for another number of visual tokens.
    """
    found = marks[marks > 0]  # (sum of counts,)
    if len(found) != sum(counts):
        raise FoveateError(f"mm_token_type_ids mark {len(found)} of {sum(counts)} visual tokens")
    rows = [(part[part > 1] - 2).tolist() for part in found.split(list(counts))]
    ids, mask = padded_queries(rows, 0)
    return ids.to(marks.device), mask.to(marks.device)
