"""The composed backbone: a transformers text model over one interleaved sequence of text, picture and spectrogram tokens."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.processors.composed import BEGIN, END, SOFT, place_id
from datamodules.processors.inputs import Inputs
from lightning_modules.encoder.backbone import (
    BackboneConfig,
    checkpoint_transformers,
    settings_of,
    text_fields,
    transformers_model,
)
from lightning_modules.encoder.packing import NAME, packed_arguments
from lightning_modules.encoder.towers import Tower


class ComposedBackbone(nn.Module):
    """Inputs to token states (T, H), every token seeing every other of its item.

    Args:
        config: What to build.
        load_pretrained: False builds a pretrained text model's shape with random weights, for weights that follow.
    """

    def __init__(self, config: BackboneConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        settings = settings_of(config)
        settings.is_causal = False
        if getattr(settings, "use_bidirectional_attention", None) is True:
            settings.use_bidirectional_attention = False  # Gemma 3's own switch, whose window counts the token itself
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
    def standalone(self) -> BackboneConfig:
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
            states_TH = self.embed(inputs.token_ids[None], inputs).squeeze(0)
            return self.text(**packed_arguments(self.text, states_TH, inputs.lengths)).last_hidden_state.squeeze(0)
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
