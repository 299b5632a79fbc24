"""The composed backbone: a transformers text model over one interleaved sequence of text, picture and spectrogram tokens."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from datamodules.processors.composed import BEGIN, END, SOFT, place_id
from datamodules.processors.inputs import Inputs
from datamodules.sample import MEDIA_KINDS
from lightning_modules.encoder.packing import NAME, packed_arguments
from lightning_modules.encoder.towers import Tower, TowerConfig


@dataclass(frozen=True)
class ComposedConfig:
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


class ComposedBackbone(nn.Module):
    """Inputs to token states (T, H), every token seeing every other of its item.

    Args:
        config: What to build.
        load_pretrained: False builds a pretrained text model's shape with random weights, for weights that follow.
    """

    def __init__(self, config: ComposedConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        settings = settings_of(config)
        settings.is_causal = False
        if (
            getattr(settings, "use_bidirectional_attention", None) is True
        ):  # Gemma 3's own switch, whose window counts the token
            settings.use_bidirectional_attention = False
            settings.sliding_window -= 1
        if hasattr(settings, "use_cache"):
            settings.use_cache = False
        self.text: Any = transformers_model(config, settings, load_pretrained)
        if self.text.config._attn_implementation == "sdpa" and config.attention is None:
            self.text.set_attn_implementation(NAME)
        if getattr(self.text, "pooler", None) is not None:  # BERT's own, of whose vector no use is made
            self.text.pooler = None
        self.width: int = self.text.config.hidden_size
        self.routes = dict(config.routes)
        self.towers = nn.ModuleDict(
            {name: Tower(tower, self.width, load_pretrained=load_pretrained) for name, tower in config.towers.items()}
        )
        self.tokens = dict(config.tokens)
        for kind, name in self.routes.items():
            rows, columns = self.towers[name].map_size  # pyright: ignore[reportGeneralTypeIssues]
            if min(rows, columns) ** 2 < self.tokens[kind]:
                raise ValueError(
                    f"tower {name!r} makes a {rows} x {columns} map of a view; "
                    f"it cannot give {self.tokens[kind]} tokens to {kind}"
                )
        self.boundaries = nn.ParameterDict({kind: nn.Parameter(torch.randn(2, self.width) * 0.02) for kind in config.routes})

    @property
    def settings(self) -> dict[str, Any]:
        """The text model's configuration."""
        return self.text.config.to_dict()

    @property
    def attention(self) -> str:
        return self.text.config._attn_implementation

    @property
    def standalone(self) -> ComposedConfig:
        """The configuration with the fields of a pretrained text model instead of the place that it came from."""
        if self.config.pretrained is None:
            return self.config
        return dataclasses.replace(self.config, text=text_fields(self.text.config), pretrained=None, revision=None)

    @property
    def vocab_size(self) -> int:
        return self.text.get_input_embeddings().num_embeddings

    @property
    def layers(self) -> list[nn.Module]:
        """The text model's layers, in order; none where they are not one list."""
        number = self.text.config.num_hidden_layers
        lists = [inner for inner in self.text.modules() if isinstance(inner, nn.ModuleList) and len(inner) == number]
        return list(lists[0]) if lists else []

    @property
    def packs(self) -> bool:
        """Whether items can lie end to end; the probe proves it."""
        return self.text.config._attn_implementation == NAME

    def checkpoint_layers(self) -> None:
        """Keep only the inputs of the layers of text model and towers."""
        checkpoint_transformers(self.text)
        for tower in self.towers.children():
            tower.model.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def compile_text(self) -> None:
        self.text.compile(dynamic=True)

    def text_inputs(self, texts: list[Tensor]) -> Inputs:
        """Inputs of items of token ids."""
        return Inputs(torch.cat(texts), torch.tensor([len(text) for text in texts]))

    def forward(self, inputs: Inputs, *, packed: bool = False) -> Tensor:
        """Token states (T, H).

        Args:
            inputs: N items, end to end.
            packed: Run them as they lie, each seeing itself alone; else padded to the longest.

        Raises:
            ValueError: An item is longer than the text model's positions, or media do not fit; see `embed`.
        """
        longest = getattr(self.text.config, "max_position_embeddings", None)
        if longest is not None and inputs.lengths.max() > longest:
            raise ValueError(
                f"an item comes to {int(inputs.lengths.max())} tokens, the text model takes {longest}; "
                "lower data.processor.max_text_tokens or the number of views, or raise max_position_embeddings"
            )
        if packed:
            states_TH = self.embed(inputs.token_ids[None], inputs)[0]
            return self.text(**packed_arguments(self.text, states_TH, inputs.lengths)).last_hidden_state[0]
        token_ids, attention_mask, places = inputs.padded()
        out = self.text(inputs_embeds=self.embed(token_ids, inputs), attention_mask=attention_mask)
        return out.last_hidden_state.flatten(0, 1)[places]

    def embed(self, ids: Tensor, inputs: Inputs) -> Tensor:
        """The interleaved sequence before the text model (N, L, H) of ids (N, L) and the media of the same items.

        Raises:
            ValueError: A kind of media has no tower here, or a tower's tokens do not fill its places exactly.
        """
        states = self.text.get_input_embeddings()(ids.clamp(min=0))
        for kind, views in inputs.media.items():
            if kind not in self.routes:
                raise ValueError(
                    f"this encoder has no tower for {kind}; it takes text, code and {', '.join(self.routes) or 'nothing else'}"
                )
            tokens = self.towers[self.routes[kind]](views, self.tokens[kind]).flatten(0, 1)
            places = ids == place_id(kind, SOFT)
            if int(places.sum()) != len(tokens):
                raise ValueError(
                    f"the tower for {kind} makes {len(tokens)} tokens of {len(views)} views, "
                    f"the processor left {int(places.sum())} places; "
                    "make data.processor.tokens_per_view and backbone.tokens equal"
                )
            states = states.masked_scatter(places[..., None], tokens.to(states.dtype))
            for role, boundary in zip((BEGIN, END), self.boundaries[kind], strict=True):
                states = torch.where((ids == place_id(kind, role))[..., None], boundary.to(states.dtype), states)
        return states


def transformers_model(config: ComposedConfig, settings: Any, load_pretrained: bool) -> Any:
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
    """What `ComposedConfig.text` holds of a transformers configuration: all fields of its family, in JSON values.

    Fields that every family has (labels, outputs, dtype) and those that the family does not know are left out.
    """
    own = AutoConfig.for_model(config.model_type).to_dict().keys() - PreTrainedConfig().to_dict().keys()
    fields = {name: value for name, value in config.to_dict().items() if name in own}
    return json.loads(json.dumps({"model_type": config.model_type, **fields}))


def settings_of(config: ComposedConfig) -> Any:
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
