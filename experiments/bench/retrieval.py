"""Judging retrieval in a large corpus: time and memory of the ranks of the relevant, exact, with candidates read from disk.

    python experiments/bench/retrieval.py [--candidates 10000,100000,1000000] [--queries 1000] [--width 768] [--out FILE]

Vectors are drawn at random, stored as `conf=evaluate` stores them (fp32, blocks of 1,000), and read once for each prefix and
stored form; each query has one relevant candidate. Every row is measured in a process of its own. Memory is what it held at
most, mapped files and imports apart. `whole` is the plain way for
comparison, a matrix of all scores, sorted, with all candidates in memory.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factory import measured
from stream import CONSOLE, numbers, show  # puts the project on the path too

from lightning_modules.columns import BLOCK
from lightning_modules.precision import BITS, Dtype
from lightning_modules.ranking import Relevance, ranks
from lightning_modules.vectors import Chunk

DEPTH = 10
NOISE = 6.0  # its length beside that of the vector a query is made of


def store(folder: Path, number: int, width: int) -> None:
    """Write random unit vectors in blocks; by numpy, as a process whose torch has threads cannot be forked."""
    random = np.random.default_rng(0)
    for block in range(-(-number // BLOCK)):
        rows = min(BLOCK, number - block * BLOCK)
        np.save(folder / f"{block:06d}.npy", units(random.standard_normal((rows, width), np.float32)))


def units(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt((vectors * vectors).sum(1, keepdims=True))


def chunks(folder: Path) -> Iterator[Chunk]:
    first = 0
    for file in sorted(folder.glob("*.npy")):
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        yield Chunk(np.arange(first, first + len(vectors)), vectors)
        first += len(vectors)


def whole(folder: Path, queries: torch.Tensor, relevance: Relevance) -> np.ndarray:
    """Ranks by a matrix of all scores."""
    candidates = torch.from_numpy(np.concatenate([chunk.vectors for chunk in chunks(folder)]))
    score_QC = queries @ candidates.T
    own_Q1 = score_QC[torch.from_numpy(relevance.query), torch.from_numpy(relevance.candidate), None]
    return (score_QC > own_Q1).sum(1).numpy() + 1


def rows_of(folder: Path, number: int, num_queries: int, width: int, prefix: int) -> Iterator[dict[str, Any]]:
    """A row for each stored form at full width, one for a prefix, one for the plain way."""
    with CONSOLE.status(f"{number:,} vectors"):
        store(folder, number, width)
    random = np.random.default_rng(1)
    relevant = random.integers(number, size=num_queries)
    near = np.stack([np.load(folder / f"{r // BLOCK:06d}.npy", mmap_mode="r")[r % BLOCK] for r in relevant])
    noise = random.standard_normal(near.shape, np.float32) * (NOISE / width**0.5)
    queries = torch.from_numpy(units(near + noise))
    relevance = Relevance(np.arange(num_queries), relevant, np.ones(num_queries))

    def ranked(width: int, dtype: Dtype) -> Callable[[], object]:
        return lambda: ranks(queries, chunks(folder), relevance, width=width, depth=DEPTH, dtype=dtype)

    works: dict[tuple[int, str], Callable[[], object]] = {(width, dtype): ranked(width, dtype) for dtype in BITS}
    works[prefix, "float32"] = ranked(prefix, "float32")
    works[width, "whole"] = lambda: whole(folder, queries, relevance)
    _, imports = measured(lambda: time.sleep(0.5))
    for (own_width, form), work in works.items():
        seconds, peak = measured(work)
        row = {"candidates": number, "width": own_width, "form": form, "seconds": seconds, "MiB": peak - imports}
        CONSOLE.print(row)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="10000,100000,1000000", help="how many")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--prefix", type=int, default=128, help="a shorter prefix, ranked too")
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    wanted = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number in numbers(wanted.candidates):
        with tempfile.TemporaryDirectory(prefix="retrieval-") as folder:
            rows += rows_of(Path(folder), number, wanted.queries, wanted.width, wanted.prefix)
    show(f"ranks of {wanted.queries:,} queries' relevant candidates, {torch.get_num_threads()} threads", rows)
    if wanted.out:
        wanted.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
