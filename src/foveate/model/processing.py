"""Pictures and messages -> tensors. The plan alone decides the number of placeholders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from foveate.errors import FoveateError, one_sentence
from foveate.methods import DEFAULT, method_class
from foveate.methods.base import Method, TowerGeometry
from foveate.model import checkpoints
from foveate.model.adapters import with_base
from foveate.model.folders import Hub, read_json
from foveate.model.foreign import check_preprocessor, norms_of
from foveate.model.queries import carried, padded_queries
from foveate.model.rendering import check_template, marked_answers
from foveate.model.sharing import IMAGE_PROCESSORS, PROCESSORS, Shared, auto_map
from foveate.model.text import (
    IMAGE_TOKEN,
    TEMPLATES,
    answers_in,
    chat_template,
    load_tokenizer,
    normalise_messages,
    picture_queries,
    pictures_of,
    questions_in,
    tokens_of,
    without_pictures,
)
from foveate.options import merged
from foveate.picture.geometry import Box, Canvas, Size, View, ViewPlan, whole
from foveate.picture.limits import LIMITS
from foveate.picture.reading import Picture, Transparency, bands, read_picture, to_array
from foveate.versions import names_versions

PROCESSOR = "processor_config.json"
MOST_PIXELS = 2**27  # of a picture during padding and resizing: 400 MB
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class FoveateImageProcessor(Shared, BaseImageProcessor):
    """Pictures -> plans -> normalised views.

    Args:
        method: the name of a method.
        options: the method's options.
        image_size: side of the tower's input, pixels.
        patch_size: side of its patches, pixels.
        image_mean: per channel, of pixels in 0..1.
        image_std: per channel.
        transparency: what transparent pictures show, as in `read_picture`; saved with the processor.

    Attributes:
        limits: on the pictures that it reads. Not saved: a folder's file must not set them.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012

    def __init__(
        self,
        method: str = DEFAULT,
        options: Mapping[str, Any] | None = None,
        image_size: int = 336,
        patch_size: int = 14,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        transparency: Transparency = "white",
        **kwargs: Any,
    ) -> None:
        if not (isinstance(method, str) and type(image_size) is int and type(patch_size) is int):
            raise FoveateError("image_processor: method should be a name, image_size and patch_size pixels")
        check_preprocessor(
            {**kwargs, "image_mean": image_mean, "image_std": image_std}, "image_processor", image_size
        )
        if kwargs.get("do_normalize") is False:
            raise FoveateError("image_processor: do_normalize False is not supported: set mean 0 and std 1")
        super().__init__(**kwargs)
        self.method = method
        self.options = dict(options or {})
        self.image_size = image_size
        self.patch_size = patch_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.transparency = _known(transparency)
        self.limits = LIMITS

    def planner(self) -> Method:
        """The method, for its plans."""
        key = (self.method, self.image_size, self.patch_size, repr(sorted(self.options.items())))
        cached = self.__dict__.get("_planner")
        if cached is None or cached[0] != key:
            method = method_class(self.method)(TowerGeometry(self.image_size, self.patch_size), self.options)
            cached = self.__dict__["_planner"] = (key, method)
        return cached[1]

    def plan(self, height: int, width: int) -> ViewPlan:
        """The plan for a picture of this size in pixels."""
        return self.planner().plan(height, width)

    def fetch_images(self, images: Any) -> Any:
        """Reads pictures in any form of `read_picture`, keeping the nesting of lists."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return self.read(images)

    def read(self, picture: Picture | Any) -> Image.Image:
        """One picture in any form of `read_picture`, as the model is to see it."""
        return read_picture(picture, self.limits, self.transparency)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Pictures, or nested lists of them, to `pixel_values` (V, 3, h, w) and `image_sizes` (P, 2).

        `num_patches` (P,) is the number of each picture's views, as other image processors call it.
        For methods that look at the original pictures, also `source_pixels` (n,), the bytes of all pictures
        (H, W, 3) in order, and `source_norms` (P, 2, 3), mean and standard deviation.
        """
        self._check_call(kwargs)
        pictures = list(_flat(self.fetch_images(images)))
        plans = [self.plan(picture.height, picture.width) for picture in pictures]
        views = [self.views(picture, plan) for picture, plan in zip(pictures, plans, strict=True)]
        data = {
            "pixel_values": np.concatenate(views),
            "image_sizes": np.array([plan.picture for plan in plans], dtype=np.int64),
            "num_patches": np.array([len(plan.views) for plan in plans], dtype=np.int64),
        }
        if self.planner().reads_source:
            shapes = [(picture.height, picture.width, 3) for picture in pictures]
            ends = np.cumsum([math.prod(shape) for shape in shapes])
            data["source_pixels"] = np.empty(ends[-1], dtype=np.uint8)
            for picture, shape, part in zip(
                pictures, shapes, np.split(data["source_pixels"], ends[:-1]), strict=True
            ):
                to_array(picture, out=part.reshape(shape))
            data["source_norms"] = np.stack([self.norms] * len(pictures))
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_call(self, arguments: Mapping[str, Any]) -> None:
        """Raises `FoveateError` for arguments of a call that ask for other pixels than the model knows."""
        check_preprocessor(arguments, "image processor", self.image_size)
        own = {"image_mean": self.image_mean, "image_std": self.image_std, "do_normalize": True}
        for key, value in own.items():
            given = arguments.get(key)
            if given is not None and (given if key == "do_normalize" else list(given)) != value:
                raise FoveateError(f"image processor: {key} is the model's own: leave it out of the call")

    def views(self, picture: Image.Image, plan: ViewPlan) -> np.ndarray:
        """All views of one picture, normalised: (V, 3, h, w) float32."""
        canvases = [self._normalise(self.paint(picture, canvas)) for canvas in plan.canvases]
        return np.stack([cut(canvases[view.canvas], view) for view in plan.views])

    def paint(self, picture: Image.Image, canvas: Canvas) -> Image.Image:
        """The picture on a canvas, 8 bits, before normalisation."""
        fill = tuple(int(255 * m) for m in self.image_mean) if canvas.fill == "mean" else (0, 0, 0)
        left, top, right, bottom = (int(n) for n in canvas.source)
        content = canvas.content
        if max((right - left) * (bottom - top), content.width * content.height) > MOST_PIXELS:
            return self._paint_sliver(picture, canvas, fill)
        size = (int(content.width), int(content.height))
        if (left, top, right, bottom) != (0, 0, *picture.size):
            picture = self._narrowed(picture, Box(left, top, right, bottom), size[0], fill)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        if (content.left, content.top) == (0, 0) and picture.size == (canvas.size.width, canvas.size.height):
            return picture
        page = Image.new("RGB", (canvas.size.width, canvas.size.height), fill)
        page.paste(picture, (int(content.left), int(content.top)))
        return page

    def _narrowed(self, picture: Image.Image, area: Box, width: int, fill: tuple[int, ...]) -> Image.Image:
        """An area of the picture's plane, padded with `fill` and resized to this width, at its own height.

        Pillow also resizes one axis after the other; in bands of rows, the padded picture is never in memory.
        """
        whole_width, height = int(area.width), int(area.height)
        page = Image.new("RGB", (whole_width, 1), fill).resize((width, 1), Image.Resampling.BICUBIC)
        page = page.resize((width, height), Image.Resampling.NEAREST)
        for top, band in bands(picture):
            row = Image.new("RGB", (whole_width, band.height), fill)
            row.paste(band, (-int(area.left), 0))
            row = row.resize((width, band.height), Image.Resampling.BICUBIC)
            page.paste(row, (0, top - int(area.top)))
        return page

    def _paint_sliver(self, picture: Image.Image, canvas: Canvas, fill: tuple[int, ...]) -> Image.Image:
        """Like `paint` for extreme shapes (1 x 60,000 pixels padded to a square, say), in little memory.

        Only the visible part is resized, and padding is added afterwards, so pixels along its edge may differ
        from `paint`'s.
        """
        place, page = canvas.place(whole(Size(picture.height, picture.width))), whole(canvas.size)
        left, right = max(place.left, page.left), min(place.right, page.right)
        top, bottom = max(place.top, page.top), min(place.bottom, page.bottom)
        across, down = picture.width / place.width, picture.height / place.height  # pixels per canvas pixel
        part = (
            float((left - place.left) * across),
            float((top - place.top) * down),
            float((right - place.left) * across),
            float((bottom - place.top) * down),
        )
        size = (max(round(right - left), 1), max(round(bottom - top), 1))
        image = Image.new("RGB", (canvas.size.width, canvas.size.height), fill)
        image.paste(picture.resize(size, Image.Resampling.BICUBIC, box=part), (round(left), round(top)))
        return image

    @property
    def norms(self) -> np.ndarray:
        """Mean and standard deviation per channel, of pixels in 0..1: (2, 3) float32."""
        return np.array([self.image_mean, self.image_std], dtype=np.float32)

    def _normalise(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3) bytes -> (3, H, W) float32, through a table of the 256 possible values."""
        values = (np.arange(256) / 255).astype(np.float32)
        table = [
            (values - np.float32(m)) / np.float32(s)
            for m, s in zip(self.image_mean, self.image_std, strict=True)
        ]
        pixels = np.asarray(image)
        return np.stack([t[pixels[..., channel]] for channel, t in enumerate(table)])

    def shown(self, pixels: Tensor) -> Image.Image:
        """A normalised view (3, h, w) as a picture again, 8-bit RGB."""
        mean, std = (np.array(n, dtype=np.float32)[:, None, None] for n in (self.image_mean, self.image_std))
        values = (pixels.float().cpu().numpy() * std + mean) * 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in super().to_dict().items() if k not in ("_planner", "limits")}
        return {**own, "auto_map": auto_map(IMAGE_PROCESSORS)}


def cut(canvas: np.ndarray, view: View) -> np.ndarray:
    """A view's pixels from its canvas's, (C, H, W) -> (C, h, w)."""
    left, top, right, bottom = (int(n) for n in view.box)
    return canvas[:, top : bottom : view.steps.height, left : right : view.steps.width]


@dataclass(frozen=True)
class Prompt:
    """A conversation as the LLM and the connector read it.

    Attributes:
        ids: the LLM's tokens, one placeholder for each visual token.
        places: per picture its first placeholder and the one after its last.
        queries: per picture the tokens that the connector reads as the question; empty if it reads none.
        answers: per token whether it is part of an answer that training learns.
    """

    ids: list[int]
    places: list[tuple[int, int]]
    queries: list[list[int]]
    answers: list[bool]


class FoveateProcessor(Shared, ProcessorMixin):
    """Image processor and tokenizer in one; made for `apply_chat_template`.

    Every `<image>` in a text is replaced by as many placeholders as the picture's plan says. For methods
    that read the question, `query_ids` and `query_mask` (P, T) hold the question to each picture: the one
    passed in `queries`, or, as the method's `query_text` says, the text of the user's message with the
    picture or all text around it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        tokenizer.padding_side = "left"  # as generate needs; training pads on the right itself
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    @names_versions
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vision_tower: str | Path | None = None,
        method: str | None = None,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
        transparency: Transparency | None = None,
        **kwargs: Any,
    ) -> FoveateProcessor:
        """Reads the processor of Foveate's own folders and of released ones.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            vision_tower: as in the model's `from_pretrained`.
            method: as in the model's `from_pretrained`.
            template: name of a chat template to use instead of the folder's own.
            options: changes to the method's options.
            transparency: `white` or `bare`, as for `read_picture`; by default the folder's own, or white.
            **kwargs: as for any processor, with the hub's arguments as in the model's `from_pretrained`.

        A folder of Foveate's own may hold the processor alone.
        """
        hub = Hub.taken(kwargs)
        folder, _ = with_base(pretrained_model_name_or_path, hub, ("config.json", PROCESSOR))
        alone = not (folder / "config.json").is_file()
        released = None if alone else checkpoints.recognise(folder, vision_tower, method, hub)
        if released is None:
            own = read_json(folder / PROCESSOR).get("image_processor")
            if not isinstance(own, dict):
                raise FoveateError(f"{folder / PROCESSOR} is missing or has no image_processor")
            if own.get("image_processor_type") != FoveateImageProcessor.__name__:
                raise FoveateError(f"{folder / PROCESSOR} is not of a processor of Foveate")
            if alone and method is not None:
                raise FoveateError(f"{folder} holds a processor alone: leave out the method {method!r}")
            config = None if alone else checkpoints.own_config(folder, method)  # also for its errors
            load_tokenizer(folder)  # for its errors
            with one_sentence(f"{folder}: its processor or chat template cannot be read"):
                processor = super().from_pretrained(folder, **{"trust_remote_code": False, **kwargs})
            if config is not None and method is not None:
                processor.image_processor.method = config.method
                processor.image_processor.options = dict(config.options)
        else:
            processor = cls._of_released(released)
        if template is not None:
            processor.chat_template = chat_template(template)
            processor.check_end(template)
        images = processor.image_processor
        if transparency is not None:
            images.transparency = _known(transparency)
        images.options = merged(method_class(images.method).Options, images.options, options)
        return processor

    @classmethod
    def _of_released(cls, released: checkpoints.Released) -> FoveateProcessor:
        config = checkpoints.convert_config(released)
        tokenizer, _ = load_tokenizer(released.folder)
        # originals come with their LLM's template, which has no pictures
        template = checkpoints.read_template(released.folder) if released.layout.family == "hf" else None
        if template is None and released.template is not None:
            template = chat_template(released.template)
        where, side = f"{released.folder}: preprocessor_config.json", config.vision_config.image_size
        check_preprocessor(released.preprocessor, where, side)
        read = released.layout.family == "hf" or config.options.get("fit") != "crop"
        if not read and released.preprocessor.get("do_center_crop") is False:
            raise FoveateError(f"{where}: do_center_crop False is not supported, only True")
        made = cls(image_processor_for(config, released.preprocessor), tokenizer, chat_template=template)
        if made.image_token_id != config.image_token_id:
            raise FoveateError(
                f"{released.folder / 'config.json'}: image_token_index {config.image_token_id} is not the "
                f"tokenizer's {IMAGE_TOKEN}, {made.image_token_id}"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": auto_map(PROCESSORS)}

    # transformers calls this for each picture of a text, and replaces `<image>` by the result.
    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        height, width = (int(n) for n in image_inputs["image_sizes"][image_idx])
        return self.image_token * self.image_processor.plan(height, width).tokens

    # vLLM counts a picture's placeholders and views with it before any pixel is read.
    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and views (`num_image_patches`) of pictures of these heights and widths."""
        if image_sizes is None:
            return MultiModalData()
        plans = [self.image_processor.plan(int(height), int(width)) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[plan.tokens for plan in plans],
            num_image_patches=[len(plan.views) for plan in plans],
        )

    @names_versions
    def __call__(
        self, images: Any = None, text: Any = None, queries: Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Texts and their pictures -> model inputs.

        Args:
            images: all pictures in order, or per text those that it shows.
            text: one or several, with `<image>` for each picture.
            queries: the question to each picture, in order, for methods that read it; by default it is found
                in texts that the chat template wrote.
            **kwargs: as for any processor.

        Raises:
            FoveateError: a question to a picture is neither given nor found; `truncation` would cut visual
                tokens.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if isinstance(images, (list, tuple)):
            if any(isinstance(some, (list, tuple)) for some in images):  # per text those that it shows
                given = [len(list(_flat(some))) for some in images]
                wanted = [one.count(self.image_token) for one in texts]
                if given != wanted:
                    raise FoveateError(f"lists of {given} pictures for texts that show {wanted}")
            if not list(_flat(images)):
                images = None
        try:
            inputs = super().__call__(images=images, text=text, **kwargs)
        except ValueError as error:  # transformers counts the visual tokens that are left
            if not kwargs.get("truncation") or "token count" not in str(error):
                raise
            raise FoveateError(
                "truncation would cut visual tokens: raise max_length, shorten the text, or set "
                "max_visual_tokens"
            ) from error
        inputs.pop("num_patches", None)  # the image processor's own
        method = self.image_processor.planner()
        shown = len(inputs["image_sizes"]) if "image_sizes" in inputs else 0
        if not method.uses_query or not (shown or queries):
            return inputs
        if queries is None and method.query_text == "question":
            queries = self._questions(texts)
        if queries is not None:
            if len(queries) != shown:
                raise FoveateError(f"{len(queries)} queries for {shown} pictures")
            rows = self.tokenizer(list(queries), add_special_tokens=False)["input_ids"] if shown else []
        else:
            named = {**kwargs, **kwargs.get("text_kwargs", {})}
            special = named.get("add_special_tokens", True)
            rows = [row for one in texts for row in self._around(one, special)]
        inputs["query_ids"], inputs["query_mask"] = padded_queries(rows, self.tokenizer.pad_token_id)
        visual = [np.asarray(row) == self.image_token_id for row in inputs["input_ids"]]
        plans = [self.image_processor.plan(*map(int, size)) for size in inputs.get("image_sizes", ())]
        marks = carried(rows, [plan.tokens for plan in plans], visual)
        if marks is not None:
            inputs["mm_token_type_ids"] = (
                torch.tensor(marks) if isinstance(inputs["input_ids"], Tensor) else marks
            )
        return inputs

    def _questions(self, texts: Sequence[str]) -> list[str]:
        """The question to each picture of texts that the chat template wrote."""
        found = []
        if self.chat_template is not None:
            found = [questions_in(text, self.apply_chat_template) for text in texts]
        if not found or any(questions is None for questions in found):
            raise FoveateError(
                f"{self.image_processor.planner().title} reads the question to each picture: pass "
                "queries=[...], or call apply_chat_template(tokenize=True)"
            )
        return [question for questions in found for question in questions or ()]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        plans: Sequence[ViewPlan] | None = None,
        *,
        learn: bool = False,
    ) -> Prompt:
        """A conversation as the LLM and the connector read it, for asking or for training.

        Args:
            messages: contents are texts or lists of parts; special tokens in them are such, but for those
                that `foveate.model.text.as_typed` has cut.
            plans: of the pictures, in their order; by default those of the pictures in the messages.
            learn: whether its answers are to be learnt, but for messages with "loss": False. If not, the
                prompt ends where the model continues, and earlier answers are text like any other.

        Raises:
            FoveateError: an invalid message, a picture that cannot be read, a template that does not write
                one `<image>` for each picture.
        """
        messages = normalise_messages(messages)
        if plans is None:
            pictures = [self.image_processor.fetch_images(picture) for picture in pictures_of(messages)]
            plans = [self.image_processor.plan(p.height, p.width) for p in pictures]
        text = self.apply_chat_template(messages, add_generation_prompt=not learn)
        spans = []
        if learn:
            names = self.tokenizer.special_tokens_map
            spans = marked_answers(self.chat_template, without_pictures(messages), **names)
            spans = _learnt(spans, [m for m in messages if m["role"] == "assistant"])
        bos = self.tokenizer.bos_token
        short, learnt = self._tokens(text, spans, bos is None or not text.startswith(bos))
        if short.count(self.image_token_id) != len(plans):
            raise FoveateError(
                f"the chat template writes {self.image_token} {short.count(self.image_token_id)} times for "
                f"{len(plans)} pictures: name another template"
            )
        ids: list[int] = []
        answers: list[bool] = []
        places: list[tuple[int, int]] = []
        for token, answer in zip(short, learnt, strict=True):
            count = 1
            if token == self.image_token_id:
                count = plans[len(places)].tokens
                places.append((len(ids), len(ids) + count))
            ids += [token] * count
            answers += [answer] * count
        return Prompt(ids, places, self._queries(messages, short, learnt, len(plans)), answers)

    def _queries(
        self, messages: Sequence[Mapping[str, Any]], ids: Sequence[int], learnt: Sequence[bool], pictures: int
    ) -> list[list[int]]:
        """Per picture the tokens that its connector reads, as the method's `query_text` says."""
        method = self.image_processor.planner()
        if not (method.uses_query and pictures):
            return [[]] * pictures
        if method.query_text == "question":
            return [tokens_of(query, self.tokenizer) for query in picture_queries(messages)]
        return [self._read(ids, learnt)] * pictures

    def _read(self, ids: Sequence[int], learnt: Sequence[bool]) -> list[int]:
        """The tokens for a connector that reads the text around a picture."""
        if self.image_processor.planner().query_text == "sequence":
            learnt = [False] * len(ids)
        return [
            token
            for token, answer in zip(ids, learnt, strict=True)
            if token != self.image_token_id and not answer
        ]

    def _around(self, text: str, special: bool) -> list[list[int]]:
        """Per picture of a rendered text the tokens around it; the chat template locates answers."""
        pictures = text.count(self.image_token)
        spans = answers_in(text, self.apply_chat_template) if self.chat_template is not None else []
        return [self._read(*self._tokens(text, spans, special))] * pictures

    def _tokens(
        self, text: str, spans: Sequence[tuple[int, int]], special: bool
    ) -> tuple[list[int], list[bool]]:
        """A text's tokens, one placeholder a picture, and whether each lies in one of the spans."""
        if not spans:
            ids = tokens_of(text, self.tokenizer, special)
            return ids, [False] * len(ids)
        tokens = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return tokens["input_ids"], [
            any(start < last and first < end for first, last in spans)
            for start, end in tokens["offset_mapping"]
        ]

    @names_versions
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """As in transformers; contents may be plain strings, and batches may have text-only ones."""
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = [normalise_messages(c) for c in (conversation if batched else [conversation])]
        method = self.image_processor.planner()
        if kwargs.get("tokenize") and method.uses_query and method.query_text == "question":
            queries = [query for messages in conversations for query in picture_queries(messages)]
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "queries": queries}
        if self.chat_template is None and kwargs.get("chat_template") is None:
            raise FoveateError(
                "the model's folder has no chat_template.jinja: name the template that it was trained with, "
                f"one of {', '.join(TEMPLATES)}"
            )
        check_template(self, conversations, kwargs)
        return super().apply_chat_template(conversations if batched else conversations[0], **kwargs)

    def answer_end(self) -> int | None:
        """The token with which the chat template ends an answer; None if it ends it with blanks at most."""
        mark = self._end_mark()
        ids = self.tokenizer(mark, add_special_tokens=False)["input_ids"] if mark else []
        if not ids or ids[0] == self.tokenizer.unk_token_id:
            return None
        return ids[0] if len(ids) == 1 or ids[0] in self.tokenizer.all_special_ids else None

    def check_end(self, template: str | None = None) -> None:
        """Raises `FoveateError` if the chat template ends an answer with no mark, or one of several tokens.

        A model would learn or be shown such a mark, but `generate` could never stop at it. `plain`, for
        captions alone, needs none.

        Args:
            template: its name, if it has one.
        """
        mark = self._end_mark()
        if not mark and self.chat_template != chat_template("plain"):
            raise FoveateError(
                f"{self._template(template)} writes nothing behind an answer at which it would stop: name "
                f"another one of {', '.join(TEMPLATES)}, and a tokenizer with an eos_token"
            )
        if mark and self.answer_end() is None:
            count = len(self.tokenizer(mark, add_special_tokens=False)["input_ids"])
            raise FoveateError(
                f"{self._template(template)} ends answers with {mark!r:.60}, which is not one token "
                f"of this LLM but {count}, so that no answer would stop: name another template, such as "
                "vicuna_v1, or add the mark to the tokenizer as a special token"
            )

    def check_learnt_end(self, template: str | None = None) -> None:
        """As `check_end`, also for a mark that is not among the assistant's text that training learns."""
        self.check_end(template)
        mark, end = self._end_mark(), self.answer_end()
        answer = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        prompt = self.prompt(answer, learn=True)
        if mark and end not in [t for t, learnt in zip(prompt.ids, prompt.answers, strict=True) if learnt]:
            raise FoveateError(
                f"{self._template(template)} leaves the end of an answer, {mark!r:.60}, outside of what it "
                "marks as the assistant's text, so that no answer would stop: move it inside, or "
                "name another template"
            )

    def _template(self, name: str | None) -> str:
        return "the chat template" if name is None else f"the chat template {name}"

    def _end_mark(self) -> str:
        """What the chat template writes behind the last answer, without blanks."""
        words = ("the question", "the answer")
        messages = [
            {"role": role, "content": word} for role, word in zip(("user", "assistant"), words, strict=True)
        ]
        return self.apply_chat_template(messages).rpartition(words[1])[2].strip()

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _learnt(spans: list[tuple[int, int]], answers: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The spans of the answers that are learnt, of one span for each answer."""
    learnt = [answer.get("loss", True) for answer in answers]
    if all(learnt):
        return spans
    if len(spans) != len(answers):
        raise FoveateError(
            f"the chat template marks {len(spans)} texts for {len(answers)} answers, so that one alone "
            "cannot be left unlearnt: name another template"
        )
    return [span for span, wanted in zip(spans, learnt, strict=True) if wanted]


def image_processor_for(config: Any, preprocessor: Mapping[str, Any] | None = None) -> FoveateImageProcessor:
    """The image processor that fits a model; mean and std from its tower's preprocessor_config."""
    geometry = TowerGeometry.of(config.vision_config)
    preprocessor = preprocessor or {}
    check_preprocessor(preprocessor, "preprocessor_config.json")
    mean, std = norms_of(preprocessor, CLIP_MEAN, CLIP_STD)
    return FoveateImageProcessor(
        method=config.method,
        options=config.options,
        image_size=geometry.image_size,
        patch_size=geometry.patch_size,
        image_mean=mean,
        image_std=std,
    )


def _known(transparency: Any) -> Transparency:
    if transparency not in get_args(Transparency):
        known = " or ".join(get_args(Transparency))
        raise FoveateError(f"transparency should be {known}, not {transparency!r}")
    return transparency


def _flat(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    else:
        yield images
