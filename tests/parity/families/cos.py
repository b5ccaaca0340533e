"""Chain-of-Spot. Its checkpoints are LLaVA-1.5's in every respect, so they need no more than that method."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

from PIL import Image

from foveate.checkpoints import read_preprocessor
from foveate.processing import chat_template, image_processor_for, normalise_messages
from foveate.tiny import tiny_tokenizer
from tests.parity import cos_relevance
from tests.parity.checkpoints import load, prompt, tower_folder
from tests.parity.golden import Comparison, Family
from tests.support import greedy

LOGITS = 5e-5  # float32 against float64 differs by 1.3e-5 here, on logits of about 3
FEATURES = 2e-5


def checkpoint(compare: Comparison) -> None:
    """Both turns: pixels, visual tokens, logits everywhere, greedy tokens."""
    case = compare.case
    model = load(case)
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


FAMILY = Family(
    method="chain_of_spot",
    checkers={
        "checkpoint": checkpoint,
        "prompts": prompts,
        "relevance": cos_relevance.relevance,
        "roi_from_regions": cos_relevance.regions,
    },
    methods={
        "checkpoint": "llava",
        "prompts": "llava",
        "relevance": "llava",
        "roi_from_regions": "llava",
    },
)
