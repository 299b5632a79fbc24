"""`conf=recipe`: the stages of a model as a graph, run in order or as dependent Slurm jobs; what is done stays done."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from datamodules.job import locked
from lightning_modules.lineage import read_record, write_lineage, write_record
from lightning_modules.recipe_graph import ROOT, Runs, StageSpec, runs_of
from lightning_modules.recipe_runs import lock_of, make, state_of

SUBMIT = ROOT / "experiments" / "slurm" / "submit.sh"


def recipe(
    out: str,
    stages: dict[str, StageSpec],
    *,
    action: Literal["run", "submit", "status"] = "run",
    only: str | None = None,
) -> None:
    """Make what is not made yet of a graph of stages, each in `<out>/<stage>`, one of several runs in `<out>/<stage>/<n>`.

    A run is done when its configuration, its inputs and what it left are as its record says (`stage.json`). What was made with
    other ones is moved aside as `<folder>.<hash>`, not lost. A run that was stopped goes on.

    Args:
        out: Folder of the recipe.
        stages: Name to stage.
        action: `run` does them here, one after another; `submit` hands them to Slurm as dependent jobs, those with an array as
            job arrays; `status` tells what is done, running, failed or waiting, and what it cost.
        only: Do this stage alone; of several runs, in a task of a Slurm array, that of its number.

    Raises:
        ValueError: The graph is none, a stage failed, or one that it needs is not done.
    """
    stages = {name: replace(spec, keys=_plain(spec.keys), array=_plain(spec.array)) for name, spec in stages.items()}
    runs = runs_of(Path(out), stages)
    if only is not None and only not in stages:
        raise ValueError(f"only is {only!r}; the recipe's stages are {', '.join(stages)}")
    if action == "status":
        show(runs)
    elif action == "submit":
        submit(runs, sys.argv[1:])
    else:
        for run in runs.values():
            if only is None or (run.stage == only and run.number in ("", os.environ.get("SLURM_ARRAY_TASK_ID", run.number))):
                make(run, runs)
                with locked(Path(out) / ".lineage.lock"):
                    write_lineage(Path(out), {name: one.folder for name, one in runs.items()})


def _plain(value: Any) -> Any:
    """Values as they were written: the parser makes a mapping that names a class something of its own."""
    if isinstance(value, dict | Namespace):
        return {key: _plain(inner) for key, inner in (value if isinstance(value, dict) else vars(value)).items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def submit(runs: Runs, words: list[str]) -> None:
    """Hand what is not done to Slurm, each stage as one job that waits for those that it needs.

    Args:
        runs: Of the recipe.
        words: Of the command line that asked for this.

    Raises:
        ValueError: Slurm is not here, or refuses a job.
    """
    words, jobs, anew = [word for word in words if word.partition("=")[0] != "action"], dict[str, str](), set[str]()
    for stage, spec in {run.stage: run.spec for run in runs.values()}.items():
        own = [run for run in runs.values() if run.stage == stage]
        states = {run.name: state_of(run, runs) for run in own}
        before = {jobs[runs[name].stage] for run in own for name in run.parents if runs[name].stage in jobs}
        todo = [run for run in own if states[run.name] not in ("done", "running", "submitted")]
        todo += [run for run in own if states[run.name] == "done" and anew & {runs[name].stage for name in run.parents}]
        queued = {str(read_record(run.folder).get("job")) for run in own if states[run.name] in ("running", "submitted")}
        if "None" in queued:
            raise ValueError(f"stage {stage} is running here and not as a job; what depends on it cannot wait for it")
        if todo:
            options = [f"--{name}={value}" for name, value in spec.slurm.items()]
            options += [f"--array={','.join(run.number for run in todo)}"] if spec.array else []
            options += [f"--dependency=afterok:{':'.join(sorted(before))}", "--kill-on-invalid-dep=yes"] if before else []
            job = _submitted([f"--job-name={stage}", *options, "recipe", *words, f"only={stage}"])
            queued.add(job)
            anew.add(stage)
            for run in todo:
                with locked(lock_of(run), waits=False) as is_ours:  # the job may have begun, and writes this itself
                    if is_ours:
                        write_record(run.folder, {**read_record(run.folder), "job": job})
        if queued:
            jobs[stage] = ":".join(sorted(queued))
        print(f"{stage}: " + (f"job {jobs[stage]}" if queued else "done before"), flush=True)


def _submitted(words: list[str]) -> str:
    """The number of a job that is submitted with the site's values."""
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here; action=submit needs Slurm, action=run does without")
    asked = subprocess.run(["bash", str(SUBMIT), "--parsable", *words], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(f"Slurm refused {words[0]}: {' '.join(asked.stderr.split())}")
    return asked.stdout.strip().partition(";")[0]


def show(runs: Runs) -> None:
    """Print a line for each run, and what all of them cost."""
    table = Table("run", "state", "attempts", "hours", "device hours", "ended", "job", box=None, header_style="bold")
    total = 0.0
    for run in runs.values():
        record = read_record(run.folder)
        state = state_of(run, runs)
        now = time.time() - record["began"] if state == "running" and "began" in record else 0.0
        hours = (sum(attempt["seconds"] for attempt in record.get("attempts", [])) + now) / 3600
        total += hours * record.get("devices", 1)
        ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["ended"])) if "ended" in record else ""
        cost = [f"{hours:.2f}", f"{hours * record.get('devices', 1):.2f}"] if "key" in record else ["", ""]
        table.add_row(run.name, state, str(len(record.get("attempts", []))), *cost, ended, str(record.get("job") or ""))
    console = Console()
    console.print(table)
    console.print(f"{total:.2f} device hours in all")
