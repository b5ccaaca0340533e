"""A model's card, README.md in its folder: what is known about it, and how to load it.

A card that somebody has changed is kept: its last line has a hash of the text above it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.files import write
from foveate.model.folders import hub_id
from foveate.picture.geometry import Size

CARD = "README.md"
LICENCE = (
    "## Licence\n\nNot filled in yet. The licences of the parts and of the data apply: name it here, and as "
    "`license` at the top."
)
MODEL_CODE = """With transformers alone, where the package foveate is installed:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
```"""
ADAPTER_CODE = """With peft, which keeps the adapter apart from its base:

```python
from foveate import FoveateForConditionalGeneration
from peft import PeftConfig, PeftModel

name = PeftConfig.from_pretrained(".").base_model_name_or_path
base = FoveateForConditionalGeneration.from_pretrained(name)
model = PeftModel.from_pretrained(base, ".")
```"""
IN_HERE = " In this folder:"
HERE = "."  # how the commands of a card name a model that has no place yet
SIZES = (Size(336, 336), Size(768, 1024), Size(3000, 4000))
END = re.compile(r"<!-- written by Foveate, which keeps it once it is changed: ([0-9a-f]{64}) -->\s*\Z")


def unchanged(text: str) -> bool:
    """Whether a card is as `card` made it."""
    end = END.search(text)
    return end is not None and _hash(text[: end.start()]) == end[1]


def write_card(folder: Path, model: Any) -> None:
    """Writes a model's card into its folder, unless there is one that is somebody's own."""
    if not is_own(folder):
        write(folder / CARD, card(model))


def is_own(folder: Path) -> bool:
    """Whether a folder has a card that somebody wrote or changed."""
    path = folder / CARD
    return path.is_file() and not unchanged(path.read_text(encoding="utf-8", errors="replace"))


def named(text: str, name: str, tags: Collection[str] = ()) -> str:
    """An unchanged card whose commands name the model by its hub id instead of its folder; and more tags."""
    from huggingface_hub import ModelCard

    text = text.replace(IN_HERE, "")
    for before in ("--model {}", '("{}"', ', "{}")'):
        text = text.replace(before.format(HERE), before.format(name))
    made = ModelCard(text, ignore_metadata_errors=False)
    made.data["tags"] = list(dict.fromkeys([*made.data["tags"], *tags]))
    if name in made.data.get("base_model", ()):  # an earlier state of itself
        made.data.pop("base_model")
    return _ended(str(made)[: END.search(str(made)).start()])  # type: ignore[union-attr]


def card(model: Any) -> str:
    """The card of a `FoveateForConditionalGeneration`."""
    config, method = model.config, model.method
    sources = dict(config.made_from or {})
    base = [sources["model"]] if "model" in sources else sorted(set(sources.values()))
    sections = [
        _metadata("transformers", config.method, base, "custom_code"),
        f"# A model that sees by {method.title}\n\n{method.title} ({method.paper}): {method.idea}. The model "
        "is one of Foveate, which lets multimodal LLMs see fine detail in pictures.",
        f"## Parts\n\n{_parts(model, sources)}",
        f"## Options of {method.title}\n\n{_options(method.describe_options())}",
        f"## Pictures\n\n{_pictures(method)}",
        f"## Training\n\n{_training(config.trained or [])}",
        f"## Use\n\n{_use(MODEL_CODE)}",
        LICENCE,
    ]
    return _ended("\n\n".join(sections) + "\n\n")


def adapter_card(
    model: Any, base: str, rank: int, alpha: float, on: Collection[str], whole: Collection[str]
) -> str:
    """The card of a LoRA adapter.

    Args:
        model: its base, with what trained it in its configuration.
        base: folder or hub id of the base.
        rank, alpha: of the adapter.
        on: modules whose linear layers have adapters.
        whole: modules that are replaced as a whole.
    """
    method, source = model.method, hub_id(base)
    replaced = f" Trained and kept as a whole: {_listed(whole)}." if whole else ""
    sections = [
        _metadata("peft", model.config.method, [source] if source else [], "lora"),
        f"# A LoRA adapter for a model that sees by {method.title}\n\nAn adapter of rank {rank} and alpha "
        f"{alpha:g} on the linear layers of {_listed(on)}.{replaced} Its base"
        + (f" is {source}." if source else " is named in `adapter_config.json`."),
        f"## Training\n\n{_training(model.config.trained or [])}",
        f"## Use\n\n{_use(ADAPTER_CODE)}",
        LICENCE,
    ]
    return _ended("\n\n".join(sections) + "\n\n")


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _metadata(library: str, method: str, base: list[str], *tags: str) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base or None,
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=["foveate", method, *tags],
    )
    return f"---\n{data.to_yaml()}\n---"


def _parts(model: Any, sources: dict[str, str]) -> str:
    config = model.config
    vision, text = config.vision_config, config.text_config
    rows = {
        "vision_tower": f"`{vision.model_type}`, width {vision.hidden_size}, views of "
        f"{model.method.tower.image_size} pixels a side",
        "connector": f"of {model.method.title}",
        "language_model": f"`{text.model_type}`, {text.num_hidden_layers} layers of width "
        f"{text.hidden_size}, {text.vocab_size} tokens",
    }
    lines = ["| Part | Parameters | What it is | From |", "| --- | ---: | --- | --- |"]
    for part, what in rows.items():
        count = sum(p.numel() for p in model.get_submodule(part).parameters())
        source = sources.get(part, sources.get("model", ""))
        lines.append(f"| `{part}` | {count:,} | {what} | {source} |")
    return "\n".join(lines)


def _options(options: dict[str, Any]) -> str:
    lines = ["| Option | Value |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{key}` | `{json.dumps(value)}` |" for key, value in options.items())])


def _pictures(method: Any) -> str:
    lines = ["| Picture, width x height | Views | Visual tokens |", "| --- | ---: | ---: |"]
    for size in SIZES:
        with suppress(FoveateError):  # a bound on tokens that is too low for this size
            plans = [method.plan(turn.height, turn.width) for turn in method.turn_sizes(size)]
            views, tokens = sum(len(plan.views) for plan in plans), sum(plan.tokens for plan in plans)
            lines.append(f"| {size.width} x {size.height} | {views} | {tokens} |")
    return "\n".join(lines)


def _training(trained: list[dict[str, Any]]) -> str:
    if not trained:
        return "Foveate has not trained this model with a recipe."
    lines = [
        "By Foveate's recipes. Hashes are SHA-256: of `recipe.yaml` in the run's folder, of the data's text.",
        "",
        "| Stage | Recipe | Data |",
        "| --- | --- | --- |",
    ]
    for run in trained:
        data = ", ".join(f"{file} `{digest[:16]}`" for file, digest in run["data"].items())
        lines.append(f"| {run['stage']} | `{run['recipe'][:16]}` | {data} |")
    return "\n".join(lines)


def _use(more: str) -> str:
    return f"""Install the package foveate first.{IN_HERE}

```bash
foveate ask picture.jpg "What is in the picture?" --model {HERE}
```

```python
import foveate

model = foveate.load("{HERE}")
print(model.ask("picture.jpg", "What is in the picture?").text)
```

{more}"""


def _ended(text: str) -> str:
    return f"{text}<!-- written by Foveate, which keeps it once it is changed: {_hash(text)} -->\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
