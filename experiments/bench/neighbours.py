"""Exact search against FAISS's indexes as `conf=mine` uses them: time to build, time of a query, recall, size.

    python experiments/bench/neighbours.py [--vectors 100000] [--width 256] [--queries 200] [--threads 2] [--out FILE]

Vectors lie around 1,000 centres, with noise of 1.5 times a centre's length over all dimensions; queries are drawn as they are,
and none is one of them. They are on disk, read in blocks of 1,000 as mining stores them, and in the page cache. Recall is
against exact search; candidates are compared again with the vectors on disk, which is in the time of a query.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from stream import CONSOLE, show  # puts the project on the path too

from lightning_modules.neighbours import Index, IndexSettings, Kind, exact
from lightning_modules.vectors import Chunk

BLOCK = 1000
KINDS: tuple[Kind, ...] = ("ivfpq", "ivfsq8", "hnsw")
K = 10


def drawn(number: int, centre_CD: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Unit vectors around the centres (number, D)."""
    width = centre_CD.shape[1]
    noise = 1.5 * torch.randn(number, width, generator=random) / width**0.5
    return F.normalize(centre_CD[torch.randint(len(centre_CD), (number,), generator=random)] + noise, dim=-1)


def seconds(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def rows_of(folder: Path, number: int, queries: torch.Tensor) -> Iterator[dict[str, Any]]:
    """A line of the table for exact search and for each index."""
    vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)

    def chunks() -> Iterator[Chunk]:
        for first in range(0, number, BLOCK):
            yield Chunk(np.arange(first, min(number, first + BLOCK)), vectors[first : first + BLOCK])

    def indexed(kind: Kind) -> dict[str, Any]:
        index, built = seconds(lambda: Index.build(kind, chunks, np.arange(number), queries.shape[1], IndexSettings()))
        index.save(folder / kind, kind)
        found, taken = seconds(lambda: index.search(queries, K, lambda positions: vectors[positions]))
        recall = (found.positions[:, :, None] == truth.positions[:, None]).any(2).mean()
        return line(kind, built, taken, recall, folder / kind)

    def line(name: str, built: float, taken: float, recall: float, file: Path) -> dict[str, Any]:
        times = {"build, s": built, "ms a query": 1e3 * taken / len(queries)}
        return {"index": name, **times, f"recall@{K}": float(recall), "MB": file.stat().st_size / 1e6}

    exact(queries[:2], chunks(), K)
    truth, taken = seconds(lambda: exact(queries, chunks(), K))
    yield line("exact", 0.0, taken, 1.0, folder / "vectors.npy")
    for kind in KINDS:
        with CONSOLE.status(kind):
            row = indexed(kind)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(1000, arguments.width, generator=random), dim=-1)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "vectors.npy", drawn(arguments.vectors, centres, random).numpy())
        rows = list(rows_of(Path(folder), arguments.vectors, drawn(arguments.queries, centres, random)))
    show(f"{arguments.vectors:,} vectors of {arguments.width} dimensions, {arguments.threads} threads", rows)
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, **vars(arguments), "rows": rows}, default=str) + "\n")


if __name__ == "__main__":
    main()
