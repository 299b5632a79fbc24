"""Measures of embeddings, for each query, and what chance would give: the exact expectation over random orders.

Letters: Q queries, C candidates or classes, R judged pairs, N training items, D width.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from torch import Tensor

RECALL_DEPTHS = (1, 5, 10)
DEPTH = 10
NUM_SHUFFLES = 10  # of the labels, for what chance gives a clustering; our choice


def retrieval(rank_R: np.ndarray, query_R: np.ndarray, gain_R: np.ndarray, num_queries: int) -> dict[str, np.ndarray]:
    """R@1/5/10 (whether a relevant candidate is among the first k), MRR@10 and nDCG@10 of each query (Q,).

    The gain of nDCG is the grade itself, as in trec_eval.

    Args:
        rank_R: Ranks of relevant candidates from 1, any number above 10 beyond that.
        query_R: Whose they are; every query has at least one.
        gain_R: Their grades, above 0.
        num_queries: Q.
    """
    first_Q = np.full(num_queries, np.iinfo(np.int64).max)
    np.minimum.at(first_Q, query_R, rank_R)
    values = {f"recall@{k}": (first_Q <= k).astype(float) for k in RECALL_DEPTHS}
    values[f"mrr@{DEPTH}"] = np.where(first_Q <= DEPTH, 1.0 / first_Q, 0.0)
    found_Q = _discounted(rank_R, query_R, gain_R, num_queries)
    values[f"ndcg@{DEPTH}"] = found_Q / _discounted(_ideal(query_R, gain_R), query_R, gain_R, num_queries)
    return values


def _discounted(rank_R: np.ndarray, query_R: np.ndarray, gain_R: np.ndarray, num_queries: int) -> np.ndarray:
    """DCG@10 of each query (Q,)."""
    gains = np.where(rank_R <= DEPTH, gain_R / np.log2(rank_R + 1.0), 0.0)
    return np.bincount(query_R, gains, num_queries)


def _ideal(query_R: np.ndarray, gain_R: np.ndarray) -> np.ndarray:
    """Ranks from 1 by falling gain, query by query."""
    order = np.lexsort((-gain_R, query_R))
    ordered = query_R[order]
    rank_R = np.empty(len(order), np.int64)
    rank_R[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered) + 1
    return rank_R


def retrieval_chance(query_R: np.ndarray, gain_R: np.ndarray, num_queries: int, num_candidates: int) -> dict[str, float]:
    """What a random order of the candidates gives on average; arguments as of `retrieval`."""
    counts_Q = np.bincount(query_R, minlength=num_queries).tolist()
    found = {f"recall@{k}": _mean(1 - _miss(count, num_candidates, k) for count in counts_Q) for k in RECALL_DEPTHS}
    found[f"mrr@{DEPTH}"] = _mean(_reciprocal(count, num_candidates) for count in counts_Q)
    shown = sum(1 / math.log2(rank + 1) for rank in range(1, min(DEPTH, num_candidates) + 1)) / num_candidates
    ideal_Q = _discounted(_ideal(query_R, gain_R), query_R, gain_R, num_queries)
    found[f"ndcg@{DEPTH}"] = float(np.mean(shown * np.bincount(query_R, gain_R, num_queries) / ideal_Q))
    return found


def _mean(values: object) -> float:
    return float(np.mean(list(values)))  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=65536)
def _miss(num_relevant: int, num_candidates: int, depth: int) -> float:
    """Probability that none of the first `depth` is relevant."""
    steps = range(min(depth, num_candidates))
    return math.prod(max(0, num_candidates - num_relevant - k) / (num_candidates - k) for k in steps)


@lru_cache(maxsize=65536)
def _reciprocal(num_relevant: int, num_candidates: int) -> float:
    misses = [_miss(num_relevant, num_candidates, k) for k in range(DEPTH + 1)]
    return sum((misses[k] - misses[k + 1]) / (k + 1) for k in range(DEPTH))


def spearman(cosine_Q: np.ndarray, gold_Q: np.ndarray) -> float | None:
    """Correlation of the ranks of cosines with those of gold scores; chance is 0. None where all cosines are alike."""
    return None if np.ptp(cosine_Q) == 0 else float(spearmanr(cosine_Q, gold_Q)[0])  # pyright: ignore[reportArgumentType]


def classification(
    embedding_QD: Tensor, class_Q: Tensor, *, train_ND: Tensor, train_class_N: Tensor, label_CD: Tensor
) -> dict[str, np.ndarray]:
    """Whether a linear probe (logistic regression on the training embeddings) and the nearest label text are right (Q,).

    Chance is 1/C.

    Args:
        embedding_QD: Unit vectors of the judged items.
        class_Q: Their classes, numbers below C.
        train_ND: Unit vectors that the probe is fitted on.
        train_class_N: Their classes.
        label_CD: Unit vectors of the labels' texts.
    """
    # Unit vectors have coordinates of size 1/sqrt(D); without this factor the default regularisation would flatten the probe.
    scale = train_ND.shape[1] ** 0.5
    probe = LogisticRegression(max_iter=1000).fit((train_ND * scale).numpy(), train_class_N.numpy())
    found = {
        "accuracy_probe": probe.predict((embedding_QD * scale).numpy()),
        "accuracy_zero_shot": (embedding_QD @ label_CD.T).argmax(1).numpy(),
    }
    return {name: (classes == class_Q.numpy()).astype(float) for name, classes in found.items()}


def clustering(embedding_QD: Tensor, class_Q: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """V-measure of as many k-means clusters as there are classes (the best of ten starts), and that of shuffled classes.

    Source: Rosenberg and Hirschberg 2007; MTEB's clustering score is the same of samples, by mini-batches.
    """
    means: Any = KMeans(len(np.unique(class_Q)), n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    found = means.fit_predict(embedding_QD.numpy())
    random = np.random.default_rng(seed)
    shuffled = [v_measure_score(random.permutation(class_Q), found) for _ in range(NUM_SHUFFLES)]
    return float(v_measure_score(class_Q, found)), float(np.mean(shuffled))
