"""A process that has imported everything once and forks a run for each line of JSON on its standard input (trials.py).

    {"arguments": [..], "environment": {..}, "log": path}   ->  the run's process id
    {"wait": process id}                                    ->  its exit status, negative for a signal

Each run is `train.py`'s own, in a process group of its own; what it trains on is written to `consumed-rank<r>.jsonl`.
`SPOIL` in the environment holds {"<step>": "<what>"}: spoil a step's values, for the trials of values that are not finite.
`SLOW_SAVE` holds seconds that a checkpoint waits before it is flushed, for the trials of kills while it is written.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import train
from lightning_modules.stage import Stage

torch.set_num_threads(1)
faulthandler.enable()  # a run that hangs is ended by SIGABRT, and says where it stood


def record(stage: Stage, batch: Any) -> None:
    file = Path(stage.trainer.default_root_dir) / f"consumed-rank{stage.global_rank}.jsonl"
    with file.open("a") as lines:
        lines.write(json.dumps([batch.step, batch.task, batch.keys]) + "\n")


def spoil(stage: Stage, batch: Any) -> None:
    """Make a step's values not finite, on the ranks that are named, in one of several places."""
    what = json.loads(os.environ.get("SPOIL", "{}")).get(str(batch.step), "")
    where, _, rank = what.partition("@")
    if not where or (rank and int(rank) != stage.global_rank):
        return
    value = float("inf") if where.startswith("inf") else float("nan")
    match where.split("-")[1]:
        case "weight":
            next(p for p in stage.parameters() if p.requires_grad).data.view(-1)[0] = value
        case "gradient":
            parameter = next(p for p in stage.parameters() if p.requires_grad)
            handle = parameter.register_hook(lambda g: (handle.remove(), torch.full_like(g, value))[1])
        case "loss":
            stage.guard.see_loss(torch.tensor(value))
        case "input":
            for views in batch.query.media.values() or batch.target.media.values():
                if views.is_floating_point():
                    views[:] = value


def instrument() -> None:
    begin = Stage.on_train_batch_start

    def on_train_batch_start(self: Stage, batch: Any, batch_idx: int) -> None:
        record(self, batch)
        spoil(self, batch)
        begin(self, batch, batch_idx)

    Stage.on_train_batch_start = on_train_batch_start
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(float(os.environ.get("SLOW_SAVE", "0")))
        fsync(descriptor)

    os.fsync = slow


def begin(command: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.environ.update(command["environment"])
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code: int | str = 1
    try:
        code = train.run(command["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    if isinstance(code, str):
        print(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    instrument()
    for line in sys.stdin:
        command = json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]) if "wait" in command else begin(command), flush=True)
