"""The Triton kernels: their numbers through Triton's interpreter (fp32), their machine code by compiling ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import assert_close, margin_near, problems, random_problem, results

from kernels import fused
from kernels.contrastive import contrastive_loss
from kernels.fused import contrastive_fused
from kernels.problem import Needs, Problem

SINGLE = {"loss": 1e-6, "gradient": 1e-5}  # the table of kernels.md


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    problems(max_rows=150, max_others=140, max_width=150, dtype=torch.float32),
    st.sampled_from([0.01, 0.05, 1.0]),
    st.sampled_from(["own", "all"]),
    st.sampled_from([0.0, 5.0]),
)
def test_the_kernels_give_the_numbers_of_the_reference(problem, temperature, negatives, hardness):
    changes = {"negatives": negatives, "hardness": hardness}
    expected = results(problem, temperature, impl="reference", dtype=torch.float64, **changes)
    found = results(problem, temperature, impl="triton", **changes)
    assert_close(found, expected, **SINGLE, rounding=1e-7, temperature=temperature)


@pytest.mark.parametrize("prefixes", [(64, 128), (128, 256)])
@pytest.mark.parametrize("workspace_bytes", [1, 2**30])
@pytest.mark.parametrize("near", [None, -0.2])
def test_chunks_of_rows_change_nothing(prefixes, workspace_bytes, near, monkeypatch):
    problem = random_problem(2, rows=300, passages=310, width=prefixes[-1], prefixes=prefixes, negatives=50, contents=200)
    problem |= {name: problem[name].float() for name in ("query", "passage", "negative")}
    problem["margin"] = None if near is None else margin_near(problem, near)
    monkeypatch.setattr(contrastive_fused, "__defaults__", (workspace_bytes,))
    expected = results(problem, 0.05, impl="reference", dtype=torch.float64, negatives="all", hardness=5.0)
    assert_close(results(problem, 0.05, impl="triton", negatives="all", hardness=5.0), expected, **SINGLE)


def test_two_runs_are_bitwise_equal():
    problem = random_problem(4, rows=150, passages=150, width=70, prefixes=(9, 70), negatives=30, dtype=torch.float32)
    first, second = results(problem, 0.05, impl="triton"), results(problem, 0.05, impl="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_needed_gradients_are_made():
    x = torch.randn(5, 8)
    nothing = (None, None, None, None)
    row = torch.zeros(5, dtype=torch.int64)
    problem = Problem(x, x, x, torch.tensor(0.1), None, None, row, None, (4, 8), (1.0, 1.0), 0, False, 0.0, None)
    for i in range(4):
        needs = Needs(*(j == i for j in range(4)))
        made = contrastive_fused(problem, needs)[2:]
        assert tuple(gradient is not None for gradient in made) == needs
    assert contrastive_fused(problem, Needs(False, False, False, False))[2:] == nothing


def test_what_cannot_run_says_why(monkeypatch):
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="fp64 has no tensor cores"):
        contrastive_loss(x.double(), x.double(), prefixes=(8,), temperature=0.1, impl="triton")
    monkeypatch.setattr(fused.knobs.runtime, "interpret", False)
    assert "needs a CUDA device" in str(fused.why_not(torch.device("cpu"), torch.bfloat16))
    assert "half-precision" in str(fused.why_not(torch.device("cuda"), torch.float32))


def test_ids_may_have_strides():
    problem = random_problem(6, rows=30, passages=40, width=8, prefixes=(8,), negatives=20, contents=6, dtype=torch.float32)
    strided = {name: torch.stack([problem[name], problem[name]], 1)[:, 0] for name in problem if name.endswith(("_id", "_row"))}
    plain, found = (results(problem | ids, 0.05, impl="triton", negatives="all") for ids in ({}, strided))
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_mask_holds_at_any_temperature():
    problem = random_problem(7, rows=20, passages=20, width=8, prefixes=(4, 8), contents=5, dtype=torch.float32)
    expected = results(problem, 1e9, impl="reference", dtype=torch.float64)
    assert results(problem, 1e9, impl="triton")["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


def test_every_shipped_configuration_compiles_within_its_limits():
    """sm_80 and sm_90: tensor-core instructions, at most 64 bytes of spill, 227 KiB of shared memory, no atomics."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "experiments/bench/aot.py"], cwd=root, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 beyond a limit" in done.stdout
