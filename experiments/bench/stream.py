"""The stream: examples a second against plain webdataset and raw reading, then indexing, then start-up and memory at scale.

    python experiments/bench/stream.py --source ../shared/data [--entries 10000,1000000,100000000] [--rounds 5] [--out FILE]

Three splits of the data pack are cut into eight shards each, because webdataset gives whole shards to its workers. Contestants
take turns in one process, `--seconds` each, one thread each, files in the page cache, the clock running from the first batch.
Ours reads in the planned order, deals batches by length and checks every byte; webdataset shuffles in a buffer of 1,000.
What grows with the number of examples is measured by `startup.py`.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import startup
import torch
import yaml
from pipelines import ON_LISTS, OURS, OURS_DECODED, PROCESSOR, SAME_DECODED, SAME_WORK, Run, Work
from rich.console import Console
from rich.table import Table

from datamodules.index import write_index
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.recipes.pack import prepare
from datamodules.shards import Split, write_split
from datamodules.store import Store
from datamodules.tasks import TaskSpec

CONF = Path(__file__).parents[2] / "conf" / "tasks"
TASKS = {"image": "tinyimagenet100/class", "audio": "esc10/class", "text": "agnews/title-body"}
GOALS = {  # of ours against webdataset: with the same decoding; text, where users write that themselves, as they write it
    ("image", SAME_WORK): 0.9,
    ("audio", SAME_WORK): 0.9,
    ("text", ON_LISTS): 2.0,
}
NUM_SHARDS = 8
INDEXED_BYTES = 50_000_000  # the shards of a split are indexed over and over, up to about so much
CONSOLE = Console(width=128)


def rate_of(run: Run, seconds: float) -> float:
    """Examples a second from the first batch on."""
    delivered = run()
    next(delivered)
    start, num_examples = time.perf_counter(), 0.0
    while (taken := time.perf_counter() - start) < seconds:
        num_examples += next(delivered)
    return num_examples / taken


def alternate(contestants: dict[str, Callable[[], float]], rounds: int, what: str) -> dict[str, list[float]]:
    """What each returned in every round, all taking turns; a first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with CONSOLE.status(what) as status:
        for number in range(rounds + 1):
            for name, measure in contestants.items():
                status.update(f"{what}, round {number} of {rounds}: {name}")
                rate = measure()
                if number:
                    rates[name].append(rate)
    CONSOLE.print(f"{what}: measured")
    return rates


def described(rates: list[float], bytes_per_example: float) -> dict[str, float]:
    """Medians, and how far apart the rounds were."""
    median = statistics.median(rates)
    return {"examples/s": median, "MB/s": median * bytes_per_example / 1e6, "spread": (max(rates) - min(rates)) / median}


def ratio(rates: list[float], others: list[float]) -> float:
    """The median of what rounds say, so that a busy moment counts for both."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


def streaming(works: dict[str, Work], rounds: int, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for (modality, work), num_workers in itertools.product(works.items(), (0, 2)):
        measures = {name: lambda run=run: rate_of(run, seconds) for name, run in work.contestants(num_workers).items()}
        rates = alternate(measures, rounds, f"{modality}, {num_workers} workers")
        for name, found in rates.items():
            ours = rates[OURS_DECODED if name in (OURS_DECODED, SAME_DECODED) else OURS]
            row = {"modality": modality, "workers": num_workers, "contestant": name}
            row |= described(found, work.num_bytes / len(work.split)) | {"ours / it": ratio(ours, found)}
            rows.append({**row, "goal": GOALS.get((modality, name))})
    return rows


def indexing(works: dict[str, Work], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rates of `write_index` with one process and with two; the hashing and reading of extents included."""
    rows = []
    for modality, work in works.items():
        times = max(1, round(INDEXED_BYTES / work.num_bytes))

        def rate(num_workers: int, work: Work = work, times: int = times) -> float:
            start = time.perf_counter()
            write_index(
                folder, Store(work.shards[0].parent), [path.name for path in work.shards] * times, num_workers=num_workers
            )
            return len(work.split) * times / (time.perf_counter() - start)

        rates = alternate({str(n): lambda n=n: rate(n) for n in (1, 2)}, rounds, f"indexing {modality}")
        for processes, found in rates.items():
            row = {"modality": modality, "processes": int(processes)}
            row |= described(found, work.num_bytes / len(work.split)) | {"it / one process": ratio(found, rates["1"])}
            rows.append(row)
    return rows


def show(title: str, rows: list[dict[str, Any]], *, downwards: bool = False) -> None:
    """A table with a line for each row, or a column."""
    lines = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    if downwards:
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    CONSOLE.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def prepared(source: str, root: Path) -> dict[str, Work]:
    """The three splits in even shards, with a processor whose tokenizer is trained on the texts."""
    specs = {}
    for modality, task in TASKS.items():
        config = yaml.safe_load((CONF / f"{task.partition('/')[0]}.yaml").read_text())
        specs[modality] = TaskSpec(**config["data"]["tasks"][task])
    prepare(source, str(root / "pack"), sets=[spec.shards.rpartition("/")[0] for spec in specs.values()])
    texts = []
    for spec in specs.values():
        split = Split(root / "pack" / spec.shards)
        examples = [split.read(position) for position in range(len(split))]
        write_split(root / spec.shards, examples, examples_per_shard=-(-len(examples) // NUM_SHARDS))
        items = (item for example in examples for item in (example.query, example.target) if item is not None and item.is_text)
        texts += [str(item.parts[0].data) for item in items]
    (root / "processor").mkdir()
    ComposedProcessor(PROCESSOR, train_tokenizer(texts, PROCESSOR.vocab_size)).save(root / "processor")
    return {modality: Work(root, spec, root / "processor") for modality, spec in specs.items()}


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the data pack's folder, the one that holds tasks.json")
    parser.add_argument("--entries", default=[10**4, 10**6, 10**8], type=numbers, help="examples of simulated splits")
    parser.add_argument(
        "--modalities", default=list(TASKS), type=lambda text: text.split(",") if text else [], help="of streams"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a contestant's turn")
    parser.add_argument("--batch-size", type=int, default=64, help="over the simulated splits")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "webdataset", "numpy")
    }
    figures: dict[str, Any] = {
        "hardware": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }
    CONSOLE.print(figures)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        works = prepared(arguments.source, root)
        chosen = {modality: works[modality] for modality in arguments.modalities}
        figures["padding"] = {modality: work.padding() for modality, work in chosen.items()}
        figures["stream"] = streaming(chosen, arguments.rounds, arguments.seconds)
        figures["indexing"] = indexing(chosen, arguments.rounds, root / "index")
        figures["startup"] = startup.measure(root, root / "processor", arguments.entries, arguments.batch_size, CONSOLE)
    for title in ("stream", "indexing", "startup"):
        if figures[title]:
            show(title, figures[title], downwards=title == "startup")
    CONSOLE.print("share of padding:", figures["padding"])
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
