"""SliME."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from foveate import FoveateForConditionalGeneration
from foveate.checkpoints import fill_connector, read_preprocessor, stage_files
from foveate.geometry import Size
from foveate.layouts import convert_key
from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.slime import Mixture, QueryFormer, Router, Slime, SlimeOptions, sincos_positions
from foveate.processing import FoveateImageProcessor, image_processor_for
from tests.parity.checkpoints import PLACEHOLDER, load, prompt, tower_folder
from tests.parity.golden import Case, Comparison, Family
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
    rules = {
        name: Slime(TowerGeometry(336, 14), {"grids": rule})
        for name, rule in (("official", "authors"), ("paper", "paper"))
    }
    rows = compare.case.json["rows"]
    for row in rows:
        width, height = row["wh"]
        for name, method in rules.items():
            plan = method.plan(height, width)
            canvas = plan.canvases[1]
            got = {
                "grid_cols_rows": [plan.tiles.width, plan.tiles.height],
                "canvas_wh": [canvas.size.width, canvas.size.height],
                "resized": [canvas.content.width, canvas.content.height],
                "paste_xy": [canvas.content.left, canvas.content.top],
                "content_box": list(canvas.content),
            }
            assert got == {key: row[name][key] for key in got}, row["wh"]
    compare.equal("grids", len(rows), 200)


def preprocess(compare: Comparison) -> None:
    tile = compare.case.json["config"]["tile"]
    images = FoveateImageProcessor("slime", image_size=tile, patch_size=14)
    for about in compare.case.json["images"]:
        i = about["i"]
        picture = Image.fromarray(compare.case.tensors[f"in.image_{i}"].numpy())
        views = images(picture)["pixel_values"]
        compare.close(f"views {i}", views, compare.case.tensors[f"out.views_{i}"], 1e-6)


def adapter(case: Case, **options: Any) -> Mixture:
    config = case.json["config"]
    grid = Size(config["query_grid"], config["query_grid"])
    widths = Widths(config["mm_hidden_size"], config["hidden_size"])
    module = Mixture(widths, grid, config["heads"], SlimeOptions(**options))
    fill(module, case.part("state"), GLOBAL, "connector.adapter.")
    return module


def global_adapter(compare: Comparison) -> None:
    """Both adapters, their mixture, the gates with recorded noise, and the paper's gates."""
    case = compare.case
    x, noise = case.tensors["in.x"], case.tensors["in.noise"].view(*case.tensors["in.x"].shape[:2], 2)
    module = adapter(case)
    expected = case.part("out")
    compare.close("query former", module.former(x), expected["query_former"])
    compare.close("mlp", module.mlp(x), expected["expert_mlp"])
    compare.close("mlp of the query former", module.mlp(module.former(x)), expected["expert_query"])
    compare.close("gates", module.gates(x), expected["gates"])
    compare.close("mixture", module(x), expected["y"])
    compare.close("alone", module(x[:1])[0], expected["y_single"])
    compare.close("local tokens", module.mlp(case.tensors["in.short"]), expected["short_projection_only"])
    for experts, name in (("mlp", "only_expert0"), ("query_former", "only_expert1")):
        compare.close(experts, adapter(case, experts=experts)(x), expected[name])
    gates = module.gates(x, noise)
    compare.close("gates in training", gates, expected["train_gates_official_noise"])
    first, second = gates.split(1, -1)
    noisy = first * module.mlp(x) + second * module.mlp(module.former(x))
    compare.close("mixture in training", noisy, expected["train_y_official_noise"])
    paper = adapter(case, gate="paper")
    compare.close("paper's gates", paper.gates(x), case.part("paper_out")["gates_eval"])
    compare.close("paper's gates in training", paper.gates(x, noise), case.part("paper_out")["gates_train"])


def local_compressor(compare: Comparison) -> None:
    case, config = compare.case, compare.case.json["config"]
    grid, source = (Size(config[key], config[key]) for key in ("query_grid", "source_grid"))
    x, expected = case.tensors["in.x"], case.part("out")

    def former(reads: Size) -> QueryFormer:
        module = QueryFormer(config["embed_dim"], grid, reads, config["heads"])
        fill(module, case.part("state"), LOCAL, "connector.compressor.")
        return module

    compare.close("key positions", former(source).source_positions(), expected["key_pos_embed"])
    compare.close("tiles", former(source)(x), expected["y"])
    compare.close("one tile", former(source)(x[:1])[0], expected["y_single"])
    compare.close("same grid", former(grid)(x[:1, : config["num_queries"]]), expected["same_grid"])


def pos_embed(compare: Comparison) -> None:
    """Tables of the paper's size, within one step of half precision."""
    rows, expected = compare.case.tensors["in.rows"], compare.case.part("out")
    step = 2.0**-11
    small, large = Size(12, 12), Size(24, 24)
    compare.close("12 x 12", sincos_positions(1024, small), expected["table_12x12_1024"], step)
    compare.close("24 x 24", sincos_positions(1024, large)[rows], expected["table_24x24_rows"], step)
    keys = QueryFormer(1024, small, large, 8).source_positions()[rows]
    compare.close("keys", keys, expected["keys_24x24_rows"], 2 * step)


def router(compare: Comparison) -> None:
    """Scores, probabilities, and exactly which tokens are kept, as the authors read them and as the paper."""
    case = compare.case
    tokens, owner = case.tensors["in.local"], torch.zeros(60, dtype=torch.long)
    query = Query(case.tensors["in.text"][None], case.tensors["in.mask"][None])
    expected, paper = case.part("out"), case.part("paper_out")
    readings = (
        ("cosine_sum", expected["similarity_sum"], "out.kept"),
        ("cosine_mean", paper["scores_cos_mean"], "paper_out.kept_cos_mean"),
        ("dot_mean", paper["scores_dot_mean"], "paper_out.kept_dot_mean"),
    )
    for similarity, scores, prefix in readings:
        options = SlimeOptions(similarity=similarity)
        got = Router(options).scores(tokens, owner, query)
        compare.close(f"{similarity} scores", got, scores)
        for key in (name for name in case.tensors if name.startswith(prefix) and "train" not in name):
            chooser = Router(replace(options, gamma=int(key[-3:]) / 100)).eval()
            kept, _ = chooser(chooser.probabilities(got[None]))
            compare.equal(key, kept[0].nonzero()[:, 0].tolist(), case.tensors[key].tolist())
    everything = Query(query.embeds, torch.ones_like(query.mask))
    mean = Router(SlimeOptions(similarity="cosine_mean")).scores(tokens, owner, everything)
    compare.close("cosine mean without mask", mean, expected["similarity_mean_nomask"])
    plain = Router(SlimeOptions()).eval()
    scores = plain.scores(tokens, owner, query)[None]
    compare.close("probabilities", plain.probabilities(scores)[0], expected["probs"])
    for gamma in ("050", "075", "090", "095", "100"):
        chooser = Router(SlimeOptions(gamma=int(gamma) / 100)).train()
        kept, _ = chooser(chooser.probabilities(scores, case.tensors["in.noise_std1"][None]))
        found = kept[0].nonzero()[:, 0].tolist()
        compare.equal(f"kept in training {gamma}", found, expected[f"kept_train_{gamma}"].tolist())


def connector(compare: Comparison) -> None:
    """Features and prompt -> visual tokens of two pictures in one batch, for every gamma and either half."""
    case, config = compare.case, compare.case.json["config"]
    table = case.tensors["state.embed_tokens.weight"]
    ids, mask = case.tensors["in.input_ids"], case.tensors["in.attention_mask"]
    text = mask & (ids != PLACEHOLDER)
    query = Query(table[ids.clamp(min=0)], text)
    features = [case.tensors["in.features_0"], case.tensors["in.features_1"]]
    sizes = case.tensors["in.image_sizes_wh"].tolist()

    def tokens(gamma: float, **options: Any) -> list[Tensor]:
        tower = TowerGeometry(336, 336 // config["view_side"])
        given = {"queries": config["num_local_queries"], "heads": config["heads"], "gamma": gamma}
        method = Slime(tower, {**given, **options})
        module = method.build_connector(Widths(config["mm_hidden_size"], config["hidden_size"]))
        state = {key: t for key, t in case.part("state").items() if key != "embed_tokens.weight"}
        fill(module, state, "model.", "connector.")
        plans = [method.plan(height, width) for width, height in sizes]
        grids = [[plan.tiles.width, plan.tiles.height] for plan in plans]
        if "use_global_only" not in options:
            compare.equal("grids", grids, config["grids_cols_rows"])
        kinds = {"use_global_only": "global", "use_local_only": "tile"}
        only = next((role for key, role in kinds.items() if key in options), None)
        views = [
            view
            for plan, seen in zip(plans, features, strict=True)
            for view, role in zip(seen, ["global"] + ["tile"] * (len(seen) - 1), strict=True)
            if only in (None, role)
        ]
        visual = module(torch.stack(views), plans, query)
        made = visual.tokens
        if visual.separators is not None:
            made = torch.where(visual.separators[:, None], table[config["separator_token_id"]], made)
        kept = torch.ones(len(made), dtype=torch.bool) if visual.kept is None else visual.kept
        counts = [plan.tokens for plan in plans]
        return [t[keep] for t, keep in zip(made.split(counts), kept.split(counts), strict=True)]

    expected, tolerance = case.part("out"), 1e-5
    for gamma in ("050", "075", "090", "100"):
        for i, got in enumerate(tokens(int(gamma) / 100)):
            compare.equal(f"count {gamma} {i}", len(got), case.json["token_counts"][f"{gamma}_{i}"])
            compare.close(f"gamma {gamma} {i}", got, expected[f"visual_tokens_{gamma}_{i}"], tolerance)
    for name, option in (("global_only", "use_global_only"), ("local_only_all", "use_local_only")):
        for i, got in enumerate(tokens(1.0, **{option: True})):
            compare.close(f"{name} {i}", got, expected[f"{name}_{i}"], tolerance)
    for i, visual in enumerate(tokens(0.75)):
        place = ids[i].tolist().index(PLACEHOLDER)
        words = table[ids[i].clamp(min=0)]
        whole = torch.cat([words[:place], visual, words[place + 1 : int(mask[i].sum())]])
        seen = expected["attention_mask_075"][i]
        compare.close(f"LLM input {i}", whole, expected["inputs_embeds_075"][i][seen], tolerance)


def checkpoint(compare: Comparison) -> None:
    """Pixels, features, router, visual tokens, logits, greedy text; a second question; stage files."""
    case, tensors = compare.case, compare.case.tensors
    model = load(case)
    picture = Image.fromarray(tensors["image_uint8"].numpy())
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    views = tensors["pixel_views"]
    compare.close("pixels", images(picture)["pixel_values"], views, 1e-6)
    features = model.encode_views(views)
    compare.close("vision features", features, tensors["vision_features"], case.tolerance("visual_tokens"))
    first, second = (asked(model, picture, views, tensors[key]) for key in ("input_ids", "q2.input_ids"))
    routed(compare, model, first, tensors["kept_local_indices"], "")
    routed(compare, model, second, tensors["q2.kept_local_indices"], "q2 ")
    encoded = model.get_image_features(**vision(first))
    visual = encoded.pooler_output[0][encoded.kept[0]]
    compare.close("visual tokens", visual, tensors["visual_tokens"], case.tolerance("visual_tokens"))
    seen = torch.ones_like(first["input_ids"], dtype=torch.bool)
    seen[first["input_ids"] == model.config.image_token_id] = encoded.kept[0]
    tolerance, words = case.tolerance("logits"), tensors["logits"].shape[-1]
    compare.close("logits", model(**first).logits[seen][:, :words], tensors["logits"], tolerance)
    compare.close("q2 logits", model(**second).logits[:, -1, :words], tensors["q2.logits"], tolerance)
    alone = model(input_ids=tensors["text_only.input_ids"]).logits[0, :, :words]
    compare.close("text alone", alone, tensors["text_only.logits"], tolerance)
    expected = case.json["greedy_tokens"]
    compare.equal("greedy", greedy(model, first, len(expected))[0], expected)
    stages(compare, picture, views)


def asked(
    model: FoveateForConditionalGeneration, picture: Image.Image, views: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """Our inputs; as in the authors' code, the router reads all text of the prompt."""
    text = ids[ids != PLACEHOLDER][None]
    question = {"query_ids": text, "query_mask": torch.ones_like(text)}
    return {**prompt(model, ids, views, [(picture.height, picture.width)]), **question}


def vision(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: inputs[key] for key in ("pixel_values", "image_sizes", "query_ids", "query_mask")}


def routed(
    compare: Comparison,
    model: FoveateForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    kept: Tensor,
    which: str,
) -> None:
    got = model.get_image_features(**vision(inputs)).kept[0]
    fixed = model.method.tower.tokens + 1
    compare.equal(f"{which}global and separator stay", bool(got[:fixed].all()), True)
    compare.equal(f"{which}kept", got[fixed:].nonzero()[:, 0].tolist(), kept.tolist())


def stages(compare: Comparison, picture: Image.Image, views: Tensor) -> None:
    """mm_projector.bin and sampler.bin on top of the LLM and tower, under each setting of the stages."""
    case, about = compare.case, compare.case.json["stage_files"]
    files = stage_files(case.folder / about["folder"])
    for name, settings in about.items():
        if not isinstance(settings, dict):
            continue
        config = {**files.released.config, **settings["settings"]}
        if name.startswith("global_only"):
            config["use_local_only"] = False
        options = files.released.layout.options(config, {})
        model = load(case, options=options)
        fill_connector(model, files)
        shown = (
            slice(1, None)
            if options["use_local_only"]
            else slice(0, 1 if options["use_global_only"] else None)
        )
        inputs = asked(model, picture, views[shown], case.tensors["input_ids"])
        expected = case.part(f"stage1.{name}")
        visual = model.get_image_features(**vision(inputs)).pooler_output[0]
        compare.close(f"{name} tokens", visual, expected["visual_tokens"], case.tolerance("visual_tokens"))
        logits = model(**inputs).logits[0, -len(expected["logits"]) :, : expected["logits"].shape[-1]]
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
