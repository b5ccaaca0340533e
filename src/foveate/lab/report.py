"""All cells of an experiment as one report: Markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.files import explained, write
from foveate.lab.comparing import Difference, difference
from foveate.lab.levels import FINE, KINDS, level_named

Result = Mapping[str, Any]
LINES = ("chance", "in-scene guess")
GROUPS = ("fine", "coarse", "where")
APART = 1.06  # factor between methods with the same number of tokens, on the plot's axis
LABELLED = 1.2  # least factor between numbers of tokens with a label on it
MARKERS = "os^Dv"  # one for each ten rows, when the colours repeat
LOOKED = (
    "*region*: of the questions about an object, how often a region that the method chose contains all of it "
    "(found), and the intersection over union of the best of them with the object (overlap).",
    "",
)
CURVES = (
    "*converged*: cells whose last stage gained no more than noise, one standard error of the difference on "
    "the same questions, in the last quarter of its steps, before the learning rate fell.",
    "",
    "![accuracy on held-out pictures over steps and over seconds of training](curves.png)",
    "",
)
COLUMNS = ("", "seeds", *GROUPS, "views", "visual tokens", "GFLOP", "parameters")


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Writes `report.md`, `report.json`, `report.png` and `curves.png`; returns the Markdown file.

    `results` are of one level, scale, number of steps and batch, as `train_cell` returns them.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write(folder / "report.json", json.dumps(list(results), indent=2) + "\n")
    with explained(folder / "report.png"):
        plot(results, folder / "report.png")
        if _curved(results):
            plot_curves(results, folder / "curves.png")
    path = folder / "report.md"
    write(path, markdown(results))
    return path


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Cells that differ only in their seed, under the name of their row."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        options = ", ".join(f"{key}={value}" for key, value in result["cell"]["options"].items())
        name = result["label"] or (f"{result['title']} ({options})" if options else result["title"])
        groups.setdefault(name, []).append(result)
    return groups


def markdown(results: Sequence[Result]) -> str:
    """The report as text; accuracies in percent, the mean over seeds and their range."""
    cell = results[0]["cell"]
    level = level_named(cell["level"])
    batch = f" of {cell['batch']} pictures" if cell["batch"] else ""
    counts: Mapping[str, int] = results[0]["questions"]
    kinds = [kind for kind in KINDS if kind in counts]
    fine = [kind for kind in kinds if kind in FINE]
    groups = by_method(results)
    looked = ["found", "overlap"] if any(result["looked"] for result in results) else []
    curved = _curved(results)
    elsewhere = sorted({result["device"] for result in results if "device" in result} - {"cpu"})
    head = [*COLUMNS, "training, s" if elsewhere else "training, CPU s"]
    head += ["steps", "converged"] if curved else []
    kind_head = ["", *(f"{kind} ({counts[kind]})" for kind in kinds)]
    kind_head += [f"region: {what}" for what in looked]
    lines: Mapping[str, Mapping[str, float]] = results[0]["lines"]
    summary = [
        [*_summary(name, cells), *(_learnt(cells) if curved else [])] for name, cells in groups.items()
    ]
    summary += [_line(name, lines[name], GROUPS, before=2, after=len(head) - 5) for name in LINES]
    details = [
        [
            name,
            *(spread([cell["accuracy"][kind] for cell in cells]) for kind in kinds),
            *(spread([cell["looked"][what] for cell in cells if cell["looked"]]) for what in looked),
        ]
        for name, cells in groups.items()
    ]
    details += [_line(name, lines[name], kinds, before=1, after=len(looked)) for name in LINES]
    text = [
        f"# Lab: level {cell['level']}, scale {cell['scale']}, "
        f"{'at most ' if cell.get('converge') else ''}{cell['steps']} steps{batch}",
        "",
        f"Pictures: {level.summary}. Every method starts from the same frozen tower and the same LLM and "
        f"sees the same pictures and questions {_how_long(cell)}. Accuracy in percent, exact "
        "match, mean over seeds and their range.",
        "",
        f"*Fine* questions ({', '.join(fine)}) need the small glyphs; *coarse* ones (attr, count) do not; "
        "*where* is reported separately. A fine accuracy near the in-scene guess means glyphs are seen but "
        "not bound to their objects: it is not a step towards reading.",
        "",
        *table(head, summary),
        "",
        *table(kind_head, details),
        "",
        *_against_first(groups),
        "Visual tokens: the mean number that the LLM reads for a question. GFLOP: tower, connector and LLM "
        "prefill of one question, counted on the lab's own small networks. Training time is "
        f"{_whose_time(elsewhere)} and leaves out the frozen tower's features, which are encoded once.",
        "",
        "![accuracy against visual tokens, GFLOP and training seconds](report.png)",
        "",
        *(CURVES if curved else []),
        *(LOOKED if looked else []),
        "The commands of all cells:",
        "",
        "```",
        *(result["command"] for result in results),
        "```",
        "",
    ]
    notes = sorted({result["features"] for result in results if result["features"]})
    if halves := sum(result.get("bf16", False) for result in results):
        notes.append(f"Linear layers trained in bfloat16 in {halves} of {len(results)} cells (`--bf16`).")
    return "\n".join([*text, *notes])


def _summary(name: str, cells: Sequence[Result]) -> list[str]:
    first = cells[0]
    return [
        name,
        str(len(cells)),
        *(spread([c["accuracy"][kind] for c in cells]) for kind in GROUPS),
        str(first["cost"]["views"]),
        str(_tokens(cells)),
        f"{first['tflop'] * 1e3:.3g}",
        f"{first['parameters'] / 1e6:.2f} M",
        f"{sum(c['seconds']['training'] for c in cells) / len(cells):.0f}",
    ]


def _against_first(groups: Mapping[str, Sequence[Result]]) -> list[str]:
    """How rows differ from the first; earlier reports cannot tell."""
    (name, baseline), *others = groups.items()
    if not others or not all("marks" in cell for row in groups.values() for cell in row):
        return []
    rows = []
    seeds = {cell["cell"]["seed"] for cell in baseline}
    for other, cells in others:
        if seeds.isdisjoint(cell["cell"]["seed"] for cell in cells):
            continue
        found = [difference(cells, baseline, kinds) for kinds in (FINE, ("attr", "count"))]
        rows.append([other, *map(signed, found), f"{len(found[0].seeds)}"])
    if not rows:
        return []
    return [
        f"Points more than {name} on the same pictures, mean over common seeds, with 95 % intervals over the "
        "pictures:",
        "",
        *table(["", "fine", "coarse", "seeds"], rows),
        "",
    ]


def signed(found: Difference) -> str:
    """A difference in points, and its interval."""
    mean, low, high = (100 * value for value in found[:3])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _whose_time(devices: Sequence[str]) -> str:
    """`devices`: other than the processor."""
    if not devices:
        return "for one thread"
    return (
        f"processor time of a cell's own process, also while it waits for {' or '.join(devices)}, longer "
        "beside other cells (`foveate lab pace` times rows in turn),"
    )


def _curved(results: Sequence[Result]) -> bool:
    """Reports of earlier versions have no learning curves."""
    return all("curve" in result for result in results)


def _how_long(cell: Mapping[str, Any]) -> str:
    if cell.get("converge"):
        return "until it stops learning"
    return "in the same number of steps"


def _learnt(cells: Sequence[Result]) -> list[str]:
    steps = sorted(cell["steps"] for cell in cells)
    several = f"{steps[0]} to {steps[-1]}" if steps[0] < steps[-1] else str(steps[0])
    return [several, f"{sum(cell['converged'] for cell in cells)} of {len(cells)}"]


def _tokens(cells: Sequence[Result]) -> int:
    return round(sum(cell["tokens"] for cell in cells) / len(cells))


def _line(name: str, line: Mapping[str, float], kinds: Sequence[str], before: int, after: int) -> list[str]:
    return [f"*{name}*", *[""] * (before - 1), *(f"{100 * line[kind]:.1f}" for kind in kinds), *[""] * after]


def spread(values: Sequence[float]) -> str:
    """Fractions as percent: their mean, and their range if they are several."""
    if not values:
        return ""
    mean = f"{100 * sum(values) / len(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Lines of Markdown. Columns after the first `words` are numbers, aligned to the right."""
    lines = [head, [*["---"] * words, *["---:"] * (len(head) - words)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def marker(row: int) -> str:
    """matplotlib's colour and marker of a row."""
    return f"C{row % 10}{MARKERS[row // 10 % len(MARKERS)]}"


def plot(results: Sequence[Result], path: Path) -> None:
    """Fine accuracy of every cell against its visual tokens, its GFLOP and its training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    beside: dict[int, int] = {}  # methods with the same number of tokens are drawn side by side
    for row, (name, cells) in enumerate(by_method(results).items()):
        tokens = _tokens(cells)
        place = tokens * APART ** beside.setdefault(tokens, 0)
        beside[tokens] += 1
        style = marker(row)
        accuracy = [100 * cell["accuracy"]["fine"] for cell in cells]
        panels[0].plot([place] * len(cells), accuracy, style, label=name)
        panels[1].plot([1e3 * cell["tflop"] for cell in cells], accuracy, style)
        panels[2].plot([cell["seconds"]["training"] for cell in cells], accuracy, style)
    for name, style in zip(LINES, (":", "--"), strict=True):
        level = 100 * results[0]["lines"][name]["fine"]
        for axes in panels:
            axes.axhline(level, color="grey", linestyle=style, linewidth=1)
        panels[0].annotate(
            name, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
        )
    panels[0].set(
        xlabel="visual tokens (the same: side by side)",
        ylabel="fine questions, % right",
        xscale="log",
        ylim=(0, 100),
    )
    for axes, name in ((panels[1], "GFLOP a question"), (panels[2], "processor seconds of training")):
        _logarithmic(axes, name)
    ticks: list[int] = []
    for tokens in sorted(beside):
        if not ticks or tokens > LABELLED * ticks[-1]:
            ticks.append(tokens)
    panels[0].set_xticks(ticks, [str(tokens) for tokens in ticks])
    panels[0].set_xticks([], minor=True)
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=120)


def _logarithmic(axes: Any, name: str) -> None:
    """An axis below that is logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xlabel=name, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def plot_curves(results: Sequence[Result], path: Path) -> None:
    """Fine and coarse accuracy of every cell as it trained, over steps and over processor seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, (name, cells) in enumerate(by_method(results).items()):
        colour, dashes = f"C{row % 10}", ("-", "--", ":", "-.")[row // 10 % 4]
        for n, cell in enumerate(cells):
            for kind in range(2):
                accuracy = [100 * point["accuracy"][kind] for point in cell["curve"]]
                for axes, what in zip(panels[kind], ("step", "seconds"), strict=True):
                    axes.plot(
                        [point[what] for point in cell["curve"]],
                        accuracy,
                        color=colour,
                        linestyle=dashes,
                        linewidth=1.2,
                        label=name if (n, kind, what) == (0, 0, "step") else None,
                    )
    for kind, name in enumerate(("fine", "coarse")):
        panels[kind][0].set(ylabel=f"{name} questions, % right", ylim=(0, 100))
    panels[1][0].set(xlabel="steps")
    _logarithmic(panels[1][1], "processor seconds of training")
    figure.legend(frameon=False, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
