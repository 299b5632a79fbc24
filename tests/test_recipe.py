"""Promises of recipes: stages in order; what is done stays so, what is changed is made anew, however often it is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from samples import TINY
from trials import ROOT, weights_hash

import lightning_modules.recipe
from datamodules.job import locked
from lightning_modules import recipe_runs
from lightning_modules.configuration import CONF, compose
from lightning_modules.lineage import identity, read_record, write_record
from lightning_modules.recipe import recipe
from lightning_modules.recipe_graph import StageSpec, placed, runs_of
from lightning_modules.recipe_runs import key_of, lock_of, make, state_of

WORLD = {"num_train": 8, "num_test": 2, "num_workers": 1}
TRAINED = {
    "data.root": "@world",
    "trainer.max_steps": 6,
    "trainer.logger": False,
    "trainer.callbacks": [{"class_path": "lightning_modules.checkpoints.Checkpoints", "init_args": {"every_steps": 1}}],
    **{key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in TINY)},
}


def stages(**changed: Any) -> dict[str, StageSpec]:
    found = {
        "soup": StageSpec("soup", {"checkpoints": ["@first/encoder", "@tuned/encoder"], "out": "@/encoder"}),
        "tuned": StageSpec(
            "quickstart/finetune",
            {"data.root": "@world", "model.init_from": "@first/encoder"},
            array=[{"data.seed": 1}, {"data.seed": 2}],
        ),
        "first": StageSpec("quickstart/prefinetune", {"data.root": "@world"}),
        "world": StageSpec("quickstart/world"),
        "looked": StageSpec("quickstart/inspect", {"root": "@world"}, after=["tuned"]),
    }
    return {**found, **changed}


def test_runs_stand_behind_what_they_are_made_of():
    runs = runs_of(Path("out"), stages())
    names = list(runs)
    assert sorted(names) == ["first", "looked", "soup", "tuned.0", "tuned.1", "world"]
    assert all(names.index(parent) < names.index(name) for name, run in runs.items() for parent in run.parents)
    assert runs["soup"].parents == ["first", "tuned.0", "tuned.1"]
    assert runs["tuned.1"].parents == ["world", "first"]
    assert runs["looked"].parents == ["world", "tuned.0", "tuned.1"]
    assert str(runs["tuned.1"].folder) == "out/tuned/1"


def test_places_become_paths_and_several_runs_several_items():
    runs = runs_of(Path("out"), stages())
    keys = placed(runs["soup"].keys, runs["soup"], runs)
    assert keys["checkpoints"] == ["out/first/encoder", "out/tuned/0/encoder", "out/tuned/1/encoder"]
    assert keys["out"] == "out/soup/encoder"
    keys = placed(runs["tuned.1"].keys, runs["tuned.1"], runs)
    assert keys["trainer.default_root_dir"] == "out/tuned/1"
    assert keys["ckpt_path"] == "newest"
    assert keys["data.seed"] == 2
    assert placed(runs["looked"].keys, runs["looked"], runs)["out"] == "out/looked"
    one = stages(soup=StageSpec("soup", {"checkpoints": ["@tuned.1/encoder", "a@b"]}))
    runs = runs_of(Path("out"), one)
    assert placed(runs["soup"].keys, runs["soup"], runs)["checkpoints"] == ["out/tuned/1/encoder", "a@b"]


def test_a_mapping_is_added_to_what_the_stage_has():
    """As `stages.first.keys.trainer.max_steps=6` on the command line gives one."""
    given = {"trainer": {"max_steps": 6}, "data.tasks": {"world/text-text": {"rate": 0.5}}, "data.root": "@world"}
    run = runs_of(Path("out"), stages(first=StageSpec("quickstart/prefinetune", given)))["first"]
    plain = compose(CONF / "quickstart/prefinetune.yaml", [])
    assert run.config["trainer"] == {**plain["trainer"], "max_steps": 6, "default_root_dir": "@"} | {
        "logger": run.config["trainer"]["logger"]
    }
    tasks = plain["data"]["tasks"]
    assert run.config["data"]["tasks"] == {**tasks, "world/text-text": {**tasks["world/text-text"], "rate": 0.5}}
    search = StageSpec("mixture_search", {"stage": "a", "grid": {"*/b": [1.0]}, "keys": {"data.root": "@world"}})
    search = runs_of(Path("out"), stages(first=search))["first"]
    assert search.config["grid"] == {"*/b": [1.0]}
    assert search.config["keys"] == {"data.root": "@world"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first": StageSpec("quickstart/prefinetune", {"data.root": "@wrld"})}, "'first' needs wrld; the recipe's stages"),
        ({"world": StageSpec("quickstart/world", after=["looked"])}, "need each other in a ring"),
        ({"world": StageSpec("quickstart/wrld")}, "has conf=quickstart/wrld, but there is no"),
        ({"a b": StageSpec("quickstart/world")}, "a stage is called 'a b'"),
        ({"soup": StageSpec("soup")}, "needs a value for checkpoints"),
    ],
)
def test_a_graph_that_is_none_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        runs_of(Path("out"), stages(**changed))


@pytest.mark.parametrize(
    ("place", "message"), [("@tuned/encoder", "stands for 2 places where one is needed"), ("@tuned.5/encoder", "names no run")]
)
def test_a_place_that_is_not_one_is_refused(place, message):
    runs = runs_of(Path("out"), stages(looked=StageSpec("quickstart/inspect", {"root": place})))
    with pytest.raises(ValueError, match=message):
        placed(runs["looked"].keys, runs["looked"], runs)


TUNED = ["finetune.0", "finetune.1", "soup"]
FULL = ["world", "adapt", "prefinetune", "mine", "assemble", *TUNED, "quantize", "evaluate.0", "evaluate.1", "export"]
EXPERTS = ["search.0", "search.1", "search.2", "soup"]


@pytest.mark.parametrize(
    ("conf", "names"),
    [("recipe", ["world", "prefinetune", *TUNED, "evaluate"]), ("recipe_full", FULL), ("experts", EXPERTS)],
)
def test_the_recipes_that_are_written_are_graphs(conf, names):
    config = compose(CONF / f"{conf}.yaml", [])
    runs = runs_of(Path("out"), {name: StageSpec(**spec) for name, spec in config["stages"].items()})
    assert list(runs) == names
    assert all(placed(run.keys, run, runs) for run in runs.values())


def words(out: Path, specs: dict[str, Any], *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "conf=recipe", f"out={out}", f"stages={json.dumps(specs)}", *more]


def asked(out: Path, specs: dict[str, Any], **more: Any) -> None:
    recipe(str(out), {name: StageSpec(**spec) for name, spec in specs.items()}, **more)


def test_what_is_done_stays_done_and_what_is_changed_is_made_anew(tmp_path, capfd):
    out = tmp_path / "out"
    specs: dict[str, Any] = {
        "looked": {"conf": "quickstart/inspect", "keys": {"root": str(tmp_path / "nowhere")}, "after": ["world"]},
        "world": {"conf": "quickstart/world", "keys": WORLD},
    }
    with pytest.raises(ValueError, match="stage looked failed with status 1, see above; mended, the same command goes on"):
        asked(out, specs)
    capfd.readouterr()
    asked(out, specs, action="status")
    table = [line.split()[:2] for line in capfd.readouterr().out.splitlines() if line.split()]
    assert ["looked", "failed"] in table
    assert ["world", "done"] in table
    specs["looked"]["keys"]["root"] = "@world"
    asked(out, specs)
    shown = capfd.readouterr().out
    assert "world: done before" in shown
    assert "looked: was made with other settings or inputs" in shown
    made = {name: read_record(out / name) for name in specs}
    assert {record["state"] for record in made.values()} == {"done"}
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["looked"]["parents"] == ["world"]
    assert lineage["world"]["config"]["num_train"] == WORLD["num_train"]
    asked(out, specs)
    assert {name: read_record(out / name) for name in specs} == made
    (out / "looked" / "inspect.html").write_text("")
    asked(out, specs, action="status")
    assert ["looked", "changed"] in [line.split()[:2] for line in capfd.readouterr().out.splitlines() if line.split()]
    specs["world"]["keys"] = {**WORLD, "num_train": 9}
    asked(out, specs)
    assert capfd.readouterr().out.count("was made with other settings or inputs, which now lies in") == 2
    assert len(list(out.glob("world.*"))) == 1
    assert (out / "looked" / "inspect.html").stat().st_size > 1000


@pytest.mark.parametrize("num_kills", [1, pytest.param(10, marks=pytest.mark.full)])
def test_a_recipe_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, num_kills):
    specs: dict[str, Any] = {
        "world": {"conf": "quickstart/world", "keys": WORLD},
        "first": {"conf": "quickstart/prefinetune", "keys": TRAINED},
    }
    asked(tmp_path / "straight", specs)
    chance, out = random.Random(0), tmp_path / "out"
    began = time.monotonic()
    for _ in range(num_kills):
        process = subprocess.Popen(
            words(out, specs),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not list(out.glob("first/checkpoints/*")) and time.monotonic() < began + 60:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        record = read_record(out / "first")
        assert record["state"] in ("running", "done")
    asked(out, specs)
    assert weights_hash(out / "first") == weights_hash(tmp_path / "straight" / "first")
    assert identity(out / "world") == identity(tmp_path / "straight" / "world")


def test_a_signal_stops_the_stage_with_a_checkpoint_and_the_recipe_with_its_status(tmp_path):
    specs: dict[str, Any] = {
        "world": {"conf": "quickstart/world", "keys": WORLD},
        "first": {"conf": "quickstart/prefinetune", "keys": {**TRAINED, "trainer.max_steps": 2000}},
    }
    process = subprocess.Popen(
        words(tmp_path, specs),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    began = time.monotonic()
    while not list(tmp_path.glob("first/checkpoints/*")) and time.monotonic() < began + 100:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, shown
    assert "stopped by SIGUSR1 after step" in shown
    assert "first was stopped (status 138); the same command goes on" in shown
    assert read_record(tmp_path / "first")["state"] == "stopped"


def test_a_run_is_running_while_a_process_holds_it(tmp_path):
    runs = runs_of(tmp_path, {"world": StageSpec("quickstart/world")})
    assert state_of(runs["world"], runs) == "waiting"
    write_record(tmp_path / "world", {"key": key_of(runs["world"], runs)[0], "state": "running", "job": None})
    assert state_of(runs["world"], runs) == "stopped"  # who wrote this is gone
    with locked(lock_of(runs["world"])):
        assert state_of(runs["world"], runs) == "running"
    assert state_of(runs["world"], runs) == "stopped"


@pytest.mark.parametrize(
    ("status", "state"), [(0, "done"), (1, "failed"), (138, "stopped"), (-15, "stopped"), (137, "failed"), (-11, "failed")]
)
def test_only_a_signal_to_stop_is_one_that_stops(status, state, tmp_path, monkeypatch):
    """What runs out of memory or crashes has failed, and is not begun again by itself."""
    runs = runs_of(tmp_path, {"world": StageSpec("quickstart/world")})
    monkeypatch.setattr(recipe_runs, "_run_process", lambda words: (status, []))
    with {"done": nullcontext(), "failed": pytest.raises(ValueError), "stopped": pytest.raises(SystemExit)}[state] as met:  # noqa: PT011
        make(runs["world"], runs)
    assert read_record(tmp_path / "world")["state"] == state
    if state == "stopped":
        assert met.value.code == (138 if status == 138 else 143)


def test_a_signal_at_a_runs_very_end_still_ends_what_began_it(tmp_path, monkeypatch):
    runs = runs_of(tmp_path, {"world": StageSpec("quickstart/world")})
    monkeypatch.setattr(recipe_runs, "_run_process", lambda words: (0, [signal.SIGUSR1]))
    with pytest.raises(SystemExit) as met:
        make(runs["world"], runs)
    assert met.value.code == 138
    assert read_record(tmp_path / "world")["state"] == "done"


def test_what_a_killed_attempt_cost_is_counted_by_what_it_wrote_last(tmp_path, monkeypatch):
    runs = runs_of(tmp_path, {"world": StageSpec("quickstart/world")})
    folder, began = tmp_path / "world", time.time() - 100
    write_record(
        folder, {"key": key_of(runs["world"], runs)[0], "state": "running", "job": None, "began": began, "attempts": []}
    )
    for file in folder.iterdir():
        os.utime(file, (began, began + 40))
    monkeypatch.setattr(recipe_runs, "_run_process", lambda words: (0, []))
    make(runs["world"], runs)
    record = read_record(folder)
    assert [attempt["status"] for attempt in record["attempts"]] == [None, 0]
    assert record["seconds"] == pytest.approx(40, abs=1)


def test_a_search_with_more_to_try_goes_on_where_it_lies(tmp_path, monkeypatch):
    """What another stage would have moved aside and made anew."""
    monkeypatch.setattr(recipe_runs, "_run_process", lambda words: (0, []))
    for num_random in (1, 2):
        keys = {"stage": "finetune_code", "num_random": num_random}
        runs = runs_of(tmp_path, {"search": StageSpec("mixture_search", keys)})
        make(runs["search"], runs)
    assert [path.name for path in tmp_path.glob("search*")] == ["search"]
    assert len(read_record(tmp_path / "search")["attempts"]) == 2


def test_what_a_changed_stage_is_needed_by_is_submitted_with_it(tmp_path, monkeypatch, capsys):
    """And what waits for it ends when it fails, so that another submission can begin it again."""
    monkeypatch.setattr(recipe_runs, "_run_process", lambda words: (0, []))
    specs: dict[str, Any] = {
        "world": {"conf": "quickstart/world", "keys": WORLD},
        "looked": {"conf": "quickstart/inspect", "keys": {"root": "@world"}},
        "apart": {"conf": "quickstart/world", "keys": WORLD},
    }
    asked(tmp_path, specs)
    specs["world"]["keys"] = {**WORLD, "num_train": 9}
    submitted: list[list[str]] = []
    monkeypatch.setattr(lightning_modules.recipe, "_submitted", lambda words: (submitted.append(words), str(len(submitted)))[1])
    capsys.readouterr()
    asked(tmp_path, specs, action="submit")
    assert capsys.readouterr().out.splitlines() == ["world: job 1", "looked: job 2", "apart: done before"]
    assert "--dependency=afterok:1" in submitted[1]
    assert "--kill-on-invalid-dep=yes" in submitted[1]
