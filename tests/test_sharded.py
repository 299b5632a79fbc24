"""Promises of every strategy: one process, DDP and FSDP2 train the same, in parts or whole; any checkpoint goes on in any."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from trials import consumed, weights_hash

from lightning_modules.checkpoints import FOLDER, VerifiedCheckpointIO, in_order, newest, what_is_wrong_with
from lightning_modules.encoder.checkpoint import read_weights
from lightning_modules.sharded import COMPLETE

STILL = ["model.encoder.backbone.text.attention_dropout=0.0", "trainer.max_steps=12"]  # ranks draw numbers of their own
IN_PARTS = ["model.compute.max_tokens=64", "model.compute.checkpoint_layers=true", "model.compare_cached=true"]
SHARDED = ["trainer.strategy={class_path: lightning_modules.sharded.Sharded}"]
LAYOUTS = {"one": (1, []), "ddp": (2, []), "sharded": (2, SHARDED)}
NEAR = 1e-3  # two runs of 12 steps whose sums have another order end so near to each other, as AdamW divides by what is small


def trained(zygote, out: Path, layout: str, *more: str) -> Path:
    world_size, strategy = LAYOUTS[layout]
    run = zygote.begin(out, *STILL, *strategy, *more, world_size=world_size)
    assert run.wait() == [0] * world_size, run.log()
    return out


@pytest.fixture(scope="module")
def runs(zygote, tmp_path_factory) -> dict[str, Path]:
    """Layout to the folder of a run that nothing stopped; `whole` has all of a batch in memory."""
    root = tmp_path_factory.mktemp("runs")
    whole = {"whole": trained(zygote, root / "whole", "one")}
    return whole | {layout: trained(zygote, root / layout, layout, *IN_PARTS) for layout in LAYOUTS}


def distance(one: Path, other: Path) -> float:
    """Between the weights of two encoders, as a share of their length."""
    first, second = (torch.cat([x.flatten() for x in read_weights(out / "encoder").values()]) for out in (one, other))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_learns_the_same(runs, layout):
    assert consumed(runs[layout]) == consumed(runs["whole"])
    assert distance(runs[layout], runs["whole"]) < NEAR


def test_a_learnt_pooling_learns_the_same_in_shares(zygote, tmp_path):
    learnt = ["model.encoder.pooling=attention", "trainer.max_steps=6"]
    whole = trained(zygote, tmp_path / "whole", "one", *learnt)
    assert distance(trained(zygote, tmp_path / "sharded", "sharded", *IN_PARTS, *learnt), whole) < NEAR


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_checkpoint_goes_on_in_any_layout(zygote, runs, tmp_path, layout, other):
    checkpoints = in_order(runs[layout] / FOLDER)
    assert checkpoints[0].is_dir() == (layout == "sharded")
    (tmp_path / FOLDER).mkdir()
    middle = next(path for path in checkpoints if path.name == "step=00000006.ckpt")
    (shutil.copytree if middle.is_dir() else shutil.copy)(middle, tmp_path / FOLDER / middle.name)
    trained(zygote, tmp_path, other, *IN_PARTS)
    assert min(consumed(tmp_path)) == 6
    if layout == other:
        assert weights_hash(tmp_path) == weights_hash(runs[layout])
    else:
        assert distance(tmp_path, runs[layout]) < NEAR


def test_a_sharded_run_killed_at_any_moment_goes_on_exactly(zygote, runs, tmp_path):
    run = zygote.begin(tmp_path, *STILL, *SHARDED, *IN_PARTS, world_size=2)
    run.wait_for_step(2)
    run.send(signal.SIGTERM, 0)
    assert run.wait() == [128 + signal.SIGTERM] * 2, run.log()
    assert newest(tmp_path / FOLDER)
    chance = random.Random(0)
    for _ in range(2):
        run = zygote.begin(tmp_path, *STILL, *SHARDED, *IN_PARTS, world_size=2)
        time.sleep(chance.uniform(1.0, 3.0))
        run.send(signal.SIGKILL)
        run.wait()
    trained(zygote, tmp_path, "sharded", *IN_PARTS)
    assert consumed(tmp_path) == consumed(runs["sharded"])
    assert weights_hash(tmp_path) == weights_hash(runs["sharded"])
    assert not list((tmp_path / FOLDER).glob(".*"))


def test_the_average_of_shares_is_that_of_whole_weights(zygote, runs, tmp_path):
    checkpoints = "{class_path: lightning_modules.checkpoints.Checkpoints, init_args: {every_steps: 5}}"
    ema = f"trainer.callbacks=[{checkpoints}, {{class_path: lightning_modules.ema.EMA, init_args: {{decay: 0.9}}}}]"
    one, sharded = (trained(zygote, tmp_path / layout, layout, *IN_PARTS, ema) for layout in ("one", "sharded"))
    assert distance(one, sharded) < NEAR < distance(one, runs["one"])


def test_a_folder_of_shards_is_verified(runs, tmp_path):
    whole = in_order(runs["sharded"] / FOLDER)[0]
    assert what_is_wrong_with(whole) is None
    found = VerifiedCheckpointIO().load_checkpoint(whole)
    one = VerifiedCheckpointIO().load_checkpoint(in_order(runs["one"] / FOLDER)[0])
    assert {name: x.shape for name, x in found["state_dict"].items()} == {
        name: x.shape for name, x in one["state_dict"].items()
    }
    alone = tmp_path / "alone" / whole.name
    shutil.copytree(whole, alone)
    complete = json.loads((alone / COMPLETE).read_text())
    del complete["files"]["rank00001"]
    (alone / COMPLETE).write_text(json.dumps(complete))
    with pytest.raises(ValueError, match="cannot be put together: its 1 files do not fit"):
        VerifiedCheckpointIO().load_checkpoint(alone)
    for damage in ("byte", "missing", "unfinished", "cut", "elsewhere", "listed"):
        folder = tmp_path / damage / whole.name
        shutil.copytree(whole, folder)
        rank = folder / "rank00001"
        if damage == "byte":
            data = bytearray(rank.read_bytes())
            data[len(data) // 2] ^= 1
            rank.write_bytes(data)
        elif damage == "cut":
            rank.write_bytes(rank.read_bytes()[:-1])
        elif damage in ("elsewhere", "listed"):
            text = (folder / COMPLETE).read_text()
            (folder / COMPLETE).write_text(text.replace("rank00001", "../rank00001") if damage == "elsewhere" else "[]")
        else:
            (rank if damage == "missing" else folder / COMPLETE).unlink()
        assert what_is_wrong_with(folder)
        with pytest.raises(ValueError, match="cannot be used"):
            VerifiedCheckpointIO().load_checkpoint(folder)
