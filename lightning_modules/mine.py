"""`conf=mine`: the nearest of a corpus to every query, for hard negatives and for the ranks of seed targets.

Source: Gemini Embedding (arXiv 2503.07891): a model trained without hard negatives finds the nearest neighbours of each query,
which an LLM grades before one of them becomes its hard negative. Here the neighbours are found; the grades are another stage's.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from datamodules.job import Job, array_task, made_from
from datamodules.sample import Example, key_of
from datamodules.shards import Split
from kernels.contrastive import check_prefixes
from lightning_modules.block_encoder import BlockEncoder
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance
from lightning_modules.encoder.embedder import ComputeConfig, device_named, probe
from lightning_modules.encoder.prepacked import prepack
from lightning_modules.neighbours import Index, IndexSettings, Kind, Neighbours, built_once, exact, require_faiss
from lightning_modules.vectors import Chunk, Dtype, Vectors

DIGITS = 6  # of a cosine; fp32 has no more that are sure
WITH_TARGET, FOUND, OWN = "with a target", "target among the candidates", "own text left out"


def mine(
    checkpoint: str,
    queries: str,
    corpus: str,
    out: str,
    *,
    query_prompt: str | None = None,
    target_prompt: str | None = None,
    k: int = 20,
    index: Kind = "exact",
    index_settings: IndexSettings = IndexSettings(),  # noqa: B008 (frozen)
    prefix: int | None = None,
    dtype: Dtype = "float32",
    block_size: int = 1000,
    batch_size: int = 256,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
    num_workers: int = 1,
    device: str = "auto",
    array_index: int | None = None,
    array_size: int | None = None,
) -> None:
    """Write the queries once more, each with the corpus's nearest targets in its `meta`, in place of those mined before.

    `candidates` are `{"position", "key", "cosine"}` in the corpus, best first: of equal contents the first, the query's own
    text left out, the example's own target marked `"is_target": true`. `seed` is `{"cosine"}` of query and target where
    there is a target. The vectors of the corpus stay in `<out>/corpus`.

    The tasks of an array share the work: first the corpus, then, when none of its blocks is missing, the queries. A task that
    meets missing blocks ends; run the array again. Keys of foreign tars are made fit for ours (`key_of`).

    Args:
        checkpoint: An encoder's folder, or one of sentence-transformers.
        queries: Folder of a split whose examples have a query.
        corpus: Folder of a split whose targets are to choose from; may be the same.
        out: Folder for the mined split and the corpus's vectors.
        query_prompt: The template around the text of queries, none for null.
        target_prompt: The one around the text of targets.
        k: Candidates of a query.
        index: `exact` reads the whole corpus for each block of queries; from some 1e6 targets on an index is faster, and finds
            most: `ivfpq` (small), `ivfsq8` (a byte a number), `hnsw` (all of it in memory).
        index_settings: How an index is built and searched.
        prefix: Width of the vectors; null for all of it.
        dtype: Of the corpus's stored vectors.
        block_size: Examples that are done or not, and in memory, at a time.
        batch_size: Examples embedded at once, sorted by length among them.
        compute: How a batch goes through the encoder: memory and time.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda`, or `auto` for the best there is.
        array_index: This task's number from 0; null for that of a Slurm array, or the only task.
        array_size: Number of tasks.

    Raises:
        ValueError: A number or prefix does not fit, the folder holds what was mined otherwise, FAISS is missing for an index,
            or an example has no query, no target in the corpus, or cannot be used.
    """
    if min(k, batch_size) < 1:
        raise ValueError(f"k is {k}, batch_size {batch_size}; both must be at least 1")
    if index != "exact":
        require_faiss()
    console, task = Console(), array_task(array_index, array_size)
    query_split, corpus_split = Split(queries), Split(corpus)
    encoder, processor = load_encoder(checkpoint)
    width = encoder.config.embedding_dim if prefix is None else prefix
    check_prefixes((width,), encoder.config.embedding_dim)
    index_settings.check(index, width)
    made_by: dict[str, Any] = {"stage": "mine", **made_from(queries, query_split)}
    made_by |= {"corpus": corpus, "corpus_digest": corpus_split.digest}
    made_by |= {"checkpoint": read_provenance(checkpoint)["sha256"], "prefix": width, "dtype": dtype}
    made_by |= {"query_prompt": query_prompt, "target_prompt": target_prompt, "k": k, "index": index}
    if index != "exact":
        made_by["index_settings"] = dataclasses.asdict(index_settings)
    job = Job(out, made_by, len(query_split), block_size, task)
    vectors = Vectors(
        Path(out) / "corpus",
        corpus_split,
        "target",
        prompt=target_prompt,
        encoder=made_by["checkpoint"],
        prefix=width,
        dtype=dtype,
        block_size=block_size,
        task=task,
    )
    probe(encoder)
    encoder = encoder.to(device_named(device)).eval()
    encoder.use(compute)
    prepack(encoder)
    blocks = BlockEncoder(encoder, processor, width, batch_size, num_workers)
    for block, ids, made in _embedded(vectors, corpus_split, {"target": target_prompt}, blocks, console):
        vectors.store(block, ids, made)
    if missing := vectors.missing():
        told = f"{len(missing)} of {vectors.num_blocks} blocks of the corpus are missing (of other tasks), the first is "
        console.print(f"{told}{missing[0]}; run the array again for the search when they are there", soft_wrap=True)
        return
    targets = Targets(corpus_split, vectors, encoder.device)
    if index != "exact":
        targets.index(index, index_settings, console)
    prompts = {"query": query_prompt, "target": target_prompt}
    for block, ids, made in _embedded(job, query_split, prompts, blocks, console, may_lack="target"):
        mined, counts = _mined([query_split.read(position) for position in job.positions(block)], ids, made, targets, k)
        job.write(block, mined, counts)
    if manifest := job.finish(console):
        counts = manifest["about"]["counts"]
        told = f"of {counts[WITH_TARGET]:,} targets {counts[FOUND]:,} are among the {k} nearest; "
        console.print(f"{told}{counts[OWN]:,} queries met their own text, which was left out", soft_wrap=True)


def _embedded(
    job: Job,
    split: Split,
    prompts: Mapping[str, str | None],
    encoder: BlockEncoder,
    console: Console,
    *,
    may_lack: str | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """This task's blocks that are not done, with their items' content ids (N,) and vectors (N, D)."""
    own = job.todo()
    embedded = encoder.embedded(split, prompts, [job.positions(block) for block in own], may_lack=may_lack)
    for block, (ids, vectors) in zip(job.blocks(console, own), embedded, strict=True):
        yield block, ids, vectors


class Targets:
    """What there is to choose from: the distinct contents of a corpus, each at its first position.

    Args:
        split: The corpus.
        vectors: All of its targets'.
        device: Where they are compared.
    """

    def __init__(self, split: Split, vectors: Vectors, device: torch.device) -> None:
        self.split, self.vectors, self.device, self.ids = split, vectors, device, vectors.ids()
        self.positions = np.sort(np.unique(self.ids, return_index=True)[1])
        self._is_first = np.zeros(len(self.ids), bool)
        self._is_first[self.positions] = True
        self._index: Index | None = None

    def index(self, kind: Kind, settings: IndexSettings, console: Console) -> None:
        """Search by an index from now on, which lies beside the vectors or is built there."""
        with console.status(f"{kind} of {len(self.positions):,} vectors"):
            file, width = self.vectors.out / f"{kind}.faiss", self.vectors.width
            self._index = built_once(file, kind, self._chunks, self.positions, width, settings, made_by=self.vectors.made_by)

    def nearest(self, query_QD: Tensor, k: int) -> Neighbours:
        """The k nearest of each query, or all."""
        if self._index is not None:
            return self._index.search(query_QD, k, self.vectors.rows)
        return exact(query_QD, self._chunks(), k, self.device)

    def _chunks(self) -> Iterator[Chunk]:
        return self.vectors.chunks(self._is_first)


def _mined(
    examples: Sequence[Example], ids: np.ndarray, vectors: np.ndarray, targets: Targets, k: int
) -> tuple[list[Example], dict[str, int]]:
    """Examples with their candidates, and what was counted.

    Args:
        examples: Each with a query.
        ids: Content ids (N,) of their queries, each followed by the target where there is one.
        vectors: Of the same (N, D).
        targets: What there is to choose from.
        k: Candidates of a query.
    """
    row = np.cumsum([0, *(1 + (example.target is not None) for example in examples)])[:-1]
    found = targets.nearest(torch.from_numpy(vectors[row]), k + 1)  # one of them may be the query's own text
    mined: list[Example] = []
    counts: dict[str, int] = dict.fromkeys((WITH_TARGET, FOUND, OWN), 0)
    for example, n, positions, cosines in zip(examples, row, *found, strict=True):
        near = [(at, cosine) for at, cosine in zip(positions.tolist(), cosines.tolist(), strict=True) if at >= 0]
        others = [(at, cosine) for at, cosine in near if targets.ids[at] != ids[n]]
        counts[OWN] += len(near) - len(others)
        candidates = [
            {"position": at, "key": targets.split.key(at), "cosine": round(cosine, DIGITS)} for at, cosine in others[:k]
        ]
        meta = {name: value for name, value in (example.meta or {}).items() if name != "seed"} | {"candidates": candidates}
        if example.target is not None:
            meta["seed"] = {"cosine": round(float(vectors[n] @ vectors[n + 1]), DIGITS)}
            own = [candidate for candidate in candidates if targets.ids[candidate["position"]] == ids[n + 1]]
            for candidate in own:
                candidate["is_target"] = True
            counts[WITH_TARGET] += 1
            counts[FOUND] += len(own)
        mined.append(dataclasses.replace(example, key=key_of(example.key), meta=meta))
    return mined, counts
