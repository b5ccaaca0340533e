"""A closer look in OpenAI's protocol: requests from what is asked, answers from what a server says.

Servers differ in what they take. `Dialect` begins with everything that is of use, and leaves out what a
server refuses: probabilities, tools, pictures in a tool's result. No torch, and no HTTP.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from PIL import Image

from foveate.errors import FoveateError
from foveate.picture.boxes import box_format
from foveate.picture.geometry import Size
from foveate.picture.reading import Transparency
from foveate.zoom.asking import Ask, Messages, Said
from foveate.zoom.tools import convention, in_tags, told_call, with_tools

STEP = 28  # pixels: models that count boxes in pixels round a picture's sides to this
COUNTED = 1280 * STEP * STEP  # most pixels of a picture in which such boxes are asked for
REFUSALS = (400, 422)  # statuses with which servers refuse what they do not know
TRANSIENT = (401, 403, 404, 408, 409, 425, 429)  # not about the question; so is all from 500 on
NEXT = "The crop is in the next message."
FAST = 1  # level of PNG's compression: pictures on their way need no smaller files


@dataclass(frozen=True)
class Served:
    """What one must know of a model on a server: it cannot be read from the model, as here.

    Attributes:
        form: name of the box format that the model was trained to write.
        convention: name of the tool convention that it was trained on.
        transparency: what transparent pictures show to it.
    """

    form: str = "unit_xyxy"
    convention: str = "qwen3_vl"
    transparency: Transparency = "white"

    def __post_init__(self) -> None:
        box_format(self.form)
        convention(self.convention)

    def drawn(self, picture: Image.Image) -> tuple[Image.Image, Size]:
        """A copy whose sides a server need not round, so that boxes in pixels count those of the copy."""
        width, height = picture.size
        scale = min(1.0, math.sqrt(COUNTED / (width * height)))
        sides = [max(STEP, math.floor(n * scale / STEP) * STEP) for n in (width, height)]
        return picture.resize((sides[0], sides[1]), Image.Resampling.BICUBIC), Size(sides[1], sides[0])


@dataclass(frozen=True)
class Dialect:
    """What a server takes.

    Attributes:
        logprobs: whether it is asked for probabilities.
        tools: whether tools go into the request; else a system message offers them.
        pictures: whether a tool's result holds the crop; else a message of the user's after it.
    """

    logprobs: bool = True
    tools: bool = True
    pictures: bool = True

    def after(self, refusal: str, ask: Ask) -> Dialect | None:
        """The dialect to try next, once a server has refused a request in this one; None if there is none.

        Args:
            refusal: what the server says.
            ask: what was asked.
        """
        about = refusal.lower()
        results = any(message["role"] == "tool" for message in ask.messages)
        if self.logprobs and "logprob" in about:
            return replace(self, logprobs=False)
        if self.pictures and results:
            return replace(self, pictures=False)
        if self.tools and ask.tools and ("tool" in about or "function" in about):
            return replace(self, tools=False)
        return None


def request(ask: Ask, dialect: Dialect) -> dict[str, Any]:
    """The part of a request's body that is about what is asked: `messages`, `tools`, `logprobs`."""
    messages, body = ask.messages, dict[str, Any]()
    if ask.tools and dialect.tools:
        body["tools"] = [dict(tool) for tool in ask.tools]
    elif ask.tools:
        messages = with_tools(messages, ask.tools)
    if dialect.logprobs and not ask.where:
        body["logprobs"] = True
    return {"messages": _written(messages, dialect), **body}


def _written(messages: Messages, dialect: Dialect) -> Messages:
    """A conversation as servers read it. Pictures become data URLs; what is in no form of ours stays."""
    written: Messages = []
    crops: list[dict[str, Any]] = []  # of results, for the message after them
    for message in messages:
        told = message["role"] == "tool" and "tool_call_id" in message
        if crops and not told:
            written, crops = [*written, {"role": "user", "content": in_tags(crops)}], []
        content = message.get("content")
        if not isinstance(content, list):
            written.append(message)
            continue
        content = [_part(part) for part in content]
        if message["role"] == "tool" and not told:  # a call that the server did not tell from the text
            message, content = {"role": "user"}, in_tags(content)
        elif told:
            texts = [part["text"] for part in content if _is_text(part)]
            pictures = [part for part in content if not _is_text(part)]
            if not pictures:
                content = "\n".join(texts)
            elif not dialect.pictures:
                content, crops = "\n".join([NEXT, *texts]), [*crops, *pictures]
        elif message["role"] == "assistant" and all(map(_is_text, content)):
            content = "".join(part["text"] for part in content)
        written.append({**message, "content": content})
    return [*written, {"role": "user", "content": in_tags(crops)}] if crops else written


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _part(part: Any) -> Any:
    if (
        isinstance(part, Mapping)
        and part.get("type") == "image"
        and isinstance(part.get("image"), Image.Image)
    ):
        return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
    return part


def data_url(picture: Image.Image) -> str:
    """A picture as the data URL of a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=FAST)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def said(body: bytes | Mapping[str, Any]) -> Said:
    """What a server's answer says. Raises `FoveateError` for what is no answer."""
    value: Any = body
    if isinstance(body, bytes):
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise FoveateError("gave an answer that is not JSON") from None
    try:
        choice = value["choices"][0]
        message = choice["message"]
        content, calls = message.get("content"), message.get("tool_calls") or []
        told = tuple(told_call(c["function"]["name"], c["function"]["arguments"], c["id"]) for c in calls)
    except (LookupError, TypeError, AttributeError):
        raise FoveateError("gave an answer without choices") from None
    if not isinstance(content, str):
        if content is not None or not told:
            raise FoveateError("gave an answer without text")
        content = ""
    return Said(content.strip(), confidence(choice), used(value, "completion_tokens"), told)


def confidence(choice: Mapping[str, Any]) -> float | None:
    """Mean probability of the tokens of a choice; None if it does not tell them."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    return mean_probability(tokens) if isinstance(tokens, Sequence) else None


def mean_probability(tokens: Sequence[Any]) -> float | None:
    """Mean probability of tokens with their `logprob`; None if there are none."""
    try:
        return fmean(math.exp(min(float(token["logprob"]), 0.0)) for token in tokens) if tokens else None
    except (LookupError, TypeError, ValueError):
        return None


def used(value: Mapping[str, Any], what: str) -> int | None:
    """A count in an answer's `usage`; None if it is not told."""
    usage = value.get("usage")
    count = usage.get(what) if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None
