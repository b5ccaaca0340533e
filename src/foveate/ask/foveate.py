"""Asking about pictures: load a model, ask, see where it looked and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from foveate.ask.answer import Answer
from foveate.ask.context import Context
from foveate.ask.conversation import Chat, converse
from foveate.ask.engine import MEMORY, Engine
from foveate.devices import usable_device, usable_dtype
from foveate.errors import FoveateError
from foveate.explaining.explanation import Explanation
from foveate.explaining.faithfulness import PROBE, Probe
from foveate.explaining.relevance import Reading
from foveate.files import changed_folder
from foveate.model.card import CARD, is_own
from foveate.model.folders import Hub, found
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.pushing import Push, push
from foveate.model.quantising import Quantize
from foveate.model.sharing import files_of
from foveate.picture.geometry import ViewPlan
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import Picture, Transparency
from foveate.versions import names_versions

EMBEDDED = Path(__file__).parents[1] / "embedded"


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
    max_positions: int | None = None,
    quantize: Quantize | None = None,
    compiled: bool = False,
    limits: Limits = LIMITS,
    transparency: Transparency | None = None,
    **hub: Any,
) -> Foveate:
    """Loads a model for asking: Foveate's own folder, or a released checkpoint of any known layout.

    Args:
        model: folder or Hugging Face hub id, also of a LoRA adapter; by default the embedded model, which
            has learnt the lab's coloured shapes and signs with letters, digits and words on them, and nothing
            else.
        device: by default the best there is.
        dtype: `float32`, `bfloat16` or `float16`; by default what is fast and safe on the device.
        vision_tower: folder or hub id of the vision tower, for original LLaVA checkpoints that keep it apart.
        method: a method other than the folder's own, with the same parameters.
        template: name of a chat template instead of the folder's own.
        options: changes to the method's options, for example `{"max_visual_tokens": 1000}`.
        max_positions: the longest conversation in tokens; by default what the LLM has positions for.
        quantize: `8bit` or `4bit`: the LLM's linear layers in fewer bits, by bitsandbytes. Such a model can
            be asked, but not saved.
        compiled: whether `torch.compile` makes the vision tower faster, which takes a minute or more at the
            first picture.
        limits: on the pictures that are read.
        transparency: what transparent pictures show: `white`, laid on white paper, or `bare`, as the authors
            of released checkpoints read them; by default the folder's own choice, or white.
        **hub: as in transformers, `revision`, a branch, tag or commit; `subfolder`; `token`; `cache_dir`;
            `local_files_only`; `force_download`. The last four also count for a tower that is kept apart.

    Returns:
        The model; `device` and `dtype` show what was chosen.

    Raises:
        FoveateError: no such folder or revision, unknown layout, missing weights or tokenizer, wrong options.
    """
    place = Hub.of(hub, "load")
    device = usable_device(device)
    number_format = usable_dtype(dtype, device)
    model = EMBEDDED if model is None else model
    folder = found(model, place)  # once: both come from the same commit
    given: dict[str, Any] = {"vision_tower": vision_tower, "method": method, **place.parts().arguments()}
    processor = FoveateProcessor.from_pretrained(
        folder, template=template, options=options, transparency=transparency, **given
    )
    processor.image_processor.limits = limits
    placed: dict[str, Any] = {} if quantize is None else {"device_map": {"": device}}
    network = FoveateForConditionalGeneration.from_pretrained(
        folder,
        options=dict(options or {}),
        max_positions=max_positions,
        dtype=number_format,
        quantize=quantize,
        **placed,
        **given,
    )
    if template is not None:
        network.stop_at(processor.answer_end())
    if quantize is None:
        network.to(device)  # a quantised one is there already, and cannot be moved
    if compiled:
        network.vision_tower.compile(dynamic=True)
    return Foveate(network.eval(), processor)


class Foveate:
    """A model and its processor, ready to be asked. Several threads may ask at once.

    Args:
        model: the network, on its device.
        processor: what turns pictures and messages into its inputs.
        memory: bound in bytes on vision features kept between questions; 0 keeps none.
        keep_context: whether the LLM's cache is kept from one turn of a conversation to the next; without it,
            every turn reads the whole conversation again.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        memory: int = MEMORY,
        keep_context: bool = True,
    ) -> None:
        self.model, self.processor = model, processor
        self.engine = Engine(model, processor, memory, keep_context)

    def __repr__(self) -> str:
        number_format = str(self.dtype).removeprefix("torch.")
        return f"Foveate({self.model.method.title}, {self.device}, {number_format})"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def ask(self, picture: Picture, question: str, *, max_new_tokens: int = 256, **generation: Any) -> Answer:
        """Asks one question about a picture; further questions about the same picture reuse its features.

        Args:
            picture: path, URL, bytes, array or PIL image, as `read_picture` takes it; the answer keeps it.
            question: not empty.
            max_new_tokens: bound on the answer's length.
            **generation: further arguments of transformers' `generate`; greedy decoding by default.

        Raises:
            FoveateError: a picture that cannot be read, an empty question.
        """
        return self.ask_all([(picture, question)], max_new_tokens=max_new_tokens, **generation)[0]

    def ask_all(
        self, questions: Iterable[tuple[Picture, str]], *, max_new_tokens: int = 256, **generation: Any
    ) -> list[Answer]:
        """Asks several questions at once, each about its own picture, in one batch.

        Args:
            questions: pairs of a picture and what is asked about it.
            max_new_tokens: bound on the length of each answer.
            **generation: as for `ask`.

        Raises:
            FoveateError: as for `ask`; no questions; a streamer for more than one.
        """
        questions = list(questions)
        if not questions:
            raise FoveateError("there are no questions: give pairs of a picture and a question")
        if len(questions) > 1 and generation.get("streamer") is not None:
            raise FoveateError("only one answer can be streamed: ask one question at a time")
        read = self.processor.image_processor.read
        chats = [Chat(self.engine, read(picture)) for picture, _ in questions]
        generation["max_new_tokens"] = max_new_tokens
        return converse(chats, [question for _, question in questions], Context(), generation)

    def explain(
        self,
        picture: Picture,
        question: str,
        *,
        words: int = 32,
        reading: Reading = "chefer",
        probe: Probe = PROBE,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> Explanation:
        """Asks one question about a picture, and explains the answer: where it looked and what it rests on.

        Nobody else can ask the model while the answer is explained.

        Args:
            picture: as for `ask`.
            question: not empty.
            words: how many of the answer's tokens are explained, its first ones.
            reading: of attention and gradient: `chefer`, `literal` or `indicator`, as in
                `foveate.explaining.relevance`.
            probe: how it is measured whether the explanation is faithful; `Probe(draws=0)` leaves that out.
            max_new_tokens: bound on the answer's length.
            **generation: as for `ask`.

        Raises:
            FoveateError: as for `ask`; an LLM whose relevance cannot be propagated.
        """
        chat = self.chat(picture)
        chat.ask(question, max_new_tokens=max_new_tokens, **generation)
        return chat.explain(words=words, reading=reading, probe=probe)

    def chat(self, picture: Picture) -> Chat:
        """A conversation about one picture that remembers what was said."""
        read: Image.Image = self.processor.image_processor.read(picture)
        return Chat(self.engine, read.copy() if read is picture else read)

    def save(self, folder: str | Path) -> None:
        """Writes model, processor and card to a folder that `foveate.load` reads.

        A card that somebody has changed is kept. Raises `FoveateError` if the folder cannot be written; a
        model that was there is then still there.
        """
        with changed_folder(Path(folder), stale="model*.safetensors*") as part:
            self.model.save_pretrained(part)
            self.processor.save_pretrained(part)
            if is_own(Path(folder)):
                (part / CARD).unlink()

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "50GB", tags: list[str] | None = None, **how: Any
    ) -> str:
        """Uploads model, processor and card to the Hugging Face hub in one commit.

        Args:
            repo_id: `owner/name`; a repository that is missing is made.
            max_shard_size: of the files of weights.
            tags: for the card.
            **how: the attributes of `foveate.model.pushing.Push`, as in transformers: `commit_message`,
                `commit_description`, `private`, `token`, `revision`, `create_pr`.

        Returns:
            The address of the commit.

        Raises:
            FoveateError: the hub refuses.
        """
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.model.save_pretrained(folder, max_shard_size=max_shard_size)
            self.processor.save_pretrained(folder)
            return push(folder, files_of(folder), repo_id, Push(**how), tags or ())

    def plan(self, picture: Image.Image) -> ViewPlan:
        """The views that a picture is cut into."""
        return self.engine.plan(picture)
