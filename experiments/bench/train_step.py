"""A training step: examples a second and peak memory of our stage against sentence-transformers' own trainer.

    python experiments/bench/train_step.py --source ../shared/data --models bert --data banking77,agnews,cosqa --rounds 3 \
        --out experiments/bench/train_step_cpu.json

Two comparisons a data set: `--batch-size` pairs against its cached loss (mini-batches of 32, its default), and
`--whole-batch-size` pairs against the loss that embeds a batch at once; its Matryoshka loss is around both. The same pairs make
the same batches (in random order for it, as its own sampler leaves them), from the same random weights, with the same prefixes,
tokenizer, optimiser, clipping and number of threads, in fp32 without dropout. Each trains in its own process, and they take
turns of `--steps` steps after two that warm up; a turn includes reading, tokenising and the optimiser. Memory is the peak
beyond what a process held before its first step. The command above takes about a quarter of an hour on two free cores.
Models: `bert` (6 layers, 384 wide), `small` (the text model of conf/model/small.yaml, Qwen3 without its mask).

`{tokens}` in `--ours` becomes what the rival's largest mini-batch holds, padding included; where our peak is above its peak, or
far below, ours starts again with fewer or more, so that both have as much memory. What is given without `{tokens}` is taken as
it is; an empty `--ours` lets our stage run as it comes. Goals: 2.5 times its examples a second on Banking77 and AG News, 1.5
times everywhere.

First the gradients of one batch of 64 distinct pairs are compared. `--quality` trains both to the end and judges held-out pairs
(both rates rise and fall as a cosine, the rival's a step behind ours); `--share` measures what part of a step of 4,096 pairs is
the loss. Needs sentence-transformers, datasets and accelerate (pip install -e '.[eval]' datasets accelerate); `--rival-path` is
a folder that holds them when they are installed elsewhere.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from loss import Inputs, step
from loss import ours as our_loss
from safetensors.torch import load_file
from stream import CONSOLE, processor_name, ratio, show
from training_inputs import NUM_DISTINCT, TASKS, Setup, Task, recall_at_1, tasks_from, write_held_out
from transformers.utils.logging import disable_progress_bar
from turns import WARMUP_STEPS, Contestant, Job, with_path

GOALS = dict.fromkeys(TASKS, 2.5) | {"cosqa": 1.5}  # of our examples a second against the rival's
MODELS = ("bert", "small")
MAX_STARTS = 4  # of ours, with fewer tokens or more, until its peak is at or a little below the rival's
ENOUGH = 0.85  # of the rival's peak
RIVAL_NEEDS = ("sentence-transformers", "datasets", "accelerate")
TITLES = {
    "gradients": "gradients of one batch, ours and the rival's",
    "steps": "pairs a second, ours and the rival's; peak memory; tokens at a time of ours, padding of the rival's",
    "share": "the loss in our step",
    "quality": "recall@1 of held-out pairs, mean over seeds",
}
OURS, RIVAL, TOKENS = "ours", "rival", "{tokens}"


class Bench:
    """A model's set-up, and what is measured with it."""

    def __init__(self, setup: Setup, arguments: argparse.Namespace) -> None:
        self.setup, self.arguments = setup, arguments
        self.turns = {"rounds": arguments.rounds, "steps": arguments.steps, "threads": arguments.threads}

    @contextlib.contextmanager
    def start(self, kind: str, job: Job) -> Iterator[Contestant]:
        """A trainer that has warmed up; its peak so far is in `last`."""
        contestant = Contestant(kind, job, self.setup.folder, self.arguments.rival_path if kind == RIVAL else None)
        try:
            contestant.ready()
            contestant.turn()
            yield contestant
        finally:
            contestant.stop()

    def overrides(self, tokens: int | None) -> list[str]:
        """Those of the command; without the ones that bound tokens where nothing is to be bounded."""
        given = self.arguments.ours
        return [x.replace(TOKENS, str(tokens)) for x in given if tokens is not None or TOKENS not in x]

    @contextlib.contextmanager
    def start_within(self, peak: float, job: Job, tokens: int | None) -> Iterator[tuple[Contestant, int | None]]:
        """Ours, warmed up, with as many tokens at a time as keep it at or below a peak, where tokens can be bounded."""
        for attempt in itertools.count(1):
            with self.start(OURS, dataclasses.replace(job, overrides=self.overrides(tokens))) as contestant:
                excess = contestant.last["peak_bytes"] / peak
                if ENOUGH < excess <= 1 or tokens is None or attempt == MAX_STARTS:
                    yield contestant, tokens
                    return
                tokens = max(1, int(0.93 * tokens / excess))

    def compare(self, task: Task, batch_size: int, mini_batch: int | None) -> dict[str, Any]:
        """A row of the table: both trainers, turn by turn."""
        job, batches = self.setup.job(task, batch_size, mini_batch=mini_batch, **self.turns)
        padding, largest = batches.padding(mini_batch)
        bounded = mini_batch is not None and self.overrides(0) != self.overrides(None)
        rates: dict[str, list[float]] = {OURS: [], RIVAL: []}
        what = f"{task.name}, {batch_size} pairs"
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(CONSOLE.status(f"{what}: warming up"))
            rival = stack.enter_context(self.start(RIVAL, job))
            bound = largest if bounded else None
            ours, tokens = stack.enter_context(self.start_within(rival.last["peak_bytes"], job, bound))
            for number, contestant in itertools.product(range(job.rounds), (ours, rival)):
                status.update(f"{what}, round {number + 1} of {job.rounds}: {contestant.name}")
                turn = contestant.turn()
                rates[contestant.name].append(turn["examples"] / turn["seconds"])
        CONSOLE.print(f"{what}: measured")
        spread = {name: (max(found) - min(found)) / statistics.median(found) for name, found in rates.items()}
        return {
            "data": task.name,
            "loss": "plain" if mini_batch is None else f"cached {mini_batch}",
            "pairs": batch_size,
            "ours/s": statistics.median(rates[OURS]),
            "spread": spread[OURS],
            "its/s": statistics.median(rates[RIVAL]),
            "its spread": spread[RIVAL],
            "ours / it": ratio(rates[OURS], rates[RIVAL]),
            "goal": GOALS[task.name],
            "MiB": ours.last["peak_bytes"] / 2**20,
            "its MiB": rival.last["peak_bytes"] / 2**20,
            "tokens": tokens,
            "padding": padding,
        }

    def gradients(self, task: Task) -> dict[str, Any]:
        """How far the first step's gradients of one batch lie apart, before clipping."""
        found = {}
        for kind in (OURS, RIVAL):
            file = self.setup.folder / f"{kind}-{task.name}.safetensors"
            settings = {"mini_batch": None if kind == OURS else NUM_DISTINCT // 4, "clip": 0.0, "gradients": str(file)}
            job, _ = self.setup.job(task, NUM_DISTINCT, split="distinct", **{**self.turns, "rounds": 0, **settings})
            with self.start(kind, job) as contestant:
                contestant.wait()
            found[kind] = load_file(file)
        if found[OURS].keys() != found[RIVAL].keys():
            raise ValueError(f"only one has gradients of {', '.join(sorted(found[OURS].keys() ^ found[RIVAL].keys())[:5])}")
        norm = {name: float(gradient.norm()) for name, gradient in found[RIVAL].items()}
        apart = {name: float((found[OURS][name] - gradient).norm()) for name, gradient in found[RIVAL].items()}
        whole = sum(x * x for x in norm.values()) ** 0.5
        worst = max((name for name in norm if norm[name] > 1e-3 * whole), key=lambda name: apart[name] / norm[name])
        return {
            "data": task.name,
            "tensors": len(norm),
            "norm": whole,
            "apart / norm": sum(x * x for x in apart.values()) ** 0.5 / whole,
            "worst tensor": worst,
            "its apart / norm": apart[worst] / norm[worst],
        }

    def quality(self, task: Task) -> dict[str, float]:
        """Recall@1 of held-out pairs after as many steps of each, at every prefix."""
        held_out, found = self.setup.folder / "held_out.jsonl", {}
        pairs = write_held_out(held_out, self.setup.root, task)
        for kind in (OURS, RIVAL):
            vectors = self.setup.folder / f"{kind}.npz"
            settings = {"rounds": 1, "steps": self.arguments.quality_steps - WARMUP_STEPS, "threads": self.arguments.threads}
            settings |= {"overrides": self.overrides(None), "held_out": str(held_out), "vectors": str(vectors)}
            job, _ = self.setup.job(task, self.arguments.whole_batch_size or self.arguments.batch_size, **settings)
            with CONSOLE.status(f"{task.name}, seed {job.seed}, {job.num_steps} steps: {kind}"), self.start(kind, job) as run:
                run.turn()
                run.wait()
            found |= {f"{kind} @{prefix}": recall_at_1(vectors, pairs, prefix) for prefix in job.prefixes}
        return found

    def share(self, task: Task) -> dict[str, Any]:
        """What part of our step is the loss: its time alone over that of the step."""
        rows = self.arguments.share_size
        job, batches = self.setup.job(task, rows, **{**self.turns, "rounds": 1, "steps": 1})
        job = dataclasses.replace(job, overrides=self.overrides(batches.padding(self.arguments.mini_batch)[1]))
        with CONSOLE.status(f"{task.name}: a step of {rows} pairs"), self.start(OURS, job) as contestant:
            seconds = contestant.turn()["seconds"]
        alone = statistics.median(loss_seconds(rows, tuple(job.prefixes)) for _ in range(3))
        return {"data": task.name, "pairs": rows, "step, s": seconds, "loss alone, s": alone, "share": alone / seconds}


def loss_seconds(rows: int, prefixes: tuple[int, ...]) -> float:
    """Our loss by itself, forward and backward."""
    inputs = Inputs.fresh(rows, prefixes[-1], seed=0)
    start = time.perf_counter()
    step(our_loss, inputs, prefixes)
    return time.perf_counter() - start


def over_seeds(model: str, root: Path, tasks: dict[str, Task], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Recall@1 of both on each data set: the mean over seeds of weights and order, and how far they lie apart."""
    rows = []
    benches = [
        Bench(Setup(root / f"{model}-{seed}", root, model, tasks, seed), arguments) for seed in range(1, arguments.seeds + 1)
    ]
    for task in tasks.values():
        found = [bench.quality(task) for bench in benches]
        for name in found[0]:
            values = [values[name] for values in found]
            row = {"model": model, "data": task.name, "whose @prefix": name, "recall@1": statistics.mean(values)}
            rows.append({**row, "least": min(values), "most": max(values)})
    return rows


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hardware, settings and versions.

    Raises:
        ValueError: What the rival needs is not installed, or a model or data set is unknown.
    """
    for given, known in ((arguments.models, MODELS), (arguments.data, tuple(TASKS))):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is unknown; known are {', '.join(known)}")
    code = "import sys; from importlib.metadata import distributions as found; names = {d.name: d.version for d in found()}; "
    code += "print(*map(names.get, sys.argv[1:]))"
    environment = os.environ | with_path(arguments.rival_path)
    found = subprocess.run([sys.executable, "-c", code, *RIVAL_NEEDS], env=environment, stdout=subprocess.PIPE, text=True)
    versions = dict(zip(RIVAL_NEEDS, found.stdout.split(), strict=True))
    missing = [name for name, version in versions.items() if version == "None"]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; run pip install -e '.[eval]' datasets accelerate, or name the folder that "
            "holds them with --rival-path"
        )
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning", "tokenizers")}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("folder", "out", "source", "rival_path")}
    return {"hardware": processor_name(), "cores": os.cpu_count(), "python": platform.python_version(), **versions, **settings}


def shown(name: str, value: Any) -> Any:
    """What a table says of a small difference or of a share."""
    if name.endswith("apart / norm"):
        return f"{value:.0e}"
    return f"{value:.1%}" if name in ("padding", "spread", "its spread", "share") else value


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    tasks = tasks_from(arguments.source, root, arguments.data)
    figures: dict[str, list[dict[str, Any]]] = {"gradients": [], "steps": [], "share": [], "quality": []}
    for model in arguments.models:
        bench, named = Bench(Setup(root / model, root, model, tasks), arguments), {"model": model}
        figures["gradients"] += [named | bench.gradients(task) for task in tasks.values()]
        sizes = ((arguments.batch_size, arguments.mini_batch), (arguments.whole_batch_size, None))
        for (batch_size, mini_batch), task in itertools.product(sizes, tasks.values()):
            if batch_size:
                figures["steps"].append(named | bench.compare(task, batch_size, mini_batch))
        if arguments.share:
            figures["share"] += [named | bench.share(task) for task in tasks.values()]
        if arguments.quality:
            figures["quality"] += over_seeds(model, root, tasks, arguments)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser.add_argument("--source", required=True, help="the data pack's folder, the one that holds tasks.json")
    parser.add_argument("--models", type=words, default=["bert"], help="bert, small; default: bert")
    parser.add_argument("--data", type=words, default=list(TASKS), help=f"default: {','.join(TASKS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each after the warm-up")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--batch-size", type=int, default=192, help="pairs, against the cached loss; 0 leaves it out")
    parser.add_argument("--mini-batch", type=int, default=32, help="of the cached loss")
    parser.add_argument("--whole-batch-size", type=int, default=64, help="pairs, against the other; 0 leaves it out")
    parser.add_argument("--ours", nargs="*", default=[f"model.compute.max_tokens={TOKENS}"], help="key=value for our stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rival-path", help="folder with sentence-transformers, for its process only")
    parser.add_argument("--quality", action="store_true", help="recall@1 of held-out pairs after --quality-steps of each")
    parser.add_argument("--quality-steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3, help="of --quality")
    parser.add_argument("--share", action="store_true", help="what part of our step is the loss")
    parser.add_argument("--share-size", type=int, default=4096, help="pairs of that step")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    try:
        figures = about(arguments)
        CONSOLE.print(figures)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            figures |= measure(Path(name), arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for title, rows in figures.items():
        if title in TITLES and rows:
            show(TITLES[title], [{name: shown(name, value) for name, value in row.items()} for row in rows])
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
