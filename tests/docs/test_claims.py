"""What README and docs say about the code is so: numbers, names, files, options."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

import foveate
from foveate.cli import app
from foveate.methods import METHODS, method_class
from foveate.model.cost import reference_config, shared_pricer
from foveate.model.text import TEMPLATES
from foveate.picture.geometry import Size
from foveate.shipped import shipped
from tests.docs.blocks import PAGES, ROOT, blocks_of

TWELVE_MEGAPIXELS = Size(height=3000, width=4000)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    text = read(page)
    for block in blocks_of(page):
        text = text.replace(block.text, "")
    return text


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the Markdown table whose first header is `first`, without its two header lines."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"\|\s*{re.escape(first)}\s*\|", line))
    body = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in line.strip("|").split("|")])
    return body


def names_after(text: str, prefix: str) -> set[str]:
    return {code for code in CODE.findall(text) if code.startswith(prefix)}


def test_table_of_methods() -> None:
    table = {row[0].strip("`"): row[1:] for row in rows(read("README.md"), "Method")}
    assert list(table) == list(METHODS)
    for name, cells in table.items():
        method = method_class(name)
        cost = shared_pricer(reference_config(name)).price(TWELVE_MEGAPIXELS)
        module = METHODS[name].partition(":")[0].rpartition(".")[2]
        assert cells == [
            method.idea,
            str(cost.views),
            str(cost.visual_tokens),
            f"{cost.effective_width} x {cost.effective_height}",
            f"{cost.encode_flops / 1e12:.2f}",
            f"{cost.prefill_flops / 1e12:.2f}",
            method.paper,
            f"[{module}.py](src/foveate/methods/{module}.py)",
        ]


def test_every_method_has_a_page_with_all_its_options() -> None:
    for name in METHODS:
        page = f"docs/methods/{name}.md"
        options = {row[0].strip("`"): row[1].strip("`") for row in rows(read(page), "Option")}
        defaults = method_class(name).Options()
        assert set(options) == set(vars(defaults)), page
        assert method_class(name).paper.removeprefix("arXiv ").partition(",")[0] in read(page)
        assert f"methods/{name}.md" in read("mkdocs.yml")


def test_file_tree() -> None:
    """Every file of the package is in the README's tree with a comment, and the tree has no other.

    A folder with a comment stands for all that is in it.
    """
    block = next(block for block in blocks_of("README.md") if block.text.startswith("src/foveate/"))
    folders = [Path("src/foveate")]
    listed, whole = [], []
    for line in block.text.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition(" ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(folders[-1] / name)
            whole += [folders[-1]] if comment.strip() else []
            continue
        assert comment.strip(), f"{name} has no comment"
        listed.append((folders[-1] / name).as_posix())
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "src/foveate").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for folder in whole:
        inside = {file for file in files if file.startswith(f"{folder.as_posix()}/")}
        assert inside, f"{folder} is empty"
        files -= inside
    assert len(listed) == len(set(listed))
    assert set(listed) == files


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """`foveate.x.y`, `src/...` and `tests/...` in prose name things that exist."""
    for code in CODE.findall(prose(page)):
        if re.fullmatch(r"foveate(\.\w+)+", code):
            resolve(code)
        if re.fullmatch(r"(src|docs|tests|benchmarks)/[\w./-]+", code):
            assert (ROOT / code).exists(), f"{page}: there is no {code}"


def resolve(name: str) -> Any:
    """An attribute, of a module or of a class in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{name} does not exist")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_prose_exist(page: str) -> None:
    group = typer.main.get_command(app)
    known = {name: command for name, command in group.commands.items()}
    inner = [command for name in known for command in getattr(known[name], "commands", {}).values()]
    commands = [*known.values(), *inner]
    flags = {flag for command in commands for p in command.params for flag in (*p.opts, "--help")}
    for code in CODE.findall(prose(page)):
        words = code.split()
        if words[0] == "foveate" and len(words) > 1:
            assert words[1] in known, f"{page}: `{code}`"
            assert {w for w in words if w.startswith("--")} <= flags, f"{page}: `{code}`"
        elif words[0].startswith("--"):
            assert words[0] in flags, f"{page}: `{code}`"


def test_readme_names_every_command() -> None:
    commands = {f"foveate {name}" for name in typer.main.get_command(app).commands}
    assert commands == {row[0].strip("`") for row in rows(read("README.md"), "Command")}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_api_page_has_every_public_name_and_argument() -> None:
    text = read("docs/api.md")
    for name in foveate.__all__:
        assert re.search(rf"(^#+ |`)foveate\.{name}\b", text, re.MULTILINE), name
    signatures = re.findall(r"^#+ (foveate[\w.]+)\((.*)\)$", text, re.MULTILINE)
    assert len(signatures) >= 7
    for name, arguments in signatures:
        parameters = [p for p in inspect.signature(resolve(name)).parameters.values() if p.name != "self"]
        listed = [a.strip().lstrip("*") for a in arguments.split(",") if a.strip() not in ("", "*")]
        assert listed == [p.name for p in parameters], name


def test_api_page_has_every_field() -> None:
    from foveate.ask.answer import Answer, Ledger

    for cls in (Answer, Ledger):
        for name in cls.__dataclass_fields__:
            assert name.startswith("_") or f"| `{name}`" in read("docs/api.md"), name


def test_layouts_and_templates_are_listed() -> None:
    text = read("docs/checkpoints.md")
    listed = {(row[0].strip("`"), row[1].strip("`")) for row in rows(text, "Method")}
    assert listed == {(name, layout.name) for name in METHODS for layout in method_class(name).layouts}
    for template in TEMPLATES:
        assert f"`{template}`" in text


def test_recipes_are_listed() -> None:
    listed = [row[0].strip("`") for row in rows(read("docs/training.md"), "Recipe")]
    assert sorted(listed) == shipped("recipe")


def test_what_is_said_about_installing_works_in_a_clone() -> None:
    """No index has the package: extras are those of the folder, and pyproject.toml has them."""
    groups = read("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("[project.")[0]
    extras = set(re.findall(r"^(\w+) = \[", groups, re.MULTILINE))
    said: set[str] = set()
    for path in (*PAGES, *(p.relative_to(ROOT).as_posix() for p in (ROOT / "src").rglob("*.py"))):
        assert not re.search(r"pip install '?foveate\b(?!-)", read(path)), path
        for named in re.findall(r"pip install -e '\.\[([\w,]+)\]'", read(path)):
            said |= set(named.split(","))
    assert {"train", "lab", "annotate", "detector"} <= said <= extras
    assert {row[0].strip("`") for row in rows(read("docs/install.md"), "Extra")} == extras - {"docs", "dev"}


def test_columns_of_inspect_are_explained() -> None:
    explained = [row[0] for row in rows(read("docs/install.md"), "Column")]
    inspect_source = inspect.getsource(importlib.import_module("foveate.cli").inspect)
    columns = re.findall(r'^        "([^"]+)",$', inspect_source, re.MULTILINE)
    assert ["method", *explained] == [column.replace("\\n", " ") for column in columns]


def test_pictures_are_small_and_the_street_has_twelve_megapixels() -> None:
    pictures = {path.stem: path for path in (ROOT / "docs/images").glob("*.png")}
    methods = runpy.run_path(str(ROOT / "docs/images/draw.py"))["SEEDS"]
    assert set(pictures) == {"street", "demo", "explained", *methods}
    for path in pictures.values():
        assert path.stat().st_size < 300_000, path
    with Image.open(pictures["street"]) as street:
        assert street.size == (TWELVE_MEGAPIXELS.width, TWELVE_MEGAPIXELS.height)


@pytest.mark.slow
def test_pictures_are_drawn_by_their_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed pictures are those of docs/images/draw.py; times in them and PIL's font may differ."""
    script = ROOT / "docs/images/draw.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images").glob("*.png")}
    for name in drawn:
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "docs/images" / name) as old:
            assert new.size == old.size, name


def test_digits_of_the_timetable() -> None:
    """The README's caption: 15 pixels high in the original, less than 3 and 2 in the views."""
    from PIL import ImageFont

    left, top, right, bottom = ImageFont.load_default(22).getbbox("14:25")
    plan = shared_pricer(reference_config("anyres")).plan(*TWELVE_MEGAPIXELS)
    _, a, _, b = plan.to_view(3, (0, 0, 1, bottom - top))
    _, c, _, d = plan.to_view(0, (0, 0, 1, bottom - top))
    assert bottom - top == 15
    assert b - a < 3
    assert d - c < 2
    assert right > left
