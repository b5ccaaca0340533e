"""How long a text an LLM has positions for, and what to say of one that is longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StoppingCriteria

from foveate.errors import FoveateError
from foveate.model.config import FoveateConfig

# Names under which LLMs keep the number of their positions; those that need none, such as recurrent ones,
# have neither.
FIELDS = ("max_position_embeddings", "max_seq_len")
STRETCHED = ("linear", "dynamic", "yarn")  # may leave max_position_embeddings as it was in pretraining


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model's LLM was made for; None if it names none.

    Rotary embeddings that are stretched count as stretched: `factor` times what they were trained on.
    `FoveateConfig.max_positions` goes above what the LLM names.
    """
    if isinstance(config, FoveateConfig) and config.max_positions is not None:
        return config.max_positions
    text = config.get_text_config(decoder=True)
    known = [getattr(text, name) for name in FIELDS if hasattr(text, name)]
    bounds = [bound for bound in known if isinstance(bound, int) and bound > 0]
    if not bounds:
        return None
    rope = (text.rope_parameters if hasattr(text, "rope_parameters") else None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [
        rope
    ]  # one for all, or by layer
    stretched = [_stretched(kind, bounds[0]) for kind in kinds]
    return max(bounds[0], *stretched)


def _stretched(rope: Mapping[str, Any], bound: int) -> int:
    if rope.get("rope_type") not in STRETCHED:
        return bound
    return int(rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or bound))


def check_lengths(lengths: Tensor, positions: int, visual: Tensor | None = None, answer: int = 0) -> None:
    """Raises `FoveateError` if a text is longer than its LLM's positions, with what makes it fit.

    Args:
        lengths: (B,) tokens of each text, visual ones included.
        positions: of the LLM.
        visual: (B, T) bool, the tokens that `max_visual_tokens` bounds; None if unknown.
        answer: tokens that must have a position after the text.
    """
    longest = int(lengths.argmax())
    tokens = int(lengths[longest])
    if tokens + answer <= positions:
        return
    of, fits = "", "take a smaller picture or a shorter text"
    if visual is not None:
        seen = int(visual[longest].sum())
        of, fits = f", {seen} of them visual,", "shorten the text"
        room = positions - answer - (tokens - seen)
        if seen and room > 0:
            fits = f"set the option max_visual_tokens, so that its pictures take {room} at most, or {fits}"
    raise FoveateError(
        f"the text has {tokens} tokens{of} and the LLM has {positions} positions: {fits}; "
        f"max_positions={tokens + answer} or more lets it through, for an LLM that reads beyond its positions"
    )


class LastPosition(StoppingCriteria):
    """Ends each answer at the LLM's last position.

    Args:
        used: (B,) tokens of each prompt without padding.
        width: of the padded prompts.
        positions: of the LLM.
    """

    def __init__(self, used: Tensor, width: int, positions: int) -> None:
        self.ends = width + positions - used  # (B,) the length at which each row is full

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows, length = input_ids.shape
        ends = self.ends.to(input_ids.device)
        return torch.full_like(ends, length).ge(ends).repeat_interleave(rows // len(ends))
