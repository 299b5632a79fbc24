"""Promises of benchmarks while training: scores in the log, the best encoder kept, an early end, and nothing else changed."""

import csv
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from test_sharded import SHARDED, STILL
from trials import consumed, weights_hash

from datamodules.tasks import BenchmarkSpec
from lightning_modules.benchmarking import Benchmarks
from lightning_modules.configuration import CONF, compose
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance
from lightning_modules.judge import Judge

SETTINGS = {"benchmarks": "[world]", "every_steps": "4"}


def judging(out: Path, **settings: str) -> list[str]:
    """Overrides that have a run judged, and its scores logged."""
    told = ", ".join(f"{name}: {value}" for name, value in (SETTINGS | settings).items())
    callbacks = (
        "{class_path: lightning_modules.ema.EMA, init_args: {decay: 0.5}}",
        "{class_path: lightning_modules.checkpoints.Checkpoints, init_args: {every_steps: 4}}",
        f"{{class_path: lightning_modules.benchmarking.Benchmarks, init_args: {{{told}}}}}",
    )
    logger = f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: '{out}', name: logs}}}}"
    # the encoders that are written are averages, as those that are judged must be
    return [*STILL, f"trainer.callbacks=[{', '.join(callbacks)}]", f"trainer.logger={logger}"]


def trained(zygote, out: Path, *more: str, size: int = 1) -> tuple[Path, str]:
    run = zygote.begin(out, *more, world_size=size)
    assert run.wait() == [0] * size, run.log()
    return out, run.log()


@pytest.fixture(scope="module")
def judged(zygote, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("judged") / "run"
    return trained(zygote, out, *judging(out))


def scores(out: Path) -> dict[int, dict[str, float]]:
    """Step to scores, from the run's metrics.csv."""
    found: dict[int, dict[str, float]] = {}
    with next(out.glob("logs/version_0/metrics.csv")).open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if name.startswith("benchmark/") and value}
            if values:
                found.setdefault(int(row["step"]), {}).update(values)
    return found


def test_scores_are_logged_and_the_best_encoder_is_kept(judged):
    out, log = judged
    found = scores(out)
    assert list(found) == [4, 8, 12]
    for values in found.values():
        assert values.pop("benchmark/mean") == pytest.approx(sum(values.values()) / len(values))
    means = scores(out)
    best = max(means, key=lambda step: (means[step]["benchmark/mean"], -step))
    provenance = read_provenance(out / "encoder-best")
    assert provenance["steps"] == best
    assert provenance["benchmarks"]["mean"] == pytest.approx(means[best]["benchmark/mean"])
    assert f"step {best}: mean of" in log


def test_the_score_is_that_of_the_encoder_that_is_written(judged, world):
    specs = {name: BenchmarkSpec(**spec) for name, spec in compose(CONF / "benchmarks/world.yaml", [])["benchmarks"].items()}
    encoder, processor = load_encoder(judged[0] / "encoder-best")
    judge = Judge(encoder, processor, world, batch_size=16, num_workers=0, device="cpu")
    told: dict[str, Any] = read_provenance(judged[0] / "encoder-best")["benchmarks"]
    assert judge.headline(specs) == pytest.approx(told["mean"], abs=1e-6)


def test_learning_is_that_of_a_run_without_benchmarks(zygote, judged, tmp_path):
    out = tmp_path / "plain"
    plain, _ = trained(zygote, out, *judging(out, benchmarks="[]"))
    assert weights_hash(plain) == weights_hash(judged[0])
    assert not (plain / "encoder-best").exists()


@pytest.mark.parametrize("strategy", [[], SHARDED], ids=["ddp", "sharded"])
def test_ranks_judge_together_what_one_judges_alone(zygote, judged, tmp_path, strategy):
    out = tmp_path / "two"
    together, _ = trained(zygote, out, *judging(out), "trainer.max_steps=4", *strategy, size=2)
    # nearly the same weights: of 24 queries one may change its mind
    for name, value in scores(together)[4].items():
        assert value == pytest.approx(scores(judged[0])[4][name], abs=1.01 / 24)


def test_a_run_that_does_not_improve_ends_early_and_stays_ended(zygote, tmp_path):
    still = [*judging(tmp_path / "run", every_steps="2", patience="2"), "model.optimizer.learning_rate=1e-12"]
    out, log = trained(zygote, tmp_path / "run", *still)
    assert "ended early at step 6: 2 judgements without a better score" in log
    assert read_provenance(out / "encoder")["steps"] == 6
    assert read_provenance(out / "encoder-best")["steps"] == 2
    seen = consumed(out)
    trained(zygote, out, *still, "ckpt_path=newest")
    assert consumed(out) == seen


def test_the_best_so_far_is_remembered_by_checkpoints(zygote, judged, tmp_path):
    every = judging(tmp_path / "run")
    run = zygote.begin(tmp_path / "run", *every)
    run.wait_for_step(9)
    run.send(signal.SIGKILL)
    run.wait()
    out, _ = trained(zygote, tmp_path / "run", *every, "ckpt_path=newest")
    assert read_provenance(out / "encoder-best")["benchmarks"] == read_provenance(judged[0] / "encoder-best")["benchmarks"]


def test_another_score_is_not_held_against_the_checkpoints(capsys):
    before, same, other = (Benchmarks(benchmarks=["world"], score=score) for score in ("mean", "mean", "world/text-image"))
    before.best, before.num_worse = 0.7, 2
    for callback in (same, other):
        callback.load_state_dict(before.state_dict())
    assert (same.best, same.num_worse) == (0.7, 2)
    assert (other.best, other.num_worse) == (-math.inf, 0)
    assert "another score than this run's: it begins anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmarks": "[wordl]"}, "there are no benchmarks 'wordl'; conf/benchmarks has .*world"),
        ({"score": "world/text-imag"}, "score is 'world/text-imag'; it must be mean or one of world/text-image"),
        ({"patience": "0"}, "patience 0; allowed: above 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(zygote, tmp_path, settings, message):
    run = zygote.begin(tmp_path / "run", *judging(tmp_path / "run", **settings))
    assert run.wait() == [1]
    assert re.search(message, run.log()), run.log()
    assert "Traceback" not in run.log()
