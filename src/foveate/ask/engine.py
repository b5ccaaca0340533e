"""The model with its memory: it encodes a picture once, replies to one turn, and counts the cost.

It holds no conversation: messages come with every call, and the caller keeps what the LLM has read of them in
a `Context`. Several threads may share one engine, each with its own contexts.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import Condition, RLock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.ask.answer import Ledger
from foveate.ask.context import Context, Passage, Written, can_go_on
from foveate.explaining.own import rerun
from foveate.model.cost import Pricer, shared_pricer
from foveate.model.modeling import EncodedPictures, FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.queries import padded_queries
from foveate.model.text import pictures_of
from foveate.picture.account import Account
from foveate.picture.geometry import ViewPlan
from foveate.picture.reading import bands, to_array
from foveate.picture.source import Look, Source
from foveate.versions import names_versions

MEMORY = 2**30  # bytes


@dataclass
class Said:
    """The model's reply to one conversation.

    Attributes:
        text: without special tokens.
        ledger: what this turn cost.
        accounts: where the method looked in the pictures read now, the conversation's last ones.
        tokens: ids of the reply's tokens, including the one that ends it.
    """

    text: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    accounts: list[Account] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Gate:
    """Many may be inside at once, or one alone."""

    def __init__(self) -> None:
        self._free, self._inside = Condition(), 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Waits while somebody is inside alone."""
        with self._free:
            self._inside += 1
        try:
            yield
        finally:
            with self._free:
                self._inside -= 1
                self._free.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until nobody is inside. Who is alone may also enter as one of many."""
        with self._free:
            self._free.wait_for(lambda: not self._inside)
            yield


@dataclass(frozen=True)
class Shown:
    """A picture in a prompt, with the tokens that a connector reads with it."""

    said: Said
    picture: Image.Image
    plan: ViewPlan
    fingerprint: str
    query: tuple[int, ...]

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Everything that its visual tokens depend on."""
        return self.fingerprint, self.query


class Memory:
    """Vision features of the pictures asked about last, and of the parts that connectors looked at.

    Args:
        most: bound in bytes; what was used longest ago is dropped first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.features: OrderedDict[str, Tensor] = OrderedDict()  # per picture (V, N, C)
        self.looks: dict[str, dict[Look, Tensor]] = {}  # per picture (N, C) of each part, the latest last

    @property
    def bytes(self) -> int:
        looks = (look for parts in self.looks.values() for look in parts.values())
        return sum(tensor.nbytes for tensor in (*self.features.values(), *looks))

    def keep(self, pictures: Mapping[str, Tensor]) -> None:
        """Stores the features of pictures used now."""
        for key, features in pictures.items():
            self.features[key] = features
            self.features.move_to_end(key)

    def forget(self) -> None:
        """Drops what exceeds the bound: first the oldest parts of the oldest picture, then the picture."""
        self.looks = {key: parts for key, parts in self.looks.items() if key in self.features}
        excess = self.bytes - self.most
        for key in list(self.features):
            parts = self.looks.get(key, {})
            while excess > 0 and parts:
                excess -= parts.pop(next(iter(parts))).nbytes
            if excess <= 0:
                return
            excess -= self.features.pop(key).nbytes
            self.looks.pop(key, None)


class Engine:
    """A model and its processor, with what they remember of pictures.

    Args:
        model: the network, on its device.
        processor: what turns pictures and messages into its inputs.
        memory: bound in bytes on vision features kept between calls.
        keep_context: whether a `Context` keeps the LLM's cache from one turn to the next; without it, every
            turn reads the whole conversation again.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        memory: int = MEMORY,
        keep_context: bool = True,
    ) -> None:
        self.model, self.processor, self.keep_context = model, processor, keep_context
        self.memory = Memory(memory)
        # Held while pictures are encoded and connected, so that no two threads encode the same one. The LLM
        # writes without it.
        self.lock = RLock()
        # Explaining changes how the LLM computes its attention: nobody else may use it at that time.
        self.gate = Gate()

    def __getstate__(self) -> dict[str, Any]:
        """Without locks and what is computed again: a copy starts with no picture in memory."""
        state = {name: value for name, value in vars(self).items() if name not in ("lock", "gate", "pricer")}
        return {**state, "memory": Memory(self.memory.most)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, lock=RLock(), gate=Gate())

    def plan(self, picture: Image.Image) -> ViewPlan:
        return self.processor.image_processor.plan(picture.height, picture.width)

    @torch.inference_mode()
    def features(self, picture: Image.Image) -> Tensor:
        """Vision features of a picture's views (V, N, C), from memory if asked about recently."""
        with self.lock:
            known = self.memory.features.get(fingerprint(picture))
            if known is not None:
                return known
            return self.model.encode_views(rerun(self.model, self.processor, picture).views())

    def account(self, picture: Image.Image) -> Account:
        """The details about a picture that need another run of the tower or connector."""
        run = rerun(self.model, self.processor, picture, partial(self.features, picture))
        return self.model.method.account(run)

    @cached_property
    def pricer(self) -> Pricer:
        return shared_pricer(self.model.config, self.model.dtype)

    @names_versions
    @torch.inference_mode()
    def say(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], context: Context, **generation: Any
    ) -> list[Said]:
        """One turn of parallel conversations: the model's reply to each.

        Args:
            conversations: messages, with PIL images as pictures.
            context: that of the same conversations' last turn; updated by this one.
            **generation: arguments of transformers' `generate`; greedy decoding by default.

        Returns:
            One reply each. Shared time is divided equally among them.
        """
        with self.gate.shared():
            return self._say(conversations, context, generation)

    def _say(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        context: Context,
        generation: Mapping[str, Any],
    ) -> list[Said]:
        if not (self.keep_context and can_go_on(self.model, generation)):
            context.clear()
        said = [Said() for _ in conversations]
        ledgers = [one.ledger for one in said]
        with self.lock:
            read = [self.passage(messages, one) for messages, one in zip(conversations, said, strict=True)]
            prompts = [prompt for prompt, _ in read]
            known = [context.known(row, prompt) for row, prompt in enumerate(prompts)]
            new = [
                picture
                for (prompt, pictures), first in zip(read, known, strict=True)
                for picture, (start, _) in zip(pictures, prompt.places, strict=True)
                if start >= first
            ]
            encoded = self.encode(new, ledgers) if new else None
        if encoded is not None:
            note(new, encoded)
        start = self._now()
        replies = context.go_on(self.model, prompts, known, encoded, **generation)
        share(ledgers, "generate", self._now() - start)
        for one, reply in zip(said, replies, strict=True):
            self.settle(one, reply)
        return said

    def settle(self, said: Said, reply: Written) -> None:
        """Notes what the model wrote in a turn, and what the LLM's part of it cost."""
        with self.lock:
            prefill, decode, kv = self.pricer.language(reply.read, reply.kept)
        said.ledger.prompt_tokens = reply.read
        said.ledger.kept_tokens = reply.kept
        said.ledger.new_tokens = len(reply.ids)
        said.ledger.tflop += (prefill + decode * max(len(reply.ids) - 1, 0)) / 1e12
        said.ledger.kv_megabytes = kv / 1e6
        said.tokens = reply.ids
        said.text = self.processor.decode(reply.ids, skip_special_tokens=True).strip()

    def _now(self) -> float:
        """The time in seconds, once the device has finished all its work."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def passage(self, messages: Sequence[Mapping[str, Any]], said: Said) -> tuple[Passage, list[Shown]]:
        """A conversation's tokens and its pictures, whose costs are added to those of `said`."""
        pictures = pictures_of(messages)
        plans = [self.plan(picture) for picture in pictures]
        prompt = self.processor.prompt(messages, plans)
        shown = [
            Shown(said, picture, plan, fingerprint(picture), tuple(query))
            for picture, plan, query in zip(pictures, plans, prompt.queries, strict=True)
        ]
        return Passage(prompt.ids, [picture.key for picture in shown], prompt.places), shown

    def encode(
        self, shown: Sequence[Shown], ledgers: Sequence[Ledger], apart: bool = False
    ) -> EncodedPictures:
        """Visual tokens of the pictures; the tower runs for the views of new ones.

        Args:
            shown: the pictures.
            ledgers: of all conversations that show them; shared time is divided equally among them.
            apart: whether the tower runs once for each picture, so that its features do not depend on the
                pictures beside it; else it runs once for all.
        """
        memory = self.memory
        new: dict[str, Shown] = {}
        for picture in shown:
            if picture.fingerprint not in memory.features:
                new.setdefault(picture.fingerprint, picture)
        keys = [picture.fingerprint for picture in shown]
        found = {key: memory.features[key] for key in keys if key in memory.features}
        if new:
            start = self._now()
            views = [self.processor.image_processor.views(p.picture, p.plan) for p in new.values()]
            counts = [len(v) for v in views]
            pixels = torch.cat([torch.from_numpy(v) for v in views]).to(self.model.device, self.model.dtype)
            share(ledgers, "prepare", self._now() - start)
            start = self._now()
            if apart:
                parts = [self.model.encode_views(part) for part in pixels.split(counts)]
            else:
                # Copies: a slice of the batch's tensor would keep all of it in memory.
                parts = [part.clone() for part in self.model.encode_views(pixels).split(counts)]
            found |= zip(new, parts, strict=True)
            share(ledgers, "encode", self._now() - start)
            for picture, count in zip(new.values(), counts, strict=True):
                picture.said.ledger.encoded_views += count
                picture.said.ledger.tflop += self.pricer.vision(picture.plan.picture).encode / 1e12
        for picture in shown:
            vision = self.pricer.vision(picture.plan.picture)
            picture.said.ledger.views += len(picture.plan.views)
            picture.said.ledger.tflop += (vision.connect + vision.inject) / 1e12
        memory.keep({key: found[key] for key in keys})
        start = self._now()
        query_ids, query_mask = None, None
        if self.model.method.uses_query:
            queries = padded_queries((p.query for p in shown), self.processor.tokenizer.pad_token_id)
            query_ids, query_mask = (part.to(self.model.device) for part in queries)
        sizes = torch.tensor([picture.plan.picture for picture in shown])
        features = torch.cat([found[key] for key in keys])
        source = self._source(shown) if self.model.method.reads_source else None
        encoded = self.model.connect(features, sizes, query_ids, query_mask, source)
        share(ledgers, "encode", self._now() - start)
        if source is not None:
            self._note_looks(shown, source)
        memory.forget()
        return encoded

    def _source(self, shown: Sequence[Shown]) -> Source:
        """The original pictures, with the parts looked at for earlier questions."""
        norms = torch.from_numpy(self.processor.image_processor.norms).to(self.model.device)
        return Source(
            [torch.from_numpy(to_array(p.picture)).to(self.model.device) for p in shown],
            norms.expand(len(shown), -1, -1),
            lambda views: self.model.encode_views(views.to(self.model.dtype)),
            [self.memory.looks.setdefault(p.fingerprint, {}) for p in shown],
        )

    def _note_looks(self, shown: Sequence[Shown], source: Source) -> None:
        """Adds the connector's looks to the ledgers."""
        for i, picture in enumerate(shown):
            ledger = picture.said.ledger
            ledger.views += len(source.looked[i])
            ledger.encoded_views += source.encoded[i]
            look = self.pricer.vision(picture.plan.picture).look
            ledger.tflop += source.encoded[i] * look / 1e12


def note(shown: Sequence[Shown], encoded: EncodedPictures) -> None:
    """Gives each picture's conversation the connector's account of it."""
    for i, picture in enumerate(shown):
        picture.said.accounts.append(Account() if encoded.accounts is None else encoded.accounts[i])
        kept = picture.plan.tokens if encoded.kept is None else int(encoded.kept[i].sum())
        picture.said.ledger.visual_tokens += kept


def share(ledgers: Sequence[Ledger], phase: str, seconds: float) -> None:
    for ledger in ledgers:
        ledger.seconds[phase] += seconds / len(ledgers)


def fingerprint(picture: Image.Image) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for _, band in bands(picture):
        digest.update(band.tobytes())
    digest.update(repr(picture.size).encode())
    return digest.hexdigest()
