"""Promises of mixture search: what is tried, that proposals find the best, that many processes do one search."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from samples import TINY
from trials import ROOT

from lightning_modules import recipe_runs
from lightning_modules.configuration import CONF, compose
from lightning_modules.encoder.checkpoint import read_provenance
from lightning_modules.lineage import read_record
from lightning_modules.mixture_search import Search, mixture_search
from lightning_modules.mixture_trials import Plan

TASKS = ("code/a", "code/b", "text/c", "text/d")
NO_TASKS = [f"world/{name}" for name in ("text-page", "text-audio", "text-video", "mixed-image", "text-image")]


def plan(**changed: Any) -> Plan:
    settings: dict[str, Any] = {"tasks": TASKS, "alone_steps": (10, 20), "own_rates": dict.fromkeys(TASKS, 1.0)}
    settings |= {"grid": {}, "num_random": 3, "num_bayesian": 2, "seed": 1}
    return Plan(**settings | changed)


def test_each_task_is_tried_alone_for_each_number_of_steps():
    alone = plan().alone()
    assert [(next(iter(trial.rates)), trial.max_steps) for trial in alone.values()] == [(t, n) for t in TASKS for n in (10, 20)]
    assert all(list(trial.rates.values()) == [1.0] for trial in alone.values())
    assert list(alone) == [f"alone.{n}" for n in range(8)]
    assert plan(alone_steps=()).alone() == {}


def test_the_seed_has_rates_in_proportion_to_the_best_numbers_of_steps():
    found = plan().seeds(dict(zip(TASKS, (10, 20, 30, 40), strict=True)))
    assert found["seed"].rates == dict(zip(TASKS, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert found["seed"].max_steps is None
    own = {"code/a": 3.0, "code/b": 1.0, "text/c": 0.0, "text/d": 0.0}
    assert plan(own_rates=own).seeds(None)["seed"].rates == {"code/a": 0.75, "code/b": 0.25}


def test_rates_are_the_steps_of_a_block_and_what_gets_none_is_left_out():
    rates = {"code/a": 0.5, "code/b": 0.4, "text/c": 0.098, "text/d": 0.002}
    assert plan(steps_per_block=50).shares(rates) == {"code/a": 0.5, "code/b": 0.4, "text/c": 0.1}
    assert plan(steps_per_block=500).shares(rates) == rates
    for trial in plan(steps_per_block=14, num_random=50).random().values():
        steps = [14 * share for share in trial.rates.values()]
        assert steps == pytest.approx([round(step) for step in steps])
        assert sum(steps) == pytest.approx(14)


def test_a_grid_is_every_combination_of_factors_and_each_mixture_once():
    grid = {"code/*": (0.5, 1.0, 2.0), "text/d": (0.0, 1.0)}
    found = plan(grid=grid).seeds(None)
    names = list(found)
    assert names == ["seed", *(f"grid.{n}" for n in range(5))]  # 3 x 2, of which one is the seed
    assert plan(grid=grid).num_trials == 8 + 6 + 3 + 2
    rates = [tuple(trial.rates.get(task, 0.0) for task in TASKS) for trial in found.values()]
    assert len(set(rates)) == 6
    assert rates[1] == (0.25, 0.25, 0.5, 0.0)
    assert rates[5] == pytest.approx((1 / 3, 1 / 3, 1 / 6, 1 / 6), abs=1e-3)
    assert list(plan(grid={"*": (1.0, 2.0, 4.0)}).seeds(None)) == ["seed"]  # all of them times 2 is the same mixture


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ("a",)}, "a search of rates needs two or more"),
        ({"grid": {"sound/*": (1.0,)}}, "'sound/\\*' is no task of the mixture; they are code/a, code/b, text/c, text/d"),
        ({"grid": {"code/*": (1.0,), "*/a": (1.0,)}}, "code/\\* and \\*/a both name code/a"),
        ({"grid": {"code/a": ()}}, "the factors of code/a are \\[\\]; allowed: at least one, 0 or more each"),
        ({"grid": {"code/a": (-1.0,)}}, "the factors of code/a are"),
        ({"grid": {"code/a": (float("nan"),)}}, "the factors of code/a are"),
        ({"grid": dict.fromkeys(TASKS, tuple(map(float, range(1, 12))))}, "has 14,654 trials; allowed: 10,000"),
        ({"num_random": -1}, "num_random is -1"),
        ({"alone_steps": (10, 10)}, "alone_steps are \\[10, 10\\]; allowed: different numbers above 0"),
        ({"alone_steps": (0,)}, "alone_steps are \\[0\\]"),
    ],
)
def test_a_search_that_is_none_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        plan(**changed)


def test_factors_that_leave_no_task_are_refused():
    with pytest.raises(ValueError, match="leave no task"):
        plan(grid={"*": (0.0, 1.0)}).seeds(None)


def test_draws_are_flat_over_all_mixtures_and_do_not_depend_on_their_number():
    few, many = plan().random(), plan(num_random=4000).random()
    assert few == {name: many[name] for name in few}
    assert plan(seed=2).random() != few
    drawn = np.array([[trial.rates.get(task, 0.0) for task in TASKS] for trial in many.values()])
    assert drawn.sum(1) == pytest.approx(1.0, abs=1e-9)
    assert drawn.mean(0) == pytest.approx(0.25, abs=0.02)
    assert drawn.var(0) == pytest.approx(3 / 80, rel=0.1)  # of a share under Dirichlet(1, 1, 1, 1)


def gain(rates: dict[str, float]) -> float:
    """What a mixture reaches: every task helps less the more there is of it."""
    weights, scales = (0.4, 0.1, 0.3, 0.2), (0.05, 0.3, 0.2, 0.1)
    return sum(w * (1 - np.exp(-rates.get(task, 0.0) / s)) for task, w, s in zip(TASKS, weights, scales, strict=True))


def test_proposals_come_closer_to_the_best_than_as_many_draws():
    ahead = []
    for seed in (1, 2, 3):
        search = plan(num_random=26, seed=seed)
        draws = [trial.rates for trial in search.random().values()]
        known = [(rates, gain(rates)) for rates in draws[:10]]
        for n in range(16):
            rates = search.proposal(n, known).rates
            known.append((rates, gain(rates)))
        ahead.append(max(score for _, score in known[10:]) - max(map(gain, draws)))
    assert min(ahead) > 0
    best = max(gain(dict(zip(TASKS, p, strict=True))) for p in np.random.default_rng(0).dirichlet(np.ones(4), 20_000).tolist())
    assert best - max(score for _, score in known) < 0.002


def test_a_proposal_is_a_function_of_what_is_known_and_keeps_away_from_what_is_running():
    search = plan(num_random=10)
    known = [(trial.rates, gain(trial.rates)) for trial in search.random().values()]
    first = search.proposal(0, known)
    assert search.proposal(0, known) == first
    assert sum(first.rates.values()) == pytest.approx(1.0)
    beside = search.proposal(0, known, [first.rates])
    assert sum(abs(beside.rates.get(task, 0.0) - first.rates.get(task, 0.0)) for task in TASKS) > 0.02
    assert set(search.proposal(0, []).rates) <= set(TASKS)


# ------------------------------------------------------------------------------------------------------ searches as a whole


def settings(world: Path, **changed: Any) -> dict[str, Any]:
    """Arguments of a search over two text tasks, in trials of seconds."""
    keys = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in TINY)}
    keys |= {"data.root": str(world), "trainer.max_steps": 4, "trainer.logger": False}
    keys |= {f"data.tasks.{task}.rate": 0.0 for task in NO_TASKS}
    given = {"stage": "quickstart/prefinetune", "keys": keys, "benchmarks": ["world"], "score": "world/text-text"}
    return given | {"every_steps": 2, "alone_steps": [], "num_random": 1, "num_bayesian": 0, "num_winners": 2} | changed


@pytest.fixture
def forked(zygote, monkeypatch, tmp_path) -> list[list[str]]:
    """Trials as forks of a process that has everything imported; their words."""
    begun = []

    def run(words: list[str]) -> tuple[int, list[int]]:
        begun.append(words)
        told = {"environment": {}, "log": str(tmp_path / "log")}
        return zygote.ask(wait=zygote.ask(arguments=words[2:], **told)), []

    monkeypatch.setattr(recipe_runs, "_run_process", run)
    return begun


def ledger_of(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "mixture.json").read_text())["trials"]


@pytest.mark.timeout(300)
def test_a_search_tries_all_and_averages_the_best(world, forked, tmp_path, capsys):
    out = tmp_path / "out"
    wanted = settings(
        world, out=str(out), alone_steps=[2, 4], grid={"world/text-code": [0.5]}, num_random=2, num_bayesian=1, seed=5
    )
    mixture_search(**wanted)
    shown = capsys.readouterr().out
    trials = ledger_of(out)
    assert list(trials) == [*(f"alone.{n}" for n in range(4)), "seed", "grid.0", "random.0", "random.1", "bayesian.0"]
    assert len(forked) == 9
    for name, trial in trials.items():  # what was trained on is what was meant
        config = yaml.safe_load((out / name.replace(".", "/") / "config.yaml").read_text())
        rates = {task: spec["rate"] for task, spec in config["data"]["tasks"].items() if spec["rate"]}
        assert rates == trial["rates"]
        assert config["trainer"]["max_steps"] == (trial["max_steps"] or 4)
        judged = json.loads((out / name.replace(".", "/") / "benchmarks.json").read_text())
        assert trial["score"] == max(scores["world/text-text"] for scores in judged.values())
        assert judged[str(trial["steps"])] == trial["benchmarks"]
    for task, (short, long) in (("world/text-code", ("alone.0", "alone.1")), ("world/text-text", ("alone.2", "alone.3"))):
        assert list(trials[short]["rates"]) == list(trials[long]["rates"]) == [task]
    steps = {}
    for first, second in (("alone.0", "alone.1"), ("alone.2", "alone.3")):
        best = max((trials[name]["score"], -trials[name]["steps"]) for name in (first, second))
        steps[next(iter(trials[first]["rates"]))] = -best[1]
    assert trials["seed"]["rates"] == plan(steps_per_block=14).shares(steps)
    mixtures = {name: trial["score"] for name, trial in trials.items() if not name.startswith("alone")}
    winners = sorted(mixtures, key=lambda name: -mixtures[name])[:2]
    parents = read_provenance(out / "encoder")["parents"]
    assert [parent["path"] for parent in parents] == [str(out / name.replace(".", "/") / "encoder-best") for name in winners]
    assert [parent["weight"] for parent in parents] == [0.5, 0.5]
    for name in trials:  # weights of those that won nothing are gone, all else is there
        folder = out / name.replace(".", "/")
        assert [(folder / weights).exists() for weights in ("encoder-best", "encoder", "checkpoints")] == [name in winners] * 3
        assert read_record(folder)["state"] == "done"
    page = (out / "mixture.html").read_text()
    assert page.count("<circle") >= 3 * len(mixtures)
    assert page.count('<tr class="winner">') == 2
    assert "Each task alone" in page
    assert f"the best is {winners[0]}, {mixtures[winners[0]]:.4f}" in shown
    mixture_search(**wanted)  # all is there
    assert len(forked) == 9
    mixture_search(**{**wanted, "num_random": 3})  # and more can be asked for
    assert list(ledger_of(out))[9:] == ["random.2"]
    with pytest.raises(ValueError, match="holds a search with other judged and seed; give another folder as out"):
        mixture_search(**{**wanted, "seed": 6, "every_steps": 1})


def test_a_search_is_joined_and_looked_at_when_the_stage_was_run_by_itself(world, forked, tmp_path):
    """The stage's own folder is none of its inputs."""
    wanted = settings(world, out=str(tmp_path / "out"), num_random=0, num_winners=1)
    own = tmp_path / "own"
    wanted["keys"]["trainer.default_root_dir"] = str(own)
    mixture_search(**wanted)
    own.mkdir()
    (own / "config.yaml").write_text("")
    mixture_search(**wanted, action="status")
    mixture_search(**wanted)
    assert len(forked) == 1


def test_proposals_that_are_left_out_beforehand_stop_no_others(world, tmp_path):
    search = search_of(settings(world, out=str(tmp_path), num_random=0, num_bayesian=3, without=["bayesian.1"]))
    search._trials = {}
    begun = []
    for _ in range(5):
        for name, trial in search._planned():
            if name not in search._trials and name not in search.without:
                search._trials[name] = {**trial._asdict(), "score": 0.1 * len(begun)}
                begun.append(name)
                break
    assert begun == ["seed", "bayesian.0", "bayesian.2"]


def search_of(given: dict[str, Any]) -> Search:
    names = ("benchmarks", "every_steps", "score")
    return Search(
        Path(given["out"]),
        given["stage"],
        given["keys"],
        judged={name: given[name] for name in names},
        alone={"steps": given["alone_steps"], "scores": given.get("alone_scores", {})},
        plan={"grid": {}, "seed": 1} | {name: given[name] for name in ("grid", "num_random", "num_bayesian") if name in given},
        num_winners=given["num_winners"],
        without=given.get("without", []),
    )


def test_a_trial_that_fails_is_tried_again_or_left_out(world, forked, zygote, monkeypatch, tmp_path, capsys):
    out, meant = tmp_path / "out", recipe_runs._run_process
    wanted = settings(world, out=str(out), num_winners=1, every_steps=4)

    def run(words: list[str]) -> tuple[int, list[int]]:
        return (1, []) if f'trainer.default_root_dir="{out}/seed"' in words else meant(words)

    monkeypatch.setattr(recipe_runs, "_run_process", run)
    for _ in range(2):  # begun again it is tried again
        with pytest.raises(ValueError, match="stage seed failed with status 1"):
            mixture_search(**wanted)
    assert len(read_record(out / "seed")["attempts"]) == 2
    mixture_search(**wanted, without=["seed"])
    assert [name for name, trial in ledger_of(out).items() if "score" in trial] == ["random.0"]
    assert [parent["path"] for parent in read_provenance(out / "encoder")["parents"]] == [f"{out}/random/0/encoder-best"]
    capsys.readouterr()
    mixture_search(**wanted, action="status")
    assert "seed (failed)" in capsys.readouterr().out
    monkeypatch.setattr(recipe_runs, "_run_process", meant)  # what was wrong is mended
    mixture_search(**wanted)
    assert set(ledger_of(out)) == {"seed", "random.0"}
    assert all("score" in trial for trial in ledger_of(out).values())
    with pytest.raises(ValueError, match=r"without names alone\.0; what can be left out is called seed, grid.3"):
        mixture_search(**wanted, without=["alone.0"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stage": "finetoon"}, "stage is 'finetoon', but there is no"),
        ({"stage": "soup", "keys": {"checkpoints": ["a"]}}, "stage soup trains on no tasks"),
        ({"benchmarks": []}, "there is nothing to judge mixtures by"),
        ({"benchmarks": ["wrld"]}, "there are no benchmarks 'wrld'; conf/benchmarks has code_dev"),
        ({"score": "world/text-txt"}, "score is 'world/text-txt'; it must be mean or one of world/text-image"),
        ({"alone_scores": {"world/text-code": "x"}}, "score is 'x'; it must be mean or one of"),
        ({"num_winners": 3}, "num_winners is 3; allowed: 1 to the number of mixtures"),
        ({"action": "status"}, "there is no search in "),
        ({"alone_scores": {"world/x": "world/text-text"}}, "alone_scores: 'world/x' is no task of the mixture"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_runs(world, forked, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        mixture_search(**settings(world, out=str(tmp_path / "out"), **changed))
    assert not forked
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_kills", [2, pytest.param(8, marks=pytest.mark.full)])
def test_processes_that_join_and_are_killed_make_one_search(world, tmp_path, num_kills):
    """As one process alone makes it: the same trials, none twice, the same weights."""
    wanted = settings(world, alone_steps=[2], num_winners=1, every_steps=4)
    told = [f"{name}={json.dumps(value)}" for name, value in wanted.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def begin(out: Path) -> subprocess.Popen:
        words = [sys.executable, "train.py", "conf=mixture_search", *told, f"out={out}"]
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    straight, out = tmp_path / "straight", tmp_path / "out"
    chance, workers = random.Random(0), [begin(straight), begin(out)]
    for _ in range(num_kills):
        workers.append(begin(out))
        time.sleep(chance.uniform(2.0, 12.0))
        victim = workers.pop(chance.randrange(1, len(workers)))
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
    workers.append(begin(out))
    assert [worker.wait() for worker in workers] == [0] * len(workers), (tmp_path / "log").read_text()[-3000:]
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(str(tmp_path).encode() in command for command in commands)
    same = [{name: (trial["rates"], trial["score"]) for name, trial in sorted(ledger_of(at).items())} for at in (straight, out)]
    assert same[0] == same[1]
    assert set(same[0]) == {"alone.0", "alone.1", "seed", "random.0"}
    assert read_provenance(straight / "encoder")["sha256"] == read_provenance(out / "encoder")["sha256"]
    for name in same[0]:
        attempts = read_record(out / name.replace(".", "/"))["attempts"]
        assert [attempt["status"] for attempt in attempts].count(0) == 1


def test_the_three_experts_are_a_recipe():
    config = compose(CONF / "experts.yaml", [])["stages"]["search"]
    assert [each["stage"] for each in config["array"]] == ["finetune_task", "finetune_language", "finetune_code"]
    for each in config["array"]:
        given = compose(CONF / "mixture_search.yaml", [f"{key}={json.dumps(value)}" for key, value in each.items()])
        found = search_of({**given, "out": "out", "keys": config["keys"]["keys"]})
        assert len(found.plan.tasks) >= 5
        for name in given["benchmarks"]:
            assert {spec["shards"].partition("-")[2] or spec["shards"] for spec in benchmarks(name)} <= DEV


DEV = {"dev"} | {f"text/{name}/dev" for name in ("agnews", "clinc150", "tweet_emotion")}
DEV |= {f"code/{name}/dev" for name in ("java_cs", "nl2bash", "wikisql")}


def benchmarks(name: str) -> list[dict[str, Any]]:
    return list(compose(CONF / "benchmarks" / f"{name}.yaml", [])["benchmarks"].values())
