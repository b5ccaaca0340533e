"""How an answer is written: its length, how its tokens are drawn, what ends it, what is told of them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from foveate import upstream
from foveate.errors import FoveateError
from foveate.model.modeling import FoveateForConditionalGeneration

MOST_ENDS = 4
MOST_LIKELY = 20  # tokens that can be told beside each one that was written
# Values of `generate` at which it does what is done here. Whatever else a model's own settings ask for would
# change its answers, and such a model is refused.
PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "guidance_scale": 1,
    "sequence_bias": None,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "stop_strings": None,
    "watermarking_config": None,
}


@dataclass(frozen=True)
class Settings:
    """How one answer is written.

    Attributes:
        max_new_tokens: bound on its length.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: they are drawn from the likeliest ones that have this probability together.
        seed: what is drawn depends on it and the question alone; None takes another one each time.
        ends: texts before which the answer is cut off.
        logprobs: how many of the likeliest tokens are told with each token; None tells no probability.

    Raises:
        FoveateError: a value that makes no sense.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ends: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FoveateError(f"max_new_tokens must be at least 1, it is {self.max_new_tokens}")
        if not 0 <= self.temperature <= 2:
            raise FoveateError(f"temperature must be from 0 to 2, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise FoveateError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if len(self.ends) > MOST_ENDS or not all(self.ends):
            raise FoveateError(f"stop must be at most {MOST_ENDS} texts, none of them empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LIKELY:
            raise FoveateError(f"top_logprobs must be from 0 to {MOST_LIKELY}, not {self.logprobs}")

    @property
    def draws(self) -> bool:
        return self.temperature > 0

    def seeded(self) -> Settings:
        """With a seed where one is needed."""
        return replace(self, seed=secrets.randbits(63)) if self.draws and self.seed is None else self

    def inner(self, bound: int | None) -> Settings:
        """Of an intermediate turn, which nothing said of the answer ends or tells about."""
        return replace(self, max_new_tokens=bound or self.max_new_tokens, ends=(), logprobs=None)


@dataclass(frozen=True)
class Token:
    """A token that was written.

    Attributes:
        id: in the tokenizer's vocabulary.
        logprob: natural logarithm of the probability that the model gave it.
        likeliest: the likeliest tokens at its place, each with its own.
    """

    id: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A chosen token.

    Attributes:
        token: the token.
        margin: by how much a logit would have to change for another token to be chosen.
    """

    token: Token
    margin: float


class Rules:
    """What a model's own generation_config.json says of its answers.

    Raises:
        FoveateError: it asks for what the server does not do.
    """

    def __init__(self, model: FoveateForConditionalGeneration) -> None:
        config = upstream.settings_of(model.generation_config, {})
        for name, plain in PLAIN.items():
            if config.get(name) not in (None, plain):
                raise FoveateError(
                    f"generation_config.json: {name} {config[name]!r} is not served: take it out of the file"
                )
        ends = config.get("eos_token_id")
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.processors: list[LogitsProcessor] = []
        penalty, ngram = config.get("repetition_penalty"), config.get("no_repeat_ngram_size")
        if penalty not in (None, 1):
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        if ngram:
            self.processors.append(NoRepeatNGramLogitsProcessor(ngram))

    def scores(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits (V,) after the tokens `ids`, as the model's settings change them."""
        if not self.processors:
            return logits
        read, scores = torch.tensor([ids], device=logits.device), logits[None]
        for processor in self.processors:
            scores = processor(read, scores)
        return scores[0]


@dataclass
class Chooser:
    """Chooses the tokens of one turn, each by its logits and its number alone.

    Args:
        settings: of the turn, with a seed where one is needed.
        turn: the turn's number.
    """

    settings: Settings
    turn: int
    generator: torch.Generator = field(init=False, default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Draws from the first token on again."""
        if self.settings.seed is not None:
            self.generator.manual_seed((self.settings.seed + 0x9E3779B97F4A7C15 * self.turn) % 2**63)

    def choose(self, scores: Tensor, likeliest: tuple[int, float] | None = None) -> Choice:
        """The next token for scores (V,) of float32.

        Args:
            scores: of all tokens.
            likeliest: the token with the highest score, and by how much it is the highest, if known already.
        """
        settings = self.settings
        if not settings.draws:
            token, margin = likeliest or highest(scores[None])[0]
            return Choice(self._told(token, scores), margin)
        heated = scores.cpu() / settings.temperature
        margin = math.inf
        # The likeliest of the scores with Gumbel's noise is a draw from their softmax; and the noise does not
        # depend on the scores, so that those of another batch, the same up to rounding, give the same token.
        uniform = torch.rand(len(heated), generator=self.generator, dtype=torch.float64)
        noise = -(-uniform.clamp(min=1e-300).log()).log()
        if settings.top_p < 1:
            heated, margin = nucleus(heated, settings.top_p)
        drawn = heated.double() + noise
        (best, second), (token, _) = (part.tolist() for part in drawn.topk(2))
        return Choice(self._told(token, scores), min(margin, best - second) * settings.temperature)

    def _told(self, token: int, scores: Tensor) -> Token:
        if self.settings.logprobs is None:
            return Token(token)
        logs = scores.log_softmax(-1)
        values, ids = logs.topk(min(self.settings.logprobs, len(logs)))
        likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(token, float(logs[token]), likeliest)


def highest(scores: Tensor) -> list[tuple[int, float]]:
    """Per row of scores (B, V) the token with the highest one, and by how much it is the highest."""
    values, tokens = scores.topk(2)
    return list(zip(tokens[:, 0].tolist(), (values[:, 0] - values[:, 1]).tolist(), strict=True))


def nucleus(scores: Tensor, top_p: float) -> tuple[Tensor, float]:
    """Scores (V,) of the likeliest tokens that have this probability together, of others minus infinity.

    Returns:
        The scores; and by how much one would have to change for another token to be among them.
    """
    ordered, places = scores.double().sort(descending=True, stable=True)
    chances = ordered.softmax(0)
    before = chances.cumsum(0) - chances
    count = int((before < top_p).sum())
    kept = torch.full_like(scores, -math.inf)
    kept[places[:count]] = scores[places[:count]]
    # A change of all scores by d changes what lies before a token by 2 d p (1 - p) at most.
    edge = min(abs(float(b) - top_p) for b in before[max(count - 1, 0) : count + 1])
    slope = 2 * top_p * (1 - top_p)
    swap = float(ordered[count - 1] - ordered[count]) if count < len(ordered) else math.inf
    return kept, min(edge / max(slope, 1e-12), swap)
