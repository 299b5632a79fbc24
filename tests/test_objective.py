"""Promises of the objective: golden values, a plain sum of its named terms, centring that leaves nothing behind, a true log."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.contrastive
from datamodules.curation.negatives import reciprocal_rank_fusion
from experiments.bench.loss import peak_bytes
from kernels.contrastive import ContrastiveLoss, contrastive_loss
from kernels.spread_out import spread_out_loss
from lightning_modules.objective.health import CollapseWatch, first_line, guarded_share, health
from lightning_modules.objective.objective import Objective, ObjectiveConfig, Vectors
from lightning_modules.objective.queue import Queue

RANDOM = torch.Generator().manual_seed(0)
QUERY, TARGET = torch.randn(2, 6, 8, generator=RANDOM)
IDS: dict[str, Any] = {"query_id": torch.arange(6), "target_id": torch.tensor([0, 1, 1, 3, 4, 5])}
HARD: dict[str, Any] = {
    "negative_MD": torch.randn(4, 8, generator=RANDOM),
    "negative_id": torch.tensor([1, 9, 10, 11]),
    "negative_row": torch.tensor([1, 1, 3, 5]),
}


def objective(prefixes: tuple[int, ...] = (4, 8), width: int = 8, **config: Any) -> Objective:
    return Objective(ObjectiveConfig(**config), prefixes=prefixes, embedding_dim=width)


def golden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, positives and hard negatives (4, 8) of the golden values (equations.md)."""
    i, k = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    query = torch.sin(0.7 * i + 1.3 * k + 0.1)
    return query, query + 0.5 * torch.cos(2.1 * i - 0.4 * k), query + 0.8 * torch.sin(1.9 * i + 0.6 * k + 0.5)


DISTINCT, TARGETS_EQUAL, QUERIES_EQUAL = [0, 1, 2, 3], [0, 1, 1, 3], [0, 1, 0, 3]


@pytest.mark.parametrize(
    ("config", "has_negatives", "query_id", "target_id", "prefixes", "expected"),
    [
        ({}, False, DISTINCT, DISTINCT, (8,), (0.8294245053, 0.0388830182)),
        ({}, True, DISTINCT, DISTINCT, (8,), (1.1336564624, 0.2144445039)),
        ({}, True, DISTINCT, TARGETS_EQUAL, (8,), (1.0307307356, 0.2091857092)),
        ({}, True, QUERIES_EQUAL, TARGETS_EQUAL, (8,), (0.9855349240, 0.2091854010)),
        ({"hardness": 5.0}, True, DISTINCT, DISTINCT, (8,), (3.7911504506, 2.1138166407)),
        ({}, True, QUERIES_EQUAL, TARGETS_EQUAL, (2, 4, 8), (3.1507510374, 1.8937052175)),
        ({"negatives": "all"}, True, DISTINCT, DISTINCT, (8,), (1.4293191707, 0.2220946452)),
    ],
)
def test_the_contrastive_term_has_its_golden_values(config, has_negatives, query_id, target_id, prefixes, expected):
    query, target, negative = golden()
    hard = {"negative_MD": negative, "negative_id": torch.arange(10, 14), "negative_row": torch.arange(4)}
    ids = {"query_id": torch.tensor(query_id), "target_id": torch.tensor(target_id)}
    for temperature, value in zip((0.5, 0.05), expected, strict=True):
        term = objective(prefixes, spread_out=0.0, temperature=temperature, **config)
        assert term(query, target, **ids, **(hard if has_negatives else {})).total.item() == pytest.approx(value, abs=6e-11)


def test_the_spread_out_term_has_its_golden_values():
    query, target, _ = golden()
    for prefixes, value in (((8,), 0.5024903094), ((2, 4, 8), 2.0029874798)):
        out = objective(prefixes, contrastive=0.0)(query, target, query_id=torch.arange(4), target_id=torch.arange(4))
        assert out.total.item() == pytest.approx(value, abs=6e-11)
        assert not any(name.startswith("loss@") for name in out.parts)


def test_the_total_is_the_weighted_sum_of_the_terms():
    out = objective(contrastive=0.7, spread_out=0.3, temperature=0.1)(QUERY, TARGET, **IDS)
    contrastive = contrastive_loss(
        QUERY, TARGET, prefixes=(4, 8), temperature=0.1, query_id=IDS["query_id"], passage_id=IDS["target_id"]
    )
    spread = spread_out_loss(QUERY, prefixes=(4, 8)) + spread_out_loss(TARGET, prefixes=(4, 8), ids=IDS["target_id"])
    assert out.total.item() == pytest.approx((0.7 * contrastive.loss + 0.3 * spread.sum()).item(), rel=1e-6)
    assert out.parts["loss"].item() == pytest.approx(out.total.item())
    assert [out.parts[f"loss@{prefix}"].item() for prefix in (4, 8)] == contrastive.per_prefix.tolist()
    assert [out.parts[f"spread_out@{prefix}"].item() for prefix in (4, 8)] == pytest.approx(spread.tolist())


@settings(max_examples=30, deadline=None)
@given(
    weights=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3).filter(any),
    switches=st.fixed_dictionaries(
        {
            "negatives": st.sampled_from(["own", "all"]),
            "directions": st.sampled_from(["query", "both"]),
            "hardness": st.sampled_from([0.0, 5.0]),
            "centring": st.sampled_from([0.0, 1.0]),
            "matching_distance": st.sampled_from(["cosine", "l2"]),
            "teacher_dim": st.sampled_from([None, 5]),
        }
    ),
    learns_temperature=st.booleans(),
    queue=st.sampled_from([0, 3, 20]),
    has_negatives=st.booleans(),
    is_taught=st.booleans(),
)
def test_any_choice_of_terms_is_the_weighted_sum_of_the_parts_in_its_log(
    weights, switches, learns_temperature, queue, has_negatives, is_taught
):
    contrastive, spread_out, matching = weights
    kept = {"learn_temperature": learns_temperature, "queue": queue} if contrastive else {}
    term = objective(contrastive=contrastive, spread_out=spread_out, matching=matching, **switches, **kept)
    leaves = {"query_BD": QUERY, "target_BD": TARGET, **({"negative_MD": HARD["negative_MD"]} if has_negatives else {})}
    arguments = IDS | ({name: HARD[name] for name in ("negative_id", "negative_row")} if has_negatives else {})
    if is_taught:
        arguments |= {"query_vector": torch.ones(6, switches["teacher_dim"] or 8), "target_vector": None}
    for _ in range(2):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        out = term(**leaves, **arguments, progress=0.5)
        parts = {name: value.item() for name, value in out.parts.items()}
        sums = [sum(value for name, value in parts.items() if name.startswith(of)) for of in ("loss@", "spread_out@")]
        sums.append(sum(parts.get(f"matching_{column}", 0.0) for column in ("query", "target", "negative")))
        assert out.total.item() == pytest.approx(sum(w * s for w, s in zip(weights, sums, strict=True)), rel=1e-5)
        assert parts["loss"] == out.total.item()
        out.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in (*term.parameters(), leaves["query_BD"]))


def test_centring_fades_out_and_takes_a_common_direction_away():
    centred = objective(centring=0.5)
    plain = objective()(QUERY, TARGET, **IDS).total
    assert centred(QUERY, TARGET, **IDS, progress=0.5).total.item() == plain.item()
    assert centred(QUERY, TARGET, **IDS, progress=0.25).total.item() != plain.item()
    unit = [F.normalize(x, dim=-1) for x in (QUERY, TARGET)]
    by_hand = contrastive_loss(
        *(x - 0.5 * x.mean(0) for x in unit), prefixes=(4, 8), temperature=0.05, passage_id=IDS["target_id"]
    )
    halfway = centred(QUERY, TARGET, **IDS, progress=0.25).parts
    assert [halfway["loss@4"].item(), halfway["loss@8"].item()] == pytest.approx(by_hand.per_prefix.tolist())


def test_the_log_counts_masked_pairs_and_cosines():
    parts = objective(centring=1.0)(QUERY, TARGET, **IDS, **HARD).parts
    assert parts["dropped_negatives"].item() == 1
    assert parts["masked_share"].item() == pytest.approx(2 / 30)
    assert parts["positive_cosine"].item() == pytest.approx(torch.cosine_similarity(QUERY, TARGET).mean().item(), abs=1e-6)
    assert parts["duplicate_share"].item() == pytest.approx(2 / 6)
    assert parts["candidates"].item() == pytest.approx(1 + 28 / 6 + 3 / 6)


def test_both_directions_add_the_query_for_a_target():
    one, both = (objective(spread_out=0.0, directions=way)(QUERY, TARGET, **IDS).total for way in ("query", "both"))
    turned = {"query_id": IDS["target_id"], "target_id": IDS["query_id"]}
    back = objective(spread_out=0.0)(TARGET, QUERY, **turned).total
    assert both.item() == pytest.approx((one + back).item())


def test_a_learnt_temperature_gets_a_gradient_and_is_logged():
    term = objective(temperature=0.1, learn_temperature=True)
    out = term(QUERY, TARGET, **IDS)
    out.total.backward()
    assert term.log_temperature is not None
    assert term.log_temperature.grad is not None
    assert term.log_temperature.grad.item() != 0
    assert out.parts["temperature"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"centring": 1.5}, "must lie in"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"contrastive": 0.0, "spread_out": 0.0}, "one of them above"),
        ({"matching": -1.0}, "at least 0"),
        ({"contrastive": 0.0, "queue": 8}, "queue belongs to the contrastive term"),
        ({"queue": -1}, "queue is -1"),
        ({"margin": 3.0}, "margin is 3"),
        ({"teacher_dim": 4, "teacher_prefix": True}, "give one of them"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**config)


def test_queries_without_their_own_targets_are_refused():
    with pytest.raises(ValueError, match="6 queries for 5 targets"):
        objective()(QUERY, TARGET[:5], query_id=torch.arange(6), target_id=torch.arange(5))


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_matching_is_the_mean_distance_to_the_teacher_of_what_it_has_vectors_for(distance):
    teacher = torch.randn(6, 8, generator=RANDOM)
    gaps = teacher.clone()
    gaps[[0, 4]] = torch.nan
    term = objective(contrastive=0.0, spread_out=0.0, matching=2.0, matching_distance=distance)
    query = QUERY.clone().requires_grad_()
    out = term(query, TARGET, **IDS, **HARD, query_vector=gaps, negative_vector=teacher[:4])

    def mean(student, rows):
        values = []
        for row in rows:
            if distance == "cosine":
                values.append(1 - torch.cosine_similarity(student[row], teacher[row], dim=0).item())
            else:
                values.append(sum((student[row, d] - teacher[row, d]).item() ** 2 for d in range(8)))
        return sum(values) / len(values)

    expected = [mean(QUERY, [1, 2, 3, 5]), 0.0, mean(HARD["negative_MD"], range(4))]
    found = [out.parts[f"matching_{column}"].item() for column in ("query", "target", "negative")]
    assert found == pytest.approx(expected, rel=1e-5)
    assert out.total.item() == pytest.approx(2 * sum(expected), rel=1e-5)
    assert out.parts["matching_left_out"].item() == 2 + 6
    out.total.backward()
    assert query.grad is not None
    assert [row.any().item() for row in query.grad] == [False, True, True, True, False, True]


def test_a_teacher_of_another_width_is_cut_or_mapped_to_or_refused():
    wide, narrow = torch.randn(6, 12, generator=RANDOM), torch.randn(6, 3, generator=RANDOM)
    only: dict[str, Any] = {"contrastive": 0.0, "spread_out": 0.0, "matching": 1.0}
    cut = objective(**only, teacher_prefix=True)
    for teacher, width in ((wide, 8), (narrow, 3)):
        expected = (1 - torch.cosine_similarity(QUERY[:, :width], teacher[:, :width])).mean()
        assert cut(QUERY, TARGET, **IDS, query_vector=teacher).total.item() == pytest.approx(expected.item(), rel=1e-5)
    mapped = objective(**only, teacher_dim=12)
    assert mapped.matching is not None
    assert mapped.matching.map is not None
    out = mapped(QUERY, TARGET, **IDS, query_vector=wide)
    expected = (1 - torch.cosine_similarity(QUERY @ mapped.matching.map.weight.T, wide)).mean()
    assert out.total.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"width 12, the embedding has 8.*teacher_dim=12"):
        objective(**only)(QUERY, TARGET, **IDS, query_vector=wide)
    with pytest.raises(ValueError, match="teacher_dim is 12"):
        mapped(QUERY, TARGET, **IDS, query_vector=narrow)


def test_past_targets_of_the_task_are_further_candidates_that_the_mask_knows():
    term = objective(spread_out=0.0, queue=4, temperature=0.2)
    first = term(QUERY, TARGET, **IDS, task="a").total
    other = term(QUERY, TARGET, **IDS, task="b").total
    assert first.item() == other.item()
    ids = {"query_id": torch.tensor([3, 7, 8]), "target_id": torch.tensor([6, 5, 8])}
    second = term(QUERY[:3], TARGET[3:], **ids, task="a")
    kept = [2, 3, 4, 5]  # the last four in the order of their content
    by_hand = contrastive_loss(
        QUERY[:3],
        torch.cat([TARGET[3:], TARGET[kept]]),
        prefixes=(4, 8),
        temperature=0.2,
        query_id=torch.cat([ids["query_id"], IDS["query_id"][kept]]),
        passage_id=torch.cat([ids["target_id"], IDS["target_id"][kept]]),
    )
    assert second.total.item() == pytest.approx(by_hand.loss.item(), rel=1e-6)
    assert second.parts["candidates"].item() == 3 + 4


def test_what_is_kept_of_a_batch_does_not_depend_on_its_order_and_survives_a_checkpoint():
    orders = [torch.arange(6), torch.tensor([5, 2, 0, 4, 1, 3])]
    queues = [Queue(4), Queue(4)]
    for queue, order in zip(queues, orders, strict=True):
        for _ in range(2):
            queue.push("a/b.c", TARGET[order], IDS["query_id"][order], IDS["target_id"][order])
    restored = Queue(4)
    restored.push("elsewhere", TARGET, IDS["query_id"], IDS["target_id"])
    restored.load_state_dict(queues[0].state_dict())
    assert restored.of("elsewhere") is None
    for left, right in ((queues[0], queues[1]), (queues[0], restored)):
        assert all(torch.equal(x, y) for x, y in zip(left.of("a/b.c") or (), right.of("a/b.c") or (), strict=True))
    assert len(queues[0].state_dict()) == 3


def test_nothing_is_kept_while_nothing_is_trained():
    term = objective(queue=4)
    with torch.no_grad():
        term(QUERY, TARGET, **IDS)
    term.eval()(QUERY, TARGET, **IDS)
    assert not term.state_dict()


@pytest.mark.parametrize("margin", [-0.3, 0.0, 0.4])
def test_the_guarded_share_is_that_of_pairs_nearer_than_the_own_by_more_than_the_margin(margin):
    query_id = torch.tensor([0, 0, 2, 3, 4, 5])
    columns = torch.cat([TARGET, QUERY[:2]])
    ids = (torch.cat([query_id, torch.tensor([8, 3])]), torch.cat([IDS["target_id"], torch.tensor([4, 9])]))
    found = guarded_share(QUERY[2:5], columns, *ids, offset=2, margin=margin)
    cosine = torch.cosine_similarity(QUERY[:, None], columns, dim=-1)
    guarded = [
        (i, j)
        for i in (2, 3, 4)
        for j in range(8)
        if ids[0][i] != ids[0][j] and ids[1][i] != ids[1][j] and cosine[i, j] > cosine[i, i] + margin
    ]
    assert found.item() == pytest.approx(len(guarded) / (3 * 7))


def test_with_a_margin_nearer_candidates_do_not_count():
    out = objective((8,), spread_out=0.0, margin=0.1, temperature=0.2)(QUERY, TARGET, **IDS)
    cosine = torch.cosine_similarity(QUERY[:, None], TARGET, dim=-1)
    losses, num_guarded = [], 0
    for i in range(6):
        others = [j for j in range(6) if IDS["target_id"][i] != IDS["target_id"][j]]
        seen = [j for j in others if cosine[i, j] <= cosine[i, i] + 0.1]
        num_guarded += len(others) - len(seen)
        losses.append(math.log1p(sum(math.exp((cosine[i, j] - cosine[i, i]).item() / 0.2) for j in seen)))
    assert out.total.item() == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert out.parts["guarded_share"].item() == pytest.approx(num_guarded / 30)
    assert num_guarded


@pytest.mark.parametrize(
    ("device", "is_on", "reached"), [("cuda", True, "triton"), ("cuda", False, "chunked"), ("cpu", True, "chunked")]
)
def test_under_autocast_on_a_gpu_the_loss_is_tritons(device, is_on, reached, monkeypatch):
    """Encoders' vectors are fp32; what autocast would multiply in bf16 is what the kernel takes."""
    asked = []

    def solve(problem: Any, implementation: str) -> ContrastiveLoss:
        asked.append((implementation, problem.query_BD.dtype, problem.passage_ND.dtype, problem.negative_MD.dtype))
        zero = problem.query_BD.float().sum()
        return ContrastiveLoss(zero, zero.expand(2))

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: is_on)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: torch.bfloat16)
    monkeypatch.setattr(kernels.contrastive, "solve", solve)
    monkeypatch.setattr(kernels.contrastive, "_check", lambda problem: None)  # it looks at values, which fake tensors lack
    monkeypatch.setattr(kernels.contrastive, "_why_not_triton", lambda device, dtype: None)
    with FakeTensorMode():
        vectors = torch.ones(2, 6, 8, device=device)
        ids = torch.zeros(6, dtype=torch.long, device=device)
        given = Vectors(vectors[0], vectors[1], ids, ids, slice(0, 6), vectors[1], ids, ids)
        objective()._contrastive(given, None)
    assert asked == [(reached, *[torch.bfloat16 if reached == "triton" else torch.float32] * 3)]


def test_a_value_that_is_not_finite_makes_the_total_nan_and_reaches_every_parameter():
    term = objective(learn_temperature=True, matching=1.0, teacher_dim=5)
    query = QUERY.clone()
    query[0, 0] = torch.inf
    out = term(query, TARGET, **IDS)
    out.total.backward()
    assert out.total.isnan()
    assert all(p.grad is not None for p in term.parameters())


def test_the_first_loss_is_told_beside_that_of_chance():
    query, target = torch.ones(64, 8), torch.ones(64, 8)
    ids = {"query_id": torch.arange(64), "target_id": torch.arange(64)}
    for directions, line in (
        ("query", "first loss 4.16 at prefix 4; log of 64 candidates is 4.16"),
        ("both", "first loss 8.32 at prefix 4; log of 64 candidates, both ways, is 8.32"),
    ):
        parts = objective(directions=directions)(query, target, **ids).parts
        assert first_line({k: v.item() for k, v in parts.items()}, 4, both=directions == "both") == line


def test_a_collapse_is_told_once_in_a_hundred_steps_while_it_lasts():
    watch, collapsed = CollapseWatch(), {"pairwise_cosine": 0.995, "query_pairwise_cosine": 0.995}
    told = [watch.see(collapsed) for _ in range(250)]
    assert [step for step, line in enumerate(told, start=1) if line] == [100, 200]
    assert "embeddings have collapsed: for 100 steps" in str(told[99])
    assert watch.is_collapsed
    watch.see(collapsed | {"query_pairwise_cosine": 0.5})
    assert not watch.is_collapsed


def test_rank_fusion_has_its_golden_values():
    fused = reciprocal_rank_fusion([[1, 2, 3, 4, 5], [3, 1, 5, 2, 4]])
    assert fused == pytest.approx([0.03226646, 0.03252247, 0.03125763, 0.03175403, 0.03100962], abs=5e-9)
    with pytest.raises(ValueError, match="all must rank the same"):
        reciprocal_rank_fusion([[1, 2], [1]])


@pytest.mark.parametrize("contents", [1, 3, 40])
def test_the_log_of_a_batch_equals_that_of_the_written_mask(contents):
    generator = torch.Generator().manual_seed(contents)
    query, target = torch.randn(20, 8, generator=generator), torch.randn(20, 8, generator=generator)
    query_id, target_id = (torch.randint(0, contents, (20,), generator=generator) for _ in range(2))
    parts = health(query, target, query_id, target_id)
    places = [(i, j) for i in range(20) for j in range(20)]

    def mean(x, y, pairs):
        cosine = torch.cosine_similarity(x[:, None], y, dim=-1)
        return pytest.approx(sum(cosine[pair].item() for pair in pairs) / max(len(pairs), 1), abs=1e-6)

    seen = [(i, j) for i, j in places if query_id[i] != query_id[j] and target_id[i] != target_id[j]]
    assert parts["negative_cosine"].item() == mean(query, target, seen)
    assert parts["masked_share"].item() == pytest.approx(1 - len(seen) / (20 * 19))
    for name, x, ids in (("pairwise_cosine", target, target_id), ("query_pairwise_cosine", query, query_id)):
        assert parts[name].item() == mean(x, x, [(i, j) for i, j in places if ids[i] != ids[j]])
    repeated = sum(target_id.tolist().count(content) > 1 for content in target_id.tolist())
    assert parts["duplicate_share"].item() == pytest.approx(repeated / 20)


def test_no_matrix_of_rows_by_rows_is_made():
    rows = 6000
    query, target = (torch.randn(rows, 16).requires_grad_() for _ in range(2))
    ids = {"query_id": torch.arange(rows), "target_id": torch.arange(rows) % 5000}
    term = objective((8, 16), width=16, directions="both", centring=1.0, queue=1000)

    def step():
        term(query, target, **ids, progress=0.5).total.backward()
        guarded_share(query, target, ids["query_id"], ids["target_id"], offset=0, margin=0.1)

    assert peak_bytes(step) < rows * rows * 4 / 2
