"""`foveate data`: what of a paper's data is on disk, and the set of reasoning samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from foveate.errors import FoveateError
from foveate.shipped import shipped

if TYPE_CHECKING:
    from foveate.data.mixture import Mixture, RowReport

app = typer.Typer(help="The data that the papers train on: what is there, and what can be built.")

Data = Annotated[Path, typer.Option(help="The folder of data, from which all paths start.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def check(
    mixture: Annotated[
        str,
        typer.Argument(
            help=f"A YAML file, or the name of one of Foveate's: {', '.join(shipped('mixture'))}."
        ),
    ],
    data: Data = Path("data"),
    stage: Annotated[
        list[str] | None, typer.Option(help="Only this stage of the mixture; repeatable.")
    ] = None,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Do not look for the pictures that the files name.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a paper's mixture with what is on disk. An error if anything is missing or differs."""
    from foveate.data.mixture import check_mixture, load_mixture

    wanted = load_mixture(mixture)
    rows = check_mixture(wanted, data, stage or (), not no_pictures)
    problems = sum(len(row.problems()) for row in rows)
    if as_json:
        typer.echo(json.dumps([_values(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        for line in _lines(wanted, rows):
            Console(soft_wrap=True, highlight=False).print(line, markup=False)
    if problems:
        things = "one thing is" if problems == 1 else f"{problems} things are"
        raise FoveateError(f"the data of {wanted.title} in {data}: {things} missing or different, as listed")


@app.command()
def smr(
    folder: Annotated[
        Path, typer.Argument(help="The folder with a folder for each source; picture paths start from it.")
    ] = Path("data/SMR"),
    out: Annotated[Path | None, typer.Option(help="The file; by default smr.json in the folder.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this source; repeatable.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder, or Parquet files, with pictures of an evaluation set, which are left out."
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the lengths of questions and answers: .png, .svg or .pdf.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE in LLaVA's format to draw beside them; repeatable.")
    ] = None,
    dvqa: Annotated[int, typer.Option(min=1, help="Questions of DVQA, drawn at random.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all that is drawn at random.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Build SMR, science and mathematical reasoning, from ten published data sets."""
    from rich.progress import Progress

    from foveate.data.mixture import counted
    from foveate.data.smr.build import CONVERTERS, Request, build

    if compare and figure is None:
        raise FoveateError("--compare needs --figure, which draws it")
    request = Request(
        folder=folder,
        sources=tuple(only or CONVERTERS),
        out=out or folder / "smr.json",
        against=tuple(against or ()),
        compare={name: Path(path) for name, path in map(_named, compare or ())},
        figure=figure,
        dvqa=dvqa,
        seed=seed,
        workers=workers,
    )
    console = Console(soft_wrap=True, highlight=False)
    with Progress(console=console, disable=as_json or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("samples", total=None)
        reports = build(
            request, lambda name, count: progress.update(task, description=f"{name}: {count:,} samples")
        )
    if as_json:
        values = {name: report.values() for name, report in reports.items()}
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    for name, report in reports.items():
        console.print(f"{name}: {report.kept:,} of {counted(report.read, 'sample')}", markup=False)
        for reason, count in report.left_out.most_common():
            first = report.first[reason][0]
            console.print(f"    left out {count:,}: {reason}, the first {first}", markup=False)
    total = sum(report.kept for report in reports.values())
    console.print(f"written to {request.out}: {counted(total, 'sample')}", markup=False)
    if figure is not None:
        console.print(f"lengths drawn in {figure}", markup=False)


def _named(pair: str) -> tuple[str, str]:
    name, equals, path = pair.partition("=")
    if not (name and equals and path):
        raise FoveateError(f"--compare {pair}: expected NAME=FILE")
    return name, path


def _lines(mixture: Mixture, rows: list[RowReport]) -> list[str]:
    from foveate.data.mixture import counted

    lines = [f"{mixture.title} ({mixture.paper})"]
    stage = ""
    for report in rows:
        if report.stage != stage:
            stage = report.stage
            total = mixture.stages[stage].paper
            lines += ["", f"{stage}{'' if total is None else f', {total} in the paper'}"]
        row = report.row
        lines.append(f"  {row.name}{'' if row.paper is None else f', {row.paper} in the paper'}")
        for part in row.files:
            file = report.files[part.path]
            problems = file.problems(part)
            state = "missing" if not file.there else counted(file.records, "record")
            lines.append(f"    {'differs' if problems and file.there else state:>7}  {part.path}")
            lines += [f"             {problem}" for problem in problems if file.there]
            if file.twice:
                twice = f"{file.twice:,}, such as {', '.join(file.twice_first)}"
                lines.append(f"             note: records with an id that came before: {twice}")
        own = {part.path for part in row.files}
        lines += [f"             {text}" for place, text in report.problems() if place not in own]
        if report.differs and report.whole:
            lines.append(
                f"             note: {counted(report.records, 'record')} here, {row.paper} in the paper"
            )
        if row.note:
            lines.append(f"             note: {row.note}")
        if not all(file.there and not file.missing for file in report.files.values()):
            for name in row.sources:
                source = mixture.sources[name]
                lines.append(f"             from {source.home}; licence: {source.licence}")
    return lines


def _values(report: RowReport) -> dict[str, Any]:
    return {
        "stage": report.stage,
        "row": report.row.name,
        "paper": report.row.paper,
        "files": {
            part.path: {
                "there": report.files[part.path].there,
                "records": report.files[part.path].records,
                "published": part.records,
                "missing_pictures": report.files[part.path].missing,
            }
            for part in report.row.files
        },
        "problems": [f"{place}: {text}" for place, text in report.problems()],
    }
