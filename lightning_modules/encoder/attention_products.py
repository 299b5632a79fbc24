"""Attention of packed items on a CPU in fp32, by batched matrix products: scores, softmax, sum, run by run of equal lengths.

torch's own kernel for a CPU works through each head of each item in blocks that are made for long sequences; of its time,
forward and backward, these products take a third at 10 tokens, half at 20 and three quarters at 60. The scores of
a few items at a time stay in the cache; they are not kept, and made again in the backward pass.

Letters: T tokens of all items, m items of a block, L tokens of each, h query heads, c key heads, w their width.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LENGTH = 256  # our choice: alike from some 90 tokens on, slower by a fifth at 256, but packs hold shorter items too
MAX_SCORES = 2**20  # at a time, 4 MiB: our choice, within a core's share of the last cache

Runs = tuple[tuple[int, int], ...]  # how many items of how many tokens lie beside each other, in order


def are_for(query: Tensor, runs: Runs, dropout: float, window: int | None) -> bool:
    """Whether `attention` is to take these."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    longest = max(length for _, length in runs)
    is_plain = not dropout and not torch.compiler.is_compiling()
    return is_plain and longest <= MAX_LENGTH and (window is None or longest <= window)


def attention(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> Tensor:
    """What each token gathers from its item (T, h, w).

    Args:
        query: (T, h, w); h is a multiple of c, and as many neighbouring heads share a key.
        key: (T, c, w).
        value: (T, c, w).
        runs: The items' lengths.
        scale: Of the scores.
    """
    return _Attention.apply(query, key, value, runs, scale)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    """Every tensor is laid out as (item, head, token) rows, so that a block of items is one batch of matrices."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> Tensor:
        laid_out = [_laid_out(x, runs) for x in (query, key, value)]
        out = torch.empty_like(laid_out[0])
        for q, k, v, o in _blocks(runs, key.shape[1], *laid_out, out):
            torch.bmm(_weights(q, k, scale), v, out=o)
        ctx.save_for_backward(*laid_out)
        ctx.settings = runs, scale, key.shape[1]
        return _put_back(out, query.shape[1], runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        runs, scale, num_keys = ctx.settings
        laid_out = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in laid_out]
        for q, k, v, d_o, d_q, d_k, d_v in _blocks(runs, num_keys, *laid_out, _laid_out(grad, runs), *grads):
            p = _weights(q, k, scale)
            torch.bmm(p.mT, d_o, out=d_v)
            d_s = torch._softmax_backward_data(torch.bmm(d_o, v.mT), p, -1, p.dtype)
            torch.baddbmm(d_q, d_s, k, beta=0, alpha=scale, out=d_q)
            torch.baddbmm(d_k, d_s.mT, q, beta=0, alpha=scale, out=d_k)
        heads = (grad.shape[1], num_keys, num_keys)
        return *(_put_back(x, num_heads, runs) for x, num_heads in zip(grads, heads, strict=True)), None, None


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax of the scores; one batch of matrices."""
    scores = query.new_empty(len(query), query.shape[1], key.shape[1])
    torch.baddbmm(scores, query, key.mT, beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scores)


def _blocks(runs: Runs, num_keys: int, *laid_out: Tensor) -> Iterator[list[Tensor]]:
    """Items at a time: each tensor's rows (T · heads, w) as a batch (m · c, heads / c · L, w)."""
    num_tokens = sum(number * length for number, length in runs)
    num_heads = [len(x) // num_tokens for x in laid_out]
    start = 0
    for number, length in runs:
        most = max(1, MAX_SCORES // (max(num_heads) * length * length))
        for first in range(0, number, most):
            stop = start + min(most, number - first) * length
            yield [
                x[start * h : stop * h].view(-1, h // num_keys * length, x.shape[1])
                for x, h in zip(laid_out, num_heads, strict=True)
            ]
            start = stop


@lru_cache(maxsize=32)  # those of a few packs, each for all layers
def _orders(runs: Runs, num_heads: int) -> tuple[Tensor, Tensor]:
    """Which (token, head) row is the n-th of (item, head, token), and the inverse (T · heads,)."""
    orders, start = [], 0
    for number, length in runs:
        tokens = start + np.arange(number * length).reshape(number, 1, length)
        orders.append((tokens * num_heads + np.arange(num_heads)[:, None]).ravel())
        start += number * length
    order = np.concatenate(orders)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return torch.from_numpy(order), torch.from_numpy(inverse)


def _laid_out(x: Tensor, runs: Runs) -> Tensor:
    """(T, heads, w) as rows of (item, head, token)."""
    return x.reshape(-1, x.shape[2]).index_select(0, _orders(runs, x.shape[1])[0])


def _put_back(rows: Tensor, num_heads: int, runs: Runs) -> Tensor:
    """Rows of (item, head, token) as (T, heads, w)."""
    return rows.index_select(0, _orders(runs, num_heads)[1]).view(-1, num_heads, rows.shape[1])
