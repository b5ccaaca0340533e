"""SMR: each source's published format, the filters, the bad input, nothing half-written."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import FoveateError
from foveate.data.formats import read_conversations
from foveate.data.smr import charts, maths, science, statistics
from foveate.data.smr.build import CONVERTERS, Request, build
from foveate.data.smr.drafts import LETTER, SHORT, Draft, chosen, contradicts, with_options
from foveate.data.smr.filters import (
    BROKEN,
    EMPTY,
    JUMBLED,
    LEAK,
    MISSING,
    Evaluation,
    look_at,
    text_problem,
)
from tests.command import foveate
from tests.data.smr_sources import (
    AI2D,
    ARXIV,
    CHARTQA,
    DVQA,
    GEOQA,
    MATHVISION,
    SCIENCE,
    TABMWP,
    TQA,
    draw,
    write,
    write_lines,
    write_sources,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "SMR")


def drafts(convert: Any, folder: Path, **more: Any) -> list[Draft]:
    return list(convert(folder, random.Random(0), **more))


def only(root: Path, name: str, **more: Any) -> Request:
    return Request(folder=root, sources=(name,), out=root / "smr.json", **more)


def test_arxivqa_answers_with_its_rationale(root: Path) -> None:
    (draft,) = drafts(science.arxivqa, root / "arxivqa")
    assert draft.query == (
        "How does the loss behave with the number of samples?\nA. Linear\nB. Exponential\nC. Constant\n"
        "D. None of the above"
    )
    assert draft.answer == ARXIV["rationale"]
    assert (draft.name, draft.picture, draft.problem) == ("cs-8542", ARXIV["image"], None)


def test_scienceqa_asks_with_question_and_lecture(root: Path) -> None:
    """Only the training split, and only records with a picture."""
    (draft,) = drafts(science.scienceqa, root / "scienceqa")
    assert draft.query == (
        "Instructions: Maps have four cardinal directions. North is up.\n"
        "Which of these states is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma"
    )
    assert draft.answer == f"{SCIENCE['solution']}\nAnswer: A"
    assert draft.picture == "train/1/image.png"


def test_scienceqa_without_a_solution_answers_with_the_letter(root: Path) -> None:
    write(root / "scienceqa/problems.json", {"1": {**SCIENCE, "solution": "", "hint": "Look up."}})
    (draft,) = drafts(science.scienceqa, root / "scienceqa")
    assert draft.query.startswith("Context: Look up.\nInstructions: ") and draft.query.endswith(LETTER)
    assert draft.answer == "A"


def test_scienceqa_in_parquet_holds_its_pictures(root: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    picture = draw(tmp_path / "p.png", 7)
    row = {key: value for key, value in SCIENCE.items() if key not in ("image", "split")}
    rows = [{**row, "image": {"bytes": picture.read_bytes(), "path": "image.png"}}, {**row, "image": None}]
    (root / "scienceqa/problems.json").unlink()
    (root / "scienceqa/data").mkdir()
    Dataset.from_list(rows).to_parquet(root / "scienceqa/data/train-00000-of-00001.parquet")
    build(only(root, "scienceqa"))
    (record,) = json.loads((root / "smr.json").read_text())
    assert record["id"] == "scienceqa-row0" and record["image"].startswith("pictures/")
    assert (root / record["image"]).read_bytes() == picture.read_bytes()


def test_mathvision_leaves_testmini_out(root: Path) -> None:
    free, lettered = drafts(maths.mathvision, root / "mathvision")
    assert free.query == f"How many triangles are there?\n\n{SHORT}" and free.answer == "7"
    assert lettered.query == "Which picture is next? "
    assert lettered.answer == "It turns by 90 degrees each time.\nAnswer: C"
    (root / "mathvision/testmini.jsonl").unlink()
    with pytest.raises(FoveateError, match=r"mathvision has no testmini\.jsonl or"):
        drafts(maths.mathvision, root / "mathvision")


def test_mathvision_has_one_picture_of_all_parts(root: Path) -> None:
    asked = {"question": "<image1>\nWhich is next?\n<image2>", "options": ["A", "B"], "answer": "B"}
    write_lines(root / "mathvision/test.jsonl", [{**MATHVISION[0], **asked}])
    (draft,) = drafts(maths.mathvision, root / "mathvision")
    assert (draft.query, draft.picture) == (f"\nWhich is next?\n\n{LETTER}", "images/1.jpg")
    assert (draft.answer, draft.problem) == ("B", None)


def test_ai2d_needs_pictures_with_letters_and_skips_the_test_set(root: Path) -> None:
    plain, lettered = drafts(science.ai2d, root / "ai2d")
    assert plain.query == f"What eats the grass?\nA. hawk\nB. rabbit\nC. sun\nD. fox\n{LETTER}"
    assert (plain.answer, plain.picture, plain.problem) == ("B", "images/17.png", None)
    assert lettered.problem == science.NO_LETTERS
    draw(root / "ai2d/abc_images/17.png", 21)
    _, lettered = drafts(science.ai2d, root / "ai2d")
    assert (lettered.picture, lettered.answer, lettered.problem) == ("abc_images/17.png", "D", None)


def test_textbookqa_has_questions_and_descriptions(root: Path) -> None:
    question, description = drafts(science.textbookqa, root / "textbookqa")
    assert question.query == f"Which layer is innermost?\nA. crust\nB. core\n{LETTER}"
    assert (question.answer, question.picture) == ("B", "train/question_images/layers_2.png")
    assert description.query in science.INSTRUCTIONS
    assert description.answer.startswith("This diagram shows the layers")
    assert description.picture == "train/teaching_images/layers_1.png"


def test_instructions_are_those_of_table_5() -> None:
    assert len(science.INSTRUCTIONS) == len(set(science.INSTRUCTIONS)) == 16
    assert science.INSTRUCTIONS[0] == "Describe the following image in detail"
    assert science.INSTRUCTIONS[15] == "Write an exhaustive depiction of the given image"


def test_geoqa3_keeps_the_solution(root: Path) -> None:
    (draft,) = drafts(maths.geoqa3, root / "GeoQA3")
    assert draft.query == f"{GEOQA['subject']}\nA. 100°\nB. 65°\nC. 75°\nD. 105°"
    assert draft.answer == f"{GEOQA['answer']}\nAnswer: B" and draft.picture == "image/12.png"


@pytest.mark.parametrize("below", ["train", ""])
def test_geometry3k_is_a_folder_for_each_problem(root: Path, below: str) -> None:
    if not below:
        (root / "Geometry3K/train/0").rename(root / "Geometry3K/0")
        (root / "Geometry3K/train").rmdir()
    (draft,) = drafts(maths.geometry3k, root / "Geometry3K")
    assert draft.query == f"Find $x$.\nA. 3\nB. 4\nC. 5\nD. 6\n{LETTER}" and draft.answer == "C"
    assert draft.picture == f"{below}/0/img_diagram.png".lstrip("/")


def test_tabmwp_keeps_the_solution(root: Path) -> None:
    free, choice = drafts(maths.tabmwp, root / "tabmwp")
    assert free.query == "How much money does Pam need to buy a pen and a ruler? (unit: $)"
    assert free.answer == "Add the prices: $0.55 + $0.80 = $1.35\nAnswer: 1.35"
    assert choice.query == "Which is sold more?\nA. pens\nB. rulers"
    assert choice.answer == "5 is more than 3.\nAnswer: B" and choice.picture == "tables/20.png"


def test_dvqa_draws_from_the_reasoning_split(root: Path) -> None:
    every = drafts(charts.dvqa, root / "DVQA")
    assert [(draft.name, draft.answer) for draft in every] == [("100", "9"), ("102", "yes"), ("104", "east")]
    assert every[0].query == f"What is the value of the largest bar?\n{SHORT}"
    assert every[0].picture == "images/bar_train_00000000.png"
    drawn = [draft.name for draft in drafts(charts.dvqa, root / "DVQA", drawn=2)]
    assert len(drawn) == 2 and drawn == sorted(drawn)
    seeds = {tuple(d.name for d in charts.dvqa(root / "DVQA", random.Random(s), 1)) for s in range(30)}
    assert seeds == {("100",), ("102",), ("104",)}


def test_chartqa_has_what_people_asked(root: Path) -> None:
    first, second = drafts(charts.chartqa, root / "ChartQA")
    assert first.query == f"How many food item is shown in the bar graph?\n{SHORT}"
    assert (first.answer, first.picture) == ("14", "train/png/41699051005347.png")
    assert second.answer == "57.04"  # a number in the file


def test_all_ten_are_built_and_can_be_trained_on(root: Path) -> None:
    result = foveate("data", "smr", root, "--workers", 1)
    assert result.code == 0, result.stderr
    assert "ai2d: 1 of 2 samples" in result.stdout and f"left out 1: {science.NO_LETTERS}" in result.stdout
    data = read_conversations(root / "smr.json")
    assert len(data) == 16 and "smr.json: 16 samples" in result.stdout
    for index in range(len(data)):
        (picture,) = [p["image"] for m in data.messages(index) for p in m["content"] if p["type"] == "image"]
        assert Path(picture).is_file()
    report = json.loads((root / "smr.report.json").read_text())
    assert set(report["sources"]) == set(CONVERTERS)
    assert report["sources"]["ChartQA"]["kept"] == 2
    assert sorted(p.name for p in root.iterdir() if p.is_file()) == ["smr.json", "smr.report.json"]


def test_the_same_seed_builds_the_same_file(root: Path) -> None:
    every = tuple(CONVERTERS)
    build(Request(root, every, root / "one.json", workers=2))
    build(Request(root, every, root / "two.json", workers=1))
    assert (root / "one.json").read_bytes() == (root / "two.json").read_bytes()


def left_out(root: Path, name: str, **more: Any) -> dict[str, int]:
    reports = build(only(root, name, **more))
    return dict(reports[name].left_out)


def test_broken_missing_and_blank_pictures_are_left_out(root: Path) -> None:
    pictures = root / "DVQA/images"
    (pictures / DVQA[0]["image"]).unlink()
    whole = (pictures / DVQA[2]["image"]).read_bytes()
    (pictures / DVQA[2]["image"]).write_bytes(whole[: len(whole) // 2])
    assert left_out(root, "DVQA") == {MISSING: 1, BROKEN: 1}
    Image.new("RGB", (50, 50), "white").save(pictures / DVQA[4]["image"])
    with pytest.raises(FoveateError, match=r"no sample of DVQA is left: .*its picture shows nothing"):
        build(only(root, "DVQA"))
    assert len(json.loads((root / "smr.json").read_text())) == 1  # what was there before


def test_empty_and_jumbled_texts_are_left_out(root: Path) -> None:
    good = {**ARXIV, "id": "good"}
    write_lines(
        root / "arxivqa/arxivqa.jsonl",
        [
            good,
            {**ARXIV, "id": "a", "rationale": " "},
            {**ARXIV, "id": "b", "rationale": "\ufffd\ufffd loss"},
        ],
    )
    assert left_out(root, "arxivqa") == {EMPTY: 1, JUMBLED: 1}
    assert text_problem("What?", "a \ud800 b" * 20) == JUMBLED
    assert text_problem("Line\nline\ttab", "∠ABC = 50°, 如图") is None


def test_answers_and_reasoning_that_do_not_fit_are_left_out(root: Path) -> None:
    wrong = "So the answer is C."
    write_lines(
        root / "arxivqa/arxivqa.jsonl",
        [ARXIV, {**ARXIV, "id": "a", "label": "F"}, {**ARXIV, "id": "b", "rationale": wrong}],
    )
    assert left_out(root, "arxivqa") == {"its answer is none of its options": 1, science.OTHER_ANSWER: 1}


@pytest.mark.parametrize("change", ["same", "jpeg", "smaller"])
def test_pictures_of_evaluation_sets_are_left_out(root: Path, tmp_path: Path, change: str) -> None:
    image = Image.open(root / "DVQA/images" / DVQA[2]["image"])
    held = tmp_path / "benchmark/deep"
    held.mkdir(parents=True)
    if change == "smaller":
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)
    image.save(held / ("x.jpg" if change == "jpeg" else "x.png"), quality=90)
    assert left_out(root, "DVQA", against=(tmp_path / "benchmark",)) == {LEAK: 1}


def test_evaluation_sets_in_parquet_hold_their_pictures(root: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    held = [(root / "DVQA/images" / DVQA[i]["image"]).read_bytes() for i in (2, 4)]
    rows = [{"question": "?", "images": [{"bytes": picture, "path": None}]} for picture in held]
    Dataset.from_list(rows).to_parquet(tmp_path / "test-0.parquet")
    assert left_out(root, "DVQA", against=(tmp_path / "test-0.parquet",)) == {LEAK: 2}


def test_mathvision_in_parquet_holds_its_pictures(root: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    picture = {"bytes": draw(tmp_path / "p.png", 7).read_bytes(), "path": "1.jpg"}
    for split, records in (("test", MATHVISION), ("testmini", MATHVISION[2:])):
        (root / f"mathvision/{split}.jsonl").unlink()
        rows = [{**record, "decoded_image": picture} for record in records]
        Dataset.from_list(rows).to_parquet(root / f"mathvision/data/{split}-0.parquet")
    build(only(root, "mathvision"))
    assert [r["id"] for r in json.loads((root / "smr.json").read_text())] == ["mathvision-1", "mathvision-2"]


def test_other_pictures_are_no_leaks(root: Path, tmp_path: Path) -> None:
    for seed in range(500, 520):
        draw(tmp_path / f"benchmark/{seed}.png", seed)
    assert left_out(root, "DVQA", against=(tmp_path / "benchmark",)) == {}


def test_an_evaluation_set_that_cannot_be_compared_with_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"there is no folder .*nowhere"):
        build(only(root, "DVQA", against=(tmp_path / "nowhere",)))
    (tmp_path / "benchmark").mkdir()
    with pytest.raises(FoveateError, match="benchmark holds no pictures"):
        build(only(root, "DVQA", against=(tmp_path / "benchmark",)))
    (tmp_path / "benchmark/x.png").write_bytes(b"broken")
    with pytest.raises(FoveateError, match=r"x\.png of an evaluation set cannot be compared with"):
        build(only(root, "DVQA", against=(tmp_path / "benchmark",)))


BAD = {
    "arxivqa leaves": (
        "arxivqa",
        [{**ARXIV, "image": "../../secret.png"}],
        r"arxivqa\.jsonl line 1: the picture's path '\.\./\.\./secret\.png' leads out of its folder",
    ),
    "arxivqa absolute": ("arxivqa", [{**ARXIV, "image": "/etc/passwd"}], "line 1: .* is an absolute path"),
    "arxivqa address": ("arxivqa", [{**ARXIV, "image": "file:///x"}], "line 1: .* is an address"),
    "arxivqa twice": (
        "arxivqa",
        [ARXIV, {**ARXIV, "rationale": "another"}],
        "line 2: the id 'cs-8542' came before with another content",
    ),
    "arxivqa lacks": ("arxivqa", [{"id": "x"}], "line 1: 'options' must be a list of texts, not missing"),
    "arxivqa list": ("arxivqa", ["x"], "line 1 must be a JSON object, not str"),
    "arxivqa label": ("arxivqa", [{**ARXIV, "label": True}], "line 1: 'label' must be a text or a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named_and_nothing_is_written(root: Path, case: str) -> None:
    name, records, message = BAD[case]
    write_lines(root / "arxivqa/arxivqa.jsonl", records)
    with pytest.raises(FoveateError, match=message) as error:
        build(only(root, name))
    assert "\n" not in str(error.value)
    assert not [path for path in root.iterdir() if path.is_file() or path.name.startswith("pictures")]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("arxivqa", "arxivqa.jsonl", b'{"id": "\xff"}', r"arxivqa\.jsonl line 1 is not UTF-8 at byte 8"),
        ("scienceqa", "problems.json", b'{"1": {"a": "\xff"}}', r"problems\.json record '1' is not UTF-8"),
        ("DVQA", "train_qa.json", b'[{"a": 1}, {"a": "\xff"}]', "sample 0: 'template_id' must be"),
        ("ChartQA", "train/train_human.json", b'[{"q": "\xff"}]', "sample 0 is not UTF-8"),
        ("GeoQA3", "json/12.json", b'{"id": "\xff"}', r"12\.json is not UTF-8 at byte 8"),
        ("Geometry3K", "train/0/data.json", b'{"id": ', r"data\.json line 1 is not valid JSON"),
        ("ai2d", "questions/17.png.json", b"[1]", r"17\.png\.json must be a JSON object"),
        ("ai2d", "ai2d_test_ids.csv", b"\xff\n", r"ai2d_test_ids\.csv is not UTF-8"),
        ("textbookqa", "train/tqa_v1_train.json", b"{}", "should hold a JSON list of records"),
        ("tabmwp", "problems_train.json", b'{"1": 3}', "record '1' must be a JSON object, not int"),
        ("mathvision", "test.jsonl", b"[1]", "line 1 begins a JSON list"),
    ],
)
def test_broken_files_are_named(root: Path, name: str, file: str, content: bytes, message: str) -> None:
    (root / name / file).write_bytes(content)
    with pytest.raises(FoveateError, match=message) as error:
        build(only(root, name))
    assert "\n" not in str(error.value) and not (root / "smr.json").exists()


def test_a_source_that_fails_late_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """Not the samples of those before it, nor the pictures that were taken out of Parquet."""
    from datasets import Dataset

    picture = {"bytes": draw(tmp_path / "p.png", 7).read_bytes(), "path": "image.png"}
    row = {key: value for key, value in SCIENCE.items() if key != "split"}
    (root / "scienceqa/problems.json").unlink()
    Dataset.from_list([{**row, "image": picture}]).to_parquet(root / "scienceqa/train-0.parquet")
    (root / "ChartQA/train/train_human.json").write_bytes(b'[{"imgname": "x.png"}]')
    before = {path.name for path in root.iterdir()}
    with pytest.raises(FoveateError, match="sample 0: 'query' must be a text or a number, not missing"):
        build(Request(root, ("scienceqa", "ChartQA"), root / "smr.json"))
    assert {path.name for path in root.iterdir()} == before


def test_a_record_that_came_before_word_for_word_is_left_out(root: Path) -> None:
    write_lines(root / "arxivqa/arxivqa.jsonl", [ARXIV, ARXIV])
    assert left_out(root, "arxivqa") == {"it came before, word for word": 1}


def test_marks_of_pictures_in_texts_are_taken_out(root: Path) -> None:
    write_lines(root / "arxivqa/arxivqa.jsonl", [{**ARXIV, "rationale": "As <image> shows, it grows."}])
    build(only(root, "arxivqa"))
    assert len(read_conversations(root / "smr.json")) == 1


def test_numbers_are_read_as_answers(root: Path) -> None:
    write_lines(root / "mathvision/test.jsonl", [{**MATHVISION[0], "answer": 7}])
    write(root / "tabmwp/problems_train.json", {"19": {**TABMWP["19"], "answer": 1.35}})
    assert drafts(maths.mathvision, root / "mathvision")[0].answer == "7"
    assert drafts(maths.tabmwp, root / "tabmwp")[0].answer.endswith("Answer: 1.35")
    write(root / "ChartQA/train/train_human.json", [{**CHARTQA[0], "label": True}])
    with pytest.raises(FoveateError, match="sample 0: 'label' must be a list of texts, not bool"):
        drafts(charts.chartqa, root / "ChartQA")


def test_textbook_answers_outside_the_choices_are_left_out(root: Path) -> None:
    lesson = json.loads(json.dumps(TQA))
    lesson["questions"]["diagramQuestions"]["DQ_000001"]["correctAnswer"]["processedText"] = "e"
    write(root / "textbookqa/train/tqa_v1_train.json", [lesson])
    write(root / "ai2d/questions/17.png.json", {**AI2D, "questions": {}})
    assert drafts(science.textbookqa, root / "textbookqa")[0].problem == "its answer is none of its options"
    assert drafts(science.ai2d, root / "ai2d") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "arxiv"], "there is no source 'arxiv': choose from arxivqa, scienceqa"),
        (["--out", "x.jsonl"], "x.jsonl must end in .json"),
        (["--figure", "x.gif"], "x.gif must end in .png, .svg, .pdf"),
        (["--compare", "LLaVA=x.json"], "--compare needs --figure"),
        (["--figure", "x.png", "--compare", "x.json"], "expected NAME=FILE"),
        (["--figure", "x.png", "--compare", "LLaVA=none.json"], "no data file at none.json"),
    ],
)
def test_wrong_arguments_are_named(root: Path, arguments: list[str], message: str) -> None:
    result = foveate("data", "smr", root, *arguments)
    assert result.code == 2 and message in result.stderr.replace("\n", " ")


def test_a_missing_source_is_named(root: Path) -> None:
    (root / "ai2d").rename(root / "gone")
    result = foveate("data", "smr", root)
    assert (
        result.code == 2 and "ai2d: unpack the data set there, or choose others with --only" in result.stderr
    )


def test_lengths_count_words_and_draw(root: Path, tmp_path: Path) -> None:
    assert statistics.words("How many <image> 如图 bars?") == 5
    turns = [{"from": role, "value": text} for role, text in (("human", "one two"), ("gpt", "three"))]
    other = write(tmp_path / "llava.json", [{"conversations": turns * 2}, {"conversations": turns}])
    lengths = statistics.lengths_of(other)
    assert (lengths.queries, lengths.answers) == ([4, 2], [2, 1])
    figure = tmp_path / "lengths.png"
    result = foveate("data", "smr", root, "--figure", figure, "--compare", f"LLaVA={other}", "--workers", 1)
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("arxivqa: 1 of 1 sample\n")
    assert Image.open(figure).size == (1500, 660)
    kept = json.loads((root / "smr.report.json").read_text())["sources"]["Geometry3K"]["lengths"]
    assert kept["samples"] == 1 and kept["answer_words_mean"] == 1.0


@pytest.mark.parametrize(
    ("label", "options", "number"),
    [
        ("B", ["x", "y"], 1),
        ("b)", ["x", "y"], 1),
        ("(B) y", ["x", "y"], 1),
        ("C.", ["x", "y"], None),
        ("rulers", ["pens", "rulers"], 1),
        ("Apples", ["Bananas", "Apples"], 1),
        ("", ["x"], None),
        ("yes", ["no", "maybe"], None),
    ],
)
def test_labels_name_options(label: str, options: list[str], number: int | None) -> None:
    assert chosen(label, options) == number


def test_options_get_one_letter_each() -> None:
    assert with_options("Q?", ["A) x", "(B) y", "C: z", "A. b. c"]) == "Q?\nA. x\nB. y\nC. z\nD. b. c"
    assert with_options("Q?", ["A", "B"]) == "Q?\nA. A\nB. B"


def test_reasoning_that_contradicts_is_noticed() -> None:
    assert contradicts("First A seems right, but the answer is (C).", "B")
    assert not contradicts("The answer is B. Answer: B", "B")
    assert not contradicts("A tree is shown.", "B")


def test_looks_are_compared_with_few(tmp_path: Path) -> None:
    look = look_at(draw(tmp_path / "a.png", 1))
    assert not isinstance(look, str)
    assert not Evaluation([]).has(look) and Evaluation([look]).has(look)
    buffer = io.BytesIO()
    Image.open(tmp_path / "a.png").rotate(180).save(buffer, "PNG")
    turned = look_at(buffer.getvalue())
    assert not isinstance(turned, str) and not Evaluation([look]).has(turned)
