"""The loss with its gradients behaves inside the rest of torch: autograd, autocast, torch.compile, GradCache, DDP, FSDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import random_problem
from ranks import encoder_and_inputs, loss_of

from kernels.chunked import contrastive_chunked
from kernels.contrastive import contrastive_loss
from kernels.problem import Needs, Problem


def test_only_needed_gradients_are_made(monkeypatch):
    problem = random_problem(10, rows=6, passages=6, width=8, prefixes=(4, 8), negatives=3)
    asked: list[Needs] = []

    def spy(problem: Problem, needs: Needs):
        asked.append(needs)
        solution = contrastive_chunked(problem, needs)
        made = (solution.query_BD, solution.passage_ND, solution.negative_MD, solution.temperature)
        assert tuple(x is not None for x in made) == needs
        return solution

    monkeypatch.setattr("kernels.operator.contrastive_chunked", spy)
    for name in ("query", "passage", "negative"):
        leaf = problem[name].clone().requires_grad_()
        contrastive_loss(**problem | {name: leaf}, temperature=0.1).loss.backward()
        assert leaf.grad is not None
        assert asked[-1] == Needs(name == "query", name == "passage", name == "negative", False)
    contrastive_loss(**problem, temperature=torch.tensor(0.1, requires_grad=True)).loss.backward()
    assert asked[-1] == Needs(False, False, False, True)
    with torch.no_grad():
        assert not contrastive_loss(
            **problem | {"query": problem["query"].requires_grad_()}, temperature=0.1
        ).loss.requires_grad
    assert not any(asked[-1])


def test_a_second_derivative_is_refused():
    problem = random_problem(11, rows=4, passages=4, width=4, prefixes=(4,))
    query = problem.pop("query").requires_grad_()
    out = contrastive_loss(query, **problem, temperature=0.1, impl="chunked")
    (gradient,) = torch.autograd.grad(out.loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        gradient.square().sum().backward()


def test_backward_scales_by_the_gradient_of_the_loss():
    problem = random_problem(12, rows=4, passages=4, width=4, prefixes=(2, 4))
    plain, scaled = (problem["query"].clone().requires_grad_() for _ in range(2))
    contrastive_loss(**problem | {"query": plain}, temperature=0.1).loss.backward()
    (3.0 * contrastive_loss(**problem | {"query": scaled}, temperature=0.1).loss).backward()
    torch.testing.assert_close(scaled.grad, 3.0 * plain.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_lower_the_precision(impl):
    problem = random_problem(13, rows=20, passages=20, width=16, prefixes=(8, 16), dtype=torch.float32)
    outs = []
    for enabled in (False, True):
        query = problem["query"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = contrastive_loss(**problem | {"query": query}, temperature=0.02, impl=impl)
        out.loss.backward()
        outs.append((out.loss, out.per_prefix, query.grad))
    assert all(torch.equal(plain, inside) for plain, inside in zip(*outs, strict=True))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_torch_compile_takes_the_loss_whole(impl):
    problem = random_problem(14, rows=6, passages=8, width=8, prefixes=(4, 8), negatives=4, contents=5, dtype=torch.float32)
    vectors = [problem.pop(name) for name in ("query", "passage", "negative")]

    def loss(query, passage, negative, temperature):
        passage = (torch.eye(8) @ passage.T).T  # strides of a transposed matrix
        changes = {"hardness": 5.0, "negatives": "all", "margin": 0.1, "impl": impl}
        out = contrastive_loss(2 * query, passage, negative=negative, **problem, temperature=temperature, **changes)
        return out.loss, out.per_prefix

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (*vectors, torch.tensor(0.05))]
        total, parts = function(*leaves)
        total.backward()
        return total, parts, *(x.grad for x in leaves)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mine, eager in zip(run(compiled), run(loss), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("see_all", [False, True])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_the_operator_keeps_its_contract(impl, see_all, margin):
    problem = random_problem(15, rows=6, passages=6, width=6, prefixes=(3, 6), negatives=6, contents=4, dtype=torch.float32)
    query, passage, negative = (problem[name].T.contiguous().T.requires_grad_() for name in ("query", "passage", "negative"))
    ids = (problem["query_id"], problem["passage_id"], problem["negative_row"], problem["negative_id"])
    heat = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    arguments = (query, passage, negative, heat, *ids, (3, 6), (1.0, 1.0), 0, see_all, 0.0, margin, [True] * 4, impl)
    # the gradients among the outputs are not themselves differentiable, so what autograd does is tested above
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.polyphony.contrastive.default, arguments, test_utils=checks)


def test_cached_gradients_are_plain_gradients():
    """GradCache: embed without gradient, take the loss's gradients at the vectors, embed again in parts, push them through."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(10, 8).double()
    inputs = torch.randn(12, 10, dtype=torch.float64), torch.randn(12, 10, dtype=torch.float64)
    loss = contrastive_loss(*map(encoder, inputs), prefixes=(4, 8), temperature=0.1).loss
    (plain,) = torch.autograd.grad(loss, encoder.weight)
    vectors = [encoder(x).detach().requires_grad_() for x in inputs]
    cached = torch.autograd.grad(contrastive_loss(*vectors, prefixes=(4, 8), temperature=0.1).loss, vectors)
    for x, gradient in zip(inputs, cached, strict=True):
        for part, of_part in zip(x.split(5), gradient.split(5), strict=True):
            encoder(part).backward(of_part)
    torch.testing.assert_close(encoder.weight.grad, plain, rtol=1e-12, atol=1e-14)


def test_gradients_of_fp16_vectors_survive_a_gradient_scaler():
    """Most of them lie below fp16's smallest number until the scaler's factor reaches them."""
    problem = random_problem(20, rows=600, passages=600, width=64, prefixes=(64,), dtype=torch.float16)
    gradients = []
    for dtype in (torch.float64, torch.float16):
        query = problem["query"].to(dtype).requires_grad_()
        vectors = {"query": query, "passage": problem["passage"].to(dtype)}
        (65536 * contrastive_loss(**problem | vectors, temperature=0.05).loss).backward()
        gradients.append(query.grad)
    expected, found = gradients
    assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def test_two_ranks_under_ddp_and_fsdp_average_their_gradients(tmp_path):
    encoder, inputs = encoder_and_inputs()
    loss = (loss_of(encoder, inputs[0]) + loss_of(encoder, inputs[1])) / 2
    (expected,) = torch.autograd.grad(loss, encoder.weight)
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "tests/ranks.py", str(rank), f"file://{tmp_path}/meet"],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        printed, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        for line in printed.splitlines():
            found = torch.tensor([float(word) for word in line.split()]).reshape(expected.shape)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert len(printed.splitlines()) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy, about the NaN
@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("margin", [None, -0.2])
def test_where_nobody_may_look_scales_are_right_and_nan_comes_out(impl, margin, monkeypatch):
    """As while a CUDA graph is captured: values cannot be checked, but every replay must be right."""
    problem = random_problem(22, rows=6, passages=8, width=8, prefixes=(4, 8), dtype=torch.float32) | {"margin": margin}
    expected = contrastive_loss(**problem, temperature=0.05, impl=impl).loss.item()
    for module in ("kernels.problem", "kernels.operator"):
        monkeypatch.setattr(f"{module}.may_look", lambda x: False)
    for scale in (1.0, 1e-25, 1e25):
        scaled = problem | {name: problem[name] * scale for name in ("query", "passage")}
        assert contrastive_loss(**scaled, temperature=0.05, impl=impl).loss.item() == pytest.approx(expected, rel=1e-5)
    own, foreign = problem["offset"], (problem["offset"] + 6) % 8
    for name, row in (("query", 0), ("passage", own), ("passage", foreign)):
        spoilt = problem[name].clone()
        spoilt[row, 5] = torch.nan
        assert contrastive_loss(**problem | {name: spoilt}, temperature=0.05, impl=impl).loss.isnan()
