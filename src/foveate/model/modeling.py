"""FoveateModel and FoveateForConditionalGeneration: the one place where visual tokens enter the LLM.

Both have a vision tower, a method's connector and an LLM; the second one's LLM has its head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
from transformers.utils import can_return_tuple

from foveate import upstream
from foveate.errors import FoveateError, one_sentence, report_keys
from foveate.layers import name_of
from foveate.methods import method_class
from foveate.methods.base import Connector, Injector, Method, Query, TowerGeometry, Widths
from foveate.model import checkpoints
from foveate.model.adapters import Adapter, merge, with_base
from foveate.model.card import write_card
from foveate.model.config import FoveateConfig
from foveate.model.folders import Hub, hub_id
from foveate.model.positions import LastPosition, check_lengths, positions_of
from foveate.model.quantising import only_the_llm, quantisation, refuse_quantised
from foveate.model.queries import read_carried
from foveate.model.sharing import Shared
from foveate.options import merged
from foveate.picture.account import Account
from foveate.picture.geometry import ViewPlan
from foveate.picture.source import Source
from foveate.versions import names_versions


@dataclass
class EncodedPictures(ModelOutput):
    """Pictures as the LLM reads them: returned by `get_image_features`, passed in `mm_encoder_outputs`.

    Attributes:
        pooler_output: per picture (n, D) visual tokens, one for each of its placeholders.
        kept: per picture (n,) bool, False for tokens that the LLM must not see; None: it sees all.
        injection: what the method's injectors read in the LLM's layers.
        accounts: per picture where the method looked; None if it sees all of its views.
        pictures: their number; `generate` repeats `pooler_output` for beams and several answers.
    """

    pooler_output: list[Tensor]  # the name that `generate` looks for
    kept: list[Tensor] | None = None
    injection: Any = None
    accounts: list[Account] | None = None
    pictures: int | None = None


@dataclass
class FoveateModelOutput(BaseModelOutputWithPast):
    """The decoder's last states (B, T, D), its cache and optional states of its layers."""


@dataclass
class FoveateOutput(CausalLMOutputWithPast):
    """Loss (with labels), logits (B, T, vocabulary) and the LLM's cache and optional states."""


@dataclass
class _Injection:
    """Passed as a keyword argument through the decoder's layers to the hooks on some of them."""

    content: Any
    visual: Tensor  # (B, T) bool
    copies: int  # each row is repeated this many times in the batch, for beams and several answers
    done: set[int]


class FoveatePreTrainedModel(Shared, PreTrainedModel):
    """What the model has with and without its head: its parts, and the way from pictures into the LLM.

    `pixel_values` (V, 3, h, w) holds all views of the batch, picture after picture; `image_sizes` (P, 2) the
    original heights and widths, from which the plans follow. `input_ids` has one `config.image_token_id` for
    each visual token. All three come from `FoveateProcessor`.
    """

    config_class = FoveateConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [upstream.CACHE]  # noqa: RUF012

    method: Method
    vision_tower: nn.Module
    connector: Connector
    language_model: PreTrainedModel

    def _assemble(self) -> None:
        """Builds the parts, and lets the connector's injectors change the states after their layers."""
        config = self.config
        self.method = method_class(config.method)(TowerGeometry.of(config.vision_config), config.options)
        self.vision_tower = self.method.build_tower(config.vision_config, config.vision_feature_layer)
        text = config.text_config
        self.connector = self.method.build_connector(
            Widths(config.vision_config.hidden_size, text.hidden_size, text.num_hidden_layers)
        )
        self.language_model = self._new_llm(AutoModelForCausalLM.from_config(text, trust_remote_code=False))
        self.post_init()
        injectors = self.connector.injectors()
        if injectors:
            layers = upstream.decoder_layers(self.get_decoder())
            if layers is None:
                name = type(self.language_model).__name__
                raise FoveateError(f"{name}: its decoder's layers cannot be found to change them")
            if _hands_on_keywords(self.language_model, layers) is False:
                raise self._no_keywords()
            for index in injectors:
                layers[index].register_forward_hook(partial(self._inject, index), with_kwargs=True)

    def _new_llm(self, causal: PreTrainedModel) -> PreTrainedModel:
        """The part of an LLM that this class has."""
        return causal

    @classmethod
    @names_versions
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        vision_tower: str | Path | None = None,
        method: str | None = None,
        options: dict[str, Any] | None = None,
        max_positions: int | None = None,
        quantize: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads Foveate's own folders, and released ones of every known layout.

        Args:
            pretrained_model_name_or_path: folder or hub id, also of a LoRA adapter, which is merged into the
                model that it was trained on.
            vision_tower: folder of the tower, for original checkpoints that keep it apart; by default the one
                that their config.json names.
            method: another method with the same parameters as the folder's own.
            options: changes to the method's options.
            max_positions: the longest text in tokens, for an LLM that reads beyond its own positions.
            quantize: `8bit` or `4bit`: the LLM's linear layers in fewer bits; tower, connector and head stay.
                So they do with a `quantization_config` of bitsandbytes that leaves nothing out itself.
            **kwargs: as for any `PreTrainedModel`, with `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only` and `force_download`; the last four also for a tower that is kept apart.

        Raises:
            FoveateError: unknown layout, missing or unexpected keys, no weights, no such revision.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        hub, folder, adapter = _place(pretrained_model_name_or_path, kwargs)
        released = checkpoints.recognise(folder, vision_tower, method, hub)
        with_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported below, by name
        given: FoveateConfig | None = kwargs.pop("config", None)
        if quantize is not None:
            kwargs["quantization_config"] = quantisation(quantize, kwargs.get("dtype"))
        if released is None:
            config = given or checkpoints.own_config(folder, method)
            _change(config, options, max_positions)
            checkpoints.weight_files(folder)
            cls._spare_parts(folder, config, kwargs)
            with one_sentence(f"the model in {folder} cannot be loaded"):
                renaming, spare = cls._names(config)
                model, info = super().from_pretrained(
                    folder, *args, config=config, key_mapping=renaming, **kwargs
                )
        else:
            config = given or checkpoints.convert_config(released)
            _change(config, options, max_positions)
            cls._spare_parts(folder, config, kwargs)
            with one_sentence(f"the model in {folder} cannot be loaded"), torch.device("meta"):
                skeleton = FoveateForConditionalGeneration(config)
            state = checkpoints.released_tensors(released, config, skeleton.state_dict())
            for key in skeleton.embedding_keys() & state.keys():
                state[key] = _grown(state[key], config.text_config.vocab_size)
            renaming, spare = cls._names(config)
            with one_sentence(f"the model in {folder} cannot be loaded"):
                model, info = super().from_pretrained(
                    None, *args, config=config, state_dict=state, key_mapping=renaming, **kwargs
                )
            if (folder / "generation_config.json").is_file():  # mainly for the tokens that end an answer
                with one_sentence(f"{folder / 'generation_config.json'} cannot be read"):
                    model.generation_config = GenerationConfig.from_pretrained(folder)
        upstream.keep_packing(model)
        model.config.note_sources(model=hub_id(folder))
        if released is not None and released.vision_tower is not None:
            model.config.note_sources(vision_tower=hub_id(released.vision_tower))
        mismatched = [key for key, *_ in info["mismatched_keys"]]
        unexpected = [key for key in info["unexpected_keys"] if spare is None or not spare.match(key)]
        report_keys(folder, info["missing_keys"], unexpected, mismatched)
        if adapter is not None:
            layout = None if released is None else released.layout
            unused = set() if layout is None else checkpoints.unused_keys(config, model.state_dict())
            model = merge(model, adapter, checkpoints.read_files, layout, unused)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with a card. Raises `FoveateError` for a quantised model."""
        refuse_quantised(self, "saving")
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _spare_parts(cls, folder: Path, config: FoveateConfig, arguments: dict[str, Any]) -> None:
        """Leaves tower, connector and head out of what a `quantization_config` quantises, in place."""
        if arguments.get("quantization_config") is not None:
            with one_sentence(f"the model in {folder} cannot be loaded"), torch.device("meta"):
                skeleton = cls(config)
            arguments["quantization_config"] = only_the_llm(arguments["quantization_config"], skeleton)

    @classmethod
    def _names(cls, config: FoveateConfig) -> tuple[dict[str, str] | None, re.Pattern[str] | None]:
        """What this class names otherwise than a saved folder of the whole model, and what it lacks.

        Returns:
            regular expression on the folder's names -> this class's name; and one on those without a place.
        """
        return None, None

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: every part initialises itself."""

    def plans(self, image_sizes: Tensor | Sequence[Sequence[int]]) -> list[ViewPlan]:
        """The plans of pictures of these sizes, (P, 2) heights and widths."""
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        return [self.method.plan(height, width) for height, width in sizes]

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """All views of the batch in one call, (V, 3, h, w) -> (V, N, C)."""
        return self.vision_tower(pixel_values)

    def connect(
        self,
        features: Tensor,
        image_sizes: Tensor,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        source: Source | None = None,
        owners: Sequence[int] | None = None,
    ) -> EncodedPictures:
        """Vision features (V, N, C) -> visual tokens per picture; with `owners`, per question.

        Args:
            features: of all views, picture after picture.
            image_sizes: (P, 2) original heights and widths.
            query_ids: (P, T) the question of each picture, for methods that read it.
            query_mask: (P, T).
            source: the original pictures, for methods that look at them.
            owners: the picture of each question, if there are Q questions instead of P: (Q, T) above.

        Raises:
            FoveateError: sizes that do not agree, or no `source` for a method that needs one.
        """
        plans = self.plans(image_sizes)
        views = sum(len(plan.views) for plan in plans)
        if views != len(features):
            raise FoveateError(f"image_sizes call for {views} views, pixel_values hold {len(features)}")
        query = None
        if owners is not None and not (self.connector.shares_pictures and self.method.uses_query):
            picture_views = features.split([len(plan.views) for plan in plans])
            features, plans = torch.cat([picture_views[p] for p in owners]), [plans[p] for p in owners]
            source, owners = None if source is None else source.repeated(owners), None
        answers = len(plans) if owners is None else len(owners)
        if self.method.uses_query and query_ids is not None and query_mask is not None:
            if len(query_ids) != answers:
                raise FoveateError(f"query_ids hold {len(query_ids)} questions for {answers} pictures")
            embeds = self.get_input_embeddings()(query_ids)
            query = Query(embeds, query_mask, None if owners is None else tuple(owners))
        if not self.method.reads_source:
            visual = self.connector(features, plans, query)
        elif source is None or len(source.pictures) != len(plans):
            found = 0 if source is None else len(source.pictures)
            raise FoveateError(
                f"{self.method.title} looks at the original pictures: give source_pixels and source_norms as "
                f"FoveateProcessor makes them, for {len(plans)} pictures, not {found}"
            )
        else:
            visual = self.connector(features, plans, query, source)
        if visual.separators is not None:
            separator = self._separator().to(visual.tokens)
            visual.tokens = torch.where(visual.separators[:, None], separator, visual.tokens)
        counts = [plans[p].tokens for p in (range(len(plans)) if owners is None else owners)]
        return EncodedPictures(
            pooler_output=list(visual.tokens.split(counts)),
            kept=None if visual.kept is None else list(visual.kept.split(counts)),
            injection=visual.injection,
            accounts=visual.accounts,
            pictures=answers,
        )

    def _separator(self) -> Tensor:
        """The LLM's embedding of the separator token, (1, D)."""
        token = self.config.separator_token_id
        if token is None or not 0 <= token < self.config.text_config.vocab_size:
            raise FoveateError(f"config.json: separator_token_id {token} is not a token of the LLM")
        return self.get_input_embeddings()(torch.tensor([token], device=self.device))

    # `generate` passes arguments with the names of these parameters here and not to `forward`: none may share
    # its name with an argument of the LLM.
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        source_pixels: Tensor | None = None,
        source_norms: Tensor | None = None,
        **kwargs: Any,
    ) -> EncodedPictures:
        """Pictures -> visual tokens: `encode_views`, then `connect`. Arguments as in `forward`."""
        source = None
        if source_pixels is not None and source_norms is not None:
            source = Source.unpacked(source_pixels, image_sizes, source_norms, self.encode_views)
        return self.connect(self.encode_views(pixel_values), image_sizes, query_ids, query_mask, source)

    @property
    def positions(self) -> int | None:
        """The longest text that the LLM is given, in tokens; None for any."""
        return positions_of(self.config)

    def _encoded(
        self,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        source_pixels: Tensor | None = None,
        source_norms: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> EncodedPictures | None:
        """The pictures of a batch, with the questions to them; None if it has none."""
        if pixel_values is None or not len(pixel_values):
            return None
        if image_sizes is None:
            raise FoveateError("pixel_values need image_sizes, the pictures' original heights and widths")
        if self.method.uses_query and query_ids is None:
            if mm_token_type_ids is None:
                raise FoveateError(
                    f"{self.method.title} reads the question to each picture: give query_ids and query_mask "
                    "as FoveateProcessor makes them"
                )
            counts = [plan.tokens for plan in self.plans(image_sizes)]
            query_ids, query_mask = read_carried(mm_token_type_ids, counts)
        return self.get_image_features(
            pixel_values, image_sizes, query_ids, query_mask, source_pixels, source_norms
        )

    def _llm_inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        pictures: EncodedPictures | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments for the LLM, with visual tokens in place of their placeholders."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pictures is not None:
            visual = self._placeholders(input_ids, inputs_embeds)  # (B, T)
            tokens = torch.cat(pictures.pooler_output).to(inputs_embeds)  # (sum of n, D)
            if int(visual.sum()) != len(tokens):
                raise FoveateError(f"{int(visual.sum())} image placeholders for {len(tokens)} visual tokens")
            inputs_embeds = inputs_embeds.masked_scatter(visual[..., None], tokens)
            if pictures.kept is not None:
                attention_mask = _without_dropped(attention_mask, visual, pictures.kept)
                if position_ids is None:  # positions skip dropped tokens, as if they had never been there
                    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
            if pictures.injection is not None:
                copies = len(pictures.pooler_output) // (pictures.pictures or len(pictures.pooler_output))
                kwargs["injection"] = _Injection(pictures.injection, visual, copies, set())
        elif self.training:
            inputs_embeds = inputs_embeds + self._in_step_with_other_ranks()
        cache = upstream.given_cache(kwargs)
        if cache is None or not cache.get_seq_length():
            self._check_length(input_ids, inputs_embeds.shape[1], attention_mask, position_ids)
        elif self.positions is not None and position_ids is not None:  # of rows that have ended
            position_ids = position_ids.clamp(max=self.positions - 1)
        return {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }

    def _check_length(
        self,
        input_ids: Tensor | None,
        width: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        """Raises `FoveateError` for texts (B, T) that the LLM has no positions for."""
        if self.positions is None or width <= self.positions:
            return
        # Columns may be padding, or hold several texts: only now is it worth waiting for the device.
        lengths, visual = torch.tensor([width]), None
        if position_ids is not None:
            lengths = position_ids.max()[None] + 1
        elif attention_mask is not None and attention_mask.dim() == 2:
            lengths = attention_mask.sum(1)
            if input_ids is not None:
                visual = input_ids == self.config.image_token_id
        check_lengths(lengths, self.positions, visual)

    def _check_injected(self, inputs: Mapping[str, Any]) -> None:
        """Raises `FoveateError` if the LLM has not handed its layers what to inject."""
        if "injection" in inputs and inputs["injection"].done != set(self.connector.injectors()):
            raise self._no_keywords()

    def _no_keywords(self) -> FoveateError:
        return FoveateError(f"{type(self.language_model).__name__} gives its layers no keyword arguments")

    def _inject(self, index: int, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Forward hook of decoder layer `index`. Looks up its injector anew: PEFT may have replaced it."""
        injection = kwargs.get("injection")
        if injection is None:  # decoding, or a text-only batch
            return None
        injection.done.add(index)
        injector: Injector = self.connector.injectors()[index]
        n = injection.copies
        injected = [injector(output[i::n], injection.content, injection.visual[i::n]) for i in range(n)]
        return torch.stack(injected, 1).flatten(0, 1)  # n x (B, T, D) -> (B n, T, D), a row's copies adjacent

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(B, T) bool. Without ids, placeholders are recognised by their embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _in_step_with_other_ranks(self) -> Tensor | float:
        """Zero, with a gradient path to what trains: ranks without pictures must not stall the others."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_world_size() == 1:
            return 0.0
        if not any(p.requires_grad for m in (self.vision_tower, self.connector) for p in m.parameters()):
            return 0.0
        size = torch.tensor([[self.method.tower.image_size] * 2])
        views = [view.size for view in self.plans(size)[0].views]
        blank = torch.zeros(len(views), 3, *views[0], device=self.device, dtype=self.dtype)
        source = {}
        if self.method.reads_source:
            pixels = torch.zeros(3 * int(size.prod()), dtype=torch.uint8, device=self.device)
            source = {"source_pixels": pixels, "source_norms": torch.ones(1, 2, 3, device=self.device)}
        visual = torch.cat(self.get_image_features(blank, size, **source).pooler_output)
        trained = [p.sum() for p in self.connector.parameters() if p.requires_grad]  # including injectors
        return 0.0 * (visual.sum() + sum(trained))


class FoveateModel(FoveatePreTrainedModel):
    """Vision tower, a method's connector, and an LLM without its head.

    Args:
        config: of both.
        whole: a model whose parts this one shares; by default it has its own.
    """

    base_model_prefix = ""

    @names_versions
    def __init__(self, config: FoveateConfig, whole: FoveateForConditionalGeneration | None = None) -> None:
        super().__init__(config)
        if whole is None:
            self._assemble()
        else:
            self.share(whole)
            self.post_init()

    def share(self, whole: FoveateForConditionalGeneration) -> None:
        """Takes the parts of a whole model, as they are now."""
        self.method, self.vision_tower, self.connector = whole.method, whole.vision_tower, whole.connector
        self.language_model = whole.get_decoder()
        self.training = whole.training

    @classmethod
    @names_versions
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads any folder that `FoveateForConditionalGeneration` does, and its own. Arguments as there."""
        name = pretrained_model_name_or_path
        if name is None or _place(name, dict(kwargs))[-1] is None:
            return super().from_pretrained(name, *args, **kwargs)
        made = FoveateForConditionalGeneration.from_pretrained(name, *args, **kwargs)  # the adapter knows it
        return (made[0].model, made[1]) if isinstance(made, tuple) else made.model

    @classmethod
    def _names(cls, config: FoveateConfig) -> tuple[dict[str, str] | None, re.Pattern[str] | None]:
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        decoder = causal.get_decoder()
        children = "|".join(name for name, _ in decoder.named_children())
        return (
            {rf"^language_model\.{re.escape(name_of(causal, decoder))}\.": "language_model."},
            re.compile(rf"^language_model\.(?!({children})\.)"),
        )

    def _new_llm(self, causal: PreTrainedModel) -> PreTrainedModel:
        return causal.get_decoder()

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @names_versions
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        source_pixels: Tensor | None = None,
        source_norms: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, EncodedPictures] | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> FoveateModelOutput:
        """The last states of the LLM. Arguments and errors as `FoveateForConditionalGeneration.forward`."""
        pictures = (mm_encoder_outputs or {}).get("image")
        if pictures is None:
            rest = (query_ids, query_mask, source_pixels, source_norms, mm_token_type_ids)
            pictures = self._encoded(pixel_values, image_sizes, *rest)
        inputs = self._llm_inputs(input_ids, inputs_embeds, attention_mask, position_ids, pictures, kwargs)
        outputs = self.language_model(**inputs)
        self._check_injected(inputs)
        return FoveateModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{upstream.CACHE: outputs.get(upstream.CACHE)},
        )


class FoveateForConditionalGeneration(FoveatePreTrainedModel, GenerationMixin):
    """Vision tower, a method's connector, and a causal LM."""

    base_model_prefix = "model"

    @names_versions
    def __init__(self, config: FoveateConfig) -> None:
        super().__init__(config)
        self._assemble()
        # Not a child: its parameters have one name each, which saved folders, recipes and adapters know.
        object.__setattr__(self, "_headless", FoveateModel(config, self))

    @property
    def model(self) -> FoveateModel:
        """The model without its head, of the same parts: what is changed or trained in one is in both."""
        self._headless.share(self)
        return self._headless

    def _complete(self, folder: Path) -> None:
        if (folder / "config.json").is_file():  # it is missing where an adapter is saved alone
            write_card(folder, self)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def stop_at(self, token: int | None) -> None:
        """Makes `generate` also stop at the token that ends an answer; None changes nothing."""
        known = self.generation_config.eos_token_id
        ends = [known] if isinstance(known, int) else list(known or [])
        if token is not None and token not in ends:
            self.generation_config.eos_token_id = [*ends, token]

    def embedding_keys(self) -> set[str]:
        """Names of the parameters with one row per token of the vocabulary."""
        tables = [self.get_input_embeddings().weight, self.get_output_embeddings().weight]
        return {key for key, p in self.named_parameters() if any(p is table for table in tables)}

    @names_versions
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        source_pixels: Tensor | None = None,
        source_norms: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, EncodedPictures] | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> FoveateOutput:
        """One pass through the LLM, with visual tokens in place of their placeholders.

        Args:
            input_ids: (B, T).
            pixel_values: (V, 3, h, w), views of all pictures; alternatively give `mm_encoder_outputs`.
            image_sizes: (P, 2) original heights and widths.
            query_ids: (P, Tq) question of each picture, for methods that read it.
            query_mask: (P, Tq).
            source_pixels: (n,) bytes, the original pictures (H, W, 3) in order, for methods that look
                at them.
            source_norms: (P, 2, 3) mean and standard deviation with which their pixels are normalised.
            labels: (B, T), -100 for tokens without loss.
            mm_encoder_outputs: {"image": EncodedPictures} if the pictures are already encoded.
            mm_token_type_ids: (B, T), from which the questions are read if there are no `query_ids`.
            **kwargs: for the LLM, including its cache.

        Raises:
            FoveateError: placeholders and visual tokens differ in number; a text that is longer than the LLM
                has positions.
        """
        pictures = (mm_encoder_outputs or {}).get("image")
        if pictures is None:
            rest = (query_ids, query_mask, source_pixels, source_norms, mm_token_type_ids)
            pictures = self._encoded(pixel_values, image_sizes, *rest)
        inputs = self._llm_inputs(input_ids, inputs_embeds, attention_mask, position_ids, pictures, kwargs)
        outputs = self.language_model(logits_to_keep=logits_to_keep, **inputs)
        self._check_injected(inputs)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return FoveateOutput(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{upstream.CACHE: outputs.get(upstream.CACHE)},
        )

    @names_versions
    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; tokens that the connector drops leave the sequence before the prefill.

        The output still starts with the whole prompt, so that callers can cut it off by its length. An
        answer ends at the LLM's last position.

        Raises `FoveateError` for a prompt that leaves no position for an answer.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        names = ("pixel_values", "image_sizes", "query_ids", "query_mask", "source_pixels", "source_norms")
        given = {name: kwargs.pop(name, None) for name in (*names, "mm_token_type_ids")}
        encoded = self._encoded(**given)
        if encoded is not None:
            kwargs["mm_encoder_outputs"] = {"image": encoded}
        pictures: EncodedPictures | None = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if pictures is None:
            ids, cache = kwargs.get("input_ids"), upstream.given_cache(kwargs)
            read = 0 if cache is None else cache.get_seq_length()
            if ids is not None and bool((ids[:, read:] == self.config.image_token_id).any()):
                raise FoveateError("input_ids have image placeholders, but there are no pixel_values")
            return self._write(kwargs)
        if pictures.injection is not None:
            self._refuse_chunks(kwargs)
        image = EncodedPictures(**pictures)  # a copy: transformers repeats tokens in place for beams
        kwargs["mm_encoder_outputs"] = {"image": image}
        if pictures.kept is None:
            return self._write(kwargs)
        if kwargs.get("input_ids") is None:
            raise FoveateError("generate needs input_ids, not only inputs_embeds, to drop visual tokens")
        prompt = kwargs["input_ids"]
        visual = prompt == self.config.image_token_id
        mask = _without_dropped(kwargs.get("attention_mask"), visual, pictures.kept)
        padding = int(self.config.image_token_id == 0)  # any token that is not a placeholder
        short, mask = _compacted(prompt, mask, padding)
        image.pooler_output = [
            tokens[keep] for tokens, keep in zip(pictures.pooler_output, pictures.kept, strict=True)
        ]
        image.kept = None
        kwargs |= {"input_ids": short, "attention_mask": mask}
        self._count_dropped(kwargs, prompt.shape[1] - short.shape[1])
        output = self._write(kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        copies = len(sequences) // len(prompt)
        whole = torch.cat([prompt.repeat_interleave(copies, 0), sequences[:, short.shape[1] :]], dim=1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def _write(self, kwargs: Mapping[str, Any]) -> Any:
        """`generate` of transformers, for prompts that fit the LLM's positions, up to the last of them."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = embeds[..., 0] if ids is None and embeds is not None else ids  # (B, T)
        if self.positions is None or tokens is None:
            return super().generate(**kwargs)
        mask = kwargs.get("attention_mask")
        seen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        visual = None if ids is None else (ids == self.config.image_token_id) & seen
        lengths = seen.sum(1)
        check_lengths(lengths, self.positions, visual, answer=1)
        width = 0 if ids is None else ids.shape[1]  # without ids, those of the answer come alone
        end = LastPosition(lengths, width, self.positions)
        criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), end])
        return super().generate(**{**kwargs, "stopping_criteria": criteria})

    def _count_dropped(self, kwargs: dict[str, Any], dropped: int) -> None:
        """Lowers bounds on the whole sequence, in place, by the tokens that left it: the output has them."""
        given = kwargs.get("generation_config")
        settings = copy.deepcopy(given or self.generation_config)
        for name in ("max_length", "min_length"):
            bound = kwargs.get(name, settings.to_dict().get(name))
            if not bound:
                continue
            lower = max(bound - dropped, 0)
            if name in kwargs or given is None:
                kwargs[name] = lower
            else:
                setattr(settings, name, lower)
                kwargs["generation_config"] = settings

    def _refuse_chunks(self, kwargs: Mapping[str, Any]) -> None:
        """Raises `FoveateError` if the prefill would be split: transformers then keeps only the tokens."""
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size", settings.prefill_chunk_size):
            raise FoveateError(
                f"prefill_chunk_size: {self.method.title} changes hidden states during the prefill, which "
                "must run in one piece"
            )


def _place(name: str | Path, arguments: dict[str, Any]) -> tuple[Hub, Path, Adapter | None]:
    """Where a model is, and its adapter; takes what says so out of the arguments of a `from_pretrained`."""
    hub = Hub.taken(arguments)
    beside = arguments.pop("adapter_kwargs", None) or {}
    if "_adapter_model_path" in beside:  # the Auto classes hand on the base, and the adapter beside it
        name, hub = beside["_adapter_model_path"], replace(hub, revision=beside.get("revision"))
    return hub, *with_base(name, hub)


def _change(config: FoveateConfig, options: dict[str, Any] | None, max_positions: int | None) -> None:
    """What a caller wants otherwise than the folder's own configuration."""
    config.options = merged(method_class(config.method).Options, config.options, options)
    if max_positions is not None:
        config.max_positions = max_positions
        config.check()


class _Reached(Exception):
    """Ends `_hands_on_keywords` at the first layer."""


@torch.no_grad()
def _hands_on_keywords(language_model: PreTrainedModel, layers: nn.ModuleList) -> bool | None:
    """Whether keyword arguments of an LLM reach its layers, as injection needs; None if unknown.

    Runs it up to its first layer, which takes almost no time.
    """
    given: list[bool] = []

    def end(layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        given.append("injection" in kwargs)
        raise _Reached

    weight, training = language_model.get_input_embeddings().weight, language_model.training
    blank = torch.zeros(1, 4, language_model.config.hidden_size, device=weight.device, dtype=weight.dtype)
    hook = layers[0].register_forward_pre_hook(end, with_kwargs=True)
    try:
        language_model.eval()(inputs_embeds=blank, injection=None)  # no dropout: no random numbers are drawn
    except _Reached:
        pass
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # it does not run without values, or partially; the first forward pass will show
    finally:
        hook.remove()
        language_model.train(training)
    return any(given)


def _without_dropped(attention_mask: Tensor | None, visual: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The attention mask (B, T) with dropped visual tokens masked out, equivalent to removing them."""
    mask = torch.ones_like(visual, dtype=torch.long) if attention_mask is None else attention_mask
    return mask.masked_scatter(visual, torch.cat(list(kept)).to(mask))


def _compacted(input_ids: Tensor, mask: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Removes masked positions and pads the rows on the left to one length, (B, T) -> (B, longest)."""
    length = int(mask.sum(1).max())
    order = mask.long().argsort(dim=1, stable=True)[:, -length:]  # masked positions first, the rest in order
    short = mask.gather(1, order)
    return input_ids.gather(1, order).masked_fill(short == 0, padding), short


def _grown(tensor: Tensor, rows: int) -> Tensor:
    """An embedding or head with rows added for new tokens, each the mean of the others."""
    if len(tensor) >= rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
