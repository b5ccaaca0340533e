"""What a picture costs before any weights load: views, tokens, FLOPs and KV memory.

torch's own counter counts the FLOPs on a model without weights (device `meta`), so that every method and LLM
is priced by the code that will run.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property, lru_cache
from threading import RLock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel

from foveate import upstream
from foveate.methods import method_class
from foveate.model.config import FoveateConfig
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.picture.geometry import Size, ViewPlan
from foveate.picture.source import Source
from foveate.remembered import Remembered


@dataclass(frozen=True)
class Cost:
    """The price of one question about one picture, or of one turn on the way to its answer.

    Attributes:
        views: pictures that the vision tower encodes; the upper bound if a connector looks again.
        visual_tokens: visual tokens in the LLM's sequence.
        effective_height, effective_width: the finest resolution at which the whole picture is seen, pixels.
        encode_flops: vision tower and connector.
        prefill_flops: LLM over the visual tokens and `text_tokens` of text, including injections.
        decode_flops: LLM per generated token.
        kv_bytes: key and value cache after the prefill.
    """

    views: int
    visual_tokens: int
    effective_height: int
    effective_width: int
    encode_flops: int
    prefill_flops: int
    decode_flops: int
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reference_config(method: str, options: dict[str, Any] | None = None) -> FoveateConfig:
    """The shapes of LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels and Vicuna-7B."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    return FoveateConfig(
        vision_config=vision, text_config=text, method=method, options=options, separator_token_id=1919
    )


class Shaped(NamedTuple):
    """All that a tensor on `meta` is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Counted(NamedTuple):
    """What an operation costs and returns for arguments of certain shapes."""

    flops: int
    out: Shaped | tuple[Shaped, ...]


KNOWN = 2**14  # operations whose cost is remembered, at most: about 16 MB


@cache
def _known() -> dict[Hashable, Counted]:
    """What was counted before, by all counters: towers and LLMs have much in common."""
    return {}


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of operations in its context, with torch's own formulas.

    torch's `FlopCounterMode` also attributes them to modules, by hooks that modules in other threads trigger
    too; this counter sees the operations of the calling thread only. An operation runs once for each shape of
    its arguments: on `meta`, most take long to find out the shape of their result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known = _known()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        signature = _signature(func, args, kwargs)
        if signature is None:
            return self._run(func, args, kwargs)
        known = self.known.get(signature)
        if known is not None:
            self.total += known.flops
            return _made(known.out)
        before = self.total
        out = self._run(func, args, kwargs)
        shapes = _shapes(out)
        if shapes is not None:
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[signature] = Counted(self.total - before, shapes)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        operation = func._overloadpacket
        if operation in flop_registry:
            out = func(*args, **kwargs)
            self.total += flop_registry[operation](*args, **kwargs, out_val=out)
            return out
        with self:  # its parts may have formulas
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


def _signature(func: Any, args: Any, kwargs: Any) -> Hashable | None:
    """What the cost and the result's shape depend on; None if that is more than shapes.

    Operations that return or change an argument, and those that read values, run each time.
    """
    if any(argument.alias_info is not None for argument in func._schema.arguments):
        return None
    seen: list[Hashable] = [func]
    on_meta = False
    for value in (*args, *(part for pair in kwargs.items() for part in pair)):
        for part in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(part, Tensor):
                seen.append((type(part), part))  # 1, 1.0 and True are equal, their results are not
            elif part.is_meta:
                on_meta = True
                seen.append((part.shape, part.stride(), part.dtype))
            else:
                return None
        seen.append(len(value) if isinstance(value, list | tuple) else None)
    return tuple(seen) if on_meta else None


def _shapes(out: Any) -> Shaped | tuple[Shaped, ...] | None:
    """None unless it is a tensor on `meta`, or a tuple of them."""
    if isinstance(out, tuple):
        parts = tuple(_shapes(part) for part in out)
        return parts if all(isinstance(part, Shaped) for part in parts) else None  # type: ignore[return-value]
    if isinstance(out, Tensor) and out.is_meta:
        return Shaped(out.shape, out.stride(), out.dtype)
    return None


def _made(out: Shaped | tuple[Shaped, ...]) -> Any:
    if isinstance(out, Shaped):
        return torch.empty_strided(out.shape, out.stride, dtype=out.dtype, device="meta")
    return tuple(_made(part) for part in out)


class Vision(NamedTuple):
    """The cost of a picture outside the LLM's own layers."""

    encode: int  # FLOPs of the tower, for the plan's views
    connect: int  # FLOPs of the connector
    looks: int  # views that the connector makes of the original picture, if all differ
    look: int  # FLOPs of the tower for each of them
    inject: int  # FLOPs of the injectors in the prefill


Prices: TypeAlias = Remembered[..., tuple[int, int, int]]


# Lengths of texts, read and kept, from which the costs of all others follow, and one to check that they do.
POINTS = ((2, 0), (4, 0), (6, 0), (2, 3))
CHECKED = (33, 17)


@dataclass(frozen=True)
class _Growth:
    """The costs of an LLM whose tokens read all those before them: prefill, a further token, and its cache.

    Attributes:
        prefill: of no token, and what is added with n tokens read and k kept by n, n k and n^2.
        decode: with no token before, and by each.
        kv: the same.
    """

    prefill: tuple[Fraction, Fraction, Fraction, Fraction]
    decode: tuple[Fraction, Fraction]
    kv: tuple[Fraction, Fraction]

    @classmethod
    def through(cls, costs: Sequence[tuple[int, int, int]]) -> _Growth:
        """That which gives these costs at `POINTS`."""
        (two, four, six, more), decode, kv = zip(*costs, strict=True)
        square = Fraction(six - 2 * four + two, 8)
        linear = Fraction(four - two, 2) - 6 * square
        constant = two - 2 * linear - 4 * square
        lines = [(Fraction(2 * one[0] - one[1]), Fraction(one[1] - one[0], 2)) for one in (decode, kv)]
        return cls((constant, linear, Fraction(more - two, 6), square), *lines)

    def at(self, tokens: int, kept: int) -> tuple[int, int, int]:
        n, m = tokens, tokens + kept
        constant, linear, mixed, square = self.prefill
        prefill = constant + n * (linear + kept * mixed + n * square)
        decode, kv = (start + m * each for start, each in (self.decode, self.kv))
        return int(prefill), int(decode), int(kv)


class Pricer:
    """Counts FLOPs on a weightless copy of a model. Several threads may share one.

    Args:
        config: the model's configuration.
        dtype: of the weights; decides the size of the KV cache.
    """

    def __init__(self, config: FoveateConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        with torch.device("meta"):
            self.model = FoveateForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
        self.dtype = dtype
        self._vision = Remembered(self._count_vision, most=256)
        self._language: Prices = Remembered(self._count_language, most=256)
        self._lock = RLock()  # held while the copy runs

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=RLock())

    def plan(self, height: int, width: int) -> ViewPlan:
        return self.model.method.plan(height, width)

    def price(self, picture: Size, text_tokens: int = 64, keep_context: bool = True) -> Cost:
        """The cost of a question about a picture of this size, summed over all turns of its conversation.

        Args:
            picture: its size.
            text_tokens: of each turn, including the template.
            keep_context: as in `turns`.
        """
        turns = self.turns(picture, text_tokens, keep_context)
        return replace(
            turns[-1],
            views=sum(turn.views for turn in turns),
            effective_height=turns[0].effective_height,
            effective_width=turns[0].effective_width,
            encode_flops=sum(turn.encode_flops for turn in turns),
            prefill_flops=sum(turn.prefill_flops for turn in turns),
        )

    def turns(self, picture: Size, text_tokens: int = 64, keep_context: bool = True) -> list[Cost]:
        """The cost of each turn of a conversation; visual tokens and cache are those of all turns so far.

        Without `keep_context`, every turn encodes and reads everything before it again. Intermediate replies
        are not counted.
        """
        costs: list[Cost] = []
        for size in self.model.method.turn_sizes(picture):
            plan, vision = self.plan(*size), self.vision(size)
            before = costs[-1] if costs else None
            kept = len(costs) * text_tokens + (before.visual_tokens if before else 0)
            tokens = plan.tokens + text_tokens
            prefill, decode, kv = self.language(*((tokens, kept) if keep_context else (kept + tokens, 0)))
            again = None if keep_context else before
            costs.append(
                Cost(
                    views=len(plan.views) + vision.looks + (again.views if again else 0),
                    visual_tokens=plan.tokens + (before.visual_tokens if before else 0),
                    effective_height=plan.effective.height,
                    effective_width=plan.effective.width,
                    encode_flops=vision.encode
                    + vision.connect
                    + vision.looks * vision.look
                    + (again.encode_flops if again else 0),
                    prefill_flops=prefill + vision.inject,
                    decode_flops=decode,
                    kv_bytes=kv,
                )
            )
        return costs

    def language(self, tokens: int, kept: int = 0) -> tuple[int, int, int]:
        """FLOPs of a prefill of `tokens`, FLOPs of the next token, and bytes of the cache between them.

        `kept` tokens before them are already in the cache.
        """
        return self._language(tokens, kept)

    def vision(self, picture: Size) -> Vision:
        """The cost of tower, connector and injectors for one picture."""
        return self._vision(picture)

    def _count_vision(self, picture: Size) -> Vision:
        model, plan = self.model, self.plan(*picture)
        blank = torch.zeros(len(plan.views), 3, *plan.views[0].size, device="meta", dtype=self.dtype)
        looks: list[Tensor] = []

        def look(views: Tensor) -> Tensor:
            looks.extend(views)
            return features.new_empty(len(views), *features.shape[1:])

        source = None
        if model.method.reads_source:
            pixels = torch.zeros(*picture, 3, device="meta", dtype=torch.uint8)
            source = Source([pixels], torch.ones(1, 2, 3, device="meta"), look)
        with self._lock, torch.no_grad():
            with FlopCounter() as encode:
                features = model.encode_views(blank)
            with FlopCounter() as connect:
                encoded = model.connect(features, torch.tensor([picture]), source=source)
            with FlopCounter() as again:
                for view in looks[:1]:
                    model.encode_views(view[None].to(self.dtype))
            width = model.config.text_config.hidden_size
            hidden = torch.zeros(1, plan.tokens, width, device="meta", dtype=self.dtype)
            with FlopCounter() as inject:
                for injector in model.connector.injectors().values():
                    if encoded.injection is not None:
                        injector(hidden, encoded.injection, torch.ones(hidden.shape[:2], dtype=torch.bool))
        return Vision(
            encode=encode.total,
            connect=connect.total,
            looks=len(looks),
            look=again.total,
            inject=inject.total,
        )

    def _count_language(self, tokens: int, kept: int = 0) -> tuple[int, int, int]:
        if self._growth is None:
            return self._measure_language(tokens, kept)
        return self._growth.at(tokens, kept)

    @cached_property
    def _growth(self) -> _Growth | None:
        """How the LLM's costs grow with its text; None if not as those of one that keeps all tokens do."""
        embeds = torch.zeros(1, 1, self.model.config.text_config.hidden_size, device="meta", dtype=self.dtype)
        with self._lock, torch.no_grad():
            cache = self._languages[-1](inputs_embeds=embeds, use_cache=True)[upstream.CACHE]
        if upstream.states_of(cache) is None:
            return None
        few = [self._measure_language(*point) for point in POINTS]
        found = _Growth.through(few)
        return found if found.at(*CHECKED) == self._measure_language(*CHECKED) else None

    def _measure_language(self, tokens: int, kept: int) -> tuple[int, int, int]:
        if len(self._languages) == 1:
            return self._run_language(self._languages[0], tokens, kept)
        # Of equal layers only two are run: each further one costs what the second one adds.
        one, two = (self._run_language(language, tokens, kept) for language in self._languages)
        more = self.model.config.text_config.num_hidden_layers - 1
        prefill, decode, kv = (first + more * (both - first) for first, both in zip(one, two, strict=True))
        return prefill, decode, kv

    @cached_property
    def _languages(self) -> list[PreTrainedModel]:
        """What is run to price the LLM: all of it, or its first one and first two layers if all are equal."""
        whole = self.model.language_model
        layers = upstream.decoder_layers(whole.get_decoder())
        config = whole.config.to_dict()
        kinds = {*(config.get("layer_types") or ())}  # the attention of each layer, if they differ
        if layers is None or len(layers) < 3 or len({*map(repr, layers)}) > 1 or len(kinds) > 1:
            return [whole]
        short = []
        for depth in (1, 2):
            one = copy.deepcopy(whole.config)
            one.num_hidden_layers = depth
            if kinds:
                one.layer_types = one.layer_types[:depth]
            with torch.device("meta"):
                short.append(type(whole)(one).to(self.dtype).eval().requires_grad_(False))
        return short

    def _run_language(self, language: PreTrainedModel, tokens: int, kept: int) -> tuple[int, int, int]:
        width = self.model.config.text_config.hidden_size
        embeds = torch.zeros(1, kept + tokens, width, device="meta", dtype=self.dtype)
        cache, name = None, upstream.CACHE
        with self._lock, torch.no_grad():
            if kept:
                cache = language(inputs_embeds=embeds[:, :kept], use_cache=True)[name]
            with FlopCounter() as prefill:
                cache = language(
                    inputs_embeds=embeds[:, kept:], use_cache=True, logits_to_keep=1, **{name: cache}
                )[name]
            kv = upstream.cache_bytes(cache)
            with FlopCounter() as decode:
                language(inputs_embeds=embeds[:, :1], **{name: cache})
        return prefill.total, decode.total, kv


@dataclass(frozen=True)
class _Same:
    """One of those that have the same values, and cost the same."""

    one: Any = field(compare=False)
    values: Hashable


def shared_pricer(config: FoveateConfig, dtype: torch.dtype = torch.bfloat16) -> Pricer:
    """The pricer of a loaded model: models that are alike share one, and equal LLMs have the same prices."""
    vision, text = config.vision_config, config.text_config
    llm = (dtype, text.to_json_string(use_diff=False), upstream.attention_of(text))
    whole = (
        config.to_json_string(use_diff=False),
        upstream.attention_of(vision),
        method_class(config.method),
    )
    return _pricer(_Same(config, (*llm, *whole)), dtype, llm)


@lru_cache(maxsize=32)
def _pricer(config: _Same, dtype: torch.dtype, llm: Hashable) -> Pricer:
    pricer = Pricer(copy.deepcopy(config.one), dtype)
    pricer._language = _language(_Same(pricer, llm))
    return pricer


@lru_cache(maxsize=32)
def _language(pricer: _Same) -> Prices:
    return Remembered(pricer.one._count_language, most=1024)
