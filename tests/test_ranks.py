"""Several ranks learn what one learns from the whole batch: every term, several steps, under DDP and FSDP; or all refuse."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_ranks import CASES, EVERYTHING, STEPS, trained

TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}  # fp64; the ranks' sums have another order


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of 2 or 4 ranks met, all cases in one process group."""
    root, folder = Path(__file__).parent.parent, tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "tests/objective_ranks.py"]
    processes = [
        subprocess.Popen([*command, str(rank), str(request.param), str(folder)], cwd=root, env=environment)
        for rank in range(request.param)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * request.param
    return [torch.load(folder / f"rank{rank}of{request.param}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", [*CASES, "sharded"])
def test_ranks_learn_what_one_learns_from_the_whole_batch(ranks, case):
    expected = trained(EVERYTHING if case == "sharded" else CASES[case], 0, 1)
    for step in range(STEPS):
        steps = [rank[case][step] for rank in ranks]
        mean = torch.stack([met["total"] for met in steps]).mean()
        torch.testing.assert_close(mean, expected[step]["total"], **TOLERANCE)
        for met in steps:
            assert met["parts"].keys() == expected[step]["parts"].keys()
            for name, part in expected[step]["parts"].items():  # cosines are logged in fp32
                torch.testing.assert_close(met["parts"][name].double(), part.double(), rtol=1e-5, atol=1e-6, msg=name)
            for name, gradient in expected[step]["gradients"].items():
                torch.testing.assert_close(met["gradients"][name], gradient, **TOLERANCE, msg=f"{name} in step {step}")


def test_batches_that_do_not_fit_together_are_refused_by_all_ranks(ranks):
    first, *others = [rank["refusals"] for rank in ranks]
    assert all(other == first for other in others)
    rows, teacher, value = first
    assert f"differ in their number of queries: {[3] + [4] * (len(ranks) - 1)}" in rows
    assert f"teacher vectors have widths {[8 + rank for rank in range(len(ranks))]}" in teacher
    assert value == "nan"
