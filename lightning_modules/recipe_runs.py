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
    if "key" not in record:
        return "submitted" if is_in_queue(record) else "waiting"
    if record["state"] == "running" and is_running(record):
        return "running"
    if record["key"] != key_of(run, runs)[0] or (record["state"] == "done" and record["left"] != identity(run.folder)):
        return "changed"
    if record["state"] != "done" and is_in_queue(record):
        return "submitted"
    return "stopped" if record["state"] == "running" else record["state"]


def claim(run: Run, runs: Runs) -> None:
    """Have a run's record say that this process does it, before it is made; its caller sees to it that no other does so."""
    key, inputs = key_of(run, runs)
    write_record(run.folder, {**read_record(run.folder), "key": key, "inputs": inputs, "state": "running", **_here()})


def make(run: Run, runs: Runs) -> None:
    """Do a run unless it is done.

    Raises:
        ValueError: A run that it needs is not done, or it failed.
        SystemExit: A signal ended it; a run that trains has left a checkpoint.
    """
    with locked(lock_of(run)):
        for name in run.parents:
            if (state := state_of(runs[name], runs)) != "done":
                raise ValueError(f"stage {run.name} needs {name}, which is {state}")
        if state_of(run, runs) == "done":
            print(f"{run.name}: done before", flush=True)
            return
        (key, inputs), record = key_of(run, runs), read_record(run.folder)
        if record.get("key", key) != key:
            aside = run.folder.with_name(f"{run.folder.name}.{record['key'][:8]}")
            print(f"{run.name}: was made with other settings or inputs, which now lies in {aside}", flush=True)
            run.folder.rename(aside)
            record = {}
        _attempt(run, placed(run.keys, run, runs), {**record, "key": key, "inputs": inputs})


def _attempt(run: Run, keys: dict[str, Any], record: dict[str, Any]) -> None:
    config = run.config
    if in_job := run.trains and "SLURM_JOB_ID" in os.environ:
        keys |= keys_of_job(config, keys)
    words = [sys.executable, str(ROOT / "train.py"), f"conf={run.spec.conf}", *words_of(keys)]
    words = ["srun", "--wait=600", *words] if in_job else words  # seconds for the others once one process has ended
    print(f"{run.name}: {shlex.join(words[1:])}", flush=True)
    began, attempts = time.time(), record.get("attempts", [])
    about = {"state": "running", "config": config, "parents": run.parents, "revision": revision()}
    record = {**record, **about, **_here(), "began": began, "attempts": attempts}
    write_record(run.folder, record)
    status = _run_process(words)
    seconds = time.time() - began
    attempts.append({"began": began, "seconds": seconds, "status": status})
    ended = {"state": "done" if status == 0 else "failed", "ended": time.time(), "devices": devices_of(config, keys)}
    if status == 0:
        ended |= {"left": identity(run.folder), "encoders": encoders_below(run.folder)}
    elif status >= 128 or status < 0:
        ended["state"] = "stopped"
    write_record(run.folder, {**record, **ended, "seconds": sum(attempt["seconds"] for attempt in attempts)})
    if ended["state"] == "stopped":
        print(f"{run.name} was stopped (status {status}); the same command goes on", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)
    if status:
        raise ValueError(
            f"stage {run.name} failed with status {status}, see above; mended, the same command goes on from there"
        )


def _run_process(words: list[str]) -> int:
    """Status of a command that hears the signals of this process, and ends with it."""
    process = subprocess.Popen(words, process_group=0, preexec_fn=_end_with_parent)  # Ctrl-C reaches it once, through here
    former = {stop: signal.signal(stop, lambda number, _: process.send_signal(number)) for stop in FORWARDED}
    try:
        return process.wait()
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


def _here() -> dict[str, Any]:
    """What `is_running` knows this process by."""
    process = {"pid": os.getpid(), "started": started(os.getpid()), "boot": boot_id()}
    return {**process, "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID"), "began": time.time()}


def is_running(record: dict[str, Any]) -> bool:
    """Whether the process that a record names is there: on this machine as a process, elsewhere as a job."""
    if record.get("boot") == boot_id():
        return started(record["pid"]) == record.get("started") is not None
    return is_in_queue(record)


def started(pid: int) -> int | None:
    """When a process started, in clock ticks since its machine did, which tells it from a later one of its number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


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


def boot_id() -> str:
    """Of this machine since it started; process numbers mean nothing to another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
