"""What comes twice with a few words changed: MinHash fingerprints, made block by block and compared as a whole.

An item is the set of its runs of words (shingles). 128 random orders of all shingles give it 128 minima; two items agree in a
minimum with the probability of their Jaccard similarity. Rows that agree in all 8 minima of one of 16 bands are compared:
1 − (1 − s⁸)¹⁶ of the pairs of similarity s, 61 % at 0.7, 95 % at 0.8, 99.99 % at 0.9.

Source: Broder 1997, On the resemblance and containment of documents (shingles, minima); Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, section 3.4 (bands). We depart where one word matters: a text so short that one other word leaves less than
0.8 is one shingle, so that captions from one template stay apart. Letters: N rows, C columns of a record, S shingles.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from datamodules.sample import MEDIA_KINDS, TEXT_KINDS, Item

NUM_PERMUTATIONS, NUM_BANDS = 128, 16
FINGERPRINT = np.dtype([("content", "<i8"), ("bands", "<u8", NUM_BANDS), ("signature", "<u2", NUM_PERMUTATIONS)])
THRESHOLD = 0.8  # our choice, as are the next four
MIN_THRESHOLD = 0.7  # bands find ever less of what is below
NUM_WORDS, NUM_LETTERS = 3, 5  # in a shingle
MAX_COMPARED = 8  # rows of a bucket that each other row of it is compared with
BLOCK = 2**15  # rows or shingles at a time

MARKS = ".,;:!?¿¡…\"'`´‘’‚“”„‹›«»()[]{}、。〈〉《》「」『』【】·،؛؟۔।॥"  # dropped at the edges of words
NO_SPACES = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\U00020000-\U0003ffff"  # letters that are words
LETTER = re.compile(f"[{NO_SPACES}]")
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]{{1,32}}")  # what is longer is cut, so that none fills the cache


def texts_of(item: Item) -> str:
    """The title and the texts and code of an item, a line each; empty where it has none."""
    texts = [str(part.data) for part in item.parts if part.kind in TEXT_KINDS]
    return "\n".join(texts if item.title is None else [item.title, *texts])


def fingerprint(items: Sequence[Item | None]) -> np.ndarray:
    """One row per item, which depends on nothing but the item.

    Other media make other items, however alike their texts; an item without words is only near its equals.

    Args:
        items: None is what a record lacks; it has content 0, and is near None.

    Returns:
        (N,) of `FINGERPRINT`: `content`, the item's content id; `bands`, hashes of eight minima each; `signature`, 16 bits of
        every minimum, which takes one in 65,536 different ones for equal and so adds less than 0.00002 to a similarity.
    """
    rows = np.zeros(len(items), FINGERPRINT)
    minima = np.empty((len(items), NUM_PERMUTATIONS), np.uint64)
    for number, item in enumerate(items):
        rows["content"][number] = 0 if item is None else item.content_id
        minima[number] = signature(_set_of(item))
    minima = _mix(minima)
    rows["signature"] = minima >> 48
    rows["bands"] = _combine(minima.reshape(-1, NUM_BANDS, NUM_PERMUTATIONS // NUM_BANDS))
    return rows


def near_pairs(rows: np.ndarray, *, threshold: float = THRESHOLD) -> np.ndarray:
    """For every row the position of the earliest kept row that it is near to, its own where it is kept.

    Rows are judged in order, and dropped when near to a row that was kept: near is not passed on, so a chain of small changes
    is not dropped as a whole, and what follows a row does not change what becomes of it. Rows of equal sets count as one; each
    other is compared, in every band, with the first `MAX_COMPARED` of its bucket. A pair is missed when no band joins it, or
    when as many others stand before it in all that do. Memory: 50 to 300 bytes a row, the more the more pairs are near.

    Args:
        rows: (N,) of `FINGERPRINT`, or (N, C), near where each of the columns is: a record's query and target, of which many
            records may share one. May be a memmap.
        threshold: Estimated Jaccard similarity that is near, 0.7 to 1; the estimate's standard deviation is 0.035 at 0.8.

    Returns:
        (N,) int64.

    Raises:
        ValueError: The rows are no fingerprints, or the threshold is out of range.
    """
    rows = _checked(rows, threshold)
    first, distinct = _equals(rows)
    pairs = np.zeros(0, np.int64)
    for band in range(NUM_BANDS):
        pairs = np.union1d(pairs, _pairs_of_band(rows, distinct, band, threshold))
    head = np.arange(len(rows))
    for later, earlier in zip((pairs // len(rows)).tolist(), (pairs % len(rows)).tolist(), strict=True):  # ascending
        if head[later] == later and head[earlier] == earlier:
            head[later] = earlier
    return head[first]


def overlaps(rows: np.ndarray, judged: np.ndarray, *, threshold: float = THRESHOLD) -> np.ndarray:
    """Whether each row equals or is near one of those that a benchmark is judged by.

    Args:
        rows: (N,) of `FINGERPRINT`, all or a block; may be a memmap.
        judged: (M,) of `FINGERPRINT`, in memory. What a record lacks counts on neither side.
        threshold: As of `near_pairs`, which says also what is missed.

    Returns:
        (N,) bool.

    Raises:
        ValueError: As of `near_pairs`, or there are columns.
    """
    rows, judged = _checked(rows, threshold), _checked(judged, threshold)
    if rows.ndim != 1 or judged.ndim != 1:
        raise ValueError(f"overlaps are of items, got rows of shape {rows.shape} and {judged.shape}; give it one column")
    judged = judged[judged["content"] != 0]
    found = np.isin(rows["content"], judged["content"])
    judged = judged[_equals(judged)[1]]
    for band in range(NUM_BANDS):
        keys = _keys(judged, band)
        order = np.argsort(keys, kind="stable")
        unknown = np.flatnonzero(~found)
        wanted = _keys(rows, band)[unknown]
        start, end = (np.searchsorted(keys, wanted, side, order) for side in ("left", "right"))
        for offset in range(MAX_COMPARED):
            some = np.flatnonzero(start + offset < end)
            near = similarity(rows, unknown[some], judged, order[start[some] + offset]) >= threshold
            found[unknown[some[near]]] = True
    return found


def shingles(text: str) -> np.ndarray:
    """Hashes of the runs of words of a text after NFKC and case folding, without marks at the edges of words.

    A run has 3 words, or 5 letters where most words are letters of a script without spaces; it may begin before the text or end
    after it, so that a word counts the same everywhere: one other word of k leaves (k − 1) / (k + 2n − 1) with runs of n.
    Where that is less than 0.8, up to 24 words or 40 letters, the whole text is one shingle.

    Returns:
        (S,) uint64, ascending, each once; none for a text without words. The same in every process.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = [word for found in WORD.findall(text) if (word := found.strip(MARKS))]
    has_spaces = text.isascii() or 2 * len(LETTER.findall(text)) <= len(words)
    length = NUM_WORDS if has_spaces else NUM_LETTERS
    hashes = np.zeros(len(words) + 2 * (length - 1), np.uint64)
    hashes[length - 1 : length - 1 + len(words)] = np.fromiter(map(_hash, words), np.uint64, len(words))
    if len(words) <= 8 * length:
        return _combine(hashes[None]) if words else hashes[:0]
    return np.unique(_combine(np.lib.stride_tricks.sliding_window_view(hashes, length)))


def signature(shingles: np.ndarray, *, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0) -> np.ndarray:
    """The minimum of a set in random orders: of (a x + b) mod 2⁶⁴ with odd a, one to one on hashes that are random already.

    Args:
        shingles: (S,) uint64, at least one.
        num_permutations: Number P of orders.
        seed: Of the orders, from 0.

    Returns:
        (P,) uint64.
    """
    factors, summands = _orders(num_permutations, seed)
    step = max(1, 8 * BLOCK // num_permutations)
    parts = [(factors * shingles[i : i + step] + summands).min(1) for i in range(0, len(shingles), step)]
    return np.minimum.reduce(parts)


def similarity(rows: np.ndarray, at: np.ndarray, others: np.ndarray, other_at: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity (P,) of rows and others at positions (P,) each: of columns the smallest."""
    found = np.zeros(len(at))
    for i in range(0, len(at), BLOCK):
        block = slice(i, i + BLOCK)
        agree = rows["signature"][at[block]] == others["signature"][other_at[block]]
        found[block] = agree.reshape(len(agree), -1, NUM_PERMUTATIONS).mean(2).min(1)
    return found


def _set_of(item: Item | None) -> np.ndarray:
    """The shingles of an item, apart from those of all items with other media; its content where it has no words."""
    if item is None:
        return np.zeros(1, np.uint64)
    found = shingles(texts_of(item))
    if not len(found):
        return _mix(np.array([item.content_id]).view(np.uint64))
    digest = hashlib.blake2b(digest_size=8)
    media = [part for part in item.parts if part.kind in MEDIA_KINDS]
    for part in media:
        digest.update(f"{part.kind}:{len(part.data)}:".encode())
        digest.update(part.data if isinstance(part.data, bytes) else part.data.encode())
    return _mix(found ^ np.frombuffer(digest.digest(), "<u8")) if media else found


def _equals(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every row the position of the first whose bands all equal its own (N,), and these positions, each once, ascending."""
    whole = np.empty(len(rows), np.uint64)
    for i in range(0, len(rows), BLOCK):
        bands = rows["bands"][i : i + BLOCK]
        whole[i : i + BLOCK] = _combine(bands.reshape(len(bands), -1))
    _, index, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return index[inverse], np.sort(index)


def _keys(rows: np.ndarray, band: int) -> np.ndarray:
    """What rows (N,) share that agree in a band, in all of their columns; uint64."""
    keys = rows["bands"][..., band]
    return np.ascontiguousarray(keys) if keys.ndim == 1 else _combine(keys)


def _pairs_of_band(rows: np.ndarray, positions: np.ndarray, band: int, threshold: float) -> np.ndarray:
    """Near pairs of the rows at ascending positions that share a bucket of a band: later · N + earlier, each int64."""
    keys = _keys(rows, band)[positions]
    order = np.argsort(keys, kind="stable")  # a bucket's rows stay in their order
    place = np.arange(len(keys))
    is_start = np.ones(len(keys), bool)
    is_start[1:] = keys[order][1:] != keys[order][:-1]
    start = np.maximum.accumulate(np.where(is_start, place, 0))
    pairs = [np.zeros(0, np.int64)]
    for offset in range(MAX_COMPARED):
        some = np.flatnonzero(start + offset < place)
        later, earlier = positions[order[some]], positions[order[start[some] + offset]]
        near = similarity(rows, later, rows, earlier) >= threshold
        pairs.append(later[near] * len(rows) + earlier[near])
    return np.concatenate(pairs)


@lru_cache(maxsize=2**16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=8)
def _orders(num_permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and summands (P, 1) each."""
    numbers = _random(2 * num_permutations, seed)[:, None]
    return numbers[::2] | 1, numbers[1::2]


@lru_cache(maxsize=64)
def _random(count: int, seed: int) -> np.ndarray:
    """The first numbers of SplitMix64 (Steele, Lea and Flood 2014): not numpy's, whose streams may change with its version."""
    return _mix(np.array([seed], np.uint64) + np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, one to one on uint64."""
    values = (values ^ (values >> 30)) * 0xBF58476D1CE4E5B9
    values = (values ^ (values >> 27)) * 0x94D049BB133111EB
    return values ^ (values >> 31)


def _combine(values: np.ndarray) -> np.ndarray:
    """One hash of the numbers on the last axis, in their order; uint64."""
    return _mix((values * (_random(values.shape[-1], 1) | 1)).sum(-1, dtype=np.uint64))


def _checked(rows: np.ndarray, threshold: float) -> np.ndarray:
    if not MIN_THRESHOLD <= threshold <= 1:
        raise ValueError(f"a threshold of {threshold} is given; it must be {MIN_THRESHOLD} to 1, as bands find little below")
    if rows.dtype != FINGERPRINT or rows.ndim not in (1, 2):
        raise ValueError(f"rows of shape {rows.shape} and dtype {rows.dtype} are given; make them with `fingerprint`")
    return np.asarray(rows)
