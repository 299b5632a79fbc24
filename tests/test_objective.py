"""Promises of the objective: a plain sum of its terms, centring that leaves nothing behind, a log that tells the truth."""

import math
from typing import Any

import pytest
import torch

from datamodules.curation.negatives import reciprocal_rank_fusion
from experiments.bench.loss import peak_bytes
from kernels.contrastive import contrastive_loss
from kernels.spread_out import spread_out_loss
from lightning_modules.objective.objective import ObjectiveConfig, objective
from lightning_modules.optimizer import OptimizerConfig, adamw, factor_of

RANDOM = torch.Generator().manual_seed(0)
QUERY, TARGET = torch.randn(2, 6, 8, generator=RANDOM)
IDS: dict[str, Any] = {"query_id": torch.arange(6), "target_id": torch.tensor([0, 1, 1, 3, 4, 5]), "prefixes": (4, 8)}


def test_the_total_is_the_weighted_sum_of_the_terms():
    config = ObjectiveConfig(contrastive=0.7, spread_out=0.3, temperature=0.1)
    out = objective(config, QUERY, TARGET, **IDS, progress=0.5)
    contrastive = contrastive_loss(
        QUERY, TARGET, prefixes=(4, 8), temperature=0.1, query_id=IDS["query_id"], passage_id=IDS["target_id"]
    )
    spread = spread_out_loss(QUERY, prefixes=(4, 8)) + spread_out_loss(TARGET, prefixes=(4, 8), ids=IDS["target_id"])
    assert out.total.item() == pytest.approx((0.7 * contrastive.loss + 0.3 * spread.sum()).item(), rel=1e-6)
    assert out.parts["loss"].item() == pytest.approx(out.total.item())
    assert [out.parts[f"loss@{prefix}"].item() for prefix in (4, 8)] == contrastive.per_prefix.tolist()
    assert [out.parts[f"spread_out@{prefix}"].item() for prefix in (4, 8)] == pytest.approx(spread.tolist())


def test_centring_fades_out_and_takes_a_common_direction_away():
    config = ObjectiveConfig(centring=0.5)
    plain = objective(ObjectiveConfig(), QUERY, TARGET, **IDS, progress=0).total
    assert objective(config, QUERY, TARGET, **IDS, progress=0.5).total.item() == plain.item()
    assert objective(config, QUERY, TARGET, **IDS, progress=0.25).total.item() != plain.item()
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (QUERY, TARGET)]
    by_hand = contrastive_loss(
        *(x - 0.5 * x.mean(0) for x in unit), prefixes=(4, 8), temperature=0.05, passage_id=IDS["target_id"]
    )
    halfway = objective(config, QUERY, TARGET, **IDS, progress=0.25).parts
    assert [halfway["loss@4"].item(), halfway["loss@8"].item()] == pytest.approx(by_hand.per_prefix.tolist())


def test_the_log_counts_masked_pairs_and_cosines():
    hard: dict[str, Any] = {
        "negative_MD": TARGET[:2],
        "negative_id": torch.tensor([1, 9]),
        "negative_row": torch.tensor([1, 1]),
    }
    parts = objective(ObjectiveConfig(centring=1.0), QUERY, TARGET, **IDS, progress=0, **hard).parts
    assert parts["dropped_negatives"].item() == 1
    assert parts["masked_share"].item() == pytest.approx(2 / 30)
    assert parts["positive_cosine"].item() == pytest.approx(torch.cosine_similarity(QUERY, TARGET).mean().item(), abs=1e-6)


def test_both_directions_add_the_query_for_a_target():
    one, both = (
        objective(ObjectiveConfig(spread_out=0, directions=way), QUERY, TARGET, **IDS, progress=0).total
        for way in ("query", "both")
    )
    turned = {**IDS, "query_id": IDS["target_id"], "target_id": IDS["query_id"]}
    back = objective(ObjectiveConfig(spread_out=0), TARGET, QUERY, **turned, progress=0).total
    assert both.item() == pytest.approx((one + back).item())


def test_a_learnt_temperature_gets_a_gradient_and_is_logged():
    heat = torch.tensor(0.1, requires_grad=True)
    out = objective(ObjectiveConfig(), QUERY, TARGET, **IDS, progress=0, temperature=heat)
    out.total.backward()
    assert heat.grad is not None
    assert heat.grad.item() != 0
    assert out.parts["temperature"].item() == pytest.approx(0.1)


def test_a_centring_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match="must lie in"):
        ObjectiveConfig(centring=1.5)
    with pytest.raises(ValueError, match="temperature is 0"):
        ObjectiveConfig(temperature=0.0)


def test_rank_fusion_has_its_golden_values():
    fused = reciprocal_rank_fusion([[1, 2, 3, 4, 5], [3, 1, 5, 2, 4]])
    assert fused == pytest.approx([0.03226646, 0.03252247, 0.03125763, 0.03175403, 0.03100962], abs=5e-9)
    with pytest.raises(ValueError, match="all must rank the same"):
        reciprocal_rank_fusion([[1, 2], [1]])


def test_the_rate_rises_over_the_warmup_and_falls_to_zero():
    factor = factor_of(0.1, 100)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0, abs=1e-12)
    assert factor(10) == pytest.approx((1 + math.cos(0)) / 2)


def test_only_matrices_decay_and_frozen_weights_stay_out():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    groups = adamw(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (2, 0.0)]
    with pytest.raises(ValueError, match="learning_rate is -1"):
        OptimizerConfig(learning_rate=-1)


@pytest.mark.parametrize("contents", [1, 3, 40])
def test_the_log_of_a_batch_equals_that_of_the_written_mask(contents):
    generator = torch.Generator().manual_seed(contents)
    query, target = torch.randn(20, 8, generator=generator), torch.randn(20, 8, generator=generator)
    query_id, target_id = (torch.randint(0, contents, (20,), generator=generator) for _ in range(2))
    parts = objective(ObjectiveConfig(), query, target, query_id=query_id, target_id=target_id, prefixes=(8,), progress=0).parts
    cosine = torch.cosine_similarity(query[:, None], target, dim=-1)
    seen = [(i, j) for i in range(20) for j in range(20) if query_id[i] != query_id[j] and target_id[i] != target_id[j]]
    mean = sum(cosine[pair].item() for pair in seen) / max(len(seen), 1)
    assert parts["negative_cosine"].item() == pytest.approx(mean, abs=1e-6)
    assert parts["masked_share"].item() == pytest.approx(1 - len(seen) / (20 * 19))


def test_no_matrix_of_rows_by_rows_is_made():
    rows = 6000
    query, target = (torch.randn(rows, 16).requires_grad_() for _ in range(2))
    ids = {"query_id": torch.arange(rows), "target_id": torch.arange(rows) % 5000}

    def step():
        config = ObjectiveConfig(directions="both", centring=1.0)
        objective(config, query, target, **ids, prefixes=(8, 16), progress=0.5).total.backward()

    assert peak_bytes(step) < rows * rows * 4 / 2
