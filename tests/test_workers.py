"""Promises of the processes that read: the same batches for any number of them, none that hangs, none that stays."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from changes import FULL, ROOT, TASKS, once, stream_of
from samples import Watched, pairs

from datamodules.loader import loader_of
from datamodules.plan import rows_of_rank
from datamodules.processors.processor import ProcessorConfig
from datamodules.shards import Split, write_split
from datamodules.training import TrainingData


@pytest.mark.parametrize("start_method", ["fork", "spawn", pytest.param("forkserver", marks=FULL)])
def test_every_rank_reads_its_own_rows_and_no_others(tmp_path, start_method):
    """webdataset's split_by_node reads everything on every rank when workers are spawned."""
    write_split(tmp_path / "s", pairs(20))
    split, log = Split(tmp_path / "s"), tmp_path / "s" / "read.txt"
    for rank in range(2) if start_method == "fork" else (1,):
        stream = stream_of(split, rank=rank, ranks=2, source=Watched)
        batches = once(loader_of(stream, 2 if start_method == "fork" else 1, start_method=start_method, max_wait_seconds=60))
        planned = [stream.plan.positions(step)[rows_of_rank(6, rank, 2)].tolist() for step in range(5)]
        assert [[int(key[1:]) for key in keys] for _, _, keys, _, _ in batches] == planned
        assert sorted(map(int, log.read_text().split())) == sorted(position for rows in planned for position in rows)
        log.unlink()


def data_of(world: Path, tmp_path: Path, *, num_steps: int = 6, rank: int = 0, ranks: int = 1, **more) -> TrainingData:
    """TrainingData with a stand-in for its trainer."""
    defaults = {"processor": ProcessorConfig(vocab_size=400), "steps_per_block": 9, "num_workers": 0, "max_wait_seconds": 60}
    data = TrainingData(str(world), TASKS, **{**defaults, **more})
    about = {"world_size": ranks, "global_rank": rank, "max_steps": num_steps, "max_epochs": 1, "accumulate_grad_batches": 1}
    data.trainer = SimpleNamespace(**about, default_root_dir=str(tmp_path))  # pyright: ignore[reportAttributeAccessIssue]
    data.prepare_data()
    data.setup("fit")
    return data


def told(inputs: Any) -> bytes:
    """Whatever a model would see of inputs."""
    tensors = [inputs.token_ids, inputs.lengths, *(views for _, views in sorted(inputs.media.items()))]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def same_global_batches(world: Path, tmp_path: Path, workers: int, start_method: Any, ranks: int) -> None:
    wholes = once(data_of(world, tmp_path).train_dataloader())
    assert {batch.task for batch in wholes} == set(TASKS)
    for rank in range(ranks):
        data = data_of(world, tmp_path, rank=rank, ranks=ranks, num_workers=workers, start_method=start_method)
        parts = once(data.train_dataloader())
        for whole, part in zip(wholes, parts, strict=True):
            rows = rows_of_rank(len(whole.keys), rank, ranks).tolist()
            assert (part.task, part.step, part.keys) == (whole.task, whole.step, [whole.keys[row] for row in rows])
            assert part.query_id.tolist() == whole.query_id[rows].tolist()
            assert part.target_id.tolist() == whole.target_id[rows].tolist()
            if ranks == 1:
                assert (told(part.query), told(part.target)) == (told(whole.query), told(whole.target))


ALL = [(w, m, r) for m in ("fork", "forkserver", "spawn") for w in (0, 1, 2, 4) for r in (1, 2) if w or m == "fork"]


SHARE = [(0, "fork", 2), (2, "fork", 2), (4, "fork", 1), (1, "forkserver", 1)]


TOO_MANY = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # for two cores


@TOO_MANY
@pytest.mark.parametrize(("workers", "start_method", "ranks"), SHARE)
def test_global_batches_are_the_same_for_any_workers_and_ranks(world, tmp_path, workers, start_method, ranks):
    same_global_batches(world, tmp_path, workers, start_method, ranks)


@FULL
@TOO_MANY
@pytest.mark.parametrize(("workers", "start_method", "ranks"), ALL)
def test_global_batches_are_the_same_over_the_whole_grid(world, tmp_path, workers, start_method, ranks):
    same_global_batches(world, tmp_path, workers, start_method, ranks)


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(*_: Any) -> None:
    time.sleep(100)


@pytest.mark.parametrize(
    ("what", "message"), [(hangs, "timed out after 1.5 seconds"), (killed, "(killed by signal: Killed|exited unexpectedly)")]
)
def test_a_worker_that_hangs_or_is_killed_ends_the_run_with_a_sentence(tmp_path, monkeypatch, what, message):
    write_split(tmp_path / "s", pairs(12))
    monkeypatch.setattr(Split, "read", what)
    batches = iter(loader_of(stream_of(Split(tmp_path / "s")), 2, max_wait_seconds=1.5))
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"a process that reads data hangs or died: .*{message}.*conf=verify finds it"
    ) as caught:
        next(batches)
    assert time.monotonic() - began < 4
    assert "\n" not in str(caught.value)
    with suppress(RuntimeError):  # torch tells of the end of workers that a loader still waits for
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
    del batches, caught


def raises(*_: Any) -> None:
    raise RuntimeError("stack expects each tensor to be equal size")


def test_an_error_in_a_worker_is_told_as_what_it_is(tmp_path, monkeypatch):
    write_split(tmp_path / "s", pairs(12))
    monkeypatch.setattr(Split, "read", raises)
    batches = iter(loader_of(stream_of(Split(tmp_path / "s")), 1, max_wait_seconds=10))
    with pytest.raises(Exception, match="stack expects each tensor") as caught:
        next(batches)
    assert "hangs or died" not in str(caught.value)
    del batches, caught


EXITS = """
import os
from torch.utils.data import IterableDataset
from datamodules.loader import loader_of

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield os.getpid()

batches = iter(loader_of(Endless(), 1))
next(batches)
"""


def test_a_program_ends_though_it_holds_a_loader(tmp_path):
    (tmp_path / "exits.py").write_text(EXITS)
    subprocess.run(
        [sys.executable, str(tmp_path / "exits.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=30
    )


VICTIM = """
import os, sys, time
from torch.utils.data import IterableDataset
from datamodules.loader import loader_of

class Stuck(IterableDataset):
    def __iter__(self):
        yield os.getpid()
        time.sleep(100)  # stuck in an example: it sees nothing of what happens around it

if __name__ == "__main__":
    batches = iter(loader_of(Stuck(), 2, start_method=sys.argv[1]))
    print(next(batches), next(batches), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_no_worker_outlives_a_killed_run(tmp_path, start_method):
    (tmp_path / "victim.py").write_text(VICTIM)
    command = [sys.executable, str(tmp_path / "victim.py"), start_method]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as run:
        assert run.stdout is not None
        workers = [int(word) for word in run.stdout.readline().split()]
        assert len(set(workers)) == 2
        run.kill()
    deadline = time.monotonic() + 2.0
    while left := [pid for pid in workers if runs(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} of 2 workers outlived the run by 2 s")
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
