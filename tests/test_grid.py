"""What a Slurm job gives to train.py, tested without slurm: safe words, own roots, torchrun's variables, no endless job."""

import os
import subprocess
from pathlib import Path

import pytest
from trials import ROOT

from experiments.slurm.arguments import blocks, grid, line, stage, tasks
from lightning_modules.cluster import first_of, join_step

TRAINED = "conf=quickstart/prefinetune"


def written(folder: Path, *lines: str) -> str:
    (folder / "grid.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "grid.txt")


def test_a_line_is_cut_as_a_shell_would_and_never_run(tmp_path):
    file = written(tmp_path, f"""{TRAINED} "data.root=$(touch {tmp_path}/run) `id` *;" 'model.prefixes=[64, 128]' # a remark""")
    found = line("1", file, "runs/grid")
    assert found[:3] == [TRAINED, f"data.root=$(touch {tmp_path}/run) `id` *;", "model.prefixes=[64, 128]"]
    assert found[3:] == ["trainer.default_root_dir=runs/grid/1", "ckpt_path=newest", "trainer.num_nodes=1", "trainer.devices=1"]
    told = subprocess.run(
        [ROOT / ".venv/bin/python", "-m", "experiments.slurm.arguments", "line", "1", file, "runs/grid"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert told.stdout.decode().split("\0")[:-1] == found
    assert not (tmp_path / "run").exists()


def test_what_a_line_gives_itself_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert stage(TRAINED)[1:] == [
        *("ckpt_path=newest", "trainer.num_nodes=2", "trainer.devices=4", "trainer.strategy=ddp_find_unused_parameters_true")
    ]
    own = ["trainer.default_root_dir=runs/a", "ckpt_path=b", "trainer.strategy=ddp", "trainer.devices=2", "trainer.num_nodes=1"]
    file = written(tmp_path, " ".join([TRAINED, *own]), "conf=soup checkpoints=[a] out=b")
    assert line("1", file, "runs/grid") == [TRAINED, *own]
    assert line("2", file, "runs/grid") == ["conf=soup", "checkpoints=[a]", "out=b"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["conf=soup 'checkpoints=[a] out=b"], "line 1 of .*: No closing quotation"),
        ([f"{TRAINED}", "", f"{TRAINED}"], "line 2 of .* is empty or a comment"),
        (["conf=nothing"], "line 1 of .*: unknown stage 'nothing'"),
        (["trainer.max_steps=3"], "line 1 of .*: which stage"),
        ([f"{TRAINED} rm -rf"], "line 1 of .*: 'rm' is no key=value"),
        (
            [f"{TRAINED} trainer.default_root_dir=a", TRAINED, f"{TRAINED} trainer.default_root_dir=a"],
            "lines 1 and 3 of .* same",
        ),
        ([], "has no line"),
    ],
)
def test_a_grid_is_checked_before_it_is_submitted(tmp_path, lines, message):
    (tmp_path / "grid.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        grid(str(tmp_path / "grid.txt"), str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_line_that_is_not_there_is_refused_in_one_sentence(tmp_path):
    for number in ("0", "3"):
        with pytest.raises(ValueError, match=rf"has no line {number}, its lines are 1 to 2"):
            line(number, written(tmp_path, TRAINED, TRAINED), "runs/grid")


def test_a_grids_lines_stay_those_that_its_runs_began_with(tmp_path):
    assert grid(written(tmp_path, TRAINED, TRAINED), str(tmp_path / "runs")) == ["2"]
    assert grid(written(tmp_path, TRAINED, TRAINED), str(tmp_path / "runs")) == ["2"]
    with pytest.raises(ValueError, match=r"were begun with another grid, .*runs/grid.txt; give another folder"):
        grid(written(tmp_path, TRAINED, f"{TRAINED} trainer.max_steps=9"), str(tmp_path / "runs"))


def test_only_a_stage_with_blocks_is_shared_by_an_array():
    assert blocks("conf=assemble", "source=a", "out=b") == ["conf=assemble", "source=a", "out=b"]
    for words in (["conf=verify", "root=a"], [TRAINED]):
        with pytest.raises(ValueError, match="has no blocks that an array could share"):
            blocks(*words)


def test_more_processes_than_one_are_for_what_can_use_them():
    evaluate = "conf=quickstart/evaluate"
    soup = ["conf=soup", "checkpoints=[a]", "out=b"]
    assert [tasks(TRAINED), tasks(evaluate), tasks(*soup)] == [["all"], ["all"], ["one"]]


STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07,09-11]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NAME": "interactive",
}
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)


def joined(monkeypatch, **environment: str) -> dict[str, str]:
    """Of torchrun's variables those that are set for a task."""
    with monkeypatch.context() as patched:
        for name in (*RANKS, *(name for name in os.environ if name.startswith("SLURM_"))):
            patched.delenv(name, raising=False)
        for name, value in environment.items():
            patched.setenv(name, value)
        before = dict(os.environ)
        try:
            join_step()
            return {name: value for name, value in os.environ.items() if name in (*RANKS, "SLURM_JOB_NAME")}
        finally:
            os.environ.clear()
            os.environ.update(before)


def test_tasks_of_srun_are_ranks_as_torchruns_are(monkeypatch):
    assert joined(monkeypatch, **STEP) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15_000 + (123456 + 1009) % 10_000),
        "TORCHELASTIC_RUN_ID": "123456.1",
        "SLURM_JOB_NAME": "interactive",
    }


def test_one_process_in_a_job_is_as_on_any_machine(monkeypatch):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "stage"}
    assert joined(monkeypatch) == {}
    assert joined(monkeypatch, **job) == {"SLURM_JOB_NAME": "interactive"}  # a batch script without srun
    assert joined(monkeypatch, **job, SLURM_STEP_NUM_TASKS="1") == {"SLURM_JOB_NAME": "interactive"}
    assert joined(monkeypatch, **STEP, SLURM_PTY_PORT="1") == {"SLURM_JOB_NAME": "interactive"}  # srun --pty, a shell
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}
    assert joined(monkeypatch, **{**STEP, **torchrun}) == {**torchrun, "SLURM_JOB_NAME": "interactive"}


def test_nodes_with_unlike_numbers_of_tasks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"srun began 2,1 tasks on .*; each node needs as many: give --ntasks-per-node"):
        joined(monkeypatch, **{**STEP, "SLURM_STEP_TASKS_PER_NODE": "2,1"})


def test_the_first_node_of_a_list():
    lists = {"vm": "vm", "gpu[03-05,9],login": "gpu03", "a[1,3]-ib,b": "a1-ib", "a1,a2": "a1", "a-b[7]": "a-b7"}
    assert {nodes: first_of(nodes) for nodes in lists} == lists


def test_a_job_that_gets_nowhere_ends_at_last():
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "4", "MAX_RESTARTS": "3"}
    done = subprocess.run(
        ["bash", "experiments/slurm/stage.sbatch", "conf=soup"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: job 7 was begun again 4 times; MAX_RESTARTS in site.sh allows 3\n"
