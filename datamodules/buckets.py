"""Batches of like lengths: the examples of a pool of batches are dealt to these batches so that little is padded.

A query's and a target's length are two numbers, and each column of a batch is padded to its own longest. So a pool is sorted by
one of them and cut into strips, each strip by the other and cut into batches; of some numbers of strips, and of both
orders, the one that pads least is taken. Ties keep the order in which the examples came, which is random.
"""

from typing import Protocol

import numpy as np


class Lengths(Protocol):
    """Positions (P,) to the lengths of their query and target (P, 2), in tokens or anything in proportion to them."""

    def __call__(self, positions: np.ndarray, /) -> np.ndarray: ...


def bucketed(lengths: np.ndarray, batch_size: int, head: int, random: np.random.Generator) -> np.ndarray:
    """The order (P,) of a pool: `head` examples, batches of like lengths in random order, and what is left over.

    The head and the rest share a batch with another epoch's; they are taken from the middle of the order by length, where
    examples are alike most.

    Args:
        lengths: Of query and target (P, 2).
        batch_size: Examples of a batch.
        head: Examples before the first whole batch.
        random: Puts the batches in order.
    """
    size = len(lengths)
    num_batches = (size - head) // batch_size
    by_length = np.argsort(lengths.sum(1), kind="stable")
    middle = (size - (spare := size - num_batches * batch_size)) // 2
    rest = by_length[middle : middle + spare]
    inside = np.sort(np.delete(by_length, np.s_[middle : middle + spare]))
    dealt = [inside[_strips(lengths[inside], batch_size, *choice)] for choice in _choices(num_batches)]
    best = min(dealt, key=lambda order: padded(lengths[order], batch_size))
    batches = best.reshape(num_batches, batch_size)[random.permutation(num_batches)]
    return np.concatenate([rest[:head], batches.ravel(), rest[head:]])


def padded(lengths: np.ndarray, batch_size: int) -> int:
    """Places that successive batches take, padding included."""
    return int(lengths.reshape(-1, batch_size, 2).max(1).sum()) * batch_size


def _choices(num_batches: int) -> list[tuple[int, int]]:
    """Which column comes first, and how many batches a strip of it holds."""
    depths = sorted({round(num_batches ** (k / 6)) for k in range(7)})
    return [(column, depth) for column in (0, 1) for depth in depths]


def _strips(lengths: np.ndarray, batch_size: int, column: int, depth: int) -> np.ndarray:
    """Sorted by one column, within strips of `depth` batches by the other, there and back."""
    order = np.argsort(lengths[:, column], kind="stable")
    strips = []
    for number, first in enumerate(range(0, len(order), depth * batch_size)):
        strip = order[first : first + depth * batch_size]
        strip = strip[np.argsort(lengths[strip, 1 - column], kind="stable")]
        strips.append(strip[::-1] if number % 2 else strip)
    return np.concatenate(strips)
