"""Passes through the encoder: a batch's items in groups that go through it together, of like length or of so many tokens.

Batches themselves are not sorted by length. That would make an example meet the same few negatives of its own length again and
again (experiments/003_length_buckets), and still pad, as queries and targets cannot both be alike.
"""

import numpy as np

PASS_COST = 64  # tokens; our choice, measured on a CPU (experiments/003_length_buckets)


def passes_of(lengths: np.ndarray, pass_cost: int = PASS_COST, max_tokens: int | None = None) -> list[np.ndarray]:
    """The rows of each padded pass: of all ways to cut the rows by length, the one with the fewest tokens, padding included.

    Args:
        lengths: Tokens of each row (N,).
        pass_cost: What a further pass costs, in tokens.
        max_tokens: Most tokens of a pass, padding included; a single longer row is a pass. None sets no limit.

    Returns:
        Rows of each pass, shortest first.
    """
    order = np.argsort(lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    ends = counts.cumsum()
    fewest, cuts = np.zeros(len(values) + 1), np.zeros(len(values) + 1, int)
    for stop in range(1, len(values) + 1):
        starts = np.append(0, ends)[:stop]
        costs = fewest[:stop] + (ends[stop - 1] - starts) * values[stop - 1] + pass_cost
        cuts[stop] = costs.argmin()
        fewest[stop] = costs[cuts[stop]]
    passes, stop = [], len(values)
    while stop:
        rows = order[np.append(0, ends)[cuts[stop]] : ends[stop - 1]]
        most = len(rows) if max_tokens is None else max(1, int(max_tokens // values[stop - 1]))
        passes.extend(reversed(np.array_split(rows, -(-len(rows) // most))))
        stop = cuts[stop]
    return passes[::-1]


def split_into(parts: list[np.ndarray], number: int) -> list[np.ndarray]:
    """The same rows in at least so many parts, in the same order; those of most rows are halved.

    Raises:
        ValueError: There are not so many rows.
    """
    if sum(map(len, parts)) < number:
        raise ValueError(f"{sum(map(len, parts))} items cannot go through the encoder in the {number} parts of another rank")
    parts = list(parts)
    while len(parts) < number:
        longest = max(range(len(parts)), key=lambda place: len(parts[place]))
        parts[longest : longest + 1] = np.array_split(parts[longest], 2)
    return parts


def packs_of(lengths: np.ndarray, max_tokens: int | None = None) -> list[np.ndarray]:
    """The rows of each pack, in which items lie end to end, sorted by length.

    Filled from the longest item down, so that the last pack, which the backward pass finds in memory, is a full one.

    Args:
        lengths: Tokens of each row (N,).
        max_tokens: Most tokens of a pack; a single longer row is a pack. None makes one of all.

    Returns:
        Rows of each pack, shortest first.
    """
    order = np.argsort(lengths, kind="stable")
    packs, stop, tokens = [], len(order), 0
    for place in range(len(order) - 1, -1, -1):
        tokens += lengths[order[place]]
        if max_tokens is not None and tokens > max_tokens and place + 1 < stop:
            packs.append(order[place + 1 : stop])
            stop, tokens = place + 1, lengths[order[place]]
    return [order[:stop], *packs[::-1]]
