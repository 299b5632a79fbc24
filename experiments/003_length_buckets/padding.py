"""How much of a text batch is padding, and what sorting batches by length would do to the negatives.

    python experiments/003_length_buckets/padding.py shards/pack

For each text task of the pack, batches of 64 over two epochs, prompts included, at most 256 tokens of a byte-level BPE of 2,048
entries trained on the tasks' texts. *Whole*: queries and targets padded to the longest of their batch. *Passes*: as we do it,
see `datamodules/processors/passes.py`. *Pool n*: batches made of examples of like length (of query and target together) within
a pool of n batches, padded whole. *Again*: how often two examples that share a batch share one in the next epoch too, over how
often they would by chance; without pools it is 1.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from datamodules.collate import with_prompt
from datamodules.processors.passes import passes_of
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Item
from datamodules.shards import Split
from datamodules.tasks import TaskSpec

BATCH, MAX_TOKENS, PASS_COST, POOLS = 64, 256, 64, (10, 50)


def text_tasks(root: Path) -> dict[str, tuple[TaskSpec, Split]]:
    """The tasks of conf/tasks whose queries and targets are text."""
    found = {}
    for file in sorted((Path(__file__).parents[2] / "conf" / "tasks").glob("*.yaml")):
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
        for name, values in config["data"]["tasks"].items():
            spec = TaskSpec(**values)
            if not (root / spec.shards).exists():
                continue
            split = Split(root / spec.shards)
            example = split.read(0)
            if all(item is not None and item.is_text for item in (example.query, example.target)):
                found[name] = (spec, split)
    return found


def texts_of(spec: TaskSpec, split: Split) -> list[list[str]]:
    """Texts of the queries and of the targets, in their prompts."""
    examples = [split.read(position) for position in range(len(split))]
    columns = []
    for column, prompt in (("query", spec.query_prompt), ("target", spec.target_prompt)):
        items = [with_prompt(item, prompt) for example in examples if isinstance(item := getattr(example, column), Item)]
        columns.append(["\n".join(str(part.data) for part in item.parts) for item in items])
    return columns


def epoch(lengths: np.ndarray, pool: int, seed: int) -> np.ndarray:
    """Batches of an epoch (batches, 64); those of a pool lie by length."""
    order = np.random.default_rng(seed).permutation(len(lengths))[: len(lengths) // BATCH * BATCH]
    if pool:
        pools = [order[first : first + pool * BATCH] for first in range(0, len(order), pool * BATCH)]
        order = np.concatenate([part[np.argsort(lengths[part].sum(1), kind="stable")] for part in pools])
    return order.reshape(-1, BATCH)


def padding_of(lengths: np.ndarray, batches: np.ndarray, *, in_passes: bool) -> tuple[float, float]:
    """Share of padding, and passes a column of a batch."""
    tokens = places = num_passes = 0
    for column in lengths[batches].transpose(0, 2, 1).reshape(-1, BATCH):
        passes = passes_of(column, PASS_COST) if in_passes else [np.arange(BATCH)]
        tokens, num_passes = tokens + column.sum(), num_passes + len(passes)
        places += sum(column[rows].max() * len(rows) for rows in passes)
    return 1 - tokens / places, num_passes / (2 * len(batches))


def again(first: np.ndarray, second: np.ndarray, num_examples: int) -> float:
    """How often pairs of the first epoch's batches are pairs in the second's, over chance."""
    batch_of = np.full(num_examples, -1)
    batch_of[first.ravel()] = np.repeat(np.arange(len(first)), BATCH)
    met = pairs = 0
    for before in (batch_of[batch] for batch in second):
        counts = np.unique(before[before >= 0], return_counts=True)[1]
        met, pairs = met + (counts * (counts - 1)).sum(), pairs + counts.sum() * (counts.sum() - 1)
    return met / pairs / ((BATCH - 1) / (num_examples - 1))


def main(root: Path) -> None:
    tasks = {name: texts_of(*task) for name, task in text_tasks(root).items()}
    sample = [text for columns in tasks.values() for column in columns for text in column[:: max(1, len(column) // 1000)]]
    tokenizer = train_tokenizer(sample, 2048)
    head = [
        "task",
        "examples",
        "whole",
        "passes",
        "number",
        *(f"{what} {pool}" for pool in POOLS for what in ("pool", "again")),
    ]
    table, total = Table(*head), np.zeros(5)
    for name, columns in tasks.items():
        ids = [tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] for texts in columns]
        lengths = np.array([[min(len(row), MAX_TOKENS) + 1 for row in column] for column in ids]).T
        batches = epoch(lengths, 0, 0)
        whole, (ours, number) = padding_of(lengths, batches, in_passes=False)[0], padding_of(lengths, batches, in_passes=True)
        pooled = [padding_of(lengths, epoch(lengths, pool, 0), in_passes=False)[0] for pool in POOLS]
        met = [again(epoch(lengths, pool, 0), epoch(lengths, pool, 1), len(lengths)) for pool in POOLS]
        rest = [text for pair in zip(pooled, met, strict=True) for text in (f"{pair[0]:.1%}", f"{pair[1]:.1f}")]
        table.add_row(name, f"{len(lengths):,}", f"{whole:.1%}", f"{ours:.1%}", f"{number:.1f}", *rest)
        total += lengths.sum() / np.array([1.0, 1 - whole, 1 - ours, *(1 - share for share in pooled)])
    table.add_section()
    shares = [f"{1 - total[0] / places:.1%}" for places in total[1:]]
    table.add_row("all, by tokens", "", shares[0], shares[1], "", shares[2], "", shares[3], "")
    Console(width=140).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
