"""Poolings: the token states of an item to one vector, in fp32; items lie end to end, and no token is padding.

Letters: T tokens of all items, N items, n items of one length L among them, H backbone width, h heads.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.encoder.packing import runs_of

PoolingName = Literal["mean", "last", "first", "attention", "weighted_mean"]
OfEqual = Callable[[Tensor], Tensor]  # states (n, L, H) of items of one length to their vectors (n, H)
NUM_HEADS = 4  # EmbeddingGemma's ablation


def pool(states_TH: Tensor, lengths: Tensor, of_equal: OfEqual) -> Tensor:
    """Vectors of all items (N, H), fp32; neighbours of equal length go through `of_equal` together.

    Args:
        states_TH: Token states.
        lengths: Tokens of each item (N,), on the CPU.
        of_equal: What `pooling_of` gave.
    """
    runs = runs_of(lengths)
    parts = states_TH.split([number * length for number, length in runs])
    return torch.cat([of_equal(part.unflatten(0, run)) for part, run in zip(parts, runs, strict=True)])


def pooling_of(name: PoolingName, width: int) -> OfEqual:
    """What a pooling makes of items of one length; a module where it has parameters."""
    return AttentionPooling(width) if name == "attention" else PLAIN[name]


def mean(states_nLH: Tensor) -> Tensor:
    return states_nLH.mean(1, dtype=torch.float32)


def weighted_mean(states_nLH: Tensor) -> Tensor:
    """The mean with weights that grow with the position, w_l = l / (1 + .. + L) (SGPT, arXiv 2202.08904)."""
    weight_L1 = torch.arange(1, states_nLH.shape[1] + 1, device=states_nLH.device, dtype=torch.float32)[:, None]
    return (states_nLH.float() * (weight_L1 / weight_L1.sum())).sum(1)


def first(states_nLH: Tensor) -> Tensor:
    return states_nLH[:, 0].float()


def last(states_nLH: Tensor) -> Tensor:
    return states_nLH[:, -1].float()


PLAIN: dict[str, OfEqual] = {"mean": mean, "weighted_mean": weighted_mean, "first": first, "last": last}


class AttentionPooling(nn.Module):
    """Attention of one learnt query over an item's tokens, in four heads.

    Source: the ablation of EmbeddingGemma (arXiv 2509.20354), which says no more than heads and query. Our choice: keys and
    values are linear maps without a bias, and there is no map of the output, as the projection follows. Values begin as the
    states and the query near zero, so that it begins as almost the mean.

    Args:
        width: H, a multiple of the heads.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % NUM_HEADS:
            raise ValueError(f"attention pooling has {NUM_HEADS} heads, which do not divide the backbone's width {width}")
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.eye_(self.value.weight)

    def forward(self, states_nLH: Tensor) -> Tensor:
        heads = (NUM_HEADS, -1)
        key_nLhw, value_nLhw = (of(states_nLH).float().unflatten(-1, heads) for of in (self.key, self.value))
        query_hw = self.query.float().unflatten(0, heads)
        score_nLh = (key_nLhw * query_hw).sum(-1) / query_hw.shape[1] ** 0.5
        return (score_nLh.softmax(1)[..., None] * value_nLhw).sum(1).flatten(1)
