"""What a closer look asks of a model, wherever the model is: here (`vlm.VLM`) or on a server.

A look is a generator: it yields an `Ask` and is sent what was `Said`. It knows neither transformers nor HTTP,
so the same one runs in a notebook (`answered`), over a server and, without a thread waiting, in a proxy. No
torch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL import Image

from foveate.errors import FoveateError
from foveate.picture.geometry import Size
from foveate.picture.reading import Transparency

Messages = list[dict[str, Any]]
Tool = Mapping[str, Any]  # its JSON schema, as chat templates and OpenAI's protocol take it
T = TypeVar("T")


class Unavailable(FoveateError):
    """Whoever is asked does not answer now, whatever the question: a server that is down or refuses a key."""


@dataclass(frozen=True)
class Call:
    """A call of a tool, as a model has written it.

    Attributes:
        name: of the tool.
        arguments: by name; None if they cannot be read.
        problem: why they cannot be read.
        id: by which a server knows the call; None where it was written in the text.
    """

    name: str
    arguments: Mapping[str, Any] | None
    problem: str | None = None
    id: str | None = None


class Said(NamedTuple):
    """An answer and its confidence.

    Attributes:
        text: without special tokens.
        confidence: mean probability of its tokens, including the one that ends it; None if a server does not
            tell probabilities.
        tokens: how many it wrote; None if unknown.
        calls: of tools, where a server has told them apart from the text.
        ids: the tokens themselves, of a model that is here.
    """

    text: str
    confidence: float | None
    tokens: int | None = None
    calls: tuple[Call, ...] = ()
    ids: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Text and confidence, for JSON."""
        return {"text": self.text, "confidence": self.confidence}


@dataclass(frozen=True)
class Ask:
    """One request to a model.

    Attributes:
        messages: the conversation, which waits for the model's reply.
        most: bound on the reply's length in tokens, beside the caller's on answers.
        tools: that the model may call.
        where: whether it asks only where to look: greedily, whatever the caller's settings for answers.
        last: whether the reply is the answer to the caller's question, and nothing follows.
    """

    messages: Messages
    most: int | None = None
    tools: tuple[Tool, ...] = ()
    where: bool = False
    last: bool = False


Steps = Generator[Ask, Said, T]


class Sight(Protocol):
    """What one must know of a model to ask it where to look."""

    @property
    def transparency(self) -> Transparency:
        """What transparent pictures show to it, as in `read_picture`."""

    @property
    def form(self) -> str:
        """The name of the `BoxFormat` that it was trained to write."""

    @property
    def convention(self) -> str:
        """The name of the `foveate.zoom.tools.Convention` that it was trained on."""

    def drawn(self, picture: Image.Image) -> tuple[Image.Image, Size]:
        """A picture as it is to be given, and the size in which boxes of formats in pixels count then."""


class Model(Sight, Protocol):
    """A model that is asked and waited for."""

    def check_question(self, question: str) -> None:
        """Raises `FoveateError` for a question that it cannot be asked."""

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 256,
        tools: Sequence[Tool] = (),
        **generation: Any,
    ) -> list[Said]:
        """Its replies to conversations."""


def answered(model: Model, steps: Steps[T], max_new_tokens: int, **generation: Any) -> T:
    """Runs steps to their end with a model that is waited for.

    A question that the model cannot be asked is an error inside the steps, which may go on without it.

    Args:
        model: is asked.
        steps: what to ask it.
        max_new_tokens: bound on each answer.
        **generation: further arguments of its `answer`, for answers only; `streamer` gets the last one alone.
    """
    quiet = {name: value for name, value in generation.items() if name != "streamer"}
    try:
        ask = next(steps)
        while True:
            settings = {} if ask.where else generation if ask.last else quiet
            if ask.tools:
                settings = {**settings, "tools": ask.tools}
            most = max_new_tokens if ask.most is None else min(ask.most, max_new_tokens)
            if ask.where and ask.most is not None:
                most = ask.most
            try:
                (said,) = model.answer([ask.messages], max_new_tokens=most, **settings)
            except FoveateError as error:
                ask = steps.throw(error)
                continue
            ask = steps.send(said)
    except StopIteration as end:
        result: T = end.value
        return result


def message(*parts: Image.Image | str, role: str = "user") -> Messages:
    """One message: pictures and texts, in order."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": role, "content": content}]
