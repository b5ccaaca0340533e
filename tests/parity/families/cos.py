"""Chain-of-Spot: a checkpoint in both turns, prompts, the parser and its crops, training items."""

from __future__ import annotations

import json
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.ask import content
from foveate.boxes import BOX_FORMATS, Frame, read_box, write_box
from foveate.chat import chat_template, normalise_messages
from foveate.checkpoints import read_preprocessor
from foveate.data.dataset import Samples
from foveate.data.formats import read_conversations
from foveate.data.regions import Regions
from foveate.geometry import Box, Size
from foveate.methods.base import Cut, TowerGeometry
from foveate.methods.chain_of_spot import WORDINGS, ChainOfSpot
from foveate.processing import FoveateImageProcessor, FoveateProcessor, image_processor_for
from foveate.tiny import tiny_tokenizer
from foveate.turns import Context, Prompt
from tests.parity import cos_relevance
from tests.parity.checkpoints import load, prompt, tower_folder
from tests.parity.golden import Comparison, Family
from tests.support import greedy

LOGITS = 5e-5  # float32 against float64 differs by 1.3e-5 here, on logits of about 3
FEATURES = 2e-5


def checkpoint(compare: Comparison) -> None:
    """Both turns: pixels, visual tokens, logits everywhere, greedy tokens; then with a kept cache."""
    case = compare.case
    model = load(case, method="chain_of_spot")
    options = model.method.options
    read = {"wording": options.wording, "box_format": options.box_format, "crop": options.crop}
    compare.equal("options", read, RELEASED)
    picture = Image.fromarray(case.tensors["picture"].numpy())
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    for turn, about in case.json["turns"].items():
        expected = case.part(turn)
        seen = [picture]
        if "crop_uint8" in expected:
            seen.append(Image.fromarray(expected["crop_uint8"].numpy()))
        stored = expected["images"].view(
            len(seen), 3, *expected["images"].shape[-2:]
        )  # (1, 3 P, h, w) -> (P, 3, h, w)
        pixels = images(seen)["pixel_values"]
        compare.close(f"{turn} pixels", pixels, stored, 1e-6)
        sizes = [(image.height, image.width) for image in seen]
        inputs = prompt(model, expected["input_ids"], stored, sizes)
        features = model.encode_views(stored)
        visual = model.connect(features, inputs["image_sizes"]).pooler_output
        for i, tokens in enumerate(visual):
            compare.close(
                f"{turn} clip features {i + 1}", features[i], expected[f"clip_features{i + 1}"][0], FEATURES
            )
            compare.close(
                f"{turn} visual tokens {i + 1}", tokens, expected[f"visual_tokens{i + 1}"][0], FEATURES
            )
        logits = model(**inputs).logits[..., : expected["logits"].shape[-1]]
        compare.close(f"{turn} logits", logits, expected["logits"], LOGITS)
        new = len(about["greedy_new_tokens"])
        compare.equal(f"{turn} greedy", greedy(model, inputs, new)[0], expected["greedy"].tolist())
    box = Box(38.75, 62.0 - 55, 220.1, 257.3 - 55)  # of expected.json, without the square's padding
    region = model.method.region(case.json["roi"]["turn1_answer_used"], Size(200, 310))
    compare.close("region", torch.tensor(region.box), torch.tensor(box), 1e-4)
    crop = torch.from_numpy(np.array(model.method.crop(picture, region.box)))
    compare.equal("crop", torch.equal(crop, case.tensors["turn2.crop_uint8"]), True)
    one_after_the_other(compare, model, [picture, seen[-1]])


def one_after_the_other(compare: Comparison, model: Any, pictures: list[Image.Image]) -> None:
    """The second turn reads only what follows the first; tokens and logits are the authors' all the same."""
    case, context, shown = compare.case, Context(), model.config.image_token_id
    stored = case.part("turn2")["images"].view(2, 3, *case.part("turn2")["images"].shape[-2:])
    sizes = torch.tensor([(image.height, image.width) for image in pictures])
    for i, turn in enumerate(("turn1", "turn2")):
        expected = case.part(turn)
        inputs = prompt(model, expected["input_ids"], stored[: i + 1], sizes[: i + 1].tolist())
        ids = inputs["input_ids"][0].tolist()
        marks = [place for place, token in enumerate(ids) if token == shown]
        each = model.method.tower.tokens
        places = [(marks[k * each], marks[(k + 1) * each - 1] + 1) for k in range(i + 1)]
        written = Prompt(ids, list(range(i + 1)), places)
        known = context.known(0, written)
        compare.equal(f"{turn} kept", known, 97 if i else 0)  # all of turn 1's prompt
        encoded = model.connect(model.encode_views(stored[i : i + 1]), sizes[i : i + 1])
        logits: list[Tensor] = []
        hook = model.register_forward_hook(lambda m, a, out, to=logits: to.append(out.logits[:, -1]))
        count = len(expected["greedy"])
        limits = {"max_new_tokens": count, "min_new_tokens": count}
        reply = context.go_on(model, [written], [known], encoded, **limits)[0]
        hook.remove()
        compare.equal(f"{turn} greedy, read on", reply.ids, expected["greedy"].tolist())
        words = expected["logits"].shape[-1]
        compare.close(f"{turn} logits, read on", logits[0][..., :words], expected["logits"][:, -1], LOGITS)


# The options of the released layout, and what the authors' training adds.
RELEASED = {
    "wording": "released",
    "box_format": "unit_xyxy",
    "crop": "padded",
}


# Of the strings that the authors' program was given, those that hold no box for the strict parser.
NO_BOXES = {"words", "empty", "three", "five", "zero_area", "zero_width", "nan", "inf", "pixels"}


def method(**options: Any) -> ChainOfSpot:
    return ChainOfSpot(TowerGeometry(28, 14), {**RELEASED, **options})


def eval_roi(compare: Comparison) -> None:
    """Every string: the authors' outcome, the crop's size and pixels; boxes as strings of both orders."""
    case, authors = compare.case, method(parser="authors")
    picture = Image.fromarray(case.tensors["image"].numpy())
    size = Size(picture.height, picture.width)
    images = FoveateImageProcessor("chain_of_spot", RELEASED, image_size=28, patch_size=14)
    for row in case.json["strings_to_crops"]:
        name = row["name"]
        box, problem = authors.region(row["model_output"], size)
        strict, why = method().region(row["model_output"], size)
        compare.equal(
            f"{name} is no box, strictly", (strict is None, why is not None), (name in NO_BOXES,) * 2
        )
        outcome = "full_padded" if box is None else "crop"
        if row["outcome"] == "raises":  # the authors' program ends here
            compare.equal(f"{name} is no box", problem, "the box has no area")
            continue
        compare.equal(f"{name} outcome", outcome, row["outcome"])
        crop = picture if box is None else authors.crop(picture, box)
        if box is not None:
            width, height = row["crop"][0]["size"]
            compare.equal(f"{name} size", crop.size, (max(width, 1), max(height, 1)))
        if f"out.{name}.pixel6" in case.tensors:
            pixels = images([picture, crop])["pixel_values"].flatten(0, 1)[None]
            compare.close(f"{name} pixels", pixels, case.tensors[f"out.{name}.pixel6"], 1e-6)
    for row in case.json["boxes_to_strings"]:
        frame, box = Frame.padded(Size(row["side"], row["side"])), Box(*row["pixel_box_x0y0x1y1"])
        for form, key in (("unit_xyxy", "code_string"), ("unit_xxyy", "paper_order_string")):
            assert write_box(box, BOX_FORMATS[form], frame) == row[key], row
        fixed = read_box(row["paper_fixed3_string"], BOX_FORMATS["unit_xxyy"], frame)
        assert fixed == read_box(row["paper_order_string"], BOX_FORMATS["unit_xxyy"], frame), row
    compare.equal("strings", len(case.json["boxes_to_strings"]), 30)


def train_items(compare: Comparison) -> None:
    """All items from files as the authors' are: box text, crop, conversation, what is supervised, pixels."""
    case = compare.case
    with tempfile.TemporaryDirectory() as folder:
        for row in case.json["table"]:
            train_item(compare, Path(folder), row)
    kinds = [row["kind"] for row in case.json["table"]]
    compare.equal("items", (len(kinds), kinds.count("bad")), (48, 8))


def train_item(compare: Comparison, folder: Path, row: dict[str, Any]) -> None:
    name, size = f"case {row['case']}", Size(row["height"], row["width"])
    picture(row["picture_coef"], size).save(folder / "it.png")
    turns: list[dict[str, str]] = []
    for k in range(row["n_questions"]):
        text = f"Question {k}?\nAnswer the question using a single word or phrase."
        turns.append({"from": "human", "value": text if k else f"<image>\n{text}"})
        turns.append({"from": "gpt", "value": f"answer {k}"})
    record = {"id": row["sample_id"], "image": "it.png", "conversations": turns}
    records = [{**record, "id": "other"}] * row["dataset_index"] + [record]
    (folder / "data.json").write_text(json.dumps(records))
    good = {f"{len(records) + 7:06d}_x_q0": {"params": [0, 0, 5]}}  # a file needs one region at least
    annotated = {row["key"]: {"params": row["params_top_left_size"]}, **good}
    (folder / "regions.json").write_text(json.dumps(annotated))
    regions = Regions(folder / "regions.json")
    options = {**RELEASED, "others": "append"}
    images = FoveateImageProcessor("chain_of_spot", options, image_size=28, patch_size=14)
    processor = FoveateProcessor(images, tiny_tokenizer(), chat_template=chat_template("vicuna_v1"))
    index = row["dataset_index"]
    samples = Samples(
        [read_conversations(folder / "data.json")], np.array([[0, index]]), processor, [regions]
    )
    if row["fallback"]:  # the authors train the full picture; here the entry is counted and left out
        compare.equal(f"{name} left out", (regions.malformed, samples.measure(0)[0]), (1, 0))
        assert row["key"] in regions.named[0]
        return
    source = samples.sources[0]
    lessons = processor.image_processor.planner().lessons(
        source.messages(index), lambda: size, regions.of(index, source.id(index))
    )
    compare.equal(f"{name} lessons", len(lessons), 1)
    texts = ["".join(part.get("text", "<image>") for part in m["content"]) for m in lessons[0]]
    compare.equal(f"{name} box", texts[1], row["roi_string"])
    cut = lessons[0][2]["content"][1]["image"]
    assert isinstance(cut, Cut)
    width, height = row["crop_size"]
    compare.equal(f"{name} crop", cut.size, Size(height, width))
    with Image.open(folder / "it.png") as image:
        compare.equal(f"{name} made crop", cut.make(image).size, (width, height))
    item = samples[0]
    if f"out.case{row['case']}.pixel6" in compare.case.tensors:
        expected = compare.case.tensors[f"out.case{row['case']}.pixel6"]
        compare.close(f"{name} pixels", item["pixel_values"].flatten(0, 1), expected, 1e-6)
    runs = groupby(zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True), lambda t: t[1] >= 0)
    spans = [processor.tokenizer.decode([i for i, _ in run]) for learnt, run in runs if learnt]
    compare.equal(f"{name} supervised", spans, row["supervised_spans"])
    if "prompt" in row:
        read = processor.apply_chat_template(lessons[0])
        compare.equal(f"{name} prompt", read, "<s>" + row["prompt"])


def picture(coefficients: list[list[int]], size: Size) -> Image.Image:
    """pixel[y, x, c] = (k0 x + k1 y + k2 x y) mod 256"""
    y, x = np.mgrid[: size.height, : size.width]
    channels = [(k0 * x + k1 * y + k2 * x * y) % 256 for k0, k1, k2 in coefficients]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def prompts(compare: Comparison) -> None:
    """The authors' rendered prompts and supervised texts against our template."""
    rendered = compare.case.json["rendered"]
    tokenizer = tiny_tokenizer()
    template = chat_template("vicuna_v1")
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
    about, released, paper = compare.case.json, WORDINGS["released"], WORDINGS["paper"]
    compare.equal("training, turn 1", f"<image>\n{released.learnt}", about["train_turn1"])
    compare.equal("evaluation, turn 1", f"<image>\n{released.where}", about["eval_turn1"])
    compare.equal("evaluation, turn 2", released.answer, about["eval_turn2"])
    bare = {"{q}": "[Q]", "<image>": "[I_C|Q]"}
    for ours, theirs in ((f"[I] {paper.where}", "paper_turn1"), (paper.answer, "paper_turn2")):
        for old, new in bare.items():
            ours = ours.replace(old, new)
        compare.equal(theirs, ours, about[theirs])
    asked(compare, about["rendered"])


def asked(compare: Comparison, rendered: dict[str, Any]) -> None:
    """The prompts of both turns as `converse` makes them."""
    talk = method().converse(Image.new("RGB", (60, 40)), rendered["question"])
    turns, messages = [next(talk)], []
    turns.append(talk.send("[0.055, 0.249, 0.863, 0.779]"))
    for turn, prompt_text in zip(turns, rendered["eval_prompts"], strict=True):
        messages.append({"role": "user", "content": content(turn)})
        text = tiny_tokenizer().apply_chat_template(
            messages, chat_template=chat_template("vicuna_v1"), tokenize=False, add_generation_prompt=True
        )
        compare.equal("evaluation prompt", text, "<s>" + prompt_text)
        said = [{"type": "text", "text": "[0.055, 0.249, 0.863, 0.779]"}]
        messages.append({"role": "assistant", "content": said})


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
