"""Processes that srun began are given torchrun's variables, so that Lightning and the judge know one way of being many.

Lightning's own reading of Slurm's variables is kept away. It saves and requeues within a signal's handler, takes the tasks of
`salloc` followed by `srun` for so many runs of their own, and one process in a job for a share of several.
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

RANKS = "ddp_find_unused_parameters_true"  # a batch of one task leaves the parts of others unused
FIRST_PORT, NUM_PORTS = 15_000, 10_000  # our choice: below those that connections get by themselves


def join_step() -> None:
    """Set torchrun's variables where srun began several tasks; elsewhere in a job processes are begun as on any machine.

    Raises:
        ValueError: The nodes have unlike numbers of tasks.
    """
    if "SLURM_JOB_ID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1 or "SLURM_PTY_PORT" in os.environ:  # the latter: a shell for a person
        os.environ["SLURM_JOB_NAME"] = "interactive"  # how Lightning is told to leave Slurm alone
        return
    job, step, nodes = (os.environ[f"SLURM_{name}"] for name in ("JOB_ID", "STEP_ID", "STEP_NODELIST"))
    tasks = os.environ["SLURM_STEP_TASKS_PER_NODE"]
    if not (each := re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)):
        raise ValueError(f"srun began {tasks} tasks on {nodes}; each node needs as many: give --ntasks-per-node")
    joined = {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": each[1],
        "TORCHELASTIC_RUN_ID": f"{job}.{step}",
    }
    os.environ.update(joined)
    os.environ.setdefault("MASTER_ADDR", first_of(nodes))
    os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + (int(job) + 1009 * int(step)) % NUM_PORTS))


def keys_of_job(config: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Further keys of a training stage that all processes of this job do together.

    Args:
        config: The stage's configuration.
        given: Keys of the command line, which stay as they are.
    """
    num_nodes, num_tasks = (int(os.environ.get(name) or 1) for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"))
    num_processes = int(os.environ.get("SLURM_NTASKS_PER_NODE") or max(1, num_tasks // num_nodes))
    keys: dict[str, Any] = {"trainer.num_nodes": num_nodes, "trainer.devices": num_processes}
    if num_nodes * num_processes > 1 and config["trainer"].get("strategy", "auto") == "auto":
        keys["trainer.strategy"] = RANKS
    return {key: value for key, value in keys.items() if key not in given}


def first_of(nodes: str) -> str:
    """The first node of a list such as `gpu[03-05,9],login`."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    assert found is not None
    return f"{found[1]}{found[2] or ''}{found[3]}"
