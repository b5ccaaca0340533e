"""Requirements of Foveate for other versions than pip would take by itself, from pyproject.toml.

    python tools/requirements.py newest              every package without its upper bound
    python tools/requirements.py oldest              every package at its lower bound
    python tools/requirements.py constraints FILE... constraints.txt, of pip's reports for several Pythons

A report is what `pip install --dry-run --ignore-installed --report FILE` writes. Needs Python 3.11.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "lab", "annotate", "original", "quantize", "serve", "dev")
CPU_TORCH = "2.13"  # the oldest that pip has built for CPUs alone; older ones are tried where there is CUDA
HEAD = """\
# What `make demo` and `make install` take, for Python 3.10 to 3.13; all tests pass with those for 3.11.
# Made by `make constraints`; CONTRIBUTING.md says when.
"""
OF_TORCH = re.compile(r"nvidia|cuda|triton")  # torch itself says which of these it needs


def requirements() -> dict[str, list[str]]:
    """Requirements by group: `core`, and the extras that tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"core": project["dependencies"]}
    groups |= {extra: project["optional-dependencies"][extra] for extra in EXTRAS}
    return {name: [r for r in lines if not r.startswith("foveate")] for name, lines in groups.items()}


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[;\s]", requirement, maxsplit=1)[0]


def newest() -> list[str]:
    return sorted({name_of(line) for lines in requirements().values() for line in lines})


def oldest() -> list[str]:
    """What Foveate runs with at its lower bounds; what only tests need is the newest."""
    lines = set()
    for group, wanted in requirements().items():
        for line in wanted:
            name, bound = name_of(line), re.search(r">=\s*([\d.]+)", line)
            if group == "dev" or bound is None:
                lines.add(name)
            else:
                lines.add(f"{name}=={CPU_TORCH if name == 'torch' else bound[1]}")
    return sorted(lines)


def constraints(reports: list[Path]) -> list[str]:
    """One line a package where all Pythons take the same version, else one line for each Python."""
    versions: dict[str, dict[str, str]] = defaultdict(dict)  # package -> Python -> version
    pythons = []
    for path in reports:
        report = json.loads(path.read_text(encoding="utf-8"))
        python = report["environment"]["python_version"]
        pythons.append(python)
        for item in report["install"]:
            name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
            if name != "foveate" and not OF_TORCH.match(name):
                versions[name][python] = version.partition("+")[0]  # local labels are not on every index
    lines = []
    for name, found in sorted(versions.items()):
        for version in sorted({*found.values()}):
            taken = [python for python in pythons if found.get(python) == version]
            lines.append(f"{name}=={version}{marker(taken, pythons)}")
    return [*HEAD.splitlines(), *lines]


def marker(some: list[str], pythons: list[str]) -> str:
    """The marker of neighbouring Pythons among all; of none where there is no other."""
    first, last = pythons.index(some[0]), pythons.index(some[-1])
    bounds = [f'python_version >= "{some[0]}"'] if first else []
    bounds += [f'python_version < "{pythons[last + 1]}"'] if last + 1 < len(pythons) else []
    return " ; " + " and ".join(bounds) if bounds else ""


if __name__ == "__main__":
    what, *files = sys.argv[1:]
    made = {"newest": newest, "oldest": oldest, "constraints": lambda: constraints([*map(Path, files)])}
    sys.stdout.write("\n".join(made[what]()) + "\n")
