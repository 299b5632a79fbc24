"""`conf=assemble`: records, their ratings and their neighbours become training shards, with a data card.

A task first makes the fingerprints of its blocks (`<out>/fingerprints/000123.npy`); once those of all blocks are there, every
task knows what comes twice anywhere and writes its blocks. Killed at any moment, either goes on. Memory holds a block, and some
hundred bytes a record while what comes twice is found.

Source: Gemini Embedding (arXiv 2503.07891) and Gecko (arXiv 2403.20327), see `datamodules.curation.candidates`.
"""

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from datamodules.curation.candidates import Candidate, Selected, Selection, candidates_of, require_corpus, select
from datamodules.curation.card import counted, write_card
from datamodules.curation.card import made_by as chain
from datamodules.curation.near_duplicates import FINGERPRINT, THRESHOLD, fingerprint, near_pairs, overlaps
from datamodules.job import Aside, Job, array_task, made_from
from datamodules.order import generator
from datamodules.sample import BadExampleError, Example, Item, content_id_of_label, key_of, text_item
from datamodules.shards import Split

RECORD = np.dtype([("pair", FINGERPRINT, 2), ("label", "<i8"), ("judged", "?"), ("bad", "?"), ("asks", "?")])
MAX_DRAWS = 20  # of a class's texts, until one is met that is not the record's own: our choice
READ_AT_ONCE = 1000  # items that are held while fingerprints are made: our choice


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
    is_done = all(job.is_done(block) for block in range(job.num_blocks))
    benchmarks = _benchmarks([] if is_done else judged or [], console)
    missing = 0 if is_done else _fingerprints(job, records, benchmarks, near, console)
    if missing:
        console.print(f"fingerprints of {missing} of {job.num_blocks} blocks are missing (of other tasks); run the array again")
        return
    todo = job.todo()
    found, made_by_all = (_Whole(job, near, classes), chain(records)) if todo else (None, [])
    for block in job.blocks(console, todo):
        assert found is not None
        _Block(job, block, records, passages, selection, classes, benchmarks, near, found, made_by_all).write()
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
                rows["asks"][row] = example.query is not None
                items += [example.query, _passage(example)]
            except BadExampleError:
                rows["bad"][row] = True
                items += [None, None]
        found = fingerprint(items)
        rows["judged"] = _overlaps(found, benchmarks, near).reshape(-1, 2).any(1)
        named = [n for n, item in enumerate(items) if n % 2 and item is None]  # a record without a passage is told by its label
        found[named] = fingerprint([text_item(f"label {rows['label'][n // 2]}") for n in named])
        rows["pair"] = found.reshape(-1, 2)
        file = _file(job, block)
        file.parent.mkdir(exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            with beside.open("wb") as opened:
                np.save(opened, rows)
            os.replace(beside, file)
        except OSError as error:
            raise OSError(error.errno, f"could not write {file}: {error.strerror or error}") from error
        finally:
            beside.unlink(missing_ok=True)
    return sum(not _file(job, block).is_file() for block in range(job.num_blocks))


def _file(job: Job, block: int) -> Path:
    return job.out / "fingerprints" / f"{block:06d}.npy"


def _passage(example: Example) -> Item | None:
    """An example's target, unless it only says the label."""
    if example.target is None or example.label is None:
        return example.target
    return None if example.target.content_id == text_item(example.label.replace("_", " ")).content_id else example.target


def _benchmarks(folders: Sequence[str], console: Console) -> np.ndarray:
    """Fingerprints of all queries and targets of some splits."""
    rows = [np.zeros(0, FINGERPRINT)]
    for folder in folders:
        split = Split(folder)
        for first in track(range(0, len(split), READ_AT_ONCE), f"reading {folder}", console=console, transient=True):
            some = (split.read(position) for position in range(first, min(len(split), first + READ_AT_ONCE)))
            items = [item for example in some for item in (example.query, _passage(example)) if item is not None]
            rows.append(fingerprint(items))
    return np.concatenate(rows)


def _overlaps(rows: np.ndarray, benchmarks: np.ndarray, near: float | None) -> np.ndarray:
    if near is None:
        return np.isin(rows["content"], benchmarks["content"]) & (rows["content"] != 0)
    return overlaps(rows, benchmarks, threshold=near)


class _Whole:
    """What only all records together tell: what comes twice, and which records are of a class."""

    def __init__(self, job: Job, near: float | None, classes: str | None) -> None:
        with tempfile.TemporaryFile(dir=job.out) as file:  # without a name: it goes with the process
            for block in range(job.num_blocks):
                piece = np.load(_file(job, block), allow_pickle=False)
                if piece.dtype != RECORD or len(piece) != len(job.positions(block)):
                    raise ValueError(f"{_file(job, block)} is damaged; delete it, and it is made again")
                file.write(piece.tobytes())
            file.flush()
            rows = np.memmap(file, RECORD, "r", shape=(job.num_records,))
            self.labels, self.bad, self.judged = (np.array(rows[name]) for name in ("label", "bad", "judged"))
            self.contents = np.array(rows["pair"]["content"])
            self.same = _firsts(np.column_stack([self.contents, self.labels]))
            self.near = self.same if near is None else near_pairs(rows["pair"], threshold=near)
            is_usable = rows["asks"] & ~self.bad & ~self.judged & (self.near == np.arange(len(rows))) & (self.labels != 0)
            usable = np.flatnonzero(is_usable)
        self._by_query = np.argsort(self.contents[:, 0], kind="stable")
        self._queries = self.contents[self._by_query, 0]
        order = usable[np.argsort(self.labels[usable], kind="stable")]
        self.names, first = np.unique(self.labels[order], return_index=True)
        pieces = np.split(order, first[1:]) if classes and len(first) else []
        self.classes = dict(zip(self.names.tolist(), pieces, strict=False))

    def targets_of(self, position: int) -> set[int]:
        """Contents of the targets of all records with the same query."""
        query = self.contents[position, 0]
        first, end = (int(np.searchsorted(self._queries, query, side)) for side in ("left", "right"))
        return set(self.contents[self._by_query[first:end], 1].tolist())


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
    made_by: list[dict[str, Any]]

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
        """The examples with the positives and hard negatives that were chosen.

        Left out before that are candidates of a benchmark, and those that are known to be relevant: other records' targets of
        the same query, and what `relevant` grades above 0.
        """
        candidates = {at: candidates_of(example) for at, example in kept.items()}
        places = sorted({one["position"] for found in candidates.values() for one in found if one["position"] is not None})
        some = [places[first : first + READ_AT_ONCE] for first in range(0, len(places), READ_AT_ONCE)]
        rows = np.concatenate([np.zeros(0, FINGERPRINT), *(fingerprint([*map(self._read, own)]) for own in some)])
        row_of, judged = {place: n for n, place in enumerate(places)}, _overlaps(rows, self.benchmarks, self.near)
        chosen = {}
        for at, example in kept.items():
            known, allowed = self.whole.targets_of(at) - {int(self.whole.contents[at, 1])}, []
            for one in candidates[at]:
                row = row_of.get(one["position"])
                content = example.target.content_id if row is None and example.target else int(rows["content"][row or 0])
                if row is not None and judged[row] and not one.get("is_target"):
                    counts["candidates left out: in a benchmark"] += 1
                elif not one.get("is_target") and (content in known or (example.relevant or {}).get(one["key"], 0) > 0):
                    counts["candidates left out: known to be relevant"] += 1
                else:
                    allowed.append({**one, "content": content})
            found = select(example, allowed, self.selection)
            counts.update({f"candidates left out: {cause}": number for cause, number in found.left_out.items()})
            positive = None if found.positive is None else rows[row_of[found.positive["position"]]]
            chosen[at] = self._with(
                example, found, rows[[row_of[one["position"]] for one in found.negatives]], positive, counts
            )
        return chosen

    def _with(self, example: Example, chosen: Selected, rows: np.ndarray, positive: Any, counts: Counter[str]) -> Example:
        """The example with what was chosen; its own negatives stay behind the mined ones."""
        provenance: dict[str, Any] = dict((example.meta or {}).get("provenance") or {})
        target = example.target
        if chosen.positive is not None:
            counts["positives that are not the seed"] += 1
            target, provenance["target"] = self._named(chosen.positive), self._origin(chosen.positive)
        near = _overlaps(rows, fingerprint([target]) if positive is None else positive[None], self.near)
        if near.any():
            counts["candidates left out: near the positive"] += int(near.sum())
        mined = [one for one, is_near in zip(chosen.negatives, near, strict=True) if not is_near]
        negatives = (*map(self._named, mined), *example.negatives)
        own = provenance.get("negatives", [])
        own = own if isinstance(own, list) else [own] * len(example.negatives)
        if negatives:
            provenance["negatives"] = [*map(self._origin, mined), *own]
        meta = {**(example.meta or {}), "provenance": provenance}
        return dataclasses.replace(example, target=target, negatives=negatives, meta=meta)

    def _classified(self, example: Example, position: int) -> Example:
        """The example with its label or another text of its class as target, and one of another class as hard negative."""
        if example.label is None:
            raise ValueError(f"record {example.key!r} has no label, which classes={self.classes} needs")
        random = generator(self.selection.seed, f"classes {example.key}")
        others = self.whole.names[self.whole.names != self.whole.labels[position]]
        if not len(others):
            raise ValueError(f"all records have the label {example.label!r}; classes needs at least two")
        taken = {None if example.query is None else example.query.content_id}
        same = self._drawn(random, [int(self.whole.labels[position])], taken) if self.classes == "text" else None
        taken.add(None if same is None or same.query is None else same.query.content_id)
        other = self._drawn(random, others, taken)
        if other is None:
            raise ValueError(f"every text of the classes beside {example.label!r} is one of its own too; classes needs others")
        if same is None:
            target, negative = (text_item(str(label).replace("_", " ")) for label in (example.label, other.label))
            origins: list[dict[str, Any]] = [{"by": "label"}, {"by": "label of another class"}]
        else:
            assert same.query is not None
            assert other.query is not None
            target, negative = same.query, other.query
            origins = [{"by": "record", "key": same.key}, {"by": "record of another class", "key": other.key}]
        provenance = {**((example.meta or {}).get("provenance") or {}), "target": origins[0], "negatives": origins[1:]}
        meta = {**(example.meta or {}), "provenance": provenance}
        return dataclasses.replace(example, target=target, negatives=(negative,), meta=meta)

    def _drawn(self, random: np.random.Generator, classes: Any, taken: set[int | None]) -> Example | None:
        """A record of one of some classes whose text is not taken; None if none of several is met."""
        for _ in range(MAX_DRAWS):
            members = self.whole.classes.get(int(random.choice(classes)))
            if members is None:
                continue
            drawn = self.records.read(int(random.choice(members)))
            if drawn.query is not None and drawn.query.content_id not in taken:
                return drawn
        return None

    def _named(self, candidate: Candidate) -> Item:
        found = self._read(candidate["position"], candidate["key"])
        assert found is not None
        return found

    def _read(self, position: int, key: str | None = None) -> Item | None:
        assert self.corpus is not None
        found = self.corpus.read(position)
        if key is not None and key_of(found.key) != key_of(key):
            raise ValueError(f"{self.corpus.folder} is not the split that candidate {key!r} was mined from")
        return found.target

    def _origin(self, candidate: Candidate) -> dict[str, Any]:
        """Where a mined item came from: by which encoder, and its scores with who gave them."""
        scores = {name: value for name, value in candidate.items() if name not in ("position", "is_target", "content")}
        mined = next((step for step in self.made_by if step["stage"] == "mine"), {})
        rated = {
            name: {"prompt": f"{rater['prompt']}@{rater['prompt_sha256'][:16]}", "llm": step["llm"], "seed": step["seed"]}
            for step in self.made_by
            if step["stage"] == "rate"
            for name, rater in step["raters"].items()
            if name in scores
        }
        by = {"by": "mine", "corpus": str(self.corpus and self.corpus.folder), "checkpoint": mined.get("checkpoint")}
        return by | scores | ({"rated": rated} if rated else {})
