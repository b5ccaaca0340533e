"""What the page does, without the page: questions streamed by several models, drawings, costs in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextStreamer

from foveate.ask.answer import Answer, Ledger
from foveate.ask.conversation import Chat
from foveate.ask.foveate import Foveate
from foveate.errors import FoveateError
from foveate.explaining.explanation import SeenView
from foveate.picture.drawing import mark_regions
from foveate.picture.fetching import named
from foveate.picture.geometry import Box
from foveate.picture.limits import Limits
from foveate.picture.reading import read_picture

SIDE = 1200  # pixels of a drawn picture, at most
VIEW_SIDE = 448  # of a view in the gallery
EMBEDDED = "embedded"
COSTS = {
    "views": "views",
    "encoded_views": "views encoded now",
    "visual_tokens": "visual tokens",
    "prompt_tokens": "prompt tokens read",
    "kept_tokens": "prompt tokens remembered",
    "new_tokens": "tokens written",
    "tflop": "TFLOP",
    "kv_megabytes": "KV cache, MB",
}


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Attributes:
        max_new_tokens: bound on each answer.
        temperature: of sampling; 0 writes the most likely tokens.
        remember: whether a question sees what was said before.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    remember: bool = False

    @property
    def generation(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


@dataclass
class Talk:
    """What one visitor has asked one model about one picture.

    Attributes:
        model: its name.
        path: the picture's file.
        chat: the conversation of the last answer.
        said: questions and answers, as messages of the page.
    """

    model: str
    path: str
    chat: Chat
    said: list[dict[str, str]] = field(default_factory=list)


class Stop:
    """A stopping criterion of `generate`: when the visitor has left."""

    def __init__(self) -> None:
        self.wanted = Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((len(input_ids),), self.wanted.is_set(), device=input_ids.device)


class Pieces(TextStreamer):
    """Puts the pieces of one answer on a queue, with the number of who wrote them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, number: int, queue: SimpleQueue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.number, self.queue = number, queue

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """transformers calls this with each piece of the text."""
        self.queue.put((self.number, text))


def stream(talks: Sequence[Talk], question: str, settings: Settings) -> Iterator[tuple[int, str | Answer]]:
    """Asks all models at once: pieces of text as they come, and each whole answer at its end.

    Yields the talk's number with each. The models stop writing when the iterator is closed. What a model
    raises is raised here.
    """
    queue: SimpleQueue[tuple[int, str | Answer | BaseException]] = SimpleQueue()
    stop = Stop()

    def ask(number: int, talk: Talk) -> None:
        try:
            queue.put((number, _asked(number, talk, question, settings, queue, stop)))
        except BaseException as error:  # noqa: BLE001  it is raised where the answers are read
            queue.put((number, error))

    threads = [Thread(target=ask, args=pair, daemon=True) for pair in enumerate(talks)]
    for thread in threads:
        thread.start()
    waiting = len(threads)
    try:
        while waiting:
            number, got = queue.get()
            if isinstance(got, BaseException):
                raise got
            waiting -= isinstance(got, Answer)
            yield number, got
    finally:
        stop.wanted.set()
        for thread in threads:
            thread.join()


def _asked(
    number: int, talk: Talk, question: str, settings: Settings, queue: SimpleQueue[Any], stop: Stop
) -> Answer:
    engine = talk.chat.engine
    if not settings.remember:
        talk.chat = Chat(engine, talk.chat.picture)
    generation = {**settings.generation, "stopping_criteria": StoppingCriteriaList([stop])}
    if engine.model.generation_config.num_beams in (None, 1):
        generation["streamer"] = Pieces(engine.processor.tokenizer, number, queue)
    return talk.chat.ask(question, **generation)


def read(path: str, limits: Limits, model: Foveate) -> Image.Image:
    """An uploaded picture. Raises `FoveateError` that names the file, not where it was put."""
    try:
        return read_picture(path, limits, model.processor.image_processor.transparency)
    except FoveateError as error:
        raise FoveateError(str(error).replace(named(path), named(Path(path).name))) from error


def layers(talk: Talk) -> dict[str, list[Box]]:
    """What can be drawn over the picture, by name: each view, and each region or chain that was chosen."""
    found: dict[str, list[Box]] = {}
    for number, view in enumerate(talk.chat.views(), 1):
        found[f"{number} {view.role}"] = [view.box]
    answer = talk.chat.last
    if answer is None:
        return found
    if answer.chains:
        return found | {f"chain {chain.name}": chain.boxes for chain in answer.chains}
    if answer.account.regions is not None:
        found |= {f"region {number}": [box] for number, box in enumerate(answer.regions, 1)}
    return found


def switched_on(names: Sequence[str]) -> list[str]:
    """The layers that are drawn at first: what was chosen, else all views."""
    chosen = [name for name in names if name.startswith(("region ", "chain "))]
    return chosen or list(names)


def drawn(picture: Image.Image, shown: Mapping[str, Sequence[Box]]) -> Image.Image:
    """The picture with the boxes of some layers and their numbers; the steps of one chain have arrows."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    scales = (small.width / picture.width, small.height / picture.height) * 2
    boxes, names = [], []
    for layer, parts in shown.items():
        for step, box in enumerate(parts, 1):
            boxes.append(Box(*(float(n) * scale for n, scale in zip(box, scales, strict=True))))
            names.append(f"{layer.split()[1]}.{step}" if layer.startswith("chain ") else _number(layer))
    return mark_regions(small, boxes, SIDE, SIDE, arrows=len(shown) == 1 and len(boxes) > 1, names=names)


def _number(layer: str) -> str:
    """The number in a layer's name: views begin with it, and regions end with it."""
    first, last = layer.split()[0], layer.split()[-1]
    return first if first.isdigit() else f"region {last}"


def pictures(views: Sequence[SeenView]) -> list[tuple[Image.Image, str]]:
    """The views as the model was shown them, not larger than `VIEW_SIDE`, with captions."""
    found = []
    for number, view in enumerate(views, 1):
        if view.picture is not None:
            small = view.picture.copy()
            small.thumbnail((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BICUBIC)
            found.append((small, f"{number} {view.role}"))
    return found


def costs(ledger: Ledger) -> dict[str, str]:
    """What an answer cost, in words and numbers."""
    known = vars(ledger)
    told = {words: f"{known[name]:.4g}" for name, words in COSTS.items()}
    return told | {f"seconds to {phase}": f"{seconds:.2f}" for phase, seconds in ledger.seconds.items()}


def names_of(models: Sequence[str | None]) -> list[str]:
    """What models are called on the page: folders by their own names, not by where they lie."""
    names: list[str] = []
    for model in models:
        name = EMBEDDED if model is None else Path(model).resolve().name if Path(model).is_dir() else model
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names
