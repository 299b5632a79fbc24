"""Promises of the spread-out term: its golden values, and one number in all its forms without a B × B matrix."""

import pytest
import torch
from test_contrastive import PASSAGE, QUERY

from experiments.bench.loss import peak_bytes
from kernels import spread_out
from kernels.reference import spread_out_per_prefix
from kernels.spread_out import spread_out_loss


def test_the_spread_out_term_has_its_golden_values():
    def both(prefixes):
        return spread_out_loss(QUERY, prefixes=prefixes).sum() + spread_out_loss(PASSAGE, prefixes=prefixes).sum()

    assert both((8,)).item() == pytest.approx(0.5024903094, abs=5e-11)
    assert both((2, 4, 8)).item() == pytest.approx(2.0029874798, abs=5e-11)


def test_rows_of_equal_content_do_not_spread_out():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert spread_out_loss(x, prefixes=(2,)).item() == pytest.approx(2 / 6)
    assert spread_out_loss(x, prefixes=(2,), ids=torch.tensor([7, 7, 1])).item() == 0


@pytest.mark.parametrize(("rows", "ids"), [(40, None), (40, "few"), (40, "many"), (5, None), (5, "few")])
def test_grams_and_chunks_give_the_sum_over_pairs(rows, ids, monkeypatch):
    monkeypatch.setattr(spread_out, "CHUNK_ELEMENTS", 3 * rows)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    x[2] = 0
    ids = None if ids is None else torch.randint(0, {"few": 30, "many": 2}[ids], (rows,), generator=generator)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = spread_out_loss(mine, prefixes=(3, 8, 12), ids=ids)
    expected = spread_out_per_prefix(plain, prefixes=(3, 8, 12), ids_B=ids)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("ids", [None, "classes"])
def test_no_matrix_of_rows_by_rows_is_made(ids):
    x = torch.randn(6000, 16).requires_grad_()
    ids = None if ids is None else torch.arange(6000) % 4
    assert peak_bytes(lambda: spread_out_loss(x, prefixes=(8, 16), ids=ids).sum().backward()) < 6000 * 6000 * 4


def test_random_unit_vectors_have_the_expected_value():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert spread_out_loss(x, prefixes=(16, 64)).tolist() == pytest.approx([1 / 16, 1 / 64], rel=0.02)


@pytest.mark.parametrize("rows", [5, 40])
def test_torch_compile_takes_it_whole(rows):
    x, ids = torch.randn(rows, 8), torch.arange(rows) % 4
    compiled = torch.compile(spread_out_loss, backend="aot_eager", fullgraph=True)
    found = []
    for function in (spread_out_loss, compiled):
        leaf = x.clone().requires_grad_()
        function(leaf, prefixes=(4, 8), ids=ids).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale_gives_the_same(scale):
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread_out_loss(x * scale, prefixes=(6,)), spread_out_loss(x, prefixes=(6,)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("x", "ids", "message"),
    [
        (torch.ones(1, 4), None, "B at least 2"),
        (torch.ones(3, 4), torch.arange(2), "ids has shape"),
        (torch.full((3, 4), torch.nan), None, "NaN or infinity"),
        (torch.ones(3, 4, dtype=torch.int64), None, "it must be fp16"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, ids, message):
    with pytest.raises(ValueError, match=message):
        spread_out_loss(x, prefixes=(4,), ids=ids)
