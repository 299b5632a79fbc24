"""Promises of an interrupted run: whatever ends it, the run that goes on ends as if nothing had happened, or says why not."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from trials import consumed, consumed_by_any, weights_hash

from lightning_modules.checkpoints import FOLDER, VerifiedCheckpointIO, in_order, newest
from lightning_modules.encoder.checkpoint import read_weights

FULL = pytest.mark.full


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory) -> dict[int, Path]:
    """Number of ranks to the folder of a run that nothing stopped."""
    folders = {}
    for world_size in (1, 2):
        folders[world_size] = tmp_path_factory.mktemp("reference") / str(world_size)
        run = zygote.begin(folders[world_size], world_size=world_size)
        assert run.wait() == [0] * world_size, run.log()
    return folders


def same(out: Path, reference: Path) -> None:
    """The same batches at every step, and weights equal bit for bit."""
    assert consumed(out) == consumed(reference)
    assert weights_hash(out) == weights_hash(reference)


def test_ranks_share_the_same_global_batches(reference):
    assert consumed(reference[1]) == consumed(reference[2])
    assert sorted(consumed(reference[1])) == list(range(24))


def killed_again_and_again(zygote, out: Path, chance: random.Random, num_kills: int, *, world_size: int, workers: int) -> None:
    """Kill a run at random times, so many times, and let it end."""
    arguments = [f"data.num_workers={workers}"]
    for _ in range(num_kills):
        run = zygote.begin(out, *arguments, world_size=world_size)
        time.sleep(chance.uniform(0.1, 2.5))
        run.send(signal.SIGKILL)
        run.wait()
    run = zygote.begin(out, *arguments, world_size=world_size)
    assert run.wait() == [0] * world_size, run.log()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_a_run_killed_at_any_moment_goes_on_exactly(zygote, reference, tmp_path, world_size, workers):
    chance = random.Random(world_size * 10 + workers)
    killed_again_and_again(zygote, tmp_path / "run", chance, 2, world_size=world_size, workers=workers)
    same(tmp_path / "run", reference[world_size])


@FULL
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_times(zygote, reference, tmp_path):
    chance = random.Random(0)
    for trial in range(17):
        world_size, workers = chance.choice([(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])
        killed_again_and_again(zygote, tmp_path / str(trial), chance, 3, world_size=world_size, workers=workers)
        same(tmp_path / str(trial), reference[world_size])


def killed_while_saving(zygote, out: Path) -> bool:
    """Kill a run while a checkpoint is being written beside its place; whether there was one."""
    run = zygote.begin(out, SLOW_SAVE="0.03")
    deadline = time.monotonic() + 30
    while not list((out / FOLDER).glob(".*.partial")):
        if (out / "encoder").exists() or time.monotonic() > deadline:
            break
    run.send(signal.SIGKILL)
    run.wait()
    return bool(list((out / FOLDER).glob(".*.partial")))


def test_a_run_killed_while_it_saves_leaves_the_checkpoint_before(zygote, reference, tmp_path):
    assert killed_while_saving(zygote, tmp_path / "run")
    run = zygote.begin(tmp_path / "run")
    assert run.wait() == [0], run.log()
    assert not list((tmp_path / "run" / FOLDER).glob(".*.partial"))
    same(tmp_path / "run", reference[1])


@FULL
@pytest.mark.timeout(3600)
def test_a_hundred_kills_while_saving_leave_no_unusable_checkpoint(zygote, tmp_path):
    caught = 0
    for trial in range(1000):
        out = tmp_path / str(trial // 6)
        caught += killed_while_saving(zygote, out)
        for path in in_order(out / FOLDER):
            VerifiedCheckpointIO().load_checkpoint(path)
        if caught == 100:
            return
    pytest.fail(f"only {caught} kills met a save")


def stopped(zygote, out: Path, stop: signal.Signals, *ranks: int, world_size: int, step: int) -> float:
    """Send a signal once a step has begun; seconds until every process has ended as it should."""
    run = zygote.begin(out, world_size=world_size)
    run.wait_for_step(step)
    sent = time.monotonic()
    run.send(stop, *ranks)
    assert run.wait() == [128 + stop] * world_size, run.log()
    assert f"stopped by {stop.name} after step" in run.log()
    assert not (out / "encoder").exists()
    assert newest(out / FOLDER) is not None
    return time.monotonic() - sent


@pytest.mark.parametrize(
    ("stop", "ranks", "world_size"),
    [(signal.SIGINT, (0,), 1), (signal.SIGTERM, (1,), 2), (signal.SIGUSR1, (0,), 2), (signal.SIGTERM, (), 2)],
)
def test_a_signal_ends_the_run_at_a_batchs_end_and_it_goes_on_exactly(zygote, reference, tmp_path, stop, ranks, world_size):
    seconds = stopped(zygote, tmp_path / "run", stop, *ranks, world_size=world_size, step=7)
    assert seconds < 10
    run = zygote.begin(tmp_path / "run", world_size=world_size)
    assert run.wait() == [0] * world_size, run.log()
    same(tmp_path / "run", reference[world_size])


@FULL
@pytest.mark.timeout(3600)
def test_sixty_signals(zygote, reference, tmp_path):
    chance, slowest = random.Random(1), 0.0
    for trial in range(60):
        out, stop = tmp_path / str(trial), (signal.SIGTERM, signal.SIGUSR1)[trial % 2]
        ranks = ((0,), (1,), ())[trial // 2 % 3]
        slowest = max(slowest, stopped(zygote, out, stop, *ranks, world_size=2, step=chance.randrange(1, 20)))
        run = zygote.begin(out, world_size=2)
        assert run.wait() == [0, 0], run.log()
        same(out, reference[2])
    assert slowest < 10
    print(f"60 signals, the slowest end took {slowest:.1f} s")


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 4, 2)])
def test_a_run_goes_on_at_another_number_of_ranks_with_the_same_global_batches(zygote, reference, tmp_path, sizes):
    for world_size, step in zip(sizes[:2], (6, 13), strict=True):
        stopped(zygote, tmp_path / "run", signal.SIGTERM, world_size=world_size, step=step)
    run = zygote.begin(tmp_path / "run", world_size=sizes[2])
    assert run.wait() == [0] * sizes[2], run.log()
    assert consumed_by_any(tmp_path / "run") == consumed_by_any(reference[1])


def test_a_run_killed_between_its_last_checkpoint_and_its_encoder_writes_the_encoder(zygote, reference, tmp_path):
    last = in_order(reference[1] / FOLDER)[0]
    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    shutil.copy(last, tmp_path / "run" / FOLDER / last.name)
    run = zygote.begin(tmp_path / "run")
    assert run.wait() == [0], run.log()
    assert not list((tmp_path / "run").glob("consumed-*"))
    assert weights_hash(tmp_path / "run") == weights_hash(reference[1])


def test_a_broken_newest_checkpoint_is_passed_over_loudly(zygote, reference, tmp_path):
    stopped(zygote, tmp_path / "run", signal.SIGTERM, world_size=1, step=10)
    broken = in_order(tmp_path / "run" / FOLDER)[0]
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    run = zygote.begin(tmp_path / "run")
    assert run.wait() == [0], run.log()
    assert f"WARNING: the checkpoint {broken} is passed over: its bytes are not those that were written" in run.log()
    same(tmp_path / "run", reference[1])


def test_other_settings_of_the_data_are_refused_at_a_resume(zygote, tmp_path):
    stopped(zygote, tmp_path / "run", signal.SIGTERM, world_size=1, step=4)
    run = zygote.begin(tmp_path / "run", "data.seed=5")
    assert run.wait() == [1]
    assert "error: the checkpoint was made with other tasks" in run.log()


NAN = [
    ({"3": "nan-loss", "7": "inf-loss", "10": "nan-gradient", "11": "inf-gradient"}, 1),
    ({"4": "nan-gradient@0", "8": "nan-loss@1", "9": "inf-gradient@1"}, 2),
    *(({str(step): f"{value}-input" for step in range(24)}, 1) for value in ("nan", "inf")),
    *(({"5": f"{value}-weight"}, 1) for value in ("nan", "inf")),
    ({"5": "nan-weight@1"}, 2),
]


@pytest.mark.parametrize(("spoilt", "world_size"), NAN)
def test_values_that_are_not_finite_never_reach_a_saved_weight(zygote, tmp_path, spoilt, world_size):
    run = zygote.begin(tmp_path / "run", world_size=world_size, SPOIL=json.dumps(spoilt))
    statuses = run.wait()
    what = next(iter(spoilt.values()))
    if "weight" in what:
        assert statuses == [1] * world_size, run.log()
        assert "not finite in 3 updates in a row" in run.log() or "holds values that are not finite" in run.log()
    else:
        assert statuses == [0] * world_size, run.log()
        assert all(torch.isfinite(weights).all() for weights in read_weights(tmp_path / "run" / "encoder").values())
        lines = (tmp_path / "run" / "skipped-rank0.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == ([int(step) for step in spoilt] if "input" not in what else steps)
        assert steps
        batches = consumed(tmp_path / "run")
        assert all(set(json.loads(line)["keys"]) <= set(batches[step][1]) for line, step in zip(lines, steps, strict=True))
    for path in in_order(tmp_path / "run" / FOLDER):
        state = VerifiedCheckpointIO().load_checkpoint(path)
        assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
        moments = [value for entry in state["optimizer_states"][0]["state"].values() for value in entry.values()]
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in moments)


def test_a_run_that_may_skip_nothing_stops_at_the_first_update_that_is_not_finite(zygote, tmp_path):
    run = zygote.begin(tmp_path / "run", "model.optimizer.max_skipped=0", SPOIL=json.dumps({"5": "nan-gradient"}))
    assert run.wait() == [1]
    assert "not finite in 1 update, the last at step 5" in run.log()
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_skipped_update_changes_no_weight_and_no_moment(zygote, reference, tmp_path):
    run = zygote.begin(tmp_path / "run", "trainer.max_steps=24", SPOIL=json.dumps({"23": "nan-gradient"}))
    assert run.wait() == [0], run.log()
    assert consumed(tmp_path / "run") == consumed(reference[1])
    assert weights_hash(tmp_path / "run") != weights_hash(reference[1])
