"""Doing one run of a recipe: whether it is done already, its process, its record."""

import ctypes
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datamodules.job import digest_of, locked
from lightning_modules.cluster import keys_of_job
from lightning_modules.lineage import encoders_below, identity, inputs_of, read_record, revision, write_record
from lightning_modules.recipe_graph import ROOT, Run, Runs, placed, words_of

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = {code for stop in FORWARDED for code in (-stop, 128 + stop)}
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def key_of(run: Run, runs: Runs) -> tuple[str, dict[str, str]]:
    """A hash of all that decides what a run makes, and its inputs from outside of the recipe."""
    inputs = inputs_of(run.config)
    return digest_of(run.config, inputs, [read_record(runs[name].folder).get("left") for name in run.parents]), inputs


def lock_of(run: Run) -> Path:
    """Held by the process that does a run."""
    return run.folder.parent / f".{run.folder.name}.lock"


def state_of(run: Run, runs: Runs) -> str:
    """`done`, `running`, `submitted`, `failed`, `stopped`, `changed` (settings, inputs, results) or `waiting`."""
    record = read_record(run.folder)
    if is_running(run):
        return "running"
    if "key" not in record:
        return "submitted" if is_in_queue(record) else "waiting"
    if is_done(run, runs):
        return "done"
    if is_in_queue(record):
        return "submitted"
    if record["state"] == "done" or record["key"] != key_of(run, runs)[0]:
        return "changed"
    return "stopped" if record["state"] == "running" else record["state"]


def is_running(run: Run) -> bool:
    """Whether a process holds the run, on any machine whose disk knows of the others' locks."""
    if not lock_of(run).exists():
        return False
    with locked(lock_of(run), waits=False) as is_free:
        return not is_free


def is_done(run: Run, runs: Runs) -> bool:
    """Whether a run's settings, inputs and what it left are as its record says."""
    record = read_record(run.folder)
    if record.get("state") != "done" or record["key"] != key_of(run, runs)[0]:
        return False
    return record["left"] == identity(run.folder)


def make(run: Run, runs: Runs) -> None:
    """Do a run unless it is done, once no other process holds it.

    Raises:
        ValueError: A run that it needs is not done, or it failed.
        SystemExit: A signal came; a run that trains has left a checkpoint, or was done just then.
    """
    with locked(lock_of(run)):
        make_held(run, runs)


def make_held(run: Run, runs: Runs) -> None:
    """`make` for who holds the run's lock."""
    for name in run.parents:
        if (state := state_of(runs[name], runs)) != "done":
            raise ValueError(f"stage {run.name} needs {name}, which is {state}")
    if is_done(run, runs):
        print(f"{run.name}: done before", flush=True)
        return
    (key, inputs), record = key_of(run, runs), read_record(run.folder)
    if record.get("key", key) != key and not run.searches:  # which goes on with more, and refuses what does not fit
        aside = _aside(run.folder, record["key"])
        print(f"{run.name}: was made with other settings or inputs, which now lies in {aside}", flush=True)
        run.folder.rename(aside)
        record = {}
    if record.get("state") == "running":  # it was killed; what it cost is what it wrote last
        seconds = max(0.0, _last_written(run.folder) - record["began"])
        record["attempts"].append({"began": record["began"], "seconds": seconds, "status": None})
    _attempt(run, placed(run.keys, run, runs), {**record, "key": key, "inputs": inputs})


def _aside(folder: Path, key: str) -> Path:
    """A place beside a folder where nothing lies yet."""
    names = (folder.with_name(f"{folder.name}.{key[:8]}{more}") for more in ("", *(f"-{n}" for n in range(1, 1000))))
    return next(place for place in names if not place.exists())


def _last_written(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.rglob("*") if file.is_file()), default=0.0)


def _attempt(run: Run, keys: dict[str, Any], record: dict[str, Any]) -> None:
    is_step = run.trains and "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ  # no step begins another
    if is_step:
        keys |= keys_of_job(run.config, keys)
    words = [sys.executable, str(ROOT / "train.py"), f"conf={run.spec.conf}", *words_of(keys)]
    words = ["srun", "--wait=600", *words] if is_step else words  # seconds for the others once one process has ended
    print(f"{run.name}: {shlex.join(words[1:])}", flush=True)
    began, attempts = time.time(), record.get("attempts", [])
    here = {"host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID"), "devices": devices_of(run.config, keys)}
    about = {"state": "running", "config": run.config, "parents": run.parents, "revision": revision()}
    record = {**record, **about, **here, "began": began, "attempts": attempts}
    write_record(run.folder, record)
    status, stops = _run_process(words)
    seconds = time.time() - began
    attempts.append({"began": began, "seconds": seconds, "status": status})
    ended = {"state": "done" if status == 0 else "stopped" if status in STOPPED else "failed", "ended": time.time()}
    if status == 0:
        ended |= {"left": identity(run.folder), "encoders": encoders_below(run.folder)}
    write_record(run.folder, {**record, **ended, "seconds": sum(attempt["seconds"] for attempt in attempts)})
    if ended["state"] == "stopped":
        print(f"{run.name} was stopped (status {status}); the same command goes on", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)
    if status:
        raise ValueError(
            f"stage {run.name} failed with status {status}, see above; mended, the same command goes on from there"
        )
    if stops:  # it was at its end already
        sys.exit(128 + stops[0])


def _run_process(words: list[str]) -> tuple[int, list[int]]:
    """Status of a command that hears the signals of this process, and ends with it; and the signals that came."""
    process = subprocess.Popen(words, process_group=0, preexec_fn=_end_with_parent)  # Ctrl-C reaches it once, through here
    stops: list[int] = []

    def forward(number: int, frame: Any) -> None:
        del frame
        stops.append(number)
        process.send_signal(number)

    former = {stop: signal.signal(stop, forward) for stop in FORWARDED}
    try:
        return process.wait(), stops
    finally:
        for stop, handler in former.items():
            signal.signal(stop, handler)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def devices_of(config: dict[str, Any], keys: dict[str, Any]) -> int:
    """Devices that a training run takes, for its cost; 1 of anything else."""
    trainer = config.get("trainer", {})
    sizes = [keys.get(f"trainer.{name}", trainer.get(name, 1)) for name in ("devices", "num_nodes")]
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def is_in_queue(record: dict[str, Any]) -> bool:
    """Whether Slurm has the job of a record, waiting or running.

    Raises:
        ValueError: Slurm does not say.
    """
    if not record.get("job") or shutil.which("squeue") is None:
        return False
    asked = subprocess.run(["squeue", "-h", "-o", "%T", "-j", record["job"]], capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise ValueError(f"Slurm does not say whether job {record['job']} is there: {' '.join(asked.stderr.split())}")
    return bool(asked.stdout.strip())
