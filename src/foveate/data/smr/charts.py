"""Converters of charts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from foveate.data.smr.drafts import SHORT, Draft, Fields
from foveate.data.smr.files import first_of, of_list, required
from foveate.errors import FoveateError

DRAWN = 100_000  # questions of DVQA, as in the paper


def dvqa(folder: Path, rng: random.Random, drawn: int = DRAWN) -> Iterator[Draft]:
    """DVQA: `drawn` questions at random of the reasoning split of training.

    `train_qa.json` is a list of records with question, question_id, template_id (reasoning, data, structure),
    answer and image, a name in `images`. Format: kushalkafle/DVQA_dataset on GitHub.
    """
    kept: list[tuple[int, Fields]] = []  # a reservoir: every question is as likely to be in it
    seen = 0
    for fields in of_list(required(folder, ("train_qa.json", "qa/train_qa.json"))):
        if fields.text("template_id") != "reasoning":
            continue
        place = seen if seen < drawn else rng.randrange(seen + 1)
        if place < drawn:
            kept[place : place + 1] = [(seen, fields)]
        seen += 1
    for _, fields in sorted(kept, key=lambda pair: pair[0]):
        query = f"{fields.text('question').strip()}\n{SHORT}"
        picture = f"images/{fields.text('image')}"
        yield Draft(fields.where, fields.text("question_id"), picture, query, fields.text("answer"))


def chartqa(folder: Path, _: random.Random) -> Iterator[Draft]:
    """ChartQA: the questions that people wrote for the training split, none of those that were generated.

    `train/train_human.json` is a list of records with imgname, query and label; pictures are in `train/png`.
    Format: vis-nlp/ChartQA on GitHub.
    """
    path = required(
        folder, ("train/train_human.json", "ChartQA Dataset/train/train_human.json", "train_human.json")
    )
    pictures = first_of(path.parent, ("png", "train_images")) or first_of(folder, ("train_images",))
    if pictures is None:
        raise FoveateError(f"{path.parent} has no folder png with the pictures of the training split")
    below = pictures.relative_to(folder).as_posix()
    for number, fields in enumerate(of_list(path)):
        query = f"{fields.text('query').strip()}\n{SHORT}"
        answer = ", ".join(fields.texts("label"))
        yield Draft(fields.where, str(number), f"{below}/{fields.text('imgname')}", query, answer)
