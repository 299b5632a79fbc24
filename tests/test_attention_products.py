"""Attention by batched products: what a loop over items and heads gives, values and gradients."""

import pytest
import torch
from torch import Tensor

from lightning_modules.encoder import attention_products, packing
from lightning_modules.encoder.attention_products import MAX_LENGTH, are_for, attention


def by_item_and_head(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    items, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length] for x in (query, key, value))
        shared = query.shape[1] // key.shape[1]
        heads = [((q[:, h] @ k[:, h // shared].T) * scale).softmax(1) @ v[:, h // shared] for h in range(query.shape[1])]
        items.append(torch.stack(heads, 1))
        start += length
    return torch.cat(items)


@pytest.mark.parametrize("num_keys", [6, 2, 1])
@pytest.mark.parametrize("most", [1, 200, 2**20])
def test_values_and_gradients_are_those_of_a_loop(num_keys, most, monkeypatch):
    """In fp64 to rounding, whether a block holds one item, a few, or whole runs."""
    monkeypatch.setattr(attention_products, "MAX_SCORES", most)
    lengths = [1, 1, 2, 5, 5, 5, 3, 9]  # runs need not be sorted
    random = torch.Generator().manual_seed(num_keys)
    sizes = [(sum(lengths), heads, 4) for heads in (6, num_keys, num_keys)]
    rows = [torch.randn(size, generator=random, dtype=torch.float64, requires_grad=True) for size in sizes]
    query, key, value = rows
    weight = torch.randn(sizes[0], generator=random, dtype=torch.float64)
    found, expected = (
        (out, *torch.autograd.grad((out * weight).sum(), rows))
        for out in (
            attention(query, key, value, packing.runs_of(torch.tensor(lengths)), 0.3),
            by_item_and_head(query, key, value, lengths, 0.3),
        )
    )
    for ours, by_hand in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)


def test_scores_are_not_kept():
    """What a long item's backward pass finds is queries, keys and values; its scores would be 16 times as much."""
    query, key, value = (torch.randn(256, 2, 32, requires_grad=True) for _ in range(3))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(query, key, value, ((1, 256),), 1.0)
    assert kept == [query.numel()] * 3


def test_what_they_take():
    query, run = torch.zeros(1, 2, 7, 4), ((1, 7),)
    assert are_for(query, run, 0.0, None)
    assert are_for(query, run, 0.0, 7)
    assert not are_for(query, run, 0.0, 6)
    assert not are_for(query, run, 0.1, None)
    assert not are_for(query.bfloat16(), run, 0.0, None)
    assert not are_for(query, ((1, 7), (1, MAX_LENGTH + 1)), 0.0, None)
    with torch.autocast("cpu", torch.bfloat16):  # queries that a norm made fp32 again meet values in bf16
        assert not are_for(query, run, 0.0, None)


@pytest.mark.parametrize(("num_keys", "scaling"), [(4, None), (2, None), (2, 0.9)])
def test_packed_items_attend_by_them_as_by_sdpa(num_keys, scaling, monkeypatch):
    """As transformers calls it, on a layer's (1, heads, T, width); fp32, so to some of its roundings."""
    lengths = torch.tensor([3, 3, 8])
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 14, 8, generator=random) for heads in (4, num_keys, num_keys))

    def attend() -> Tensor:
        return packing.attend(None, query, key, value, None, packed_lengths=lengths, scaling=scaling)[0]

    found = attend()
    calls: list[bool] = []
    monkeypatch.setattr(attention_products, "are_for", lambda *_: calls.append(True))  # None: not theirs
    torch.testing.assert_close(found, attend(), rtol=1e-5, atol=1e-6)
    assert calls
