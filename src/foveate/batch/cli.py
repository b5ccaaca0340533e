"""`foveate batch`: many questions from a file, answered into another."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from foveate.errors import FoveateError


def batch(
    questions: Annotated[Path, typer.Argument(help="Questions, .jsonl: image, question and id, one a line.")],
    out: Annotated[Path, typer.Argument(help="Answers, .jsonl, in the same order.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of any VLM; by default the embedded model.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Address of a server of OpenAI's protocol instead, with /v1.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    boxes: Annotated[
        str | None, typer.Option(help="How the server's model writes boxes: qwen3_vl, internvl, ...")
    ] = None,
    zoom: Annotated[
        Literal["answer", "relevance", "tool"] | None,
        typer.Option(help="A closer look at a region that the model's answer, relevance or calls name."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that picture paths start from and stay in.")
    ] = None,
    size: Annotated[
        int, typer.Option("--batch", min=1, help="Questions at once; to a server, requests at once.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on the answer's length in tokens.")] = 256,
    ray: Annotated[bool, typer.Option("--ray", help="Over a cluster of Ray, one actor a device.")] = False,
    address: Annotated[
        str | None, typer.Option(help="The cluster's; by default the environment's, or this machine.")
    ] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="By default one for each GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default one that suits the device.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    subfolder: Annotated[str, typer.Option(help="The folder inside the model's that holds it.")] = "",
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Bound on a picture's pixels, checked before it is decoded.")
    ] = None,
) -> None:
    """Answer many questions from a file. Resumes an interrupted run; answers keep the questions' order."""
    if model is not None and upstream is not None:
        raise FoveateError("give --model or --upstream, not both")
    if upstream is not None and not upstream.startswith(("http://", "https://")):
        raise FoveateError(f"--upstream {upstream} is not the address of a server: http://host:port/v1")
    if not ray and (address or actors):
        raise FoveateError("--address and --actors are for --ray")
    from foveate.batch.run import Job, digest_of, in_threads, opened, run
    from foveate.picture.limits import LIMITS, Limits

    path, folder = opened(questions, images)
    digest, total = digest_of(path)
    if not total:
        raise FoveateError(f"{path} holds no questions")
    limits = Limits(max_pixels=max_pixels or LIMITS.max_pixels)
    opening: dict[str, Any] = {"name": name, "boxes": boxes, "zoom": zoom, "device": device, "dtype": dtype}
    opening |= {"limits": limits, "given": {}, "revision": revision, "subfolder": subfolder}
    make = partial(
        _asking, upstream or model, opening, path.absolute(), folder.absolute(), max_new_tokens, limits
    )
    asking = make()
    job = Job(path.name, digest, asking.answering.describe(), max_new_tokens, asking.transparency)
    if ray:
        from foveate.batch.cluster import over_cluster

        work = over_cluster(make, size, address, actors)
    else:
        at_once = size if upstream else 1
        work = in_threads(asking, 1 if upstream else size, at_once)
    console = Console(stderr=True, soft_wrap=True)
    counts = run(job, total, path, out, work, console)
    summary = f"{counts.answers} answers in {out}"
    if counts.errors:
        summary += f", and {counts.errors} errors"
    Console(soft_wrap=True).print(summary, style="yellow" if counts.errors else "dim", markup=False)


def _asking(
    model: str | None,
    opening: Mapping[str, Any],
    questions: Path,
    images: Path,
    max_new_tokens: int,
    limits: Any,
) -> Any:
    """What asks a model. Also called on the machines of a cluster."""
    from transformers.utils import logging

    from foveate.batch.run import Asking
    from foveate.evaluate.cli import open_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Asking(open_model(model, **opening), questions, images, max_new_tokens, limits)
