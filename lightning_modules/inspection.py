"""What is in the shards of a configuration: counts, lengths, samples, bad examples, duplicates; printed and as inspect.html."""

import os
import time
from pathlib import Path

from rich.console import Console

from datamodules.cache import Cache
from datamodules.curation.survey import Shards, survey_all
from datamodules.store import Store
from datamodules.tasks import BenchmarkSpec, Mixture, TaskSpec
from datamodules.training import CacheConfig
from lightning_modules.inspection_duplicates import duplicates_section, judged_columns
from lightning_modules.inspection_sections import bad_section, lengths_section, samples_section, tasks_section
from lightning_modules.listing import CSS
from lightning_modules.page import write_page


def inspect(
    root: str,
    data: Mixture,
    out: str,
    *,
    benchmarks: dict[str, BenchmarkSpec] | None = None,
    max_examples: int = 1_000_000,
    num_samples: int = 3,
    cache: CacheConfig | None = None,
) -> None:
    """Show what the shards of a configuration hold: prints tables and writes inspect.html.

    Args:
        root: Folder that the shards lie in, local or of a store (s3://, gs://, hf://, https://).
        data: The training tasks; those of rate 0 are left out, as in training.
        out: Folder for inspect.html.
        benchmarks: Name to benchmark; what they judge is looked for in the training splits.
        max_examples: Most examples of a split that are read, evenly spaced; counts and duplicates are of these.
        num_samples: Examples of a task that the page shows, evenly spaced.
        cache: Where shards of a remote store are kept; None is as in training.

    Raises:
        ValueError: There is no task, or none of their splits is there.
    """
    if max_examples < 1 or num_samples < 0:
        raise ValueError(f"max_examples is {max_examples}, num_samples {num_samples}; allowed: at least 1, at least 0")
    began = time.perf_counter()
    tasks = {name: task for name, task in data.tasks.items() if task.rate > 0}
    if not tasks:
        raise ValueError("there is no task of a rate above 0; add `include: [mixture/multimodal]` or give data.tasks")
    benchmarks = benchmarks or {}
    judged = [folder for spec in benchmarks.values() for folder, _ in judged_columns(spec)]
    cache = cache or CacheConfig()
    store = Store(root, cache=Cache(Path(cache.folder).expanduser(), int(cache.max_gigabytes * 1e9)))
    shards = survey_all(store, [*(task.shards for task in tasks.values()), *judged], max_examples)
    _check(tasks, shards, root)
    sections = [
        tasks_section(tasks, shards),
        lengths_section(tasks, shards),
        samples_section(tasks, shards, num_samples),
        bad_section(shards),
        duplicates_section(tasks, benchmarks, shards),
    ]
    facts = _facts(tasks, data, shards, began)
    page = Path(out) / "inspect.html"
    write_page(page, title=f"Polyphony: {root}", facts=facts, sections=[section.page() for section in sections], css=CSS)
    console = Console(width=None if os.isatty(1) else 120)
    for section in sections:
        section.print(console)
    console.print(f"samples and all of this in {page}", highlight=False, markup=False)


def _check(tasks: dict[str, TaskSpec], shards: Shards, root: str) -> None:
    if all(task.shards in shards.problems for task in tasks.values()):
        first = next(iter(tasks.values())).shards
        raise ValueError(
            f"none of the {len(tasks)} tasks has its shards in {root} (the first, {first}: {shards.problems[first]}); "
            "give another root, or write them with conf=prepare or conf=world"
        )


def _facts(tasks: dict[str, TaskSpec], data: Mixture, shards: Shards, began: float) -> dict[str, str]:
    num_there = sum(task.shards in shards.splits for task in tasks.values())
    num_read = sum(found.num_read for found in shards.surveys.values())
    unused = ", ".join(name for name in data.tasks if name not in tasks)
    facts = {
        "tasks": f"{num_there} of {len(tasks)}",
        "splits, with those of benchmarks": f"{len(shards.splits)} of {len(shards.splits) + len(shards.problems)}",
        "examples in them": f"{sum(map(len, shards.splits.values())):,}",
        "read": f"{num_read:,} in {time.perf_counter() - began:.1f} s",
        "left out with rate 0": unused,
    }
    return {name: value for name, value in facts.items() if value}
