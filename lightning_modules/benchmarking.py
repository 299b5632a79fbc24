"""Benchmarks while a stage trains: their scores in the log, the best encoder kept, and an end where nothing improves."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from datamodules.files import replace_file
from datamodules.tasks import BenchmarkSpec
from lightning_modules.configuration import CONF, compose
from lightning_modules.ema import averaged
from lightning_modules.judge import Judge

MEAN = "mean"
SCORES = "benchmarks.json"


def specs_of(files: Sequence[str], scores: Iterable[str]) -> dict[str, BenchmarkSpec]:
    """Benchmarks by name.

    Args:
        files: Files below conf/benchmarks, without .yaml.
        scores: What is asked of them: benchmarks, or `mean`.

    Raises:
        ValueError: A file is missing, or no benchmark has such a name.
    """
    specs: dict[str, BenchmarkSpec] = {}
    for file in files:
        path = CONF / "benchmarks" / f"{file}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
            raise ValueError(f"there are no benchmarks {file!r}; conf/benchmarks has {known}")
        specs |= {name: BenchmarkSpec(**spec) for name, spec in compose(path, [])["benchmarks"].items()}
    if unknown := [score for score in scores if score not in (MEAN, *specs)]:
        raise ValueError(f"benchmarks: score is {unknown[0]!r}; it must be {MEAN} or one of {', '.join(specs)}")
    return specs


class Benchmarks(Callback):
    """Judges the encoder every so many steps at full width, all ranks together, as it would be written then.

    The log has `benchmark/<name>` for each and `benchmark/mean`. The encoder of the best score is `encoder-best` in the run's
    folder, and says what it reached; `benchmarks.json` has the scores of every judged step. Learning itself is not touched: the
    weights are those of a run without it.

    Args:
        benchmarks: Files below conf/benchmarks, such as `pack_dev`; none judges nothing.
        every_steps: Steps between two judgements; the last step is judged too.
        score: The benchmark by which the best is told, or `mean` for the mean over all.
        patience: Judgements in a row without a better score after which the run ends; None never ends it.
        root: Folder that the benchmarks' shards lie in; None is the training data's.
        batch_size: Examples embedded at once.
        num_workers: Processes that read and decode.

    Raises:
        ValueError: A number is below 1; (when the run begins) a file or data are missing, or no benchmark has the score's name.
    """

    def __init__(
        self,
        *,
        benchmarks: list[str] = [],  # noqa: B006 (never changed)
        every_steps: int = 1000,
        score: str = MEAN,
        patience: int | None = None,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        if every_steps < 1 or (patience is not None and patience < 1):
            raise ValueError(f"benchmarks: every_steps is {every_steps}, patience {patience}; allowed: above 0")
        self.files, self.every_steps, self.score, self.patience = benchmarks, every_steps, score, patience
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.best, self.num_worse = -math.inf, 0
        self.judged: dict[str, dict[str, float]] = {}
        self._specs: dict[str, BenchmarkSpec] = {}
        self._judge: Judge | None = None
        self._seen_step = 0

    @property
    def is_over(self) -> bool:
        """Whether the score has not improved for as long as patience lasts."""
        return self.patience is not None and self.num_worse >= self.patience

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._seen_step = trainer.global_step
        if not self.files:
            return
        if self.is_over:  # the checkpoint's run had ended so
            trainer.should_stop = True
        self._specs = specs_of(self.files, [self.score])
        training = pl_module.encoder.training
        self._judge = Judge(
            pl_module.encoder,
            pl_module.data.processor,
            pl_module.data.root if self.root is None else Path(self.root),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=str(pl_module.device),
            show_progress=False,
        )
        if missing := self._judge.check(self._specs):
            raise ValueError(f"benchmarks: {', '.join(missing)} have no data; {next(iter(missing.values()))}")
        pl_module.encoder.train(training)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._judge is None or step == self._seen_step:  # gradients are still being gathered
            return
        self._seen_step = step
        if step % self.every_steps and step < trainer.max_steps:
            return
        encoder = pl_module.encoder
        training = encoder.training
        encoder.eval()
        with averaged(trainer, encoder), trainer.precision_plugin.forward_context():
            scores = self._judge.headlines(self._specs)
        encoder.train(training)
        scores[MEAN] = sum(scores.values()) / len(scores)
        for logger in trainer.loggers:
            logger.log_metrics({f"benchmark/{name}": value for name, value in scores.items()}, step=step)
        self._see(scores, step, trainer, pl_module)

    def _see(self, scores: dict[str, float], step: int, trainer: L.Trainer, pl_module: Any) -> None:
        reached = scores[self.score]
        is_better = reached > self.best
        self.judged[str(step)] = scores
        if trainer.is_global_zero:
            replace_file(Path(trainer.default_root_dir) / SCORES, json.dumps(self.judged, indent=1))
            told = "the best so far" if is_better else f"the best was {self.best:.4f}"
            print(f"step {step}: {self.score} of {len(self._specs)} benchmarks {reached:.4f}, {told}", flush=True)
        if is_better:
            self.best, self.num_worse = reached, 0
            pl_module.save_encoder("encoder-best", benchmarks=scores, score=self.score)
            return
        self.num_worse += 1
        if self.is_over and step < trainer.max_steps:
            trainer.should_stop = pl_module.stopped_early = True
            if trainer.is_global_zero:
                print(f"ended early at step {step}: {self.num_worse} judgements without a better score", flush=True)

    def state_dict(self) -> dict[str, Any]:
        told = {"best": self.best, "num_worse": self.num_worse, "judged_by": [self.score, *self.files], "judged": self.judged}
        return told if self.files else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["judged_by"] != [self.score, *self.files]:
            print(f"the checkpoint's best is by {state_dict['judged_by']}, another score than this run's: it begins anew")
            return
        self.best, self.num_worse = state_dict["best"], state_dict["num_worse"]
        self.judged = dict(state_dict.get("judged", {}))
