"""`conf=mixture_search`: how often to draw from each task of a mixture, found by training on many mixtures.

    <out>/mixture.json          every trial: rates, score, what it cost; and what the search was begun with
    <out>/<kind>/<n>/           a trial's run; weights stay of those that are the best so far
    <out>/encoder/              the soup of the best, once all is tried
    <out>/mixture.html          rates, scores and how they hang together

Any number of processes, on any number of machines that share the folder, work on one search: each takes what no other has
begun, goes on with what another left unfinished, and may be killed at any moment.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from datamodules.files import replace_file
from datamodules.job import digest_of, locked
from datamodules.plan import STEPS_PER_BLOCK
from datamodules.record import read_json
from lightning_modules.benchmarking import specs_of
from lightning_modules.checkpoints import FOLDER
from lightning_modules.configuration import CONF, compose
from lightning_modules.encoder.checkpoint import read_provenance
from lightning_modules.lineage import inputs_of, read_record, write_record
from lightning_modules.mixture_page import write_mixture_page
from lightning_modules.mixture_trials import ALONE, BAYESIAN, KINDS, Plan, Trial
from lightning_modules.recipe_graph import Run, StageSpec, leaves_of, run_of, words_of
from lightning_modules.recipe_runs import lock_of, make_held, state_of
from lightning_modules.soup import soup

LEDGER = "mixture.json"
BEST = "encoder-best"  # what `benchmarking.Benchmarks` keeps of a run
WEIGHTS = (BEST, "encoder", FOLDER)
WAIT = 5.0  # seconds between two looks at what others do: our choice


def mixture_search(
    stage: str,
    benchmarks: list[str],
    *,
    keys: dict[str, Any] | None = None,
    out: str = "runs/mixture_search",
    action: Literal["run", "status"] = "run",
    score: str = "mean",
    every_steps: int = 1000,
    alone_steps: list[int] | None = None,
    alone_scores: dict[str, str] | None = None,
    grid: dict[str, list[float]] | None = None,
    num_random: int = 10,
    num_bayesian: int = 20,
    num_winners: int = 3,
    without: list[str] | None = None,
    seed: int = 1,
) -> None:
    """Search the rates of a mixture, and average the encoders of the best mixtures.

    Each trial is a run of `stage` in a process of its own, judged while it trains; its score is that of its best step. Begun
    again with the same settings it goes on; begun elsewhere meanwhile it helps. A trial that fails ends the process that made
    it, others leave it alone, and beginning again tries it again.

    Args:
        stage: A training configuration below conf/, with the tasks whose rates are searched; a rate of 0 leaves one out.
        benchmarks: Files below conf/benchmarks that mixtures are judged by. Take splits that no result is reported on.
        keys: What else a trial's command line says: dotted keys to values.
        out: Folder of the search.
        action: `run`, or `status` to tell what is known so far.
        score: The benchmark by which mixtures are compared, or `mean` for the mean of all.
        every_steps: Steps between two judgements of a trial; the last step is judged too.
        alone_steps: Lengths of the trainings on each task alone. The best of their judged steps is the task's best number of
            steps, and the seed's rates are in proportion to these. None leaves them out; the seed then has the stage's.
        alone_scores: Task to the benchmark that tells its best number of steps; `score` tells that of the others.
        grid: Tasks (`*` for any letters) to factors of the seed's rates; every combination is tried.
        num_random: Mixtures drawn at random.
        num_bayesian: Mixtures proposed by Bayesian optimisation over all that were tried.
        num_winners: Best mixtures whose encoders are averaged.
        without: Trials that failed and are left out, such as `grid.3`.
        seed: Of what is drawn and proposed.

    Raises:
        ValueError: The settings do not fit, the folder holds another search, or a trial failed.
    """
    search = Search(
        Path(out),
        stage,
        keys or {},
        judged={"benchmarks": benchmarks, "every_steps": every_steps, "score": score},
        alone={"steps": alone_steps or [], "scores": alone_scores or {}},
        plan={"grid": grid or {}, "num_random": num_random, "num_bayesian": num_bayesian, "seed": seed},
        num_winners=num_winners,
        without=without or [],
    )
    if action == "run":
        search.work()
    elif not (search.out / LEDGER).is_file():
        raise ValueError(f"there is no search in {out}")
    search.show()


class Search:
    """A search as one of its processes sees it.

    Args:
        out: Folder.
        stage, keys: What a trial is a run of.
        judged: Arguments of the trials' `Benchmarks`.
        alone: `steps` and `scores` of the trainings on one task.
        plan: Further arguments of `Plan`.
        num_winners: Best mixtures that are averaged.
        without: Names of trials that are left out.
    """

    def __init__(
        self,
        out: Path,
        stage: str,
        keys: dict[str, Any],
        *,
        judged: dict[str, Any],
        alone: dict[str, Any],
        plan: dict[str, Any],
        num_winners: int,
        without: list[str],
    ) -> None:
        file = CONF / f"{stage}.yaml"
        if not file.is_file():
            raise ValueError(f"stage is {stage!r}, but there is no {file}")
        if not judged["benchmarks"]:
            raise ValueError("there is nothing to judge mixtures by; give benchmarks=[<file below conf/benchmarks>]")
        specs_of(judged["benchmarks"], [judged["score"], *alone["scores"].values()])
        plain = compose(file, [], resolve=False)
        keys = dict(leaf for key, value in keys.items() for leaf in leaves_of(key, value, plain))
        config = compose(file, words_of({**keys, "trainer.default_root_dir": "@"} if "trainer" in plain else keys))
        if "trainer" not in config or "tasks" not in config.get("data", {}):
            raise ValueError(f"stage {stage} trains on no tasks, so it has no rates that could be searched")
        own = {task: spec.get("rate", 1.0) for task, spec in config["data"]["tasks"].items()}
        tasks = tuple(task for task, rate in own.items() if rate > 0)
        if unknown := sorted(alone["scores"].keys() - set(tasks)):
            raise ValueError(f"alone_scores: {unknown[0]!r} is no task of the mixture; they are {', '.join(tasks)}")
        self.out, self.stage, self.keys, self.without = out, stage, keys, without
        block = config["data"].get("steps_per_block", STEPS_PER_BLOCK)
        rates = {task: own[task] for task in tasks}
        self.plan = Plan(tasks, tuple(alone["steps"]), rates, **plan, steps_per_block=block)
        self.judged, self.alone_scores, self.num_winners = judged, alone["scores"], num_winners
        if unknown := sorted(name for name in without if name.partition(".")[0] not in set(KINDS) - {ALONE}):
            raise ValueError(f"without names {unknown[0]}; what can be left out is called seed, grid.3, random.3 or bayesian.3")
        if not 1 <= num_winners <= self.plan.num_trials - len(self.plan.alone()):
            raise ValueError(f"num_winners is {num_winners}; allowed: 1 to the number of mixtures that are tried")
        self.all_tasks = list(own)
        self._callbacks = _callbacks_of(config, stage)
        told = {"judged": judged, "alone": alone, "grid": plan["grid"], "seed": plan["seed"], "num_winners": num_winners}
        self._made_by = {"stage": digest_of(stage, config), "inputs": inputs_of(config), **told}
        self._began = time.time()

    def run_of(self, name: str) -> Run:
        """A trial as a run such as recipes have."""
        trial, callbacks = self._trials[name], self._callbacks
        keys: dict[str, Any] = {f"data.tasks.{task}.rate": trial["rates"].get(task, 0.0) for task in self.all_tasks}
        keys["trainer.default_root_dir"] = "@"
        kind, _, number = name.partition(".")
        if kind == ALONE:
            keys["trainer.max_steps"] = trial["max_steps"]
        judged = self.judged | {"score": trial["judged_by"]}
        keys |= {f"{callbacks['Benchmarks']}.{name}": value for name, value in judged.items()}
        if "Checkpoints" in callbacks:
            keys[f"{callbacks['Checkpoints']}.keep"] = 1
        return run_of(name, StageSpec(self.stage), self.out / kind / number, {**self.keys, **keys}, [])

    def work(self) -> None:
        """Do trials until none is left, here or elsewhere, then average the best.

        Raises:
            ValueError: A trial failed.
        """
        waited = False
        while True:
            with ExitStack() as held:  # a trial's lock, until its score is written down
                with self._locked():
                    run, running = self._claimed(held)
                    if run is None and not running:
                        return self._finish()
                if run is not None:
                    make_held(run, {run.name: run})
                    with self._locked():
                        self._note(run)
                    continue
            if not waited:
                print(f"waiting for {', '.join(running)}, which other processes do", flush=True)
            waited = True
            time.sleep(WAIT)

    def _claimed(self, held: ExitStack) -> tuple[Run | None, list[str]]:
        """What this process does next, None for nothing now, and what others do meanwhile."""
        running = []
        for name in self._open():
            run = self.run_of(name)
            if not held.enter_context(locked(lock_of(run), waits=False)):
                running.append(name)
            elif not self._has_failed_meanwhile(run):
                return run, []
            held.close()
        for name, trial in self._planned():
            if name not in self._trials and name not in self.without:
                own = self.alone_scores.get(next(iter(trial.rates))) if name.startswith(ALONE) else None
                self._trials[name] = trial._asdict() | {"judged_by": own or self.judged["score"]}
                self._write()
                run = self.run_of(name)
                held.enter_context(locked(lock_of(run)))
                return run, []
        return None, running

    def _has_failed_meanwhile(self, run: Run) -> bool:
        """Whether it failed in another process since this one began; it is for those that begin later."""
        record = read_record(run.folder)
        return record.get("state") == "failed" and record["ended"] >= self._began

    def _planned(self) -> Iterator[tuple[str, Trial]]:
        """All that can be tried as things stand, in order."""
        alone = self.plan.alone()
        yield from alone.items()
        best_steps = self.best_steps()
        is_known = best_steps is not None or not alone
        if is_known:
            yield from self.plan.seeds(best_steps).items()
        yield from self.plan.random().items()
        begun = self._trials.keys() | set(self.without)
        number = next(n for n in itertools.count() if f"{BAYESIAN}.{n}" not in begun)
        if is_known and number < self.plan.num_bayesian:
            mixtures = {name: trial for name, trial in self._trials.items() if not name.startswith(ALONE)}
            known = [(trial["rates"], trial["score"]) for trial in mixtures.values() if "score" in trial]
            yield f"{BAYESIAN}.{number}", self.plan.proposal(number, known, [mixtures[name]["rates"] for name in self._open()])

    def _open(self) -> list[str]:
        """Trials that were begun and have no score yet."""
        return [name for name, trial in self._trials.items() if "score" not in trial and name not in self.without]

    def _note(self, run: Run) -> None:
        """Write down what a trial reached; both locks are held."""
        record = read_record(run.folder)
        if not (run.folder / BEST).is_dir():
            write_record(run.folder, {**record, "state": "failed", "ended": time.time()})
            raise ValueError(f"{run.name} reached no score that is a number, see {run.folder}")
        best = read_provenance(run.folder / BEST)
        score, scores = best["benchmarks"][best["score"]], best["benchmarks"]
        told = {"score": score, "steps": best["steps"], "benchmarks": scores, "hours": record["seconds"] / 3600}
        self._trials[run.name] |= told
        self._write()
        self._tidy()
        done, winners = sum("score" in trial for trial in self._trials.values()), self.winners()
        reached = f"; the best is {winners[0]}, {self._trials[winners[0]]['score']:.4f}" if winners else ""
        print(f"{run.name}: {score:.4f} at step {best['steps']} ({done} of {self.plan.num_trials} trials{reached})", flush=True)

    def _tidy(self) -> None:
        """Remove the weights of what has won nothing, and write the page."""
        winners = self.winners()
        for name in self._trials.keys() - set(self._open()) - set(winners):
            for weights in WEIGHTS:
                shutil.rmtree(self.run_of(name).folder / weights, ignore_errors=True)
        write_mixture_page(self.out, self.plan, self._trials, winners)

    def _finish(self) -> None:
        """Average the best; the lock is held."""
        if failed := self._open():
            mixtures = [name for name in failed if not name.startswith(ALONE)]
            advice = f", and without=[{','.join(mixtures)}] leaves out" if mixtures == failed else ""
            raise ValueError(f"{', '.join(failed)} failed; the same command tries again{advice}")
        self._tidy()
        winners = [self.run_of(name).folder / BEST for name in self.winners()]
        of = [read_provenance(folder)["sha256"] for folder in winners]
        made = self.out / "encoder"
        if not made.is_dir() or [parent["sha256"] for parent in read_provenance(made)["parents"]] != of:
            soup([str(folder) for folder in winners], str(made))

    def best_steps(self) -> dict[str, int] | None:
        """Each task's best number of steps alone; None while that is not known."""
        alone = [trial for name, trial in self._trials.items() if name.startswith(ALONE)]
        if len(alone) < len(self.plan.alone()) or not all("score" in trial for trial in alone) or not alone:
            return None
        best = sorted(alone, key=lambda trial: (trial["score"], -trial["steps"]))  # the last of a task is the one that stays
        return {task: trial["steps"] for trial in best for task in trial["rates"]}

    def winners(self) -> list[str]:
        """Names of the best mixtures so far, the best first."""
        mixtures = [name for name, trial in self._trials.items() if "score" in trial and not name.startswith(ALONE)]
        return sorted(mixtures, key=lambda name: -self._trials[name]["score"])[: self.num_winners]

    def show(self) -> None:
        """Print what is known."""
        with self._locked():
            states = {run.name: state_of(run, {run.name: run}) for run in map(self.run_of, self._open())}
        console = Console()
        if steps := self.best_steps():
            table = Table("task alone", "best number of steps", box=None, header_style="bold")
            for task, number in steps.items():
                table.add_row(task, f"{number:,}")
            console.print(table)
        table = Table("mixture", "score", "at step", "hours", "rates", box=None, header_style="bold")
        for name, trial in sorted(self._trials.items(), key=lambda one: -one[1].get("score", -math.inf)):
            if name.startswith(ALONE):
                continue
            score, steps, hours = (trial.get(each) for each in ("score", "steps", "hours"))
            found = ["", "", ""] if score is None else [f"{score:.4f}", f"{steps:,}", f"{hours:.2f}"]
            rates = sorted(trial["rates"].items(), key=lambda one: -one[1])
            told = name if score is not None else f"{name} ({states.get(name, 'left out')})"
            look = "bold" if name in self.winners() else ""
            table.add_row(told, *found, ", ".join(f"{task} {share:.2f}" for task, share in rates), style=look)
        console.print(table)
        if (self.out / "encoder").is_dir():
            console.print(f"the average of the best is in {self.out / 'encoder'}, the page in {self.out / 'mixture.html'}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """All trials as they are known, which no other process changes meanwhile.

        Raises:
            ValueError: The folder holds a search with other settings.
        """
        with locked(self.out / ".mixture.lock"):
            ledger = read_json(self.out / LEDGER) if (self.out / LEDGER).is_file() else {"made_by": self._made_by, "trials": {}}
            made_by = json.loads(json.dumps(self._made_by))
            if differ := [name for name in made_by if ledger["made_by"].get(name) != made_by[name]]:
                raise ValueError(f"{self.out} holds a search with other {' and '.join(differ)}; give another folder as out")
            self._trials: dict[str, dict[str, Any]] = ledger["trials"]
            yield

    def _write(self) -> None:
        replace_file(self.out / LEDGER, json.dumps({"made_by": self._made_by, "trials": self._trials}, indent=1))


def _callbacks_of(config: dict[str, Any], stage: str) -> dict[str, str]:
    """Class names of the stage's callbacks to the keys of their arguments.

    Raises:
        ValueError: None of them judges.
    """
    listed = enumerate(config["trainer"].get("callbacks") or [])
    places = {each["class_path"].rpartition(".")[2]: f"trainer.callbacks.{n}.init_args" for n, each in listed}
    if "Benchmarks" not in places:
        raise ValueError(
            f"stage {stage} has no lightning_modules.benchmarking.Benchmarks among trainer.callbacks, which judges"
        )
    return places
