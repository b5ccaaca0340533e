"""OpenAI's chat completions: what a request may hold, and what an answer looks like.

Fields that would change the answer and are not done here are refused by their names, as unknown ones are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from foveate.serve.course import Completed, Look, Messages
from foveate.serve.http import Refused
from foveate.serve.settings import MOST_ENDS, MOST_LIKELY, Settings, Token

MOST_MESSAGES = 1024
LONGEST_END = 256  # characters
T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """Values are of the types that are named, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "high"] = "auto"  # the method decides how much of a picture is seen


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(Strict):
    role: Literal["user"]
    content: str | list[Part]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | list[TextPart]
    refusal: None = None  # official clients send an answer back as they got it
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Nothing = None | Annotated[list[Any], Field(max_length=0)]


End = Annotated[str, Field(min_length=1, max_length=LONGEST_END)]
Ends = Annotated[
    list[End],
    Field(max_length=MOST_ENDS),
    BeforeValidator(lambda ends: [ends] if isinstance(ends, str) else ends),
]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """The body of a request to /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Ends | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    # Taken at the values that change nothing, which `NEUTRAL` names.
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # About the client, not the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def settings(self, most: int) -> Settings:
        """How the answer is written.

        Args:
            most: tokens of an answer where the request says nothing.

        Raises:
            Refused: fields that contradict each other.
        """
        bounds = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(bounds) > 1:
            raise Refused(
                400,
                "max_tokens and max_completion_tokens are two names of one bound: give one",
                param="max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise Refused(400, "stream_options needs stream: true", param="stream_options")
        return Settings(
            max_new_tokens=next(iter(bounds), None) or most,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            ends=tuple(self.stop or ()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """The URLs of the pictures, each with the name of its field."""
        return [
            (part.image_url.url, f"messages[{i}].content[{j}].image_url.url")
            for i, message in enumerate(self.messages)
            if not isinstance(message.content, str)
            for j, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]

    def conversation(self, pictures: Sequence[Any]) -> Messages:
        """The messages as the model gets them, with these pictures at the places of their URLs."""
        waiting = iter(pictures)
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    {"type": "image", "image": next(waiting)}
                    if isinstance(part, ImagePart)
                    else {"type": "text", "text": part.text}
                    for part in _parts(message.content)
                ],
            }
            for message in self.messages
        ]


# Fields that are not done here -> what they may hold, as it changes nothing.
NEUTRAL = {
    "n": "1",
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "logit_bias": "{}",
    "response_format": '{"type": "text"}',
    "modalities": '["text"]',
    "tools": "[]",
    "tool_choice": '"none"',
    "functions": "[]",
    "store": "false",
    "service_tier": '"auto"',
}


def _parts(content: Any) -> list[Any]:
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def parsed(kind: type[T], value: Any) -> T:
    """A request's body as the class that describes it. Raises `Refused` that names a wrong field."""
    try:
        return kind.model_validate(value)
    except ValidationError as found:
        errors = found.errors(include_url=False, include_input=False)
    error = max(errors, key=lambda one: len(one["loc"]))  # of a union, the member that fits best
    param = _named(error["loc"])
    if error["type"] == "extra_forbidden" or str(error["loc"][0]) in NEUTRAL:
        only = NEUTRAL.get(param.partition("[")[0].partition(".")[0])
        rest = "" if only is None else f": leave it out, or give {only}"
        raise Refused(400, f"{param} is not supported{rest}", code="unsupported_parameter", param=param)
    said = error["msg"][:1].lower() + error["msg"][1:]
    raise Refused(400, f"{param or 'the request'}: {said}", param=param or None)


def _named(place: Sequence[int | str]) -> str:
    """The place of a field, without the names that pydantic gives to the members of unions."""
    name, before = "", place[0]
    for step in place:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not (isinstance(before, int) or step == "str" or "[" in step or "(" in step):
            name += f".{step}" if name else step
        before = step
    return name


class Answers:
    """Writes one answer in OpenAI's form.

    Args:
        name: of the answer.
        model: as the server calls it.
        created: seconds since 1970.
        tokenizer: of the LLM, for the texts of tokens.
    """

    def __init__(self, name: str, model: str, created: int, tokenizer: Any) -> None:
        self.head = {"id": name, "created": created, "model": model}
        self.tokenizer = tokenizer

    def whole(self, done: Completed, logprobs: bool) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": done.finish,
                    "logprobs": self._logprobs(done.tokens) if logprobs else None,
                }
            ],
            "usage": usage(done),
            "foveate": looks(done),
        }

    def piece(
        self, text: str | None, tokens: Sequence[Token] | None, usage_follows: bool, role: bool = False
    ) -> dict[str, Any]:
        """A piece of it.

        Args:
            text: that has come; None for none.
            tokens: that have come, if their probabilities are wanted.
            usage_follows: whether a piece with the usage will come.
            role: whether it says whose the answer is.
        """
        delta: dict[str, Any] = {"role": "assistant"} if role else {}
        delta |= {} if text is None else {"content": text}
        return self._chunk(delta, None, None if tokens is None else self._logprobs(tokens), usage_follows)

    def last(self, done: Completed, usage_follows: bool) -> dict[str, Any]:
        """The end of an answer in pieces, with where the model looked."""
        return {**self._chunk({}, done.finish, None, usage_follows), "foveate": looks(done)}

    def used(self, done: Completed) -> dict[str, Any]:
        """A piece with the usage alone."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(done)}

    def _chunk(
        self, delta: dict[str, Any], finish: str | None, logprobs: Any, usage_follows: bool
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        rest = {"usage": None} if usage_follows else {}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **rest}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*one) for one in token.likeliest],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text: str = self.tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def usage(done: Completed) -> dict[str, Any]:
    """What an answer took: tokens of the prompt, visual ones apart, and tokens that were written."""
    written = done.ledger.new_tokens
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": done.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens, "image_tokens": done.visual_tokens},
        "completion_tokens_details": {"reasoning_tokens": done.inner_tokens},
    }


def looks(done: Completed) -> dict[str, Any]:
    """Where the model looked, and what it cost: the field `foveate` of an answer."""
    return {
        "regions": list(_boxes(done.regions)),
        "views": list(_boxes(done.views)),
        "notes": done.notes,
        "ledger": asdict(done.ledger),
    }


def _boxes(looks: Sequence[Look]) -> Iterator[dict[str, Any]]:
    for look in looks:
        yield {"picture": look.picture, "box": list(look.box.rounded())}
