"""Runs to be interrupted: begun in a moment by a process that has everything imported, watched, and compared."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from samples import TINY

from lightning_modules.encoder.checkpoint import read_provenance

ROOT = Path(__file__).parent.parent
SMALL = [
    "conf=quickstart/prefinetune",
    "ckpt_path=newest",
    "trainer.max_steps=24",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks=[{class_path: lightning_modules.checkpoints.Checkpoints, init_args: {every_steps: 3}}]",
    "trainer.logger=false",
    *TINY,
    "data.num_workers=1",
    "model.encoder.backbone.text.attention_dropout=0.1",  # what is drawn at random must be the same after a resume
    "model.objective.queue=10",  # and so must what is kept of past batches
]
HANGS = 120.0  # seconds after which a run that should end is killed, and its test fails
RANKS = ["trainer.strategy=ddp_find_unused_parameters_true", "trainer.accelerator=cpu"]
TWO_RANKS = ["trainer.devices=2", *RANKS]


class Zygote:
    """Forks runs of train.py; see zygote.py."""

    def __init__(self, world: Path) -> None:
        self.world = world
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # no name of this machine is looked up
        environment.pop("TRITON_INTERPRET", None)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def begin(self, out: Path, *more: str, world_size: int = 1, base: Sequence[str] = SMALL, **environment: str) -> "Run":
        out.mkdir(parents=True, exist_ok=True)
        ranks = [f"trainer.devices={world_size}", *RANKS] if world_size > 1 else []
        arguments = [*base, f"data.root={self.world}", f"trainer.default_root_dir={out}", *ranks, *more]
        port = str(free_port())
        pids = []
        for rank in range(world_size):
            place = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world_size > 1 else {}
            command = {
                "arguments": arguments,
                "environment": {**place, **environment},
                "log": str(out / f"log-{rank}"),
            }
            pids.append(self.ask(**command))
        return Run(self, out, pids)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()  # a loader's worker, forked meanwhile, may hold its standard input open
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Run:
    """A run of one or more processes."""

    def __init__(self, zygote: Zygote, out: Path, pids: list[int]) -> None:
        self.zygote, self.out, self.pids = zygote, out, pids

    def send(self, stop: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], stop)

    def kill(self) -> None:
        """End it, after each rank has written to its log where it stands."""
        for stop in (signal.SIGABRT, signal.SIGKILL):
            for group in filter(alive, self.pids):
                os.killpg(group, stop)
            time.sleep(1.0)

    def wait(self) -> list[int]:
        """Exit statuses, once all have ended; nothing of the run may be left two seconds later, and none may hang."""
        watch = threading.Timer(HANGS, self.kill)
        watch.start()
        statuses = [self.zygote.ask(wait=pid) for pid in self.pids]
        assert not watch.finished.is_set(), f"the run hung:\n{self.log()}"
        watch.cancel()
        deadline = time.monotonic() + 2.0
        while left := [pid for pid in self.pids if alive(pid)]:
            assert time.monotonic() < deadline, f"processes of the groups {left} outlived the run"
            time.sleep(0.02)
        return statuses

    def wait_for_step(self, step: int, rank: int = 0) -> None:
        """Until a step has begun."""
        file = self.out / f"consumed-rank{rank}.jsonl"
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().count("\n") or last_step(file) < step:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.005)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.out.glob("log-*")))


def alive(group: int) -> bool:
    """Whether a process of a group runs; one that has ended counts no more, though nobody has asked for its status yet."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def last_step(file: Path) -> int:
    lines = [line for line in file.read_text().splitlines() if line.endswith("]")]
    return json.loads(lines[-1])[0] if lines else -1


def consumed(out: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Step to task and keys over all ranks, sorted; a step that was done again must have had the same."""
    found: dict[int, dict[int, list]] = {}
    for rank, file in enumerate(sorted(out.glob("consumed-rank*.jsonl"))):
        for line in file.read_text().splitlines():
            if not line.endswith("]"):  # the run was killed while it wrote
                continue
            step, *batch = json.loads(line)
            assert found.setdefault(step, {}).setdefault(rank, batch) == batch, f"step {step} differs after a resume"
    whole = {}
    for step, ranks in found.items():
        tasks = {task for task, _ in ranks.values()}
        assert len(tasks) == 1, f"ranks had different tasks at step {step}"
        whole[step] = (tasks.pop(), tuple(sorted(key for _, keys in ranks.values() for key in keys)))
    return whole


def consumed_by_any(out: Path) -> dict[int, tuple[str, set[str]]]:
    """Step to task and keys over all ranks of a run whose number of ranks changed: not all of them have every step."""
    whole: dict[int, tuple[str, set[str]]] = {}
    for file in out.glob("consumed-rank*.jsonl"):
        for line in file.read_text().splitlines():
            step, task, keys = json.loads(line)
            found = whole.setdefault(step, (task, set()))
            assert found[0] == task, f"step {step} has another task after a resume"
            found[1].update(keys)
    return whole


def weights_hash(out: Path) -> str:
    return read_provenance(out / "encoder")["sha256"]


def free_port() -> int:
    """A port that nobody listens at, below those that connections get by themselves.

    A rank that asks for a port of those before the other listens there can be connected to itself, and wait for ever.
    """
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port was found")
