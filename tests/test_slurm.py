"""Promises of experiments/slurm/ on a real slurm of one node: `make test-slurm`, where slurm-wlm and munge are installed.

Jobs are train.py as it is, begun by srun; nothing is forked from a process that has everything imported, as elsewhere.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from samples import pairs
from test_mixture_search import settings
from test_recipe import TRAINED, WORLD
from trials import ROOT, SMALL, TWO_RANKS, consumed, consumed_by_any, weights_hash

from datamodules.assemble import assemble
from datamodules.shards import Split, write_split
from lightning_modules.checkpoints import FOLDER, in_order
from lightning_modules.encoder.checkpoint import read_provenance
from lightning_modules.lineage import read_record

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=f"no slurm here: apt-get install slurm-wlm munge brings {', '.join(missing())}"),
]
SUBMIT = ("bash", "experiments/slurm/submit.sh", "--parsable")
SITE = """TASKS_PER_NODE=${{TASKS_PER_NODE:-1}} CPUS_PER_TASK=1 MAX_RESTARTS=${{MAX_RESTARTS:-5}} PYTHON={python}
site() {{ export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo; }}
"""
PYTHON = """#!/usr/bin/env bash
export PYTHONPATH={root}:{root}/tests
[ -z "${{SLURM_RESTART_COUNT:-}}" ] || [ -z "${{SLOW_SAVE:-}}" ] || SLOW_SAVE=0.5
[ "$1" != train.py ] || set -- tests/recorded.py "$@"
exec {root}/.venv/bin/python "$@"
"""
MINUTE = ("--time=1", "--signal=USR1@1")  # slurm looks every 30 s, and warns that much earlier: 30 to 60 s after the start


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


def submit(cluster: Cluster, *words: str, **environment: str) -> str:
    options = [f"--output={cluster.root}/jobs/%A_%a.out"]
    return cluster.call(*SUBMIT, *options, *words, **environment)


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, words, tmp_path_factory) -> tuple[str, Path]:
    """A job that its time limit will end while the other tests run, and its folder."""
    out = tmp_path_factory.mktemp("limited") / "run"
    return submit(cluster, *MINUTE, "stage", *words, f"trainer.default_root_dir={out}", SLOW_SAVE="5"), out


@pytest.fixture(scope="module", autouse=True)
def shared(cluster, tmp_path_factory) -> tuple[list[str], Path]:
    """Two arrays, one after the other, over one data stage, which has two rounds; and their folder."""
    root = tmp_path_factory.mktemp("shared")
    write_split(root / "source", pairs(9), about={"licence": "own", "source": "hand-made"})
    words = ["blocks", "2", "conf=assemble", f"source={root}/source", "block_size=3", f"out={root}/shared"]
    first = submit(cluster, *words)
    return [first, submit(cluster, f"--dependency=afterok:{first}", *words)], root


@pytest.fixture(scope="module", autouse=True)
def wrong(cluster) -> list[str]:
    """A job without its data, and one that depends on it."""
    words = ["stage", "conf=assemble", f"source={cluster.root}/nowhere", f"out={cluster.root}/out"]
    first = submit(cluster, *words)
    return [first, submit(cluster, f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes", *words)]


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory) -> Path:
    """A run of one process that nothing stopped."""
    out = tmp_path_factory.mktemp("reference") / "1"
    run = zygote.begin(out, "trainer.accelerator=cpu")
    assert run.wait() == [0], run.log()
    return out


def signal_after(cluster: Cluster, job: str, out: Path, step: int, *options: str) -> None:
    """As scancel does with these options, once a run has begun a step; without any it also cancels the job."""
    file = out / "consumed-rank0.jsonl"
    cluster.until(lambda: file.exists() and file.read_text().count("\n") > step)
    cluster.call("scancel", *options, job)


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.call("scontrol", "show", "job", job, "--oneliner").split("Restarts=")[1].split()[0])


def said(cluster: Cluster, job: str) -> str:
    name = job if "_" in job else f"{job}_4294967294"  # what %a is without an array
    return (cluster.root / "jobs" / f"{name}.out").read_text()


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
        signal_after(cluster, f"{array}_{n}", runs / str(n), 6 + n, "--signal=USR1")
    assert cluster.wait(array, soup) == ["COMPLETED", "COMPLETED"], cluster.logs()
    assert [restarts(cluster, f"{array}_{n}") for n in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert ["going on from" in said(cluster, f"{array}_{n}") for n in (1, 2, 3, 4)] == [True, True, False, False]
    for n in (1, 3, 4):
        same(runs / str(n), reference)
    assert weights_hash(runs / "2") != weights_hash(reference)
    assert (tmp_path / "soup").exists()


def test_a_job_goes_on_with_another_number_of_tasks_with_the_same_global_batches(cluster, words, reference, tmp_path):
    """Two tasks, one, and two of an interactive allocation, where Lightning alone would make two runs of them."""
    out = tmp_path / "run"
    for tasks, step, end in (("2", 6, ("--signal=USR1",)), ("1", 13, ())):
        job = submit(cluster, "stage", *words, f"trainer.default_root_dir={out}", TASKS_PER_NODE=tasks)
        signal_after(cluster, job, out, step, *end)
        if end:
            cluster.until(lambda job=job: restarts(cluster, job) == 1)
            cluster.call("scancel", job)
        assert cluster.wait(job) == ["CANCELLED"]
        assert f"stopped by {'SIGUSR1' if end else 'SIGTERM'} after step" in said(cluster, job)
    more = [*TWO_RANKS, "ckpt_path=newest", f"trainer.default_root_dir={out}"]
    told = cluster.call(
        *("salloc", "--ntasks=2", "srun", str(cluster.root / "python"), "train.py", *words, *more), OMP_NUM_THREADS="1"
    )
    assert told.count("going on from") == 2
    assert told.count("encoder in") == 1
    assert consumed_by_any(out) == consumed_by_any(reference)


def test_a_data_stage_over_an_array_makes_what_one_process_makes(cluster, shared):
    jobs, root = shared
    assert cluster.wait(*jobs) == ["COMPLETED", "COMPLETED"], cluster.logs()
    assemble(f"{root}/source", f"{root}/alone", block_size=3)
    tars = [sorted((path.name, path.read_bytes()) for path in (root / name).glob("*.tar")) for name in ("shared", "alone")]
    assert len(tars[0]) == 3
    assert tars[0] == tars[1]
    assert Split(root / "shared").digest == Split(root / "alone").digest


def test_a_wrong_job_fails_once_and_what_depends_on_it_never_runs(cluster, wrong):
    assert cluster.wait(*wrong) == ["FAILED", "CANCELLED"], cluster.logs()
    assert restarts(cluster, wrong[0]) == 0
    assert f"error: no shards in {cluster.root}/nowhere" in said(cluster, wrong[0])


def test_a_run_whose_node_vanishes_goes_on_exactly_from_its_last_checkpoint(cluster, words, limited, reference, tmp_path):
    """kill -9 of all that the node runs; slurm notices that it does not answer, and puts the job back."""
    out = tmp_path / "run"
    assert cluster.wait(limited[0]) == ["COMPLETED"], cluster.logs()
    job = submit(cluster, "stage", *words, f"trainer.default_root_dir={out}")
    cluster.until(lambda: len(in_order(out / FOLDER)) > 1)
    cluster.kill_node()
    assert len(consumed(out)) < 24
    cluster.until(lambda: restarts(cluster, job) == 1)
    cluster.start_node()
    assert cluster.wait(job) == ["COMPLETED"], cluster.logs()
    assert "going on from" in said(cluster, job)
    same(out, reference)


def test_a_run_that_meets_its_time_limit_goes_on_exactly(cluster, limited, reference):
    job, out = limited
    assert cluster.wait(job) == ["COMPLETED"], cluster.logs()
    assert restarts(cluster, job) >= 1
    assert "stopped by SIGUSR1 after step" in said(cluster, job)
    assert "going on from" in said(cluster, job)
    same(out, reference)


def test_a_recipe_is_dependent_jobs_and_what_is_done_is_not_submitted_again(cluster, tmp_path):
    stages: dict[str, dict] = {
        "world": {"conf": "quickstart/world", "keys": {"num_train": 8, "num_test": 2, "num_workers": 1}},
        "looked": {"conf": "quickstart/inspect", "keys": {"root": "@world"}, "array": [{"num_samples": 1}, {"num_samples": 2}]},
    }
    for stage in stages.values():
        stage["slurm"] = {"output": f"{cluster.root}/jobs/%A_%a.out"}
    command = [sys.executable, "train.py", "conf=recipe", f"out={tmp_path}", f"stages={json.dumps(stages)}"]
    shown = cluster.call(*command, "action=submit")
    world, looked = (line.partition(": job ")[2] for line in shown.splitlines())
    assert "afterok" in cluster.call("scontrol", "show", "job", looked, "--oneliner")
    again = cluster.call(*command, "action=submit").splitlines()
    assert again[0] in (shown.splitlines()[0], "world: done before")
    assert again[1] == shown.splitlines()[1]  # not submitted twice
    assert cluster.wait(world, looked, seconds=500) == ["COMPLETED", "COMPLETED"], cluster.logs()
    told = cluster.call(*command, "action=status")
    assert told.count(" done ") == 3, told
    assert cluster.call(*command, "action=submit").splitlines() == ["world: done before", "looked: done before"]
    assert set(json.loads((tmp_path / "lineage.json").read_text())) == {"world", "looked.0", "looked.1"}


def test_a_recipe_trains_on_all_processes_of_its_jobs_and_goes_on_exactly_when_preempted(cluster, tmp_path):
    """Two equal runs of two tasks each, of which one is preempted; their soup waits for both."""
    output = {"output": f"{cluster.root}/jobs/%A_%a.out"}
    stages: dict[str, dict] = {
        "world": {"conf": "quickstart/world", "keys": WORLD},
        "first": {
            "conf": "quickstart/prefinetune",
            "keys": {**TRAINED, "trainer.max_steps": 150, "trainer.accelerator": "cpu"},
            "array": [{"data.seed": 1}, {"data.seed": 1}],
        },
        "soup": {"conf": "soup", "keys": {"checkpoints": ["@first/encoder"], "out": "@/encoder"}},
    }
    command = [sys.executable, "train.py", "conf=recipe", f"out={tmp_path}"]
    command.append(f"stages={json.dumps({name: stage | {'slurm': output} for name, stage in stages.items()})}")
    shown = cluster.call(*command, "action=submit", TASKS_PER_NODE="2")
    jobs = [line.partition(": job ")[2] for line in shown.splitlines()]
    cluster.until(lambda: len(in_order(tmp_path / "first" / "0" / FOLDER)) > 1, seconds=200)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{jobs[1]}_0")
    assert cluster.wait(*jobs, seconds=500) == ["COMPLETED"] * 3, cluster.logs()
    assert [restarts(cluster, f"{jobs[1]}_{n}") for n in (0, 1)] == [1, 0]
    records = [read_record(tmp_path / "first" / str(n)) for n in (0, 1)]
    assert [[attempt["status"] for attempt in record["attempts"]] for record in records] == [[138, 0], [0]]
    assert [record["devices"] for record in records] == [2, 2]
    assert "going on from" in said(cluster, f"{jobs[1]}_0")
    hashes = [weights_hash(tmp_path / "first" / str(n)) for n in (0, 1)]
    assert hashes[0] == hashes[1]
    assert [parent["sha256"] for parent in read_provenance(tmp_path / "soup" / "encoder")["parents"]] == hashes


def test_jobs_share_a_mixture_search_and_one_that_is_preempted_comes_back(cluster, world, tmp_path):
    out = tmp_path / "search"
    wanted = settings(world, num_random=2, num_winners=3, every_steps=4)
    wanted["keys"] |= {"trainer.accelerator": "cpu"}
    words = ["conf=mixture_search", f"out={out}", *(f"{name}={json.dumps(value)}" for name, value in wanted.items())]
    job = submit(cluster, "workers", "2", *words)
    cluster.until(lambda: (out / "seed" / "stage.json").exists() and (out / "random" / "0" / "stage.json").exists())
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_0")
    assert cluster.wait(job, seconds=500) == ["COMPLETED"], cluster.logs()
    assert [restarts(cluster, f"{job}_{n}") for n in (0, 1)] == [1, 0]
    trials = json.loads((out / "mixture.json").read_text())["trials"]
    assert sorted(name for name, trial in trials.items() if "score" in trial) == ["random.0", "random.1", "seed"]
    assert len(read_provenance(out / "encoder")["parents"]) == 3
