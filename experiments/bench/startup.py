"""What grows with the number of examples: opening a split, the first ids, ids far ahead, memory. Run by `stream.py`.

A simulated split has whole tables, of 92 bytes an example, and empty tars of the right size that are never read. Each
measurement is taken in a new process. Peaks count pages of the tables that happen to be mapped, which the kernel shares between
processes and takes back when it needs them; `own` memory does not.
"""

import dataclasses
import gc
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from cProfile import Profile
from pathlib import Path
from pstats import Stats
from typing import Any

import numpy as np
from rich.console import Console
from torch.utils.data import IterableDataset

from datamodules.files import sha256_of
from datamodules.index import FORMAT, MEMBER, TABLES, example_dtype
from datamodules.loader import loader_of
from datamodules.plan import Plan
from datamodules.processors.loading import load_processor
from datamodules.tasks import TaskSpec
from datamodules.training import TrainingData

EXAMPLES_PER_SHARD, MEMBER_BYTES, KEY_BYTES = 10_000, 2048, 12
ORDERS = {"global": None, "windowed": 16}  # shards in a window
FAR_STEP, WALKED_STEPS = 10**6, 2000
PARTS = {"hash_seconds": "_check_tables", "shards_seconds": "_check_shards", "manifest_seconds": "_read_manifest"}


def measure(root: Path, processor: Path, entries: list[int], batch_size: int, console: Console) -> list[dict[str, Any]]:
    """A row for each number of examples and each order."""
    rows = []
    for num_examples in entries:
        needed, free = 1.1 * num_examples * _bytes_per_example(), shutil.disk_usage(root).free
        if needed > free:
            console.print(f"{num_examples:,} examples need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: left out")
            continue
        with console.status(f"writing tables of {num_examples:,} examples"):
            write_simulated(root / "simulated", num_examples)
        for order, window in ORDERS.items():
            with (
                console.status(f"start of {num_examples:,} examples, {order} order"),
                ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
            ):
                found = pool.submit(probe, root, processor, window, batch_size).result()
            console.print(f"start of {num_examples:,} examples, {order} order: measured")
            rows.append({"examples": num_examples, "order": order, **found})
        shutil.rmtree(root / "simulated")
    return rows


def write_simulated(folder: Path, num_examples: int) -> None:
    """A split of pairs of text and image with texts of random length; keys and places of files are left zero."""
    folder.mkdir()
    random, step = np.random.default_rng(0), 2**20
    shapes = (example_dtype(KEY_BYTES), num_examples), (MEMBER, 2 * num_examples)
    examples, members = (
        np.lib.format.open_memmap(folder / name, "w+", dtype, (length,))
        for name, (dtype, length) in zip(TABLES, shapes, strict=True)
    )
    for first in range(0, num_examples, step):
        rows = examples[first : first + step]
        rows["end"] = 2 * np.arange(first + 1, first + len(rows) + 1)
        rows["query"]["text"] = random.integers(20, 800, len(rows))
        rows["target"]["pictures"] = 1
        members[2 * first : 2 * (first + step)]["size"] = MEMBER_BYTES
    examples.flush()
    members.flush()
    sizes = [min(EXAMPLES_PER_SHARD, num_examples - first) for first in range(0, num_examples, EXAMPLES_PER_SHARD)]
    shards = []
    for number, size in enumerate(sizes):
        name, num_bytes = f"{number:06d}.tar", size * 2 * (512 + MEMBER_BYTES)
        with (folder / name).open("wb") as file:
            file.truncate(num_bytes)
        shards.append({"name": name, "num_examples": size, "bytes": num_bytes, "sha256": f"{number:064x}"})
    tables = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in TABLES}
    manifest = {"format": FORMAT, "num_examples": num_examples, "fields": ["json", "target.0.jpg"], "tables": tables}
    manifest |= {"shards": shards, "about": {}, "columns": None, "shards_at": None}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def probe(root: Path, processor: Path, window: int | None, batch_size: int) -> dict[str, float]:
    """Seconds and MiB of a run's start on this process, which must be new, and of a worker forked from it."""
    load_processor(processor)  # what it imports is not counted
    gc.collect()
    before, profile = Memory.now(reset=True), Profile()
    task = TaskSpec("simulated", batch_size=batch_size)
    start = time.perf_counter()
    profile.enable()
    data = TrainingData(str(root), {"task": task}, init_from=str(processor), window_shards=window)
    profile.disable()
    opened = time.perf_counter() - start
    data.setup("fit")
    seconds = {}
    for name, step in (("first_ids_seconds", 0), ("far_ids_seconds", FAR_STEP)):
        start = time.perf_counter()
        data.plan.positions(step)
        seconds[name] = time.perf_counter() - start
    memory = Memory.now() - before
    called: Any = Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    parts = {name: sum(value[3] for key, value in called.items() if key[2] == part) for name, part in PARTS.items()}
    worker = next(iter(loader_of(Walk(data.plan), num_workers=1)))
    return {"open_seconds": opened, **parts, **seconds, "peak_mib": memory.peak, "own_mib": memory.own, **worker}


@dataclasses.dataclass
class Memory:
    """Of this process in MiB: the most it held, and what it holds that is no file's."""

    peak: float
    own: float

    @classmethod
    def now(cls, *, reset: bool = False) -> "Memory":
        """As Linux counts it; `reset` lets the peak begin here."""
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "RssAnon:")}
        return cls(kib["VmHWM:"] / 1024, kib["RssAnon:"] / 1024)

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.peak - other.peak, self.own - other.own)


class Walk(IterableDataset[dict[str, float]]):
    """Goes through the ids of some steps, then says what that took."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[dict[str, float]]:
        before, start = Memory.now(reset=True), time.perf_counter()
        for step in range(FAR_STEP, FAR_STEP + WALKED_STEPS):
            self.plan.positions(step)
        taken, memory = time.perf_counter() - start, Memory.now() - before
        yield {"step_ms": 1000 * taken / WALKED_STEPS, "worker_peak_mib": memory.peak, "worker_own_mib": memory.own}


def _bytes_per_example() -> int:
    return example_dtype(KEY_BYTES).itemsize + 2 * MEMBER.itemsize
