"""How close searches of mixtures come to the best one, where that is known: ours, optuna's samplers, and draws alone.

    pip install --target /tmp/optuna optuna && PYTHONPATH=/tmp/optuna python experiments/009_mixture_search/proposals.py

Every task's gain saturates with its share, by a weight and a scale of its own that are drawn for each seed; scores come with
noise or without. Ten draws, which are the same for all, then twenty proposals; the figure is the true score of the best
mixture less that of the one with the best score. optuna is given the same mixtures as -log of each share's place in a
Dirichlet draw, as its documentation advises.
"""

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).parents[2]))
from lightning_modules.mixture_trials import Plan, Rates

SEEDS, NUM_DRAWN, NUM_PROPOSED = range(6), 10, 20
Known = Sequence[tuple[Rates, float]]


def plan_of(num_tasks: int, seed: int) -> Plan:
    tasks = tuple(f"task/{n}" for n in range(num_tasks))
    return Plan(tasks, (), dict.fromkeys(tasks, 1.0), {}, NUM_DRAWN + NUM_PROPOSED, NUM_PROPOSED, seed)


def drawn(plan: Plan, number: int, known: Known) -> Rates:
    del known
    return plan.random()[f"random.{NUM_DRAWN + number}"].rates


def ours(plan: Plan, number: int, known: Known) -> Rates:
    return plan.proposal(number, known).rates


def optunas(name: str) -> Callable[[Plan, int, Known], Rates]:
    optuna: Any = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def propose(plan: Plan, number: int, known: Known) -> Rates:
        options = {"multivariate": True} if name == "TPESampler" else {}
        sampler = getattr(optuna.samplers, name)(seed=100 * plan.seed + number, **options)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        axes = {task: optuna.distributions.FloatDistribution(0.0, 1.0) for task in plan.tasks}
        for rates, score in known:
            place = {task: float(np.exp(-len(plan.tasks) * rates.get(task, 1e-9))) for task in plan.tasks}
            study.add_trial(optuna.create_trial(value=score, params=place, distributions=axes))
        asked = study.ask(axes).params
        return plan.shares({task: float(-np.log(max(asked[task], 1e-12))) for task in plan.tasks})

    return propose


def left(propose: Callable[[Plan, int, Known], Rates], num_tasks: int, noise: float, seed: int) -> float:
    """What the chosen mixture lacks of the best."""
    generator = np.random.default_rng(seed)
    weights, scales = generator.dirichlet(np.ones(num_tasks)), generator.uniform(0.05, 0.3, num_tasks)
    plan = plan_of(num_tasks, seed)

    def gain(point: np.ndarray) -> np.ndarray:
        return (weights * (1 - np.exp(-point / scales))).sum(-1)

    def true(rates: Rates) -> float:
        return float(gain(np.array([rates.get(task, 0.0) for task in plan.tasks])))

    known = [
        (trial.rates, true(trial.rates) + noise * generator.standard_normal())
        for trial in list(plan.random().values())[:NUM_DRAWN]
    ]
    for number in range(NUM_PROPOSED):
        rates = propose(plan, number, known)
        known.append((rates, true(rates) + noise * generator.standard_normal()))
    chosen = max(known, key=lambda one: one[1])[0]
    return float(gain(best_of(weights, scales))) - true(chosen)


def best_of(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The best mixture: all tasks that have a share gain as much by a little more of it."""

    def point(slope: float) -> np.ndarray:
        return scales * np.log(np.maximum(weights / (scales * slope), 1.0))

    slope: Any = brentq(lambda slope: point(slope).sum() - 1.0, 1e-9, (weights / scales).max())
    return point(slope)


def main() -> None:
    warnings.simplefilter("ignore")
    ways = {"draws alone": drawn, "ours": ours, "optuna, GP": optunas("GPSampler"), "optuna, TPE": optunas("TPESampler")}
    print("| tasks | noise | " + " | ".join(ways) + " |\n|---|---|" + "---|" * len(ways))
    for num_tasks in (4, 9):
        for noise in (0.0, 0.004):
            cells = []
            for propose in ways.values():
                began = time.perf_counter()
                found = [left(propose, num_tasks, noise, seed) for seed in SEEDS]
                seconds = (time.perf_counter() - began) / len(found)
                cells.append(f"{statistics.fmean(found):.4f} ({min(found):.4f} to {max(found):.4f}), {seconds:.1f} s")
            print(f"| {num_tasks} | {noise:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
