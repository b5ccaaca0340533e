"""Asking about pictures: load a model, ask, see where it looked and what it cost."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from foveate.chat import picture_queries
from foveate.cost import Pricer
from foveate.errors import FoveateError
from foveate.explain import draw
from foveate.geometry import Box, ViewPlan
from foveate.methods.base import Insight, Reply, Turn
from foveate.modeling import EncodedPictures, FoveateForConditionalGeneration
from foveate.pictures import Picture, drawing_path, read_picture
from foveate.processing import FoveateProcessor

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


def load(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Foveate:
    """Loads a model for asking: Foveate's own folder, or a released checkpoint of any known layout.

    Args:
        model: folder or Hugging Face hub id; by default the embedded model, which has learnt the lab's
            coloured shapes and signs with letters, digits and words on them, and nothing else.
        device: by default the best there is.
        dtype: `float32`, `bfloat16` or `float16`; by default what is fast and safe on the device.
        vision_tower: folder of the vision tower, for original LLaVA checkpoints that keep it apart.
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
        model, vision_tower=vision_tower, template=template, options=options
    )
    network = FoveateForConditionalGeneration.from_pretrained(
        model,
        vision_tower=vision_tower,
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
        visual_tokens: visual tokens in the LLM's sequence, after a method dropped some.
        prompt_tokens: the whole prompt, visual tokens included.
        new_tokens: generated.
        tflop: vision, prefill and decoding, in 10^12 floating point operations.
        kv_megabytes: key and value cache after the longest prefill.
        seconds: wall time by phase: `prepare` (pictures to tensors), `encode`, `generate`.
    """

    views: int = 0
    encoded_views: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0
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
    """

    text: str
    regions: list[Box]
    ledger: Ledger
    question: str
    picture: Image.Image = field(repr=False)
    plan: ViewPlan = field(repr=False)
    heat: list[tuple[Box, float]] = field(repr=False)
    _draw: Callable[[Answer], Image.Image] = field(repr=False)

    def show(self, out: str | Path | None = None) -> Image.Image:
        """A picture of what the model saw: regions and views. Also written to the file `out` if given."""
        drawing = self._draw(self)
        if out is not None:
            path = drawing_path(out)
            try:
                drawing.save(path)
            except OSError as error:
                raise FoveateError(f"{path} cannot be written: {error.strerror}") from error
        return drawing

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "question": self.question,
            "answer": self.text,
            "regions": [list(box.rounded()) for box in self.regions],
            "ledger": asdict(self.ledger),
        }


class Foveate:
    """A model and its processor, ready to be asked.

    Args:
        model: the network, on its device.
        processor: what turns pictures and messages into its inputs.
        remembered_pictures: so many pictures keep their vision features for further questions.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        remembered_pictures: int = 8,
    ) -> None:
        self.model = model
        self.processor = processor
        self.remembered_pictures = remembered_pictures
        self._features: OrderedDict[str, Tensor] = OrderedDict()

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
        return Chat(self, read_picture(picture)).ask(question, max_new_tokens=max_new_tokens, **generation)

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

    @torch.inference_mode()
    def say(
        self, messages: Sequence[Mapping[str, Any]], ledger: Ledger, **generation: Any
    ) -> tuple[str, EncodedPictures | None]:
        """One turn: the model's reply to a conversation, and its pictures as they were encoded.

        Messages hold pictures as PIL images. The costs are added to `ledger`.
        """
        pictures = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
        plans = [self.plan(picture) for picture in pictures]
        inputs = self._prompt(messages, plans)
        encoded = self._encode(pictures, plans, self._query(messages, inputs), ledger) if pictures else None
        inputs = inputs.to(self.model.device)
        start = self._now()
        output = self.model.generate(
            **inputs,
            mm_encoder_outputs={"image": encoded} if encoded else {},
            **{"do_sample": False, **generation},
        )
        ledger.seconds["generate"] += self._now() - start
        length = inputs["input_ids"].shape[1]
        new = output[0, length:]
        visual = sum(plan.tokens for plan in plans)
        if encoded is not None and encoded.kept is not None:
            dropped = visual - sum(int(kept.sum()) for kept in encoded.kept)
            visual, length = visual - dropped, length - dropped
        prefill, decode, kv = self.pricer.language(length)
        ledger.visual_tokens += visual
        ledger.prompt_tokens += length
        ledger.new_tokens += len(new)
        ledger.tflop += (prefill + decode * max(len(new) - 1, 0)) / 1e12
        ledger.kv_megabytes = max(ledger.kv_megabytes, kv / 1e6)
        return self.processor.decode(new, skip_special_tokens=True).strip(), encoded

    def _now(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _prompt(self, messages: Sequence[Mapping[str, Any]], plans: Sequence[ViewPlan]) -> BatchFeature:
        """The conversation's token ids, with placeholders counted off the plans."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        placeholders = [self.processor.image_token * plan.tokens for plan in plans]
        texts, _ = self.processor.get_text_with_replacements([text], placeholders)
        bos = self.processor.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return BatchFeature(self.processor.tokenizer(texts, return_tensors="pt", add_special_tokens=special))

    def _query(self, messages: Sequence[Mapping[str, Any]], inputs: BatchFeature) -> dict[str, Tensor]:
        """`query_ids` and `query_mask` (P, T) of the conversation's pictures, for methods that read them."""
        if not self.model.method.uses_query:
            return {}
        queries = picture_queries(messages)
        if self.model.method.query_text == "question":
            tokens = self.processor.tokenizer(
                queries, add_special_tokens=False, padding=True, return_tensors="pt"
            )
            return {"query_ids": tokens["input_ids"], "query_mask": tokens["attention_mask"]}
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        query_ids, query_mask = self.processor.text_around(list(ids), list(mask), [len(queries)])
        return {"query_ids": query_ids, "query_mask": query_mask}

    def _encode(
        self,
        pictures: Sequence[Image.Image],
        plans: Sequence[ViewPlan],
        query: Mapping[str, Tensor],
        ledger: Ledger,
    ) -> EncodedPictures:
        """Visual tokens of the pictures; the tower runs once, for the views of those that are new."""
        keys = [_fingerprint(picture) for picture in pictures]
        new = {
            key: (picture, plan)
            for key, picture, plan in zip(keys, pictures, plans, strict=True)
            if key not in self._features
        }
        found = {key: self._features[key] for key in keys if key in self._features}
        if new:
            start = self._now()
            views = [self.processor.image_processor.views(picture, plan) for picture, plan in new.values()]
            counts = [len(v) for v in views]
            pixels = torch.cat([torch.from_numpy(v) for v in views]).to(self.model.device, self.model.dtype)
            ledger.seconds["prepare"] += self._now() - start
            start = self._now()
            found |= zip(new, self.model.encode_views(pixels).split(counts), strict=True)
            ledger.seconds["encode"] += self._now() - start
            ledger.encoded_views += sum(counts)
            ledger.tflop += sum(self.pricer.encode(plan.picture) for _, plan in new.values()) / 1e12
        ledger.views += sum(len(plan.views) for plan in plans)
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        while len(self._features) > self.remembered_pictures:
            self._features.popitem(last=False)
        asked = {name: tensor.to(self.model.device) for name, tensor in query.items()}
        start = self._now()
        sizes = torch.tensor([plan.picture for plan in plans])
        encoded = self.model.connect(torch.cat([found[key] for key in keys]), sizes, **asked)
        ledger.seconds["encode"] += self._now() - start
        return encoded


class Chat:
    """A conversation about one picture. Every question sees what was said before."""

    def __init__(self, foveate: Foveate, picture: Image.Image) -> None:
        self.foveate = foveate
        self.picture = picture
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str, **generation: Any) -> Answer:
        """As `Foveate.ask`."""
        if not isinstance(question, str):
            raise FoveateError(f"a question must be a text, not {type(question).__name__}")
        if not question.strip():
            raise FoveateError("the question is empty")
        token = self.foveate.processor.image_token
        if token in question:
            raise FoveateError(f"the question contains {token}, which stands for a picture: leave it out")
        ledger = Ledger()
        messages = list(self.messages)
        encoded: EncodedPictures | None = None
        if messages:
            reply = self._turn(messages, Turn(question), ledger, generation)[0]
            end = Reply(reply)
        else:
            conversation = self.foveate.model.method.converse(self.picture, question)
            turn = next(conversation)
            while True:
                reply, encoded = self._turn(messages, turn, ledger, generation)
                try:
                    turn = conversation.send(reply)
                except StopIteration as stop:
                    end = stop.value
                    break
        self.messages = messages
        plan = self.foveate.plan(self.picture)
        chosen = (
            encoded.regions[0] if encoded is not None and encoded.regions is not None else list(plan.regions)
        )
        regions = chosen if end.regions is None else end.regions
        heat: list[tuple[Box, float]] = []
        if encoded is not None and encoded.heat is not None:
            cells = self.foveate.model.method.cells(plan)
            heat = list(zip(cells, encoded.heat[0].tolist(), strict=True))
        return Answer(end.text, regions, ledger, question, self.picture, plan, heat, self._draw)

    def _turn(
        self, messages: list[dict[str, Any]], turn: Turn, ledger: Ledger, generation: dict[str, Any]
    ) -> tuple[str, EncodedPictures | None]:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in turn.pictures]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.text}]})
        reply, encoded = self.foveate.say(messages, ledger, **generation)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        return reply, encoded

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
        caption += [(note, False) for note in insight.notes]
        heat = answer.heat or insight.heat
        return draw(answer.picture, answer.regions, plan, canvases, caption, heat, own_views)

    def _insight(self, answer: Answer) -> Insight:
        model, processor = self.foveate.model, self.foveate.processor.image_processor

        def views() -> Tensor:
            pixels = torch.from_numpy(processor.views(answer.picture, answer.plan))
            return pixels.to(model.device, model.dtype)

        made = model.method.insight(model.vision_tower, views, answer.plan)
        read = model.connector.insight(lambda: self.foveate.features(answer.picture), answer.plan)
        return Insight(made.views + read.views, made.heat or read.heat, made.notes + read.notes)


def _fingerprint(picture: Image.Image) -> str:
    digest = hashlib.blake2b(picture.tobytes(), digest_size=16)
    digest.update(repr(picture.size).encode())
    return digest.hexdigest()
