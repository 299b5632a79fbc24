"""Promises of a run whose logs cannot be written: it says so once, trains on, and its checkpoints are those of any run."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from trials import SMALL, consumed, weights_hash

from lightning_modules.checkpoints import FOLDER, in_order

LOGGERS = """trainer.logger=[
 {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: %s, name: logs, flush_logs_every_n_steps: 2}},
 {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: %s, name: tensorboard, flush_secs: 0}}]"""


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    run = zygote.begin(out)
    assert run.wait() == [0], run.log()
    return out


def logging_to(zygote, out: Path, logs: Path):
    base = [word for word in SMALL if not word.startswith("trainer.logger")]
    return zygote.begin(out, LOGGERS.replace("\n", "") % (logs, logs), base=base)


def unharmed(run, out: Path, reference: Path, *names: str) -> None:
    assert run.wait() == [0], run.log()
    for name in names:
        assert run.log().count(f"WARNING: {name} fails") == 1, run.log()
    assert consumed(out) == consumed(reference)
    assert weights_hash(out) == weights_hash(reference)
    assert [path.name for path in in_order(out / FOLDER)] == [path.name for path in in_order(reference / FOLDER)]


def test_a_log_folder_that_vanishes_ends_no_run(zygote, reference, tmp_path):
    run = logging_to(zygote, tmp_path / "run", tmp_path / "logs")
    run.wait_for_step(5)
    shutil.rmtree(tmp_path / "logs")
    unharmed(run, tmp_path / "run", reference, "CSVLogger")


def test_a_log_folder_that_cannot_be_made_ends_no_run(zygote, reference, tmp_path):
    (tmp_path / "logs").write_text("")
    run = logging_to(zygote, tmp_path / "run", tmp_path / "logs")
    unharmed(run, tmp_path / "run", reference, "CSVLogger", "TensorBoardLogger")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of its own, of 4 KiB; whoever may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], check=False).returncode:
        pytest.skip("a disk of its own takes root's rights to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_log_disk_that_fills_up_ends_no_run(zygote, reference, disk, tmp_path):
    run = logging_to(zygote, tmp_path / "run", disk)
    unharmed(run, tmp_path / "run", reference, "CSVLogger", "TensorBoardLogger")


def test_a_run_whose_own_disk_fills_up_goes_on_exactly_once_there_is_room(zygote, reference, disk, tmp_path):
    kibibytes = in_order(reference / FOLDER)[0].stat().st_size // 1024
    subprocess.run(["mount", "-o", f"remount,size={2.5 * kibibytes:.0f}k", disk], check=True)
    out = tmp_path / "run"
    out.mkdir()
    (out / FOLDER).symlink_to(disk)
    run = zygote.begin(out)
    assert run.wait() == [1], run.log()
    assert "error: the disk is full" in run.log()
    assert [path.name for path in in_order(disk)] == ["step=00000006.ckpt", "step=00000003.ckpt"]
    subprocess.run(["mount", "-o", f"remount,size={5 * kibibytes}k", disk], check=True)
    run = zygote.begin(out)
    assert run.wait() == [0], run.log()
    assert consumed(out) == consumed(reference)
    assert weights_hash(out) == weights_hash(reference)
