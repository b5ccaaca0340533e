"""`foveate demo`: a page in the browser."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from foveate.errors import FoveateError


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model folder or hub id; repeatable. By default the embedded model."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 7860,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps or cpu; by default the best available.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default one that suits the device.")
    ] = None,
    quantize: Annotated[
        Literal["8bit", "4bit"] | None, typer.Option(help="The LLM's linear layers in 8 or 4 bits.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Vision towers by torch.compile, at the first picture.")
    ] = False,
    template: Annotated[str | None, typer.Option(help="A chat template by name, for all models.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Method option as key=value; repeatable.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Bound on the length of answers that visitors may choose.")
    ] = 1024,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Bound on a picture's pixels, checked before it is decoded.")
    ] = None,
    max_upload: Annotated[int, typer.Option(min=1, help="Bound on an upload, megabytes.")] = 64,
) -> None:
    """Ask models about pictures in the browser, side by side, and see where they looked."""
    from foveate.demo.app import HERE, check_packages, serve

    check_packages()
    from transformers.utils import logging

    from foveate.ask.foveate import load
    from foveate.picture.limits import LIMITS, Limits
    from foveate.written import read_pairs

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    limits = Limits(max_pixels=max_pixels or LIMITS.max_pixels, max_bytes=max_upload * 2**20)
    names: list[str | None] = [*model] if model else [None]
    if len({*names}) < len(names):
        raise FoveateError("--model names one model twice: name each once")
    from foveate.demo.asking import names_of

    models = {
        title: load(
            name,
            device=device,
            dtype=dtype,
            quantize=quantize,
            compiled=compiled,
            template=template,
            options=read_pairs(option),
            limits=limits,
        )
        for title, name in zip(names_of(names), names, strict=True)
    }
    console = Console(soft_wrap=True, highlight=False)
    if host not in HERE:
        Console(stderr=True, soft_wrap=True).print(
            f"everybody who reaches {host} can ask these models: there is no password",
            style="yellow",
            markup=False,
        )
    serve(
        models,
        limits,
        max_new_tokens,
        host,
        port,
        lambda address: console.print(f"{address}   (stop with Ctrl+C)", markup=False),
        examples=names[0] is None,
    )
