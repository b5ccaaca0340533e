"""Chain-of-Spot, from what its authors' scripts do and from the paper's equations 4 to 6."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.parity.varied.making import (
    Made,
    Maker,
    Random,
    bytes_of,
    drawn,
    linear,
    norm,
    normalised,
    padded,
    prefixed,
    resized,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WHERE = '<image>\nTo answer the question: "{}", {} is the region of interest in the image?'
ANSWER = 'The region of interest in the image is <image>\n. Answer the question: "{}"'
FURTHER = "Now answer the following questions based on the raw image: "


def rendered(messages: list[str]) -> str:
    """As vicuna_v1 has it; the last word is the assistant's where the user's is the last message."""
    text = SYSTEM + " "
    for number, message in enumerate(messages):
        text += f"ASSISTANT: {message}</s>" if number % 2 else f"USER: {message} "
    return text if len(messages) % 2 == 0 else text + "ASSISTANT:"


def prompts(seed: int) -> Made:
    question, said = (("Who?", "[0.3, 0.111, 0.4, 0.99]"), ("What is\nthat?", "I cannot say."))[seed]
    first, second = WHERE.format(question, "what"), ANSWER.format(question)
    learnt = [
        WHERE.format(question, "where"),
        "[0.1, 0.2, 0.3, 0.4]",
        second,
        "a cat",
        FURTHER + "Why?",
        "so",
    ]
    if seed:
        learnt = learnt[:4]
    about: dict[str, Any] = {
        "train_turn1": WHERE.format("{q}", "where"),
        "eval_turn1": WHERE.format("{q}", "what"),
        "eval_turn2": ANSWER.format("{q}"),
        "conversation": {"template": "vicuna_v1"},
        "rendered": {
            "question": question,
            "eval_prompts": [rendered([first]), rendered([first, said, second])],
            "train_prompt": rendered(learnt),
            "train_supervised": [f" {text}</s>" for text in learnt[1::2]],
            "train_messages": [
                {"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(learnt)
            ],
        },
    }
    if not seed:
        about["train_extra_prefix"] = FURTHER
    return Made(about, {})


def shown(image: Image.Image, side: int) -> Tensor:
    """(3, h, w): padded to a square, as the tower gets it."""
    return normalised(resized(padded(image), side, side))


def seen_by_pil(image: Image.Image, box: list[float]) -> Image.Image:
    """What is cut from the padded square; lines of no pixels stand for padding, and are one wide here."""
    cut = padded(image).crop(tuple(box))
    if 0 in cut.size:
        return Image.new("RGB", (max(cut.width, 1), max(cut.height, 1)), (122, 116, 104))
    return cut


def eval_roi(seed: int) -> Made:
    width, height, side = ((50, 70, 20), (90, 36, 24))[seed]
    coefficients = Random(seed).integers(1, 9, 3, 3).tolist()
    image = drawn(coefficients, width, height)
    square, rows, out = max(width, height), [], {}
    texts = {
        "plain": "[0.2, 0.4, 0.8, 0.6]",
        "bare": "0.2, 0.4, 0.8, 0.67",
        "half": "[0.25, 0.35, 0.75, 0.65]",
        "words": "There.",
        "turned": "[0.8, 0.4, 0.2, 0.6]",
        "point": "[0.5, 0.5, 0.5, 0.5]",
        "line": "[0.5, 0.3, 0.5, 0.7]",
        "beyond": "[0.6, 0.45, 1.3, 0.7]",
        "prose": "At [0.2, 0.4, 0.8, 0.6].",
        "four": "[0.2, 0.4, 0.8, 0.6, 0.7]",
        "endless": "[0.2, inf, 0.8, 0.6]",
        "pixels": "[12, 30, 80, 95]",
    }
    for name, text in texts.items():
        row: dict[str, Any] = {"name": name, "model_output": text, "outcome": "full_padded", "crop": []}
        try:
            box = [float(part) * square for part in text.strip()[1:-1].split(", ")][:4]
            size = padded(image).crop(tuple(box)).size
            row |= {"outcome": "crop", "crop": [{"box": box, "size": [*size]}]} if len(box) == 4 else {}
        except (ValueError, OverflowError):
            pass
        if row["outcome"] == "crop" and row["crop"][0]["size"] == [0, 0]:
            row["outcome"] = "raises"
        else:
            seen = seen_by_pil(image, box) if row["outcome"] == "crop" else image
            if name != "pixels" and (not seed or name in ("plain", "line")):
                out[f"{name}.pixel6"] = torch.cat([shown(image, side), shown(seen, side)])[None]
        rows.append(row)
    about: dict[str, Any] = {"width": width, "height": height, "picture_coef": coefficients}
    about["strings_to_crops"] = rows
    if not seed:
        strings = []
        for length, box in ((333, [1, 20, 300, 333]), (1000, [0, 5, 4, 9])):
            parts = [round(n / length, 3) for n in box]
            x0, y0, x1, y1 = parts
            fixed = f"[{x0:.3f}, {x1:.3f}, {y0:.3f}, {y1:.3f}]"
            row = {"side": length, "pixel_box_x0y0x1y1": box, "code_string": str(parts)}
            strings.append({**row, "paper_order_string": str([x0, x1, y0, y1]), "paper_fixed3_string": fixed})
        about["boxes_to_strings"] = strings
    tensors = {} if seed else {"image": bytes_of(image)}
    return Made(about, tensors | prefixed("out", out))


def train_items(seed: int) -> Made:
    rows, tensors, side = [], {}, (20, 36)[seed]
    given = (
        (
            (68, 94, [93.5, 43.25, 83.125]),  # half a row of the picture
            (40, 60, [12, 20, 9]),
            (61, 30, None),
            (50, 50, [-4, -1, 30.5]),
        ),
        ((64, 48, [10.4, 63, 5]), (31, 77, [0, 0, "x"])),
    )[seed]
    for number, (width, height, params) in enumerate(given):
        image = drawn(Random(number).integers(1, 9, 3, 3).tolist(), width, height)
        questions, asked, index = number % 3 + 1, number % 2 if number % 3 else 0, number + 1
        row: dict[str, Any] = {"case": number, "width": width, "height": height}
        row |= {"picture_coef": Random(number).integers(1, 9, 3, 3).tolist(), "params_top_left_size": params}
        row |= {"question_id": asked, "n_questions": questions, "dataset_index": index}
        row |= {"sample_id": f"set/{number}", "key": f"{index:06d}_set_{number}_q{asked}"}
        good = params is not None and all(isinstance(n, (int, float)) for n in params)
        row["fallback"] = not good
        crop = image
        if good:
            top, left, length = params
            square = max(width, height)
            dx, dy = (square - width) // 2, (square - height) // 2
            right, bottom = min(left + length, width), min(top + length, height)
            box = [left + dx, top + dy, right + dx, bottom + dy]
            text = str([round(n / square, 3) for n in box])
            crop = seen_by_pil(image, box)
            row |= {"roi_string": text, "crop_size": [*padded(image).crop(tuple(box)).size]}
            order = [asked, *(k for k in range(questions) if k != asked)]
            words = [f"Is it {k}?" for k in order]
            said = [WHERE.format(words[0], "where"), text, ANSWER.format(words[0]), f"yes {order[0]}"]
            for i, k in enumerate(order[1:]):
                said += [words[i + 1] if i else FURTHER + words[i + 1], f"yes {k}"]
            row["supervised_spans"] = [f" {answer}</s>" for answer in said[1::2]]
            sides = ("gpt" if i % 2 else "human" for i in range(len(said)))
            row["messages"] = [{"from": who, "value": words} for who, words in zip(sides, said, strict=True)]
            row["prompt"] = rendered(said)
            tensors[f"out.case{number}.crop_squared"] = bytes_of(padded(crop))
        tensors[f"out.case{number}.pixel6"] = torch.cat([shown(image, side), shown(crop, side)])
        if not seed:
            tensors[f"case{number}.image"] = bytes_of(image)
        rows.append(row)
    return Made({"table": rows}, tensors)


def relevance(seed: int) -> Made:
    layers, heads, tokens, width, classes, mask, eps = (
        (2, 3, 6, 12, 4, "causal", 1e-5),
        (4, 2, 5, 8, 3, "bi", 1e-6),
    )[seed]
    position, target = ((5, 1), (2, 0))[seed]
    random = Random(seed)
    state = random.norm("ln_f", width) | random.linear("head", classes, width)
    for i in range(layers):
        at = f"layers.{i}"
        for part in "qkvo":
            state |= random.linear(f"{at}.{part}", width, width)
        state |= random.linear(f"{at}.fc1", 20, width) | random.linear(f"{at}.fc2", width, 20)
        state |= random.norm(f"{at}.ln1", width) | random.norm(f"{at}.ln2", width)
    x = random(tokens, width)
    maps: list[Tensor] = []
    with torch.enable_grad():
        hidden = x.clone().requires_grad_()
        for i in range(layers):
            at = f"layers.{i}"
            h = norm(hidden, state, f"{at}.ln1", eps)
            query, key, value = (linear(h, state, f"{at}.{part}") for part in "qkv")
            maps.append(attention(query, key, heads, mask == "causal"))
            split = value.view(tokens, heads, -1).transpose(0, 1)
            read = (maps[-1] @ split).transpose(0, 1).reshape(tokens, width)
            hidden = hidden + linear(read, state, f"{at}.o")
            h = F.gelu(linear(norm(hidden, state, f"{at}.ln2", eps), state, f"{at}.fc1"))
            hidden = hidden + linear(h, state, f"{at}.fc2")
        logits = linear(norm(hidden, state, "ln_f", eps), state, "head")
        slopes = torch.autograd.grad(logits[position, target], maps)
    a, g = torch.stack(maps).detach(), torch.stack(slopes)
    out = {"logits": logits.detach(), "attn": a, "grad": g}
    readings = {"chefer": (g * a).clamp(min=0), "literal": g * a, "indicator": g * (a > 0)}
    for name, product in readings.items():
        psi, sigma, sigmas = product.mean(1), torch.eye(tokens), []
        for one in psi:
            sigma = sigma + one @ sigma
            sigmas.append(sigma)
        out |= {f"{name}.psi": psi, f"{name}.sigma": torch.stack(sigmas)}
    config = {"layers": layers, "heads": heads, "tokens": tokens, "d": width, "mask": mask, "ln_eps": eps}
    config |= {"logit_position": position, "target_class": target}
    return Made({"config": config}, {"x": x} | prefixed("out", out) | prefixed("state", state))


def attention(query: Tensor, key: Tensor, heads: int, causal: bool) -> Tensor:
    """(T, C) twice -> (heads, T, T); causal: each token reads itself and those before."""
    width, count, maps = query.shape[-1] // heads, len(query), []
    for head in range(heads):
        part, rows = slice(head * width, (head + 1) * width), []
        for t in range(count):
            seen = t + 1 if causal else count
            scores = query[t, part] @ key[:seen, part].T / math.sqrt(width)
            rows.append(F.pad(scores.softmax(0), (0, count - seen)))
        maps.append(torch.stack(rows))
    return torch.stack(maps)


def roi_from_regions(seed: int) -> Made:
    epsilon, grows = ((0.3, 0.25), (0.6, 0.0))[seed]
    random, table = Random(seed), []
    for width, height in ((300, 200), (111, 480)):
        corners = random.integers(0, 900, 5, 4).tolist()
        boxes = []
        for a, b, c, d in corners:
            x0, x1 = sorted((a * width / 1000, c * width / 1000 + 1))
            y0, y1 = sorted((b * height / 1000, d * height / 1000 + 1))
            boxes.append([round(n, 2) for n in (x0, y0, x1, y1)])
        scores = [round(float(n), 4) for n in random(5)]
        least, most = min(scores), max(scores)
        keep = [i for i, score in enumerate(scores) if (score - least) / (most - least) >= epsilon]
        x0, y0 = (min(boxes[i][axis] for i in keep) for axis in (0, 1))
        x1, y1 = (max(boxes[i][axis] for i in keep) for axis in (2, 3))
        dx, dy = (x1 - x0) * grows / 2, (y1 - y0) * grows / 2
        box = [max(math.floor(x0 - dx), 0), max(math.floor(y0 - dy), 0)]
        box += [min(math.ceil(x1 + dx), width), min(math.ceil(y1 + dy), height)]
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        square = [box[0] + left, box[1] + top, box[2] + left, box[3] + top]
        row = {"width": width, "height": height, "regions_x0y0x1y1": boxes, "scores": scores, "keep": keep}
        row |= {"extended_clipped": box, "in_padded_square": square}
        table.append({**row, "string": str([round(n / side, 3) for n in square])})
    rule = {"epsilon": epsilon, "extension": f"each side grows by {grows}*extent/2"}
    return Made({"rule": rule, "table": table}, {})


MAKERS: dict[str, Maker] = {
    "prompts": prompts,
    "eval_roi": eval_roi,
    "train_items": train_items,
    "relevance": relevance,
    "roi_from_regions": roi_from_regions,
}
