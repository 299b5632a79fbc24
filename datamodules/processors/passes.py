"""Passes through the encoder: a batch's texts in groups of like length, each padded to its own longest only.

Batches themselves are not sorted by length. That would make an example meet the same few negatives of its own length again and
again (experiments/003_length_buckets), and still pad, as queries and targets cannot both be alike.
"""

import numpy as np


def passes_of(lengths: np.ndarray, pass_cost: int) -> list[np.ndarray]:
    """The rows of each pass: of all ways to cut the rows by length, the one with the fewest tokens, padding included.

    Args:
        lengths: Tokens of each row (N,).
        pass_cost: What a further pass costs, in tokens.
    """
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order]
    fewest, cuts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    for stop in range(1, len(order) + 1):
        costs = fewest[:stop] + (stop - np.arange(stop)) * longest_first[:stop] + pass_cost
        cuts[stop] = costs.argmin()
        fewest[stop] = costs[cuts[stop]]
    passes, stop = [], len(order)
    while stop:
        passes.append(np.sort(order[cuts[stop] : stop]))
        stop = cuts[stop]
    return passes
