"""Mixtures: those of the papers agree with the recipes; what is missing or differs on disk is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.data.mixture import DataPart, check_mixture, leaves, load_mixture, rounded
from foveate.shipped import shipped
from foveate.train.recipe import load_recipe
from tests.command import foveate

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
MINE = """
title: Mine
paper: a page
sources:
  here: {home: me/mine, licence: CC BY 4.0}
stages:
  one:
    rows:
      - {name: A, sources: [here], files: [{path: a.json, images: pictures, records: 2}]}
"""


def record(name: Any, picture: str | None = "1.png", **more: Any) -> dict[str, Any]:
    turns = TURNS if picture is not None else [{"from": "human", "value": "What?"}, TURNS[1]]
    return {"id": name, **({} if picture is None else {"image": picture}), "conversations": turns, **more}


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture of one file of two records, and a folder of data with its picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/pictures").mkdir(parents=True)
    (tmp_path / "data/pictures/1.png").write_bytes(b"here")
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path / "mine.yaml"


def fill(records: Any) -> None:
    text = records if isinstance(records, bytes) else json.dumps(records).encode()
    Path("data/a.json").write_bytes(text)


def test_every_paper_has_a_mixture_with_its_recipes_files() -> None:
    """Stage by stage, a recipe has the files of its mixture, with the same folders of pictures."""
    named = {name: load_recipe(name).mixture for name in shipped("recipe")}
    assert {name for name in named.values() if name} == set(shipped("mixture"))
    assert len(shipped("mixture")) == 6
    for name, mixture in named.items():
        if mixture is None:
            continue
        stages = load_mixture(mixture).stages
        for stage, recipe in load_recipe(name).stages.items():
            parts = [part for row in stages[stage].rows for part in row.files if part.kind == "conversations"]
            expected = [(f"data/{part.path}", f"data/{part.images}".rstrip("/")) for part in parts]
            assert [(file.path, file.images) for file in recipe.data] == expected, f"{name}: {stage}"
            regions = [
                part.path for row in stages[stage].rows for part in row.files if part.kind == "regions"
            ]
            given = [file.regions for file in recipe.data if file.regions]
            assert given == [f"data/{path}" for path in regions]


def test_the_papers_counts() -> None:
    """Of published files, counts round to the papers' or a note says why not; folders add up to the file."""
    for name in shipped("mixture"):
        for stage in load_mixture(name).stages.values():
            for row in stage.rows:
                counts = [part.records for part in row.files]
                if row.paper is not None and None not in counts:
                    least, most = rounded(row.paper)
                    assert least <= sum(c or 0 for c in counts) <= most or row.note, f"{name}: {row.name}"
                for part in row.files:
                    assert not part.folders or sum(part.folders.values()) == part.records
    coroi, llava = load_mixture("coroi"), load_mixture("llava")
    out = coroi.stages["finetune"].rows[0].files[0].folders["textvqa/train_images"]
    within = llava.stages["finetune"].rows[0].files[0].folders["textvqa/train_images"]
    assert (out, within) == (0, 21953)
    star = load_mixture("inf_llava").stages
    papers = [row.paper for stage in ("pretrain-star", "finetune-star") for row in star[stage].rows]
    assert papers == ["558K", "708K", "665K", "692K", "25K"]
    assert (star["pretrain-star"].paper, star["finetune-star"].paper) == ("1.26M", "1.3M")


def test_a_whole_mixture_passes(mixture: Path) -> None:
    fill([record("1"), record("2", None)])
    result = foveate("data", "check", mixture)
    assert result.code == 0 and "2 records  a.json" in result.stdout and not result.stderr


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([record("1")], "1 record, and 2 in the published file"),
        (
            [record("1"), record("2", "2.png")],
            "pictures (1): data/pictures/2.png (data/a.json sample 1)",
        ),
        ([record("1"), record("2", "../../x.png")], "refused (1): '../../x.png' (data/a.json sample 1)"),
        ([record("1"), record("2", "/etc/passwd")], "refused (1): '/etc/passwd'"),
        ([record("1"), record("2", "C:\\x.png")], "refused (1)"),
        ([record("1"), record("2", "file:///etc/passwd")], "refused (1)"),
        ([record("1"), record("2", conversations=[])], "cannot be learnt (1): data/a.json sample 1: "),
        (
            [record("1"), record("2", conversations=[TURNS[0], {"from": "gpt", "value": 7}])],
            "cannot be learnt (1): data/a.json sample 1: a turn's content must be a text",
        ),
        (b'[{"id": "\xff"}]', "data/a.json sample 0 is not UTF-8 at byte 8"),
        (b'[{"id": 1}, {"id" 2}]', "data/a.json line 1 is not valid JSON: Expecting ':' delimiter"),
        (None, "missing  a.json"),
    ],
)
def test_what_is_wrong_is_listed(mixture: Path, records: Any, said: str) -> None:
    if records is not None:
        fill(records)
    result = foveate("data", "check", mixture)
    assert result.code == 2 and said in result.stdout, result.stdout
    assert "the data of Mine in data: " in result.stderr
    if records is None:
        assert "from me/mine; licence: CC BY 4.0" in result.stdout


def test_pictures_in_parts_are_looked_for(mixture: Path) -> None:
    part = {"type": "image", "image": "3.png"}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    fill([record("1"), {"id": "2", "messages": turns}])
    assert "missing pictures (1): data/pictures/3.png" in foveate("data", "check", mixture).stdout
    assert foveate("data", "check", mixture, "--no-pictures").code == 0


def test_ids_given_twice_are_a_note(mixture: Path) -> None:
    """LLaVA's own files give several conversations about one picture the picture's id."""
    fill([record("1"), record("1")])
    result = foveate("data", "check", mixture)
    assert result.code == 0 and "note: records with an id that came before: 1, such as '1'" in result.stdout


def test_a_count_of_the_paper_alone_is_compared(mixture: Path) -> None:
    text = MINE.replace(", records: 2", "").replace("name: A", "name: A, paper: 2K")
    mixture.write_text(text)
    fill([record(str(i)) for i in range(3)])
    assert "3 records, and 2K in the paper" in foveate("data", "check", mixture).stdout


def test_folders_are_counted(mixture: Path) -> None:
    mixture.write_text(MINE.replace("records: 2", "folders: {coco: 1, none: 1}"))
    fill([record("1", None), record("2", None)])
    said = foveate("data", "check", mixture).stdout
    assert "0 records with pictures in coco, and 1 in the published file" in said
    assert "2 records without a picture, and 1 in the published file" in said


def test_json_has_every_problem(mixture: Path) -> None:
    fill([record("1")])
    (row,) = json.loads(foveate("data", "check", mixture, "--json").stdout)
    assert row["files"]["a.json"] == {"there": True, "records": 1, "published": 2, "missing_pictures": 0}
    assert row["problems"] == ["a.json: 1 record, and 2 in the published file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("path: a.json", "path: ../a.json"), "'../a.json' leads out of its folder"),
        (("images: pictures", "images: /x"), "'/x' is an absolute path"),
        (("a.json", "a.csv"), "path must end in .json or .jsonl"),
        (("records: 2", "records: -1"), "records must not be negative"),
        (("records: 2", "recrods: 2"), "unknown key 'recrods'; did you mean 'records'"),
        (("[here]", "[there]"), "A names the source 'there', which 'sources' lacks"),
        (("name: A", "name: A, paper: many"), "'many' is no count"),
        (("title: Mine", ""), "'title' is missing"),
    ],
)
def test_a_wrong_mixture_is_named(mixture: Path, change: tuple[str, str], message: str) -> None:
    mixture.write_text(MINE.replace(*change))
    with pytest.raises(FoveateError, match=message):
        load_mixture(mixture)


def test_stages_and_folders_that_do_not_exist_are_named(mixture: Path) -> None:
    with pytest.raises(FoveateError, match="no stage 'two': choose from one"):
        check_mixture(load_mixture(mixture), Path("data"), ["two"])
    with pytest.raises(FoveateError, match="there is no folder nowhere"):
        check_mixture(load_mixture(mixture), Path("nowhere"))
    with pytest.raises(FoveateError, match="no mixture at slim"):
        load_mixture("slim")


@pytest.mark.parametrize(
    ("text", "range_"), [("558K", (557_500, 558_500)), ("1.26M", (1_255_000, 1_265_000))]
)
def test_rounded_counts(text: str, range_: tuple[int, int]) -> None:
    assert rounded(text) == pytest.approx(range_)


def test_paths_inside_are_let_through() -> None:
    assert leaves("a/b/..c.png") is None and leaves("a/./b.png") is None
    assert DataPart("a.json", images="").images == ""
