"""Attention over items that lie end to end: each sees itself alone, and no token is padding.

Items of equal length that lie beside each other are one call of SDPA without a mask; sorted by length, a pack needs as many
calls as it has different lengths. Short items on a CPU go through `attention_products` instead, and on a GPU in half precision
torch's varlen kernel takes all lengths in one call (not run on a GPU yet). transformers finds the attention by its name; the
lengths reach it as an argument of the model, so that a layer that runs again in the backward pass meets them again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels.problem import HALF
from lightning_modules.encoder import attention_products as products

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch without it
    varlen_attn = None

NAME = "packed_or_padded"


def packed_arguments(text: Any, states_TH: Tensor, lengths: Tensor) -> dict[str, Any]:
    """What a text model whose attention is `NAME` is called with to take a batch of one as items end to end.

    Args:
        text: A transformers model.
        states_TH: Their embedded tokens.
        lengths: Tokens of each (N,), on the CPU.
    """
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    positions = torch.arange(len(starts)) - starts + first_position(text)
    return {
        "inputs_embeds": states_TH[None],
        "position_ids": positions[None].to(states_TH.device),
        "attention_mask": states_TH.new_empty(1, 1, 0, 0),  # has transformers make none
        "packed_lengths": lengths,
    }


def first_position(text: Any) -> int:
    """Position of an item's first token: the families after RoBERTa count from behind their padding's."""
    embeddings: Any = getattr(text, "embeddings", None)
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_inputs_embeds") else 0


def runs_of(lengths: Tensor) -> products.Runs:
    """Runs of neighbours of equal length."""
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    return tuple(zip(counts.tolist(), values.tolist(), strict=True))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention: query (N, heads, L, width), key and value alike, to (N, L, heads, width).

    Raises:
        ValueError: The model changes its attention scores in a way that packed items would miss.
    """
    if packed_lengths is None:
        more |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    if more.get("softcap") is not None or more.get("position_bias") is not None:
        raise ValueError("the text model changes its attention scores, which cannot be packed; set model.compute.layout=padded")
    if _has_varlen(query, dropout):
        return _varlen(module, query, key, value, packed_lengths, scaling, sliding_window), None
    runs = runs_of(packed_lengths)
    window = None if sliding_window is None else module.config.sliding_window  # what transformers' own masks are made from
    if products.are_for(query, runs, dropout, window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return products.attention(query, key, value, runs, scale).unsqueeze(0), None
    parts = (x[0].split([number * length for number, length in runs], dim=1) for x in (query, key, value))
    outs = []
    for (number, length), *run in zip(runs, *parts, strict=True):
        query_nhLw, key_nhLw, value_nhLw = (x.unflatten(1, (number, length)).transpose(0, 1) for x in run)
        out = F.scaled_dot_product_attention(
            query_nhLw,
            key_nhLw,
            value_nhLw,
            attn_mask=_within(window, length, query.device),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None], None


def _has_varlen(query: Tensor, dropout: float) -> bool:
    return varlen_attn is not None and query.is_cuda and query.dtype in HALF and dropout == 0


def _varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_lengths: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """All items in one call of torch's varlen kernel (1, T, heads, width), which takes keys as many as queries."""
    assert varlen_attn is not None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    ends = F.pad(packed_lengths.cumsum(0), (1, 0)).to(query.device, torch.int32)
    longest = int(packed_lengths.max())
    window: dict[str, Any] = {} if sliding_window is None else {"window_size": (module.config.sliding_window,) * 2}
    out: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, **window)
    return out[None]


def _within(window: Any, length: int, device: torch.device) -> Tensor | None:
    """Which tokens see each other in a layer whose window is shorter than the item (L, L), else None."""
    if window is None or length <= window:
        return None
    place_L = torch.arange(length, device=device)
    return (place_L[:, None] - place_L).abs() <= window


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
