"""Asking about pictures: load a model, ask, see where it looked and what it cost."""

from __future__ import annotations

import copy
import hashlib
import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.chat import IMAGE_TOKEN, picture_queries
from foveate.cost import Pricer
from foveate.errors import FoveateError
from foveate.explain import cut_view, draw
from foveate.geometry import Box, ViewPlan
from foveate.methods.base import Chain, Insight, Reply, Turn
from foveate.modeling import EncodedPictures, FoveateForConditionalGeneration
from foveate.pictures import Picture, read_picture, write_drawing
from foveate.processing import FoveateProcessor
from foveate.source import Look, Source
from foveate.turns import Context, Prompt, can_go_on
from foveate.versions import names_versions

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device() -> str:
    """`cuda`, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(device: str) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with AMX, float16 on MPS and on older GPUs, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "mps":
        return torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_tile", False) else torch.float32


EMBEDDED = Path(__file__).parent / "embedded"
# Arguments of `generate` that are about the answer's end and words, and would spoil a box on the way to it.
OF_ANSWERS = (
    *("streamer", "min_new_tokens", "min_length", "stop_strings", "stopping_criteria", "length_penalty"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id"),
    *("prefix_allowed_tokens_fn", "logits_processor", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *("begin_suppress_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "repetition_penalty"),
)
REMEMBERED_LOOKS = 48  # parts of a picture whose features are kept for further questions


@names_versions
def load(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    vision_tower: str | Path | None = None,
    method: str | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Foveate:
    """Loads a model for asking: Foveate's own folder, or a released checkpoint of any known layout.

    Args:
        model: folder or Hugging Face hub id; by default the embedded model, which has learnt the lab's
            coloured shapes and signs with letters, digits and words on them, and nothing else.
        device: by default the best there is.
        dtype: `float32`, `bfloat16` or `float16`; by default what is fast and safe on the device.
        vision_tower: folder or hub id of the vision tower, for original LLaVA checkpoints that keep it apart.
        method: a method other than the folder's own, with the same parameters.
        template: name of a chat template instead of the folder's own.
        options: changes to the method's options, for example `{"max_visual_tokens": 1000}`.

    Raises:
        FoveateError: no such folder, unknown layout, missing weights or tokenizer, wrong options.
    """
    device = device or choose_device()
    if device.partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise FoveateError(f"unknown device {device!r}: choose cuda, mps or cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FoveateError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise FoveateError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    model = EMBEDDED if model is None else model
    processor = FoveateProcessor.from_pretrained(
        model, vision_tower=vision_tower, method=method, template=template, options=options
    )
    network = FoveateForConditionalGeneration.from_pretrained(
        model,
        vision_tower=vision_tower,
        method=method,
        options=dict(options or {}),
        dtype=dtype or choose_dtype(device),
    )
    return Foveate(network.to(device).eval(), processor)


@dataclass
class Ledger:
    """What one answer cost.

    Attributes:
        views: pictures shown to the vision tower, those that came from the cache included.
        encoded_views: of them encoded now.
        visual_tokens: visual tokens that the LLM read, after a method dropped some.
        prompt_tokens: all tokens that the LLM read, visual ones included.
        kept_tokens: tokens of a prompt that it had read in an earlier turn and found in its cache.
        new_tokens: generated.
        tflop: vision, prefill and decoding, in 10^12 floating point operations.
        kv_megabytes: key and value cache after the longest prefill.
        seconds: wall time by phase: `prepare` (pictures to tensors), `encode`, `generate`.
    """

    views: int = 0
    encoded_views: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0
    tflop: float = 0.0
    kv_megabytes: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prepare": 0.0, "encode": 0.0, "generate": 0.0}
    )

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Answer:
    """The model's text, where it looked, and what it cost.

    Attributes:
        text: the answer.
        regions: parts of the picture that were looked at (left, top, right, bottom), original pixels.
        ledger: the costs.
        question: what was asked.
        picture: what it was asked about.
        plan: the views that the picture was cut into.
        heat: for methods that keep what matters to the question, parts of the picture in original pixels
            with a weight from 0 (dropped) to 1; else empty.
        chains: for methods that look at parts of the picture one after the other, these parts.
        crops: pictures that a method with several turns showed the model after the first one.
        notes: sentences about how the method came to the answer, for example why it found no region.
    """

    text: str
    regions: list[Box]
    ledger: Ledger
    question: str
    picture: Image.Image = field(repr=False)
    plan: ViewPlan = field(repr=False)
    heat: list[tuple[Box, float]] = field(repr=False)
    chains: list[Chain] = field(repr=False)
    crops: list[Image.Image] = field(repr=False)
    notes: list[str]
    _draw: Callable[[Answer], Image.Image] = field(repr=False)

    def show(self, out: str | Path | None = None) -> Image.Image:
        """A picture of what the model saw: regions and views. Also written to the file `out` if given."""
        drawing = self._draw(self)
        if out is not None:
            write_drawing(drawing, out)
        return drawing

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "question": self.question,
            "answer": self.text,
            "regions": [list(box.rounded()) for box in self.regions],
            "notes": self.notes,
            "ledger": asdict(self.ledger),
        }


@dataclass
class Seen:
    """A picture of a conversation as the LLM got it."""

    regions: list[Box] | None
    heat: Tensor | None
    chains: list[Chain]


@dataclass
class Talk:
    """A conversation that is going on: what was said, its pictures, and what it has cost."""

    messages: list[dict[str, Any]]
    seen: list[Seen]
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class _Shown:
    """A picture in a prompt, with the question that a connector reads with it, (T,) or None."""

    talk: Talk
    picture: Image.Image
    plan: ViewPlan
    fingerprint: str
    query: Tensor | None

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """All that its visual tokens depend on."""
        return self.fingerprint, () if self.query is None else tuple(self.query.tolist())


class Foveate:
    """A model and its processor, ready to be asked.

    Args:
        model: the network, on its device.
        processor: what turns pictures and messages into its inputs.
        remembered_pictures: so many pictures keep their vision features for further questions.
        keep_context: whether the LLM's cache is kept from one turn of a conversation to the next; without it
            every turn reads the whole conversation anew.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        remembered_pictures: int = 8,
        keep_context: bool = True,
    ) -> None:
        self.model = model
        self.processor = processor
        self.keep_context = keep_context
        self.remembered_pictures = remembered_pictures
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._looks: dict[str, dict[Look, Tensor]] = {}  # per picture what a connector looked at

    def ask(self, picture: Picture, question: str, *, max_new_tokens: int = 256, **generation: Any) -> Answer:
        """Asks one question about a picture; further questions about the same picture reuse its features.

        Args:
            picture: path, URL, bytes, array or PIL image.
            question: not empty.
            max_new_tokens: bound on the answer's length.
            **generation: further arguments of transformers' `generate`; greedy decoding without any.

        Raises:
            FoveateError: a picture that cannot be read, an empty question.
        """
        return self.ask_all([(picture, question)], max_new_tokens=max_new_tokens, **generation)[0]

    def ask_all(
        self, questions: Iterable[tuple[Picture, str]], *, max_new_tokens: int = 256, **generation: Any
    ) -> list[Answer]:
        """Asks several questions at once, each about a picture of its own, in one batch.

        Args:
            questions: pairs of a picture and what is asked about it.
            max_new_tokens: bound on the length of each answer.
            **generation: as for `ask`.

        Raises:
            FoveateError: as for `ask`; no question; a streamer for more than one.
        """
        questions = list(questions)
        if not questions:
            raise FoveateError("there is no question: give pairs of a picture and a question")
        if len(questions) > 1 and generation.get("streamer") is not None:
            raise FoveateError("only one answer can be streamed: ask one question at a time")
        chats = [Chat(self, read_picture(picture)) for picture, _ in questions]
        generation["max_new_tokens"] = max_new_tokens
        return converse(self, chats, [question for _, question in questions], Context(), generation)

    def chat(self, picture: Picture) -> Chat:
        """A conversation about one picture that remembers what was said."""
        return Chat(self, read_picture(picture))

    def save(self, folder: str | Path) -> None:
        """Writes model and processor to a folder that `foveate.load` reads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def plan(self, picture: Image.Image) -> ViewPlan:
        return self.processor.image_processor.plan(picture.height, picture.width)

    @torch.inference_mode()
    def features(self, picture: Image.Image) -> Tensor:
        """Vision features of a picture's views (V, N, C), from memory where it was asked about lately."""
        key = _fingerprint(picture)
        if key not in self._features:
            pixels = torch.from_numpy(self.processor.image_processor.views(picture, self.plan(picture)))
            return self.model.encode_views(pixels.to(self.model.device, self.model.dtype))
        return self._features[key]

    @cached_property
    def pricer(self) -> Pricer:
        return Pricer(self.model.config, self.model.dtype)

    @names_versions
    @torch.inference_mode()
    def say(self, talks: Sequence[Talk], context: Context, **generation: Any) -> list[str]:
        """One turn of conversations side by side: the model's reply to each.

        Messages hold pictures as PIL images. What the turn costs is added to each talk's ledger, time in
        equal shares. `context` is that of the same conversations' last turn.
        """
        if not (self.keep_context and can_go_on(self.model, generation)):
            context.clear()
        prompts, shown = zip(*(self._prompt(talk) for talk in talks), strict=True)
        known = [context.known(row, prompt) for row, prompt in enumerate(prompts)]
        new: list[_Shown] = []
        for talk, prompt, pictures, first in zip(talks, prompts, shown, known, strict=True):
            fresh = [p for p, (start, _) in zip(pictures, prompt.places, strict=True) if start >= first]
            talk.seen = talk.seen[: len(pictures) - len(fresh)]
            new += fresh
        encoded = self._encode(new, [talk.ledger for talk in talks]) if new else None
        if encoded is not None:
            self._note(new, encoded)
        start = self._now()
        replies = context.go_on(self.model, prompts, known, encoded, **generation)
        seconds = (self._now() - start) / len(talks)
        for talk, reply in zip(talks, replies, strict=True):
            prefill, decode, kv = self.pricer.language(reply.read, reply.kept)
            talk.ledger.seconds["generate"] += seconds
            talk.ledger.prompt_tokens += reply.read
            talk.ledger.kept_tokens += reply.kept
            talk.ledger.new_tokens += len(reply.ids)
            talk.ledger.tflop += (prefill + decode * max(len(reply.ids) - 1, 0)) / 1e12
            talk.ledger.kv_megabytes = max(talk.ledger.kv_megabytes, kv / 1e6)
        return [self.processor.decode(reply.ids, skip_special_tokens=True).strip() for reply in replies]

    def _note(self, shown: Sequence[_Shown], encoded: EncodedPictures) -> None:
        """Tells each picture's talk what the connector said of it."""
        for i, picture in enumerate(shown):
            picture.talk.seen.append(
                Seen(
                    None if encoded.regions is None else encoded.regions[i],
                    None if encoded.heat is None else encoded.heat[i],
                    [] if encoded.chains is None else encoded.chains[i],
                )
            )
            kept = picture.plan.tokens if encoded.kept is None else int(encoded.kept[i].sum())
            picture.talk.ledger.visual_tokens += kept

    def _now(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _prompt(self, talk: Talk) -> tuple[Prompt, list[_Shown]]:
        """A conversation's token ids, with placeholders counted off the plans, and its pictures."""
        pictures = [part["image"] for m in talk.messages for part in m["content"] if part["type"] == "image"]
        plans = [self.plan(picture) for picture in pictures]
        text = self.processor.apply_chat_template(talk.messages, add_generation_prompt=True)
        placeholders = [self.processor.image_token * plan.tokens for plan in plans]
        texts, _ = self.processor.get_text_with_replacements([text], placeholders)
        bos = self.processor.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        ids = self.processor.tokenizer(texts[0], add_special_tokens=special)["input_ids"]
        marks = [i for i, token in enumerate(ids) if token == self.processor.image_token_id]
        places, used = [], 0
        for plan in plans:
            places.append((marks[used], marks[used + plan.tokens - 1] + 1))
            used += plan.tokens
        queries = self._queries(talk.messages, torch.tensor(ids), len(pictures))
        shown = [
            _Shown(talk, picture, plan, _fingerprint(picture), query)
            for picture, plan, query in zip(pictures, plans, queries, strict=True)
        ]
        return Prompt(ids, [picture.key for picture in shown], places), shown

    def _queries(
        self, messages: Sequence[Mapping[str, Any]], ids: Tensor, pictures: int
    ) -> Sequence[Tensor | None]:
        """Per picture of a conversation the tokens (T,) that its connector reads; None if it reads none."""
        if not self.model.method.uses_query:
            return [None] * pictures
        if self.model.method.query_text == "question":
            texts = picture_queries(messages)
            tokens = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            return [torch.tensor(row, dtype=torch.long) for row in tokens]
        every = torch.ones_like(ids, dtype=torch.bool)
        rows, mask = self.processor.text_around([ids], [every], [pictures])
        return [row[seen.bool()] for row, seen in zip(rows, mask, strict=True)]

    def _encode(self, shown: Sequence[_Shown], ledgers: Sequence[Ledger]) -> EncodedPictures:
        """Visual tokens of the pictures; the tower runs once, for the views of those that are new."""
        new: dict[str, _Shown] = {}
        for picture in shown:
            if picture.fingerprint not in self._features:
                new.setdefault(picture.fingerprint, picture)
        keys = [picture.fingerprint for picture in shown]
        found = {key: self._features[key] for key in keys if key in self._features}
        if new:
            start = self._now()
            views = [self.processor.image_processor.views(p.picture, p.plan) for p in new.values()]
            counts = [len(v) for v in views]
            pixels = torch.cat([torch.from_numpy(v) for v in views]).to(self.model.device, self.model.dtype)
            _share(ledgers, "prepare", self._now() - start)
            start = self._now()
            parts = self.model.encode_views(pixels).split(counts)
            # Copies: a part of the batch's tensor would keep all of it from being freed.
            found |= {key: part.clone() for key, part in zip(new, parts, strict=True)}
            _share(ledgers, "encode", self._now() - start)
            for picture, count in zip(new.values(), counts, strict=True):
                picture.talk.ledger.encoded_views += count
                picture.talk.ledger.tflop += self.pricer.vision(picture.plan.picture).encode / 1e12
        for picture in shown:
            vision = self.pricer.vision(picture.plan.picture)
            picture.talk.ledger.views += len(picture.plan.views)
            picture.talk.ledger.tflop += (vision.connect + vision.inject) / 1e12
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.remembered_pictures:
            self._features.popitem(last=False)
        start = self._now()
        queries = [picture.query for picture in shown if picture.query is not None]
        query_ids, query_mask = self._padded(queries) if queries else (None, None)
        sizes = torch.tensor([picture.plan.picture for picture in shown])
        features = torch.cat([found[key] for key in keys])
        source = self._source(shown) if self.model.method.reads_source else None
        encoded = self.model.connect(features, sizes, query_ids, query_mask, source)
        _share(ledgers, "encode", self._now() - start)
        if source is not None:
            self._note_looks(shown, source)
        return encoded

    def _source(self, shown: Sequence[_Shown]) -> Source:
        """The original pictures, with what was looked at for earlier questions."""
        norms = torch.from_numpy(self.processor.image_processor.norms).to(self.model.device)
        return Source(
            [torch.from_numpy(np.array(p.picture)).to(self.model.device) for p in shown],
            norms.expand(len(shown), -1, -1),
            lambda views: self.model.encode_views(views.to(self.model.dtype)),
            [self._looks.setdefault(p.fingerprint, {}) for p in shown],
        )

    def _note_looks(self, shown: Sequence[_Shown], source: Source) -> None:
        """Adds to the ledgers what the connector looked at, and forgets what is too much to remember."""
        for i, picture in enumerate(shown):
            ledger = picture.talk.ledger
            ledger.views += len(source.looked[i])
            ledger.encoded_views += source.encoded[i]
            look = self.pricer.vision(picture.plan.picture).look
            ledger.tflop += source.encoded[i] * look / 1e12
            for old in list(source.memory[i])[:-REMEMBERED_LOOKS]:
                del source.memory[i][old]
        self._looks = {key: looks for key, looks in self._looks.items() if key in self._features}

    def _padded(self, queries: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`query_ids` and `query_mask` (P, longest), padded on the left."""
        longest = max(len(query) for query in queries)
        ids = torch.full((len(queries), longest), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, query in enumerate(queries):
            ids[row, longest - len(query) :], mask[row, longest - len(query) :] = query, 1
        return ids.to(self.model.device), mask.to(self.model.device)


def _share(ledgers: Sequence[Ledger], phase: str, seconds: float) -> None:
    for ledger in ledgers:
        ledger.seconds[phase] += seconds / len(ledgers)


class Chat:
    """A conversation about one picture. Every question sees what was said before."""

    def __init__(self, foveate: Foveate, picture: Image.Image) -> None:
        self.foveate = foveate
        self.picture = picture
        self.messages: list[dict[str, Any]] = []
        self._seen: list[Seen] = []
        self._context = Context()

    def ask(self, question: str, *, max_new_tokens: int = 256, **generation: Any) -> Answer:
        """As `Foveate.ask`."""
        generation["max_new_tokens"] = max_new_tokens
        return converse(self.foveate, [self], [question], self._context, generation)[0]

    def turns(self, question: str) -> Generator[Turn, str, Reply]:
        """The turns with which a question is answered; further questions take one each."""
        if not self.messages:
            return self.foveate.model.method.converse(self.picture, question)
        return _one_turn(question)

    def answer(self, question: str, talk: Talk, end: Reply, crops: list[Image.Image]) -> Answer:
        """Notes what was said, and says where the model looked."""
        method, notes = self.foveate.model.method, list(end.notes)
        if self.messages and method.uses_query and method.query_text == "question":
            notes.append(
                "the parts that were looked at belong to the message that showed the picture: this question "
                "did not choose them"
            )
        self.messages, self._seen = talk.messages, talk.seen
        plan = self.foveate.plan(self.picture)
        seen = talk.seen[0]
        chosen = list(plan.regions) if seen.regions is None else seen.regions
        regions = chosen if end.regions is None else end.regions
        heat: list[tuple[Box, float]] = []
        if seen.heat is not None:
            cells = method.cells(plan)
            heat = list(zip(cells, seen.heat.tolist(), strict=True))
        return Answer(
            text=end.text,
            regions=regions,
            ledger=talk.ledger,
            question=question,
            picture=self.picture,
            plan=plan,
            heat=heat,
            chains=seen.chains,
            crops=crops,
            notes=notes,
            _draw=self._draw,
        )

    def check(self, question: str) -> None:
        """Raises `FoveateError` for what is no question."""
        if not isinstance(question, str):
            raise FoveateError(f"a question must be a text, not {type(question).__name__}")
        if not question.strip():
            raise FoveateError("the question is empty")
        token = self.foveate.processor.image_token
        if token in question:
            raise FoveateError(f"the question contains {token}, which stands for a picture: leave it out")

    def talk(self) -> Talk:
        return Talk(list(self.messages), list(self._seen))

    def _draw(self, answer: Answer) -> Image.Image:
        processor, plan, ledger = self.foveate.processor.image_processor, answer.plan, answer.ledger
        canvases = [processor.paint(answer.picture, canvas) for canvas in plan.canvases]
        costs = (
            f"{plan.picture.width} x {plan.picture.height} pixels, "
            f"seen at {plan.effective.width} x {plan.effective.height}   |   "
            f"{ledger.views} view{'' if ledger.views == 1 else 's'}, {ledger.visual_tokens} visual tokens, "
            f"{ledger.tflop:.3g} TFLOP, "
            f"{ledger.total_seconds:.2f} s"
        )
        caption = [
            (f"Q  {answer.question}", False),
            (f"A  {answer.text or '(no text)'}", True),
            (costs, False),
        ]
        insight = self._insight(answer)
        own_views = [(role, processor.shown(pixels)) for role, pixels in insight.views]
        caption += [(note, False) for note in (*insight.notes, *answer.notes)]
        heat = answer.heat or insight.heat
        regions = answer.regions
        if answer.crops:  # numbered on from the views of the whole picture
            regions = [*plan.regions, *(region for region in regions if region not in plan.regions)]
        for crop in answer.crops:
            of_crop = self.foveate.plan(crop)
            painted = [processor.paint(crop, canvas) for canvas in of_crop.canvases]
            own_views += [("crop", cut_view(painted[view.canvas], view)) for view in of_crop.views]
        chains = [
            (chain.name, chain.boxes, [processor.shown(view) for view in chain.pixels()])
            for chain in answer.chains
        ]
        return draw(answer.picture, regions, plan, canvases, caption, heat, own_views, chains)

    def _insight(self, answer: Answer) -> Insight:
        model, processor = self.foveate.model, self.foveate.processor.image_processor

        def views() -> Tensor:
            pixels = torch.from_numpy(processor.views(answer.picture, answer.plan))
            return pixels.to(model.device, model.dtype)

        made = model.method.insight(model.vision_tower, views, answer.plan)
        read = model.connector.insight(lambda: self.foveate.features(answer.picture), answer.plan)
        return Insight(made.views + read.views, made.heat or read.heat, made.notes + read.notes)


def _one_turn(question: str) -> Generator[Turn, str, Reply]:
    text = yield Turn(question)
    return Reply(text)


def converse(
    foveate: Foveate,
    chats: Sequence[Chat],
    questions: Sequence[str],
    context: Context,
    generation: Mapping[str, Any],
) -> list[Answer]:
    """Answers a question in each chat, turn by turn, all side by side.

    Args:
        foveate: whose chats these are.
        chats: one for each question.
        questions: one for each chat.
        context: what the chats' last turn left.
        generation: arguments of transformers' `generate`.

    Raises:
        FoveateError: what is no question, answers of no token.
    """
    if generation.get("max_new_tokens", 1) < 1:
        raise FoveateError(f"max_new_tokens must be at least 1, it is {generation['max_new_tokens']}")
    for chat, question in zip(chats, questions, strict=True):
        chat.check(question)
    talks = [chat.talk() for chat in chats]
    turns = [chat.turns(question) for chat, question in zip(chats, questions, strict=True)]
    crops: list[list[Image.Image]] = [[] for _ in chats]
    ends: dict[int, Reply] = {}
    asked = {row: next(turn) for row, turn in enumerate(turns)}
    first = True
    while asked:
        for row, turn in asked.items():
            talks[row].messages.append({"role": "user", "content": content(turn)})
            crops[row] += [] if first else turn.pictures
        replies = foveate.say(
            [talks[row] for row in asked], context, **_bounded(generation, list(asked.values()))
        )
        live = list(asked)
        for row, reply in zip(live, replies, strict=True):
            said = reply.replace(foveate.processor.image_token, "")  # in a reply it stands for no picture
            talks[row].messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
            try:
                asked[row] = turns[row].send(reply)
            except StopIteration as stop:
                ends[row] = stop.value
                del asked[row]
        if asked:
            context.select([live.index(row) for row in asked])
        first = False
    return [
        chat.answer(question, talk, ends[row], crops[row])
        for row, (chat, question, talk) in enumerate(zip(chats, questions, talks, strict=True))
    ]


def content(turn: Turn) -> list[dict[str, Any]]:
    """A turn as the parts of a user's message."""
    text = turn.text if IMAGE_TOKEN in turn.text else IMAGE_TOKEN * len(turn.pictures) + turn.text
    before, *pieces = text.split(IMAGE_TOKEN)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    for picture, piece in zip(turn.pictures, pieces, strict=True):
        parts.append({"type": "image", "image": picture})
        piece = piece.removeprefix("\n")  # chat templates end a picture's line themselves
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _bounded(generation: Mapping[str, Any], turns: Sequence[Turn]) -> dict[str, Any]:
    """The arguments of `generate` for turns that are taken side by side.

    What was asked for the answer's length and form is not asked of a step on the way.
    """
    arguments = dict(generation)
    bounds = [turn.max_new_tokens for turn in turns if turn.max_new_tokens is not None]
    if len(bounds) == len(turns):
        arguments["max_new_tokens"] = max(bounds)
        arguments.pop("max_length", None)
    if all(turn.inner for turn in turns):
        arguments = {name: value for name, value in arguments.items() if name not in OF_ANSWERS}
        if "generation_config" in arguments:
            config = copy.deepcopy(arguments["generation_config"])
            config.update(**dict.fromkeys(OF_ANSWERS))
            arguments["generation_config"] = config
    return arguments


def _fingerprint(picture: Image.Image) -> str:
    digest = hashlib.blake2b(picture.tobytes(), digest_size=16)
    digest.update(repr(picture.size).encode())
    return digest.hexdigest()
