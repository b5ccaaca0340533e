"""INF-LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig

from foveate import FoveateForConditionalGeneration
from foveate.checkpoints import fill_connector, read_preprocessor, stage_files
from foveate.encoders import VisionTower
from foveate.geometry import Size, interleaved, tiled
from foveate.layouts import convert_key
from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.inf_llava import (
    CrossAttention,
    InfConnector,
    InfLlava,
    InfLlavaOptions,
    Scheme,
    gathered,
)
from foveate.processing import cut, image_processor_for
from tests.parity.checkpoints import load, prompt, tower_folder
from tests.parity.golden import Comparison, Family
from tests.support import greedy

LAYOUT = InfLlava.layouts[0]
LOGITS = 3e-4  # as the golden vectors' README says
EVERYTHING = {"pool": "average"}  # an option under which all rows of all views are computed


def method_for(side: int, n: int, **options: Any) -> tuple[InfLlava, Scheme]:
    """A method with views of `side` x `side` tokens, and what it computes for n x n of them."""
    method = InfLlava(TowerGeometry(14 * side, 14), {"tiles": [n, n], **options})
    return method, method.scheme(Size(n, n))


def connector_of(method: InfLlava, widths: Widths, state: Mapping[str, Tensor], theirs: str) -> InfConnector:
    """A connector with an authors' DEM, and their projector where the state has one."""
    module = method.build_connector(widths)
    named = {str(convert_key(LAYOUT, theirs + key)): t.float() for key, t in state.items()}
    own = {key.removeprefix("connector."): t for key, t in named.items()}
    for key, tensor in module.state_dict().items():
        if key.startswith("projector."):
            own.setdefault(key, tensor)
    module.load_state_dict(own)
    return module.eval()


def needed(views: Tensor, scheme: Scheme) -> Tensor:
    """(P, 2 n n, N, C), all local ones and then all global ones -> those of the scheme, in its order."""
    every = [*scheme.every("local"), *scheme.every("global")]
    places = [
        next(i for i, v in enumerate(every) if (v.box, v.steps) == (w.box, w.steps)) for w in scheme.views
    ]
    return views[:, places]


def dcm(compare: Comparison) -> None:
    """Both croppings of pictures, both recombinations of features, and what is left over is dropped."""
    case = compare.case
    for about in case.json["cases"]:
        name, n = about["case"], about["n"]
        tiles = Size(n, n)
        if name.startswith("img"):
            pictures = case.tensors[f"{name}.input"].numpy()
            side = Size(*about["loc_view"][-2:])
            for kind, views in (("loc", tiled(0, tiles, side)), ("glo", interleaved(0, tiles, side))):
                for i, view in enumerate(views):
                    got = torch.from_numpy(np.stack([cut(one, view) for one in pictures]))
                    compare.close(f"{name} {kind}{i}", got, case.tensors[f"out.{name}.{kind}{i}"], 0.0)
            continue
        parts = torch.stack([case.tensors[f"{name}.input{i}"] for i in range(n * n)], 1)  # (B, n n, h, w, d)
        h, d = parts.shape[2], parts.shape[-1]
        method, scheme = method_for(h, n, **EVERYTHING)
        views = torch.cat([parts, parts], 1).flatten(2, 3)
        stacks = method.build_connector(Widths(d, d)).stacks(needed(views, scheme), scheme)
        for kind, stack in stacks.items():
            rows, columns = (axis.at(kind, range(n * h)) for axis in (scheme.rows, scheme.columns))
            compare.close(
                f"{name} {kind}",
                gathered(stack, rows, columns),
                case.tensors[f"out.{name}.combine_{kind}"],
                0.0,
            )
    for about in case.json["not_divisible"]["cases"]:
        _, _, height, width = about["shape"]
        n = about["n"]
        side = Size(height // n, width // n)
        sizes = [view.size for view in interleaved(0, Size(n, n), side)]
        compare.equal("what is left over", set(sizes), {side})  # as the paper, where the authors are ragged
        ragged = [Size(*size) for size in about["extract_pixels_N_view_shapes"]]
        assert all(size.height in (s.height, s.height + 1) for size, s in zip(ragged, sizes, strict=True))


def mha(compare: Comparison) -> None:
    case = compare.case
    module = CrossAttention(case.json["config"]["d_model"], InfLlavaOptions())
    theirs = "model.spatial_embed.attention."
    state = {str(convert_key(LAYOUT, theirs + key)): t for key, t in case.part("state").items()}
    module.load_state_dict({key.removeprefix("connector.attention.both."): t for key, t in state.items()})
    x, source = case.tensors["q"], case.tensors["kv"]
    compare.close("y", module(x, source), case.tensors["out.y"])
    received = module.received(x, source, torch.ones(x.shape[:2], dtype=torch.bool))
    compare.close("attention", received, case.tensors["out.attn"].mean(1).sum(1))


def dem(compare: Comparison) -> None:
    """24 x 24 tokens: as the checkpoints need it, and every row of the map before pooling."""
    case = compare.case
    n, width = case.json["config"]["n"], case.json["config"]["channel"]
    views = torch.stack([case.tensors[f"view{i:02}"].float() for i in range(2 * n * n)], 1)  # (1, V, 576, d)
    for pool in ("bilinear", "average"):
        method, scheme = method_for(24, n, pool=pool)
        module = connector_of(method, Widths(width, width), case.part("state"), "model.spatial_embed.")
        given = needed(views, scheme)
        fused = module.dual(given, scheme)
        if pool == "bilinear":
            alive = len(scheme.rows.views["global"]) * len(scheme.columns.views["global"])
            compare.equal("dead views", n * n - alive, len(case.json["dead_views"]["indices"]))
            compare.close("tokens", module.pooled(fused, scheme).flatten(1, 2), case.tensors["out.tokens"])
            continue
        compare.close("before pooling", fused, case.tensors["out.pre_pool"])
        stacks = module.stacks(given, scheme)
        for direction in scheme.groups:
            expected = case.tensors.get(f"out.enhanced_{direction.name}")
            if expected is not None:
                compare.close(direction.name, module.enhanced(direction, stacks, scheme), expected)
        expected = F.avg_pool2d(case.tensors["out.pre_pool"].permute(0, 3, 1, 2), n).permute(0, 2, 3, 1)
        compare.close("average", module.pooled(fused, scheme), expected)


def dem_small(compare: Comparison) -> None:
    case, config = compare.case, compare.case.json["config"]
    views = torch.cat([case.tensors["local"], case.tensors["global"]]).transpose(0, 1)  # (B, 2 n n, N, d)
    method, scheme = method_for(config["h"], config["n"])
    widths = Widths(config["channel"], config["channel"])
    module = connector_of(method, widths, case.part("state"), "model.spatial_embed.")
    tokens = module.pooled(module.dual(needed(views, scheme), scheme), scheme)
    compare.close("tokens", tokens.flatten(1, 2), case.tensors["out.tokens"])


PAPER = {
    "parts": "own",
    "heads": 1,
    "attention": "plain",
    "shared": False,
    "embed": "linear",
    "fused": "paper",
    "pool": "average",
}


def dem_paper(compare: Comparison) -> None:
    """Equations 18 to 27 and average pooling, weights not shared."""
    case, config = compare.case, compare.case.json["config"]
    n, h, width = config["n"], config["h"], config["d"]
    method, scheme = method_for(h, n, **PAPER)
    module = method.build_connector(Widths(width, width))
    state = case.part("state")
    own = {key: t for key, t in module.state_dict().items() if key.startswith("projector.")}
    for kind, short in (("global", "glo"), ("local", "loc")):
        own[f"fusion.embed.{kind}.weight"] = state[f"fuse.{short}"].T
        for name in ("query", "key", "value"):
            own[f"attention.{kind}.{name}.weight"] = state[f"{short}.{name[0]}"].T
    module.load_state_dict(own)
    maps = {"local": case.tensors["F_loc"], "global": case.tensors["F_glo"]}
    local = [maps["local"][:, r * h : (r + 1) * h, c * h : (c + 1) * h] for r in range(n) for c in range(n)]
    strided = [maps["global"][:, r::n, c::n] for r in range(n) for c in range(n)]
    views = needed(torch.stack([*local, *strided], 1).flatten(2, 3), scheme)
    stacks = module.stacks(views, scheme)
    for direction in scheme.groups:
        expected = case.tensors[f"out.V_{direction.name[:3]}"]
        compare.close(direction.name, module.enhanced(direction, stacks, scheme), expected)
    fused = module.dual(views, scheme)
    compare.close("V_dual", fused, case.tensors["out.V_dual"])
    compare.close("pooled", module.pooled(fused, scheme), case.tensors["out.pooled"])


def official_views(pixels: Tensor, scheme: Scheme) -> Tensor:
    """What the authors' model makes of its input (1, 3, H, W), blown up where it is small: (V, 3, h, w)."""
    large = F.interpolate(pixels, tuple(scheme.canvas), mode="bicubic", align_corners=False)[0].numpy()
    return torch.from_numpy(np.stack([cut(large, view) for view in scheme.views]))


def synthetic(image: Mapping[str, Any], side: int) -> Tensor:
    """The picture that a formula gives, normalised, (1, 3, side, side)."""
    y, x = np.mgrid[:side, :side].astype(np.int64)
    planes = [
        (a * x * x + b * y * y + g * x * y + d * x + e * y + f) % 256 for a, b, g, d, e, f in image["coef"]
    ]
    values = np.stack(planes)
    assert int(values.sum()) == next(s["uint8_sum"] for s in image["sizes"].values() if s["side"] == side)
    mean, std = (np.array(image[key])[:, None, None] for key in ("mean", "std"))
    return torch.from_numpy(((values / 255 - mean) / std).astype(np.float32))[None]


def pipeline(compare: Comparison) -> None:
    """Pixels -> LLM tokens, 10 views through a tower of one layer instead of 19 through one of two."""
    case, config = compare.case, compare.case.json["config"]
    state = case.part("state")
    tower = VisionTower(CLIPVisionConfig(**config["clip"]), config["select_layer"])
    theirs = "vision_tower."
    own = {key: state[theirs + key] for key in tower.model.state_dict()}
    tower.model.load_state_dict(own)
    tower.eval()
    method, scheme = method_for(24, config["n"])
    rest = {key: t for key, t in state.items() if not key.startswith(theirs)}
    widths = Widths(config["clip"]["hidden_size"], config["llm_hidden"])
    module = connector_of(method, widths, rest, "model.")
    compare.equal("passes of the tower", len(scheme.views), 10)
    for name, about in case.json["image"]["sizes"].items():
        pixels = synthetic(case.json["image"], about["side"])
        compare.close(f"{name} input", pixels[..., :8, :8], case.tensors[f"{name}.input_corner"], 1e-6)
        features = tower(official_views(pixels, scheme))
        views, expected = features[None], case.part(f"out.{name}")
        pooled = module.pooled(module.dual(views, scheme), scheme)
        compare.close(f"{name} enhanced", pooled.flatten(1, 2), expected["dem"])
        mixed = module.mixed(pooled, views, scheme)
        compare.close(f"{name} mixed", mixed.flatten(1, 2), expected["mixed"])
        tokens = module(features, [method.plan(336, 336)], None).tokens
        compare.close(f"{name} tokens", tokens[None], expected["tokens"])


def checkpoint(compare: Comparison) -> None:
    """Pixels of a padded picture, features, visual tokens, logits, greedy text; a stage's connector."""
    case = compare.case
    model = load(case)
    compare.equal("method", model.config.method, "inf_llava")
    method = model.method
    assert isinstance(method, InfLlava)
    scheme = method.scheme(Size(3, 3))
    picture = Image.fromarray(case.tensors["picture"].numpy())
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    for name, about in case.json["cases"].items():
        tensors = load_file(case.folder / about["file"])
        views = official_views(tensors["pixel_values"], scheme)
        if name == "train1008":
            compare.close("pixels", images(picture)["pixel_values"], views, 1e-6)
        connected(compare, model, views, tensors, name)
        inputs = prompt(model, tensors["input_ids"], views, [(picture.height, picture.width)])
        logits = model(**inputs).logits[..., : tensors["logits"].shape[-1]]
        compare.close(f"{name} logits", logits, tensors["logits"], LOGITS)
        expected = about["greedy_new_tokens"]
        compare.equal(f"{name} greedy", greedy(model, inputs, len(expected))[0], expected)
    views = official_views(case.tensors["pixel_values"], scheme)
    files = stage_files(case.folder / "stage1")
    compare.equal("first stage", (files.released.method, files.options["fit"]), ("inf_llava", "crop"))
    fill_connector(model, files)
    tokens = model.get_image_features(views, torch.tensor([[300, 400]])).pooler_output[0]
    compare.close("first stage", tokens[None], case.tensors["stage1.visual_tokens"], LOGITS)


def connected(
    compare: Comparison,
    model: FoveateForConditionalGeneration,
    views: Tensor,
    tensors: Mapping[str, Tensor],
    name: str,
) -> None:
    module: nn.Module = model.connector
    assert isinstance(module, InfConnector)
    scheme = module.scheme(Size(3, 3))
    features = model.encode_views(views)
    low = features[scheme.low_number]
    compare.close(f"{name} low resolution", low[None], tensors["clip_lowres"])
    pooled = module.pooled(module.dual(features[None], scheme), scheme)
    compare.close(f"{name} enhanced", pooled.flatten(1, 2), tensors["dem"], LOGITS)
    mixed = module.mixed(pooled, features[None], scheme)
    compare.close(f"{name} mixed", mixed.flatten(1, 2), tensors["mixed"], LOGITS)
    tokens = model.get_image_features(views, torch.tensor([[300, 400]])).pooler_output[0]
    compare.close(f"{name} visual tokens", tokens[None], tensors["visual_tokens"], LOGITS)


FAMILY = Family(
    method="inf_llava",
    checkers={
        "dcm": dcm,
        "mha": mha,
        "dem": dem,
        "dem_small": dem_small,
        "dem_paper": dem_paper,
        "pipeline": pipeline,
        "checkpoint": checkpoint,
    },
)
