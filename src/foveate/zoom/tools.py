"""The conventions in which models that were trained to look closer ask for a crop: by calling a tool.

One entry of `CONVENTIONS` each: the tool's name and arguments, what the numbers of a box mean, and how the
crop is given back. All three write a call as JSON in <tool_call>. No torch.

    qwen3_vl         Qwen3-VL. The tool is `image_zoom_in_tool` of Qwen-Agent (its file
                     `qwen_agent/tools/image_zoom_in_qwen3vl.py`), which the cookbook `think_with_images` of
                     Qwen3-VL's repository uses: `bbox_2d` in thousandths of the picture that `img_idx`
                     numbers from 0, the crops counted on, and `label`. The crop is the tool's result, which
                     the model's own chat template writes.
    deepeyes         DeepEyes (arXiv 2505.14362), on Qwen2.5-VL: the same name, `bbox_2d` in pixels of the
                     picture as the model is shown it, always of the first picture. The crop comes in a
                     message of the user's, in <tool_response>, and the answer is written in <answer>. The
                     schema is in its file `verl/workers/agent/envs/mm_process_engine/prompt.py`.
    pixel_reasoner   Pixel Reasoner (arXiv 2505.15966), on Qwen2.5-VL: `crop_image_normalized`, with
                     `bbox_2d` from 0 to 1 of the picture that `target_image` numbers from 1. The crop comes
                     in a message of the user's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from foveate.errors import FoveateError
from foveate.picture.boxes import BoxFormat, Frame, ReadBox, Scale, read_box
from foveate.zoom.asking import Call, Messages, Said, Tool

OPENING, CLOSING = "<tool_call>", "</tool_call>"
RESPONSE = ("<tool_response>\n", "\n</tool_response>")
LAST = "This was the last closer look: answer the question now."
LONGEST = 20  # calls of one reply that are looked at


@dataclass(frozen=True)
class Convention:
    """How a model asks for a crop by calling a tool, and gets it.

    Attributes:
        name: of the tool.
        about: what the tool does, for the model.
        arguments: its arguments and their JSON schemas.
        required: those that must be there.
        box: the argument that holds left, top, right, bottom.
        scale: of its numbers.
        picture: the argument that numbers the picture to be cropped; None: always the first.
        first: the number of the first picture; each crop has the next one.
        role: of the message that gives the crop back: `tool`, or `user`, in <tool_response>.
        answer: tags around the final answer; None: it has none.
    """

    name: str
    about: str
    arguments: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]
    box: str = "bbox_2d"
    scale: Scale = "thousand"
    picture: str | None = None
    first: int = 0
    role: Literal["tool", "user"] = "tool"
    answer: tuple[str, str] | None = None
    form: BoxFormat = field(init=False, repr=False)

    def __post_init__(self) -> None:
        unknown = {
            self.box,
            *self.required,
            *([self.picture] if self.picture else []),
        } - self.arguments.keys()
        if unknown:
            raise FoveateError(f"a convention's arguments lack {', '.join(sorted(unknown))}")
        if self.role not in ("tool", "user"):
            raise FoveateError(f"role must be tool or user, not {self.role!r}")
        object.__setattr__(self, "form", BoxFormat("xyxy", self.scale, "[{}, {}, {}, {}]"))

    @property
    def tool(self) -> Tool:
        """Its schema, as chat templates and servers take it."""
        arguments = {name: dict(schema) for name, schema in self.arguments.items()}
        parameters = {"type": "object", "properties": arguments, "required": list(self.required)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.about, "parameters": parameters},
        }

    def read(self, call: Call, frames: Sequence[Frame]) -> tuple[int, ReadBox]:
        """The place among `frames` of the picture that a call is about, and the box in its pixels.

        Args:
            call: of the model.
            frames: of the pictures that it has been shown, in order.
        """
        if call.arguments is None:
            return 0, ReadBox(None, call.problem or "its arguments cannot be read")
        if call.name != self.name:
            return 0, ReadBox(None, f"there is no tool {call.name!r:.60}, only {self.name}")
        place = 0
        if self.picture is not None and self.picture in call.arguments:
            number = call.arguments[self.picture]
            place = -1
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number == number // 1:
                place = int(number) - self.first
            if not 0 <= place < len(frames):
                last = self.first + len(frames) - 1
                return 0, ReadBox(None, f"{self.picture} must be a number from {self.first} to {last}")
        if self.box not in call.arguments:
            return place, ReadBox(None, f"the argument {self.box} is missing")
        found = read_box(json.dumps(call.arguments[self.box])[:1000], self.form, frames[place])
        if found.problem is not None:
            return place, ReadBox(None, f"{self.box}: {found.problem}")
        return place, found

    def reply(self, said: Said) -> dict[str, Any]:
        """The model's own message, for the conversation to go on after it."""
        if not said.calls:
            return {"role": "assistant", "content": [{"type": "text", "text": said.text}]}
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments or {}))},
            }
            for call in said.calls
        ]
        text = [{"type": "text", "text": said.text}] if said.text else []
        return {"role": "assistant", "content": text, "tool_calls": calls}

    def result(self, call: Call, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The message that gives a call's result to the model.

        Args:
            call: whose result it is; calls that a server has told apart are answered in the role `tool`.
            parts: the crop, or a text.
        """
        if call.id is not None:
            return {"role": "tool", "tool_call_id": call.id, "content": [dict(part) for part in parts]}
        if self.role == "tool":
            return {"role": "tool", "name": self.name, "content": [dict(part) for part in parts]}
        return {"role": "user", "content": in_tags(parts)}

    def final(self, text: str) -> str:
        """The answer in the model's last reply, without its thoughts and tags."""
        text = text.rpartition("</think>")[2]
        if self.answer is not None:
            opening, closing = self.answer
            before, found, after = text.rpartition(opening)
            text = after.partition(closing)[0] if found else before or after
        return text.strip()


def in_tags(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A tool's result in a message of the user's: its parts between tags."""
    opening, closing = ({"type": "text", "text": tag} for tag in RESPONSE)
    return [opening, *(dict(part) for part in parts), closing]


_CALL = re.compile(rf"{OPENING}(.*?)(?:{CLOSING}|(?={OPENING})|\Z)", re.DOTALL)


def calls_in(text: str) -> list[Call]:
    """The calls that a model has written in its text: JSON with `name` and `arguments`, in <tool_call>."""
    spoken = text.rpartition("</think>")[2].partition("<think>")[0]
    return [_call(found[1]) for found in _CALL.finditer(spoken)][:LONGEST]


def _call(text: str) -> Call:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Call("", None, "the call is not JSON")
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return Call("", None, "the call must be a JSON object with name and arguments")
    return told_call(name, value.get("arguments"))


def told_call(name: str, arguments: Any, id: str | None = None) -> Call:
    """A call of this name; its arguments are an object, or its JSON."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return Call(name, None, "its arguments are not JSON", id)
    if not isinstance(arguments, dict):
        return Call(name, None, "its arguments must be a JSON object", id)
    return Call(name, arguments, None, id)


def with_tools(messages: Messages, tools: Sequence[Tool]) -> Messages:
    """A conversation whose system message offers tools, for templates and servers that take none."""
    listed = "\n".join(json.dumps(tool) for tool in tools)
    offer = (
        f"You may call tools to help you answer. These are the tools:\n<tools>\n{listed}\n</tools>\n\n"
        f'To call one, write its name and its arguments as JSON:\n{OPENING}\n{{"name": <name>, "arguments": '
        f"<object>}}\n{CLOSING}"
    )
    if messages and messages[0]["role"] == "system":
        content = messages[0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        return [{**messages[0], "content": [*parts, {"type": "text", "text": f"\n\n{offer}"}]}, *messages[1:]]
    return [{"role": "system", "content": [{"type": "text", "text": offer}]}, *messages]


_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
_LABEL = {"type": "string", "description": "What is inside the box."}
_ABOUT = "Zooms in on a region of a picture: crops it to a box."
_CORNERS = "The box of the region, [x1, y1, x2, y2]: its top left and its bottom right corner"

CONVENTIONS: dict[str, Convention] = {
    "qwen3_vl": Convention(
        name="image_zoom_in_tool",
        about=_ABOUT,
        arguments={
            "bbox_2d": {**_NUMBERS, "description": f"{_CORNERS}, in thousandths of the picture."},
            "label": _LABEL,
            "img_idx": {"type": "number", "description": "The number of the picture, from 0."},
        },
        required=("bbox_2d", "label", "img_idx"),
        picture="img_idx",
    ),
    "deepeyes": Convention(
        name="image_zoom_in_tool",
        about=_ABOUT,
        arguments={"bbox_2d": {**_NUMBERS, "description": f"{_CORNERS}, in pixels."}, "label": _LABEL},
        required=("bbox_2d",),
        scale="pixels",
        role="user",
        answer=("<answer>", "</answer>"),
    ),
    "pixel_reasoner": Convention(
        name="crop_image_normalized",
        about=_ABOUT,
        arguments={
            "bbox_2d": {**_NUMBERS, "description": f"{_CORNERS}, each from 0 to 1."},
            "target_image": {"type": "number", "description": "The number of the picture, from 1."},
        },
        required=("bbox_2d", "target_image"),
        scale="unit",
        picture="target_image",
        first=1,
        role="user",
    ),
}


def convention(name: str) -> Convention:
    """The convention of this name. Raises `FoveateError` for unknown ones."""
    if name not in CONVENTIONS:
        raise FoveateError(f"unknown tool convention {name!r}: choose one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
