"""`foveate serve`: a model behind OpenAI's protocol."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from foveate.errors import FoveateError, require
from foveate.picture.limits import Limits
from foveate.serve import proxy_cli as proxy

KEY = "FOVEATE_API_KEY"
MODULES = ("fastapi", "uvicorn", "prometheus_client")
MEGA, GIGA = 2**20, 2**30


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hugging Face hub id; by default the embedded model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a key.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; by default its own.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the API key that requests must show; by default {KEY}, if it is set."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Let everybody in whom the network lets in.")
    ] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures by URL, from public addresses.")
    ] = False,
    max_body: Annotated[int, typer.Option(min=1, help="Megabytes of one request.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture; checked before it is decoded.")] = 2
    ** 26,
    max_pictures: Annotated[int, typer.Option(min=0, help="Of one request.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Bound on the tokens of an answer.")] = 4096,
    max_prompt: Annotated[
        int | None, typer.Option(min=1, help="Bound on a request's tokens; by default the LLM's positions.")
    ] = None,
    places: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for a place.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="From a request's arrival to its answer.")] = 600.0,
    stop_seconds: Annotated[int, typer.Option(min=1, help="That answers are given when it is stopped.")] = 30,
    kv_memory: Annotated[float, typer.Option(min=0, help="Gigabytes for keys and values of answers.")] = 4.0,
    prefix_memory: Annotated[
        float, typer.Option(min=0, help="Gigabytes for keys and values of earlier requests.")
    ] = 1.0,
    feature_memory: Annotated[
        float, typer.Option(min=0, help="Gigabytes for vision features of earlier requests.")
    ] = 1.0,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Start again alone where rounding could change an answer; by default in float32.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default one that fits.")
    ] = (None),
    quantize: Annotated[
        Literal["8bit", "4bit"] | None, typer.Option(help="The LLM's linear layers in fewer bits.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="The vision tower by torch.compile, at the first picture.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    subfolder: Annotated[str, typer.Option(help="The folder inside the model's that holds it.")] = "",
    vision_tower: Annotated[str | None, typer.Option(help="For checkpoints that keep it apart.")] = None,
    method: Annotated[str | None, typer.Option(help="Another method that takes the parameters.")] = None,
    template: Annotated[str | None, typer.Option(help="A chat template by name.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Method option as key=value; repeatable.")
    ] = None,
    transparency: Annotated[
        Literal["white", "bare"] | None, typer.Option(help="What transparent pictures show.")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(min=1, help="Longest conversation in tokens, beyond the LLM's own.")
    ] = None,
    upstream: proxy.Address = None,
    upstream_model: proxy.ModelName = None,
    upstream_key_file: proxy.KeyFile = None,
    zoom: proxy.When = "auto",
    region: proxy.How = "answer",
    boxes: proxy.Boxes = "unit_xyxy",
    tool: proxy.Convention = "qwen3_vl",
    sees: proxy.Sees = None,
    turns: proxy.Turns = None,
    crop_pixels: proxy.CropPixels = 1344 * 1344,
    look_tokens: proxy.LookTokens = None,
    stall: proxy.Stall = 120.0,
) -> None:
    """Serve a model over HTTP in OpenAI's protocol, or give that of another server a second look."""
    proxy.check_options(context, upstream)
    for module in MODULES:
        require(module, "serve", "foveate serve")
    from foveate.serve.http import Door, Listener, Pictures, Place

    key = _key(api_key_file)
    if no_api_key and key is not None:
        raise FoveateError(f"--no-api-key contradicts {'--api-key-file' if api_key_file else KEY}")
    try:
        door = Door.at(host, key, unlocked=no_api_key, max_body=max_body * MEGA)
    except FoveateError as error:
        if key is not None:
            raise
        raise FoveateError(f"{error}, with {KEY}, --api-key-file or --no-api-key") from None
    place = Place(host, port, stop_seconds)
    if upstream is not None:
        names = (upstream, upstream_model, upstream_key_file, zoom, region, boxes, tool, sees, turns)
        asked = proxy.Options(*names, crop_pixels, look_tokens, seconds, stall)
        looked_at = Pictures(limits_of(max_pixels), urls=allow_urls, room=max(2**28, max_pixels))
        _log()
        proxy.listen(asked, door, looked_at, place)
        return
    from transformers.utils import logging as of_transformers

    from foveate.ask.foveate import Foveate, load
    from foveate.serve.app import Server, Serving
    from foveate.serve.scheduler import Bounds
    from foveate.written import read_pairs

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    limits = limits_of(max_pixels)
    loaded = load(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compiled=compiled,
        vision_tower=vision_tower,
        method=method,
        template=template,
        options=read_pairs(option),
        max_positions=max_positions,
        transparency=transparency,
        limits=limits,
        revision=revision,
        subfolder=subfolder,
    )
    bounds = Bounds(
        places=places,
        waiting=queue,
        kv_bytes=int(kv_memory * GIGA),
        prefix_bytes=int(prefix_memory * GIGA),
        new_tokens=max_tokens,
        prompt_tokens=max_prompt,
        seconds=seconds,
    )
    serving = Serving(
        name or _name(model),
        door,
        Pictures(limits, urls=allow_urls, most=max_pictures, room=max(2**28, max_pixels)),
        bounds,
        exact,
    )
    foveate = Foveate(loaded.model, loaded.processor, memory=int(feature_memory * GIGA))
    _log()
    server = Server(foveate, serving)
    listener = Listener(server.app, place)
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"{serving.name} answers at {listener.url}, {loaded.device}, "
        f"{str(loaded.dtype).removeprefix('torch.')}"
    )
    with suppress(KeyboardInterrupt):  # sent again once the answers in progress have ended
        listener.listen()


def limits_of(max_pixels: int) -> Limits:
    """Bounds on a request's pictures; they may not keep it waiting for long."""
    return Limits(max_pixels=max_pixels, seconds=10.0)


def _key(file: Path | None) -> str | None:
    """The API key. It is in a file or the environment, as every user of the machine sees what is typed."""
    if file is None:
        return os.environ.get(KEY)
    try:
        key = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise FoveateError(f"{file} is not a text") from None
    if not key:
        raise FoveateError(f"{file} is empty: write the API key into it")
    return key


def _name(model: str | None) -> str:
    """A model's name: the hub's, or that of its folder."""
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).exists() else model


def _log() -> None:
    """One line a request on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("foveate.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
        logger.propagate = False
