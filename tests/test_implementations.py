"""All implementations give the numbers of the reference, whatever the shapes, and behave inside the rest of torch."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import assert_close, margin_near, problems, random_problem, results

from experiments.bench.loss import peak_bytes
from kernels import chunked
from kernels.chunked import contrastive_chunked
from kernels.contrastive import contrastive_loss

DOUBLE = {"loss": 1e-11, "gradient": 1e-10}  # a few hundred roundings, times 1/τ in the exponent


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    problems(max_rows=12, max_others=8, max_width=20),
    st.floats(0.005, 1.0),
    st.sampled_from(["own", "all"]),
    st.sampled_from([0.0, 5.0]),
)
def test_chunked_gives_the_numbers_of_the_reference(problem, temperature, negatives, hardness):
    changes = {"negatives": negatives, "hardness": hardness}
    expected = results(problem, temperature, impl="reference", **changes)
    assert_close(
        results(problem, temperature, impl="chunked", **changes), expected, **DOUBLE, rounding=1e-15, temperature=temperature
    )


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5])
def test_single_precision_stays_within_its_errors(temperature):
    """The table of kernels.md: 1e-6 for the loss, 1e-5 for gradients, against the reference in double precision."""
    problem = random_problem(
        3, rows=300, passages=320, width=96, prefixes=(24, 48, 96), negatives=200, contents=150, dtype=torch.float32
    )
    expected = results(problem, temperature, impl="reference", dtype=torch.float64)
    assert_close(results(problem, temperature, impl="chunked"), expected, loss=1e-6, gradient=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_lose_only_the_rounding_of_their_gradients(dtype):
    problem = random_problem(4, rows=60, passages=70, width=32, prefixes=(8, 32), negatives=40, contents=50, dtype=dtype)
    expected = results(problem, 0.05, impl="reference", dtype=torch.float64)
    found = results(problem, 0.05, impl="chunked")
    assert_close(found, expected, loss=1e-5, gradient=4e-3)
    out = contrastive_loss(**problem, temperature=0.05)
    assert out.loss.dtype == out.per_prefix.dtype == torch.float32


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("near", [None, -0.2])
@pytest.mark.parametrize("negatives", ["own", "all"])
def test_the_gradient_is_the_slope(negatives, near, impl):
    """Without hardness: its weight has no gradient, so no slope tells it."""
    problem = random_problem(5, rows=4, passages=5, width=6, prefixes=(2, 6), negatives=3, contents=4)
    problem["margin"] = None if near is None else margin_near(problem, near)
    heat = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    leaves = [problem.pop(name).requires_grad_() for name in ("query", "passage", "negative")]

    def loss(query, passage, negative, temperature):
        vectors = {"query": query, "passage": passage, "negative": negative}
        return contrastive_loss(**vectors, **problem, temperature=temperature, negatives=negatives, impl=impl).loss

    assert torch.autograd.gradcheck(loss, (*leaves, heat))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_exponents_stay_finite_and_right(impl, dtype, sign):
    """Own cosine −sign, everything else +sign: exponents of ±200 at τ = 0.01, and α on top."""
    query = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    passage = torch.tensor([[-sign, 0.0], [sign, 0.0]], dtype=dtype, requires_grad=True)
    negative = torch.tensor([[sign, 0.0]], dtype=dtype, requires_grad=True)
    out = contrastive_loss(
        query,
        passage,
        prefixes=(1, 2),
        temperature=0.01,
        negative=negative,
        negative_row=torch.tensor([0]),
        hardness=5.0,
        impl=impl,
    )
    gradients = torch.autograd.grad(out.loss, (query, passage, negative))
    other, own_negative = math.exp(sign * 200 - 250), math.exp(sign * 200 + sign * 5 - 250)
    by_hand = [math.log(math.exp(-250) + other + own_negative) + 250, math.log(math.exp(-250) + other) + 250]
    if sign < 0:  # nearly solved: log(1 + tiny), which underflows in single precision
        by_hand = [math.log1p(math.exp(-200) + math.exp(-205)), math.log1p(math.exp(-200))]
    expected = 2 * sum(by_hand) / 2
    assert out.loss.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12, abs=1e-80)
    assert all(torch.isfinite(x).all() for x in gradients)


def test_a_hard_negative_alone_may_set_the_scale():
    """Its exponent is 200, that of the only other passage 0; e^200 is beyond fp32."""
    query, passage = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])
    negative: dict[str, Any] = {"negative": torch.tensor([[1.0, 0.0]]), "negative_row": torch.tensor([0])}
    for impl in ("reference", "chunked", "triton"):
        out = contrastive_loss(query, passage, prefixes=(2,), temperature=0.01, impl=impl, **negative)
        assert out.loss.item() == pytest.approx((200 + math.log(2)) / 2, rel=1e-6)


def test_a_closer_copy_of_the_positive_does_not_drown_the_rest():
    """Row 0's masked duplicate has the exponent 200, the only other passage 100: the first must not set the scale."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    passage = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    out = contrastive_loss(query[:1], passage, prefixes=(2,), temperature=0.01, passage_id=torch.tensor([5, 6, 5]))
    assert out.loss.item() == pytest.approx(100.0, rel=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 64])
@pytest.mark.parametrize("slab", [1, 40, 10_000])
def test_chunks_and_slabs_change_nothing(chunk_rows, slab, monkeypatch):
    monkeypatch.setattr(chunked, "SLAB_ELEMENTS", slab)
    problem = random_problem(6, rows=11, passages=13, width=8, prefixes=(3, 8), negatives=6, contents=6)
    expected = results(problem, 0.02, impl="reference")
    monkeypatch.setattr(contrastive_chunked, "__defaults__", (chunk_rows,))
    assert_close(results(problem, 0.02, impl="chunked"), expected, **DOUBLE)


def test_many_equal_pairs_are_hidden_like_few(monkeypatch):
    problem = random_problem(7, rows=20, passages=24, width=8, prefixes=(3, 8), negatives=9, contents=3)
    listed = results(problem, 0.05, impl="chunked", negatives="all")
    monkeypatch.setattr(chunked, "MAX_PAIRS", 0)
    compared = results(problem, 0.05, impl="chunked", negatives="all")
    assert all(torch.equal(listed[name], compared[name]) for name in listed)


def test_permuting_rows_permutes_gradients():
    problem = random_problem(8, rows=9, passages=9, width=8, prefixes=(3, 8), contents=5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = problem | {name: problem[name][order] for name in ("query", "passage", "query_id", "passage_id")}
    plain, moved = results(problem, 0.05), results(permuted, 0.05)
    expected = plain | {name: plain[name][order] for name in ("query", "passage")}
    assert_close(moved, expected, **DOUBLE)


def test_two_runs_are_bitwise_equal():
    """Also on several threads, with so many hard negatives that they are added up in parallel if anybody lets them."""
    problem = random_problem(
        9, rows=400, passages=420, width=64, prefixes=(16, 64), negatives=4000, contents=300, dtype=torch.float32
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (results(problem, 0.05) for _ in range(4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("margin", [None, -0.2])
def test_both_directions_are_the_sum_of_each(margin):
    problem = random_problem(16, rows=7, passages=7, width=8, prefixes=(4, 8), negatives=3, contents=4) | {"margin": margin}
    both = results(problem, 0.1, directions="both")
    swapped = {"query": problem["passage"], "passage": problem["query"]}
    swapped |= {"query_id": problem["passage_id"], "passage_id": problem["query_id"]}
    swapped |= {name: problem[name] for name in ("prefixes", "weights", "margin")}
    there, back = results(problem, 0.1), results(swapped, 0.1)
    assert both["loss"].item() == pytest.approx((there["loss"] + back["loss"]).item(), rel=1e-14)
    torch.testing.assert_close(both["query"], there["query"] + back["passage"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(both["passage"], there["passage"] + back["query"], rtol=1e-12, atol=1e-14)
    fewer = {"query": problem["query"][:6], "passage": problem["passage"]}
    with pytest.raises(ValueError, match="needs all ranks' queries: there are 6 for 7 passages"):
        contrastive_loss(**fewer, prefixes=(8,), temperature=0.1, directions="both")


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "passage", "negative"])
def test_nan_and_infinity_are_refused(impl, value, name):
    problem = random_problem(17, rows=4, passages=4, width=4, prefixes=(2, 4), negatives=2)
    problem[name][1, 3] = value
    with pytest.raises(ValueError, match="a vector holds NaN or infinity"):
        contrastive_loss(**problem, temperature=0.1, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1e-40), (torch.float32, 3e37), (torch.float64, 1e200)]
)
def test_any_finite_scale_gives_the_same_loss(impl, dtype, scale):
    problem = random_problem(18, rows=6, passages=6, width=8, prefixes=(4, 8), dtype=dtype)
    found = []
    for by in (1.0, scale):
        query = (problem["query"] * by).requires_grad_()
        out = contrastive_loss(**problem | {"query": query}, temperature=0.05, impl=impl)
        (gradient,) = torch.autograd.grad(out.loss, query)
        found.append((out.loss.item(), gradient))
    # at 1e-40 fp32 has lost most of its digits before the loss sees them
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3 if scale == 1e-40 else 1e-5)
    if scale in (1e-30, 1e200):  # at the others the gradient, which goes with 1 / scale, leaves the range of fp32
        torch.testing.assert_close(found[1][1] * scale, found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_zero_vectors_have_cosine_zero_and_no_gradient(impl):
    query = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    passage = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    out = contrastive_loss(query, passage, prefixes=(2,), temperature=0.5, impl=impl)
    of_query, of_passage = torch.autograd.grad(out.loss, (query, passage))
    assert out.loss.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 2)
    assert of_query[0].tolist() == of_passage[1].tolist() == [0.0, 0.0]
    assert of_query[1].abs().sum() == 0  # it lies on the only other vector: its gradient is radial and falls away
    assert torch.isfinite(of_passage).all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_prefix_that_is_next_to_nothing_counts_as_zeros(impl):
    problem = random_problem(21, rows=4, passages=4, width=8, prefixes=(4, 8), dtype=torch.float32)
    tiny, zeros = problem["query"].clone(), problem["query"].clone()
    tiny[0, :4] *= 1e-20
    zeros[0, :4] = 0
    for query in (tiny, zeros):
        query.requires_grad_()
    found = [contrastive_loss(**problem | {"query": query}, temperature=0.05, impl=impl) for query in (tiny, zeros)]
    assert found[0].loss.item() == pytest.approx(found[1].loss.item(), rel=1e-6)
    first, second = (torch.autograd.grad(out.loss, query)[0] for out, query in zip(found, (tiny, zeros), strict=True))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_single_row_has_no_loss_and_no_gradient(impl):
    query = torch.randn(1, 4, requires_grad=True)
    out = contrastive_loss(query, torch.randn(1, 4), prefixes=(2, 4), temperature=0.05, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, query)
    assert out.loss.item() == 0
    assert gradient.abs().max() == 0


def test_no_hard_negatives_at_all_may_be_an_empty_tensor():
    problem = random_problem(19, rows=4, passages=4, width=4, prefixes=(4,))
    empty: dict[str, Any] = {
        "negative": torch.empty(0, 4, dtype=torch.float64),
        "negative_row": torch.empty(0, dtype=torch.int64),
    }
    empty["negative"].requires_grad_()
    loss = contrastive_loss(**problem, **empty, temperature=0.1).loss
    assert loss == contrastive_loss(**problem, temperature=0.1).loss
    assert torch.autograd.grad(loss, empty["negative"])[0].shape == (0, 4)


def test_memory_stays_below_a_quarter_of_one_cross_entropy_per_prefix():
    from experiments.bench.loss import Inputs, naive, ours, step

    inputs, prefixes = Inputs.fresh(2048, 256, seed=0), (64, 128, 192, 256)
    for loss in (naive, ours):
        step(loss, inputs, prefixes)
    mine, plain = (peak_bytes(lambda loss=loss: step(loss, inputs, prefixes)) for loss in (ours, naive))
    assert mine < plain / 4


def test_the_fallback_from_triton_is_said_once(monkeypatch):
    from kernels import contrastive

    monkeypatch.setattr(contrastive, "_why_not_triton", lambda device, dtype: "the GPU is too old")
    contrastive._say_once.cache_clear()

    given = (torch.device("cuda"), torch.bfloat16)
    with pytest.warns(UserWarning, match="plain torch, not in Triton: the GPU is too old"):
        assert contrastive._implementation("auto", *given) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contrastive._implementation("auto", *given) == "chunked"
    with pytest.raises(ValueError, match="impl is 'triton', which cannot run here: the GPU is too old"):
        contrastive._implementation("triton", *given)
