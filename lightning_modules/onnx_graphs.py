"""What of an encoder becomes ONNX graphs: modules from token ids or from views to unit vectors.

Here items are padded on the right with a mask, as an exporter cannot follow lengths that are data.
Letters: N items, L tokens, V views of an item, H backbone width, h heads, D embedding width.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.processors.native import DualProcessor
from datamodules.processors.processor import Processor
from lightning_modules.encoder.composed import ComposedBackbone
from lightning_modules.encoder.embedder import ComputeConfig, Embedder
from lightning_modules.encoder.native import DualBackbone
from lightning_modules.encoder.packing import NAME
from lightning_modules.encoder.pooling import NUM_HEADS, AttentionPooling

EXPORTED = (NAME, "sdpa", "eager")  # attention implementations that run in an export; another gives way to sdpa


class NotExportableError(ValueError):
    """What a backbone takes of a medium is not of one shape."""


class Graph(NamedTuple):
    """A module to export.

    Args:
        module: With tensors as arguments, in the order of `example`.
        example: Argument name to a tensor to trace with.
        axes: Argument name to dimension to the name of what may be of any number there.
    """

    module: nn.Module
    example: dict[str, Tensor]
    axes: dict[str, dict[int, str]]


def copy_to_export(encoder: Embedder) -> Embedder:
    """The encoder in fp32 on the CPU with plain layers; the given one stays as it is.

    Raises:
        ValueError: Weights are quantised.
    """
    for name, parameter in encoder.named_parameters():
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            raise ValueError(f"{name} is quantised; export the encoder that it was made from, as ONNX quantises by itself")
    twin = copy.deepcopy(encoder).to("cpu", torch.float32).eval()
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # of prepacked weights
    backbone = twin.backbone
    for tower in getattr(backbone, "towers", nn.ModuleDict()).children():
        tower.model.set_grad_checkpointing(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if backbone.attention not in EXPORTED:
        whole = backbone.text if isinstance(backbone, ComposedBackbone) else backbone.model
        whole.set_attn_implementation("sdpa")
    twin.use(ComputeConfig())
    return twin


class FromText(nn.Module):
    """Token ids and mask (N, L), padded on the right, to unit vectors (N, D)."""

    def __init__(self, encoder: Embedder, padding: int) -> None:
        super().__init__()
        self.encoder, self.padding = encoder, padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        backbone = self.encoder.backbone
        if isinstance(backbone, DualBackbone):
            ids = torch.where(attention_mask > 0, input_ids, self.padding)
            ids = F.pad(ids, (0, backbone.length), value=self.padding)[:, : backbone.length]
            vector = F.normalize(backbone.model.get_text_features(ids).pooler_output, dim=-1)
            return unit(self.encoder, vector[:, None], torch.ones_like(vector[:, :1]))
        if isinstance(backbone, ComposedBackbone):
            embedded = backbone.text.get_input_embeddings()(input_ids)
            states = backbone.text(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        else:
            states = backbone.model(input_ids=input_ids, attention_mask=attention_mask, **backbone.fixed).last_hidden_state
        return unit(self.encoder, states, attention_mask)


class FromViews(nn.Module):
    """Views (N, V, ..) of items of one medium each to unit vectors (N, D), by a composed backbone."""

    def __init__(self, encoder: Embedder, processor: Processor, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self.first_ids, self.last_ids = (
            torch.tensor(ids, dtype=torch.int64) for ids in (processor.first_ids, processor.last_ids)
        )

    def forward(self, views: Tensor) -> Tensor:
        backbone: ComposedBackbone = self.encoder.backbone
        tower, tokens = backbone.towers[backbone.routes[self.kind]], backbone.tokens[self.kind]
        num_items, num_views = views.shape[:2]
        soft = tower(views.flatten(0, 1), tokens).reshape(num_items, num_views * tokens, backbone.width)
        of_text, (begin, end) = backbone.text.get_input_embeddings(), self.encoder.backbone.boundaries[self.kind]
        before, behind = torch.cat([of_text(self.first_ids), begin[None]]), torch.cat([end[None], of_text(self.last_ids)])
        before, behind = (row.expand(num_items, *row.shape) for row in (before, behind))
        embedded = torch.cat([before, soft, behind], dim=1)
        mask = torch.ones(embedded.shape[:2], dtype=torch.int64)
        return unit(self.encoder, backbone.text(inputs_embeds=embedded, attention_mask=mask).last_hidden_state, mask)


class FromPictures(nn.Module):
    """Pictures (N, V, 3, height, width) as the native processor makes them to unit vectors (N, D), by a native backbone."""

    def __init__(self, encoder: Embedder, processor: Processor, kind: str) -> None:
        super().__init__()
        self.encoder = encoder
        rows = (processor.first_ids, places_of(encoder, processor, kind), processor.last_ids)
        self.first_ids, self.places, self.last_ids = (torch.tensor(ids, dtype=torch.int64) for ids in rows)
        placeholder = getattr(encoder.backbone, "places", {}).get("image")
        self.soft = [place for place, token in enumerate(rows[1]) if token == placeholder]

    def forward(self, views: Tensor) -> Tensor:
        backbone, (num_items, num_views) = self.encoder.backbone, views.shape[:2]
        if isinstance(backbone, DualBackbone):
            vectors = backbone.model.get_image_features(pixel_values=views.flatten(0, 1)).pooler_output
            states = F.normalize(vectors, dim=-1).reshape(num_items, num_views, backbone.width)
            return unit(self.encoder, states, torch.ones(states.shape[:2], dtype=torch.int64))
        of_text = backbone.text.get_input_embeddings()
        features = backbone.model.get_image_features(pixel_values=views.flatten(0, 1)).pooler_output
        around = of_text(self.places).expand(features.shape[0], -1, -1)
        pictures = torch.cat([around[:, : self.soft[0]], features, around[:, self.soft[-1] + 1 :]], dim=1)
        pictures = pictures.reshape(num_items, num_views * len(self.places), around.shape[2])
        before, behind = (of_text(ids).expand(num_items, -1, -1) for ids in (self.first_ids, self.last_ids))
        embedded = torch.cat([before, pictures, behind], dim=1)
        mask = torch.ones(embedded.shape[:2], dtype=torch.int64)
        states = backbone.text(inputs_embeds=embedded, attention_mask=mask, **backbone.fixed).last_hidden_state
        return unit(self.encoder, states, mask)


def unit(encoder: Embedder, states_NLH: Tensor, mask_NL: Tensor) -> Tensor:
    """Unit vectors (N, D) of padded token states: pooling, projection, normalisation."""
    pooled_NH = pooled(encoder, states_NLH.float(), mask_NL.float())
    return F.normalize(encoder.projection(pooled_NH).float(), dim=-1)


def pooled(encoder: Embedder, states_NLH: Tensor, mask_NL: Tensor) -> Tensor:
    """What `pooling.pool` makes of the tokens that are no padding (N, H)."""
    name, length_N1 = encoder.config.pooling, mask_NL.sum(1, keepdim=True)
    if isinstance(encoder.pooling, AttentionPooling):
        return _attended(encoder.pooling, states_NLH, mask_NL)
    if name == "first":
        return states_NLH[:, 0]
    if name == "last":
        place_N11 = (length_N1 - 1).long()[..., None]
        return states_NLH.gather(1, place_N11.expand(-1, 1, states_NLH.shape[2]))[:, 0]
    weight_NL = mask_NL.cumsum(1) * mask_NL if name == "weighted_mean" else mask_NL
    return (states_NLH * weight_NL[..., None]).sum(1) / weight_NL.sum(1, keepdim=True)


def _attended(pooling: AttentionPooling, states_NLH: Tensor, mask_NL: Tensor) -> Tensor:
    heads = (NUM_HEADS, -1)
    key_NLhw, value_NLhw = (of(states_NLH).unflatten(-1, heads) for of in (pooling.key, pooling.value))
    query_hw = pooling.query.unflatten(0, heads)
    score_NLh = (key_NLhw * query_hw).sum(-1) / query_hw.shape[1] ** 0.5
    score_NLh = score_NLh.masked_fill(mask_NL[..., None] == 0, -torch.inf)
    return (score_NLh.softmax(1)[..., None] * value_NLhw).sum(1).flatten(1)


def places_of(encoder: Embedder, processor: Processor, kind: str) -> list[int]:
    """What stands for a picture in the sequence of a native backbone.

    Raises:
        NotExportableError: A medium of that kind becomes more than views of one shape and a fixed number of places.
    """
    family, is_dual = encoder.backbone.settings["model_type"], isinstance(encoder.backbone, DualBackbone)
    if kind not in ("image", "page") and not is_dual:
        raise NotExportableError(
            f"{family} takes {kind} as values whose number follows from its length, not as views of one shape"
        )
    made = [processor.medium("image", np.zeros((height, 64, 3), np.uint8)) for height in (64, 160)]
    (places, values), (others, other_values) = made
    if values.keys() != {"pixel_values"}:
        raise NotExportableError(f"{family} takes pictures as {', '.join(sorted(values))}, not as views of one shape")
    if places != others or values["pixel_values"].shape != other_values["pixel_values"].shape:
        raise NotExportableError(f"{family} makes a number of tokens of a picture that follows from its size")
    return places


def padding_of(processor: Processor) -> int:
    """The token id that fills the rows of a text tower of fixed length."""
    padding = processor.tokenizer.pad_token_id
    return padding if isinstance(processor, DualProcessor) and isinstance(padding, int) else 0
