"""`foveate mcp`: `look` and `ask` as tools of an agent, over standard input and output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foveate.errors import FoveateError, require

KEY = "OPENAI_API_KEY"


def mcp(
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="Folder whose pictures may be read; repeatable; by default the current one."),
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures by URL, from public addresses.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of any VLM that answers; by default the embedded model."),
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Address of a server of OpenAI's protocol instead, with /v1.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    boxes: Annotated[
        str | None, typer.Option(help="How the server's model writes boxes: qwen3_vl, internvl, ...")
    ] = None,
    zoom: Annotated[
        Literal["answer", "relevance", "tool"],
        typer.Option(help="What names the region of a closer look."),
    ] = "answer",
    crop_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of what look returns.")] = 1344 * 1344,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on an answer's length in tokens.")] = 256,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Bound on a picture's pixels, checked before it is decoded.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default one that suits the device.")
    ] = None,
) -> None:
    """Offer an agent two tools by the Model Context Protocol: look at a region, ask a model."""
    require("mcp", "mcp", "foveate mcp")
    if upstream is not None and (model is not None or name is None):
        raise FoveateError("--upstream asks the model that --name names there: give it, and no --model")
    if upstream is None and (name is not None or boxes is not None):
        raise FoveateError("--name and --boxes are for --upstream")
    from foveate.picture.limits import LIMITS, Limits
    from foveate.serve.mcp import Allowed, Tools, server
    from foveate.zoom.looking import Budget
    from foveate.zoom.wire import Served

    served = Served(boxes or "unit_xyxy")
    limits = Limits(max_pixels=max_pixels or LIMITS.max_pixels)
    allowed = Allowed(folder or [Path()], allow_urls, limits)

    def make() -> Any:
        from transformers.utils import logging

        from foveate.zoom.vlm import VLM
        from foveate.zoom.zoom import Zoom

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if upstream is not None:
            return Zoom.remote(
                upstream, name or "", key=os.environ.get(KEY), region=zoom, served=served, limits=limits
            )
        return Zoom.of(VLM.load(model, device, dtype), zoom, limits=limits)

    if upstream is not None:
        make()  # what is wrong with it is said now
    budget = Budget(min_pixels=min(Budget.min_pixels, crop_pixels), max_pixels=crop_pixels)
    server(Tools(allowed, make, budget, max_new_tokens)).run("stdio")
