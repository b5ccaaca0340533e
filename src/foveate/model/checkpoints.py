"""Reading model folders, Foveate's own and other people's, without unpickling any code."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

from foveate.errors import FoveateError, first_line, one_sentence, report_keys
from foveate.methods import method_class, usable_methods
from foveate.methods.layouts import Json, Layout, convert_key
from foveate.model.adapters import with_base
from foveate.model.folders import HERE, Hub, local_folder, read_json, shown
from foveate.model.foreign import check_config, check_parts
from foveate.model.text import load_tokenizer

ORIGINAL_MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
ORIGINAL_TEMPLATES = {"llama": "vicuna_v1", "mistral": "mistral"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # indices of shards
LLAMA3_VOCABULARY = 128256  # its model_type is that of Llama 2


@dataclass
class Released:
    """A checkpoint folder of a known layout, not read yet."""

    folder: Path
    config: Json
    layout: Layout
    method: str
    vision_tower: Path | None = None  # the tower's folder, if another
    preprocessor: Json = field(default_factory=dict)

    @property
    def template(self) -> str | None:
        """Name of the chat template that such checkpoints were trained with; None if unknown."""
        if self.layout.template is not None or self.layout.family == "hf":
            return self.layout.template
        if self.config.get("vocab_size") == LLAMA3_VOCABULARY:
            return "llama3"
        return ORIGINAL_TEMPLATES.get(_original_text_type(self.config), "vicuna_v1")


def read_preprocessor(folder: Path) -> Json:
    """A folder's picture preprocessing, from either file where transformers saves it; or {}."""
    own = read_json(folder / "processor_config.json").get("image_processor", {})
    return own or read_json(folder / "preprocessor_config.json")


def recognise(
    folder: Path, vision_tower: str | Path | None = None, method: str | None = None, hub: Hub = HERE
) -> Released | None:
    """The released layout of a folder; None if it is Foveate's own. Raises `FoveateError` if unknown.

    With `method`, only that method's layouts count. `hub` says how the tower is looked for.
    """
    config = read_json(folder / "config.json")
    check_parts(config, str(folder / "config.json"))
    if config.get("model_type") == "foveate":
        if vision_tower is not None:
            raise FoveateError(f"{folder} has its own vision tower: leave out the one given")
        return None
    released = _layout_of(folder, config, method)
    released.vision_tower = _tower_folder(released, vision_tower, hub)
    released.preprocessor = read_preprocessor(folder)
    if not released.preprocessor and released.vision_tower:
        released.preprocessor = read_preprocessor(released.vision_tower)
    return released


def _layout_of(folder: Path, config: Json, named: str | None = None) -> Released:
    problems: list[str] = []
    if named is None:
        kinds, problems = usable_methods()
    else:
        kinds = {named: method_class(named)}
    layouts = [
        (method, layout)
        for method, kind in kinds.items()
        for layout in kind.layouts
        if named is not None or not layout.only_named
    ]
    alike = [
        (method, layout)
        for method, layout in sorted(layouts, key=lambda pair: pair[1].told_by is None)
        if _family(config) == layout.family and layout.recognises(config)
    ]
    for method, layout in alike:
        if _told(folder, layout):
            check_config(layout, config, str(folder / "config.json"))
            return Released(folder, config, layout, method)
    if alike:
        names = ", ".join(f"{layout.name} (none matches {layout.told_by})" for _, layout in alike)
        raise FoveateError(f"{folder}: its config.json is that of {names}, but the weights' keys are not")
    known = [layout.name for _, layout in layouts] or [f"{named} has none"]
    raise FoveateError(
        f"{folder}: a config.json with model_type {config.get('model_type')!r} and architectures "
        f"{config.get('architectures')} is not of a layout known here ({', '.join(known)})"
        + "".join(f"; {problem}" for problem in problems)
    )


def _told(folder: Path, layout: Layout) -> bool:
    """Whether the weights' keys fit this layout's `told_by`."""
    pattern = layout.told_by
    return pattern is None or any(re.search(pattern, key) for key in _weight_keys(folder, layout))


def _weight_keys(folder: Path, layout: Layout) -> Iterable[str]:
    """Keys of a folder's weights, or of its connector's; none if it has no weights."""
    from safetensors import safe_open

    places = weight_map(folder)
    if places:
        return places
    for name in (*WEIGHTS, *layout.connector_files):
        path = folder / name
        if path.is_file() and path.suffix == ".safetensors":
            _check_header(path)
            with safe_open(path, "np") as file:
                return list(file.keys())
        if path.is_file():
            return read_files(folder, [name])
    return ()


def _family(config: Json) -> str | None:
    if "vision_config" in config:
        return "hf"
    return "original" if "mm_vision_tower" in config else None


def _tower_folder(released: Released, given: str | Path | None, hub: Hub) -> Path | None:
    if given is not None:
        return local_folder(given, hub.parts())
    if released.layout.family == "hf":
        return None
    named = released.config["mm_vision_tower"]
    if not isinstance(named, str) or not named:
        raise FoveateError(
            f"{released.folder / 'config.json'}: mm_vision_tower should name the vision tower, not {named!r}"
        )
    return local_folder(named, hub.parts())


def _original_text_type(config: Json) -> str:
    model_type = config.get("model_type")
    if model_type not in ORIGINAL_MODEL_TYPES:
        known = ", ".join(ORIGINAL_MODEL_TYPES)
        raise FoveateError(
            f"no LLM is known here for model_type {model_type!r} of LLaVA's own code, only for {known}"
        )
    return ORIGINAL_MODEL_TYPES[model_type]


def convert_config(released: Released) -> Any:
    """The `FoveateConfig` of a released checkpoint."""
    config, where = released.config, f"{released.folder}: its config.json or preprocessor cannot be read"
    with one_sentence(where):
        return _converted(released, config)


def _converted(released: Released, config: Json) -> Any:
    from transformers import CONFIG_MAPPING

    from foveate.model.config import FoveateConfig

    options = released.layout.options(config, released.preprocessor)
    if released.layout.family == "hf":
        return FoveateConfig(
            vision_config=config["vision_config"],
            text_config=config["text_config"],
            method=released.method,
            options=options,
            vision_feature_layer=config.get("vision_feature_layer", -2),
            image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
        )
    text = {
        k: v
        for k, v in config.items()
        if not k.startswith("mm_") and k not in ("model_type", "architectures")
    }
    text_config = CONFIG_MAPPING[_original_text_type(config)].from_dict(text)
    image_token_id = _image_token_id(released.folder, text_config.vocab_size)
    text_config.vocab_size = max(text_config.vocab_size, image_token_id + 1)
    assert released.vision_tower is not None
    return FoveateConfig(
        vision_config=vision_config_of(released.vision_tower),
        text_config=text_config,
        method=released.method,
        options=options,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        image_token_id=image_token_id,
        separator_token_id=config.get(released.layout.separator or ""),
    )


def read_config(
    name: str | Path,
    vision_tower: str | Path | None = None,
    method: str | None = None,
    hub: Hub = HERE,
) -> Any:
    """The `FoveateConfig` of a model folder or hub id of any known layout, without its weights."""
    folder, _ = with_base(name, hub)
    released = recognise(folder, vision_tower, method, hub)
    return own_config(folder, method) if released is None else convert_config(released)


def own_config(folder: Path, method: str | None = None) -> Any:
    """The `FoveateConfig` of one of Foveate's own folders. Raises `FoveateError` that names the file.

    With a `method` other than its own, the options that both have are kept.
    """
    from foveate.model.config import FoveateConfig

    path = folder / "config.json"
    given = read_json(path)
    kinds = {"vision_config": dict, "text_config": dict, "method": str, "options": dict}
    for key, kind in {**kinds, "vision_feature_layer": int, "image_token_id": int}.items():
        if not isinstance(given.get(key), kind):
            raise FoveateError(f"{path}: {key!r} is missing or has a wrong type")
    try:
        method_class(given["method"] if method is None else method)
        with one_sentence(str(path)):
            config = FoveateConfig.from_pretrained(folder)
    except FoveateError as error:
        named = str(error).startswith(str(path))
        raise FoveateError(str(error) if named else f"{path}: {error}") from error
    if not 0 <= config.image_token_id < config.text_config.vocab_size:
        raise FoveateError(f"{path}: 'image_token_id' lies outside the LLM's vocabulary")
    if method not in (None, config.method):
        known = {f.name for f in fields(method_class(method).Options)}
        config.method, config.options = method, {k: v for k, v in config.options.items() if k in known}
    return config


def _image_token_id(folder: Path, vocab_size: int) -> int:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return vocab_size
    return load_tokenizer(folder)[1]


def config_of(folder: Path) -> Any:
    """A folder's configuration, of a class that transformers has. Raises `FoveateError` with its name."""
    from transformers import AutoConfig

    check_parts(read_json(folder / "config.json"), str(folder / "config.json"))
    try:
        with one_sentence(f"{folder}: its config.json cannot be read"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except FoveateError as error:
        if "auto_map" in read_json(folder / "config.json"):
            raise FoveateError(
                f"{folder} is a model of its own Python code, which is not run: choose one that transformers "
                "has a class for"
            ) from error
        raise


def vision_config_of(folder: Path) -> Any:
    """The vision part of a tower's folder: a vision model's own config, or that of a CLIP-like pair."""
    config = config_of(folder)
    return config.vision_config if "vision_config" in config.sub_configs else config


def weight_map(folder: Path) -> dict[str, str]:
    """Key -> file of a folder's shards; empty if it has no index of them.

    Raises `FoveateError` for an index that is malformed, or that names a file outside the folder; the hub's
    cache, whose files are links to its own `blobs`, counts as inside.
    """
    path = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if path is None:
        return {}
    places = read_json(path).get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(name, str) for name in places.values())):
        raise FoveateError(f"{path}: weight_map should say for each tensor which file holds it")
    inside = (folder.resolve(), folder.absolute().parent.parent.resolve() / "blobs")
    for name in set(places.values()):
        if not name.isprintable() or not 0 < len(name) < 256:
            raise FoveateError(f"{path}: weight_map names {shown(repr(name))}, which is no file")
        if not any((folder / name).resolve().is_relative_to(place) for place in inside):
            raise FoveateError(f"{path}: weight_map names {name!r}, which lies outside the folder")
    return places


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a folder's weights. Raises `FoveateError` if one is missing or cut."""
    names = sorted(set(weight_map(folder).values()))
    if not names:
        names = [n for n in WEIGHTS if (folder / n).is_file()][:1]
    if not names:
        raise FoveateError(
            f"{folder} holds no weights: no model.safetensors, pytorch_model.bin or index of shards"
        )
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FoveateError(f"{path} is missing, though the index of shards names it")
        if path.suffix == ".safetensors":
            _check_header(path)
    return names


def _check_header(path: Path) -> None:
    """Raises `FoveateError` unless a safetensors file is complete. Reads no tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise FoveateError(f"{path} is broken: {error}") from error


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a folder's safetensors or .bin shards, memory-mapped. Never unpickles code."""
    return read_files(folder, weight_files(folder))


def read_files(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if path.suffix == ".safetensors":
            _check_header(path)
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                mmap = is_zipfile(path)  # files from old versions of torch are not zip files
                tensors |= torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except UnpicklingError as error:
            raise FoveateError(f"{path} is broken or holds more than tensors, and was not read") from error
        except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError) as error:
            raise FoveateError(f"{path} is broken: {first_line(error)}") from error
    return tensors


def released_tensors(released: Released, config: Any, expected: Iterable[str]) -> dict[str, Any]:
    """All weights of a released checkpoint under Foveate's keys, including a tower that is kept apart.

    Raises `FoveateError` that names unexpected keys; missing ones are found when the model loads the weights.
    """
    tensors = read_tensors(released.folder)
    if released.vision_tower and not any(key.startswith("model.vision_tower.") for key in tensors):
        tensors |= {
            f"model.vision_tower.vision_tower.{key}": tensor
            for key, tensor in read_tensors(released.vision_tower).items()
            if not key.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale"))
        }
    return _renamed(tensors, released.layout, expected, config, released.folder)


def _renamed(
    tensors: Mapping[str, Any], layout: Layout, expected: Iterable[str], config: Any, folder: Path
) -> dict[str, Any]:
    """Tensors under Foveate's keys. Raises `FoveateError` that names those that have no place."""
    expected = set(expected)
    unused = unused_keys(config, expected)
    renamed = {}
    unexpected = []
    for key, tensor in tensors.items():
        new = convert_key(layout, key)
        if new in expected:
            renamed[new] = tensor
        elif new is not None and new not in unused and not any(re.search(p, new) for p in layout.optional):
            unexpected.append(key)
    report_keys(folder, (), unexpected)
    return renamed


@dataclass
class StageFiles:
    """The files of a stage in which only the connector trained: no LLM, no tower."""

    released: Released
    options: Json
    tensors: dict[str, Any]  # under the authors' keys
    complete: bool  # whether all files of such stages are present

    @property
    def separator(self) -> int | None:
        return self.released.config.get(self.released.layout.separator or "")


def stage_files(name: str | Path, hub: Hub = HERE) -> StageFiles:
    """Reads a folder with config.json and a layout's connector files, such as mm_projector.bin.

    Raises `FoveateError` if none of them is present or one is broken.
    """
    folder = local_folder(name, hub)
    config = read_json(folder / "config.json")
    released = _layout_of(folder, config)
    files = released.layout.connector_files
    found = [file for file in files if (folder / file).is_file()]
    if not found:
        raise FoveateError(f"{folder} has none of the files {', '.join(files) or 'of a connector'}")
    options = released.layout.options(config, read_preprocessor(folder))
    return StageFiles(released, options, read_files(folder, found), len(found) == len(files))


def fill_connector(model: Any, stage: StageFiles) -> None:
    """Loads a stage's weights into a model's connector, and into the parts of its tower that the stage has.

    Other parts of the tower are unchanged; so are parts of the connector if one of the stage's files is
    missing.

    Raises `FoveateError` that names unexpected keys, and missing keys of a part.
    """
    folder = stage.released.folder
    whole = model.state_dict()
    state = {key: tensor for key, tensor in whole.items() if not key.startswith("language_model.")}
    given = _renamed(stage.tensors, stage.released.layout, state, model.config, folder)
    parts = {_part(key) for key in given}
    needed = {_part(key) for key in state if key.startswith("connector.") and stage.complete} | parts
    missing = [key for key in state if _part(key) in needed and key not in given]
    report_keys(folder, missing, (), [key for key in given if given[key].shape != state[key].shape])
    model.load_state_dict(given, strict=False)


def _part(key: str) -> str:
    """The child of the connector or tower that a key belongs to."""
    return ".".join(key.split(".")[:2])


def unused_keys(config: Any, expected: Collection[str]) -> set[str]:
    """Keys of the tower's layers after the selected one, given those of the model."""
    return _tower_keys(config.vision_config).difference(expected)


def _tower_keys(vision_config: Any) -> set[str]:
    """Keys of a whole vision tower, with all its layers."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return {
            f"vision_tower.model.{key}"
            for key in AutoModel.from_config(vision_config, trust_remote_code=False).state_dict()
        }


def read_template(folder: Path) -> str | None:
    """A released folder's own chat template."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with one_sentence(f"the chat template {file} cannot be read"):
            return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several named ones, as older tokenizers save them
            named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[0].get("template") if named else None
        if isinstance(template, str):
            return template
    return None
