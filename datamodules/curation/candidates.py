"""Candidates of a query, as mining leaves them in `meta`, and which of them become its positive and its hard negatives.

    meta["candidates"]  [{"position": 17, "key": "..", "cosine": 0.8, "relevance": 2.4, ..}, ..] into the corpus, nearest first;
                        "is_target" marks the one whose content is the example's own target, its seed

Source: Gecko (arXiv 2403.20327, section 3.2) for positives and negatives relabelled by fused rankings; Gemini Embedding
(arXiv 2503.07891) for the last of the k neighbours; NV-Retriever (arXiv 2407.15831) for the share of the positive's cosine.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.curation.negatives import reciprocal_rank_fusion
from datamodules.job import made_by_of
from datamodules.order import generator
from datamodules.sample import Example
from datamodules.shards import Split

Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """How candidates become a positive and hard negatives.

    Args:
        rankings: Ratings of candidates whose rankings are fused; none ranks them by cosine.
        positive: `best` takes the first of the fused order where it stands before the seed; `seed` leaves the target as it is.
        negatives: From the end of the fused order, from its head, or at random.
        num_negatives: Of a query; fewer where the guards leave fewer.
        max_share: A negative's cosine is at most this share of the positive's; None lets all pass.
        margin: And at least this below it; None lets all pass.
        at_most: Rating to the value above which a candidate is no negative but may be relevant: `{relevance: 1.5}`.
        seed: Of random choices.
    """

    rankings: tuple[str, ...] = ()
    positive: Literal["seed", "best"] = "seed"
    negatives: Literal["last", "first", "random"] = "last"
    num_negatives: int = 1
    max_share: float | None = 0.95
    margin: float | None = None
    at_most: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_negatives < 0 or (self.max_share is not None and not 0 < self.max_share <= 1):
            raise ValueError(f"num_negatives {self.num_negatives}, max_share {self.max_share}; allowed: >= 0, above 0 up to 1")


@dataclass(frozen=True)
class Selected:
    """What was chosen: the new positive (None keeps the seed), the hard negatives, and why others are none."""

    positive: Candidate | None
    negatives: list[Candidate]
    left_out: Counter[str]


def candidates_of(example: Example) -> list[dict[str, Any]]:
    """An example's candidates, its own target among them: where mining did not find it, it has no position.

    Raises:
        ValueError: The example was not mined, or its candidates are damaged.
    """
    meta = example.meta or {}
    found = meta.get("candidates")
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("cosine"), float | int) for one in found
    ):
        raise ValueError(f"example {example.key!r} has no candidates; find them with conf=mine")
    candidates = [dict(one) for one in found]
    if example.target is not None and not any(one.get("is_target") for one in candidates):
        seed = meta.get("seed")
        cosine = seed.get("cosine") if isinstance(seed, dict) else None
        candidates.append({"position": None, "key": example.key, "cosine": cosine, "is_target": True})
    return candidates


def require_corpus(mined: Split, corpus: Split | None) -> None:
    """Raises ValueError when candidates were mined from another corpus, or from this one as it was before."""
    made_by = made_by_of(mined)
    if corpus is not None and made_by.get("corpus_digest") not in (None, corpus.digest):
        raise ValueError(f"{mined.folder} was mined from {made_by.get('corpus')} and not from {corpus.folder} as it is now")


def fused(candidates: Sequence[Candidate], rankings: Sequence[str]) -> list[float]:
    """Reciprocal rank fusion of candidates by some of their ratings, or by cosine where none is named.

    Of equal ratings the earlier candidate, which is the nearer one, ranks first.

    Raises:
        ValueError: A candidate lacks a rating.
    """
    ranks = []
    for name in rankings or ("cosine",):
        if any(candidate.get(name) is None for candidate in candidates):
            known = ", ".join(sorted({key for one in candidates for key in one} - {"position", "key", "is_target"}))
            raise ValueError(f"a candidate has no {name!r} to be ranked by, but {known}; rate them with conf=rate_candidates")
        order = sorted(range(len(candidates)), key=lambda n: -candidates[n][name])
        rank = [0] * len(candidates)
        for place, n in enumerate(order, 1):
            rank[n] = place
        ranks.append(rank)
    return reciprocal_rank_fusion(ranks)


def select(example: Example, candidates: Sequence[Candidate], selection: Selection) -> Selected:
    """The positive and the hard negatives of an example.

    The seed is never a negative, nor is what stands before the positive in the fused order.

    Args:
        example: Its key seeds what is random.
        candidates: `candidates_of` it, rated where rankings are fused.
        selection: How.
    """
    left_out = Counter[str]()
    if not candidates:
        return Selected(None, [], left_out)
    scores = fused(candidates, selection.rankings)
    order = sorted(range(len(candidates)), key=lambda n: -scores[n])
    seed = next((n for n in order if candidates[n].get("is_target")), None)
    best = order[0]
    is_new = best != seed and (seed is None or (selection.positive == "best" and scores[best] > scores[seed]))
    positive = best if is_new else seed
    assert positive is not None
    allowed = []
    for n in order[order.index(positive) + 1 :] if selection.rankings else [n for n in order if n != positive]:
        cause = None if n == seed else _guarded(candidates[n], candidates[positive], selection)
        if cause is None and n != seed:
            allowed.append(n)
        elif cause is not None:
            left_out[cause] += 1
    wanted = min(selection.num_negatives, len(allowed))
    match selection.negatives:
        case "first":
            chosen = allowed[:wanted]
        case "last":
            chosen = allowed[len(allowed) - wanted :][::-1]
        case "random":
            drawn = generator(selection.seed, f"negatives {example.key}").choice(len(allowed), wanted, replace=False)
            chosen = [allowed[int(n)] for n in drawn]
    return Selected(candidates[best] if is_new else None, [candidates[n] for n in chosen], left_out)


def _guarded(candidate: Candidate, positive: Candidate, selection: Selection) -> str | None:
    """Why a candidate may be relevant, so that it cannot be a negative; None if it may not."""
    for name, most in selection.at_most.items():
        if candidate.get(name) is None:
            raise ValueError(f"at_most names {name!r}, which candidates do not have; rate them with conf=rate")
        if candidate[name] > most:
            return f"{name} above {most:g}"
    if candidate.get("content") is not None and candidate["content"] == positive.get("content"):
        return "equal to the positive"
    cosine, reference = candidate["cosine"], positive.get("cosine")
    if reference is None:
        return None
    if selection.max_share is not None and cosine > reference - (1 - selection.max_share) * abs(reference):
        return f"cosine above {selection.max_share:g} of the positive's"
    if selection.margin is not None and cosine > reference - selection.margin:
        return f"cosine within {selection.margin:g} of the positive's"
    return None
