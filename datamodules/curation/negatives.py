"""Rank fusion for mining: several rankings of the same candidates become one."""

from collections.abc import Sequence


def reciprocal_rank_fusion(rankings: Sequence[Sequence[int]], *, k: int = 60) -> list[float]:
    """Fused score of every candidate, the higher the better: Σ over rankings of 1 / (k + rank).

    Args:
        rankings: For each ranking the rank of every candidate, from 1.
        k: Damps the head of the rankings; 60 in Cormack et al. 2009, as used by Gemini Embedding (arXiv 2503.07891).

    Raises:
        ValueError: The rankings rank different numbers of candidates.
    """
    if len({len(ranking) for ranking in rankings}) != 1:
        raise ValueError(f"the rankings rank {[len(ranking) for ranking in rankings]} candidates; all must rank the same")
    return [sum(1 / (k + rank) for rank in ranks) for ranks in zip(*rankings, strict=True)]
