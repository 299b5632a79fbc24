"""The order of a task's examples within an epoch: any stretch of it can be told without the rest.

*Global*: a permutation of all examples; a stored one for small splits, a Feistel network with cycle walking for large ones,
so that memory does not grow with them. *Windowed*, for remote shards: shards in a random order, examples permuted within a
window of some shards, so that a cache of two windows suffices.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", for cycle walking.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

MAX_STORED = 2**18  # examples; beyond it a permutation is computed place by place
NUM_ROUNDS = 6
Key = tuple[int, str, int]


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A random generator of its own for (seed, purpose, numbers): nothing else in the run can move it."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])


@dataclass(frozen=True, slots=True)
class Order:
    """The examples of a split, and how an epoch goes through them.

    Args:
        num_examples: How many there are.
        shard_ends: Position after the last example of each shard, for the windowed order; None for the global one.
        window: Shards in a window.
    """

    num_examples: int
    shard_ends: tuple[int, ...] | None = None
    window: int = 1

    def positions(self, key: Key, places: np.ndarray) -> np.ndarray:
        """Positions of the examples at some places (P,) of the epoch's order that `key` names."""
        if self.shard_ends is None:
            return permuted(key, self.num_examples, places)
        shards, ends = _windows(key, self.shard_ends, self.window)
        found = np.empty(len(places), np.int64)
        numbers = np.searchsorted(ends, places, side="right")
        for number in np.unique(numbers):
            here = numbers == number
            first = int(ends[number - 1]) if number else 0
            within = permuted((*key[:2], key[2] * len(ends) + int(number) + 1), int(ends[number]) - first, places[here] - first)
            found[here] = _in_shards(shards[number], self.shard_ends, within)
        return found


class _Windows(NamedTuple):
    shards: list[np.ndarray]
    ends: np.ndarray


@lru_cache(maxsize=64)
def _windows(key: Key, shard_ends: tuple[int, ...], window: int) -> _Windows:
    """The epoch's windows: the shards of each, and the place after the last example of each."""
    sizes = np.diff(shard_ends, prepend=0)
    order = generator(key[0], f"shards, {key[1]}", key[2]).permutation(len(sizes))
    shards = [order[first : first + window] for first in range(0, len(order), window)]
    return _Windows(shards, np.cumsum([sizes[own].sum() for own in shards]))


def _in_shards(shards: np.ndarray, shard_ends: tuple[int, ...], within: np.ndarray) -> np.ndarray:
    """Positions of the `within`-th examples of some shards laid end to end."""
    begins = np.array([shard_ends[shard - 1] if shard else 0 for shard in shards])
    ends = np.cumsum([shard_ends[shard] - begin for shard, begin in zip(shards, begins, strict=True)])
    number = np.searchsorted(ends, within, side="right")
    return begins[number] + within - np.where(number > 0, ends[number - 1], 0)


def permuted(key: Key, size: int, places: np.ndarray) -> np.ndarray:
    """The images of places (P,) under the permutation of `size` things that `key` names."""
    return _stored(key, size)[places].astype(np.int64) if size <= MAX_STORED else feistel(key, size, places)


@lru_cache(maxsize=64)
def _stored(key: Key, size: int) -> np.ndarray:
    return generator(*key).permutation(size).astype(np.int32)


def feistel(key: Key, size: int, places: np.ndarray) -> np.ndarray:
    """`permuted` without storing anything: a Feistel network over the next power of four, walked until inside."""
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = generator(*key).integers(0, 2**64, NUM_ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        found[outside] = left << np.uint64(half) | right
        outside = found >= np.uint64(size)
    return found.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit in changes half the bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
