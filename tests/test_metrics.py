"""Promises of the measures: equal to ir-measures, torchmetrics, scipy and scikit-learn; chance is what random orders give."""

import ir_measures
import numpy as np
import pytest
import scipy.stats
import torch
from ir_measures import RR, Success, nDCG
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from lightning_modules import metrics

pytestmark = pytest.mark.usefixtures("one_thread")
NAMED = {"recall@1": Success @ 1, "recall@5": Success @ 5, "recall@10": Success @ 10, "mrr@10": RR @ 10, "ndcg@10": nDCG @ 10}


def random_case(num_queries: int, num_candidates: int, seed: int):
    """Scores, and grades from 1 to 3 of some candidates."""
    random = torch.Generator().manual_seed(seed)
    grade = torch.randint(1, 4, (num_queries, num_candidates), generator=random)
    relevant = torch.rand(num_queries, num_candidates, generator=random) < 0.08
    relevant[torch.arange(num_queries), torch.randint(num_candidates, (num_queries,), generator=random)] = True
    return torch.randn(num_queries, num_candidates, generator=random), grade * relevant


def judged(score: torch.Tensor, grade: torch.Tensor):
    """Arguments of the measures: ranks of the relevant, their queries and grades, and how many queries there are."""
    query, candidate = grade.nonzero(as_tuple=True)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)[query, candidate] + 1
    return rank.numpy(), query.numpy(), grade[query, candidate].double().numpy(), len(grade)


def means(score: torch.Tensor, grade: torch.Tensor) -> dict[str, float]:
    return {name: values.mean() for name, values in metrics.retrieval(*judged(score, grade)).items()}


@pytest.mark.parametrize(("num_queries", "num_candidates"), [(30, 50), (5, 200), (9, 4)])
def test_retrieval_measures_equal_ir_measures_query_by_query(num_queries, num_candidates):
    score, grade = random_case(num_queries, num_candidates, num_candidates)
    qrels = [ir_measures.Qrel(str(q), str(c), int(grade[q, c])) for q, c in grade.nonzero().tolist()]
    run = [ir_measures.ScoredDoc(str(q), str(c), score[q, c].item()) for q in range(num_queries) for c in range(num_candidates)]
    measured = metrics.retrieval(*judged(score, grade))
    assert list(measured) == list(NAMED)
    for told in ir_measures.iter_calc(list(NAMED.values()), qrels, run):
        name = next(name for name, measure in NAMED.items() if measure == told.measure)
        assert measured[name][int(told.query_id)] == pytest.approx(told.value, abs=1e-9)


def test_retrieval_measures_equal_torchmetrics():
    score, grade = random_case(40, 60, 7)
    arguments = {"preds": score.sigmoid().flatten(), "indexes": torch.arange(40).repeat_interleave(60)}
    measures = {f"recall@{k}": RetrievalHitRate(top_k=k) for k in (1, 5, 10)} | {"mrr@10": RetrievalMRR(top_k=10)}
    found = means(score, grade)
    for name, measure in measures.items():
        assert found[name] == pytest.approx(measure(target=(grade > 0).flatten(), **arguments).item(), abs=1e-6)
    assert found["ndcg@10"] == pytest.approx(
        RetrievalNormalizedDCG(top_k=10)(target=grade.flatten(), **arguments).item(), abs=1e-6
    )


def test_chance_is_the_mean_over_random_orders():
    _, grade = random_case(6, 25, 1)
    random = torch.Generator().manual_seed(0)
    draws = [means(torch.randn(6, 25, generator=random), grade) for _ in range(1500)]
    _, query, gain, _ = judged(grade, grade)
    for name, chance in metrics.retrieval_chance(query, gain, 6, 25).items():
        # Six queries times 1,500 draws: the standard error is below .006 whatever the measure.
        assert np.mean([draw[name] for draw in draws]) == pytest.approx(chance, abs=0.02)


def test_chance_of_one_target_among_n_is_one_nth():
    chance = metrics.retrieval_chance(np.arange(200), np.ones(200), 200, 200)
    assert chance["recall@1"] == pytest.approx(1 / 200)
    assert chance["recall@10"] == pytest.approx(10 / 200)
    assert chance["mrr@10"] == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 200)
    assert metrics.retrieval_chance(np.array([0]), np.ones(1), 1, 3)["recall@5"] == 1.0


def test_similarity_equals_scipy_and_has_none_where_all_are_alike():
    random = np.random.default_rng(0)
    cosine, gold = random.random(100), random.integers(0, 6, 100)
    assert metrics.spearman(cosine, gold) == pytest.approx(scipy.stats.spearmanr(cosine, gold)[0], abs=1e-9)
    assert metrics.spearman(np.full(100, 0.5), gold) is None


def test_clustering_finds_groups_and_nothing_in_noise():
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(4).repeat(30)
    noise = torch.randn(120, 16, generator=random)
    clear, chance = metrics.clustering(torch.eye(16)[classes] * 10 + noise, np.array(list("abcd"))[classes.numpy()])
    assert clear == pytest.approx(1.0)
    blurred, of_noise = metrics.clustering(noise, classes.numpy())
    assert chance < 0.1
    assert blurred == pytest.approx(of_noise, abs=0.06)


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
    assert measured["accuracy_probe"].mean() == pytest.approx(accuracy_score(judged_class, probe.predict(4 * judged.numpy())))
    nearest = (judged @ centres.T).argmax(1)
    assert measured["accuracy_zero_shot"].mean() == pytest.approx(accuracy_score(judged_class, nearest))
    assert 0.4 < measured["accuracy_zero_shot"].mean() < 1
