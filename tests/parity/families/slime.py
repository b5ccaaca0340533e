"""SliME."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate import FoveateForConditionalGeneration
from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.layouts import convert_key
from foveate.methods.slime import (
    Mixture,
    QueryFormer,
    Router,
    Slime,
    SlimeConnector,
    SlimeOptions,
    raster,
    sincos_positions,
)
from foveate.model.checkpoints import fill_connector, read_preprocessor, stage_files
from foveate.model.processing import FoveateImageProcessor, image_processor_for
from foveate.picture.geometry import Size
from tests.parity.checkpoints import embedded, load, placeholder, prompt, stage_folder, tower_folder, words
from tests.parity.golden import Case, Comparison, Family, Tensors, normed
from tests.support import greedy

LAYOUT = Slime.layouts[0]
GLOBAL, LOCAL = "model.mm_projector.", "model.sampler.post_qformer."


def fill(module: nn.Module, state: Mapping[str, Tensor], theirs: str, ours: str) -> None:
    """Loads a part's weights through the layout's names; every key has its place."""
    named = {convert_key(LAYOUT, theirs + key): tensor for key, tensor in state.items()}
    module.load_state_dict(
        {
            key.removeprefix(ours): tensor.float()
            for key, tensor in named.items()
            if key is not None and (key.removeprefix(ours) in module.state_dict() or not optional(key))
        }
    )
    module.eval()


def optional(key: str) -> bool:
    return key == "connector.adapter.noise"


def grid_table(compare: Comparison) -> None:
    """All rows: grid, canvas, size and place of the picture on it; and the paper's choice beside it."""
    tile = compare.case.json["base_tile"]
    rules = {
        name: Slime(TowerGeometry(tile, tile), {"grids": rule})
        for name, rule in (("official", "authors"), ("paper", "paper"))
    }
    for row in compare.case.json["rows"]:
        width, height = row["wh"]
        for name in (rule for rule in rules if rule in row):
            plan = rules[name].plan(height, width)
            canvas = plan.canvases[1]
            got = {
                "grid_cols_rows": [plan.tiles.width, plan.tiles.height],
                "tiles": plan.tiles.width * plan.tiles.height,
                "canvas_wh": [canvas.size.width, canvas.size.height],
                "resized": [canvas.content.width, canvas.content.height],
                "paste_xy": [canvas.content.left, canvas.content.top],
                "content_box": list(canvas.content),
            }
            expected = {key: row[name][key] for key in got if key in row[name]}
            compare.equal(f"{name} {width} x {height}", {key: got[key] for key in expected}, expected)


def preprocess(compare: Comparison) -> None:
    tile, case = compare.case.config["tile"], compare.case
    images = FoveateImageProcessor("slime", image_size=tile, patch_size=tile)
    for about in case.json["images"]:
        i = about["i"]
        picture = Image.fromarray(case.tensors[f"in.image_{i}"].numpy())
        views = images(picture)["pixel_values"]
        compare.close(f"views {i}", views, case.tensors[f"out.views_{i}"], case.tolerance(default=1e-6))


def adapter(case: Case, **options: Any) -> Mixture:
    state, config = case.part("state"), case.config
    side = isqrt(len(state["attn.query"]))
    widths = Widths(config["mm_hidden_size"], config["hidden_size"])
    module = Mixture(widths, Size(side, side), config["heads"], SlimeOptions(**options))
    fill(module, state, GLOBAL, "connector.adapter.")
    return module


def global_adapter(compare: Comparison) -> None:
    """Both adapters, their mixture, the gates with recorded noise, and the paper's gates."""
    case, module, paper = compare.case, adapter(compare.case), adapter(compare.case, gate="paper")
    x, noise = case.tensors["in.x"], None
    if "in.noise" in case.tensors:
        noise = case.tensors["in.noise"].view(*x.shape[:2], 2)

    def in_training() -> Tensor:
        first, second = module.gates(x, noise).split(1, -1)
        return first * module.mlp(x) + second * module.mlp(module.former(x))

    results = {
        "query_former": module.former(x),
        "expert_mlp": module.mlp(x),
        "expert_query": module.mlp(module.former(x)),
        "gates": module.gates(x),
        "y": module(x),
        "y_single": module(x[:1])[0],
        "short_projection_only": lambda: module.mlp(case.tensors["in.short"]),
        "only_expert0": adapter(case, experts="mlp")(x),
        "only_expert1": adapter(case, experts="query_former")(x),
        "train_gates_official_noise": lambda: module.gates(x, noise),
        "train_y_official_noise": in_training,
    }
    compare.those(case.part("out"), results)
    readings = {"gates_eval": paper.gates(x), "gates_train": lambda: paper.gates(x, noise)}
    compare.those(case.part("paper_out"), readings, of="paper")


def local_compressor(compare: Comparison) -> None:
    case, config = compare.case, compare.case.config
    grid, source = (Size(config[key], config[key]) for key in ("query_grid", "source_grid"))
    x = case.tensors["in.x"]

    def former(reads: Size) -> QueryFormer:
        module = QueryFormer(x.shape[-1], grid, reads, config["heads"])
        fill(module, case.part("state"), LOCAL, "connector.compressor.")
        return normed(module, config)

    results = {
        "key_pos_embed": former(source).source_positions(),
        "y": former(source)(x),
        "y_single": former(source)(x[:1])[0],
        "same_grid": lambda: former(grid)(x[:1, : grid.height * grid.width]),
    }
    compare.those(case.part("out"), results)


def pos_embed(compare: Comparison) -> None:
    """Tables of any size, and keys' made from the first grid's; within one step of half precision."""
    case, step = compare.case, 2.0**-11
    width = case.config["D"]
    small = Size(case.config["grids"][0], case.config["grids"][0])
    for key, expected in case.part("out").items():
        what, grid, rest = key.split("_", 2)  # such as table_12x12_1024, keys_24x24_rows
        size = Size(*(int(side) for side in grid.split("x")))
        if what == "keys":
            table = QueryFormer(width, small, size, 1).source_positions()
        else:
            table = sincos_positions(width, size)
        rows = case.tensors["in.rows"] if rest == "rows" else slice(None)
        compare.close(key, table[rows], expected, 2 * step if what == "keys" else step)


def part_of_one(label: str) -> float:
    """gamma as the cases' names have it: 095 is 0.95."""
    return int(label) / 10 ** (len(label) - 1)


def router(compare: Comparison) -> None:
    """Scores, probabilities, and exactly which tokens are kept, as the authors read them and as the paper."""
    case = compare.case
    tokens, text = case.tensors["in.local"], case.tensors["in.text"]
    owner = torch.zeros(len(tokens), dtype=torch.long)
    unpadded = torch.ones(len(text), dtype=torch.bool)
    mask = case.tensors.get("in.mask", unpadded)
    query = Query(text[None], mask[None])
    temperature = case.config.get("temperature", 1.0)
    readings = (
        ("cosine_sum", "out.similarity_sum", "out.kept_"),
        ("cosine_mean", "paper_out.scores_cos_mean", "paper_out.kept_cos_mean_"),
        ("dot_mean", "paper_out.scores_dot_mean", "paper_out.kept_dot_mean_"),
    )
    for similarity, name, prefix in readings:
        options = SlimeOptions(similarity=similarity, temperature=temperature)
        scores = Router(options).scores(tokens, owner, query)
        compare.those(case.tensors, {name: scores})
        for label in (key.removeprefix(prefix) for key in case.tensors if key.startswith(prefix)):
            noise, gamma = None, part_of_one(label.removeprefix("train_"))
            if label.startswith("train_"):
                noise = case.tensors["in.noise_std1"][None]
            chooser = Router(replace(options, gamma=gamma)).eval()
            kept, _ = chooser(chooser.probabilities(scores[None], noise))
            found = kept[0].nonzero()[:, 0]
            compare.equal(f"{prefix}{label}", found.tolist(), case.tensors[f"{prefix}{label}"].tolist())
            if prefix == "out.kept_" and label in case.json.get("kept_counts", {}):
                compare.equal(f"count {label}", len(found), case.json["kept_counts"][label])
            if prefix == "out.kept_":
                compare.those(case.tensors, {f"out.selected_{label}": tokens[found]}, 0.0)
    mean = Router(SlimeOptions(similarity="cosine_mean"))
    plain = Router(SlimeOptions(temperature=temperature)).eval()
    results = {
        "similarity_mean_nomask": mean.scores(tokens, owner, Query(text[None], unpadded[None])),
        "probs": plain.probabilities(plain.scores(tokens, owner, query)[None])[0],
    }
    compare.those(case.part("out"), results)


LLM = ("inputs_embeds", "attention_mask", "labels")  # what it is given
IGNORED = -100  # a label without loss


def connector(compare: Comparison) -> None:
    """Features and prompt -> visual tokens of all pictures in one batch, for every gamma and either half."""
    case, config, out = compare.case, compare.case.config, compare.case.part("out")
    table = case.tensors["state.embed_tokens.weight"]
    ids, mask, mark = case.tensors["in.input_ids"], case.tensors["in.attention_mask"], placeholder(case)
    text = mask & (ids != mark)
    pushed = text.sort(dim=1, descending=True, stable=True).values  # the authors take the placeholder out
    compare.those(out, {"text_mask": pushed}, 0.0)
    query = Query(table[ids.clamp(min=0)], text)
    sizes = case.tensors["in.image_sizes_wh"].tolist()
    features = [case.tensors[f"in.features_{i}"] for i in range(len(sizes))]

    def made(gamma: float = 1.0, **options: Any) -> tuple[Slime, SlimeConnector]:
        # 336 is the authors' constant in the choice of a grid, whatever the views are.
        tower = TowerGeometry(336, 336 // config["view_side"])
        given = {
            "queries": config["num_local_queries"],
            "heads": config["heads"],
            "temperature": config.get("temperature", 1.0),
            "gamma": gamma,
        }
        method = Slime(tower, {**given, **options})
        module = method.build_connector(Widths(features[0].shape[-1], table.shape[-1]))
        state = {key: t for key, t in case.part("state").items() if key != "embed_tokens.weight"}
        fill(module, state, "model.", "connector.")
        return method, module

    def tokens(gamma: float, **options: Any) -> list[Tensor]:
        method, module = made(gamma, **options)
        plans = [method.plan(height, width) for width, height in sizes]
        kinds = {"use_global_only": "global", "use_local_only": "tile"}
        only = next((role for key, role in kinds.items() if key in options), None)
        views = [
            view
            for seen in features
            for view, role in zip(seen, ["global"] + ["tile"] * (len(seen) - 1), strict=True)
            if only in (None, role)
        ]
        visual = module(torch.stack(views), plans, query)
        found = visual.tokens
        if visual.separators is not None:
            found = torch.where(visual.separators[:, None], table[config["separator_token_id"]], found)
        kept = torch.ones(len(found), dtype=torch.bool) if visual.kept is None else visual.kept
        counts = [plan.tokens for plan in plans]
        return [t[keep] for t, keep in zip(found.split(counts), kept.split(counts), strict=True)]

    method, module = made()
    grids = [method.plan(height, width).tiles for width, height in sizes]
    compare.equal("grids", [[grid.width, grid.height] for grid in grids], config["grids_cols_rows"])
    for i, seen in enumerate(features):
        compare.those(out, {f"local_compressed_{i}": module.compressor(seen[1:])})
    prefix = "visual_tokens_"
    labels = sorted({key.removeprefix(prefix).split("_")[0] for key in out if key.startswith(prefix)})
    for label in labels:
        for i, got in enumerate(tokens(part_of_one(label))):
            count = case.json.get("token_counts", {}).get(f"{label}_{i}", len(got))
            compare.equal(f"count {label} {i}", len(got), count)
            compare.those(out, {f"{prefix}{label}_{i}": got})
    for name, option in (("global_only", "use_global_only"), ("local_only_all", "use_local_only")):
        for i, got in enumerate(tokens(1.0, **{option: True})):
            compare.those(out, {f"{name}_{i}": got})
    for label in (key.removeprefix("inputs_embeds_") for key in out if key.startswith("inputs_embeds_")):
        for i, visual in enumerate(tokens(part_of_one(label))):
            place = ids[i].tolist().index(mark)
            read = ids[i, : int(mask[i].sum())].clamp(min=0)
            whole = torch.cat([table[read[:place]], visual, table[read[place + 1 :]]])
            expected = {f"{key}_{label}": out[f"{key}_{label}"][i] for key in LLM if f"{key}_{label}" in out}
            length = len(expected[f"inputs_embeds_{label}"])
            made = {  # padded on the right
                f"inputs_embeds_{label}": F.pad(whole, (0, 0, 0, length - len(whole))),
                f"attention_mask_{label}": torch.arange(length) < len(whole),
            }
            if "in.labels" in case.tensors:  # nothing is learnt of a picture
                learnt = case.tensors["in.labels"][i, : len(read)]
                nothing = torch.full((len(visual),), IGNORED)
                learnt = torch.cat([learnt[:place], nothing, learnt[place + 1 :]])
                made[f"labels_{label}"] = F.pad(learnt, (0, length - len(learnt)), value=IGNORED)
            compare.those(expected, made, of=f"picture {i},")


def checkpoint(compare: Comparison) -> None:
    """Pixels, features, router, visual tokens, logits, greedy text; a second question; stage files."""
    case, tensors = compare.case, compare.case.tensors
    model = load(case, options=heads_of(case))
    picture = Image.fromarray(tensors["image_uint8"].numpy())
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    views = tensors["pixel_views"]
    compare.close("pixels", images(picture)["pixel_values"], views, 1e-6)
    tolerance = case.tolerance("visual_tokens")
    compare.those(tensors, {"vision_features": model.encode_views(views)}, tolerance)
    question(compare, model, picture, views, tensors, "")
    if "q2.input_ids" in tensors:
        question(compare, model, picture, views, tensors.part("q2"), "q2")
    alone = tensors.part("text_only")
    if "logits" in alone:
        logits = words(model(input_ids=alone["input_ids"]).logits[0], alone["logits"])
        compare.close("text alone", logits, alone["logits"], case.tolerance("logits"))
    if "greedy_tokens" in tensors:
        expected = tensors["greedy_tokens"].tolist()
        first = asked(case, model, picture, views, tensors["input_ids"])
        compare.equal("greedy", greedy(model, first, len(expected))[0], expected)
    folder = stage_folder(case)
    if folder is not None and "stage_files" in case.json:
        stages(compare, folder, picture, views)


def heads_of(case: Case) -> dict[str, Any]:
    """config.json does not tell how many heads the query formers have; where it does not matter, neither."""
    heads = case.json.get("size_settings_to_apply", {}).get("resampler_heads")
    return {} if heads is None else {"heads": heads}


def asked(
    case: Case, model: FoveateForConditionalGeneration, picture: Image.Image, views: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """Our inputs; as in the authors' code, the router reads all text of the prompt."""
    text = ids[ids != placeholder(case)][None]
    given = {"query_ids": text, "query_mask": torch.ones_like(text)}
    return {**prompt(case, model, ids, views, [(picture.height, picture.width)]), **given}


def vision(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: inputs[key] for key in ("pixel_values", "image_sizes", "query_ids", "query_mask")}


def question(
    compare: Comparison,
    model: FoveateForConditionalGeneration,
    picture: Image.Image,
    views: Tensor,
    expected: Tensors,
    which: str,
) -> None:
    """What the router does with a prompt, and what the LLM is given and says."""
    case = compare.case
    inputs = asked(case, model, picture, views, expected["input_ids"])
    connector = model.connector
    assert isinstance(connector, SlimeConnector)
    noted: dict[str, Tensor] = {}

    def note(name: str, result: Tensor) -> Tensor:
        noted[name] = result
        return result

    route = connector.router
    scores, probabilities = route.scores, route.probabilities

    def scored(tokens: Tensor, *more: Any) -> Tensor:
        return note("router_scores", scores(note("local_tokens_before_router", tokens), *more))

    route.scores = scored  # type: ignore[method-assign]
    route.probabilities = lambda given: note("router_probs", probabilities(given))  # type: ignore[method-assign]
    encoded = model.get_image_features(**vision(inputs))
    route.scores, route.probabilities = scores, probabilities  # type: ignore[method-assign]
    kept = encoded.kept[0]
    fixed = model.method.tower.tokens + 1
    compare.equal(f"{which} global and separator stay".lstrip(), bool(kept[:fixed].all()), True)
    if "kept_local_indices" in expected:
        found = kept[fixed:].nonzero()[:, 0].tolist()
        compare.equal(f"{which} kept".lstrip(), found, expected["kept_local_indices"].tolist())
    seen = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    seen[inputs["input_ids"] == model.config.image_token_id] = kept
    order = torch.from_numpy(raster(model.plans(inputs["image_sizes"].tolist())[0].tiles, connector.side))

    def logits() -> Tensor:
        found = words(model(**inputs).logits[seen], expected["logits"])
        return found[-len(expected["logits"]) :]

    results = {
        "local_tokens_before_router": lambda: noted["local_tokens_before_router"][order],
        "router_scores": lambda: noted["router_scores"][order],
        "router_probs": lambda: noted["router_probs"][0],
        "visual_tokens": encoded.pooler_output[0][kept],
        "inputs_embeds": embedded(model, inputs, encoded.pooler_output[0])[seen[0]],
        "logits": logits,
    }
    for name, result in results.items():
        allowed = case.tolerance("logits" if name == "logits" else "visual_tokens")
        compare.those(expected, {name: result}, allowed, of=which)


def stages(compare: Comparison, folder: Path, picture: Image.Image, views: Tensor) -> None:
    """mm_projector.bin and sampler.bin on top of the LLM and tower, under each setting of the stages."""
    case, about = compare.case, compare.case.json["stage_files"]
    files = stage_files(folder)
    for name, settings in about.items():
        if not isinstance(settings, dict):
            continue
        changes = settings["settings"]
        if changes.get("use_global_only"):
            changes = {"use_local_only": False, **changes}  # the two exclude each other
        options = files.released.layout.options({**files.released.config, **changes}, {})
        model = load(case, options={**options, **heads_of(case)})
        fill_connector(model, files)
        shown = (
            slice(1, None)
            if options["use_local_only"]
            else slice(0, 1 if options["use_global_only"] else None)
        )
        inputs = asked(case, model, picture, views[shown], case.tensors["input_ids"])
        expected = case.part(f"stage1.{name}")
        visual = model.get_image_features(**vision(inputs)).pooler_output[0]
        compare.close(f"{name} tokens", visual, expected["visual_tokens"], case.tolerance("visual_tokens"))
        logits = words(model(**inputs).logits[0], expected["logits"])[-len(expected["logits"]) :]
        compare.close(f"{name} logits", logits, expected["logits"], case.tolerance("logits"))


FAMILY = Family(
    method="slime",
    checkers={
        "grid_table": grid_table,
        "preprocess": preprocess,
        "global_adapter": global_adapter,
        "local_compressor": local_compressor,
        "pos_embed": pos_embed,
        "router": router,
        "connector": connector,
        "checkpoint": checkpoint,
    },
)
