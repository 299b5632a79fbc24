"""Promises of mining's choices: hand-made candidates whose positive, negatives and drops are known."""

import pytest

from datamodules.curation.candidates import Selection, candidates_of, fused, require_corpus, select
from datamodules.sample import Example, text_item
from datamodules.shards import Split, write_split


def candidate(key: str, cosine: float, **more) -> dict:
    return {"position": ord(key), "key": key, "cosine": cosine, **more}


def example(*candidates: dict, seed: float | None = None, target: bool = True) -> Example:
    meta = {"candidates": list(candidates)} | ({} if seed is None else {"seed": {"cosine": seed}})
    return Example("k", text_item("q"), text_item("t") if target else None, meta=meta)


FIVE = [
    candidate("a", 0.9, relevance=3.0, likelihood=-12.0),
    candidate("b", 0.8, relevance=1.0, likelihood=-5.0, is_target=True),
    candidate("c", 0.7, relevance=2.0, likelihood=-30.0),
    candidate("d", 0.5, relevance=0.0, likelihood=-9.0),
    candidate("e", 0.4, relevance=0.5, likelihood=-20.0),
]


def chosen(selection: Selection, candidates: list[dict] = FIVE) -> tuple[str | None, str]:
    found = select(example(*candidates), candidates, selection)
    return None if found.positive is None else found.positive["key"], "".join(one["key"] for one in found.negatives)


def test_ranks_are_fused_as_the_golden_values_say():
    """equations.md: ranks [1,2,3,4,5] and [3,1,5,2,4]."""
    golden = [0.03226646, 0.03252247, 0.03125763, 0.03175403, 0.03100962]
    rated = [
        candidate(key, 1 - n / 10, one=-n, other=-rank)
        for n, (key, rank) in enumerate(zip("abcde", (3, 1, 5, 2, 4), strict=True))
    ]
    assert fused(rated, ("one", "other")) == pytest.approx(golden, abs=1e-8)


def test_of_equal_ratings_the_nearer_one_ranks_first():
    assert fused([candidate("a", 0.9, r=1), candidate("b", 0.8, r=2), candidate("c", 0.7, r=1)], ("r",)) == [
        1 / 62,
        1 / 61,
        1 / 63,
    ]


def test_the_best_neighbour_becomes_the_positive_and_the_last_one_the_hard_negative():
    """Relevance ranks a c b e d, likelihood b d a e c; fused: a 1/61 + 1/63, b 1/63 + 1/61, then c, d, e; a is the nearer."""
    both = {"rankings": ("relevance", "likelihood"), "max_share": None}
    scores = fused(FIVE, both["rankings"])
    assert scores == pytest.approx([1 / 61 + 1 / 63, 1 / 63 + 1 / 61, 1 / 62 + 1 / 65, 1 / 65 + 1 / 62, 1 / 64 + 1 / 64])
    assert chosen(Selection(**both, positive="best")) == (None, "e")  # a does not beat the seed, it is as good
    better = [{**one, "relevance": 2.5} if one["key"] == "b" else one for one in FIVE]
    worse = [{**one, "likelihood": -10.0} if one["key"] == "b" else one for one in FIVE]
    assert chosen(Selection(**both, positive="best"), better) == (None, "e")
    assert chosen(Selection(**both, positive="best"), worse) == ("a", "e")
    assert chosen(Selection(**both, positive="seed"), worse)[0] is None


def test_several_negatives_from_either_end_or_at_random():
    by_relevance = {"rankings": ("relevance",), "max_share": None, "positive": "best"}  # a c b e d
    assert chosen(Selection(**by_relevance, num_negatives=2)) == ("a", "de")
    assert chosen(Selection(**by_relevance, num_negatives=9)) == ("a", "dec")  # b, the seed, is never one
    assert chosen(Selection(**by_relevance, negatives="first", num_negatives=2)) == ("a", "ce")
    assert chosen(Selection(**by_relevance, num_negatives=0)) == ("a", "")
    drawn = {chosen(Selection(**by_relevance, negatives="random", seed=seed))[1] for seed in range(40)}
    assert drawn == {"c", "d", "e"}
    assert len({chosen(Selection(**by_relevance, negatives="random"))[1] for _ in range(5)}) == 1


def test_what_stands_before_the_positive_is_no_negative():
    assert chosen(Selection(rankings=("relevance",), max_share=None, num_negatives=9)) == (None, "de")  # after b: e, d


def test_without_ratings_the_cosine_ranks():
    assert chosen(Selection(max_share=None)) == (None, "e")
    assert chosen(Selection(max_share=None, positive="best")) == ("a", "e")
    assert chosen(Selection(max_share=None, negatives="first")) == (None, "a")


def test_guards_leave_out_what_may_be_relevant_and_count_it():
    found = select(example(*FIVE), FIVE, Selection(num_negatives=9, max_share=0.875))  # of b's 0.8: 0.7
    assert [one["key"] for one in found.negatives] == ["e", "d", "c"]
    assert found.left_out == {"cosine above 0.875 of the positive's": 1}
    found = select(example(*FIVE), FIVE, Selection(num_negatives=9, max_share=None, margin=0.25))
    assert [one["key"] for one in found.negatives] == ["e", "d"]
    assert found.left_out == {"cosine within 0.25 of the positive's": 2}
    found = select(
        example(*FIVE), FIVE, Selection(num_negatives=9, max_share=None, at_most={"relevance": 0.5, "likelihood": -10})
    )
    assert [one["key"] for one in found.negatives] == ["e"]
    assert found.left_out == {"relevance above 0.5": 2, "likelihood above -10": 1}


def test_the_guards_hold_below_zero_too_and_for_the_positives_own_content():
    cold = [candidate("a", -0.19, content=1), candidate("b", -0.2, is_target=True, content=2), candidate("c", -0.9, content=2)]
    found = select(example(*cold), cold, Selection(num_negatives=9, max_share=0.9))
    assert not found.negatives
    assert found.left_out == {"cosine above 0.9 of the positive's": 1, "equal to the positive": 1}


def test_a_seed_that_was_not_found_is_a_candidate_too():
    rest = [one for one in FIVE if one["key"] != "b"]
    found = candidates_of(example(*rest, seed=0.3))
    assert found[-1] == {"position": None, "key": "k", "cosine": 0.3, "is_target": True}
    assert select(example(*rest), found, Selection(positive="best", max_share=None)).positive == rest[0]
    assert select(example(*rest), found, Selection(max_share=None)).positive is None
    assert not any(one.get("is_target") for one in candidates_of(example(*rest, target=False)))


def test_without_a_seed_the_first_is_the_positive():
    rest = [one for one in FIVE if one["key"] != "b"]
    found = select(example(*rest, target=False), rest, Selection(max_share=None, num_negatives=2))
    assert found.positive == rest[0]
    assert [one["key"] for one in found.negatives] == ["e", "d"]
    assert select(example(target=False), [], Selection()).positive is None


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="'k' has no candidates; find them with conf=mine"):
        candidates_of(Example("k", text_item("q")))
    with pytest.raises(ValueError, match="no 'grade' to be ranked by, but cosine, likelihood, relevance; rate them"):
        chosen(Selection(rankings=("grade",)))
    with pytest.raises(ValueError, match="at_most names 'grade'"):
        chosen(Selection(at_most={"grade": 1}))
    with pytest.raises(ValueError, match="max_share 0"):
        Selection(max_share=0)


def test_candidates_of_another_corpus_are_refused(tmp_path):
    for name in "ab":
        write_split(tmp_path / name, [Example("k", target=text_item(name))])
    mined = {"made_by": {"stage": "mine", "corpus": "a", "corpus_digest": Split(tmp_path / "a").digest}}
    write_split(tmp_path / "mined", [example(*FIVE)], about=mined)
    require_corpus(Split(tmp_path / "mined"), Split(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"mined was mined from a and not from .*b as it is now"):
        require_corpus(Split(tmp_path / "mined"), Split(tmp_path / "b"))
