"""Promises of the plan: exact shares, every example once per epoch, a pure function of seed and step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.plan import Plan, PlannedTask

TASKS = {
    "a": PlannedTask(10, 4, 1.0),
    "b": PlannedTask(7, 3, 2.0),
    "c": PlannedTask(100, 8, 0.5),
    "off": PlannedTask(0, 4, 0.0),
}


def test_every_block_holds_each_task_its_exact_share():
    plan = Plan(TASKS, seed=1, steps_per_block=70)
    for block in range(3):
        counts = Counter(plan.task_of(step)[0] for step in range(block * 70, (block + 1) * 70))
        assert counts == {"a": 20, "b": 40, "c": 10}


def test_the_order_within_a_block_changes_with_block_and_seed():
    order = [[Plan(TASKS, seed=seed, steps_per_block=70).task_of(step)[0] for step in range(140)] for seed in (1, 2)]
    assert order[0] != order[1]
    assert order[0][:70] != order[0][70:]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(2, 8), st.integers(1, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_every_example_comes_once_per_task_epoch(sizes, seed):
    tasks = {str(n): PlannedTask(size, batch, rate) for n, (size, batch, rate) in enumerate(sizes)}
    plan = Plan(tasks, seed=seed, steps_per_block=40)
    seen: dict[str, list[int]] = {name: [] for name in tasks}
    for step in range(120):
        name, batch = plan.task_of(step)
        assert batch * tasks[name].batch_size == len(seen[name])
        seen[name] += plan.positions(step).tolist()
    for name, task in tasks.items():
        for first in range(0, len(seen[name]) - task.num_examples + 1, task.num_examples):
            assert sorted(seen[name][first : first + task.num_examples]) == list(range(task.num_examples))


def test_a_step_needs_no_step_before_it():
    straight = Plan(TASKS, seed=5)
    expected = [straight.positions(step) for step in range(2000)]
    fresh = Plan(TASKS, seed=5)
    for step in (1999, 3, 1000, 0):
        assert np.array_equal(fresh.positions(step), expected[step])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"off": PlannedTask(3, 2, 0.0)}, "no task has a rate above 0"),
        ({"a": PlannedTask(0, 2, 1.0)}, "task 'a' has no examples"),
        ({"a": PlannedTask(5, 2, 1.0), "b": PlannedTask(5, 2, 1e-6)}, "gets no step in a block of 1000"),
    ],
)
def test_plans_that_cannot_be_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        Plan(tasks, seed=0)
