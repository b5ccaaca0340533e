"""Chain-of-Spot: a checkpoint in both turns, prompts, the parser and its crops, training items."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.ask.context import Context, Passage
from foveate.ask.conversation import content
from foveate.data.dataset import Samples
from foveate.data.formats import read_conversations
from foveate.data.regions import Regions
from foveate.methods.base import Cut, TowerGeometry
from foveate.methods.chain_of_spot import (
    FURTHER,
    LEAST_SIDE,
    LONGEST,
    MOST_PIXELS,
    WORDINGS,
    ChainOfSpot,
    authors_region,
)
from foveate.model.checkpoints import read_preprocessor
from foveate.model.processing import FoveateImageProcessor, FoveateProcessor, image_processor_for
from foveate.model.text import chat_template, normalise_messages
from foveate.picture.boxes import BOX_FORMATS, Frame, read_box, write_box
from foveate.picture.geometry import Box, Size, padded_square
from foveate.tiny import tiny_tokenizer
from tests.parity import cos_relevance
from tests.parity.checkpoints import load, prompt, tower_folder, words
from tests.parity.golden import Case, Comparison, Family
from tests.support import greedy

LOGITS = 5e-5  # float32 against float64 differs by 1.3e-5 here, on logits of about 3
FEATURES = 2e-5


# The options of the released layout; what the authors' training adds is in `train_item`.
RELEASED = {
    "wording": "released",
    "box_format": "unit_xyxy",
    "crop": "padded",
}


def method(**options: Any) -> ChainOfSpot:
    return ChainOfSpot(TowerGeometry(28, 14), {**RELEASED, **options})  # its sizes play no part


def processor(side: int, **options: Any) -> FoveateImageProcessor:
    """Prepares pictures for a tower of this side; the method looks at no patch."""
    return FoveateImageProcessor("chain_of_spot", {**RELEASED, **options}, image_size=side, patch_size=side)


def centre(side: int) -> FoveateImageProcessor:
    """As `processor`, of the middle of a picture."""
    return FoveateImageProcessor("llava", {"fit": "crop"}, image_size=side, patch_size=side)


def checkpoint(compare: Comparison) -> None:
    """Both turns: pixels, visual tokens, logits everywhere, greedy tokens; then with a kept cache."""
    case = compare.case
    model = load(case, method="chain_of_spot")
    options = model.method.options
    read = {"wording": options.wording, "box_format": options.box_format, "crop": options.crop}
    compare.equal("options", read, RELEASED)
    picture = Image.fromarray(case.tensors["picture"].numpy())
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    shown = [picture]
    for turn in case.json["turns"]:
        expected = case.part(turn)
        stored = views(expected["images"])
        if "crop_uint8" in expected:
            shown.append(Image.fromarray(expected["crop_uint8"].numpy()))
        elif len(stored) > len(shown):  # what they show where they read no box
            shown.append(picture)
        pixels = images(shown)["pixel_values"]
        compare.close(f"{turn} pixels", pixels, stored, 1e-6)
        sizes = [(image.height, image.width) for image in shown]
        inputs = prompt(case, model, expected["input_ids"], stored, sizes)
        features = model.encode_views(stored)
        visual = model.connect(features, inputs["image_sizes"]).pooler_output
        for i, tokens in enumerate(visual):
            results = {f"clip_features{i + 1}": features[i : i + 1], f"visual_tokens{i + 1}": tokens[None]}
            compare.those(expected, results, FEATURES, of=turn)
        logits = words(model(**inputs).logits, expected["logits"])
        compare.close(f"{turn} logits", logits, expected["logits"], LOGITS)
        said = expected["greedy"].tolist()
        compare.equal(f"{turn} greedy", greedy(model, inputs, len(said))[0], said)
    if "crop_box" in case.json.get("roi", {}):
        region(compare, model.method, picture, shown[-1])
    one_after_the_other(compare, model, shown)


def views(pixels: Tensor) -> Tensor:
    """The authors' pictures, one after the other in channels: (1, 3 P, h, w) -> (P, 3, h, w)"""
    return pixels[0].unflatten(0, (-1, 3))


def region(compare: Comparison, method: ChainOfSpot, picture: Image.Image, crop: Image.Image) -> None:
    """What the text of the first turn stands for, in the original picture, and what is cut out there."""
    about, size = compare.case.json["roi"], Size(picture.height, picture.width)
    left, top = padded_square(size, max(size)).source[:2]  # of the square, in the picture
    x0, y0, x1, y1 = about["crop_box"]
    expected = Box(x0 + left, y0 + top, x1 + left, y1 + top)
    found = method.region(about["turn1_answer_used"], size).box
    inside = min(x0, y0) >= 0 and max(x1, y1) <= max(size)
    if not inside or min(x1 - x0, y1 - y0) < LEAST_SIDE:  # which they take as it is
        found = authors_region(about["turn1_answer_used"], size).box
    assert found is not None
    compare.close("region", torch.tensor(found).double(), torch.tensor(expected).double(), 1e-4)
    made = torch.from_numpy(np.array(method.crop(picture, found)))
    compare.close("crop", made, torch.from_numpy(np.array(crop)), 0.0)


def one_after_the_other(compare: Comparison, model: Any, pictures: list[Image.Image]) -> None:
    """Later turns read only what follows the one before; tokens and logits are the authors' all the same."""
    case, context, shown = compare.case, Context(), model.config.image_token_id
    each = model.method.tower.tokens
    before: list[int] = []
    for turn in case.json["turns"]:
        expected = case.part(turn)
        stored = views(expected["images"])
        sizes = [(image.height, image.width) for image in pictures[: len(stored)]]
        inputs = prompt(case, model, expected["input_ids"], stored, sizes)
        ids = inputs["input_ids"][0].tolist()
        marks = [place for place, token in enumerate(ids) if token == shown]
        places = [(marks[k * each], marks[(k + 1) * each - 1] + 1) for k in range(len(stored))]
        written = Passage(ids, list(range(len(stored))), places)
        known = context.known(0, written)
        # All of the prompt before, or what both begin with where the case says how much that is.
        kept = case.json.get("prefix", {}).get("length", len(before)) if before else 0
        compare.equal(f"{turn} kept", known, kept)
        fresh = slice(sum(end <= known for _, end in places), None)
        encoded = model.connect(model.encode_views(stored[fresh]), inputs["image_sizes"][fresh])
        logits: list[Tensor] = []
        hook = model.register_forward_hook(lambda m, a, out, to=logits: to.append(out.logits[:, -1]))
        count = len(expected["greedy"])
        limits = {"max_new_tokens": count, "min_new_tokens": count}
        reply = context.go_on(model, [written], [known], encoded, **limits)[0]
        hook.remove()
        compare.equal(f"{turn} greedy, read on", reply.ids, expected["greedy"].tolist())
        last = expected["logits"][:, -1]
        compare.close(f"{turn} logits, read on", words(logits[0], last), last, LOGITS)
        before = ids


def boxed(text: str, picture: Size) -> bool:
    """Whether a text holds four finite numbers, in one list, that enclose a part of the padded picture."""
    numbers = re.findall(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)\b", text)
    if len(numbers) != 4 or not all(math.isfinite(float(number)) for number in numbers):
        return False
    side = max(picture)
    for axis, length in enumerate((picture.width, picture.height)):
        margin = (side - length) // 2
        low, high = sorted(min(max(float(n) * side - margin, 0), length) for n in numbers[axis::2])
        if low == high:
            return False
    return True


def eval_roi(compare: Comparison) -> None:
    """Every string: the authors' outcome, the crop's size and pixels; boxes as strings of both orders."""
    case, authors, out = compare.case, method(parser="authors"), compare.case.part("out")
    if "image" in case.tensors:
        image = Image.fromarray(case.tensors["image"].numpy())
    else:
        image = picture(case.json["picture_coef"], Size(case.json["height"], case.json["width"]))
    size = Size(image.height, image.width)
    for row in case.json["strings_to_crops"]:
        name, text = row["name"], row["model_output"]
        box, problem = authors.region(text, size)
        strict, why = method().region(text, size)
        compare.equal(
            f"{name} is a box, strictly", (strict is not None, why is None), (boxed(text, size),) * 2
        )
        if row["outcome"] == "raises":  # the authors' program ends here
            compare.equal(f"{name} is no box", problem, "the box has no area")
            continue
        compare.equal(f"{name} outcome", "full_padded" if box is None else "crop", row["outcome"])
        crop = image if box is None else authors.crop(image, box)
        if box is not None:
            (cut,) = row["crop"]
            offset = padded_square(size, max(size)).source
            own = [n - o for n, o in zip(box, (offset.left, offset.top) * 2, strict=True)]
            parts = (torch.tensor(numbers).double() / max(size) for numbers in (own, cut["box"]))
            compare.close(f"{name} box", *parts, 1e-5)
            compare.equal(f"{name} size", crop.size, bounded(*least_one(cut["size"])))
        if "prompts" in row:
            said = {"question": case.json["question"], "eval_prompts": row["prompts"]}
            asked(compare, said, chat_template("vicuna_v1"))
        # A second script of theirs takes the centre of the first picture, and the same crop.
        for key, first in ((f"{name}.pixel6", processor), (f"vqa_{name}.pixel6", centre)):
            if key in out:
                side = out[key].shape[-1]
                shown = [first(side)(image)["pixel_values"], processor(side)(crop)["pixel_values"]]
                compare.close(key, torch.cat(shown).flatten(0, 1)[None], out[key], 1e-6)
    for row in case.json.get("boxes_to_strings", []):
        frame, box = Frame.padded(Size(row["side"], row["side"])), Box(*row["pixel_box_x0y0x1y1"])
        for form, key in (("unit_xyxy", "code_string"), ("unit_xxyy", "paper_order_string")):
            if key in row:
                compare.equal(f"{key} of {list(box)}", write_box(box, BOX_FORMATS[form], frame), row[key])
        if "paper_fixed3_string" in row:
            read = [
                read_box(row[key], BOX_FORMATS["unit_xxyy"], frame)
                for key in ("paper_fixed3_string", "paper_order_string")
            ]
            compare.equal(f"fixed decimals of {list(box)}", read[0], read[1])


def least_one(size: Sequence[int]) -> tuple[int, int]:
    """Width and height of what is cut out where theirs may have none: of a line of padding."""
    width, height = size
    return max(width, 1), max(height, 1)


def bounded(width: int, height: int) -> tuple[int, int]:
    """Of what they cut out for pixel coordinates, far beyond the picture, less is made here."""
    scale = min(1.0, math.sqrt(MOST_PIXELS / (width * height)), LONGEST / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def train_items(compare: Comparison) -> None:
    """All items from files as the authors' are: box text, crop, conversation, what is supervised, pixels."""
    with tempfile.TemporaryDirectory() as folder:
        for row in compare.case.json["table"]:
            train_item(compare, Path(folder), row)


# A question and its answer where no row of a file shows how they are written.
ASKED, ANSWERED = "Question {}?\nAnswer the question using a single word or phrase.", "answer {}"


def asked_and_answered(case: Case, row: Mapping[str, Any]) -> tuple[str, str]:
    """How the case's questions and their answers are written, {} being their number."""
    asked, answered = ASKED, ANSWERED
    if row.get("supervised_spans"):
        answered = row["supervised_spans"][1].strip().removesuffix("</s>")
        answered = answered.replace(str(row["question_id"]), "{}")
    for one in case.json["table"]:
        if "messages" in one:
            quoted = re.search(r'question: "(.*?)", where', one["messages"][0]["value"], re.DOTALL)
            assert quoted is not None
            asked = quoted[1].replace(str(one["question_id"]), "{}")
            break
    return asked, answered


def train_item(compare: Comparison, folder: Path, row: dict[str, Any]) -> None:
    case, out = compare.case, compare.case.part("out")
    name, size = f"case {row['case']}", Size(row["height"], row["width"])
    image = picture(row["picture_coef"], size)
    image.save(folder / "it.png")
    compare.those(case.tensors, {f"case{row['case']}.image": torch.from_numpy(np.array(image))}, 0.0)
    turns: list[dict[str, str]] = []
    asked, answered = asked_and_answered(case, row)
    for k in range(row["n_questions"]):
        text = asked.format(k)
        turns.append({"from": "human", "value": text if k else f"<image>\n{text}"})
        turns.append({"from": "gpt", "value": answered.format(k)})
    record = {"id": row["sample_id"], "image": "it.png", "conversations": turns}
    index = row["dataset_index"]
    records = [{**record, "id": "other"}] * index + [record]
    (folder / "data.json").write_text(json.dumps(records))
    good = {f"{len(records) + 7:06d}_x_q0": {"params": [0, 0, 5]}}  # a file needs one region at least
    annotated = {row["key"]: {"params": row["params_top_left_size"]}, **good}
    (folder / "regions.json").write_text(json.dumps(annotated))
    regions = Regions(folder / "regions.json")
    expected = out.get(f"case{row['case']}.pixel6")
    images = processor(28 if expected is None else expected.shape[-1], others="append")
    reader = FoveateProcessor(images, tiny_tokenizer(), chat_template=chat_template("vicuna_v1"))
    samples = Samples([read_conversations(folder / "data.json")], np.array([[0, index]]), reader, [regions])
    if row["fallback"]:  # the authors train the full picture; here the entry is counted and left out
        length, problems = samples.measure(0)
        compare.equal(f"{name} left out", (regions.malformed + len(problems), length), (1, 0))
        whole = [image, image]
    else:
        whole = [image, learnt(compare, folder, row, samples)]
    if expected is not None:
        pixels = images(whole)["pixel_values"].flatten(0, 1)
        compare.close(f"{name} pixels", pixels, expected, 1e-6)


def learnt(compare: Comparison, folder: Path, row: dict[str, Any], samples: Samples) -> Image.Image:
    """An item with a region: its texts, its size, what of it is learnt. Returns what is cut out."""
    name, size, index = f"case {row['case']}", Size(row["height"], row["width"]), row["dataset_index"]
    source, regions, reader = samples.sources[0], samples.regions[0], samples.processor
    assert regions is not None
    lessons = reader.image_processor.planner().lessons(
        source.messages(index), lambda: size, regions.of(index, source.id(index))
    )
    compare.equal(f"{name} lessons", len(lessons), 1)
    said = ["".join(part.get("text", "<image>") for part in m["content"]) for m in lessons[0]]
    compare.equal(f"{name} box", said[1], row["roi_string"])
    cut = lessons[0][2]["content"][1]["image"]
    assert isinstance(cut, Cut)
    width, height = least_one(row["crop_size"])
    compare.equal(f"{name} crop", cut.size, Size(height, width))
    with Image.open(folder / "it.png") as image:
        crop = cut.make(image)
        shown = reader.image_processor([image, crop])["pixel_values"]
    compare.equal(f"{name} made crop", crop.size, (width, height))
    item = samples[0]
    squared = f"case{row['case']}.crop_squared"
    own = processor(max(crop.size)).planner()
    painted = reader.image_processor.paint(crop, own.plan(crop.height, crop.width).canvases[0])
    compare.those(compare.case.part("out"), {squared: torch.from_numpy(np.array(painted))}, 0.0)
    compare.close(f"{name} item", item["pixel_values"], shown, 0.0)
    runs = groupby(zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True), lambda t: t[1] >= 0)
    spans = [reader.tokenizer.decode([i for i, _ in run]) for supervised, run in runs if supervised]
    compare.equal(f"{name} supervised", spans, row["supervised_spans"])
    if "messages" in row:
        theirs = [message["value"].replace("<image>\n", "<image>") for message in row["messages"]]
        compare.equal(f"{name} messages", said, theirs)  # our template adds the line's end
    if "prompt" in row:
        compare.equal(f"{name} prompt", reader.apply_chat_template(lessons[0]), "<s>" + row["prompt"])
    return crop


def picture(coefficients: list[list[int]], size: Size) -> Image.Image:
    """pixel[y, x, c] = (k0 x + k1 y + k2 x y) mod 256"""
    y, x = np.mgrid[: size.height, : size.width]
    channels = [(k0 * x + k1 * y + k2 * x * y) % 256 for k0, k1, k2 in coefficients]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def prompts(compare: Comparison) -> None:
    """The authors' rendered prompts and supervised texts against our template."""
    about = compare.case.json
    rendered, template = about["rendered"], chat_template(about["conversation"]["template"])
    tokenizer = tiny_tokenizer()
    roles = {"human": "user", "gpt": "assistant"}
    messages = normalise_messages(
        [{"role": roles[m["from"]], "content": m["value"]} for m in rendered["train_messages"]]
    )
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    compare.equal("training prompt", text, "<s>" + rendered["train_prompt"])
    tokens = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    runs = groupby(zip(tokens["input_ids"], tokens["assistant_masks"], strict=True), key=itemgetter(1))
    spans = [tokenizer.decode([i for i, _ in run]) for supervised, run in runs if supervised]
    compare.equal("supervised", spans, rendered["train_supervised"])
    released, paper = WORDINGS["released"], WORDINGS["paper"]
    written = {
        "train_turn1": f"<image>\n{released.learnt}",
        "train_turn2": released.answer,
        "train_extra_prefix": FURTHER,
        "eval_turn1": f"<image>\n{released.where}",
        "eval_turn2": released.answer,
        "paper_turn1": bare(f"[I] {paper.where}"),
        "paper_turn2": bare(paper.answer),
    }
    for name in (key for key in written if key in about):
        compare.equal(name, written[name], about[name])
    asked(compare, rendered, template)


def bare(wording: str) -> str:
    """As the paper writes questions and pictures."""
    return wording.replace("{q}", "[Q]").replace("<image>", "[I_C|Q]")


def asked(compare: Comparison, rendered: dict[str, Any], template: str) -> None:
    """The prompts of both turns as `converse` makes them; the model says what the second one shows."""
    first, second = rendered["eval_prompts"]
    said, _, _ = second.removeprefix(first).strip().partition("</s>")
    talk = method().converse(Image.new("RGB", (60, 40)), rendered["question"])  # of any size
    turns, messages = [next(talk)], []
    turns.append(talk.send(said))
    for turn, prompt_text in zip(turns, (first, second), strict=True):
        messages.append({"role": "user", "content": content(turn)})
        text = tiny_tokenizer().apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        compare.equal("evaluation prompt", text, "<s>" + prompt_text)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


FAMILY = Family(
    method="chain_of_spot",
    checkers={
        "checkpoint": checkpoint,
        "prompts": prompts,
        "eval_roi": eval_roi,
        "train_items": train_items,
        "relevance": cos_relevance.relevance,
        "roi_from_regions": cos_relevance.regions,
    },
)
