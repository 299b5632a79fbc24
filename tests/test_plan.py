"""Promises of the plan: exact shares, every example once per epoch, a pure function of seed and step."""

import copy
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.order import Order, feistel, permuted
from datamodules.plan import Plan, PlannedTask, rows_of_rank


def task(num_examples: int, batch_size: int, rate: float, **more) -> PlannedTask:
    return PlannedTask(Order(num_examples), batch_size, rate, **more)


TASKS = {"a": task(10, 4, 1.0), "b": task(7, 3, 2.0), "c": task(100, 8, 0.5), "off": task(0, 4, 0.0)}


class Spread:
    """Lengths that follow from the position."""

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return 10 + positions * 7919 % 90


def test_every_block_holds_each_task_its_exact_share():
    plan = Plan(TASKS, seed=1, steps_per_block=70)
    for block in range(3):
        counts = Counter(plan.task_of(step)[0] for step in range(block * 70, (block + 1) * 70))
        assert counts == {"a": 20, "b": 40, "c": 10}


def test_the_order_within_a_block_changes_with_block_and_seed():
    order = [[Plan(TASKS, seed=seed, steps_per_block=70).task_of(step)[0] for step in range(140)] for seed in (1, 2)]
    assert order[0] != order[1]
    assert order[0][:70] != order[0][70:]


@st.composite
def plans(draw) -> Plan:
    """Plans of one to four tasks: global or windowed order, with or without lengths."""
    tasks = {}
    for name in range(draw(st.integers(1, 4))):
        shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum))
        windowed = {"shard_ends": tuple(np.cumsum(shards).tolist()), "window": draw(st.integers(1, 4))}
        order = Order(sum(shards), **(windowed if draw(st.booleans()) else {}))
        lengths = Spread() if draw(st.booleans()) else None
        tasks[str(name)] = PlannedTask(order, 4 * draw(st.integers(1, 4)), draw(st.integers(1, 5)), lengths)
    return Plan(tasks, seed=draw(st.integers(0, 2**31)), steps_per_block=40)


def comes_once_per_epoch(plan: Plan, world_size: int) -> None:
    """Over 120 steps and all ranks no example of a task comes again before all others came."""
    seen = {name: np.zeros(planned.order.num_examples, int) for name, planned in plan.tasks.items()}
    for step in range(120):
        name, batch = plan.task_of(step)
        length = plan.tasks[name].batch_size
        assert batch * length == seen[name].sum()
        rows = np.concatenate([rows_of_rank(length, rank, world_size) for rank in range(world_size)])
        assert sorted(rows) == list(range(length))
        np.add.at(seen[name], plan.positions(step)[rows], 1)
        assert seen[name].max() - seen[name].min() <= 1


@settings(max_examples=300, deadline=None)
@given(plan=plans(), world_size=st.sampled_from([1, 2, 4]))
def test_every_example_comes_once_per_task_epoch(plan, world_size):
    comes_once_per_epoch(plan, world_size)


@pytest.mark.full
@settings(max_examples=2000, deadline=None)
@given(plan=plans(), world_size=st.sampled_from([1, 2, 4]))
def test_two_thousand_plans_lose_and_repeat_nothing(plan, world_size):
    comes_once_per_epoch(plan, world_size)


@settings(max_examples=50, deadline=None)
@given(plan=plans(), steps=st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_a_step_needs_no_step_before_it(plan, steps):
    there = [plan.positions(step) for step in steps]
    fresh = copy.deepcopy(plan)  # through its state, as a spawned worker gets it
    for step, expected in reversed(list(zip(steps, there, strict=True))):
        assert np.array_equal(fresh.positions(step), expected)


def test_the_order_of_a_seed_does_not_change_from_version_to_version():
    """Written down, so that a run can be gone on with by a later version; a change needs another plan version in the digest."""
    tasks = {"a": task(1000, 8, 1.0, lengths=Spread()), "b": PlannedTask(Order(90, (30, 60, 90), 2), 4, 1.0)}
    plan = Plan(tasks, seed=7, steps_per_block=10)
    steps = b"".join(plan.positions(step).astype("<i8").tobytes() for step in range(300))
    assert zlib.crc32(steps) == 2446408333


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_computed_permutation_holds_everything_once_and_is_another_for_another_key(size):
    first = feistel((1, "x", 0), size, np.arange(size))
    assert sorted(first) == list(range(size))
    if size >= 1000:
        other = feistel((1, "x", 1), size, np.arange(size))
        assert (first == other).mean() < 0.01
        assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.1


def test_any_stretch_of_a_permutation_of_a_hundred_million_is_told_alone():
    whole = permuted((3, "x", 0), 10**8, np.arange(5000))
    assert len(set(whole.tolist())) == 5000
    assert whole.min() >= 0
    assert whole.max() < 10**8
    assert np.array_equal(permuted((3, "x", 0), 10**8, np.arange(4000, 5000)), whole[4000:])
    assert abs(whole.mean() / 10**8 - 0.5) < 0.02


def test_the_windowed_order_stays_within_its_window_of_shards():
    ends = tuple(range(10, 210, 10))
    order = Order(200, ends, 4)
    positions = order.positions((0, "x", 0), np.arange(200))
    shards = [set(positions[first : first + 40] // 10) for first in range(0, 200, 40)]
    assert all(len(window) == 4 for window in shards)
    assert shards[0] != {0, 1, 2, 3}
    inner = [np.abs(np.diff(positions[first : first + 40])) for first in range(0, 200, 40)]
    assert all((steps == 1).mean() < 0.5 for steps in inner)


def test_ranks_take_as_much_of_a_batch():
    plan = Plan({"a": task(1000, 64, 1.0, lengths=Spread())}, seed=0)
    for step in range(10):
        lengths = Spread()(plan.positions(step))
        taken = [lengths[rows_of_rank(64, rank, 4)].sum() for rank in range(4)]
        assert max(taken) - min(taken) <= 0.04 * lengths.sum() / 4


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"off": task(3, 2, 0.0)}, "no task has a rate above 0"),
        ({"a": task(0, 2, 1.0)}, "task 'a' has no examples"),
        ({"a": task(5, 2, 1.0), "b": task(5, 2, 1e-6)}, "gets no step in a block of 1000"),
    ],
)
def test_plans_that_cannot_be_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        Plan(tasks, seed=0)
