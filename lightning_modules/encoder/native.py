"""Native backbones: transformers' own multimodal models, their causal mask taken away."""

import dataclasses
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.processors.inputs import Inputs
from datamodules.processors.native import PICTURE, TEXT, NativeProcessor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.sample import MEDIA_KINDS
from lightning_modules.encoder.backbone import BackboneConfig, checkpoint_transformers, settings_of, transformers_model
from lightning_modules.encoder.composed import ComposedBackbone

PLACES = {"image": 1, "video": 2, "audio": 3}  # the types of places that Qwen's positions follow from


class WholeModel(nn.Module):
    """What backbones share that are one transformers model with all of its towers.

    Args:
        config: What to build.
        settings: The model's transformers configuration.
        text_name: Of the text model within it.
        load_pretrained: False builds a pretrained model's shape with random weights, for weights that follow.

    Raises:
        ValueError: The configuration has towers beside it, or the family has its text model elsewhere.
    """

    packs = False

    def __init__(self, config: BackboneConfig, settings: Any, text_name: str, *, load_pretrained: bool) -> None:
        super().__init__()
        if config.towers or config.routes:
            raise ValueError(f"{settings.model_type} takes media itself; leave out backbone.towers and backbone.routes")
        self.config = config
        self.model: Any = transformers_model(config, settings, load_pretrained)
        self.text_name = text_name
        if not hasattr(self.model, text_name):
            raise ValueError(
                f"{settings.model_type} is no family whose media are known here; README's table names those that are"
            )

    @property
    def text(self) -> Any:
        return getattr(self.model, self.text_name)

    @property
    def settings(self) -> dict[str, Any]:
        """The model's configuration."""
        return self.model.config.to_dict()

    @property
    def standalone(self) -> BackboneConfig:
        """The configuration with all of the model's own in it."""
        return dataclasses.replace(self.config, text=self.settings, pretrained=None, revision=None)

    @property
    def attention(self) -> str:
        return self.model.config.get_text_config()._attn_implementation

    @property
    def vocab_size(self) -> int:
        return self.text.get_input_embeddings().num_embeddings

    @property
    def layers(self) -> list[nn.Module]:
        """The text model's layers, in order."""
        return list(getattr(self.text, "encoder", self.text).layers)

    def checkpoint_layers(self) -> None:
        checkpoint_transformers(self.model)

    def compile_text(self) -> None:
        self.text.compile(dynamic=True)


class NativeBackbone(WholeModel):
    """Inputs to token states (T, H), every token seeing every other of its item.

    The causal mask is switched off in the configuration of the text model inside, where every family looks for it; what would
    make the families' sliding windows lopsided then (`token_type_ids`) is left away. Vision towers see all of a picture
    anyway; audio towers keep the windows they were made with.

    Args:
        config: What to build.
        settings: The model's transformers configuration.
        load_pretrained: False builds a pretrained model's shape with random weights, for weights that follow.
    """

    def __init__(self, config: BackboneConfig, settings: Any, *, load_pretrained: bool) -> None:
        text = settings.get_text_config()
        text.is_causal = False
        if getattr(text, "use_bidirectional_attention", None) == "vision":
            text.use_bidirectional_attention = None
        super().__init__(config, settings, "language_model", load_pretrained=load_pretrained)
        self.width: int = getattr(text, "embedding_dim", None) or text.hidden_size
        found = {kind: _place_id(settings, kind) for kind in PLACES}
        self.places = {kind: place for kind, place in found.items() if place is not None}
        arguments = inspect.signature(self.model.forward).parameters
        self.takes_types = "mm_token_type_ids" in arguments and settings.model_type.startswith("qwen")
        if (unused := getattr(getattr(self.model, "audio_tower", None), "audio_bos_eos_token", None)) is not None:
            unused.requires_grad_(False)  # Qwen2.5-Omni has it and never looks at it
        self.fixed = {"use_cache": False} if settings.model_type != "embedding_gemma2" else {}

    def text_inputs(self, texts: list[Tensor]) -> Inputs:
        """Inputs of items of token ids, moved past those that stand for media."""
        ids = torch.cat(texts)
        for place in sorted(self.places.values()):
            ids = ids + (ids >= place)
        return Inputs(ids % self.vocab_size, torch.tensor([len(text) for text in texts]))

    def forward(self, inputs: Inputs, *, packed: bool = False) -> Tensor:
        """Token states (T, H).

        Raises:
            ValueError: An item is longer than the model's positions, or the model refuses what the processor made.
        """
        assert not packed, "native models take padded items"
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and inputs.lengths.max() > longest:
            raise ValueError(
                f"an item comes to {int(inputs.lengths.max())} tokens, the model takes {longest}; "
                "lower data.processor.max_text_tokens, or the frames or pages of data.processor.decode"
            )
        ids, attention_mask, places = inputs.padded()
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask, **inputs.media, **self.fixed}
        if self.takes_types and inputs.media:
            batch["mm_token_type_ids"] = sum(PLACES[kind] * (ids == place) for kind, place in self.places.items())
        try:
            out = self.model(**batch)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the model refuses what its processor made: {reason}; take both from the same checkpoint"
            ) from error
        return out.last_hidden_state.flatten(0, 1)[places]


def _place_id(settings: Any, kind: str) -> int | None:
    """The token id that stands for a piece of a medium; families spell its name in two ways."""
    found = (getattr(settings, f"{kind}_token_{suffix}", None) for suffix in ("id", "index"))
    return next((place for place in found if place is not None), None)


class DualBackbone(WholeModel):
    """One vector for each part of an item, by the text or the vision tower of a SigLIP (late fusion: a baseline).

    Args:
        config: What to build.
        settings: The model's transformers configuration.
        load_pretrained: As of `NativeBackbone`.
    """

    def __init__(self, config: BackboneConfig, settings: Any, *, load_pretrained: bool) -> None:
        super().__init__(config, settings, "text_model", load_pretrained=load_pretrained)
        self.width: int = settings.text_config.projection_size or settings.text_config.hidden_size
        self.length: int = settings.text_config.max_position_embeddings
        for unused in (self.model.logit_scale, self.model.logit_bias):
            unused.requires_grad_(False)

    def text_inputs(self, texts: list[Tensor]) -> Inputs:
        """Inputs of items of token ids, padded as the text tower is used to."""
        rows = torch.ones(len(texts), self.length, dtype=torch.int64)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = ids
        one = torch.ones(len(texts), dtype=torch.int64)
        return Inputs(-one, one, {"input_ids": rows}, {"input_ids": one})

    def forward(self, inputs: Inputs, *, packed: bool = False) -> Tensor:
        """States (T, H) of the parts, of which `token_ids` says whether each is a text or a picture."""
        assert not packed, "dual towers have nothing to pack"
        pictures = {name: views for name, views in inputs.media.items() if name != "input_ids"}
        states = torch.zeros(len(inputs.token_ids), self.width, device=inputs.token_ids.device)
        if "input_ids" in inputs.media:
            found = self.model.get_text_features(inputs.media["input_ids"]).pooler_output
            states = states.index_put(((inputs.token_ids == TEXT).nonzero()[:, 0],), F.normalize(found.float(), dim=-1))
        if pictures:
            found = self.model.get_image_features(**pictures).pooler_output
            states = states.index_put(((inputs.token_ids == PICTURE).nonzero()[:, 0],), F.normalize(found.float(), dim=-1))
        return states


def require_its_inputs(backbone: ComposedBackbone | WholeModel, processor: ProcessorConfig) -> None:
    """Refuse a new processor that makes inputs which a backbone does not know, or whose token ids mean nothing to it.

    Raises:
        ValueError: A model that takes media itself is without its own processor, or another has one; or the tokenizer of a
            pretrained text model is to be trained anew.
    """
    pretrained = backbone.config.pretrained
    if isinstance(backbone, WholeModel) != (processor.native is not None):
        wanted = (
            f"set it to {pretrained or 'the folder of a model of its family'}" if processor.native is None else "leave it out"
        )
        raise ValueError(
            f"data.processor.native is {processor.native}, but the backbone is a {type(backbone).__name__}; {wanted}"
        )
    if pretrained is not None and processor.native is None and processor.tokenizer is None:
        raise ValueError(
            f"the text model comes from {pretrained}, and a new tokenizer's ids would mean other words to it; "
            f"set data.processor.tokenizer={pretrained}"
        )


def media_of(backbone: ComposedBackbone | WholeModel, processor: Processor) -> tuple[str, ...]:
    """The kinds of media that an encoder takes beside text and code."""
    if isinstance(processor, NativeProcessor):
        return tuple(processor.kinds)
    if isinstance(backbone, DualBackbone):
        return tuple(kind for kind in MEDIA_KINDS if kind != "audio")
    routes: Any = backbone.routes
    return tuple(routes)


def build_backbone(config: BackboneConfig, *, load_pretrained: bool = True) -> ComposedBackbone | NativeBackbone | DualBackbone:
    """The backbone that a configuration asks for: composed around a text model, or a model that takes media itself."""
    settings = settings_of(config)
    settings = getattr(settings, "thinker_config", settings)  # without what generates sound in Qwen's Omni models
    if getattr(settings, "text_config", None) is None:
        return ComposedBackbone(config, load_pretrained=load_pretrained)
    kind = DualBackbone if settings.model_type.startswith("siglip") else NativeBackbone
    return kind(config, settings, load_pretrained=load_pretrained)
