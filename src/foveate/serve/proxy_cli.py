"""`foveate serve --upstream`: the options of the proxy, and how it is started from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from foveate.errors import FoveateError, require

if TYPE_CHECKING:
    from foveate.serve.http import Door, Pictures, Place

KEY = "OPENAI_API_KEY"  # where the official client looks, too

Address = Annotated[
    str | None,
    typer.Option(help="Give a second look to the model of this server instead: its address, with /v1."),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="With --upstream: whose requests are zoomed; by default all.")
]
KeyFile = Annotated[
    Path | None, typer.Option(help=f"With --upstream: file with its key; by default {KEY}, if it is set.")
]
When = Annotated[
    Literal["off", "auto", "always"],
    typer.Option(
        "--zoom",
        help="With --upstream: for requests that do not say. auto: where a picture is larger than the "
        "model sees.",
    ),
]
How = Annotated[
    Literal["answer", "tool"],
    typer.Option("--region", help="With --upstream: the model says where, or asks for crops by a tool."),
]
Boxes = Annotated[
    str, typer.Option("--boxes", help="With --upstream: how its model writes boxes: qwen3_vl, internvl, ...")
]
Convention = Annotated[
    str, typer.Option("--tool", help="With --region tool: its convention: qwen3_vl, deepeyes, ...")
]
Sees = Annotated[
    int | None,
    typer.Option("--sees", min=1, help="With --upstream: pixels that its model sees; by default measured."),
]
Turns = Annotated[
    int | None, typer.Option("--turns", min=1, help="With --upstream: looks at most; by default 1, or 4.")
]
CropPixels = Annotated[
    int, typer.Option("--crop-pixels", min=1, help="With --upstream: larger crops are shrunk.")
]
LookTokens = Annotated[
    int | None, typer.Option("--look-tokens", min=1, help="With --upstream: bound on what a look may write.")
]
Stall = Annotated[
    float, typer.Option("--stall", min=0.1, help="With --upstream: seconds without a byte of its answer.")
]
OWN = frozenset(
    (
        *("upstream", "upstream_model", "upstream_key_file", "zoom", "region", "boxes", "tool", "sees"),
        *("turns", "crop_pixels", "look_tokens", "stall"),
    )
)
BOTH = frozenset(
    (
        *("host", "port", "api_key_file", "no_api_key", "allow_urls", "max_body", "max_pixels"),
        *("seconds", "stop_seconds"),
    )
)


@dataclass(frozen=True)
class Options:
    """What the command line says of a proxy; as the options above."""

    upstream: str
    model: str | None
    key_file: Path | None
    zoom: Literal["off", "auto", "always"]
    region: Literal["answer", "tool"]
    boxes: str
    tool: str
    sees: int | None
    turns: int | None
    crop_pixels: int
    look_tokens: int | None
    seconds: float
    stall: float


def check_options(context: typer.Context, upstream: str | None) -> None:
    """Raises `FoveateError` for an option of the other kind of server: that of a model here, or the proxy."""
    allowed = OWN | BOTH if upstream else context.params.keys() - OWN
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in allowed or source is None or source.name != "COMMANDLINE":
            continue
        if not upstream:
            raise FoveateError(f"{parameter.opts[0]} is for --upstream: leave it out")
        what = parameter.opts[0] if parameter.param_type_name == "option" else "a model here"
        raise FoveateError(f"{what} and --upstream do not go together: leave one out")


def listen(options: Options, door: Door, pictures: Pictures, place: Place) -> None:
    """Runs a proxy until it is stopped."""
    require("httpx2", "serve", "foveate serve --upstream")
    from foveate.serve.http import Listener
    from foveate.serve.proxy import Proxy

    upstream, rules = settings(options, os.environ)
    listener = Listener(Proxy(upstream, rules, door, pictures).app, place)
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"a second look for {options.model or 'every model'} of {options.upstream} at {listener.url}"
    )
    with suppress(KeyboardInterrupt):  # sent again once the answers in progress have ended
        listener.listen()


def settings(options: Options, environment: Mapping[str, str]) -> Any:
    """The server behind the proxy, and when and how it zooms."""
    from foveate.serve.proxy import Rules, Upstream
    from foveate.zoom.looking import TOOL_TURNS, Answered, Budget, ByTool
    from foveate.zoom.wire import Served

    key = environment.get(KEY)
    if options.key_file is not None:
        key = options.key_file.read_text(encoding="utf-8", errors="replace").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise FoveateError(f"{options.key_file} holds no key of printable ASCII characters")
    by_tool = options.region == "tool"
    most = options.crop_pixels
    budget = Budget(
        turns=options.turns or (TOOL_TURNS if by_tool else 1),
        min_pixels=min(Budget.min_pixels, most),
        max_pixels=most,
        tokens=options.look_tokens or Budget.tokens,
    )
    upstream = Upstream(
        options.upstream,
        key or None,
        options.model,
        Served(options.boxes, options.tool),
        options.sees,
        options.seconds,
        options.stall,
    )
    region = ByTool() if by_tool else Answered()
    return upstream, Rules(options.zoom, region, budget, tokens=options.look_tokens is not None)
