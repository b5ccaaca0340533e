"""A VLM behind a server of OpenAI's protocol, asked as one here: vLLM, SGLang, llama.cpp, a hosted API.

The official client sends the requests and repeats those that failed in passing; an answer is bounded in time
and in bytes, however slowly or endlessly it comes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

from PIL import Image

from foveate.errors import FoveateError, check_text, first_line, require
from foveate.picture.geometry import Size
from foveate.picture.reading import Transparency
from foveate.zoom.asking import Ask, Messages, Said, Tool, Unavailable
from foveate.zoom.wire import REFUSALS, TRANSIENT, Dialect, Served, request, said

SECONDS = 600.0
SERVED = Served()
MOST_BYTES = 2**26  # of an answer
MOST_AT_ONCE = 64  # requests


class Server:
    """A model behind a server of OpenAI's protocol.

    Args:
        url: up to and with `/v1`.
        name: of the model there.
        key: for servers that ask for one.
        served: how the model writes boxes and calls tools.
        seconds: bound on a request, answer included.
        retries: how often a request is repeated that failed in passing: no connection, 408, 409, 429, 5xx.

    Raises:
        FoveateError: not an http address, the client missing.
    """

    def __init__(
        self,
        url: str,
        name: str,
        key: str | None = None,
        *,
        served: Served = SERVED,
        seconds: float = SECONDS,
        retries: int = 2,
    ) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise FoveateError(f"{url!r} is not the address of a server: http://host:port/v1")
        check_text(name, "the name of the server's model")
        if not seconds > 0 or retries < 0:
            raise FoveateError(f"seconds must be above 0 and retries at least 0, not {seconds} and {retries}")
        require("openai", "openai", "questions to a server")
        import openai

        self.url, self.name, self.served = url, name, served
        self.seconds, self.retries = seconds, retries
        self.client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=seconds, max_retries=retries)
        self.dialect = Dialect()

    @property
    def transparency(self) -> Transparency:
        kind: Transparency = self.served.transparency
        return kind

    @property
    def form(self) -> str:
        return self.served.form

    @property
    def convention(self) -> str:
        return self.served.convention

    def drawn(self, picture: Image.Image) -> tuple[Image.Image, Size]:
        return self.served.drawn(picture)

    def check_question(self, question: str) -> None:
        """Raises `FoveateError` for an empty text."""
        check_text(question, "the question")

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 256,
        tools: Sequence[Tool] = (),
        probabilities: bool = True,
        **settings: Any,
    ) -> list[Said]:
        """The model's replies, several at once; greedily unless `settings`, of the request, say otherwise.

        Args:
            conversations: as for `VLM.answer`.
            max_new_tokens: bound on each reply.
            tools: that the model may call.
            probabilities: whether the server is asked for those of the tokens.
            **settings: further fields of the request: `temperature`, `seed`, `extra_body`.

        Raises:
            Unavailable: no server, or one that does not answer now.
            FoveateError: a server that refuses the question, or whose answer makes no sense.
        """
        if "streamer" in settings:
            raise FoveateError("streamer: the answers of a server are not streamed; leave it out")
        if "do_sample" in settings or "generation_config" in settings:
            raise FoveateError("do_sample and generation_config are for models here: give temperature, top_p")

        def reply(messages: Messages) -> Said:
            ask = Ask(messages, tools=tuple(tools), where=not probabilities)
            return self._reply(ask, {"max_tokens": max_new_tokens, "temperature": 0.0, **settings})

        if len(conversations) == 1:
            return [reply(conversations[0])]
        with ThreadPoolExecutor(min(MOST_AT_ONCE, max(len(conversations), 1))) as pool:
            return list(pool.map(reply, conversations))

    def _reply(self, ask: Ask, settings: dict[str, Any]) -> Said:
        import openai

        while True:
            dialect = self.dialect
            try:
                return said(self._body({**request(ask, dialect), **settings}, self.retries))
            except openai.APIStatusError as error:
                other = dialect.after(str(error), ask) if error.status_code in REFUSALS else None
                if other is not None:
                    self.dialect = other
                    continue
                passing = error.status_code in TRANSIENT or error.status_code >= 500
                kind = Unavailable if passing else FoveateError
                raise kind(f"{self.url} gave no answer: {first_line(error)}") from error
            except openai.OpenAIError as error:
                raise Unavailable(f"{self.url} gave no answer: {first_line(error)}") from error
            except FoveateError as error:
                raise type(error)(f"{self.url} {error}") from error

    def _body(self, body: dict[str, Any], retries: int) -> bytes:
        """The bytes of an answer, within the bounds on time and size; asked again if it breaks off."""
        import openai

        end, content = time.monotonic() + self.seconds, bytearray()
        create: Any = self.client.chat.completions.with_streaming_response.create
        try:
            with create(model=self.name, **body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > MOST_BYTES:
                        raise Unavailable(f"gave an answer of more than {MOST_BYTES} bytes")
                    if time.monotonic() > end:
                        raise Unavailable(f"gave no answer within {self.seconds:g} s")
        except (openai.OpenAIError, FoveateError):
            raise
        except _broken() as error:
            if retries:
                return self._body(body, retries - 1)
            raise Unavailable(f"gave an answer that broke off: {first_line(error)}") from error
        return bytes(content)


def _broken() -> type[Exception]:
    """What the client lets through when a connection breaks while an answer is read.

    It is an error of the HTTP library that the client is built on, which is not the same in all its versions.
    """
    import openai

    library = openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]
    kind: type[Exception] = import_module(library).HTTPError
    return kind
