"""Promises of a run's checkpoints: whole or absent, every change detected, the newest good one found, no code run."""

import errno
import random
import shutil
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.checkpoints import Checkpoints, VerifiedCheckpointIO, newest, what_is_wrong_with

IO = VerifiedCheckpointIO()


def checkpoint(value: int = 1) -> dict:
    return {"state_dict": {"w": torch.arange(300.0) * value}, "step": value}


def test_a_checkpoint_is_read_back_and_by_plain_torch_too(tmp_path):
    IO.save_checkpoint(checkpoint(), tmp_path / "c.ckpt")
    for read in (IO.load_checkpoint(tmp_path / "c.ckpt"), torch.load(tmp_path / "c.ckpt", weights_only=True)):
        assert torch.equal(read["state_dict"]["w"], torch.arange(300.0))
    assert what_is_wrong_with(tmp_path / "c.ckpt") is None
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"]


def test_any_change_to_a_checkpoint_is_detected(tmp_path):
    IO.save_checkpoint(checkpoint(), tmp_path / "c.ckpt")
    whole, chance = (tmp_path / "c.ckpt").read_bytes(), random.Random(0)
    for number in range(1000):
        data = bytearray(whole)
        at = chance.randrange(len(data))
        match number % 4:
            case 0 | 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at:]
            case 3:
                data[at:at] = bytes([chance.randrange(256)])
        (tmp_path / "m.ckpt").write_bytes(data)
        assert what_is_wrong_with(tmp_path / "m.ckpt") is not None, number


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at inline_container.cc] unexpected pos"), OSError(errno.ENOSPC, "No space")]
)
def test_a_disk_that_fills_up_keeps_the_former_checkpoint(tmp_path, monkeypatch, error):
    IO.save_checkpoint(checkpoint(), tmp_path / "c.ckpt")

    def full(value, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"is the disk full|No space"):
        IO.save_checkpoint(checkpoint(2), tmp_path / "c.ckpt")
    assert IO.load_checkpoint(tmp_path / "c.ckpt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"]


def test_a_disk_without_room_is_found_out_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"takes 0 MB, 0 MB are free; the former one is kept"):
        IO.save_checkpoint(checkpoint(), tmp_path / "c.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("code ran",)

    IO.save_checkpoint({"x": Code()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        IO.load_checkpoint(tmp_path / "bad.ckpt", weights_only=False)
    torch.save(checkpoint(), tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="something else wrote it"):
        IO.load_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="no checkpoint at"):
        IO.load_checkpoint(tmp_path / "none.ckpt")


def test_the_newest_checkpoint_that_verifies_is_found_and_others_are_named(tmp_path, capsys):
    assert newest(tmp_path) is None
    for step in (5, 10, 1000):
        IO.save_checkpoint(checkpoint(step), tmp_path / f"step={step:08d}.ckpt")
    last = tmp_path / "step=00001000.ckpt"
    assert newest(tmp_path) == last
    last.write_bytes(last.read_bytes()[:-7])
    assert newest(tmp_path) == tmp_path / "step=00000010.ckpt"
    assert f"WARNING: the checkpoint {last} is passed over: it has no trailer" in capsys.readouterr().out
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        newest(tmp_path)


def trainer_at(folder, step: int, **more) -> SimpleNamespace:
    def save(path, weights_only):
        assert not weights_only  # optimiser and loops too
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")

    defaults = {"max_steps": 100, "should_stop": False, "world_size": 1, "is_global_zero": True, "ckpt_path": "x"}
    return SimpleNamespace(**{**defaults, **more}, default_root_dir=folder, global_step=step, save_checkpoint=save)


def kept(folder) -> list[int]:
    return sorted(int(path.stem.partition("=")[2]) for path in (folder / "checkpoints").iterdir())


def test_the_policy_says_which_checkpoints_are_written_and_kept(tmp_path):
    callback, module = Checkpoints(every_steps=5, keep=2, keep_every_steps=20), torch.nn.Linear(1, 1)
    callback.on_train_start(trainer_at(tmp_path, 0), module)  # pyright: ignore[reportArgumentType]
    for step in range(1, 43):
        for _ in range(2):  # two batches a step: the second is where the first one's gradients are still being gathered
            trainer = trainer_at(tmp_path, step, should_stop=step == 42)
            callback.on_train_batch_end(trainer, module, None, None, 0)  # pyright: ignore[reportArgumentType]
    assert kept(tmp_path) == [20, 40, 42]


def test_the_clock_makes_a_checkpoint_due(tmp_path, monkeypatch):
    callback, module = Checkpoints(every_steps=1000, every_minutes=1.0), torch.nn.Linear(1, 1)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    callback.on_train_start(trainer_at(tmp_path, 0), module)  # pyright: ignore[reportArgumentType]
    for step in range(1, 10):
        now += 25.0
        callback.on_train_batch_end(trainer_at(tmp_path, step), module, None, None, 0)  # pyright: ignore[reportArgumentType]
    assert kept(tmp_path) == [3, 6, 9]


def test_no_checkpoint_is_written_while_gradients_are_gathered(tmp_path, monkeypatch):
    callback, module = Checkpoints(every_steps=1000, every_minutes=1.0), torch.nn.Linear(1, 1)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    callback.on_train_start(trainer_at(tmp_path, 0), module)  # pyright: ignore[reportArgumentType]
    callback.on_train_batch_end(trainer_at(tmp_path, 1), module, None, None, 0)  # pyright: ignore[reportArgumentType]
    now = 100.0  # the clock makes one due in the middle of step 2
    callback.on_train_batch_end(trainer_at(tmp_path, 1), module, None, None, 1)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "checkpoints").exists()
    callback.on_train_batch_end(trainer_at(tmp_path, 2), module, None, None, 2)  # pyright: ignore[reportArgumentType]
    assert kept(tmp_path) == [2]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    module = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(module.bias, float("inf"))
    with pytest.raises(ValueError, match="bias holds values that are not finite at step 7"):
        Checkpoints().save(trainer_at(tmp_path, 7), module)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_in_an_old_folder_moves_the_old_checkpoints_aside(tmp_path, capsys):
    for number in (1, 2):
        IO.save_checkpoint(checkpoint(), tmp_path / "checkpoints" / "step=00000005.ckpt")
        (tmp_path / "checkpoints" / ".step=00000006.ckpt.77.partial").write_bytes(b"half")
        start = trainer_at(tmp_path, 0, ckpt_path=None)
        Checkpoints().on_train_start(start, torch.nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]
        assert [path.name for path in (tmp_path / f"checkpoints-{number}").iterdir()] == ["step=00000005.ckpt"]
        assert f"moved to {tmp_path}/checkpoints-{number}" in capsys.readouterr().out
