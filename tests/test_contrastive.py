"""Promises of the loss: the golden values of the equations page, and the properties it names."""

import math
from typing import Any

import pytest
import torch

from kernels.contrastive import contrastive_loss

i = torch.arange(4, dtype=torch.float64)[:, None]
k = torch.arange(8, dtype=torch.float64)
QUERY = torch.sin(0.7 * i + 1.3 * k + 0.1)
PASSAGE = QUERY + 0.5 * torch.cos(2.1 * i - 0.4 * k)
NEGATIVE = QUERY + 0.8 * torch.sin(1.9 * i + 0.6 * k + 0.5)
OWN: dict[str, Any] = {"negative": NEGATIVE, "negative_row": torch.arange(4)}
PASSAGE_ID: dict[str, Any] = {"passage_id": torch.tensor([0, 1, 1, 3])}
QUERY_ID: dict[str, Any] = {"query_id": torch.tensor([0, 1, 0, 3])}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("case", "at_half", "at_twentieth"),
    [
        ({}, 0.8294245053, 0.0388830182),
        (OWN, 1.1336564624, 0.2144445039),
        (OWN | PASSAGE_ID, 1.0307307356, 0.2091857092),
        (OWN | PASSAGE_ID | QUERY_ID, 0.9855349240, 0.2091854010),
        (OWN | {"hardness": 5.0}, 3.7911504506, 2.1138166407),
        (OWN | PASSAGE_ID | QUERY_ID | {"prefixes": (2,)}, 1.1319656050, 1.2861003133),
        (OWN | PASSAGE_ID | QUERY_ID | {"prefixes": (4,)}, 1.0332505083, 0.3984195032),
        (OWN | PASSAGE_ID | QUERY_ID | {"prefixes": (2, 4, 8)}, 3.1507510374, 1.8937052175),
        (OWN | {"negatives": "all"}, 1.4293191707, 0.2220946452),
    ],
    ids=["A", "B", "C", "C2", "D", "F at 2", "F at 4", "F summed", "all negatives"],
)
def test_the_loss_has_its_golden_values(case, at_half, at_twentieth, impl):
    for temperature, expected in ((0.5, at_half), (0.05, at_twentieth)):
        out = contrastive_loss(QUERY, PASSAGE, **{"prefixes": (8,), **case}, temperature=temperature, impl=impl)
        assert out.loss.item() == pytest.approx(expected, abs=5e-11)
        assert out.per_prefix.sum().item() == pytest.approx(expected, abs=5e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 0.3014875731), (0.05, 2.7656538594)])
def test_hardness_weights_carry_no_gradient(temperature, expected, impl):
    query = QUERY.clone().requires_grad_()
    contrastive_loss(query, PASSAGE, prefixes=(8,), temperature=temperature, hardness=5.0, impl=impl, **OWN).loss.backward()
    assert query.grad is not None
    assert query.grad.norm().item() == pytest.approx(expected, abs=5e-11)


def test_high_temperature_leaves_the_log_of_the_candidates():
    out = contrastive_loss(QUERY, PASSAGE, prefixes=(8,), temperature=1e9, **OWN, **PASSAGE_ID)
    candidates = [1 + 1 + 3, 1 + 1 + 2, 1 + 1 + 2, 1 + 1 + 3]  # own, hard negative, unmasked others
    assert out.loss.item() == pytest.approx(sum(map(math.log, candidates)) / 4, abs=1e-7)


def test_everything_masked_gives_zero_and_no_gradient():
    query = QUERY.clone().requires_grad_()
    loss = contrastive_loss(
        query, PASSAGE, prefixes=(2, 8), temperature=0.05, passage_id=torch.zeros(4, dtype=torch.int64)
    ).loss
    loss.backward()
    assert loss.item() == 0
    assert query.grad is not None
    assert query.grad.abs().max().item() == 0


def test_an_own_negative_equal_to_the_positive_is_dropped():
    ids: dict[str, Any] = {"passage_id": torch.arange(4), "negative_id": torch.arange(4)}
    for negatives in ("own", "all"):
        kept = contrastive_loss(QUERY, PASSAGE, prefixes=(8,), temperature=0.5, **OWN, **ids, negatives=negatives).loss
        plain = contrastive_loss(QUERY, PASSAGE, prefixes=(8,), temperature=0.5).loss
        if negatives == "own":
            assert kept.item() == pytest.approx(plain.item(), abs=1e-12)
        else:
            assert kept.item() > plain.item()


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_a_margin_leaves_out_what_is_closer_than_the_own_passage_by_more(impl):
    """Cosines are the first coordinates, the own one 0.6; at prefix 1 they are 1, or 0. Hardness lifts no negative over it."""
    query = torch.tensor([[1.0, 0.0]])
    passage = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    hard: dict[str, Any] = {"negative": torch.tensor([[0.96, 0.28], [0.28, 0.96]]), "negative_row": torch.tensor([0, 0])}
    setting: dict[str, Any] = {"prefixes": (1, 2), "temperature": 0.5, "hardness": 5.0, "margin": 0.3, "impl": impl}
    out = contrastive_loss(query, passage, offset=1, **hard, **setting)
    one = math.log(1 + 1 + 1 + math.exp(-2) + 2 * math.exp(5))  # everything counts
    two = math.log(1 + math.exp(0.4) + math.exp(-1.2) + math.exp(-0.64 + 1.4))  # 1 and 0.96 do not
    assert out.per_prefix.tolist() == pytest.approx([one, two], rel=1e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_what_reaches_the_margin_counts(impl):
    """Both others are as close as the own passage, without rounding."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    hard: dict[str, Any] = {"negative": x, "negative_row": torch.tensor([0, 1])}
    out = contrastive_loss(x, x, prefixes=(2,), temperature=0.5, margin=0.0, impl=impl, **hard)
    assert out.loss.item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("negatives", ["own", "all"])
def test_a_margin_that_leaves_nothing_gives_zero_and_no_gradient(negatives, impl):
    query, passage, negative = (x.float().requires_grad_() for x in (QUERY, PASSAGE, NEGATIVE))
    hard: dict[str, Any] = {"negative": negative, "negative_row": torch.arange(4), "negatives": negatives, "hardness": 5.0}
    heat = torch.tensor(0.05, requires_grad=True)
    out = contrastive_loss(query, passage, prefixes=(2, 8), temperature=heat, margin=-2.0, impl=impl, **hard)
    gradients = torch.autograd.grad(out.loss, (query, passage, negative, heat))
    assert out.loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_a_margin_of_two_is_none(impl):
    """Every other vector is opposite to the own passage: a difference of 2, which rounding lifts above 2 for some rows."""
    query = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    vectors: dict[str, Any] = {"query": query, "passage": torch.cat([-query, 1.7 * query]), "negative": 0.3 * query}
    vectors["negative_row"] = torch.arange(40)
    two, none = (
        contrastive_loss(**vectors, prefixes=(3, 5), temperature=0.1, margin=margin, impl=impl).per_prefix
        for margin in (2, None)
    )
    assert torch.equal(two, none)


def test_scaling_a_vector_changes_nothing():
    scale = torch.tensor([[0.01], [1.0], [30.0], [7.0]], dtype=torch.float64)
    plain = contrastive_loss(QUERY, PASSAGE, prefixes=(2, 8), temperature=0.05, **OWN).loss
    scaled = contrastive_loss(QUERY * scale, PASSAGE / scale, prefixes=(2, 8), temperature=0.05, **OWN).loss
    assert scaled.item() == pytest.approx(plain.item(), rel=1e-12)


def test_coordinates_beyond_a_prefix_get_no_gradient():
    query = QUERY.clone().requires_grad_()
    contrastive_loss(query, PASSAGE, prefixes=(4,), temperature=0.05).loss.backward()
    assert query.grad is not None
    assert query.grad[:, 4:].abs().max() == 0
    assert query.grad[:, :4].abs().min() > 0


def test_permuting_the_batch_permutes_the_gradients():
    order = torch.tensor([2, 0, 3, 1])
    first, second = QUERY.clone().requires_grad_(), QUERY[order].clone().requires_grad_()
    contrastive_loss(first, PASSAGE, prefixes=(2, 8), temperature=0.1).loss.backward()
    contrastive_loss(second, PASSAGE[order], prefixes=(2, 8), temperature=0.1).loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    torch.testing.assert_close(second.grad, first.grad[order], rtol=1e-12, atol=1e-14)


def test_rows_on_two_ranks_give_the_loss_of_one():
    ids = OWN | PASSAGE_ID | QUERY_ID
    whole = contrastive_loss(QUERY, PASSAGE, prefixes=(2, 8), temperature=0.1, **ids).loss
    halves = [
        contrastive_loss(
            QUERY[o : o + 2],
            PASSAGE,
            prefixes=(2, 8),
            temperature=0.1,
            offset=o,
            negative=NEGATIVE[o : o + 2],
            negative_row=torch.arange(2),
            **PASSAGE_ID,
            **QUERY_ID,
        ).loss
        for o in (0, 2)
    ]
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_a_nearly_solved_batch_keeps_its_digits():
    query = torch.eye(2, dtype=torch.float64)
    loss = contrastive_loss(query, query, prefixes=(2,), temperature=0.02).loss.item()
    assert loss == pytest.approx(math.log1p(math.exp(-50)), rel=1e-12, abs=0)


def test_the_temperature_gets_a_gradient_when_it_is_a_tensor():
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    contrastive_loss(QUERY, PASSAGE, prefixes=(8,), temperature=temperature).loss.backward()
    step = 1e-6
    up, down = (contrastive_loss(QUERY, PASSAGE, prefixes=(8,), temperature=0.5 + s).loss.item() for s in (step, -step))
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefixes": (16,)}, "prefix 16 is wider than the embedding, which has 8"),
        ({"prefixes": (8, 4)}, "must be positive and increase"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"passage_id": torch.arange(3)}, "passage_id has shape"),
        ({"offset": 1}, "does not fit"),
        ({"negative": NEGATIVE}, "given together"),
        ({"negative_id": torch.arange(4)}, "only with them"),
        ({"negative": NEGATIVE[:, :4], "negative_row": torch.arange(4)}, "must be \\(M, 8\\)"),
        ({"negative": NEGATIVE, "negative_row": torch.arange(1, 5)}, "negative_row holds 1 to 4; there are 4 rows"),
        ({"negative": NEGATIVE.float(), "negative_row": torch.arange(4)}, "all like query"),
        ({"passage_id": torch.arange(4, dtype=torch.int32)}, "must be .* torch.int64"),
        ({"passage_id": torch.arange(4, device="meta")}, "on cpu"),
        ({"temperature": torch.tensor([0.5, 0.5])}, "it must be one float"),
        ({"temperature": torch.tensor(-1.0)}, "it must be above 0"),
        ({"temperature": math.nan}, "it must be above 0"),
        ({"temperature": math.inf}, "between 1e-06 and 1e\\+12"),
        ({"temperature": 1e-9}, "between 1e-06 and 1e\\+12"),
        ({"temperature": torch.tensor(0.5, device="meta")}, "temperature is on meta; it must be on cpu"),
        ({"hardness": math.inf}, "must be finite"),
        ({"margin": 2.1}, "margin is 2.1; it must be between -2 and 2, or None"),
        ({"margin": -2.1}, "margin is -2.1"),
        ({"margin": math.nan}, "margin is nan"),
        ({"margin": -math.inf}, "margin is -inf"),
        ({"negatives": "some"}, "one of own, all"),
        ({"impl": "fast"}, "one of auto, triton, chunked, reference"),
        ({"impl": "triton"}, "fp64 has no tensor cores"),
        ({"directions": "back"}, "one of query, both"),
        ({"prefixes": ()}, "must be positive"),
        ({"weights": (1.0, 2.0)}, "one for each"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(QUERY, PASSAGE, **{"prefixes": (8,), "temperature": 0.05, **change})
