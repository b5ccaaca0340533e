"""`foveate eval`: score a model on your own questions, and compare two runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.evaluate.models import Answering
    from foveate.picture.limits import Limits

KEY = "OPENAI_API_KEY"  # where the official client looks, too


def open_model(
    model: str | None,
    *,
    name: str | None = None,
    boxes: str | None = None,
    zoom: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    limits: Limits,
    given: Mapping[str, Any],
    **hub: Any,
) -> Answering:
    """What `foveate eval` is asked to evaluate.

    Args:
        model: folder, hub id or the address of a server; by default the embedded model.
        name: of the model on a server.
        boxes: name of the format in which it writes boxes.
        zoom: how a closer look finds its region: `answer`, `relevance` or `tool`; None: no closer look.
        device, dtype: as for `foveate.load`.
        limits: on the pictures that are read.
        given: `method`, `template` and `options`, as for `foveate.load`; only for its models.
        **hub: `revision` and `subfolder`.

    Raises:
        FoveateError: no such model, arguments that do not go together.
    """
    from foveate.ask.foveate import Foveate, load
    from foveate.evaluate.models import AnyVLM, Own, Remote
    from foveate.model.config import FoveateConfig
    from foveate.zoom.server import Server
    from foveate.zoom.vlm import VLM
    from foveate.zoom.wire import Served
    from foveate.zoom.zoom import Zoom

    changes = {key: value for key, value in given.items() if value}
    if model is not None and model.startswith(("http://", "https://")):
        if changes:
            raise FoveateError(f"{model} is a server: --method, --template and -o are for models here")
        if name is None:
            raise FoveateError(f"{model} is a server: say which model of it with --name")
        server = Server(model, name, os.environ.get(KEY), served=Served(form=boxes or "unit_xyxy"))
        return Remote(server, None if zoom is None else Zoom.of(server, zoom, limits=limits))
    for option, value in (("--name", name), ("--boxes", boxes)):
        if value is not None:
            raise FoveateError(f"{option} is for the address of a server")
    if changes:
        if zoom is not None:
            raise FoveateError("--zoom asks the model as it is: leave out --method, --template and -o")
        return Own(load(model, device=device, dtype=dtype, limits=limits, **changes, **hub))
    vlm = VLM.load(model, device=device, dtype=dtype, **hub)
    if zoom is not None:
        return AnyVLM(vlm, Zoom.of(vlm, zoom, limits=limits))
    if isinstance(vlm.model.config, FoveateConfig):
        return Own(Foveate(vlm.model, vlm.processor))
    return AnyVLM(vlm)


def show(console: Console, report: Mapping[str, Any], out: Path) -> None:
    """A run's scores, and what one should know about them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("score", "value", "95 %", "always one answer", "more"):
        table.add_column(column, justify="left" if column in ("score", "more") else "right")
    most = report["most_frequent"]
    for key, score in report["scores"].items():
        low, high = score["interval"]
        more = {k: v for k, v in score.items() if k not in ("title", "mean", "interval", "categories")}
        table.add_row(
            score["title"],
            _percent(score["mean"]),
            f"{_percent(low)} to {_percent(high)}",
            _percent(most["always"][key]),
            ", ".join(f"{k} {v:.3g}" for k, v in more.items()),
        )
        for kind, own in score.get("categories", {}).items():
            table.add_row(f"  {kind}", _percent(own["mean"]), f"of {own['samples']}", "", "")
    console.print(table)
    console.print(f"{report['samples']} samples; report in {out}", style="dim", soft_wrap=True)
    if report["downscaled"]:
        console.print(
            f"the model sees {report['downscaled']} of {report['samples']} pictures smaller than they are",
            style="yellow",
            soft_wrap=True,
        )
    if most["one_answer"]:
        console.print(
            f"{_percent(most['share'])} of the answers are the same, {most['prediction']!r}, and no score is "
            "above what this answer alone gets: the model has learnt one answer",
            style="red",
            markup=False,
            soft_wrap=True,
        )


def show_difference(console: Console, found: Mapping[str, Any]) -> None:
    """What `compare` found."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("score", "difference", "95 %", "better", "worse"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, score in found["scores"].items():
        low, high = (f"{100 * bound:+.1f}" for bound in score["interval"])
        row = (f"{100 * score['mean']:+.1f} %", f"{low} to {high} %")
        table.add_row(name, *row, str(score["better"]), str(score["worse"]))
    console.print(table)
    changed = found["changed"]
    shown = ", ".join(changed[:10]) + (", ..." if len(changed) > 10 else "")
    console.print(
        f"{len(changed)} of {found['samples']} answers differ{': ' if changed else ''}{shown}",
        style="dim",
        markup=False,
        soft_wrap=True,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
