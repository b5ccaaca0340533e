"""Which image tokens an answer rests on, by relevance propagation; and the region that they form.

Chefer, Gur, Wolf: Generic Attention-model Explainability, ICCV 2021 (their rules 5-11), as Chain-of-Spot
(arXiv 2403.12966, section 3.2) uses it:

    eq. 4  attention A = softmax(Q K^T / sqrt(d))     the model's own, eager for this pass
    eq. 5  Psi = mean over heads of grad A and A      `interpret`, in three readings
    eq. 6  Sigma <- Sigma + Psi Sigma                 `propagate`; one row of it: `relevance`
           threshold epsilon, highlighted area        `roi`

Eq. 5 reads grad A * 1[A>0](A). The reading "chefer" is the cited paper's rule, max(grad A * A, 0); "literal"
keeps the product's sign; "indicator" leaves out A itself. The paper states neither threshold, nor extension,
nor the row that is read: here it is the row of the last prompt token, which predicts the answer's first
token, and the most likely token is explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate import upstream
from foveate.errors import FoveateError
from foveate.picture.geometry import Box, Size
from foveate.remembered import Remembered
from foveate.zoom.asking import message
from foveate.zoom.places import token_places
from foveate.zoom.vlm import VLM

Reading = Literal["chefer", "literal", "indicator"]
SIZES = 64  # number of picture sizes whose image token places are cached
READINGS: tuple[Reading, ...] = ("chefer", "literal", "indicator")


def interpret(attention: Tensor, gradient: Tensor, reading: Reading = "chefer") -> Tensor:
    """Eq. 5: attention and its gradient (..., H, T, S) -> Psi (..., T, S), float32."""
    attention, gradient = attention.float(), gradient.float()
    if reading == "chefer":
        product = (gradient * attention).clamp(min=0)
    elif reading == "literal":
        product = gradient * attention * (attention > 0)
    else:
        product = gradient * (attention > 0)
    return product.mean(-3)


def propagate(sigma: Tensor, psi: Tensor) -> Tensor:
    """Eq. 6 for one layer of self-attention: Sigma, Psi (..., T, T) -> Sigma. It starts as the identity."""
    return sigma + psi @ sigma


@dataclass
class BimodalRelevance:
    """Sigma of two kinds of tokens that attend to themselves and to each other (rules 6-11 of Chefer et al.).

    For models with cross-attention between text and picture. Start with `of`; call one method per attention,
    in the order of the forward pass; if both kinds attend to each other at once, as in LXMERT, call
    `attend_to_each_other`; read `text_image` (T, I), the relevance of the picture to each text token.
    """

    text: Tensor  # (T, T)
    image: Tensor  # (I, I)
    text_image: Tensor  # (T, I)
    image_text: Tensor  # (I, T)

    @classmethod
    def of(cls, text: int, image: int, device: str | torch.device = "cpu") -> BimodalRelevance:
        """State before the first layer: every token is relevant only to itself. On the device of the maps."""
        with torch.device(device):
            return cls(torch.eye(text), torch.eye(image), torch.zeros(text, image), torch.zeros(image, text))

    def text_attends(self, psi: Tensor) -> None:
        """Self-attention of the text, Psi (T, T): rules 6 and 7."""
        self.text, self.text_image = propagate(self.text, psi), propagate(self.text_image, psi)

    def image_attends(self, psi: Tensor) -> None:
        """Self-attention of the picture, Psi (I, I)."""
        self.image, self.image_text = propagate(self.image, psi), propagate(self.image_text, psi)

    def text_attends_to_image(self, psi: Tensor) -> None:
        """Cross-attention with the text's queries, Psi (T, I): rules 10 and 11."""
        self.text, self.text_image = (
            self.text + psi @ self.image_text,
            self.text_image + _normalised(self.text).T @ psi @ _normalised(self.image),
        )

    def image_attends_to_text(self, psi: Tensor) -> None:
        """Cross-attention with the picture's queries, Psi (I, T)."""
        self.image, self.image_text = (
            self.image + psi @ self.text_image,
            self.image_text + _normalised(self.image).T @ psi @ _normalised(self.text),
        )

    def attend_to_each_other(self, text_psi: Tensor, image_psi: Tensor) -> None:
        """Both cross-attentions of one layer, Psi (T, I) and (I, T): neither reads the other's update."""
        before = replace(self)
        self.text_attends_to_image(text_psi)
        before.image_attends_to_text(image_psi)
        self.image, self.image_text = before.image, before.image_text


def _normalised(sigma: Tensor) -> Tensor:
    """Rules 8 and 9: Sigma minus the identity, each row scaled to sum 1; rows of zeros stay zero.

    The sum is of magnitudes. For maps without negative values, as the rules have them, it is the plain sum;
    in a reading that keeps signs, a row's own sum may be close to zero or negative.
    """
    identity = torch.eye(len(sigma)).to(sigma)
    added = sigma - identity
    total = added.abs().sum(-1, keepdim=True)
    return added / total.where(total != 0, torch.ones_like(total)) + identity


def relevance(model: PreTrainedModel, inputs: Mapping[str, Any], reading: Reading = "chefer") -> Tensor:
    """The last token's row of Sigma: how much each token matters to the prediction after it, (B, T).

    Rows of Sigma can be computed from the last layer to the first, in the order of the gradients: each layer
    is run again with eager attention, used and freed, so that only one layer's attention map, (B, H, T, T),
    is in memory. The forward pass before keeps one hidden state per layer. Gradients are computed even under
    `torch.no_grad` and `torch.inference_mode`.

    Args:
        model: a VLM whose LLM is a decoder of self-attention layers in sequence.
        inputs: for its forward pass, padded on the left.
        reading: of eq. 5.

    Raises:
        FoveateError: a decoder without such layers, a model made in inference mode, an unknown reading.
    """
    if reading not in READINGS:
        raise FoveateError(f"unknown reading {reading!r} of eq. 5: choose one of {', '.join(READINGS)}")
    decoder = model.get_decoder()
    layers = _layers(decoder)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise FoveateError(
            f"{type(model).__name__} was made in torch.inference_mode and has no gradients: load it outside"
        )
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    top: list[Tensor] = []

    def note_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], args[1:], dict(kwargs)))

    def cut_graph(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        top.append(output.detach().requires_grad_())
        return top[0]

    with torch.inference_mode(False), _explained(model, decoder), torch.enable_grad():
        # A tensor made in inference mode cannot be part of a graph; a copy made here can.
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        hooks = [layer.register_forward_pre_hook(note_call, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(cut_graph))
        try:
            logits = model(**given, use_cache=False, logits_to_keep=1).logits[:, -1]  # (B, vocabulary)
        finally:
            for hook in hooks:
                hook.remove()
        (gradient,) = torch.autograd.grad(logits.amax(-1).sum(), top.pop())  # (B, T, D)
        row = torch.zeros(gradient.shape[:2], device=gradient.device)  # (B, T)
        row[:, -1] = 1
        for layer in reversed(layers):
            attention, with_respect, gradient = _layer_gradients(layer, *calls.pop(), gradient)
            row = row + torch.einsum("bt,bts->bs", row, interpret(attention, with_respect, reading))
    return row


def _layers(decoder: nn.Module) -> list[nn.Module]:
    layers = upstream.decoder_layers(decoder)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise FoveateError(
            f"{type(decoder).__name__} is not a decoder with self-attention in all layers: relevance cannot "
            "be propagated, choose another region proposer"
        )
    return list(layers)


def _layer_gradients(
    layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reruns one layer: its attention (B, H, T, T), the gradients of that and of its input (B, T, D)."""
    leaf = hidden.detach().requires_grad_()
    with upstream.attention_maps(layer) as seen:
        output = layer(leaf, *args, **kwargs)
    below, with_respect = torch.autograd.grad(output, (leaf, seen[0]), gradient)
    return seen[0].detach(), with_respect, below


@contextmanager
def _explained(model: PreTrainedModel, decoder: PreTrainedModel) -> Iterator[None]:
    """The LLM with eager attention, the model without dropout and trainable parameters; restored on exit."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with upstream.eager_attention(decoder):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class RegionRule:
    """How relevance becomes a region.

    Attributes:
        reading: of eq. 5.
        threshold: epsilon; scores, scaled to 0..1, are kept if they are at least this.
        extension: fraction by which the region's width and height grow, about its centre.
    """

    reading: Reading = "chefer"
    threshold: float = 0.5
    extension: float = 0.1

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise FoveateError(f"reading must be one of {', '.join(READINGS)}, not {self.reading!r}")
        if not 0 <= self.threshold <= 1:
            raise FoveateError(f"threshold must be from 0 to 1, not {self.threshold}")
        if self.extension < 0:
            raise FoveateError(f"extension must not be negative, it is {self.extension}")


def scaled(scores: Tensor) -> Tensor:
    """Scores (N,) from 0 to 1; all 1 where they are equal."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.ones_like(scores)


def roi(boxes: Sequence[Box], scores: Tensor, picture: Size, rule: RegionRule) -> Box:
    """The region that scored boxes form: whole original pixels, inside the picture.

    Args:
        boxes: (N,) regions of a detector or places of image tokens, original pixels.
        scores: (N,) their relevance.
        picture: its size.
        rule: threshold and extension.
    """
    kept = [box for box, score in zip(boxes, scaled(scores).tolist(), strict=True) if score >= rule.threshold]
    left, top = min(float(b.left) for b in kept), min(float(b.top) for b in kept)
    right, bottom = max(float(b.right) for b in kept), max(float(b.bottom) for b in kept)
    across, down = rule.extension * (right - left) / 2, rule.extension * (bottom - top) / 2
    grown = (left - across, top - down, right + across, bottom + down)
    outward = (math.floor(n) if i < 2 else math.ceil(n) for i, n in enumerate(grown))
    return Box(*outward).clipped(picture)


def region_scores(regions: Sequence[Box], places: Sequence[Box], scores: Tensor) -> Tensor:
    """Relevance of a detector's regions (R,): the mean of the image tokens' (N,), weighted by overlap."""
    corners = torch.tensor([[float(n) for n in box] for box in regions])[:, None]  # (R, 1, 4)
    cells = torch.tensor([[float(n) for n in box] for box in places])[None]  # (1, N, 4)
    low, high = (
        torch.maximum(corners[..., :2], cells[..., :2]),
        torch.minimum(corners[..., 2:], cells[..., 2:]),
    )
    overlap = (high - low).clamp(min=0).prod(-1)  # (R, N)
    return (overlap @ scores.to(overlap)) / overlap.sum(1).clamp(min=1e-6)


@dataclass(frozen=True)
class Highlight:
    """The part of a picture that an answer rests on.

    Attributes:
        box: the region, whole original pixels.
        heat: per image token (or per region of a detector) its place and its relevance, 0 to 1.
    """

    box: Box
    heat: list[tuple[Box, float]]


class Highlighter:
    """Finds the regions of pictures that the answers to questions rest on.

    Args:
        vlm: the model that is asked.
        rule: how relevance becomes a region.
        detect: picture -> boxes of its regions, in its pixels; by default the image tokens' own places are
            the regions.
    """

    def __init__(
        self,
        vlm: VLM,
        rule: RegionRule = RegionRule(),
        detect: Callable[[Image.Image], Sequence[Box]] | None = None,
    ) -> None:
        self.vlm, self.rule, self.detect = vlm, rule, detect
        self._places = Remembered(partial(token_places, vlm), most=SIZES)

    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[Highlight]:
        """One upright picture and one question each, in one batch.

        Raises:
            FoveateError: a model whose image tokens cannot be placed, or whose decoder is not supported.
        """
        inputs = self.vlm.inputs([message(*pair) for pair in zip(pictures, questions, strict=True)])
        rows = relevance(self.vlm.model, inputs, self.rule.reading).float().cpu()  # (B, T)
        visual = (inputs["input_ids"] == self.vlm.image_token_id).cpu()
        return [
            self._highlight(picture, row[where])
            for picture, row, where in zip(pictures, rows, visual, strict=True)
        ]

    def _highlight(self, picture: Image.Image, scores: Tensor) -> Highlight:
        size = Size(picture.height, picture.width)
        places = self._places(size)
        if len(places) != len(scores):
            raise FoveateError(
                f"{type(self.vlm.model).__name__} shows a picture of {size.width} x {size.height} pixels by "
                f"{len(scores)} tokens in this prompt and by {len(places)} in another: ask one at a time"
            )
        boxes = [box for box in places if box is not None]
        scores = scores[torch.tensor([box is not None for box in places])]
        if not bool(scores.isfinite().all()):
            raise FoveateError("the relevance of image tokens is not finite: use dtype float32")
        if self.detect is not None:
            regions = [box.clipped(size) for box in self.detect(picture)]
            regions = [box for box in regions if box.width > 0 and box.height > 0]
            if regions:  # else the detector found nothing: use the tokens' own places
                boxes, scores = regions, region_scores(regions, boxes, scores)
        heat = list(zip(boxes, scaled(scores).tolist(), strict=True))
        return Highlight(roi(boxes, scores, size, self.rule), heat)
