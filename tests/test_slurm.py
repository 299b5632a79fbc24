"""Promises of experiments/slurm/ on a real slurm of one node: `make test-slurm`, where slurm-wlm and munge are installed.

Jobs are train.py as it is, begun by srun; nothing is forked from a process that has everything imported, as elsewhere.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from samples import pairs
from trials import ROOT, SMALL, consumed, weights_hash

from datamodules.shards import Split, write_split
from lightning_modules.checkpoints import FOLDER, in_order

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=f"no slurm here: apt-get install slurm-wlm munge brings {', '.join(missing())}"),
]
SUBMIT = ("bash", "experiments/slurm/submit.sh", "--parsable")
SITE = """TASKS_PER_NODE=${{TASKS_PER_NODE:-1}} CPUS_PER_TASK=1 MAX_RESTARTS=${{MAX_RESTARTS:-5}} PYTHON={python}
site() {{ export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo; }}
"""
PYTHON = """#!/usr/bin/env bash
export PYTHONPATH={root}:{root}/tests
[ "$1" != train.py ] || set -- tests/recorded.py "$@"
exec {root}/.venv/bin/python "$@"
"""
TWO = {"TASKS_PER_NODE": "2"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(root)
    try:
        (root / "jobs").mkdir()
        (root / "python").write_text(PYTHON.format(root=ROOT))
        (root / "python").chmod(0o755)
        (root / "site.sh").write_text(SITE.format(python=root / "python"))
        cluster.environment |= {"SITE": str(root / "site.sh"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def words(world) -> list[str]:
    """A run of seconds, as a job is given it."""
    return [*(word for word in SMALL if not word.startswith("ckpt_path")), f"data.root={world}", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory) -> Path:
    """A run of one process that nothing stopped."""
    out = tmp_path_factory.mktemp("reference") / "1"
    run = zygote.begin(out, "trainer.accelerator=cpu")
    assert run.wait() == [0], run.log()
    return out


def submit(cluster: Cluster, *words: str, **environment: str) -> str:
    options = [f"--output={cluster.root}/jobs/%A_%a.out"]
    return cluster.call(*SUBMIT, *options, *words, **environment)


def signal_after(cluster: Cluster, job: str, out: Path, step: int, name: str = "USR1") -> None:
    """Once a run has begun a step."""
    file = out / "consumed-rank0.jsonl"
    cluster.until(lambda: file.exists() and file.read_text().count("\n") > step)
    cluster.call("scancel", f"--signal={name}", job)


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.call("scontrol", "show", "job", job, "--oneliner").split("Restarts=")[1].split()[0])


def same(out: Path, reference: Path) -> None:
    """The same batches at every step, and weights equal bit for bit."""
    assert consumed(out) == consumed(reference)
    assert weights_hash(out) == weights_hash(reference)


def test_an_array_is_preempted_goes_on_exactly_and_what_depends_on_it_waits(cluster, words, reference, tmp_path):
    """Four lines of a grid in roots of their own; two are stopped; their soup is made when all four are there."""
    grid, runs = tmp_path / "grid.txt", tmp_path / "runs"
    grid.write_text("".join(f"{shlex.join([*words, f'model.optimizer.learning_rate={n}.0e-3'])}\n" for n in (1, 2, 1, 1)))
    array = submit(cluster, "array", str(grid), str(runs))
    checkpoints = ",".join(f"{runs}/{n}/encoder" for n in (1, 2, 3, 4))
    after = (f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    soup = submit(cluster, *after, "stage", "conf=soup", f"checkpoints=[{checkpoints}]", f"out={tmp_path}/soup")
    for n in (1, 2):
        signal_after(cluster, f"{array}_{n}", runs / str(n), 6 + n)
    assert cluster.wait(array, soup) == ["COMPLETED", "COMPLETED"], cluster.logs()
    assert [restarts(cluster, f"{array}_{n}") for n in (1, 2, 3, 4)] == [1, 1, 0, 0]
    for n in (1, 3, 4):
        same(runs / str(n), reference)
    assert weights_hash(runs / "2") != weights_hash(reference)
    assert (tmp_path / "soup").exists()
