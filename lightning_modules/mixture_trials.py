"""The trials of a mixture search: which mixtures are trained on, and which is tried next.

Gemini Embedding (arXiv 2503.07891) searches a grid of rates that starts from each data set's best number of steps.
EmbeddingGemma (arXiv 2509.20354) takes that mixture and ten drawn from a Dirichlet distribution as seeds of a Bayesian
optimisation, whose several best are averaged. Neither publishes the grid, the distribution or the optimiser: ours are choices.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from datamodules.plan import STEPS_PER_BLOCK, largest_remainder

ALONE, SEED, GRID, RANDOM, BAYESIAN = "alone", "seed", "grid", "random", "bayesian"
KINDS = {  # in the order in which they are tried
    ALONE: "one task alone, for its best number of steps",
    SEED: "rates in proportion to each task's best number of steps, else the stage's own",
    GRID: "the seed, with rates times factors",
    RANDOM: "drawn, every mixture equally likely",
    BAYESIAN: "proposed by a Gaussian process that was fitted to all mixtures before",
}
# Our choice.
MAX_TRIALS = 10_000  # a grid of many tasks is larger before one notices
NUM_CANDIDATES, NUM_CENTRES = 2048, 4  # mixtures that are drawn for a proposal, and the best known ones to draw more around
CLOSE = (5.0, 50.0)  # concentrations around those, times tasks

Rates = dict[str, float]


class Trial(NamedTuple):
    """A training on a mixture.

    Args:
        rates: Task to its share of the steps; tasks that are left out have none.
        max_steps: Steps; None leaves them to the stage's own configuration.
    """

    rates: Rates
    max_steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is searched.

    Args:
        tasks: Tasks of the mixture, at least two.
        alone_steps: Lengths of the trainings on one task alone; none leaves them out, and the seed has the stage's own rates.
        own_rates: Those of the stage's configuration.
        grid: Names of tasks, `*` for any letters, to factors of their rates; the grid is the product of them all.
        num_random: Mixtures that are drawn.
        num_bayesian: Mixtures that are proposed.
        seed: Of what is drawn and proposed.
        steps_per_block: Steps after which every task has had exactly its share; a task without a step among them is left out.

    Raises:
        ValueError: It names an unknown task or one twice, a number is out of range, or there is nothing to search.
    """

    tasks: tuple[str, ...]
    alone_steps: tuple[int, ...]
    own_rates: Rates
    grid: Mapping[str, Sequence[float]]
    num_random: int
    num_bayesian: int
    seed: int
    steps_per_block: int = STEPS_PER_BLOCK

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise ValueError(f"the mixture has the tasks {list(self.tasks)}; a search of rates needs two or more")
        if min((1, *self.alone_steps)) < 1 or len(set(self.alone_steps)) < len(self.alone_steps):
            raise ValueError(f"alone_steps are {list(self.alone_steps)}; allowed: different numbers above 0")
        if min(self.num_random, self.num_bayesian) < 0:
            raise ValueError(f"num_random is {self.num_random}, num_bayesian {self.num_bayesian}; allowed: 0 or more")
        for pattern, factors in self.grid.items():
            if not factors or not all(math.isfinite(factor) and factor >= 0 for factor in factors):
                raise ValueError(f"grid: the factors of {pattern} are {list(factors)}; allowed: at least one, 0 or more each")
        owners = {task: [pattern for pattern in self.grid if fnmatchcase(task, pattern)] for task in self.tasks}
        if unknown := set(self.grid) - {pattern for patterns in owners.values() for pattern in patterns}:
            raise ValueError(f"grid: {sorted(unknown)[0]!r} is no task of the mixture; they are {', '.join(self.tasks)}")
        if twice := [task for task, patterns in owners.items() if len(patterns) > 1]:
            raise ValueError(f"grid: {' and '.join(owners[twice[0]])} both name {twice[0]}")
        if self.num_trials > MAX_TRIALS:
            raise ValueError(f"the search has {self.num_trials:,} trials; allowed: {MAX_TRIALS:,}; give grid fewer factors")

    @property
    def num_trials(self) -> int:
        """At most; points of the grid that are one mixture are tried once."""
        points = math.prod(map(len, self.grid.values())) if self.grid else 0
        points -= bool(self.grid) and all(1.0 in factors for factors in self.grid.values())  # the seed itself
        return len(self.tasks) * len(self.alone_steps) + 1 + points + self.num_random + self.num_bayesian

    def alone(self) -> dict[str, Trial]:
        """Each task alone, for each number of steps; by name."""
        every = [Trial({task: 1.0}, steps) for task in self.tasks for steps in self.alone_steps]
        return {f"{ALONE}.{n}": trial for n, trial in enumerate(every)}

    def random(self) -> dict[str, Trial]:
        """Draws from the flat Dirichlet distribution; a draw does not depend on how many there are."""
        flat = np.ones(len(self.tasks))
        draws = (np.random.default_rng((self.seed, n)).dirichlet(flat) for n in range(self.num_random))
        return {f"{RANDOM}.{n}": Trial(self._shares_at(draw)) for n, draw in enumerate(draws)}

    def seeds(self, best_steps: Mapping[str, int] | None) -> dict[str, Trial]:
        """The seed and the grid around it.

        Args:
            best_steps: Of each task alone; None where none was tried alone.
        """
        start = self.shares(self.own_rates if best_steps is None else best_steps)
        found = {SEED: start}
        patterns = list(self.grid)
        for factors in itertools.product(*self.grid.values()):
            of = {task: f for task in self.tasks for name, f in zip(patterns, factors, strict=True) if fnmatchcase(task, name)}
            rates = {task: rate * of.get(task, 1.0) for task, rate in start.items()}
            if not any(rates.values()):
                raise ValueError(f"grid: the factors {list(factors)} of {', '.join(patterns)} leave no task")
            if (point := self.shares(rates)) not in found.values():
                found[f"{GRID}.{len(found) - 1}"] = point
        return {name: Trial(rates) for name, rates in found.items()}

    def proposal(self, number: int, known: Sequence[tuple[Rates, float]], running: Sequence[Rates] = ()) -> Trial:
        """A mixture that may well be better than the best known: the greatest expected improvement among many that are drawn.

        A Gaussian process (Matérn 5/2 on the roots of the shares, with noise) is fitted to what is known; what is running is
        believed to come out as it predicts (Ginsbourger, Le Riche and Carraro 2010). Improvement (Jones, Schonlau and Welch
        1998) is over the best prediction, not the best score, which may be luck. Candidates are drawn from the whole simplex
        and around the best, where optimisers of a box would meet its many names for one mixture.

        Args:
            number: Which proposal it is; the same number, knowledge and seed give the same mixture.
            known: Mixtures with their scores, greater is better; while there are fewer than two, a mixture is drawn.
            running: Mixtures whose scores are still to come.
        """
        generator = np.random.default_rng((self.seed, MAX_TRIALS + number))  # apart from those of the draws
        candidates = generator.dirichlet(np.ones(len(self.tasks)), NUM_CANDIDATES)
        if len(known) < 2:
            return Trial(self._shares_at(candidates[0]))
        points, scores = self._points([rates for rates, _ in known]), np.array([score for _, score in known])
        best = points[np.argsort(-scores, kind="stable")[:NUM_CENTRES]]
        spread = [0.3 + close * len(self.tasks) * centre for centre in best for close in CLOSE]
        near = [generator.dirichlet(around, NUM_CANDIDATES // 8) for around in spread]
        candidates = np.concatenate([candidates, *near])
        kernel = ConstantKernel(1.0, (0.1, 10.0)) * Matern(0.5, (0.05, 5.0), nu=2.5) + WhiteKernel(0.1, (1e-5, 1.0))
        process: Any = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # that a width or the noise is at an end of its range
            process.fit(np.sqrt(points), scores)
            if running:
                points = np.concatenate([points, self._points(running)])
                scores = np.concatenate([scores, process.predict(np.sqrt(points[len(scores) :]))])
                process.set_params(kernel=process.kernel_, optimizer=None).fit(np.sqrt(points), scores)
        reached = process.predict(np.sqrt(points)).max()
        mean, deviation = process.predict(np.sqrt(candidates), return_std=True)
        noise = process.kernel_.k2.noise_level * scores.var()  # of a score, which is no doubt about the mixture
        deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-12))
        z = (mean - reached) / deviation
        improvement = (mean - reached) * norm.cdf(z) + deviation * norm.pdf(z)
        return Trial(self._shares_at(candidates[np.argmax(improvement)]))

    def shares(self, rates: Mapping[str, float]) -> Rates:
        """Rates as the steps that a run will have of each task, of those of a block; what has none of them is left out."""
        counts = largest_remainder(list(rates.values()), self.steps_per_block)
        return {task: count / self.steps_per_block for task, count in zip(rates, counts, strict=True) if count}

    def _points(self, mixtures: Sequence[Rates]) -> np.ndarray:
        return np.array([[rates.get(task, 0.0) for task in self.tasks] for rates in mixtures])

    def _shares_at(self, point: np.ndarray) -> Rates:
        return self.shares(dict(zip(self.tasks, point.tolist(), strict=True)))
