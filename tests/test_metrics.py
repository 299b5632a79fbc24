"""Promises of the measures: equal to ir-measures, scipy and scikit-learn; chance equals what random orders give."""

import ir_measures
import pytest
import scipy.stats
import torch
from ir_measures import RR, Success, nDCG
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from lightning_modules import metrics


def random_case(num_queries: int, num_candidates: int, seed: int):
    random = torch.Generator().manual_seed(seed)
    relevant = torch.rand(num_queries, num_candidates, generator=random) < 0.08
    relevant[torch.arange(num_queries), torch.randint(num_candidates, (num_queries,), generator=random)] = True
    return torch.randn(num_queries, num_candidates, generator=random), relevant


@pytest.mark.parametrize(("num_queries", "num_candidates"), [(30, 50), (5, 200), (9, 4)])
def test_retrieval_measures_equal_ir_measures(num_queries, num_candidates):
    score, relevant = random_case(num_queries, num_candidates, num_candidates)
    qrels = [ir_measures.Qrel(str(q), str(c), 1) for q, c in relevant.nonzero().tolist()]
    run = [ir_measures.ScoredDoc(str(q), str(c), score[q, c].item()) for q in range(num_queries) for c in range(num_candidates)]
    expected = ir_measures.calc_aggregate([Success @ 1, Success @ 5, Success @ 10, RR @ 10, nDCG @ 10], qrels, run)
    named = {
        "recall@1": Success @ 1,
        "recall@5": Success @ 5,
        "recall@10": Success @ 10,
        "mrr@10": RR @ 10,
        "ndcg@10": nDCG @ 10,
    }
    measured = metrics.retrieval(score, relevant)
    assert list(measured) == list(named)
    for name, measure in named.items():
        assert measured[name] == pytest.approx(expected[measure], abs=1e-6)


def test_chance_is_the_mean_over_random_orders():
    _, relevant = random_case(6, 25, 1)
    random = torch.Generator().manual_seed(0)
    draws = [metrics.retrieval(torch.randn(6, 25, generator=random), relevant) for _ in range(1500)]
    for name, chance in metrics.retrieval_chance(relevant).items():
        # Six queries times 1,500 draws: the standard error is below .006 whatever the measure.
        assert sum(draw[name] for draw in draws) / len(draws) == pytest.approx(chance, abs=0.02)


def test_chance_of_one_target_among_n_is_one_nth():
    chance = metrics.retrieval_chance(torch.eye(200, dtype=torch.bool))
    assert chance["recall@1"] == pytest.approx(1 / 200)
    assert chance["recall@10"] == pytest.approx(10 / 200)
    assert chance["mrr@10"] == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 200)


def test_similarity_equals_scipy():
    random = torch.Generator().manual_seed(0)
    cosine, gold = torch.rand(100, generator=random), torch.randint(0, 6, (100,), generator=random)
    expected = scipy.stats.spearmanr(cosine.numpy(), gold.numpy())[0]
    assert metrics.similarity(cosine, gold)["spearman"] == pytest.approx(expected, abs=1e-6)


def test_classification_equals_scikit_learn():
    random = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(5, 16, generator=random), dim=-1)
    train_class, judged_class = torch.randint(0, 5, (2, 200), generator=random)
    train, judged = (
        torch.nn.functional.normalize(centres[c] + 0.4 * torch.randn(200, 16, generator=random), dim=-1)
        for c in (train_class, judged_class)
    )
    measured = metrics.classification(judged, judged_class, train_ND=train, train_class_N=train_class, label_CD=centres)
    probe = LogisticRegression(max_iter=1000).fit(4 * train.numpy(), train_class.numpy())
    assert measured["accuracy_probe"] == pytest.approx(accuracy_score(judged_class, probe.predict(4 * judged.numpy())))
    nearest = (judged @ centres.T).argmax(1)
    assert measured["accuracy_zero_shot"] == pytest.approx(accuracy_score(judged_class, nearest))
    assert 0.4 < measured["accuracy_zero_shot"] < 1


def test_an_encoder_that_tells_nothing_apart_scores_nothing():
    measured = metrics.retrieval(torch.ones(200, 200), torch.eye(200, dtype=torch.bool))
    assert measured == dict.fromkeys(measured, 0.0)


def test_scores_do_not_depend_on_their_scale_or_sign():
    score, relevant = random_case(20, 40, 3)
    assert metrics.retrieval(score * 1e-3 - 5, relevant) == metrics.retrieval(score, relevant)
