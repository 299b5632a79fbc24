"""Every benchmark at every prefix: embeddings of a split's columns, judged, written as results.json and report.html.

Letters: Q queries, C candidates, D embedding width.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from datamodules.collate import with_prompt
from datamodules.corpus import Corpus
from datamodules.files import replace_file
from datamodules.processors.processor import Processor
from datamodules.sample import Item, text_item
from datamodules.shards import Split
from datamodules.tasks import BenchmarkSpec, modalities_of
from kernels.contrastive import check_prefixes
from lightning_modules import metrics
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance, trainable
from lightning_modules.encoder.embedder import Embedder, cut, probe
from lightning_modules.report import Neighbours, results_table, write_report

NUM_SHOWN_QUERIES = 4
NUM_SHOWN_NEIGHBOURS = 5


def evaluate(
    checkpoint: str,
    root: str,
    benchmarks: dict[str, BenchmarkSpec],
    out: str,
    *,
    prefixes: list[int] | None = None,
    runs: list[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 1,
    device: str = "auto",
) -> None:
    """Judge an encoder on every benchmark at every prefix; writes results.json and report.html and prints the table.

    Args:
        checkpoint: An encoder's folder.
        root: Folder that the benchmarks' shards lie in.
        benchmarks: Name (`<set>/<query modality>-<target modality>`) to what is measured.
        out: Folder for results.json and report.html.
        prefixes: Widths to judge; None means those the encoder was trained with.
        runs: Folders of training runs whose curves the report shows.
        batch_size: Items embedded at once.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda`, or `auto` for the best there is.
    """
    began = time.perf_counter()
    curves = _curves(runs or [])
    encoder, processor = load_encoder(checkpoint)
    probe(encoder)
    judge = Judge(encoder, processor, Path(root), batch_size=batch_size, num_workers=num_workers, device=device)
    rows, neighbours = judge.results(benchmarks, prefixes)
    replace_file(Path(out) / "results.json", json.dumps(rows, indent=1))
    provenance = read_provenance(checkpoint)
    facts = {
        "checkpoint": checkpoint,
        "stage": str(provenance.get("stage", "")),
        "steps": str(provenance.get("steps", "")),
        "parameters": f"{trainable(encoder):,}",
        "weights (SHA-256)": provenance["sha256"][:16],
        "evaluated in": f"{time.perf_counter() - began:.0f} s",
    }
    write_report(
        Path(out) / "report.html",
        title=f"Polyphony: {checkpoint}",
        rows=rows,
        curves=curves,
        neighbours=neighbours,
        facts={name: value for name, value in facts.items() if value},
    )
    console = Console(width=None if os.isatty(1) else 120)
    console.print(f"results in {Path(out) / 'results.json'}, report in {Path(out) / 'report.html'}")
    console.print(results_table(rows))


class Judge:
    """Embeds each column of a split once and scores benchmarks from the vectors.

    Args:
        encoder: Judged in evaluation mode.
        processor: Its own.
        root: Folder of the shards.
        batch_size: Items embedded at once.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda` or `auto`.
    """

    def __init__(
        self, encoder: Embedder, processor: Processor, root: Path, *, batch_size: int, num_workers: int, device: str
    ) -> None:
        self.device = device_named(device)
        self.encoder, self.processor, self.root = encoder.to(self.device).eval(), processor, root
        self.batch_size, self.num_workers = batch_size, num_workers
        self._splits: dict[str, Split] = {}
        self._columns: dict[tuple[str, str, str | None], Column] = {}

    def results(
        self, benchmarks: dict[str, BenchmarkSpec], prefixes: list[int] | None = None
    ) -> tuple[list[dict[str, Any]], list[Neighbours]]:
        """Rows of results.json, and what the report shows of retrieval.

        Raises:
            ValueError: No benchmark, a name or a prefix that does not fit, a split that is missing or lacks what is measured.
        """
        if not benchmarks:
            raise ValueError("there is no benchmark to evaluate; add `include: [benchmarks/world]` or give benchmarks")
        widths = list(self.encoder.config.prefixes) if prefixes is None else prefixes
        check_prefixes(tuple(widths), self.encoder.config.embedding_dim)
        for name, spec in benchmarks.items():
            modalities_of(name)
            for folder in filter(None, (spec.shards, spec.corpus, spec.train)):
                self._split(folder)
        rows, neighbours = [], []
        with Progress(transient=True) as bar:
            ticket = bar.add_task("evaluate", total=len(benchmarks))
            for name, spec in benchmarks.items():
                bar.update(ticket, description=name)
                measure = {"retrieval": self._retrieval, "similarity": self._similarity, "classification": self._classification}
                judged = measure[spec.measure](name, spec, widths)
                rows += judged.rows
                neighbours += judged.neighbours
                bar.advance(ticket)
        return rows, neighbours

    def headline(self, benchmarks: dict[str, BenchmarkSpec]) -> float:
        """Mean over benchmarks of the first metric at full width, with the encoder's weights of now."""
        self._columns.clear()
        rows, _ = self.results(benchmarks, [self.encoder.config.embedding_dim])
        first = {row["benchmark"]: row["value"] for row in reversed(rows)}
        return sum(first.values()) / len(first)

    def _retrieval(self, name: str, spec: BenchmarkSpec, widths: list[int]) -> "Judged":
        query_column, target_column = ("target", "query") if spec.reverse else ("query", "target")
        prompt_of = {"query": spec.query_prompt, "target": spec.target_prompt}
        queries = self._column(spec.shards, query_column, prompt_of[query_column]).unique()
        self._check_modality(name, 0, self._items(spec.shards, query_column, [0])[0])
        if spec.corpus is None:
            candidates = self._column(spec.shards, target_column, prompt_of[target_column]).unique()
            pairs = zip(queries.place_of_row, candidates.place_of_row, strict=True)
        else:
            candidates = self._column(spec.corpus, "target", spec.target_prompt).unique()
            pairs = self._judgements(spec, queries, candidates)
        self._check_modality(name, 1, self._items(spec.corpus or spec.shards, target_column, [0])[0])
        relevant_QC = torch.zeros(len(queries.vectors), len(candidates.vectors), dtype=torch.bool)
        for query, candidate in pairs:
            relevant_QC[query, candidate] = True
        lost = (~relevant_QC.any(1)).nonzero().flatten().tolist()
        if lost:
            key = self._split(spec.shards).keys[queries.first_row[lost[0]]]
            raise ValueError(
                f"benchmark {name!r}: {len(lost)} queries have nothing relevant, the first is {key!r}; take them out"
            )
        chance = metrics.retrieval_chance(relevant_QC)
        score_QC = torch.empty(0)
        judged = Judged(name, len(queries.vectors), len(candidates.vectors))
        for width in widths:
            score_QC = cut(queries.vectors, width) @ cut(candidates.vectors, width).T
            judged.add(width, metrics.retrieval(score_QC, relevant_QC), chance)
        query_items = lambda rows: self._items(spec.shards, query_column, rows)  # noqa: E731
        target_items = lambda rows: self._items(spec.corpus or spec.shards, target_column, rows)  # noqa: E731
        judged.neighbours = _shown(name, score_QC, relevant_QC, queries, candidates, query_items, target_items)
        return judged

    def _judgements(self, spec: BenchmarkSpec, queries: "Unique", candidates: "Unique") -> Iterable[tuple[int, int]]:
        assert spec.corpus is not None
        split, row_of = self._split(spec.shards), {key: row for row, key in enumerate(self._split(spec.corpus).keys)}
        for position, query in enumerate(queries.place_of_row):
            example = split.read(position)
            for key, grade in (example.relevant or {}).items():
                if key not in row_of:
                    raise ValueError(
                        f"{split.folder}: query {example.key!r} names document {key!r}, which {spec.corpus} does not hold"
                    )
                if grade > 0:
                    yield query, candidates.place_of_row[row_of[key]]

    def _similarity(self, name: str, spec: BenchmarkSpec, widths: list[int]) -> "Judged":
        for side, column in enumerate(("query", "target")):
            self._check_modality(name, side, self._items(spec.shards, column, [0])[0])
        left = self._column(spec.shards, "query", spec.query_prompt).vectors
        right = self._column(spec.shards, "target", spec.target_prompt).vectors
        split = self._split(spec.shards)
        scores = [split.read(position).score for position in range(len(split))]
        if None in scores:
            raise ValueError(f"benchmark {name!r}: {split.folder} has examples without a score")
        judged = Judged(name, len(left), len(right))
        for width in widths:
            values = metrics.similarity(
                (cut(left, width) * cut(right, width)).sum(-1), torch.tensor(scores, dtype=torch.float64)
            )
            judged.add(width, values, {"spearman": 0.0})
        return judged

    def _classification(self, name: str, spec: BenchmarkSpec, widths: list[int]) -> "Judged":
        assert spec.train is not None
        column = "target" if spec.reverse else "query"
        self._check_modality(name, 0, self._items(spec.shards, column, [0])[0])
        judged_vectors = self._column(spec.shards, column, spec.query_prompt).vectors
        train_vectors = self._column(spec.train, column, spec.query_prompt).vectors
        labels, train_labels = self._labels(spec.shards), self._labels(spec.train)
        classes = sorted(set(train_labels) | set(labels))
        number = {label: n for n, label in enumerate(classes)}
        label_vectors = self._embed_items([text_item(label.replace("_", " ")) for label in classes], spec.target_prompt)
        chance: dict[str, float] = {"accuracy_probe": 1 / len(classes), "accuracy_zero_shot": 1 / len(classes)}
        judged = Judged(name, len(judged_vectors), len(classes))
        for width in widths:
            values = metrics.classification(
                cut(judged_vectors, width),
                torch.tensor([number[label] for label in labels]),
                train_ND=cut(train_vectors, width),
                train_class_N=torch.tensor([number[label] for label in train_labels]),
                label_CD=cut(label_vectors, width),
            )
            judged.add(width, values, chance)
        return judged

    def _labels(self, folder: str) -> list[str]:
        split = self._split(folder)
        labels = [split.read(position).label for position in range(len(split))]
        missing = labels.count(None)
        if missing:
            raise ValueError(f"{split.folder}: {missing} of {len(labels)} examples have no label, which classification needs")
        return [label for label in labels if label is not None]

    def _check_modality(self, name: str, side: int, item: Item) -> None:
        stated = modalities_of(name)[side]
        if item.modality != stated:
            raise ValueError(
                f"benchmark {name!r} says {stated} for its {('queries', 'targets')[side]}, but its shards hold {item.modality}"
            )

    def _split(self, folder: str) -> Split:
        if folder not in self._splits:
            self._splits[folder] = Split(self.root / folder)
        return self._splits[folder]

    def _items(self, folder: str, column: str, rows: list[int]) -> list[Item]:
        items = [getattr(self._split(folder).read(row), column) for row in rows]
        if None in items:
            raise ValueError(
                f"{self.root / folder}: example {self._split(folder).keys[rows[items.index(None)]]!r} has no {column}"
            )
        return items

    @torch.inference_mode()
    def _column(self, folder: str, column: str, prompt: str | None) -> "Column":
        """Embeddings of a column, made once."""
        key = (folder, column, prompt)
        if key not in self._columns:
            corpus = Corpus(self._split(folder), {column: prompt}, self.processor, self.batch_size)
            vectors, ids = [], []
            for batch in corpus.loader(self.num_workers):
                vectors.append(self.encoder(batch.inputs.to(self.device)).cpu())
                ids += batch.content_id.tolist()
            self._columns[key] = Column(torch.cat(vectors), ids)
        return self._columns[key]

    @torch.inference_mode()
    def _embed_items(self, texts: list[Item], prompt: str | None) -> Tensor:
        prompted = [with_prompt(item, prompt or "{text}") for item in texts]
        batches = [prompted[first : first + self.batch_size] for first in range(0, len(prompted), self.batch_size)]
        return torch.cat([self.encoder(self.processor(batch).to(self.device)).cpu() for batch in batches])


def device_named(name: str) -> str:
    """A device; for `auto` the best there is."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Column:
    """Embeddings of a split's column (N, D) in its order, and content ids."""

    vectors: Tensor
    ids: list[int]

    def unique(self) -> "Unique":
        """Each content once: equal items are the same query or the same candidate."""
        place: dict[int, int] = {}
        first: list[int] = []
        for row, content in enumerate(self.ids):
            if content not in place:
                place[content] = len(first)
                first.append(row)
        return Unique(self.vectors[first], first, [place[content] for content in self.ids])


@dataclass(frozen=True)
class Unique:
    """Vectors of distinct contents, the row each first stood in, and for every row its place among them."""

    vectors: Tensor
    first_row: list[int]
    place_of_row: list[int]


class Judged:
    """Rows of results.json for one benchmark."""

    def __init__(self, name: str, num_queries: int, num_candidates: int) -> None:
        self.name, self.num_queries, self.num_candidates = name, num_queries, num_candidates
        self.rows: list[dict[str, Any]] = []
        self.neighbours: list[Neighbours] = []

    def add(self, prefix: int, values: dict[str, float], chance: dict[str, float]) -> None:
        for metric, value in values.items():
            self.rows.append(
                {
                    "benchmark": self.name,
                    "metric": metric,
                    "prefix": prefix,
                    "dtype": "float32",
                    "value": value,
                    "chance": chance[metric],
                    "num_queries": self.num_queries,
                    "num_candidates": self.num_candidates,
                }
            )


def _shown(
    name: str,
    score_QC: Tensor,
    relevant_QC: Tensor,
    queries: Unique,
    candidates: Unique,
    query_items: Callable[[list[int]], list[Item]],
    target_items: Callable[[list[int]], list[Item]],
) -> list[Neighbours]:
    """The nearest neighbours of a few queries, evenly taken, at the last prefix judged."""
    step = max(1, len(score_QC) // NUM_SHOWN_QUERIES)
    shown = []
    for query in range(0, len(score_QC), step)[:NUM_SHOWN_QUERIES]:
        best = score_QC[query].topk(min(NUM_SHOWN_NEIGHBOURS, score_QC.shape[1]))
        items = target_items([candidates.first_row[int(c)] for c in best.indices])
        found = tuple(
            (item, float(score), bool(relevant_QC[query, c]))
            for item, score, c in zip(items, best.values, best.indices, strict=True)
        )
        shown.append(Neighbours(name, query_items([queries.first_row[query]])[0], found))
    return shown


def _curves(runs: list[str]) -> dict[str, Path]:
    """The newest metrics.csv of each run."""
    curves = {}
    for run in runs:
        found = sorted(Path(run).glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
        if not found:
            raise ValueError(
                f"no curves in {run}: it has no logs/version_*/metrics.csv; name folders of training runs in `runs`"
            )
        curves[Path(run).name] = found[-1]
    return curves
