"""Benchmarks judged: each column of a split is embedded once, and scored at every prefix in every form that is stored.

Letters: Q queries, D embedding width.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from datamodules.collate import with_prompt
from datamodules.processors.processor import Processor
from datamodules.sample import KINDS, TEXT_KINDS, Item, text_item
from datamodules.shards import NoSplitError, Split
from datamodules.store import Store
from datamodules.tasks import BenchmarkSpec, modalities_of
from kernels.contrastive import check_prefixes
from lightning_modules import metrics
from lightning_modules.answer_recall import answer_recall
from lightning_modules.block_encoder import BlockEncoder
from lightning_modules.columns import Column, Distinct, Side, embed_column
from lightning_modules.configuration import CONF
from lightning_modules.encoder.embedder import Embedder, cut, device_named
from lightning_modules.encoder.native import media_of
from lightning_modules.findings import Findings, Judged, Settings
from lightning_modules.neighbours import exact
from lightning_modules.objective.gather import gathered, num_ranks, this_rank
from lightning_modules.precision import Dtype, asked, stored
from lightning_modules.ranking import Relevance, ranks
from lightning_modules.report import Neighbours
from lightning_modules.space import evenly, health_rows
from lightning_modules.statistics import spearman_interval
from lightning_modules.vectors import Chunk

BAR = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
NUM_SHOWN_QUERIES = 4
NUM_SHOWN_NEIGHBOURS = 5
ANSWERS = "answers@5kt"
ANSWER_DOCUMENTS = 100  # that are read for an answer; 5,000 tokens are fewer, of the passages of 100 words that are usual


class Judge:
    """Embeds columns of splits and scores benchmarks from the vectors.

    With several ranks each embeds a share and ranks for a share of the queries; all of them find the same.

    Args:
        encoder: Judged in evaluation mode.
        processor: Its own.
        root: Folder of the shards.
        batch_size: Examples embedded at once.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda` or `auto`.
        store: A folder for vectors, and what the encoder is called in it; None keeps them in memory.
        show_progress: Whether a bar is shown; false beside another one.
    """

    def __init__(
        self,
        encoder: Embedder,
        processor: Processor,
        root: Path | Store,
        *,
        batch_size: int,
        num_workers: int,
        device: str,
        store: tuple[Path, str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.device = device_named(device)
        self.encoder, self.processor, self.root = encoder.to(self.device).eval(), processor, root
        self.batch_size, self.num_workers, self.store = batch_size, num_workers, store
        self._bar = Progress(*BAR, transient=True, disable=not show_progress or this_rank() > 0)
        self._splits: dict[str, Split] = {}
        self._columns: dict[tuple[str, str, str | None], Column] = {}

    def results(
        self,
        benchmarks: Mapping[str, BenchmarkSpec],
        prefixes: Sequence[int] | None = None,
        *,
        dtypes: Sequence[Dtype] = ("float32",),
        without_prompts: bool = False,
        deep: bool = True,
    ) -> Findings:
        """Judge benchmarks.

        Rows of results.json have: benchmark, metric, prefix, dtype, prompts (whether the benchmark's own were used), value,
        low and high (95 % of its metric by bootstrap over queries), chance, num_queries, num_candidates, bytes (of a stored
        vector), group, language; and note where there is no value.

        Args:
            benchmarks: Name to what is measured.
            prefixes: Widths; None means those the encoder was trained with.
            dtypes: Forms in which vectors are stored.
            without_prompts: Judge benchmarks that have prompts once more without, at full width.
            deep: Give intervals, the space's health and neighbours too.

        Raises:
            ValueError: No benchmark, or none whose data are there; a name, prefix or metric that does not fit; a split that
                lacks what is measured.
        """
        if not benchmarks:
            raise ValueError("there is no benchmark to evaluate; add `include: [benchmarks/world]` or give benchmarks")
        widths = list(self.encoder.config.prefixes) if prefixes is None else list(prefixes)
        check_prefixes(tuple(widths), self.encoder.config.embedding_dim)
        missing, findings = self.check(benchmarks), Findings()
        with self._bar:
            ticket = self._bar.add_task("benchmarks", total=len(benchmarks))
            for name, spec in benchmarks.items():
                self._bar.update(ticket, description=name)
                if name in missing:
                    Judged(findings, name, spec, Settings(widths)).without_value(f"no data: {missing[name]}")
                else:
                    self._judge(findings, name, spec, Settings(widths, dtypes, deep=deep))
                if without_prompts and name not in missing and (spec.query_prompt, spec.target_prompt) != (None, None):
                    bare = dataclasses.replace(spec, query_prompt=None, target_prompt=None)
                    self._judge(findings, name, bare, Settings(widths[-1:], prompts=False, deep=False))
                self._bar.advance(ticket)
            self._bar.remove_task(ticket)
        return findings

    def headline(self, benchmarks: Mapping[str, BenchmarkSpec]) -> float:
        """Mean over benchmarks of the metric that stands for each at full width, with the encoder's weights of now."""
        return float(np.mean(list(self.headlines(benchmarks).values())))

    def headlines(self, benchmarks: Mapping[str, BenchmarkSpec]) -> dict[str, float]:
        """The metric that stands for each benchmark at full width, with the encoder's weights of now.

        Raises:
            ValueError: As `results`; or a benchmark has no value.
        """
        self._columns.clear()
        first: dict[str, float] = {}
        for row in self.results(benchmarks, [self.encoder.config.embedding_dim], deep=False).rows:
            if row["value"] is None:
                raise ValueError(f"benchmark {row['benchmark']!r} has no value: {row['note']}")
            first.setdefault(row["benchmark"], row["value"])
        return first

    def check(self, benchmarks: Mapping[str, BenchmarkSpec]) -> dict[str, str]:
        """Which benchmarks have no data, and what to say of it, before anything is embedded.

        Raises:
            ValueError: A name is none, or no benchmark has data.
        """
        missing = {}
        for name, spec in benchmarks.items():
            modalities_of(name)
            try:
                for folder in filter(None, (spec.shards, spec.corpus, spec.train)):
                    self._split(folder)
            except NoSplitError as error:
                files = (file for file in (CONF / "benchmarks").glob("*.yaml") if f"\n  {name}:\n" in file.read_text())
                where = "".join(f"; conf/benchmarks/{file.name} says where its data come from" for file in sorted(files)[:1])
                missing[name] = f"{str(error).rstrip('.')}{where}"
        if len(missing) == len(benchmarks):
            name = next(iter(missing))
            raise ValueError(f"benchmark {name!r}: {missing[name]}")
        return missing

    def _judge(self, findings: Findings, name: str, spec: BenchmarkSpec, settings: Settings) -> None:
        judged = Judged(findings, name, spec, settings)
        own = "target" if spec.reverse else "query"
        if spec.measure in ("classification", "clustering"):
            sides: list[tuple[str, Side]] = [(spec.shards, own)]
        else:
            other = "query" if spec.reverse else "target"
            sides = [(spec.shards, own), (spec.corpus or spec.shards, other)]
        firsts = [self._items(folder, side, [0])[0] for folder, side in sides]
        for number, (item, stated) in enumerate(zip(firsts, modalities_of(name), strict=False)):
            if item.modality != stated:
                which = ("queries", "targets")[number]
                raise ValueError(f"benchmark {name!r} says {stated} for its {which}, but its shards hold {item.modality}")
        taken = {*TEXT_KINDS, *media_of(self.encoder.backbone, self.processor)}
        lacking = [kind for kind in KINDS if kind not in taken and any(p.kind == kind for item in firsts for p in item.parts)]
        if lacking:
            judged.without_value(f"not supported: the encoder takes no {' and no '.join(lacking)}")
        elif spec.measure == "retrieval":
            self._retrieval(judged, spec, *sides)
        elif spec.measure == "similarity":
            self._similarity(judged, spec)
        elif spec.measure == "classification":
            self._classification(judged, spec, own)
        else:
            self._clustering(judged, spec, own)

    def _retrieval(self, judged: Judged, spec: BenchmarkSpec, asked_of: tuple[str, Side], found_in: tuple[str, Side]) -> None:
        prompt_of = {"query": spec.query_prompt, "target": spec.target_prompt}
        columns = [self._column(folder, side, prompt_of[side]) for folder, side in (asked_of, found_in)]
        ids = [column.ids() for column in columns]
        queries, candidates = map(Distinct.of, ids)
        query_QD = torch.from_numpy(columns[0].rows(queries.first))
        num_queries, num_candidates = len(queries.first), len(candidates.first)
        judged.sizes(num_queries, num_candidates, ids[0][queries.first])
        wanted = candidates.mask()
        if spec.metric == ANSWERS:
            for width in judged.settings.widths:
                chunks = _cut(columns[1].chunks(wanted), width)
                found = exact(cut(query_QD, width), chunks, ANSWER_DOCUMENTS, self.device)
                judged.add(width, "float32", {ANSWERS: self._answered(spec, queries, found.positions)}, {ANSWERS: None})
            return
        relevance = self._relevance(spec, queries, candidates)
        by_query = (relevance.query, relevance.gain, num_queries)
        if lost := np.flatnonzero(np.bincount(relevance.query, minlength=num_queries) == 0).tolist():
            key = self._split(spec.shards).key(int(queries.first[lost[0]]))
            raise ValueError(
                f"benchmark {judged.name!r}: {len(lost)} queries have nothing relevant, the first is {key!r}; take them out"
            )
        chance = metrics.retrieval_chance(*by_query, num_candidates)
        sampled = (query_QD[evenly(num_queries)], torch.from_numpy(columns[1].rows(candidates.first[evenly(num_candidates)])))
        for width in judged.settings.widths:
            for dtype in judged.settings.dtypes:
                rank_R = self._ranks(query_QD, columns[1].chunks(wanted), relevance, width, dtype)
                values = metrics.retrieval(rank_R, relevance.query, relevance.gain, num_queries)
                judged.add(width, dtype, values, chance)
            if judged.settings.deep:
                left_QW, right_CW = (cut(side, width) for side in sampled)
                numbers = (num_queries, num_candidates)
                judged.findings.space.extend(health_rows(judged.name, width, left_QW, right_CW, numbers=numbers))
        if judged.settings.deep:
            shown = np.arange(num_queries)[:: max(1, num_queries // NUM_SHOWN_QUERIES)][:NUM_SHOWN_QUERIES]
            full = judged.settings.widths[-1]
            found = exact(cut(query_QD[shown], full), _cut(columns[1].chunks(wanted), full), NUM_SHOWN_NEIGHBOURS, self.device)
            relevant = set(zip(relevance.query.tolist(), relevance.candidate.tolist(), strict=True))
            for query, positions, cosines in zip(shown.tolist(), found.positions.tolist(), found.cosines.tolist(), strict=True):
                marks = [(query, position) in relevant for position in positions]
                near = tuple(zip(self._items(*found_in, positions), cosines, marks, strict=True))
                asking = self._items(*asked_of, [int(queries.first[query])])[0]
                judged.findings.neighbours.append(Neighbours(judged.name, asking, near))

    def _ranks(self, query_QD: Tensor, chunks: Iterable[Chunk], relevance: Relevance, width: int, dtype: Dtype) -> np.ndarray:
        """The ranks of all pairs; each process finds those of its share of the queries."""
        limits = [n * len(query_QD) // num_ranks() for n in range(num_ranks() + 1)]
        places = np.searchsorted(relevance.query, limits)
        first, last = limits[this_rank() : this_rank() + 2]
        query, candidate, gain = (column[places[this_rank()] : places[this_rank() + 1]] for column in relevance)
        own = Relevance(query - first, candidate, gain)
        found = ranks(query_QD[first:last], chunks, own, width=width, depth=metrics.DEPTH, dtype=dtype, device=self.device)
        if num_ranks() == 1:
            return found
        counts = [np.diff(places).tolist()]
        return gathered([torch.from_numpy(found).to(self.encoder.device)], counts)[0].cpu().numpy()

    def _relevance(self, spec: BenchmarkSpec, queries: Distinct, candidates: Distinct) -> Relevance:
        """Which candidates are relevant to which queries, by query; of several grades the highest counts."""
        if spec.corpus is None:
            grades = ((query, place, 1.0) for query, place in zip(queries.place, candidates.place, strict=True))
        else:
            grades = self._judgements(spec, queries, candidates)
        best: dict[tuple[int, int], float] = {}
        for query, place, grade in grades:
            if grade > best.get((query, place), 0.0):
                best[query, place] = grade
        pairs = np.array(sorted(best), np.int64).reshape(-1, 2)
        gain = np.array([best[query, place] for query, place in pairs.tolist()])
        return Relevance(pairs[:, 0], candidates.first[pairs[:, 1]], gain)

    def _judgements(self, spec: BenchmarkSpec, queries: Distinct, candidates: Distinct) -> Iterable[tuple[int, int, float]]:
        assert spec.corpus is not None
        split, corpus = self._split(spec.shards), self._split(spec.corpus)
        row_of = {key: row for row, key in enumerate(corpus.keys)}
        for position, query in enumerate(queries.place.tolist()):
            example = split.read(position)
            for key, grade in (example.relevant or {}).items():
                if key not in row_of:
                    raise ValueError(
                        f"{split.folder}: query {example.key!r} names document {key!r}, which {spec.corpus} does not hold"
                    )
                yield query, int(candidates.place[row_of[key]]), grade

    def _answered(self, spec: BenchmarkSpec, queries: Distinct, positions_QK: np.ndarray) -> np.ndarray:
        """Whether an answer stands in what a query finds (Q,)."""
        split, folder = self._split(spec.shards), spec.corpus or spec.shards
        values = []
        for row, positions in zip(queries.first.tolist(), positions_QK.tolist(), strict=True):
            example = split.read(row)
            answers = (example.meta or {}).get("answers")
            if not answers:
                raise ValueError(f"{split.folder}: query {example.key!r} has no answers in its meta, which {ANSWERS} needs")
            texts = (_text(self._items(folder, "target", [position])[0]) for position in positions)
            values.append(answer_recall(texts, answers))
        return np.array(values)

    def _similarity(self, judged: Judged, spec: BenchmarkSpec) -> None:
        split = self._split(spec.shards)
        scores = [split.read(position).score for position in range(len(split))]
        gold_Q = np.array([score for score in scores if score is not None], float)
        if len(gold_Q) < len(scores):
            raise ValueError(f"benchmark {judged.name!r}: {split.folder} has examples without a score")
        if np.ptp(gold_Q) == 0:
            raise ValueError(f"benchmark {judged.name!r}: all gold scores of {split.folder} are {gold_Q[0]:g}")
        every = np.arange(len(split))
        prompts: dict[Side, str | None] = {"query": spec.query_prompt, "target": spec.target_prompt}
        columns = [self._column(spec.shards, side, prompt) for side, prompt in prompts.items()]
        left_QD, right_QD = (torch.from_numpy(column.rows(every)) for column in columns)
        judged.sizes(len(split), len(split), None)
        for width in judged.settings.widths:
            left_QW, right_QW = cut(left_QD, width), cut(right_QD, width)
            for dtype in judged.settings.dtypes:
                # int8 keeps one side as it is, as a query; bits meet bits
                cosine_Q = (asked(left_QW, dtype) * stored(right_QW, dtype)).sum(-1).double().numpy()
                value = metrics.spearman(cosine_Q, gold_Q)
                interval = spearman_interval(cosine_Q, gold_Q) if value is not None and judged.settings.deep else None
                note = None if value is not None else "all cosines are alike: the embeddings have collapsed"
                judged.row("spearman", width, dtype, value, interval=interval, chance=0.0, note=note)

    def _classification(self, judged: Judged, spec: BenchmarkSpec, side: Side) -> None:
        assert spec.train is not None
        labels, train_labels = self._labels(spec.shards), self._labels(spec.train)
        column, train = (self._column(folder, side, spec.query_prompt) for folder in (spec.shards, spec.train))
        judged_QD, train_ND = (
            torch.from_numpy(found.rows(np.arange(len(own)))) for found, own in ((column, labels), (train, train_labels))
        )
        classes = sorted(set(train_labels) | set(labels))
        number = {label: n for n, label in enumerate(classes)}
        label_CD = self._embed_items([text_item(label.replace("_", " ")) for label in classes], spec.target_prompt)
        chance: dict[str, float | None] = {"accuracy_probe": 1 / len(classes), "accuracy_zero_shot": 1 / len(classes)}
        judged.sizes(len(labels), len(classes), column.ids())
        for width in judged.settings.widths:
            judged_QW, train_NW, label_CW = (cut(vectors, width) for vectors in (judged_QD, train_ND, label_CD))
            for dtype in judged.settings.dtypes:
                if dtype != "binary_rescored":
                    values = metrics.classification(
                        F.normalize(stored(judged_QW, dtype), dim=-1),
                        torch.tensor([number[label] for label in labels]),
                        train_ND=F.normalize(stored(train_NW, dtype), dim=-1),
                        train_class_N=torch.tensor([number[label] for label in train_labels]),
                        label_CD=label_CW,
                    )
                    judged.add(width, dtype, values, chance)

    def _clustering(self, judged: Judged, spec: BenchmarkSpec, side: Side) -> None:
        labels = np.array(self._labels(spec.shards))
        vectors_QD = torch.from_numpy(self._column(spec.shards, side, spec.query_prompt).rows(np.arange(len(labels))))
        judged.sizes(len(labels), len(np.unique(labels)), None)
        for width in judged.settings.widths:
            for dtype in judged.settings.dtypes:
                if dtype != "binary_rescored":
                    value, chance = metrics.clustering(stored(cut(vectors_QD, width), dtype), labels)
                    judged.row("v_measure", width, dtype, value, chance=chance)

    def _labels(self, folder: str) -> list[str]:
        split = self._split(folder)
        labels = [split.read(position).label for position in range(len(split))]
        missing = labels.count(None)
        if missing:
            raise ValueError(f"{split.folder}: {missing} of {len(labels)} examples have no label, which classification needs")
        return [label for label in labels if label is not None]

    def _split(self, folder: str) -> Split:
        if folder not in self._splits:
            self._splits[folder] = Split(self.root / folder)
        return self._splits[folder]

    def _items(self, folder: str, side: Side, rows: list[int]) -> list[Item]:
        items = [getattr(self._split(folder).read(row), side) for row in rows]
        if None in items:
            raise ValueError(
                f"{self.root / folder}: example {self._split(folder).key(rows[items.index(None)])!r} has no {side}"
            )
        return items

    def _column(self, folder: str, side: Side, prompt: str | None) -> Column:
        """Embeddings of a column, made once."""
        if (folder, side, prompt) not in self._columns:
            width = self.encoder.config.embedding_dim
            blocks = BlockEncoder(self.encoder, self.processor, width, self.batch_size, self.num_workers)
            found = embed_column(blocks, self._split(folder), side, prompt, store=self.store, bar=self._bar)
            self._columns[folder, side, prompt] = found
        return self._columns[folder, side, prompt]

    @torch.inference_mode()
    def _embed_items(self, texts: list[Item], prompt: str | None) -> Tensor:
        prompted = [with_prompt(item, prompt or "{text}") for item in texts]
        batches = [prompted[first : first + self.batch_size] for first in range(0, len(prompted), self.batch_size)]
        vectors = torch.cat([self.encoder(self.processor(batch).to(self.device)).cpu() for batch in batches])
        if not vectors.isfinite().all():
            raise ValueError("the encoder gives a label's text a vector that is not finite; use another checkpoint")
        return vectors


def _cut(chunks: Iterable[Chunk], width: int) -> Iterator[Chunk]:
    """Chunks of a prefix."""
    for positions, vectors in chunks:
        yield Chunk(positions, cut(torch.from_numpy(np.array(vectors, np.float32)), width).numpy())


def _text(item: Item) -> str:
    """An item's texts, without its title: what XOR-Retrieve's evaluation looks into."""
    return " ".join(str(part.data) for part in item.parts if part.kind in TEXT_KINDS)
