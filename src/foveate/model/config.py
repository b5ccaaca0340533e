"""FoveateConfig: a vision tower, a causal LM, and the method that connects them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from foveate.errors import FoveateError
from foveate.methods import DEFAULT
from foveate.model.sharing import MODELS, Installed, auto_map, write_code


class FoveateConfig(Installed, PreTrainedConfig):
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
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # a folder's own word on whose code runs
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.options = dict(self.options or {})
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.check()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the file that `auto_map` names."""
        write_code(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

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


def _sub_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    from transformers import CONFIG_MAPPING

    config = dict(config or {})
    kind = config.pop("model_type", default)
    if kind not in CONFIG_MAPPING:
        raise FoveateError(f"transformers knows no model_type {kind!r}")
    return CONFIG_MAPPING[kind](**config)
