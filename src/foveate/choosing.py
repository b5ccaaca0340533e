"""What a picture costs every method, and any VLM: the rows and reasons from which to choose."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.methods import method_class
from foveate.methods.base import Method, MethodOptions
from foveate.model.checkpoints import read_config
from foveate.model.config import FoveateConfig
from foveate.model.cost import Pricer, reference_config, shared_pricer
from foveate.model.folders import CONFIGURATIONS, Hub, found, read_json
from foveate.options import build_options, merged
from foveate.picture.geometry import Size
from foveate.picture.limits import LIMITS, Limits
from foveate.zoom.unloaded import Unloaded
from foveate.zoom.vlm import is_vlm

BUDGET = "max_visual_tokens"
SIZE = re.compile(r"([0-9]{1,9})\s*[xX\u00d7]\s*([0-9]{1,9})")


@dataclass
class Prices:
    """Rows by name, as plain values, and for each that has none the reason."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def size_of(text: str, limits: Limits = LIMITS) -> Size:
    """`4000x3000`, width first -> a picture's size. Raises `FoveateError`, also beyond the limits."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise FoveateError(f"--size {text[:40]}: expected width x height in pixels, such as 4000x3000")
    width, height = int(match[1]), int(match[2])
    limits.check(f"--size {text}", width, height)
    return Size(height, width)


def subject(model: str, hub: Hub, limits: Limits = LIMITS) -> FoveateConfig | Unloaded:
    """What a folder or hub id is priced as: a configuration that methods share, or a VLM of transformers.

    Weights are fetched only for the layouts that are told apart by them.

    Raises:
        FoveateError: no such model, or none that can be priced.
    """
    folder = found(model, hub, CONFIGURATIONS)
    kind = read_json(folder / "config.json").get("model_type")
    if kind == FoveateConfig.model_type:
        return read_config(folder)
    if not is_vlm(kind):
        return read_config(model, hub=hub)
    own = kind == "llava"  # which other layouts also use
    try:
        return read_config(model, hub=hub) if own else read_config(folder)
    except FoveateError as refusal:
        try:
            return Unloaded(folder, limits)
        except FoveateError as error:
            raise FoveateError(f"{refusal}; and by transformers: {error}" if own else str(error)) from error


def price_methods(
    size: Size,
    kinds: Mapping[str, type[Method]],
    options: Mapping[str, Any],
    config: FoveateConfig | None = None,
    text_tokens: int = 64,
) -> Prices:
    """A row for every method that can do it, and the reason for every other.

    Args:
        size: of the picture.
        kinds: the methods by name.
        options: for all of them, and `name.key` for one.
        config: the model whose shapes are used; by default those of a 7B model.
        text_tokens: of each turn.

    Raises:
        FoveateError: the reason, if there is but one method; an option that none has, or one for a method
            that is not among them.
    """
    shared, own = _by_method(options, kinds)
    if len(kinds) > 1:
        _check_known(shared, kinds)
    prices = Prices()
    for name, kind in kinds.items():
        try:
            prices.rows[name] = _row(name, kind, {**shared, **own.get(name, {})}, config, size, text_tokens)
        except FoveateError as error:
            if len(kinds) == 1:
                raise
            prices.refused[name] = str(error)
    return prices


def price_vlm(
    name: str, vlm: Unloaded, size: Size, options: Mapping[str, Any], text_tokens: int = 64
) -> Prices:
    """The row of a VLM of transformers. Its one option, `max_visual_tokens`, marks what is above it.

    Raises `FoveateError` for other options, and for a picture that it does not accept.
    """
    if extra := [key for key in options if key != BUDGET]:
        raise FoveateError(
            f"--option {extra[0]}: {vlm.name} is priced as it is, and has no options but {BUDGET}"
        )
    bound = build_options(MethodOptions, merged(MethodOptions, {}, options), "--option").max_visual_tokens
    price = vlm.price(size, text_tokens).to_dict()
    title = Path(name).resolve().name if Path(name).exists() else name.rpartition("/")[2]
    return Prices({name: {"title": title, "class": vlm.name, **_judged(price, size, bound)}})


def _row(
    name: str,
    kind: type[Method],
    options: Mapping[str, Any],
    config: FoveateConfig | None,
    size: Size,
    text_tokens: int,
) -> dict[str, Any]:
    pricer = _pricer(name, kind, options, config)
    bound = pricer.model.method.options.max_visual_tokens
    row = {"title": kind.title, **_judged(pricer.price(size, text_tokens).to_dict(), size, bound)}
    turns = pricer.turns(size, text_tokens)
    if len(turns) > 1:
        anew = pricer.price(size, text_tokens, keep_context=False)
        row |= {"turns": [turn.to_dict() for turn in turns], "read_anew": anew.to_dict()}
    return row


def _judged(price: dict[str, Any], size: Size, bound: int | None) -> dict[str, Any]:
    """A price with what it means: whether the picture is shrunk, and whether all turns are above a bound."""
    sides = (price["effective_height"], price["effective_width"])
    known = None not in sides
    judged = {"shrunk": (sides[0] < size.height or sides[1] < size.width) if known else None}
    if bound is not None:
        judged |= {BUDGET: bound, "over_budget": price["visual_tokens"] > bound}
    return {**price, **judged}


def _pricer(
    name: str, kind: type[Method], options: Mapping[str, Any], config: FoveateConfig | None
) -> Pricer:
    if config is None:
        return shared_pricer(reference_config(name, merged(kind.Options, {}, options)))
    config = copy.deepcopy(config)
    if config.method != name:
        config.method, config.options = name, {}
    config.options = merged(kind.Options, config.options, options)
    return shared_pricer(config)


def _by_method(
    options: Mapping[str, Any], kinds: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options for all methods, and those of single ones, given as `name.key`."""
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for place, value in options.items():
        name, dot, key = place.partition(".")
        if not dot:
            shared[place] = value
            continue
        if name not in kinds:
            method_class(name)
            raise FoveateError(f"--option {place}: {name} is not among the methods that are priced here")
        own.setdefault(name, {})[key] = value
    return shared, own


def _check_known(options: Mapping[str, Any], kinds: Mapping[str, type[Method]]) -> None:
    """Raises `FoveateError` for an option that none of the methods has."""
    known = {
        key: name
        for name, kind in kinds.items()
        for key in (*(f.name for f in fields(kind.Options)), *kind.Options.retired)
    }
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean {near[0]!r} of {known[near[0]]}?"
                if near
                else "their pages list what they have"
            )
            raise FoveateError(f"--option {key}: none of {', '.join(kinds)} has it; {hint}")
