"""What every backbone is made from: its configuration, and the transformers model that this names."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from datamodules.sample import MEDIA_KINDS
from lightning_modules.encoder.towers import TowerConfig


@dataclass(frozen=True)
class BackboneConfig:
    """A text model and the towers beside it, or a model that takes media itself and needs none.

    Args:
        text: `model_type` and further fields of a transformers configuration, for random weights.
        pretrained: Folder or hub name of a pretrained model (safetensors), instead of `text`.
        revision: Of the hub repository.
        towers: Name to tower.
        routes: Kind of media (image, page, audio, video) to the name of its tower; kinds left out are refused at run time.
        tokens: Kind of media to the tokens of one of its views, a square number.
        attention: transformers' attention implementation; None leaves the choice to it.
        dtype: Of the transformers model's weights.
    """

    text: dict[str, Any] | None = None
    pretrained: str | None = None
    revision: str | None = None
    towers: dict[str, TowerConfig] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEDIA_KINDS, 16))
    attention: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.text is None) == (self.pretrained is None):
            raise ValueError(
                "a backbone needs either `text` (a configuration) or `pretrained` (a model), not both and not none"
            )
        for kind, tower in self.routes.items():
            if kind not in MEDIA_KINDS or tower not in self.towers:
                raise ValueError(
                    f"route {kind}: {tower} leads nowhere; kinds: {', '.join(MEDIA_KINDS)}; "
                    f"towers: {', '.join(self.towers) or 'none'}"
                )
            if self.tokens.get(kind, 0) < 1 or round(self.tokens[kind] ** 0.5) ** 2 != self.tokens[kind]:
                raise ValueError(
                    f"tokens of {kind} are {self.tokens.get(kind)}; they must be a square number (1, 4, 9, 16, ..)"
                )


def transformers_model(config: BackboneConfig, settings: Any, load_pretrained: bool) -> Any:
    """The transformers model of a configuration.

    Raises:
        ValueError: transformers cannot build it, or finds no safetensors with it.
    """
    arguments: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "trust_remote_code": False}
    if config.attention is not None:
        arguments["attn_implementation"] = config.attention
    try:
        if config.pretrained is None or not load_pretrained:
            return AutoModel.from_config(settings, **arguments)
        pretrained = AutoModel.from_pretrained(
            config.pretrained, revision=config.revision, config=settings, use_safetensors=True, **arguments
        )
        return pretrained.train()  # transformers gives it without its dropout, which a new one has
    except Exception as error:  # whatever a family's constructor makes of sizes that do not fit
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot build backbone.text {config.pretrained or config.text}: {reason}") from error


def checkpoint_transformers(model: Any) -> None:
    """Have a transformers model keep only the inputs of its layers, and run them again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its older name
    enable({"use_reentrant": False})


def text_fields(config: Any) -> dict[str, Any]:
    """What `BackboneConfig.text` holds of a transformers configuration: all fields of its family, in JSON values.

    Fields that every family has (labels, outputs, dtype) and those that the family does not know are left out.
    """
    own = AutoConfig.for_model(config.model_type).to_dict().keys() - PreTrainedConfig().to_dict().keys()
    fields = {name: value for name, value in config.to_dict().items() if name in own}
    return json.loads(json.dumps({"model_type": config.model_type, **fields}))


def settings_of(config: BackboneConfig) -> Any:
    """The transformers configuration of the model.

    Raises:
        ValueError: transformers does not know the family, a field of it, or finds no configuration.
    """
    if config.pretrained is not None:
        try:
            return AutoConfig.from_pretrained(config.pretrained, revision=config.revision, trust_remote_code=False)
        except Exception as error:  # of the hub, of the file, of the family
            raise ValueError(
                f"no model can be read from {config.pretrained!r} ({' '.join(str(error).split())[:300]}); "
                "make backbone.pretrained a folder with its config.json and safetensors, or its name on the hub"
            ) from error
    fields = dict(config.text or {})
    family = fields.pop("model_type", None)
    if family is None:
        raise ValueError("backbone.text needs `model_type`, the transformers name of the family (qwen3, gemma3_text, bert, ..)")
    try:
        known = AutoConfig.for_model(family)
        typed = set() if "transformers_version" in fields else fields.keys()  # transformers writes more than it knows
        unknown = sorted(typed - known.to_dict().keys() - known.attribute_map.keys())
        if not unknown:
            return AutoConfig.for_model(family, **fields)
    except Exception as error:  # an unknown family, or a value of the wrong type
        raise ValueError(f"backbone.text is {config.text}: {' '.join(str(error).split())[:300]}") from error
    raise ValueError(f"backbone.text has no {', '.join(unknown)}; a {family} has {', '.join(sorted(known.to_dict()))}")
