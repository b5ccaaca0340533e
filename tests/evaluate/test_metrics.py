"""Metrics against lmms-eval's on the same answers; where it is not installed, against what it gave."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.evaluate.metrics import (
    METRICS,
    Prediction,
    chosen,
    distance,
    hit,
    iou,
    letter_of,
    mme_pairs,
    vqa_words,
    yes_or_no,
    yes_rates,
)
from foveate.evaluate.samples import Sample
from foveate.picture.geometry import Box

RECORDED = Path(__file__).with_name("recorded.json")
TEXTS = [
    *("yes", "Yes.", "No", "y", "n", "N.", "yeah", "not sure", "unknown", "", "yes, it is", "  no  "),
    *("7", "seven", "7.0", "7%", "0.07", "1,000", "1000", "$12.50", "12.5", "1e3", "-3", "0", "nan", "inf"),
    *("Red", "a red car", "the red car", "red-car", "red, car", "red/car?", "cant", "can't", "cannot"),
    *("dont", "it's", "its", "Let's go", "don't know", "shouldn'tve", "two dogs", "none", "an apple"),
    *("B", "B.", "(B)", "B. dog", "The answer is B", "A or B", "dog", "the dog is here", "a cat and a dog"),
    *("Straße", "STRASSE", "naïve", "naive", "café", "e\u0301", "\u212b", "İ", "日本", "日本語", "ﬁne"),
    *("one\ntwo", "one two", "one\ttwo", "...", "?", "!!", "3.14", "3.15", "10.5.2024", "A.B.", "U.S.A"),
]
OPTIONS = {"A": "cat", "B": "dog", "C": "a red car", "D": "7"}


def sample(*answers: str, **more: Any) -> Sample:
    return Sample("line 1", "0", 0, "What?", answers, **more)


def pairs() -> list[tuple[str, str]]:
    """Every text as a prediction of a fixed choice of others, itself among them."""
    return [(said, TEXTS[(n + step) % len(TEXTS)]) for n, said in enumerate(TEXTS) for step in (0, 1, 7, 23)]


def ours() -> dict[str, list[Any]]:
    """Scores of every pair by every metric, as plain values."""
    found: dict[str, list[Any]] = {name: [] for name in ("exact", "anls", "relaxed", "vqa")}
    for said, known in pairs():
        for name in ("exact", "anls", "relaxed"):
            found[name].append(METRICS[name].score(sample(known), Prediction(said)))
        ten = [known] * 2 + [said] * 3 + TEXTS[:5]
        found["vqa"].append(METRICS["vqa"].score(sample(*ten), Prediction(said)))
    found["words"] = [vqa_words(text) for text in TEXTS]
    found["yes"] = [yes_or_no(text) for text in TEXTS]
    found["letters"] = [letter_of(text, OPTIONS) for text in TEXTS]
    return found


def theirs() -> dict[str, list[Any]]:
    """The same by lmms-eval."""
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.hrbench.hrbench_evals import HRBenchEval
    from lmms_eval.tasks.mme.utils import parse_pred_ans
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    found: dict[str, list[Any]] = {name: [] for name in ("exact", "anls", "relaxed", "vqa")}
    for said, known in pairs():
        flags = {"ignore_case": True, "ignore_punctuation": True}
        stripped = {"predictions": [said.strip()], "references": [known.strip()]}
        found["exact"].append(float(exact_match_hf_evaluate(**stripped, **flags)["exact_match"]))
        found["anls"].append(float(anls([known], [said])["anls"]))
        found["relaxed"].append(float(relaxed_correctness(said, known)))
        doc = {"question_id": 0, "answers": [known] * 2 + [said] * 3 + TEXTS[:5]}
        found["vqa"].append(textvqa_process_results(doc, [said])["exact_match"])
    found["words"] = [EvalAIAnswerProcessor()(text) for text in TEXTS]
    found["yes"] = [parse_pred_ans(text) for text in TEXTS]
    found["letters"] = [HRBenchEval("").can_infer(text, dict(OPTIONS)) or None for text in TEXTS]
    return found


def test_scores_are_lmms_eval_s() -> None:
    """Ties, unicode, numbers, blanks and contractions included."""
    try:
        expected = theirs()
    except ImportError:
        expected = json.loads(RECORDED.read_text(encoding="utf-8"))
    found = ours()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(found[name]) == len(values) >= len(TEXTS)
        for n, (one, other) in enumerate(zip(found[name], values, strict=True)):
            what = pairs()[n] if len(values) == len(pairs()) else TEXTS[n]
            assert one == pytest.approx(other) if isinstance(other, float) else one == other, (name, what)


def test_levenshtein() -> None:
    for one, other in itertools.product(("", "a", "ab", "kitten", "sitting"), repeat=2):
        assert distance(one, other) == distance(other, one)
    assert (distance("kitten", "sitting"), distance("", "ab"), distance("ab", "ab")) == (3, 2, 0)


def test_yes_and_no() -> None:
    samples = [sample(answer) for answer in ("yes", "yes", "no", "no", "Yes.")]
    said = [Prediction(text) for text in ("Yes", "no", "yes", "No.", "maybe")]
    assert [METRICS["yes"].score(s, p) for s, p in zip(samples, said, strict=True)] == [1, 0, 0, 1, 0]
    rates = yes_rates(samples, said)
    assert rates == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 0.4, "yes_rate": 0.4})
    assert yes_rates(samples[2:4], [Prediction("no")] * 2)["f1"] == 0


def test_pairs_of_mme() -> None:
    def one(answer: str, group: str, category: str) -> Sample:
        return sample(answer, group=group, category=category)

    samples = [one(a, g, c) for g, c in (("1", "ocr"), ("2", "ocr"), ("1", "color")) for a in ("yes", "no")]
    said = [Prediction(text) for text in ("yes", "no", "yes", "yes", "no", "yes")]
    found = mme_pairs(samples, said)
    assert found == pytest.approx({"acc_plus": 1 / 3, "mme_score": ((100 + 100) + 50) / 2 + 0})
    with pytest.raises(FoveateError, match="group '2' has 1 questions, not a pair"):
        mme_pairs(samples[:3], said[:3])
    with pytest.raises(FoveateError, match="group '2' has 1 questions, not a pair"):
        chosen(["mme"], samples[:3])  # before any question is asked


def test_regions() -> None:
    boxed = sample(box=Box(10, 10, 30, 30))
    assert iou(boxed, Prediction("", [Box(0, 0, 5, 5), Box(20, 10, 40, 30)])) == pytest.approx(1 / 3)
    assert iou(boxed, Prediction("")) == 0 and hit(boxed, Prediction("")) == 0
    assert hit(boxed, Prediction("", [Box(0, 0, 20, 20), Box(90, 90, 91, 91)])) == 1
    assert hit(boxed, Prediction("", [Box(0, 0, 19, 40)])) == 0


def test_options_by_their_text() -> None:
    known = sample("dog", options=OPTIONS)
    assert METRICS["option"].score(known, Prediction("B")) == 1
    assert METRICS["option"].score(known, Prediction("It is a dog.")) == 1
    assert METRICS["option"].score(known, Prediction("cat or dog")) == 0


def test_the_metric_that_fits() -> None:
    def names(*samples: Sample) -> list[str]:
        return [metric.name for metric in chosen([], samples)]

    assert names(sample("B", options=OPTIONS)) == ["option"]
    assert names(sample("yes"), sample("No.")) == ["yes"]
    assert names(sample(*["red"] * 10)) == ["vqa"]
    assert names(sample("red"), sample("yes")) == ["exact", "anls"]
    assert names(sample("red", box=Box(0, 0, 1, 1))) == ["exact", "anls", "iou", "hit"]


@pytest.mark.parametrize(
    ("metric", "given", "problem"),
    [
        ("vqa", sample("red"), "line 1 has 1 answers: VQA accuracy counts people, at least 4; use exact"),
        ("option", sample("red"), "has no options"),
        ("option", sample("E", options=OPTIONS), "'E', which is none of its options"),
        ("yes", sample("red"), "other than yes and no"),
        ("mme", sample("yes"), "has no group"),
        ("iou", sample("red"), "has no box"),
        ("exact", sample(), "has no answer"),
        ("bleu", sample("red"), "unknown metric 'bleu': choose from exact, vqa"),
    ],
)
def test_what_a_metric_lacks_is_named(metric: str, given: Sample, problem: str) -> None:
    with pytest.raises(FoveateError, match=problem):
        chosen([metric], [given])
