"""A trainer that waits for its turns, and the process that gives them to it.

A trainer's process trains as its library does, but waits before its first step, and after every turn, for a line on its
standard input; at a turn's end it writes a line of JSON: seconds and examples of the turn, and the most memory so far beyond
what was there before the first step. So two of them take turns, and neither pays for the other.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARMUP_STEPS = 2  # the second shows what the allocator makes of what the first gave back


@dataclass(frozen=True)
class Job:
    """What both are told.

    Args:
        model: Folder with `encoder/` (ours), `text/` and `dense.safetensors` (the rival's): the same weights and tokenizer.
        config: Our stage, as `train.py` takes it.
        pairs: The rival's pairs, one batch after the other, as JSON lines of two texts with their prompts.
        batch_size: Pairs of a step.
        prefixes: Widths that are trained.
        temperature, learning_rate, betas, weight_decay, warmup, clip: As in our configuration; `clip` 0 is none.
        rounds: Turns after the warm-up.
        steps: Steps of a turn.
        threads: Of torch.
        seed: Of whatever draws at random.
        mini_batch: Texts that the rival embeds at a time, by its cached loss; None takes the loss that embeds all at once.
        overrides: `key=value` on top of our configuration.
        gradients: Write the first step's gradients here.
        held_out: Pairs, as JSON lines, that are embedded after the last step.
        vectors: Where to.
    """

    model: str
    config: str
    pairs: str
    batch_size: int
    prefixes: list[int]
    temperature: float
    learning_rate: float
    betas: list[float]
    weight_decay: float
    warmup: float
    clip: float
    rounds: int
    steps: int
    threads: int
    seed: int
    mini_batch: int | None = None
    overrides: list[str] = field(default_factory=list)
    gradients: str | None = None
    held_out: str | None = None
    vectors: str | None = None

    @property
    def num_steps(self) -> int:
        return WARMUP_STEPS + self.rounds * self.steps

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1))


class Turns:
    """Holds a trainer up until its turn comes, and tells what the turn took."""

    def __init__(self, job: Job) -> None:
        self.job, self.num_done = job, 0
        self.began = self.memory = 0.0
        self.reports = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # libraries print: what they do goes to the log

    def begin(self) -> None:
        """Just before the first step."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must not hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        self.memory = _memory("VmRSS")
        self._wait({"ready": True})

    def step_done(self) -> None:
        """At the end of every step, so that a turn holds the reading of as many batches as it has steps."""
        self.num_done += 1
        after = self.num_done - WARMUP_STEPS
        if after % self.job.steps or after < 0:
            return
        num_examples = (self.job.steps if after else WARMUP_STEPS) * self.job.batch_size
        seconds = time.perf_counter() - self.began
        report = {"seconds": seconds, "examples": num_examples, "peak_bytes": _memory("VmHWM") - self.memory}
        self._wait(report, is_last=self.num_done == self.job.num_steps)

    def _wait(self, report: Mapping[str, Any], *, is_last: bool = False) -> None:
        print(json.dumps(report), file=self.reports)
        if not is_last and not sys.stdin.readline():
            sys.exit("nobody waits for this trainer any more")
        self.began = time.perf_counter()


def _memory(field: str) -> float:
    """Bytes, as Linux counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Contestant:
    """A trainer's process, waiting for its turns."""

    def __init__(self, kind: str, job: Job, folder: Path, path: str | None = None) -> None:
        self.name, self.log = kind, folder / f"{kind}.log"
        self.last: dict[str, float] = {}
        job.save(folder / f"{kind}.json")
        environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
        environment |= {"OMP_NUM_THREADS": str(job.threads), "RAYON_NUM_THREADS": str(job.threads)}
        environment |= with_path(path)
        command = [sys.executable, str(Path(__file__).with_name("trainers.py")), kind, str(folder / f"{kind}.json")]
        with self.log.open("w") as log:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)

    def ready(self) -> None:
        """Once it has loaded everything and waits for its first turn."""
        self._report()

    def turn(self) -> dict[str, float]:
        """Seconds, examples and peak bytes of the next turn; the warm-up is the first."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its report says what happened
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        self.last = self._report()
        return self.last

    def wait(self) -> None:
        """Until the run is over and what it writes at its end is there."""
        if self.process.wait():
            self._fail()

    def _report(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def _fail(self) -> Any:
        self.process.wait()
        said = self.log.read_text().strip().splitlines() or ["nothing was said"]
        raise ValueError(f"the process of {self.name} ended early (status {self.process.returncode}): {said[-1].strip()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def with_path(path: str | None) -> dict[str, str]:
    """The variable that lets Python look into a further folder."""
    folders = [folder for folder in (path, os.environ.get("PYTHONPATH")) if folder]
    return {"PYTHONPATH": os.pathsep.join(folders)} if folders else {}
