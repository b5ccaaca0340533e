"""Relevance propagation over real VLM classes, where their image tokens look, and regions made of both."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError
from foveate.explaining.relevance import (
    READINGS,
    BimodalRelevance,
    interpret,
    propagate,
    relevance,
    scaled,
)
from foveate.methods.base import Method
from foveate.picture.geometry import Box, Size
from foveate.tiny import tiny_model
from foveate.zoom.asking import message
from foveate.zoom.places import token_places
from foveate.zoom.relevance import Highlighter, RegionRule, region_scores, roi
from foveate.zoom.vlm import VLM
from tests.support import gap, picture
from tests.vlms import VLMS, foveate_model, llava_onevision


@cache
def vlm(name: str) -> VLM:
    return VLMS[name]()


def rows_by_whole_maps(vlm: VLM, inputs: dict[str, Tensor], reading: str) -> Tensor:
    """The same by the book: all maps and gradients at once, Sigma whole, its last row read in the end."""
    decoder = vlm.model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        seen.append(output[1])

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in decoder.layers]
    logits = vlm.model(**inputs, use_cache=False).logits[:, -1]
    gradients = torch.autograd.grad(logits.amax(-1).sum(), seen)
    for hook in hooks:
        hook.remove()
    decoder.set_attn_implementation(before)
    sigma = torch.eye(inputs["input_ids"].shape[1]).expand(len(logits), -1, -1)
    for attention, gradient in zip(seen, gradients, strict=True):
        sigma = propagate(sigma, interpret(attention.detach(), gradient, reading))
    return sigma[:, -1]


@pytest.mark.parametrize("name", VLMS)
def test_row_is_that_of_the_whole_sigma(name: str) -> None:
    model = vlm(name)
    inputs = model.inputs([message(picture(60, 90), "What is this?"), message(picture(60, 90, 1), "Why?")])
    for reading in READINGS:
        row = relevance(model.model, inputs, reading)
        expected = rows_by_whole_maps(model, inputs, reading)
        assert gap(row, expected) <= 1e-5 * float(expected.abs().max()), reading
    visual = inputs["input_ids"] == model.image_token_id
    assert float(row[visual].abs().max()) > 0


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_model_is_as_before_afterwards(name: str) -> None:
    model = VLMS[name]()
    network, decoder = model.model.train(), model.model.get_decoder()
    frozen = next(iter(network.parameters())).requires_grad_(False)
    layer = decoder.layers[0].eval()  # as with a part that is not trained
    training = [m.training for m in network.modules()]
    inputs = model.inputs([message(picture(60, 90), "What is this?")])
    network(**inputs)  # transformers adds its own hooks at the first call
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    relevance(network, inputs)
    assert decoder.config._attn_implementation == "sdpa"
    assert network.training and not layer.training
    assert training == [m.training for m in network.modules()]
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in network.parameters()) == len(list(network.parameters())) - 1
    assert all(p.grad is None for p in network.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]


@pytest.mark.parametrize("name", VLMS)
def test_in_inference_mode(name: str) -> None:
    model = VLMS[name]()
    (expected,) = Highlighter(model)([picture(60, 90)], ["What is this?"])
    with torch.inference_mode():
        model.answer([message(picture(60, 90), "What is this?")], max_new_tokens=1)
        (found,) = Highlighter(model)([picture(60, 90)], ["What is this?"])
        assert torch.is_inference_mode_enabled()
    assert found == expected


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = VLMS["llava"]()
    with pytest.raises(FoveateError, match=r"LlavaForConditionalGeneration was made in torch\.inference"):
        relevance(model.model, model.inputs([message(picture(60, 90), "Why?")]))


def test_no_more_than_one_map_at_a_time() -> None:
    """The largest tensors that autograd keeps at once are those of one layer."""
    model = vlm("llava")
    inputs = model.inputs([message(picture(60, 90), "w" * 100)])
    tokens = inputs["input_ids"].shape[1]
    alive: list[int] = []
    held: set[int] = set()

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            if tensor.shape[-2:] == (tokens, tokens):
                held.add(id(self))
                alive.append(len(held))

        def __del__(self) -> None:
            held.discard(id(self))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda box: box.tensor):
        relevance(model.model, inputs)
        one_pass = max(alive)
        assert not held
        alive.clear()
        rows_by_whole_maps(model, inputs, "chefer")
    layers = len(model.model.get_decoder().layers)
    assert max(alive) >= layers * one_pass


def test_padding_on_the_left_has_no_relevance() -> None:
    model = vlm("llava")
    long, short = "What is this, and where does it come from?", "Why?"
    both = model.inputs([message(picture(60, 90), long), message(picture(60, 90, 1), short)])
    alone = model.inputs([message(picture(60, 90, 1), short)])
    row = relevance(model.model, both)[1]
    padded = len(row) - alone["input_ids"].shape[1]
    assert padded > 0
    assert float(row[:padded].abs().max()) == 0
    assert gap(row[padded:], relevance(model.model, alone)[0]) < 1e-5


def test_unknown_reading_and_odd_decoders_are_named() -> None:
    model = vlm("llava")
    inputs = model.inputs([message(picture(60, 90), "Why?")])
    with pytest.raises(FoveateError, match="unknown reading 'chafer'"):
        relevance(model.model, inputs, "chafer")
    layers = model.model.get_decoder().layers
    own = layers[0].self_attn
    del layers[0].self_attn
    try:
        with pytest.raises(FoveateError, match="choose another region proposer"):
            relevance(model.model, inputs)
    finally:
        layers[0].self_attn = own


# Where image tokens look.


def views_of(model: VLM, shown: Image.Image) -> Tensor:
    """Features of a picture's image tokens in the order of the LLM's sequence, (n, D)."""
    inputs = model.inputs([message(shown, "Why?")])
    caught: list[Tensor] = []

    def catch(module: torch.nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        caught.append(kwargs["inputs_embeds"])

    hook = model.model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model.model(**inputs)
    hook.remove()
    return caught[0][inputs["input_ids"] == model.image_token_id]


def without_attention(model: VLM) -> VLM:
    """The vision tower's attention adds nothing: each of its tokens knows its own patch alone."""
    ends = ("self_attn.out_proj", "attention.o_proj")
    for name, module in model.model.named_modules():
        if name.endswith(ends) or (".visual." in name and name.endswith("attn.proj")):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("size", [Size(60, 90), Size(150, 70), Size(33, 41)])
@pytest.mark.parametrize("name", VLMS)
def test_what_changes_is_where_the_picture_changed(name: str, size: Size) -> None:
    """A spot is painted into the picture: those placed on it change, and no others."""
    assert_places_change(without_attention(VLMS[name]()), size)


def test_a_view_that_is_not_square() -> None:
    """Pixtral's tower shows 16 x 64 pixels as 2 x 8 tokens, which are as many as 4 x 4."""
    model, size = without_attention(VLMS["llava_pixtral"]()), Size(16, 64)
    places = [box for box in token_places(model, size) if box is not None]
    assert [round(float(box.left)) for box in places] == [8 * i for i in range(8)] * 2
    assert_places_change(model, size)


def test_packed_features_are_no_grids_of_their_views() -> None:
    """300 tokens of 3 views are 12 x 12 of the whole and 12 x 13 of two tiles, not 10 x 10 of each view."""
    model, size = without_attention(llava_onevision(48, 4, ((1, 2), (2, 1)))), Size(60, 60)
    inputs = model.inputs([message(picture(*size), "Why?")])
    assert inputs["pixel_values"].shape[1] == 3
    assert int((inputs["input_ids"] == model.image_token_id).sum()) == 300
    assert_places_change(model, size)


def assert_places_change(model: VLM, size: Size) -> None:
    places = token_places(model, size)
    grey = Image.new("RGB", (size.width, size.height), (128, 128, 128))
    before = views_of(model, grey)
    assert len(places) == len(before)
    for across, down in ((0.3, 0.35), (0.62, 0.6)):
        left, top = round(across * size.width), round(down * size.height)
        painted = grey.copy()
        painted.paste((255, 0, 0), (left, top, left + 8, top + 8))
        change = (views_of(model, painted) - before).norm(dim=1)
        changed = change > 0.02 * change.max()
        under = torch.tensor([overlap(box, Box(left, top, left + 8, top + 8)) >= 4 for box in places])
        near = torch.tensor([overlap(box, Box(left - 6, top - 6, left + 14, top + 14)) > 0 for box in places])
        assert bool(under.any())
        assert bool(changed[under].all()), "a token placed on the spot does not change"
        assert not bool(changed[~near].any()), "a token placed elsewhere changes"


def overlap(box: Box | None, spot: Box) -> float:
    """How many pixels a token's place and a spot have in common across or down, whichever is less."""
    if box is None:
        return 0.0
    across = min(box.right, spot.right) - max(box.left, spot.left)
    down = min(box.bottom, spot.bottom) - max(box.top, spot.top)
    return float(max(min(across, down), 0))


def test_a_method_that_mixes_its_views_places_tokens_on_their_canvas() -> None:
    model, size = foveate_model("inf_llava"), Size(80, 80)
    places = token_places(model, size)
    grey = Image.new("RGB", (80, 80), (128, 128, 128))
    painted = grey.copy()
    painted.paste((255, 0, 0), (0, 0, 40, 40))
    change = (views_of(model, painted) - views_of(model, grey)).norm(dim=1)
    under = torch.tensor([overlap(box, Box(0, 0, 40, 40)) > 0 for box in places])
    assert int(under.sum()) == len(places) / 4
    assert float(change[under].mean()) > float(change[~under].mean())


def test_places_follow_the_processors_crop() -> None:
    """LLaVA's processor shows the middle square: 16 tokens of 15 pixels each, to a tenth of a pixel."""
    places = token_places(vlm("llava"), Size(60, 90))
    assert len(places) == 16
    for i, box in enumerate(places):
        left, top = 15 + 15 * (i % 4), 15 * (i // 4)
        assert np.allclose([float(n) for n in box], (left, top, left + 15, top + 15), atol=0.1)


def test_padding_has_no_place() -> None:
    """Foveate's LLaVA pads to a square: the first row of a wide picture's tokens shows nothing."""
    places = token_places(vlm("foveate-llava"), Size(40, 160))
    assert places[:4] == [None] * 4
    assert all(box is not None for box in places[4:12])


def test_a_picture_of_one_pixel() -> None:
    for name in VLMS:
        if name.startswith("qwen"):  # their own processor refuses such pictures
            continue
        boxes = [box for box in token_places(vlm(name), Size(1, 1)) if box is not None]
        assert all(box == box.clipped(Size(1, 1)) for box in boxes), name
        assert sum(float(box.width * box.height) for box in boxes) > 0.99, name  # all of it, at least once


def test_tokens_that_are_no_grid_are_refused() -> None:
    odd = VLMS["llava_siglip"]()
    odd.processor.replace_image_token = lambda *args, **kwargs: "<image>" * 20
    with pytest.raises(FoveateError, match="20 image tokens, but 0 can be placed"):
        token_places(odd, Size(60, 90))
    odd.model.config.image_token_id = 0
    with pytest.raises(FoveateError, match="has 0 image tokens, but 0 can be placed"):
        token_places(odd, Size(60, 90))
    few = tiny_model("slime", {"max_visual_tokens": 20})
    with pytest.raises(FoveateError, match="max_visual_tokens 20 the question decides which there are"):
        token_places(VLM(few.model, few.processor), Size(60, 90))


# Rules on small numbers.


def test_readings_differ_where_the_paper_is_unclear() -> None:
    attention = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])  # (H, T, S)
    gradient = torch.tensor([[[2.0, -4.0], [3.0, -1.0]]])
    assert interpret(attention, gradient, "chefer").tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert interpret(attention, gradient, "literal").tolist() == [[1.0, -2.0], [0.0, -1.0]]
    assert interpret(attention, gradient, "indicator").tolist() == [[2.0, -4.0], [0.0, -1.0]]


def test_bimodal_rules_by_hand() -> None:
    """Two text tokens and one image token; numbers worked out on paper from rules 6-11."""
    both = BimodalRelevance.of(2, 1)
    both.text_attends(torch.tensor([[0.0, 0.5], [0.25, 0.0]]))
    assert both.text.tolist() == [[1.0, 0.5], [0.25, 1.0]]
    both.text_attends_to_image(torch.tensor([[0.2], [0.4]]))
    # Rows of what was added, [0, 0.5] and [0.25, 0], scaled to 1: [[1, 1], [1, 1]] with the identity.
    assert torch.allclose(both.text_image, torch.tensor([[0.6], [0.6]]))
    assert both.text.tolist() == [[1.0, 0.5], [0.25, 1.0]]  # the image knows nothing of the text yet
    both.image_attends_to_text(torch.tensor([[0.5, 0.1]]))
    assert torch.allclose(both.image_text, torch.tensor([[0.6, 0.6]]))
    assert torch.allclose(both.image, torch.tensor([[1.0 + 0.5 * 0.6 + 0.1 * 0.6]]))
    both.image_attends(torch.tensor([[0.5]]))
    assert torch.allclose(both.image_text, torch.tensor([[0.9, 0.9]]))


def test_rows_that_cancel_stay_bounded() -> None:
    """A reading that keeps signs adds 0.5 and -0.5 + 1e-6: their sum does not measure the row."""
    both = BimodalRelevance.of(2, 1)
    both.text_attends(torch.tensor([[0.5, -0.5 + 1e-6], [-0.25, -0.75]]))
    both.text_attends_to_image(torch.tensor([[0.2], [0.4]]))
    # Rows, scaled to magnitudes of the sum 1, with the identity: [[1.5, -0.5], [-0.25, 0.25]].
    assert torch.allclose(both.text_image, torch.tensor([[0.2], [0.0]]), atol=1e-5)


def test_parallel_cross_attentions_do_not_see_each_other() -> None:
    """LXMERT's: the picture reads the text as it was before the text read the picture."""
    both, text_psi, image_psi = (
        BimodalRelevance.of(2, 1),
        torch.tensor([[0.2], [0.4]]),
        torch.tensor([[0.5, 0.1]]),
    )
    both.attend_to_each_other(text_psi, image_psi)
    assert torch.allclose(both.text_image, text_psi) and torch.allclose(both.image_text, image_psi)
    assert torch.equal(both.text, torch.eye(2)) and torch.equal(both.image, torch.eye(1))
    both.attend_to_each_other(text_psi, image_psi)
    assert torch.allclose(both.image, 1 + image_psi @ text_psi)
    assert torch.allclose(both.text, torch.eye(2) + text_psi @ image_psi)
    assert BimodalRelevance.of(2, 1, "meta").text.is_meta


def test_scores_all_alike_keep_all() -> None:
    assert scaled(torch.tensor([0.3, 0.3])).tolist() == [1.0, 1.0]
    boxes = [Box(10, 10, 20, 20), Box(30, 30, 40, 40)]
    assert roi(boxes, torch.zeros(2), Size(100, 100), RegionRule(extension=0)) == Box(10, 10, 40, 40)
    assert roi(boxes, torch.tensor([0.0, 1.0]), Size(100, 100), RegionRule()) == Box(29, 29, 41, 41)


def test_region_scores_are_means_by_overlap() -> None:
    places = [Box(0, 0, 10, 10), Box(10, 0, 20, 10)]
    scores = region_scores(
        [Box(0, 0, 10, 10), Box(5, 0, 20, 10), Box(50, 50, 60, 60)], places, torch.tensor([1.0, 4.0])
    )
    assert torch.allclose(scores, torch.tensor([1.0, 3.0, 0.0]))


@pytest.mark.parametrize("name", ["llava", "foveate-anyres"])
def test_highlight_is_a_part_of_the_picture(name: str) -> None:
    found = Highlighter(vlm(name))([picture(60, 90), picture(80, 50)], ["What is this?", "Why?"])
    for highlight, size in zip(found, (Size(60, 90), Size(80, 50)), strict=True):
        assert highlight.box == highlight.box.clipped(size)
        assert highlight.box.width > 0 < highlight.box.height
        weights = [weight for _, weight in highlight.heat]
        assert math.isclose(max(weights), 1) and math.isclose(min(weights), 0)


def test_a_detectors_regions_take_the_place_of_tokens() -> None:
    regions = [Box(0, 0, 45, 60), Box(45, 0, 90, 60), Box(200, 0, 300, 10)]
    highlighter = Highlighter(vlm("llava"), RegionRule(extension=0), lambda picture: regions)
    (found,) = highlighter([picture(60, 90)], ["What is this?"])
    assert [box for box, _ in found.heat] == regions[:2]  # the third lies outside
    assert found.box in regions
    blind = Highlighter(vlm("llava"), RegionRule(extension=0), lambda picture: [])
    (by_tokens,) = blind([picture(60, 90)], ["What is this?"])
    assert len(by_tokens.heat) == 16


def test_rules_with_wrong_numbers_are_refused() -> None:
    with pytest.raises(FoveateError, match="threshold"):
        RegionRule(threshold=1.5)
    with pytest.raises(FoveateError, match="extension"):
        RegionRule(extension=-0.1)
    with pytest.raises(FoveateError, match="reading"):
        RegionRule(reading="chafer")


def test_tokens_of_several_views_are_not_guessed() -> None:
    """As many tokens as one view has, but from four: a method has to say where they look."""
    made = foveate_model("inf_llava").processor.image_processor
    plan = made.plan(80, 80)
    assert len(plan.views) > 1 and plan.tokens == made.planner().tower.tokens
    with pytest.raises(FoveateError, match="does not say where"):
        Method.token_boxes(made.planner(), plan)
