"""FoveateConfig: a vision tower, a causal LM, and the method that connects them."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from foveate.errors import FoveateError
from foveate.methods import DEFAULT
from foveate.model.sharing import MODELS, Shared, auto_map


class FoveateConfig(Shared, PreTrainedConfig):
    """Configuration of a `FoveateForConditionalGeneration`.

    Args:
        vision_config: configuration of any Hugging Face vision tower, or its dictionary.
        text_config: configuration of any Hugging Face causal LM, or its dictionary.
        method: the name of a method.
        options: the method's own options; unknown ones are an error.
        vision_feature_layer: hidden state of the tower that is used, counted as in transformers
            (-1: the last layer's output, -2: the one before; never the final norm).
        image_token_id: id of the placeholder that appears once per visual token in `input_ids`.
        separator_token_id: id of an LLM token, a comma, whose embedding some methods put between groups of
            visual tokens.
        max_positions: the longest text that the LLM is given, in tokens, if it reads beyond the number of
            positions that its own configuration names.
        made_from: ids on the Hugging Face hub of what it was made of: `model`, or `vision_tower` and
            `language_model`, as far as they are known. For its card.
        trained: what `foveate train` did to it, oldest first: of each stage `stage`, its name, `recipe`, the
            recipe's hash, and `data`, the hash of every file by its name. For its card.
    """

    model_type = "foveate"
    # AutoConfig would be the right class, but importing it imports all of transformers.models.
    sub_configs = {"vision_config": PreTrainedConfig, "text_config": PreTrainedConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    method: str = DEFAULT
    options: Any = None
    vision_feature_layer: int = -2
    image_token_id: int = 32000
    separator_token_id: int | None = None
    max_positions: int | None = None
    made_from: Any = None
    trained: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # a folder's own word on whose code runs
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.options = dict(self.options or {})
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.check()
        super().__post_init__(**kwargs)

    def note_sources(self, **ids: str | None) -> None:
        """Adds to `made_from` what is known."""
        known = {part: name for part, name in ids.items() if name is not None}
        if known:
            self.made_from = {**(self.made_from or {}), **known}

    @property
    def auto_map(self) -> dict[str, str]:
        """Auto class -> our class; what a folder says is not read."""
        return auto_map(MODELS)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {**super().to_diff_dict(), "auto_map": self.auto_map}

    def check(self) -> None:
        """Raises `FoveateError` for values that can mean nothing."""
        if self.max_positions is not None and self.max_positions < 1:
            raise FoveateError(f"max_positions must be at least 1, not {self.max_positions}")
        if not (self.made_from is None or _texts(self.made_from)):
            raise FoveateError("made_from should name hub ids by part")
        runs = [] if self.trained is None else self.trained
        if not (isinstance(runs, list) and all(isinstance(run, dict) and _is_run(run) for run in runs)):
            raise FoveateError("trained should be a list of stages, each with stage, recipe and data")


def _sub_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    from transformers import CONFIG_MAPPING

    config = dict(config or {})
    kind = config.pop("model_type", default)
    if kind not in CONFIG_MAPPING:
        raise FoveateError(f"transformers knows no model_type {kind!r}")
    return CONFIG_MAPPING[kind](**config)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for pair in value.items() for one in pair)


def _is_run(run: dict[Any, Any]) -> bool:
    names = _texts({key: run.get(key) for key in ("stage", "recipe")})
    return names and _texts(run.get("data"))
