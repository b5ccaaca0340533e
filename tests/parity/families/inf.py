"""INF-LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig

from foveate import FoveateForConditionalGeneration
from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.inf_llava import (
    CrossAttention,
    InfConnector,
    InfLlava,
    InfLlavaOptions,
    Scheme,
    axis_plan,
)
from foveate.methods.inf_llava_index import Axis, gathered
from foveate.methods.layouts import convert_key
from foveate.model.checkpoints import fill_connector, read_preprocessor, stage_files
from foveate.model.processing import cut, image_processor_for
from foveate.picture.geometry import Size, interleaved, tiled
from foveate.towers.vit import VisionTower
from tests.parity.checkpoints import load, prompt, stage_folder, tower_folder, words
from tests.parity.golden import Comparison, Family, Tensors, normed
from tests.support import greedy

LAYOUT = InfLlava.layouts[0]
LOGITS = 3e-4  # as the golden vectors' README says
EVERYTHING = {"pool": "average"}  # an option under which all rows of all views are computed
ANY = torch.tensor([[1, 1]])  # size of a picture: the plans of all are alike
HEADS = 8  # of the authors' attention whatever its width, where a case does not say


@dataclass(frozen=True)
class Oblong(TowerGeometry):
    """A tower whose views may have other than as many rows as columns, as single modules can take them."""

    rows: int
    columns: int

    @property
    def side(self) -> Size:
        return Size(self.rows * self.patch_size, self.columns * self.patch_size)

    @property
    def grid(self) -> Size:
        return Size(self.rows, self.columns)


def connector_for(
    grid: Size, pooled: Size, n: int, widths: Widths, **given: Any
) -> tuple[InfConnector, Scheme]:
    """A connector for views of `grid` tokens, and what it computes for n x n of them."""
    options = InfLlavaOptions(**{"low_view": "none", **given})
    tower = Oblong(max(grid), 1, *grid)
    scheme = Scheme(Size(n, n), tower, pooled.height, options)
    scheme.columns = axis_plan(Axis(n, grid.width), pooled.width, options)
    return InfConnector(widths, lambda tiles: scheme, grid, options).eval(), scheme


def filled(module: InfConnector, state: Mapping[str, Tensor], theirs: str) -> InfConnector:
    """With an authors' DEM, and their projector where the state has one."""
    named = {str(convert_key(LAYOUT, theirs + key)): t.float() for key, t in state.items()}
    own = {key.removeprefix("connector."): t for key, t in named.items()}
    for key, tensor in module.state_dict().items():
        if key.startswith("projector."):
            own.setdefault(key, tensor)
    module.load_state_dict(own)
    return module.eval()


def square(tokens: int) -> Size:
    """The authors' classes take views and make maps of as many rows as columns."""
    assert isqrt(tokens) ** 2 == tokens, f"{tokens} tokens are no square"
    return Size(isqrt(tokens), isqrt(tokens))


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
        if f"{name}.input" in case.tensors:
            cropped(compare, name, Size(n, n))
            continue
        parts = torch.stack([case.tensors[f"{name}.input{i}"] for i in range(n * n)], 1)  # (B, n n, h, w, d)
        grid, width = Size(*parts.shape[2:4]), parts.shape[-1]
        # Nothing of this is attention or fusion: any that fit the width will do.
        plain = {"heads": 1, "fusion": "add", **EVERYTHING}
        module, scheme = connector_for(grid, grid, n, Widths(width, width), **plain)
        views = torch.cat([parts, parts], 1).flatten(2, 3)
        for kind, stack in module.stacks(needed(views, scheme), scheme).items():
            rows = scheme.rows.at(kind, range(n * grid.height))
            columns = scheme.columns.at(kind, range(n * grid.width))
            whole = case.tensors[f"out.{name}.combine_{kind}"]
            compare.close(f"{name} {kind}", gathered(stack, rows, columns), whole, 0.0)
    for about in case.json.get("not_divisible", {}).get("cases", []):
        height, width = about["shape"][-2:]
        n = about["n"]
        side = Size(height // n, width // n)
        sizes = {view.size for view in interleaved(0, Size(n, n), side)}
        compare.equal("what is left over", sizes, {side})  # as the paper, where the authors are ragged
        ragged = [Size(*size) for size in about["extract_pixels_N_view_shapes"]]
        rows, columns = ([-(-(length - i) // n) for i in range(n)] for length in (height, width))
        compare.equal("ragged views", ragged, [Size(h, w) for h in rows for w in columns])


def cropped(compare: Comparison, name: str, tiles: Size) -> None:
    case = compare.case
    pictures = case.tensors[f"{name}.input"].numpy()  # (B, 3, H, W)
    side = Size(pictures.shape[-2] // tiles.height, pictures.shape[-1] // tiles.width)
    for kind, views in (("loc", tiled(0, tiles, side)), ("glo", interleaved(0, tiles, side))):
        for i, view in enumerate(views):
            got = torch.from_numpy(np.stack([cut(one, view) for one in pictures]))
            compare.close(f"{name} {kind}{i}", got, case.tensors[f"out.{name}.{kind}{i}"], 0.0)


def mha(compare: Comparison) -> None:
    case = compare.case
    x, source = case.tensors["q"], case.tensors["kv"]
    module = CrossAttention(x.shape[-1], InfLlavaOptions(heads=case.config.get("heads", HEADS)))
    theirs = "model.spatial_embed.attention."
    state = {str(convert_key(LAYOUT, theirs + key)): t for key, t in case.part("state").items()}
    module.load_state_dict({key.removeprefix("connector.attention.both."): t for key, t in state.items()})
    normed(module, case.config)
    compare.those(case.part("out"), {"y": module(x, source)})
    if "out.attn" in case.tensors:
        received = module.received(x, source, torch.ones(x.shape[:2], dtype=torch.bool))
        compare.close("attention", received, case.tensors["out.attn"].mean(1).sum(1))


def dem(compare: Comparison) -> None:
    """As the checkpoints need it, and every row of the map before pooling."""
    case, out = compare.case, compare.case.part("out")
    numbers = sorted(int(key[4:]) for key in case.tensors if key.startswith("view"))
    stored = {int(key[4:]): case.tensors[key].float() for key in case.tensors if key.startswith("view")}
    views = torch.stack([stored[number] for number in numbers], 1)  # (B, 2 n n, N, d)
    n, grid = isqrt(len(numbers) // 2), square(views.shape[2])
    pooled = square(out["tokens"].shape[1]) if "tokens" in out else grid
    widths, heads = Widths(views.shape[-1], views.shape[-1]), case.config.get("heads", HEADS)
    for pool in ("bilinear", "average"):
        module, scheme = connector_for(grid, pooled, n, widths, pool=pool, heads=heads)
        normed(filled(module, case.part("state"), "model.spatial_embed."), case.config)
        given = needed(views, scheme)
        fused = module.dual(given, scheme)
        if pool == "bilinear":
            if "dead_views" in case.json:
                read = {(view.box, view.steps) for view in scheme.views}
                every = [*scheme.every("local"), *scheme.every("global")]
                dead = [i for i, view in enumerate(every) if (view.box, view.steps) not in read]
                compare.equal("dead views", dead, case.json["dead_views"]["indices"])
            compare.those(out, {"tokens": module.pooled(fused, scheme).flatten(1, 2)})
            continue
        compare.those(out, {"pre_pool": fused})
        stacks = module.stacks(given, scheme)
        for direction in scheme.groups:
            enhanced = module.enhanced(direction, stacks, scheme)
            compare.those(out, {f"enhanced_{direction.name}": enhanced})
        if "pre_pool" in out and pooled == grid:
            expected = F.avg_pool2d(out["pre_pool"].permute(0, 3, 1, 2), n).permute(0, 2, 3, 1)
            compare.close("average", module.pooled(fused, scheme), expected)


def dem_small(compare: Comparison) -> None:
    case, config = compare.case, compare.case.config
    views = torch.cat([case.tensors["local"], case.tensors["global"]]).transpose(0, 1)  # (B, 2 n n, N, d)
    expected, grid = case.tensors["out.tokens"], Size(config["h"], config["w"])
    pooled = grid if expected.shape[1] == grid.height * grid.width else square(expected.shape[1])
    widths = Widths(views.shape[-1], views.shape[-1])
    module, scheme = connector_for(grid, pooled, config["n"], widths, heads=config.get("heads", HEADS))
    normed(filled(module, case.part("state"), "model.spatial_embed."), config)
    tokens = module.pooled(module.dual(needed(views, scheme), scheme), scheme)
    compare.close("tokens", tokens.flatten(1, 2), expected)


PAPER = {
    "parts": "own",
    "heads": 1,
    "attention": "plain",
    "embed": "linear",
    "fused": "paper",
    "pool": "average",
}


def dem_paper(compare: Comparison) -> None:
    """Equations 18 to 27 and average pooling, weights shared by the directions or not."""
    case, config = compare.case, compare.case.config
    n, grid = config["n"], Size(config["h"], config["w"])
    maps = {"local": case.tensors["F_loc"], "global": case.tensors["F_glo"]}
    width, shared = maps["local"].shape[-1], not config.get("separate_weights", True)
    module, scheme = connector_for(grid, grid, n, Widths(width, width), shared=shared, **PAPER)
    state = case.part("state")
    own = {key: t for key, t in module.state_dict().items() if key.startswith("projector.")}
    for kind, short in (("global", "glo"), ("local", "loc")):
        own[f"fusion.embed.{kind}.weight"] = state[f"fuse.{short}"].T
        for name in ("query", "key", "value"):
            given = state[f"{short}.{name[0]}"] if f"{short}.{name[0]}" in state else state[name[0]]
            own[f"attention.{'both' if shared else kind}.{name}.weight"] = given.T
    module.load_state_dict(own)
    places = [(r, c) for r in range(n) for c in range(n)]
    h, w = grid
    local = [maps["local"][:, r * h : (r + 1) * h, c * w : (c + 1) * w] for r, c in places]
    strided = [maps["global"][:, r::n, c::n] for r, c in places]
    views = needed(torch.stack([*local, *strided], 1).flatten(2, 3), scheme)
    stacks, out = module.stacks(views, scheme), case.part("out")
    for direction in scheme.groups:
        compare.those(out, {f"V_{direction.name[:3]}": module.enhanced(direction, stacks, scheme)})
    fused = module.dual(views, scheme)
    compare.those(out, {"V_dual": fused, "pooled": module.pooled(fused, scheme)})


def official_views(pixels: Tensor, scheme: Scheme) -> Tensor:
    """What the authors' model makes of its input (1, 3, H, W), blown up where it is small: (V, 3, h, w)."""

    def resized(picture: Tensor, size: Size) -> Tensor:
        return F.interpolate(picture, tuple(size), mode="bicubic", align_corners=False)

    large = resized(pixels, scheme.canvas)
    low = resized(large, scheme.tower.side)[0]  # for even n, their low-resolution view is none of the others
    whole = large[0].numpy()
    return torch.stack([low if view.canvas else torch.from_numpy(cut(whole, view)) for view in scheme.views])


def passes(scheme: Scheme, pooled: int) -> int:
    """How many views matter: all local ones, the global ones that a bilinear reduction reads, the low one."""
    n, rows = scheme.tiles.height, scheme.tiles.height * scheme.tower.grid.height
    line = torch.zeros(1, 1, rows, 1, requires_grad=True)
    with torch.enable_grad():
        F.interpolate(line, (pooled, 1), mode="bilinear", align_corners=False).sum().backward()
    assert line.grad is not None
    read = {row % n for row in line.grad.flatten().nonzero()[:, 0].tolist()}
    return n * n + len(read) ** 2 + (n % 2 == 0)


def synthetic(image: Mapping[str, Any], about: Mapping[str, Any]) -> Tensor:
    """The picture that a formula gives, normalised, (1, 3, side, side)."""
    y, x = np.mgrid[: about["side"], : about["side"]].astype(np.int64)
    planes = [
        (a * x * x + b * y * y + g * x * y + d * x + e * y + f) % 256 for a, b, g, d, e, f in image["coef"]
    ]
    values = np.stack(planes)
    assert int(values.sum()) == about.get("uint8_sum", int(values.sum()))
    mean, std = (np.array(image[key])[:, None, None] for key in ("mean", "std"))
    return torch.from_numpy(((values / 255 - mean) / std).astype(np.float32))[None]


def pipeline(compare: Comparison) -> None:
    """Pixels -> LLM tokens: the views that matter, through the layers of the tower that are read."""
    case, config = compare.case, compare.case.config
    state = case.part("state")
    tower = VisionTower(CLIPVisionConfig(**config["clip"]), config["select_layer"])
    theirs = "vision_tower."
    own = {key: state[theirs + key] for key in tower.model.state_dict()}
    tower.model.load_state_dict(own)
    tower.eval()
    rest = {key: t for key, t in state.items() if not key.startswith(theirs)}
    options = {
        "tiles": [config["n"], config["n"]],
        "heads": config.get("heads", HEADS),
        "projector_depth": sum(key.startswith("mm_projector.") and key.endswith(".weight") for key in rest),
    }
    method = InfLlava(TowerGeometry(config["clip"]["image_size"], config["clip"]["patch_size"]), options)
    plan = method.plan(*method.tower.side)
    scheme = method.scheme(plan.tiles)
    widths = Widths(config["clip"]["hidden_size"], config["llm_hidden"])
    module = filled(method.build_connector(widths), rest, "model.")
    compare.equal("passes of the tower", len(scheme.views), passes(scheme, method.pooled))
    for name, about in case.json["image"]["sizes"].items():
        pixels = synthetic(case.json["image"], about)
        if f"{name}.input_corner" in case.tensors:
            corner = case.tensors[f"{name}.input_corner"]
            height, width = corner.shape[-2:]
            compare.close(f"{name} input", pixels[..., :height, :width], corner, 1e-6)
        features = tower(official_views(pixels, scheme))
        views = features[None]
        pooled = module.pooled(module.dual(views, scheme), scheme)
        results = {
            f"{name}.dem": pooled.flatten(1, 2),
            f"{name}.mixed": module.mixed(pooled, views, scheme).flatten(1, 2),
            f"{name}.tokens": module(features, [plan], None).tokens[None],
        }
        compare.those(case.part("out"), results)


def checkpoint(compare: Comparison) -> None:
    """Pixels of a padded picture, features, visual tokens, logits, greedy text; a stage's connector."""
    case = compare.case
    model = load(case)
    compare.equal("method", model.config.method, "inf_llava")
    method = model.method
    assert isinstance(method, InfLlava)
    picture = Image.fromarray(case.tensors["picture"].numpy())
    size = (picture.height, picture.width)
    scheme = method.scheme(method.plan(*size).tiles)
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    seen: dict[str, tuple[Tensors, Tensor]] = {}
    for name, about in case.json["cases"].items():
        file = case.folder / about["file"]
        here = file.name == case.path.with_suffix(".safetensors").name
        tensors = case.tensors if here else Tensors(load_file(file), set())
        views = official_views(tensors["pixel_values"], scheme)
        seen[name] = tensors, views
        if Size(*tensors["pixel_values"].shape[-2:]) == scheme.canvas:  # not blown up
            compare.close(f"{name} pixels", images(picture)["pixel_values"], views, 1e-6)
        connected(compare, model, views, tensors, name)
        inputs = prompt(case, model, tensors["input_ids"], views, [size])
        logits = partial(spoken, model, inputs, tensors)
        compare.those(tensors, {"logits": logits}, LOGITS, of=name)
        if "greedy" in tensors:
            expected = tensors["greedy"].tolist()
            compare.equal(f"{name} greedy", greedy(model, inputs, len(expected))[0], expected)
    folder = stage_folder(case)
    for name, (tensors, views) in seen.items():
        if folder is not None and "stage1.visual_tokens" in tensors:
            stage(compare, model, folder, views, tensors["stage1.visual_tokens"], name)


def spoken(
    model: FoveateForConditionalGeneration, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Tensor:
    return words(model(**inputs).logits, expected["logits"])


def stage(
    compare: Comparison,
    model: FoveateForConditionalGeneration,
    folder: Path,
    views: Tensor,
    expected: Tensor,
    name: str,
) -> None:
    files = stage_files(folder)
    fit = "pad" if files.released.config["image_aspect_ratio"] == "pad" else "crop"
    compare.equal("first stage", (files.released.method, files.options["fit"]), ("inf_llava", fit))
    fill_connector(model, files)
    tokens = model.get_image_features(views, ANY).pooler_output[0]
    compare.close(f"first stage, {name}", tokens[None], expected, LOGITS)


def connected(
    compare: Comparison,
    model: FoveateForConditionalGeneration,
    views: Tensor,
    tensors: Mapping[str, Tensor],
    name: str,
) -> None:
    module: nn.Module = model.connector
    assert isinstance(module, InfConnector)
    scheme = module.scheme(model.plans(ANY.tolist())[0].tiles)
    features = model.encode_views(views)
    assert scheme.low_number is not None
    compare.those(tensors, {"clip_lowres": features[scheme.low_number][None]}, of=name)
    pooled = module.pooled(module.dual(features[None], scheme), scheme)
    results = {
        "dem": pooled.flatten(1, 2),
        "mixed": module.mixed(pooled, features[None], scheme).flatten(1, 2),
        "visual_tokens": model.get_image_features(views, ANY).pooler_output[0][None],
    }
    compare.those(tensors, results, LOGITS, of=name)


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
