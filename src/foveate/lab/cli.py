"""`foveate lab`: prepare the small tower and LLM, compare methods, look at the pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from foveate.errors import FoveateError
from foveate.files import explained
from foveate.lab.progress import telling
from foveate.shipped import shipped

if TYPE_CHECKING:
    from foveate.lab.experiment import Experiment, Variant

SEVERAL = "Several: separated by commas, or the option again."

app = typer.Typer(
    help="Compare methods in minutes on a CPU, on pictures whose contents are known.",
    no_args_is_help=True,
)

ScaleName = Annotated[str, typer.Option(help="Sizes of the networks.")]
LevelName = Annotated[str, typer.Option(help="How hard the pictures are: easy, near, words, dense or signs.")]
Folder = Annotated[Path, typer.Option(help="Folder for data, features, weights and reports.")]
Background = Annotated[Path | None, typer.Option(help="A photograph as background, instead of the lab's.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all that is drawn at random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps: where networks train and are measured.")]
Bf16 = Annotated[
    bool,
    typer.Option("--bf16", help="Multiply in bfloat16 while training, on devices that do; not in measuring."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; one suits networks this small.")]


@app.command()
def prepare(
    scale: ScaleName = "tiny",
    folder: Folder = Path("lab"),
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    parts: Annotated[list[str] | None, typer.Option(help=f"Which parts, by default all. {SEVERAL}")] = None,
) -> None:
    """Pre-train the tower, the LLM (reader) and the ConvNeXt that methods start from."""
    from foveate.lab.scales import scale_named

    sizes = scale_named(scale)
    import torch

    from foveate.devices import usable_device
    from foveate.lab.parts import PARTS
    from foveate.lab.parts import prepare as make

    torch.set_num_threads(threads)
    console = Console()
    with telling(console) as tell:
        place = make(
            scale,
            sizes,
            folder,
            seed,
            lambda what, step, steps, loss: tell(what, step, steps, f"loss {loss:.3f}"),
            PARTS if parts is None else several(parts, PARTS),
            torch.device(usable_device(device)),
        )
    console.print(f"written to {place}")


@app.command()
def questions(
    out: Annotated[Path, typer.Argument(help="Folder to write: pictures, and questions.jsonl.")],
    level: LevelName = "signs",
    scale: ScaleName = "small",
    count: Annotated[int, typer.Option(min=1, help="How many questions.")] = 200,
    seed: Seed = 0,
    background: Background = None,
) -> None:
    """Write questions about held-out pictures, with answers, for `foveate eval`."""
    from foveate.lab.levels import level_named
    from foveate.lab.questionnaire import write_questions
    from foveate.lab.scales import scale_named

    hard, sizes = level_named(level), scale_named(scale)
    path = write_questions(out, hard, sizes, count, seed=seed, photographs=_photographs(background))
    Console().print(f"{count} questions written to {path}", style="dim", soft_wrap=True)


@app.command()
def run(
    context: typer.Context,
    experiment: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file with variants, level, scale, seeds, steps and batch, or one that comes with "
            f"Foveate: {', '.join(shipped('experiment'))}."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Methods and controls of the lab, instead of a file or as further rows of it. {SEVERAL}"
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help=f"Labels of the file's variants to run, by default all; none: ''. {SEVERAL}"),
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(help=f"Whole numbers; by default 0, or the file's. {SEVERAL}")
    ] = None,
    level: LevelName = "easy",
    scale: ScaleName = "tiny",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; by default the scale's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step; by default the scale's.")] = None,
    folder: Folder = Path("lab"),
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="METHOD.KEY=VALUE, a method's option; repeatable."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Processor time of each job after which it stops, as 90s, 20m or 3h; run again, it goes on."
        ),
    ] = None,
    device: Device = "cpu",
    jobs: Annotated[
        int, typer.Option(min=1, help="Cells that train at once, each in a process of its own.")
    ] = 1,
    bf16: Bf16 = False,
    threads: Threads = 1,
) -> None:
    """Train and measure methods with equal data and steps; started again, it resumes."""
    from foveate.lab.experiment import Experiment, Variant, read_experiment

    if experiment is None and methods is None:
        raise FoveateError("give a file with an experiment, or --methods, or both")
    if rows is not None and experiment is None:
        raise FoveateError("--rows needs a file with an experiment")
    numbers = None if seeds is None else _numbers("seeds", seeds)
    seconds = None if budget is None else _seconds(budget)
    names, options = several(methods or ()), _options(option or [])
    if extra := set(options) - set(names):
        raise FoveateError(f"--option for {', '.join(sorted(extra))}, which --methods does not name")
    added = tuple(Variant(name, options=options.get(name, {})) for name in names)
    if experiment is not None:
        _the_file_says(context, "level", "scale", "steps", "batch")
        wanted = read_experiment(experiment)
        wanted = replace(wanted, variants=(*_variants(wanted, rows), *added))
    else:
        wanted = Experiment(added, level, scale, (0,) if numbers is None else numbers, steps, batch)
    import torch

    from foveate.devices import usable_device
    from foveate.lab.run import room
    from foveate.lab.run import run as run_all

    if numbers is not None:
        wanted = replace(wanted, seeds=numbers)

    torch.set_num_threads(threads)
    console = Console()

    def takes(size: int) -> None:
        free = room(folder)
        console.print(
            f"pictures and features: {size / 1e9:.2f} GB more in {folder}, where {free / 1e9:.1f} GB are "
            "free; `foveate lab clean` deletes them",
            soft_wrap=True,
        )

    with telling(console) as tell:
        done = run_all(
            wanted,
            folder,
            lambda cell, step, steps, loss: tell(cell.key, step, steps, f"loss {loss:.3f}"),
            None if experiment is None else experiment.stem,
            partial(_command, experiment, added=[variant.method for variant in added]),
            tell,
            takes,
            seconds,
            torch.device(usable_device(device)),
            jobs,
            bf16,
        )
    if done.report is not None:
        console.print(f"report written to {done.report}", soft_wrap=True)
    if done.missing:
        console.print(f"the budget is used up with {done.missing} cells to train: run it again to go on")


@app.command()
def sizes(
    experiment: Annotated[Path, typer.Argument(help="The experiment that `run` trained, a file or a name.")],
    rows: Annotated[
        list[str] | None, typer.Option(help=f"Labels of the file's variants, by default all. {SEVERAL}")
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(help=f"Whole numbers; by default the file's. {SEVERAL}")
    ] = None,
    glyphs: Annotated[
        list[str] | None,
        typer.Option(help=f"Font sizes, pixels; by default 6, 8, 10, 12, 14, 18 and 24. {SEVERAL}"),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures of each size.")] = 200,
    folder: Folder = Path("lab"),
    device: Device = "cpu",
    threads: Threads = 1,
) -> None:
    """Measure trained rows on glyphs smaller and larger than those that they learnt from."""
    from foveate.lab.experiment import read_experiment

    wanted = read_experiment(experiment)
    wanted = replace(wanted, variants=_variants(wanted, rows))
    if seeds is not None:
        wanted = replace(wanted, seeds=_numbers("seeds", seeds))
    asked = None if glyphs is None else _numbers("glyphs", glyphs)
    import torch

    from foveate.devices import usable_device
    from foveate.lab.sizes import GLYPHS, measure_sizes

    torch.set_num_threads(threads)
    console = Console()
    with telling(console) as tell:
        path, missing = measure_sizes(
            wanted,
            folder,
            GLYPHS if asked is None else asked,
            pictures,
            experiment.stem,
            partial(_command, experiment),
            tell,
            torch.device(usable_device(device)),
        )
    console.print(f"report written to {path}", soft_wrap=True)
    if missing:
        console.print(f"{missing} cells are not trained yet, and not in it")


@app.command()
def pace(
    experiment: Annotated[Path, typer.Argument(help="The experiment, a file or a name.")],
    rows: Annotated[
        list[str] | None, typer.Option(help=f"Labels of the file's variants, by default all. {SEVERAL}")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each row is timed.")] = 7,
    folder: Folder = Path("lab"),
    device: Device = "cpu",
    bf16: Bf16 = False,
    threads: Threads = 1,
) -> None:
    """Time a training step of every row, in turn: what rows cost, wherever they have trained."""
    from foveate.lab.experiment import read_experiment

    wanted = read_experiment(experiment)
    wanted = replace(wanted, variants=_variants(wanted, rows))
    import torch

    from foveate.devices import usable_device
    from foveate.lab.pace import measure_pace

    torch.set_num_threads(threads)
    console = Console()
    with telling(console) as tell:
        path = measure_pace(
            wanted, folder, rounds, experiment.stem, tell, torch.device(usable_device(device)), bf16
        )
    console.print(f"report written to {path}", soft_wrap=True)


@app.command()
def clean(folder: Folder = Path("lab")) -> None:
    """Delete the pictures and features of a folder, which a run makes again; results and weights stay."""
    from foveate.lab.run import clean as delete

    Console().print(f"{delete(folder) / 1e9:.2f} GB deleted from {folder}", soft_wrap=True)


@app.command()
def export(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    method: Annotated[str | None, typer.Option(help="A method's name.")] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(help="Instead of a method: the experiment that `run` trained, a file or a name."),
    ] = None,
    row: Annotated[str | None, typer.Option(help="Label of the file's variant.")] = None,
    seed: Seed = 0,
    level: LevelName = "easy",
    scale: ScaleName = "tiny",
    steps: Annotated[int | None, typer.Option(min=1, help="As in the run; by default the scale's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="As in the run; by default the scale's.")] = None,
    folder: Folder = Path("lab"),
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Change to the method's options as key=value; repeatable."),
    ] = None,
) -> None:
    """Write a method that `run` has trained as a model for `foveate ask`."""
    from foveate.lab.experiment import Experiment, Variant, only, read_experiment

    if (method is None) == (experiment is None) or (row is None) != (experiment is None):
        raise FoveateError("give either --method, or --experiment with --row")
    from foveate.written import read_pairs

    changes = read_pairs(option)
    if experiment is not None:
        _the_file_says(context, "level", "scale", "steps", "batch")
        wanted = read_experiment(experiment)
        wanted = replace(wanted, variants=only(wanted, [str(row)]))
    else:
        wanted = Experiment((Variant(str(method)),), level, scale, steps=steps, batch=batch)
    from foveate.lab.cell import Cell, check_methods
    from foveate.lab.export import export as write

    variant = wanted.variants[0]
    check_methods([variant.method])
    cell = Cell.of(wanted, variant, seed)
    write(cell, folder, out, changes, _command(experiment, cell))
    Console().print(f"model written to {out}")


@app.command()
def photographs(
    photographs: Annotated[Path, typer.Argument(help="Folder of photographs, or one file.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("photographs"),
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; by default the embedded model.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Objects of each size and kind a photograph.")] = 1,
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Draw the lab's objects on photographs at decreasing sizes, and count a model's right answers."""
    from foveate.lab.photographs import measure_photographs, photographs_in

    files = photographs_in(photographs)
    import torch

    from foveate.ask.foveate import load

    torch.set_num_threads(threads)
    console = Console()
    reader = load(model)
    with telling(console) as tell:
        path = measure_photographs(
            reader,
            model or "the embedded model",
            files,
            out,
            repeats,
            seed,
            lambda done, total: tell("questions", done, total),
        )
    console.print(f"report written to {path}")


@app.command()
def show(
    out: Annotated[Path, typer.Argument(help="Picture file to write.")],
    level: LevelName = "easy",
    scale: ScaleName = "tiny",
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 6,
    background: Background = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for each scene as a separate picture, to ask a model about.")
    ] = None,
) -> None:
    """Draw scenes of a level: as they are, and as the tower's base view shows them."""
    from PIL import Image

    from foveate.lab.gallery import gallery, scenes
    from foveate.lab.levels import level_named
    from foveate.lab.scales import scale_named
    from foveate.picture.reading import write_drawing

    hard, sizes = level_named(level), scale_named(scale)
    shown = scenes(hard, sizes, seed, count, _photographs(background))
    write_drawing(gallery(hard, sizes, shown), out)
    if pictures is not None:
        with explained(pictures):
            pictures.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(shown):
            write_drawing(Image.fromarray(scene.picture), pictures / f"{i}.png")
    Console().print(f"{count} scenes written to {out}")


def _photographs(background: Path | None) -> list[Any]:
    """A photograph (H, W, 3) to draw scenes on; none: the lab's own."""
    if background is None:
        return []
    import numpy as np

    from foveate.picture.reading import read_picture

    return [np.asarray(read_picture(background))]


def _the_file_says(context: typer.Context, *names: str) -> None:
    """Raises `FoveateError` for options given with an experiment's file, which would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise FoveateError(f"--{name} is for --methods: set it in the experiment's file")


def _variants(experiment: Experiment, rows: Sequence[str] | None) -> tuple[Variant, ...]:
    """Those that `--rows` names; without it, all."""
    from foveate.lab.experiment import only

    if rows is None:
        return experiment.variants
    labels = [variant.label or variant.method for variant in experiment.variants]
    return only(experiment, several(rows, labels))


def _command(experiment: Path | None, cell: Any, added: Sequence[str] = ()) -> str:
    """What trains a cell; `added`: methods that are no rows of the file."""
    if experiment is None:
        return str(cell.command)
    words = ["foveate", "lab", "run", experiment.as_posix()]
    if cell.method in added:
        words += ["--rows", "", "--methods", cell.method, *cell.option_words]
    else:
        words += ["--rows", cell.label or cell.method]
    return shlex.join([*words, "--seeds", str(cell.seed)])


def several(values: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Values of an option that may be given several times, each with one name or several.

    A value that is a known name is one, commas and all.
    """
    names = []
    for value in values:
        names += [value] if value in known else [name.strip() for name in value.split(",") if name.strip()]
    return names


def _numbers(option: str, given: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in several(given))
    except ValueError:
        raise FoveateError(
            f"--{option} {','.join(given)}: expected whole numbers separated by commas"
        ) from None


def _seconds(text: str) -> float:
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or int(number) < 1:
        raise FoveateError(f"--budget {text}: expected a time such as 90s, 20m or 3h")
    return float(int(number) * unit)


def _options(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """METHOD.KEY=VALUE texts -> options per method."""
    from foveate.written import read_pairs

    options: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        if "." not in pair.partition("=")[0]:
            raise FoveateError(f"--option {pair}: expected METHOD.KEY=VALUE")
    for place, value in read_pairs(pairs).items():
        method, _, key = place.partition(".")
        options.setdefault(method, {})[key] = value
    return options
