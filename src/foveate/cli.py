"""The command line. Every command imports what it needs when it runs, so that `foveate --help` is instant."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.batch.cli import batch
from foveate.data.cli import app as data
from foveate.demo.cli import demo
from foveate.errors import FoveateError, check_text
from foveate.files import new_folder
from foveate.lab.cli import app as lab
from foveate.options import build_options
from foveate.serve.cli import serve
from foveate.serve.mcp_cli import mcp
from foveate.shipped import shipped
from foveate.versions import MOVED, add_version_note

if TYPE_CHECKING:
    from PIL import Image

    from foveate.ask.answer import Answer
    from foveate.ask.foveate import Foveate
    from foveate.methods.base import Method
    from foveate.picture.geometry import Size
    from foveate.picture.limits import Limits
    from foveate.zoom.zoom import Zoom

app = typer.Typer(
    name="foveate",
    help="Ask multimodal LLMs about fine detail in pictures; compare, train and price the methods.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(lab, name="lab")
app.add_typer(data, name="data")
app.command()(batch)
app.command()(serve)
app.command()(mcp)
app.command()(demo)

Model = Annotated[
    str | None, typer.Option(help="Model folder or Hugging Face hub id; by default the embedded model.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the model on the hub; by default main.")
]
Subfolder = Annotated[str, typer.Option(help="The folder inside the model's that holds it.")]
Transparent = Annotated[
    Literal["white", "bare"] | None,
    typer.Option(
        "--transparency",
        help="What transparent pictures show: white paper, or bare as the authors of released models read "
        "them; by default the model's own choice.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best available.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default one that suits the device.")
]
Tower = Annotated[
    str | None, typer.Option(help="Vision tower folder, for original LLaVA checkpoints without one.")
]
AsMethod = Annotated[
    str | None, typer.Option("--method", help="Use the model with another method that takes its parameters.")
]
Template = Annotated[
    str | None, typer.Option(help="plain, bare, vicuna_v1, llama3, llama3_v1, mistral or chatml.")
]
Option = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="Method option as key=value; repeatable.")
]
MOST_TOKENS = 2**24
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Picture = Annotated[str, typer.Argument(help="The picture: a file, or its http or https URL.")]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Bound on a picture's pixels, checked before it is decoded.")
]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private", help="Let URLs lead to this machine or a local network.")
]
Quantized = Annotated[
    Literal["8bit", "4bit"] | None,
    typer.Option("--quantize", help="The LLM's linear layers in 8 or 4 bits, by bitsandbytes."),
]
Positions = Annotated[
    int | None,
    typer.Option(
        "--max-positions", min=1, help="Longest conversation in tokens, for an LLM that reads beyond its own."
    ),
]
CloserLook = Annotated[
    Literal["answer", "relevance", "tool"] | None,
    typer.Option(
        "--zoom",
        help="A closer look at a region that the model's answer, its relevance or its calls of a tool name.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Bound on the answer's length in tokens.")]


EMBEDDED_NOTICE = (
    "no --model given: the embedded model answers. It has learnt coloured shapes and signs with letters, "
    "digits and words on them, and nothing else."
)


@app.command()
def ask(
    picture: Picture,
    questions: Annotated[list[str], typer.Argument(help="One or more questions about it.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Write a picture of what the model saw.")] = None,
    as_json: AsJson = False,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    transparency: Transparent = None,
    vision_tower: Tower = None,
    method: AsMethod = None,
    template: Template = None,
    option: Option = None,
    max_positions: Positions = None,
    quantize: Quantized = None,
    zoom: CloserLook = None,
    max_pixels: MaxPixels = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Answer questions about a picture; with --zoom by any VLM that transformers loads."""
    for question in questions:
        check_text(question, "the question")
    if out is not None:
        from foveate.picture.reading import drawing_path

        drawing_path(out)  # before the model loads
    limits = _limits(max_pixels, allow_private)
    once = _found(picture, limits)  # what is no picture ends it before any model is looked for
    if zoom is not None or _is_others(model, revision, subfolder):
        ours = {"vision-tower": vision_tower, "method": method, "template": template, "option": option}
        _only_ours(ours | {"quantize": quantize, "transparency": transparency})
        asked = _closely(zoom, limits, max_positions, model, revision, subfolder, device, dtype)
        _ask_closely(asked, once, questions, zoom is None, max_new_tokens, as_json, out)
        return
    image, foveate = _ready(
        once,
        limits,
        model,
        revision,
        subfolder,
        transparency,
        device,
        dtype,
        vision_tower,
        method,
        template,
        option,
        max_positions,
        quantize,
    )
    console = Console()
    live = not as_json and _can_stream(foveate)
    answers = []
    for question in questions:
        if live:
            _print_dim(console, question)
            answers.append(_streamed(console, foveate, partial(foveate.ask, image), question, max_new_tokens))
        else:
            answers.append(foveate.ask(image, question, max_new_tokens=max_new_tokens))
    if as_json:
        values = [answer.to_dict() for answer in answers]
        _print_json(values[0] if len(values) == 1 else values)
    elif not live:
        for answer in answers:
            _print_answer(console, answer)
    if out is not None:
        _draw(console, answers, out, as_json)


@app.command()
def explain(
    picture: Picture,
    question: Annotated[str, typer.Argument(help="The question about it.")],
    out: Annotated[
        list[Path] | None,
        typer.Option(help="Write it as its name ends: .html, .png, .jpg, .webp or .json; repeatable."),
    ] = None,
    model: Model = None,
    as_json: AsJson = False,
    words: Annotated[
        int, typer.Option(min=1, help="How many of the answer's tokens are explained, its first ones.")
    ] = 32,
    share: Annotated[
        float, typer.Option(help="The fraction of the picture that is hidden to test the explanation.")
    ] = 0.05,
    draws: Annotated[
        int, typer.Option(min=0, help="Random parts that are hidden for comparison; 0 tests nothing.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of their places.")] = 0,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    transparency: Transparent = None,
    vision_tower: Tower = None,
    method: AsMethod = None,
    template: Template = None,
    option: Option = None,
    max_positions: Positions = None,
    quantize: Quantized = None,
    zoom: CloserLook = None,
    max_pixels: MaxPixels = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Explain an answer: where the model looked, what the answer rests on, and whether that is faithful."""
    check_text(question, "the question")
    limits = _limits(max_pixels, allow_private)
    once = _found(picture, limits)
    from foveate.explaining.drawing import sentences
    from foveate.explaining.explanation import explained_as
    from foveate.explaining.faithfulness import Probe

    for path in out or ():
        explained_as(path)  # before the model loads
    how: dict[str, Any] = {
        "words": words,
        "probe": Probe(share, draws, seed),
        "max_new_tokens": max_new_tokens,
    }
    loading = (model, revision, subfolder)
    if zoom is not None or _is_others(*loading):
        ours = {"vision-tower": vision_tower, "method": method, "template": template, "option": option}
        _only_ours(ours | {"quantize": quantize, "transparency": transparency})
        found = _closely(zoom, limits, max_positions, *loading, device, dtype).explain(
            once, question, no_zoom=zoom is None, **how
        )
    else:
        ready = (transparency, device, dtype, vision_tower, method, template, option, max_positions, quantize)
        image, foveate = _ready(once, limits, *loading, *ready)
        found = foveate.explain(image, question, **how)
    for path in out or ():
        found.save(path)
    if as_json:
        _print_json(found.to_dict())
        return
    from foveate.ask.live import show_text

    console = Console()
    _print_dim(console, question)
    show_text(console, found.answer)
    for line in (*sentences(found), *(f"written to {path}" for path in out or ())):
        _print_dim(console, line)


@app.command()
def chat(
    picture: Picture,
    model: Model = None,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    transparency: Transparent = None,
    vision_tower: Tower = None,
    method: AsMethod = None,
    template: Template = None,
    option: Option = None,
    max_positions: Positions = None,
    quantize: Quantized = None,
    max_pixels: MaxPixels = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Talk about a picture, line by line; an empty line or the end of input stops."""
    limits = _limits(max_pixels, allow_private)
    image, foveate = _ready(
        _found(picture, limits),
        limits,
        model,
        revision,
        subfolder,
        transparency,
        device,
        dtype,
        vision_tower,
        method,
        template,
        option,
        max_positions,
        quantize,
    )
    from foveate.ask.conversation import Chat
    from foveate.ask.live import show_text

    talk, console, live = Chat(foveate.engine, image), Console(), _can_stream(foveate)
    while True:
        try:
            question = console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            break
        if not question.strip():
            break
        try:
            if live:
                _streamed(console, foveate, talk.ask, question, max_new_tokens)
                continue
            answer = talk.ask(question, max_new_tokens=max_new_tokens)
        except FoveateError as error:  # the conversation continues
            console.print(str(error), style="red", markup=False)
            continue
        show_text(console, answer.text)
        console.print(_costs(answer), style="dim", soft_wrap=True)


@app.command()
def inspect(
    picture: Annotated[
        str | None, typer.Argument(help="The picture: a file, or its http or https URL.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Its size instead, width x height in pixels: 4000x3000.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method's name, repeatable, or all; by default all, or that of --model."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id whose shapes are used; any VLM of transformers."),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    text_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Length of the text around the picture.")
    ] = 64,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", help="key=value for all methods, method.key=value for one; repeatable."
        ),
    ] = None,
    as_json: AsJson = False,
    max_pixels: MaxPixels = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Price a picture before any weights load: views, tokens, TFLOP, KV memory, effective resolution.

    Without --model, the shapes are those of a 7B model: CLIP ViT-L/14-336 and Vicuna-7B, bfloat16.
    """
    if (picture is None) == (size is None):
        raise FoveateError("give a picture, or --size WIDTHxHEIGHT without one")
    limits = _limits(max_pixels, allow_private)
    if model is None and (revision is not None or subfolder):
        raise FoveateError("--revision and --subfolder belong to --model: give one")
    options = _given(option)
    shape, title = _shape(picture, size, limits)
    _quiet()
    from foveate.choosing import Prices, price_methods, price_vlm, subject
    from foveate.model.folders import Hub
    from foveate.zoom.unloaded import Unloaded

    config = None if model is None else subject(model, Hub(revision, subfolder), limits)
    if isinstance(config, Unloaded):
        if method:
            raise FoveateError(f"--method {method[0]}: {model} is priced as it is; leave out --method")
        prices: Prices = price_vlm(str(model), config, shape, options, text_tokens)
    else:
        kinds = _kinds(method or ([] if config is None else [config.method]))
        prices = price_methods(shape, kinds, options, config, text_tokens)
    if as_json:
        value = {"width": shape.width, "height": shape.height, "text_tokens": text_tokens}
        _print_json({**value, "methods": prices.rows, "refused": prices.refused})
    table = Table(title=f"{title}{shape.width} x {shape.height} pixels, {text_tokens} text tokens")
    columns = (
        "method",
        "views",
        "visual\ntokens",
        "seen at",
        "vision\nTFLOP",
        "prefill\nTFLOP",
        "GFLOP\na token",
        "KV\nMB",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for name, row in _lines_of(prices.rows):
        table.add_row(
            escape(name),
            str(row["views"]),
            f"{row['visual_tokens']}{' *' if row.get('over_budget') else ''}",
            _seen_at(row),
            f"{row['encode_flops'] / 1e12:.2f}",
            f"{row['prefill_flops'] / 1e12:.2f}",
            f"{row['decode_flops'] / 1e9:.1f}",
            f"{row['kv_bytes'] / 1e6:.0f}",
        )
    console = Console()
    whole = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, whole)  # numbers that are cut off would be wrong ones
    if prices.rows and not as_json:
        console.print(table)
    for sentence in () if as_json else _remarks(prices.rows, prices.refused, shape):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if not prices.rows:
        raise FoveateError(f"none of the {len(prices.refused)} methods can do this")


@app.command()
def compose(
    out: Annotated[Path, typer.Argument(help="The new model's folder.")],
    vision: Annotated[str | None, typer.Option(help="Vision tower: folder or hub id.")] = None,
    text: Annotated[str | None, typer.Option(help="Causal LM: folder or hub id.")] = None,
    vision_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --vision.")] = None,
    text_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --text.")] = None,
    method: Annotated[
        str | None, typer.Option(help="A method's name; by default llava, or that of --connector.")
    ] = None,
    connector: Annotated[
        str | None, typer.Option(help="Folder of one stage of the authors' training, with mm_projector.bin.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="plain, bare, vicuna_v1, llama3, llama3_v1, mistral or chatml.")
    ] = "vicuna_v1",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny random parts, to try commands without weights.")
    ] = False,
    option: Option = None,
) -> None:
    """Make a new model from a vision tower and a causal LM, with an untrained connector between them."""
    _quiet()
    if tiny and connector is not None:
        raise FoveateError(
            "--connector needs the tower and LLM it was trained with: give --vision and --text"
        )
    if tiny == bool(vision or text) or bool(vision) != bool(text):
        raise FoveateError("give --vision and --text, or --tiny alone")
    if tiny and (vision_revision or text_revision):
        raise FoveateError("--vision-revision and --text-revision belong to --vision and --text")
    with new_folder(out) as part:
        if tiny:
            from foveate.methods import DEFAULT
            from foveate.tiny import tiny_model

            made = tiny_model(method or DEFAULT, _given(option), template=template)
        else:
            from foveate.composing import compose as compose_parts

            assert vision is not None and text is not None
            made = compose_parts(
                vision,
                text,
                method,
                _given(option),
                connector=connector,
                template=template,
                vision_revision=vision_revision,
                text_revision=text_revision,
            )
        _save(made, part)
    Console().print(f"model written to {out}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a released checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The new folder, in Foveate's own layout.")],
    revision: Revision = None,
    subfolder: Subfolder = "",
    transparency: Transparent = None,
    vision_tower: Tower = None,
    method: AsMethod = None,
    template: Template = None,
    dtype: Dtype = None,
    option: Option = None,
    max_positions: Positions = None,
    to: Annotated[
        Literal["foveate", "hf"],
        typer.Option(help="The layout: Foveate's own, or that of transformers' own LLaVA classes."),
    ] = "foveate",
) -> None:
    """Rewrite a checkpoint in Foveate's own layout, or in transformers' for other tools."""
    with new_folder(out) as part:
        made = _load(
            model,
            revision,
            subfolder,
            transparency,
            "cpu",
            dtype or "float32",
            vision_tower,
            method,
            template,
            option,
            max_positions,
        )
        if to == "hf":
            from foveate.model.export import write_transformers

            write_transformers(made.model, made.processor, part)
        else:
            _save(made, part)
    Console().print(f"model written to {out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model's folder, in Foveate's own layout.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; by default as the account says."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; by default main.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
) -> None:
    """Upload a model's folder to the Hugging Face hub, with its card. `hf auth login` comes first."""
    _quiet()
    from foveate.model.pushing import Push
    from foveate.model.sharing import push_folder

    address = push_folder(folder, repository, Push(message, private=private, revision=revision))
    Console(soft_wrap=True).print(f"pushed to {address}", highlight=False)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help=f"A YAML file, or one that comes with Foveate: {', '.join(shipped('recipe'))}."),
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes as key=value, for example stages.pretrain.lr=1e-4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, model and data, and show what would train.")
    ] = False,
) -> None:
    """Train by a recipe. Run again after an interruption, it resumes."""
    _quiet()
    from foveate.train.run import train as run

    run(recipe, changes or [], console=Console(), dry_run=dry_run)


@app.command()
def annotate(
    data: Annotated[
        str, typer.Argument(help="Conversations (.json, .jsonl, .tar) or a dataset (.parquet, folder, id).")
    ],
    out: Annotated[
        Path, typer.Option(help="Boxes, one question a line: .jsonl. The authors' format beside it.")
    ],
    model: Model = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    images: Annotated[Path | None, typer.Option(help="Folder that picture paths start from.")] = None,
    split: Annotated[str, typer.Option(help="Of a Hugging Face dataset.")] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 8,
    check: Annotated[
        int, typer.Option(min=0, help="Number of questions to also answer with their region masked.")
    ] = 200,
    threshold: Annotated[
        float, typer.Option(help="Least relevance, scaled to 0..1, that a region keeps.")
    ] = 0.5,
    extension: Annotated[float, typer.Option(help="Fraction by which a region's sides grow.")] = 0.1,
    reading: Annotated[str, typer.Option(help="Rule of eq. 5: chefer, literal or indicator.")] = "chefer",
    detector: Annotated[
        str | None, typer.Option(help="faster_rcnn; by default the image tokens are the regions.")
    ] = None,
    about: Annotated[
        Literal["questions", "pictures"],
        typer.Option(help="questions, or pictures: one region for each picture, without a question."),
    ] = "questions",
    device: Device = None,
    dtype: Dtype = None,
    max_pixels: MaxPixels = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Label your data with regions of interest, for training Chain-of-Spot. Resumes an interrupted run."""
    _quiet()
    from foveate.annotate import annotate_data
    from foveate.zoom.relevance import RegionRule

    rule = build_options(
        RegionRule,
        {"reading": reading, "threshold": threshold, "extension": extension},
        where="annotate",
    )
    report = annotate_data(
        data,
        out,
        model=model,
        revision=revision,
        subfolder=subfolder,
        images=images,
        split=split,
        rule=rule,
        batch=batch,
        check=check,
        detector=detector,
        about=about,
        device=device,
        dtype=dtype,
        console=Console(),
        limits=_limits(max_pixels, allow_private),
    )
    if report is not None:
        _print_json({key: value for key, value in report.items() if key != "settings"})


@app.command("eval")
def evaluate(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Questions with answers (.jsonl, .json, .parquet, .tar, folder; with --split a data set on "
            "the hub); or two runs to --compare."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of any VLM, or the address of a server of OpenAI's protocol, with /v1; by "
            "default the embedded model."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; of --compare a page, .html.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="exact, vqa, anls, relaxed, option, yes, mme, iou or hit; repeatable."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that picture paths start from and stay in.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The part of a data set on the hub, for example test.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="With --split: the data set's configuration.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most samples to ask.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which samples, drawn at random; by default the first ones.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 8,
    max_new_tokens: NewTokens = 64,
    zoom: CloserLook = None,
    name: Annotated[str | None, typer.Option(help="The model's name on a server.")] = None,
    boxes: Annotated[
        str | None, typer.Option(help="How a server's model writes boxes: qwen3_vl, internvl, ...")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a picture that the model sees smaller than it is.")
    ] = False,
    against: Annotated[
        bool, typer.Option("--compare", help="Compare two finished runs: their folders as arguments.")
    ] = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    method: AsMethod = None,
    template: Template = None,
    option: Option = None,
    transparency: Transparent = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Score a model on your own questions. Resumes an interrupted run; `--compare A B` compares two."""
    _quiet()
    from foveate.evaluate.cli import open_model, show, show_difference

    console = Console()
    if against:
        from foveate.evaluate.compare import compare

        if len(data) != 2:
            raise FoveateError(f"--compare takes the folders of two runs, not {len(data)}")
        found = compare(Path(data[0]), Path(data[1]), out)
        _print_json(found) if as_json else show_difference(console, found)
        return
    if len(data) != 1 or out is None:
        raise FoveateError("give one file or folder of questions, and --out for the report")
    from foveate.data.shards import OnHub
    from foveate.evaluate.metrics import chosen
    from foveate.evaluate.run import evaluate as run
    from foveate.evaluate.samples import read_questions

    if subset is not None and split is None:
        raise FoveateError("--subset is for a data set on the hub: give its --split")
    first = limit if seed is None else None
    read = data[0] if split is None else OnHub(data[0], split, subset, first=first)
    questions = read_questions(read, images, limit, seed)
    metrics = chosen(metric or [], questions.samples)
    limits = _limits(max_pixels, False)
    given = {"method": method, "template": template, "options": _given(option)}
    answering = open_model(
        model,
        name=name,
        boxes=boxes,
        zoom=zoom,
        device=device,
        dtype=dtype,
        limits=limits,
        given=given,
        revision=revision,
        subfolder=subfolder,
    )
    report = run(
        answering,
        questions,
        metrics,
        out,
        limit=limit,
        seed=seed,
        batch=batch,
        max_new_tokens=max_new_tokens,
        strict=strict,
        limits=limits,
        transparency=transparency,
        console=None if as_json else Console(stderr=True),
    )
    _print_json(report) if as_json else show(console, report, out)


def main() -> None:
    """Entry point: wrong input ends with one sentence and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # terminals that lack a character
    try:
        try:
            app(prog_name="foveate")
        finally:
            sys.stdout.flush()
    except MOVED as error:
        add_version_note(error)
        raise
    except FoveateError as error:
        _print_error(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is not None:  # whatever file was opened, looked for or made
            _print_error(f"{error.filename}: {error.strerror}")
        elif error.errno == errno.ENOSPC:  # a stream has no name
            _print_error("the output cannot be written: the disk is full")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left unwritten would fail again at the end
        else:
            raise
        sys.exit(2)


def _print_error(sentence: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="red", end=" ")
    console.print(sentence.encode("utf-8", "backslashreplace").decode(), markup=False)


def _load(
    model: str | None,
    revision: str | None,
    subfolder: str,
    transparency: Literal["white", "bare"] | None,
    device: str | None,
    dtype: str | None,
    tower: str | None,
    method: str | None,
    template: str | None,
    option: list[str] | None,
    max_positions: int | None,
    quantize: Literal["8bit", "4bit"] | None = None,
) -> Foveate:
    _quiet()
    if model is None:
        Console(stderr=True, soft_wrap=True).print(EMBEDDED_NOTICE, style="dim")
    from foveate.ask.foveate import load

    return load(
        model,
        device=device,
        dtype=dtype,
        vision_tower=tower,
        method=method,
        template=template,
        options=_given(option),
        max_positions=max_positions,
        quantize=quantize,
        revision=revision,
        subfolder=subfolder,
        transparency=transparency,
    )


def _is_others(model: str | None, revision: str | None, subfolder: str) -> bool:
    """Whether a model is a VLM of transformers that Foveate does not read."""
    if model is None:
        return False
    from foveate.model.adapters import with_base
    from foveate.model.checkpoints import recognise
    from foveate.model.folders import Hub, read_json
    from foveate.zoom.vlm import is_vlm

    folder, _ = with_base(model, Hub(revision, subfolder))
    if not is_vlm(read_json(folder / "config.json").get("model_type")):
        return False
    try:
        recognise(folder)
    except FoveateError:
        return True
    return False


def _only_ours(given: dict[str, Any]) -> None:
    """Refuses options that other VLMs have not."""
    if names := [name for name, value in given.items() if value]:
        raise FoveateError(f"--{names[0]} is for models that Foveate reads, without --zoom: leave it out")


def _closely(
    zoom: Literal["answer", "relevance", "tool"] | None,
    limits: Limits,
    max_positions: int | None,
    model: str | None,
    revision: str | None,
    subfolder: str,
    device: str | None,
    dtype: str | None,
) -> Zoom:
    """Any VLM, ready to be asked with a closer look or without."""
    _quiet()
    from foveate.zoom.vlm import VLM
    from foveate.zoom.zoom import Zoom

    if model is None:
        Console(stderr=True, soft_wrap=True).print(EMBEDDED_NOTICE, style="dim")
    vlm = VLM.load(model, device, dtype, revision=revision, subfolder=subfolder)
    return Zoom(vlm.model, vlm.processor, zoom or "answer", max_positions=max_positions, limits=limits)


def _ask_closely(
    asked: Zoom,
    picture: Any,
    questions: list[str],
    no_zoom: bool,
    max_new_tokens: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Asks any VLM, prints its answers and draws them."""
    from foveate.ask.live import show_text

    console = Console()
    answers = [
        asked.ask(picture, question, no_zoom=no_zoom, max_new_tokens=max_new_tokens) for question in questions
    ]
    if as_json:
        values = [answer.to_dict() for answer in answers]
        _print_json(values[0] if len(values) == 1 else values)
    else:
        for answer in answers:
            _print_dim(console, answer.question)
            show_text(console, answer.text)
            looked = [f"looked closer at {list(box.rounded())}" for box in answer.regions]
            for line in (*looked, *answer.account.notes, f"confidence {answer.confidence:.2f}"):
                _print_dim(console, line)
    if out is not None:
        _draw(console, answers, out, as_json)


def _draw(console: Console, answers: Sequence[Any], out: Path, quiet: bool) -> None:
    """Draws each answer, to a file of its own if there are several."""
    for i, answer in enumerate(answers):
        drawing = out if len(answers) == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        answer.show(drawing)
        if not quiet:
            console.print(f"drawing written to {drawing}", style="dim", soft_wrap=True)


def _found(picture: str, limits: Limits) -> Any:
    """A picture's file, or what its URL gave, whose header has been read."""
    from foveate.picture.reading import fetched, read_size

    once = fetched(picture, limits)
    read_size(once, limits)
    return once


def _ready(picture: Any, limits: Limits, *loading: Any) -> tuple[Image.Image, Foveate]:
    """The picture, as the model is to see it, and the model."""
    from foveate.picture.reading import read_picture

    foveate = _load(*loading)
    return read_picture(picture, limits, foveate.processor.image_processor.transparency), foveate


def _limits(max_pixels: int | None, allow_private: bool) -> Limits:
    from foveate.picture.limits import LIMITS, Limits

    return Limits(max_pixels=max_pixels or LIMITS.max_pixels, private=allow_private)


def _given(option: list[str] | None) -> dict[str, Any]:
    from foveate.written import read_pairs

    return read_pairs(option)


def _lines_of(rows: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The lines of the table: a method's own, and those of its turns where it has several."""
    lines = []
    for row in rows.values():
        lines.append((row["title"], row))
        lines += [(f"  turn {i}", turn) for i, turn in enumerate(row.get("turns", []), 1)]
        lines += [("  read anew", row["read_anew"])] if "read_anew" in row else []
    return lines


def _shape(picture: str | None, size: str | None, limits: Limits) -> tuple[Size, str]:
    """A picture's size, of the picture or as written, and what the table's title calls it."""
    if picture is None:
        from foveate.choosing import size_of

        return size_of(size or "", limits), ""
    from foveate.picture.fetching import named
    from foveate.picture.reading import read_size

    return read_size(picture, limits), f"{escape(named(picture).rpartition('/')[2])}: "


def _kinds(names: list[str]) -> dict[str, type[Method]]:
    """Methods by name; all usable ones if none is named, with a sentence on each other one."""
    from foveate.methods import EVERY, method_class, usable_methods

    if names and EVERY not in names:
        return {name: method_class(name) for name in names}
    kinds, problems = usable_methods()
    for name in names:
        if name != EVERY:
            method_class(name)
    for problem in problems:
        Console(stderr=True, soft_wrap=True).print(problem, style="dim", markup=False)
    return kinds


def _seen_at(row: dict[str, Any]) -> str:
    width, height = row["effective_width"], row["effective_height"]
    return "not known" if width is None else f"{width} x {height}"


def _remarks(rows: dict[str, Any], refused: dict[str, str], size: Size) -> list[str]:
    """What the table cannot show, one sentence each."""
    sentences = []
    for row in rows.values():
        if row.get("over_budget"):
            turns = len(row.get("turns", ())) or 1
            whole = f" in its {turns} turns together; the bound holds for each picture" if turns > 1 else ""
            bound = row["max_visual_tokens"]
            sentences.append(f"* {row['title']}: more than max_visual_tokens {bound}{whole}")
        if "picture_tokens" in row:  # a VLM of transformers, which is one row
            sentences += _remarks_on_vlm(row, size)
    return sentences + [f"no row for {name}: {reason}" for name, reason in refused.items()]


def _remarks_on_vlm(row: dict[str, Any], size: Size) -> list[str]:
    sentences = [*row["notes"]]
    if row["part"] is not None:
        height, width = row["part"]
        sentences.insert(0, f"only a part of the picture is seen, about {width} x {height} of its pixels")
    if row["shrunk"]:
        share = row["effective_width"] * row["effective_height"] / (size.width * size.height)
        sentences.insert(0, f"the picture is shrunk to {_seen_at(row)}, {100 * share:.2g} % of its pixels")
    elif row["shrunk"] is False:
        sentences.insert(0, "the picture is not shrunk")
    if row["picture_tokens"] != row["visual_tokens"]:
        marks = row["picture_tokens"] - row["visual_tokens"]
        sentences.append(f"{marks} marks around the visual tokens are priced with them")
    return sentences


def _save(foveate: Foveate, folder: Path) -> None:
    foveate.model.save_pretrained(folder)
    foveate.processor.save_pretrained(folder)


def _quiet() -> None:
    """Keeps transformers' notices and progress bars out of the commands' output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _can_stream(foveate: Foveate) -> bool:
    """Whether answers appear while they are written: on a terminal, by models without beam search."""
    return sys.stdout.isatty() and foveate.model.generation_config.num_beams in (None, 1)


def _streamed(
    console: Console, foveate: Foveate, ask: Callable[..., Answer], question: str, max_new_tokens: int
) -> Answer:
    """Prints an answer while it is written, then the rest."""
    from foveate.ask.live import Live

    streamer = Live(foveate.processor.tokenizer, console)
    answer = ask(question, max_new_tokens=max_new_tokens, streamer=streamer)
    streamer.close(answer.text)
    _print_rest(console, answer)
    return answer


def _print_answer(console: Console, answer: Answer) -> None:
    from foveate.ask.live import show_text

    _print_dim(console, answer.question)
    show_text(console, answer.text)
    _print_rest(console, answer)


def _print_rest(console: Console, answer: Answer) -> None:
    """Where the model looked, notes and costs."""
    for line in (f"looked at {_places(answer)}", *answer.notes, _costs(answer)):
        _print_dim(console, line)


def _print_dim(console: Console, text: str) -> None:
    from foveate.ask.live import PLAIN

    console.print(text, style="dim", **PLAIN)


def _places(answer: Answer) -> str:
    """The regions; in words if nothing was chosen and all views together show the whole picture."""
    plan, regions = answer.plan, answer.regions
    size, tiles = plan.picture, plan.tiles.height * plan.tiles.width
    ends = (
        min(box.left for box in plan.regions),
        min(box.top for box in plan.regions),
        max(box.right for box in plan.regions),
        max(box.bottom for box in plan.regions),
    )
    if list(regions) != list(plan.regions) or ends != (0, 0, size.width, size.height):
        return "  ".join(str(list(box.rounded())) for box in regions)
    if tiles > 1:
        return f"the whole picture, in {tiles} tiles"
    return "the whole picture" if len(plan.views) == 1 else f"the whole picture, in {len(plan.views)} views"


def _costs(answer: Answer) -> str:
    ledger = answer.ledger
    return (
        f"{ledger.views} view{'' if ledger.views == 1 else 's'} ({ledger.encoded_views} encoded now), "
        f"{ledger.visual_tokens} visual tokens, "
        f"{ledger.prompt_tokens} prompt tokens, {ledger.new_tokens} new, {ledger.tflop:.3g} TFLOP, "
        f"KV {ledger.kv_megabytes:.3g} MB, {ledger.total_seconds:.2f} s"
    )
