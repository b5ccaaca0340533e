"""Chat templates against literal prompts, and questions of pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from foveate import FoveateError, FoveateProcessor
from foveate.model.rendering import marked_answers
from foveate.model.text import (
    TEMPLATES,
    answers_in,
    chat_template,
    normalise_messages,
    picture_queries,
    questions_in,
)
from foveate.tiny import tiny_model
from tests.support import chat, picture

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
IMAGE = {"type": "image"}
MESSAGES = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And there?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}

# template -> prompts of a question, of two turns and a question, of the same with a system message
EXPECTED = {
    "vicuna_v1": (
        f"<s>{VICUNA}USER: <image>\nWhat is it? ASSISTANT:",
        f"<s>{VICUNA}USER: <image>\nWhat is it? ASSISTANT: A dog.</s>USER: And there? ASSISTANT:",
        "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT: A dog.</s>USER: And there? ASSISTANT:",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama3_v1": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{VICUNA.strip()}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{VICUNA.strip()}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s>[INST] <image>\nWhat is it? [/INST]",
        "<s>[INST] <image>\nWhat is it? [/INST] A dog.</s>[INST] And there? [/INST]",
        "<s>[INST] Be brief.\n\n<image>\nWhat is it? [/INST] A dog.</s>[INST] And there? [/INST]",
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nAnd there?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nAnd there?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "plain": (
        "<image>What is it?",
        "<image>What is it?A dog.\nAnd there?",
        "Be brief.<image>What is it?A dog.\nAnd there?",
    ),
    "bare": (
        "<image>What is it?",
        "<image>What is it?A dog.</s>And there?",
        "Be brief.<image>What is it?A dog.</s>And there?",
    ),
}
# template -> what of the assistant is learnt, for the second turn
LEARNT = {
    "vicuna_v1": " A dog.</s>",
    "llama3": "A dog.<|eot_id|>",
    "llama3_v1": "A dog.<|eot_id|>",
    "mistral": " A dog.</s>",
    "chatml": "A dog.<|im_end|>",
    "plain": "A dog.\n",
    "bare": "A dog.</s>",
}


@pytest.fixture(params=TEMPLATES)
def processor(request: pytest.FixtureRequest) -> FoveateProcessor:
    return tiny_model("llava", template=request.param).processor


def name_of(processor: FoveateProcessor) -> str:
    return next(name for name in TEMPLATES if processor.chat_template == chat_template(name))


def test_prompts(processor: FoveateProcessor) -> None:
    conversations = (MESSAGES[:1], MESSAGES, [SYSTEM, *MESSAGES])
    for messages, expected in zip(conversations, EXPECTED[name_of(processor)], strict=True):
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected


def test_without_a_generation_prompt(processor: FoveateProcessor) -> None:
    """A conversation that ends in an answer: what training sees. It begins as the question's prompt does."""
    asked, answered = MESSAGES[:1], MESSAGES[:2]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    whole = processor.apply_chat_template(answered)
    assert whole.startswith(prompt)
    name = name_of(processor)
    assert whole[len(prompt) :] == LEARNT[name] + ("\n" if name == "chatml" else "")


def test_one_beginning_and_no_more(processor: FoveateProcessor) -> None:
    """Where the template writes the first token, a tokenizer that adds one by itself adds no second."""
    tokenizer = processor.tokenizer
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    message = chat("What is it?", picture(20, 30))
    inputs = processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id


def test_what_is_learnt(processor: FoveateProcessor) -> None:
    messages = [
        *chat("What is it?", picture(20, 30)),
        *MESSAGES[1:],
        {"role": "assistant", "content": "Two cats."},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    learnt = inputs["input_ids"][torch.as_tensor(inputs["assistant_masks"]).bool()]
    first = LEARNT[name_of(processor)]
    assert processor.tokenizer.decode(learnt) == first + first.replace("A dog.", "Two cats.")
    assert processor.image_token_id not in learnt


def test_pictures_stand_where_they_are_said(processor: FoveateProcessor) -> None:
    parts = [{"type": "text", "text": "First "}, IMAGE, {"type": "text", "text": "then "}, IMAGE]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    gap = "" if name_of(processor) in ("plain", "bare") else "\n"
    assert f"First <image>{gap}then <image>{gap}" in text


TOLD = [
    SYSTEM,
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "What does it say, USER: or ASSISTANT?"}]},
    {"role": "assistant", "content": "It says:\n\nASSISTANT\n"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_answers_are_found_in_a_text(processor: FoveateProcessor, first: int, count: int) -> None:
    """Those that the template marks, in a text from which the marks are gone."""
    messages = normalise_messages(TOLD[first : 1 + count])
    text = processor.apply_chat_template(messages)
    names = processor.tokenizer.special_tokens_map
    marked = marked_answers(processor.chat_template, messages, **names)
    assert len(marked) == count // 2
    found = answers_in(text, processor.apply_chat_template)
    assert found == ([] if name_of(processor) in ("plain", "bare") else marked)


def test_what_was_answered_before_a_question_is_not_to_be_learnt(processor: FoveateProcessor) -> None:
    render = processor.apply_chat_template
    for messages in (TOLD[:2], TOLD[:4], TOLD[:6]):
        assert answers_in(render(messages), render) == []
        assert answers_in(render(messages, add_generation_prompt=True), render) == []
    begun = render(TOLD[:3], continue_final_message=True)
    assert answers_in(begun, render) == []
    assert answers_in("a text of another template", render) == []


def test_a_prompt_is_what_the_processor_makes(processor: FoveateProcessor) -> None:
    """Of one conversation: the same tokens by both ways, with and without its answers to learn."""
    image = picture(20, 30)
    shown = [{**TOLD[1], "content": [{**IMAGE, "image": image}, *TOLD[1]["content"][1:]]}, *TOLD[2:]]
    for messages, learn in ((shown[:1], False), (shown[:3], False), (shown[:4], True)):
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=not learn,
            return_assistant_tokens_mask=learn,
        )
        prompt = processor.prompt(messages, learn=learn)
        assert prompt.ids == list(inputs["input_ids"][0])
        assert [*map(int, prompt.answers)] == (
            list(inputs["assistant_masks"][0]) if learn else [0] * len(prompt.ids)
        )
        ((start, end),) = prompt.places
        assert set(prompt.ids[start:end]) == {processor.image_token_id}
        assert prompt.ids.count(processor.image_token_id) == end - start == 16
        assert prompt.queries == [[]]


def test_a_template_must_write_every_picture(processor: FoveateProcessor) -> None:
    processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(FoveateError, match="the chat template writes <image> 0 times for 1 pictures"):
        processor.prompt(chat("What?", picture(20, 30)))


def test_unknown_template() -> None:
    with pytest.raises(FoveateError, match="unknown chat template 'alpaca': choose one of plain, bare"):
        chat_template("alpaca")


def test_queries_are_the_text_beside_the_picture() -> None:
    messages: list[dict[str, Any]] = [
        SYSTEM,
        {"role": "user", "content": [IMAGE, {"type": "text", "text": " What? "}, IMAGE]},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "Nothing shown."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "In"}, IMAGE, {"type": "text", "text": "this?"}],
        },
    ]
    assert picture_queries(normalise_messages(messages)) == ["What?", "What?", "In this?"]
    assert messages[2]["content"] == "An answer."  # left as it was


def test_mixed_batches(processor: FoveateProcessor) -> None:
    batch = [chat("What?", picture(20, 30)), [{"role": "user", "content": "No picture."}], MESSAGES[1:]]
    inputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [16, 0, 0]
    assert inputs["image_sizes"].tolist() == [[20, 30]]
    assert inputs["attention_mask"][1, 0] == 0  # padded on the left


def test_truncation_cuts_words_alone(processor: FoveateProcessor) -> None:
    """Trainers ask for it by default, with a length that few texts reach."""
    given: dict[str, Any] = {"images": picture(9, 9), "text": "<image> a text", "truncation": True}
    whole = processor(images=given["images"], text=given["text"])["input_ids"]
    assert processor(**given, max_length=1024)["input_ids"] == whole
    assert processor(**given, max_length=len(whole[0]) - 2)["input_ids"] == [whole[0][:-2]]
    for least in (1, 4, 15):
        with pytest.raises(FoveateError, match="truncation would cut visual tokens: raise max_length"):
            processor(**given, max_length=least)


def test_questions_are_found_in_a_text(processor: FoveateProcessor) -> None:
    """The same as in the messages, wherever the picture is and whatever else is said."""
    asked = [IMAGE, {"type": "text", "text": " What is\nthere? "}]
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": asked}],
        [SYSTEM, {"role": "user", "content": asked[::-1]}],
        [
            {"role": "user", "content": "Nothing shown."},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": [*asked, IMAGE]},
            {"role": "assistant", "content": "That."},
            {"role": "user", "content": "Why?"},
        ],
    ]
    render = processor.apply_chat_template
    for messages in map(normalise_messages, conversations):
        found = questions_in(render(messages, add_generation_prompt=True), render)
        known = name_of(processor) not in ("plain", "bare")
        if name_of(processor) == "mistral" and messages[0]["role"] == "system":  # part of the first question
            known = False
        assert found == (picture_queries(messages) if known else None)
    assert questions_in("<image> a text of another template", render) is None


def test_a_picture_of_a_message_has_one_of_four_names(processor: FoveateProcessor, tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    picture(30, 40).save(path)
    code = base64.b64encode(path.read_bytes()).decode()
    expected = processor.image_processor(picture(30, 40))["pixel_values"]
    for part in (
        {"image": picture(30, 40)},
        {"image": str(path)},
        {"path": path},
        {"url": path.as_uri()},
        {"url": f"data:image/png;base64,{code}", "image": None},
        {"base64": code},
        {"base64": f"data:image/png;base64,{code}"},
        {"base64": code.encode()},
        {"image": {"bytes": path.read_bytes(), "path": None}},
    ):
        content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected)
        assert (
            processor.prompt(messages).ids[: len(inputs["input_ids"][0])] == inputs["input_ids"][0].tolist()
        )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"type": "video", "video": "a.mp4"}], "not of type 'video'"),
        ([{"type": "input_image", "image_url": "a.png"}], "not of type 'input_image'"),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}], "not of type 'image_url'"),
        ([{"type": "imgae", "image": "a.png"}], "not of type 'imgae'"),
        ([{"type": "text"}], "not of type 'text' without a text"),
        ([{"type": "text", "text": None}], "not of type 'text' without a text"),
        ([{"text": "What?"}], "a part of a message must be"),
        (["What?"], "a part of a message must be"),
        ([{"type": "image", "image": "a.png", "url": "b.png"}], "given twice, as image and url"),
        ([{"type": "image", "base64": 3}], "base64 of a picture must be a text, not int"),
        ([{"type": "image"}], "a picture's place without the picture"),
        (None, "content must be a text or a list of parts, not None"),
    ],
)
def test_parts_that_are_none(processor: FoveateProcessor, content: Any, problem: str) -> None:
    with pytest.raises(FoveateError, match=problem):
        processor.prompt([{"role": "user", "content": content}])
