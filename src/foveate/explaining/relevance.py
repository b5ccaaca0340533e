"""Which tokens an answer rests on, by relevance propagation through an LLM.

Chefer, Gur, Wolf: Generic Attention-model Explainability, ICCV 2021 (their rules 5-11), as Chain-of-Spot
(arXiv 2403.12966, section 3.2) uses it:

    eq. 4  attention A = softmax(Q K^T / sqrt(d))     the model's own, eager for this pass
    eq. 5  Psi = mean over heads of grad A and A      `interpret`, in three readings
    eq. 6  Sigma <- Sigma + Psi Sigma                 `propagate`; rows of it: `relevance` and other

Eq. 5 reads grad A * 1[A>0](A). The reading "chefer" is the cited paper's rule, max(grad A * A, 0); "literal"
keeps the product's sign; "indicator" leaves out A itself. The paper does not state which row is read:
`relevance` reads that of the last prompt token, which predicts the answer's first token, and explains the
most likely token; `answer_relevance` reads one row for each token of a given answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate import upstream
from foveate.errors import FoveateError

Reading = Literal["chefer", "literal", "indicator"]
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

    Args:
        model: a VLM whose LLM is a decoder of self-attention layers in sequence.
        inputs: for its forward pass, padded on the left.
        reading: of eq. 5.

    Raises:
        FoveateError: a decoder without such layers, a model made in inference mode, an unknown reading.
    """
    (row,) = _rows(model, inputs, 1, lambda logits: logits.amax(-1), reading)
    return row


def answer_relevance(
    model: PreTrainedModel, inputs: Mapping[str, Any], answer: Tensor, reading: Reading = "chefer"
) -> Tensor:
    """How much each token matters to each of an answer's last tokens, (K, T).

    Args:
        model: as for `relevance`.
        inputs: one conversation, up to the answer's last token but one.
        answer: (K,) ids of the answer's last K tokens; the logit of each is explained.
        reading: of eq. 5.

    Raises:
        FoveateError: as for `relevance`.
    """
    return _rows(
        model,
        inputs,
        len(answer),
        lambda logits: logits.gather(-1, answer.to(logits.device)[None, :, None])[..., 0],
        reading,
    )[:, 0]


def _rows(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    last: int,
    score: Callable[[Tensor], Tensor],
    reading: Reading,
) -> Tensor:
    """Rows of Sigma for the last K tokens of each text, (K, B, T).

    Rows of Sigma can be computed from the last layer to the first, in the order of the gradients: each layer
    is run again with eager attention, used and freed, so that only one layer's attention map, (B, H, T, T),
    is in memory. The forward pass before keeps one hidden state per layer. Gradients are computed even under
    `torch.no_grad` and `torch.inference_mode`.

    Args:
        model: as for `relevance`.
        inputs: likewise.
        last: K.
        score: logits (B, K, vocabulary) -> what is explained, (B, K).
        reading: of eq. 5.
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
            logits = model(**given, use_cache=False, logits_to_keep=last).logits  # (B, K, vocabulary)
        finally:
            for hook in hooks:
                hook.remove()
        explained, above = score(logits).sum(0), top.pop()  # (K,), (B, T, D)
        ones = [torch.ones_like(one) for one in explained]
        gradients = [below for (below,) in _gradients(list(explained), [above], ones)]
        rows = torch.zeros(last, *above.shape[:2], device=above.device)  # (K, B, T)
        for number in range(last):
            rows[number, :, number - last] = 1
        for layer in reversed(layers):
            leaf, output, attention = _rerun(layer, *calls.pop())
            found = _gradients([output] * last, [leaf, attention], gradients)
            for number, (below, with_respect) in enumerate(found):
                psi = interpret(attention.detach(), with_respect, reading)
                rows[number] += torch.einsum("bt,bts->bs", rows[number], psi)
                gradients[number] = below
    return rows


def _gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], above: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Of each output with respect to the leaves, one after the other; the graph is freed with the last."""
    for number, gradient in enumerate(above):
        more = number + 1 < len(above)
        yield torch.autograd.grad(outputs[number], leaves, gradient, retain_graph=more)


def _layers(decoder: nn.Module) -> list[nn.Module]:
    layers = upstream.decoder_layers(decoder)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise FoveateError(
            f"{type(decoder).__name__} is not a decoder with self-attention in all layers: relevance cannot "
            "be propagated, choose another region proposer"
        )
    return list(layers)


def _rerun(
    layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer again: its input (B, T, D), its output, and its attention (B, H, T, T), in one graph."""
    leaf = hidden.detach().requires_grad_()
    with upstream.attention_maps(layer) as seen:
        output = layer(leaf, *args, **kwargs)
    return leaf, output, seen[0]


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


def scaled(scores: Tensor) -> Tensor:
    """Scores (N,) from 0 to 1; all 1 where they are equal."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.ones_like(scores)
