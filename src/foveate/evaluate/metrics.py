"""The field's metrics: a score from 0 to 1 for each answer, and what is computed of all of them.

Each equals the code that published it, which its docstring names, also where that code is strange: numbers
are comparable only then. `tests/evaluate/test_metrics.py` compares them with lmms-eval on the same answers.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from foveate.errors import FoveateError
from foveate.evaluate.samples import Sample
from foveate.picture.geometry import Box

NUMBERS = "zero one two three four five six seven eight nine ten"
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # in the order in which they are looked for
# Contractions of the VQA evaluation: written without one of their apostrophes, they get it back.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't should've she'd've shouldn't shouldn't've someone'd someone'd've
someone'll someone's somebody'd've somebody'll somebody's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've
"""
# Forms of that table that do not follow the rule.
IRREGULAR = {
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA = re.compile(r"(?<=\d)(\,)+(?=\d)")
PERIODS = int(re.UNICODE)  # the published code gives this flag as the number of replacements
PUNCTUATION = str.maketrans("", "", string.punctuation)
LETTERS = string.ascii_uppercase
LEAST_ANSWERS = 4  # with fewer, no answer could have three others that agree with it


@dataclass(frozen=True)
class Prediction:
    """What a model gave.

    Attributes:
        text: its answer.
        regions: parts of the picture that it looked at, in original pixels.
    """

    text: str
    regions: Sequence[Box] = ()


@dataclass(frozen=True)
class Metric:
    """A score of one answer.

    Attributes:
        name: on the command line.
        title: of the score.
        score: of a sample and a prediction, from 0 to 1.
        lacks: what a sample lacks to be scored so, as the end of a sentence; None if nothing.
        more: figures of all samples and predictions, besides the mean.
    """

    name: str
    title: str
    score: Callable[[Sample, Prediction], float]
    lacks: Callable[[Sample], str | None]
    more: Callable[[Sequence[Sample], Sequence[Prediction]], dict[str, float]] | None = None


def plain(text: str) -> str:
    """Without case and punctuation, as lmms-eval's `exact_match` with both of its flags."""
    return text.strip().lower().translate(PUNCTUATION)


def exact(sample: Sample, prediction: Prediction) -> float:
    """Whether it is one of the answers, but for case and punctuation."""
    return float(any(plain(answer) == plain(prediction.text) for answer in sample.answers))


def vqa_words(text: str) -> str:
    """A text as the evaluation of VQA (Antol et al. 2015) compares it, in the form that TextVQA uses."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in MARKS:
        alone = f"{mark} " in text or f" {mark}" in text or COMMA.search(text) is not None
        out = out.replace(mark, "" if alone else " ")
    words = [_NUMBERED.get(word, word) for word in PERIOD.sub("", out, count=PERIODS).lower().split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in ARTICLES)


def vqa(sample: Sample, prediction: Prediction) -> float:
    """VQA accuracy: min(1, people who gave this answer / 3), averaged over all but one person each."""
    answers, said = [vqa_words(answer) for answer in sample.answers], vqa_words(prediction.text)
    same = answers.count(said)
    return fmean(min(1.0, (same - (answer == said)) / 3) for answer in answers)


def distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and replacements of characters."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def anls(sample: Sample, prediction: Prediction) -> float:
    """Average normalised Levenshtein similarity of DocVQA: below 0.5 it counts as nothing."""
    said = " ".join(prediction.text.strip().lower().split())
    shares = []
    for answer in sample.answers:
        longest = max(len(answer.upper()), len(prediction.text.upper()))
        known = " ".join(answer.strip().lower().split())
        shares.append(distance(known, said) / longest if longest else 0.0)
    similarity = 1 - min(shares)
    return similarity if similarity >= 0.5 else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(sample: Sample, prediction: Prediction) -> float:
    """Relaxed accuracy of ChartQA: numbers may be off by 5 %, other answers by their case."""
    said = _number(prediction.text)
    for answer in sample.answers:
        target = _number(answer)
        if said is not None and target:
            if abs(said - target) / abs(target) <= 0.05:
                return 1.0
        elif prediction.text.lower() == answer.lower():
            return 1.0
    return 0.0


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, by VLMEvalKit's rule: the only letter in it, else the only text."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    said = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return said[0] if len(said) == 1 else None


def option(sample: Sample, prediction: Prediction) -> float:
    """Whether it names the right option, by its letter or its text."""
    assert sample.options is not None
    right = sample.answers[0]
    if right not in sample.options:  # given by its text
        right = next(letter for letter, text in sample.options.items() if text == right)
    return float(letter_of(prediction.text, sample.options) == right)


def yes_or_no(text: str) -> str:
    """`yes`, `no` or `other`, as MME's evaluation reads an answer."""
    said = text.lower().strip().replace(".", "")
    if said in ("yes", "no"):
        return said
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def polar(sample: Sample, prediction: Prediction) -> float:
    """Whether yes is said for yes, and no for no."""
    return float(yes_or_no(prediction.text) == plain(sample.answers[0]))


def yes_rates(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    """POPE's figures: precision, recall and F1 of yes, and the rate of yes among the model's answers."""
    said = [yes_or_no(prediction.text) == "yes" for prediction in predictions]
    right = [plain(sample.answers[0]) == "yes" for sample in samples]
    both = sum(s and r for s, r in zip(said, right, strict=True))
    precision = both / sum(said) if any(said) else 0.0
    recall = both / sum(right) if any(right) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_rate": fmean(said)}


def mme_pairs(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    """MME's figures: acc, acc+ (both questions about a picture), and the sum of both over categories.

    The pairs are those of equal `group`; the categories those of `category`.
    """
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample, prediction in zip(samples, predictions, strict=True):
        pairs[sample.category or "", sample.group or ""].append(polar(sample, prediction))
    for (_, group), scores in pairs.items():
        if len(scores) != 2:
            raise FoveateError(f"metric mme: group {group!r} has {len(scores)} questions, not a pair")
    both = {key: float(sum(scores) == 2) for key, scores in pairs.items()}
    points: dict[str, list[float]] = defaultdict(list)
    for (category, group), scores in pairs.items():
        points[category].append(100 * fmean(scores) + 100 * both[category, group])
    return {
        "acc_plus": fmean(both.values()),
        "mme_score": sum(fmean(values) for values in points.values()),
    }


def iou(sample: Sample, prediction: Prediction) -> float:
    """Intersection over union of the last region looked at and the box."""
    if not prediction.regions:
        return 0.0
    assert sample.box is not None
    one, other = prediction.regions[-1], sample.box
    width = max(0, min(one.right, other.right) - max(one.left, other.left))
    height = max(0, min(one.bottom, other.bottom) - max(one.top, other.top))
    shared = float(width * height)
    return shared / (float(one.width * one.height) + float(other.width * other.height) - shared)


def hit(sample: Sample, prediction: Prediction) -> float:
    """Whether a region that was looked at contains the middle of the box."""
    assert sample.box is not None
    x, y = (sample.box.left + sample.box.right) / 2, (sample.box.top + sample.box.bottom) / 2
    return float(any(b.left <= x <= b.right and b.top <= y <= b.bottom for b in prediction.regions))


def _needs_answer(sample: Sample) -> str | None:
    return None if sample.answers else "has no answer"


def _needs_people(sample: Sample) -> str | None:
    if len(sample.answers) >= LEAST_ANSWERS:
        return None
    return (
        f"has {len(sample.answers)} answers: VQA accuracy counts people, at least {LEAST_ANSWERS}; use exact"
    )


def _needs_option(sample: Sample) -> str | None:
    if not sample.options:
        return "has no options"
    known = len(sample.answers) == 1 and (
        sample.answers[0] in sample.options or sample.answers[0] in sample.options.values()
    )
    return None if known else f"has the answer {', '.join(sample.answers)!r}, which is none of its options"


def _needs_polar(sample: Sample) -> str | None:
    known = [plain(answer) for answer in sample.answers]
    return None if len(known) == 1 and known[0] in ("yes", "no") else "has an answer other than yes and no"


def _needs_pair(sample: Sample) -> str | None:
    return _needs_polar(sample) or (None if sample.group else "has no group, by which pairs are found")


def _needs_box(sample: Sample) -> str | None:
    return None if sample.box is not None else "has no box"


def _without_an_apostrophe(word: str) -> list[str]:
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_NUMBERED = {word: str(n) for n, word in enumerate(NUMBERS.split())} | {"none": "0"}
_CONTRACTED = {s: word for word in CONTRACTIONS.split() for s in _without_an_apostrophe(word)} | IRREGULAR

METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", "exact match", exact, _needs_answer),
        Metric("vqa", "VQA accuracy", vqa, _needs_people),
        Metric("anls", "ANLS", anls, _needs_answer),
        Metric("relaxed", "relaxed accuracy", relaxed, _needs_answer),
        Metric("option", "right option", option, _needs_option),
        Metric("yes", "yes or no", polar, _needs_polar, yes_rates),
        Metric("mme", "MME accuracy", polar, _needs_pair, mme_pairs),
        Metric("iou", "overlap of the region", iou, _needs_box),
        Metric("hit", "region found", hit, _needs_box),
    )
}


def chosen(names: Sequence[str], samples: Sequence[Sample]) -> list[Metric]:
    """Metrics by name; without names those that fit the samples.

    Raises `FoveateError` for an unknown name, or samples that lack what a metric needs.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise FoveateError(f"unknown metric {unknown[0]!r}: choose from {', '.join(METRICS)}")
    metrics = [METRICS[name] for name in names or _fitting(samples)]
    for metric in metrics:
        for sample in samples:
            if (problem := metric.lacks(sample)) is not None:
                raise FoveateError(f"{sample.where} {problem}: it cannot be scored by metric {metric.name}")
        if metric.more is not None:  # for its errors, before any question is asked
            metric.more(samples, [Prediction("")] * len(samples))
    return metrics


def _fitting(samples: Sequence[Sample]) -> list[str]:
    for name in ("option", "yes", "vqa", "exact"):
        if all(METRICS[name].lacks(sample) is None for sample in samples):
            regions = all(sample.box is not None for sample in samples)
            return [name, *(["anls"] if name == "exact" else []), *(["iou", "hit"] if regions else [])]
    raise FoveateError("some samples have no answer: name a metric that needs none (iou, hit)")
