"""`conf=assemble`: records, their ratings and their neighbours become training shards, with a data card.

A task first makes the fingerprints of its blocks (`<out>/fingerprints/000123.npy`); once those of all blocks are there, every
task knows what comes twice anywhere and writes its blocks. Killed at any moment, either goes on. Memory holds a block, and some
hundred bytes a record while what comes twice is found.

Source: Gemini Embedding (arXiv 2503.07891) and Gecko (arXiv 2403.20327), see `datamodules.curation.candidates`.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from datamodules.curation.candidates import Candidate, Selected, Selection, candidates_of, require_corpus, select
from datamodules.curation.card import counted, write_card
from datamodules.curation.near_duplicates import FINGERPRINT, THRESHOLD, fingerprint, near_pairs, overlaps
from datamodules.job import Aside, Job, array_task, made_from
from datamodules.order import generator
from datamodules.sample import BadExampleError, Example, Item, content_id_of_label, key_of, text_item
from datamodules.shards import Split

RECORD = np.dtype([("pair", FINGERPRINT, 2), ("label", "<i8"), ("judged", "?"), ("bad", "?")])
COLUMNS = ("query", "target")


def assemble(
    source: str,
    out: str,
    *,
    corpus: str | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    classes: Literal["label", "text"] | None = None,
    near: float | None = THRESHOLD,
    judged: list[str] | None = None,
    licence: str | None = None,
    block_size: int = 1000,
    array_index: int | None = None,
    array_size: int | None = None,
) -> None:
    """Write training data: each record once, apart from benchmarks, with its positive, hard negatives and provenance.

    Args:
        source: Folder of the split of records, as conf=generate, rate, mine or prepare wrote it.
        out: Folder of the training split; what was begun there with other settings is not gone on with.
        corpus: Folder of the split that candidates were mined from; None leaves targets and negatives as they are.
        selection: How candidates become positives and hard negatives.
        classes: For records with a label: `label` makes it the target, `text` another text of the class; a hard negative is
            another label or a text of another class. None leaves records as they are.
        near: Jaccard similarity from which texts count as the same, 0.7 to 1; None compares whole contents alone.
        judged: Folders of splits, of benchmarks, with none of whose queries and targets a record may share one; labels do not
            count.
        licence: Goes into the card; None takes what the source says.
        block_size: Records of a block: held in memory, written as one shard, shared out to the tasks of an array.
        array_index: Which task this is, from 0; None takes Slurm's, or does all.
        array_size: Of how many.

    Raises:
        ValueError: Records lack what is asked of them, the folder is of another making, or nothing is left.
    """
    console = Console()
    records, passages = Split(source), None if corpus is None else Split(corpus)
    require_corpus(records, passages)
    made_by = {
        "stage": "assemble",
        **made_from(source, records),
        "corpus": corpus,
        "corpus_digest": passages and passages.digest,
        "selection": dataclasses.asdict(selection) | {"rankings": list(selection.rankings)},
        "classes": classes,
        "near": near,
        "judged": {folder: Split(folder).digest for folder in judged or []},
    }
    if licence is not None:
        made_by["licence"] = licence
    job = Job(out, made_by, len(records), block_size, array_task(array_index, array_size))
    benchmarks = _benchmarks(judged or [], console)
    if all(job.is_done(block) for block in range(job.num_blocks)):
        missing = 0
    else:
        missing = _fingerprints(job, records, benchmarks, near, console)
    if missing:
        console.print(f"fingerprints of {missing} of {job.num_blocks} blocks are missing (of other tasks); run the array again")
        return
    todo = [block for block in job.own_blocks if not job.is_done(block)]
    found = _Whole(job, near, classes) if todo else None
    for block in job.blocks(console):
        assert found is not None
        _Block(job, block, records, passages, selection, classes, benchmarks, near, found).write()
    if job.finish(console) is not None:
        write_card(job.out)
        console.print(f"data card in {job.out / 'README.md'}", soft_wrap=True)


def _fingerprints(job: Job, records: Split, benchmarks: np.ndarray, near: float | None, console: Console) -> int:
    """Make those of this task's blocks; how many of all blocks are then missing."""
    own = [block for block in job.own_blocks if not _file(job, block).is_file()]
    for block in track(own, "fingerprints", console=console, transient=True):
        rows = np.zeros(len(job.positions(block)), RECORD)
        items: list[Item | None] = []
        for row, position in enumerate(job.positions(block)):
            try:
                example = records.read(position)
                rows["label"][row] = 0 if example.label is None else content_id_of_label(example.label)
                items += [example.query, example.target if example.label is None else None]
            except BadExampleError:
                rows["bad"][row] = True
                items += [None, None]
        rows["pair"] = fingerprint(items).reshape(-1, 2)
        for column in range(2):
            rows["judged"] |= _overlaps(rows["pair"][:, column], benchmarks, near)
        file = _file(job, block)
        file.parent.mkdir(exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        with beside.open("wb") as opened:
            np.save(opened, rows)
        os.replace(beside, file)
    return sum(not _file(job, block).is_file() for block in range(job.num_blocks))


def _file(job: Job, block: int) -> Path:
    return job.out / "fingerprints" / f"{block:06d}.npy"


def _benchmarks(folders: Sequence[str], console: Console) -> np.ndarray:
    """Fingerprints of all queries and targets of some splits."""
    items = []
    for folder in folders:
        split = Split(folder)
        for position in track(range(len(split)), f"reading {folder}", console=console, transient=True):
            example = split.read(position)
            items += [item for item in (example.query, None if example.label else example.target) if item is not None]
    return fingerprint(items)


def _overlaps(rows: np.ndarray, benchmarks: np.ndarray, near: float | None) -> np.ndarray:
    if near is None:
        return np.isin(rows["content"], benchmarks["content"]) & (rows["content"] != 0)
    return overlaps(rows, benchmarks, threshold=near)


class _Whole:
    """What only all records together tell: what comes twice, and which records are of a class."""

    def __init__(self, job: Job, near: float | None, classes: str | None) -> None:
        rows = np.lib.format.open_memmap(job.out / f".rows.{os.getpid()}", "w+", RECORD, (job.num_records,))
        try:
            for block in range(job.num_blocks):
                piece = np.load(_file(job, block), allow_pickle=False)
                if piece.dtype != RECORD or len(piece) != len(job.positions(block)):
                    raise ValueError(f"{_file(job, block)} is damaged; delete it, and it is made again")
                rows[job.positions(block).start : job.positions(block).stop] = piece
            self.labels, self.bad, self.judged = (np.array(rows[name]) for name in ("label", "bad", "judged"))
            contents = np.stack([rows["pair"]["content"][:, column] for column in range(2)] + [self.labels], 1)
            self.same = _firsts(contents)
            self.near = self.same
            if near is not None:  # of a record without a target, the label decides
                heads = near_pairs(rows["pair"], threshold=near)
                self.near = np.where(contents[heads, 2] == contents[:, 2], heads, np.arange(len(rows)))
        finally:
            (job.out / f".rows.{os.getpid()}").unlink()
        usable = np.flatnonzero(~self.bad & ~self.judged & (self.near == np.arange(len(self.near))) & (self.labels != 0))
        order = usable[np.argsort(self.labels[usable], kind="stable")]
        self.names, first = np.unique(self.labels[order], return_index=True)
        pieces = np.split(order, first[1:]) if classes and len(first) else []
        self.classes = dict(zip(self.names.tolist(), pieces, strict=False))


def _firsts(contents: np.ndarray) -> np.ndarray:
    """Position of the first equal row (N, C) of each."""
    _, first, inverse = np.unique(contents, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block's records on their way to examples."""

    job: Job
    number: int
    records: Split
    corpus: Split | None
    selection: Selection
    classes: str | None
    benchmarks: np.ndarray
    near: float | None
    whole: _Whole

    def write(self) -> None:
        counts, aside, examples = Counter[str](), list[Aside](), list[Example]()
        kept: dict[int, Example] = {}
        for position in self.job.positions(self.number):
            counts["records"] += 1
            cause = self._left_out(position)
            if cause is not None:
                aside.append(Aside(key_of(self.records.key(position)), cause))
                continue
            example = self.records.read(position)
            kept[position] = dataclasses.replace(example, key=key_of(example.key))
        if self.corpus is not None:
            kept = self._selected(kept, counts)
        for position, example in kept.items():
            if self.classes is not None:
                example = self._classified(example, position)
            if example.query is None or (example.target is None and example.label is None):
                aside.append(Aside(example.key, "no query" if example.query is None else "no positive"))
                continue
            meta = {key: value for key, value in (example.meta or {}).items() if key not in ("candidates", "seed")}
            examples.append(dataclasses.replace(example, meta=meta or None))
            counts["hard negatives"] += len(example.negatives)
            counts.update(counted(example))
        counts["examples"] += len(examples)
        self.job.write(self.number, examples, counts, aside)

    def _left_out(self, position: int) -> str | None:
        if self.whole.bad[position]:
            return "damaged record"
        if self.whole.judged[position]:
            return "in a benchmark"
        if self.whole.same[position] != position:
            return "duplicate"
        return "near duplicate" if self.whole.near[position] != position else None

    def _selected(self, kept: dict[int, Example], counts: Counter[str]) -> dict[int, Example]:
        """The examples with the positives and hard negatives that were chosen, apart from benchmarks too."""
        chosen = {at: select(example, candidates_of(example), self.selection) for at, example in kept.items()}
        named = [one for found in chosen.values() for one in (found.positive, *found.negatives) if one is not None]
        items = {int(one["position"]): self._read(one) for one in named}
        judged = dict(zip(items, _overlaps(fingerprint(list(items.values())), self.benchmarks, self.near), strict=True))
        return {at: self._with(example, chosen[at], items, judged, counts) for at, example in kept.items()}

    def _with(
        self, example: Example, chosen: Selected, items: dict[int, Item], judged: dict[int, Any], counts: Counter[str]
    ) -> Example:
        counts.update({f"candidates left out: {cause}": number for cause, number in chosen.left_out.items()})
        provenance: dict[str, Any] = dict((example.meta or {}).get("provenance") or {})
        target = example.target
        if chosen.positive is not None and judged[chosen.positive["position"]]:
            counts["positives left out: in a benchmark"] += 1
        elif chosen.positive is not None:
            counts["positives that are not the seed"] += 1
            target, provenance["target"] = items[chosen.positive["position"]], self._origin(chosen.positive)
        negatives, origins = [], []
        for candidate in chosen.negatives:
            item = items[candidate["position"]]
            if target is not None and item.content_id == target.content_id:
                counts["candidates left out: equal to the positive"] += 1
            elif judged[candidate["position"]]:
                counts["candidates left out: in a benchmark"] += 1
            else:
                negatives.append(item)
                origins.append(self._origin(candidate))
        if origins:
            provenance["negatives"] = origins
        meta = {**(example.meta or {}), "provenance": provenance}
        return dataclasses.replace(example, target=target, negatives=tuple(negatives), meta=meta)

    def _classified(self, example: Example, position: int) -> Example:
        """The example with its label or another text of its class as target, and one of another class as hard negative."""
        if example.label is None:
            raise ValueError(f"record {example.key!r} has no label, which classes={self.classes} needs")
        random = generator(self.selection.seed, f"classes {example.key}")
        others = self.whole.names[self.whole.names != self.whole.labels[position]]
        if not len(others):
            raise ValueError(f"all records have the label {example.label!r}; classes needs at least two")
        other = self.records.read(int(random.choice(self.whole.classes[int(random.choice(others))])))
        own = self.whole.classes[int(self.whole.labels[position])]
        own = own[own != position]
        if self.classes == "label" or not len(own):
            target, negative = (text_item(label.replace("_", " ")) for label in (example.label, str(other.label)))
            origins: list[dict[str, Any]] = [{"by": "label"}, {"by": "label of another class"}]
        else:
            same = self.records.read(int(random.choice(own)))
            assert same.query is not None
            assert other.query is not None
            target, negative = same.query, other.query
            origins = [{"by": "record", "key": same.key}, {"by": "record of another class", "key": other.key}]
        provenance = {**((example.meta or {}).get("provenance") or {}), "target": origins[0], "negatives": origins[1:]}
        meta = {**(example.meta or {}), "provenance": provenance}
        return dataclasses.replace(example, target=target, negatives=(negative,), meta=meta)

    def _read(self, candidate: Candidate) -> Item:
        assert self.corpus is not None
        found = self.corpus.read(int(candidate["position"]))
        if key_of(found.key) != key_of(candidate["key"]) or found.target is None:
            raise ValueError(f"{self.corpus.folder} is not the split that candidate {candidate['key']!r} was mined from")
        return found.target

    def _origin(self, candidate: Candidate) -> dict[str, Any]:
        scores = {name: value for name, value in candidate.items() if name not in ("position", "is_target")}
        mined_by = self.records.manifest["about"].get("made_by", {})
        return {"by": "mine", "corpus": mined_by.get("corpus", str(self.corpus and self.corpus.folder)), **scores}
