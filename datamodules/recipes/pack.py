"""The data pack (JSONL files with media beside them, listed in its `tasks.json`) to shards.

Every JSONL file becomes one split, named like the file with hyphens for dots: `en.queries.test.jsonl` becomes
`en-queries-test`. Four kinds of file give further splits:

    queries.train              train            every query with each of its relevant documents, as pairs
    train of an sts set        train_pairs      the rows scored 4 or more, as pairs
    pairs that carry labels    <split>_classes  the content and its label, as classification
    image captions             de-<split>, ..   the translated captions; their English is one of the five already

A prefix stays in front (`en-train_pairs`). Content goes to `query` and `target`; a class is a target whose text is its label
with spaces for underscores; fields that name no content (answers, folds, recognised text) go to `meta`; an empty title is none.
Keys are the records' ids made fit by `key_of`; where ids repeat, the later ones get `-2`, `-3`, .. in the file's order, and
judgements mean the first.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from datamodules.files import sha256_of
from datamodules.sample import Example, Item, Part, key_of, text_item
from datamodules.shards import Split, is_written, write_split

STS_POSITIVE = 4.0  # our choice: from this score (0 to 5) on, two sentences say the same but for unimportant details
CONTENT = ("text", "image", "audio", "video")
FIELDS = {
    "pair": ("id", "query", "target"),
    "pair classes": ("id", "query", "target", "label"),
    "classification": ("id", "input", "label"),
    "sts": ("id", "a", "b", "score"),
    "sts pairs": ("id", "a", "b", "score"),
    "corpus": ("id", "target"),
    "queries": ("id", "query"),
    "query pairs": ("id", "query"),
    "captions": ("id", "image", "captions"),
    "translations": ("id", "image", "captions"),
}
NOT_META = {field for fields in FIELDS.values() for field in fields} | {"captions_multilingual"}


@dataclass(frozen=True, slots=True)
class SplitSource:
    """A split that the pack can give.

    Args:
        set: `<modality>/<dataset>`, as in `tasks.json`.
        split: Name of the split.
        shape: What its records look like and become, a key of `FIELDS`.
        files: The JSONL file of the records; for queries also their qrels and their corpus.
        code: Whether the texts of queries and of targets are code.
        language: The translation that a split of translated captions holds.
    """

    set: str
    split: str
    shape: str
    files: tuple[Path, ...]
    code: tuple[bool, bool]
    language: str | None = None


def prepare(source: str, out: str, *, sets: list[str] | None = None) -> None:
    """Shards of the data pack, one folder `<out>/<modality>/<dataset>/<split>` a split.

    A split whose files (by SHA-256), licence and source are those in its manifest stays as it is; any other is written anew.
    Media are not compared: delete a split's folder when only its media changed.

    Args:
        source: The pack's folder, the one that holds tasks.json.
        out: The folder that the shards go to.
        sets: Which sets, for example `[text/agnews, audio/esc10]`; None for all.

    Raises:
        ValueError: `source` is no pack, a set is unknown, a split is empty, a file is missing, or a record is incomplete.
    """
    chosen = splits_of(source, sets)
    licences = {task["name"]: task["licence"] for task in _read_tasks(Path(source))}
    origins = _read_origins(Path(source), {split.set for split in chosen})
    console = Console()
    table = Table("set", "split", "examples", "MB")
    num_kept = num_examples = num_bytes = 0
    for split in track(chosen, "writing shards", console=console, transient=True):
        folder = Path(out) / split.set / split.split
        about = {"set": split.set, "licence": licences[split.set], "source": origins[split.set], "files": _digests(split)}
        if is_written(folder, about):
            num_kept += 1
        else:
            write_split(folder, _at_least_one(split), about=about)
        manifest = Split(folder).manifest
        size = sum(shard["bytes"] for shard in manifest["shards"])
        table.add_row(split.set, split.split, f"{manifest['num_examples']:,}", f"{size / 1e6:.1f}")
        num_examples, num_bytes = num_examples + manifest["num_examples"], num_bytes + size
    table.add_section()
    table.add_row("all", f"{len(chosen)} splits", f"{num_examples:,}", f"{num_bytes / 1e6:.1f}")
    console.print(table)
    if num_kept:
        console.print(f"{num_kept} of {len(chosen)} splits had been written from the same files and were left as they are")


def splits_of(source: str | Path, sets: list[str] | None = None) -> list[SplitSource]:
    """Every split that `prepare` writes for these sets, without writing any.

    Raises:
        ValueError: `source` is no pack, a set is unknown, or a file that `tasks.json` names is missing.
    """
    tasks = _read_tasks(Path(source))
    known = [task["name"] for task in tasks]
    unknown = [name for name in sets or () if name not in known]
    if unknown or sets == []:
        raise ValueError(f"sets is {sets}; this pack has {', '.join(known)}: name some of them, or leave `sets` out for all")
    chosen = [task for task in tasks if sets is None or task["name"] in sets]
    found = [split for task in chosen for stem in task["files"] for split in _splits_of_file(Path(source), task, stem)]
    names = [(split.set, split.split) for split in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(
            f"two files of {twice[0]} would give the split {twice[1]!r}; names must differ: rename one in tasks.json"
        )
    return found


def _splits_of_file(root: Path, task: Mapping[str, Any], stem: str) -> Iterator[SplitSource]:
    folder, words = root / task["name"], stem.split(".")
    file = _existing(folder / f"{stem}.jsonl", "tasks.json names it")
    is_code = task["name"].startswith("code/")
    code = (is_code and task["modality"].startswith("code"), is_code)
    plain = SplitSource(task["name"], "-".join(words), "pair", (file,), code)
    if "corpus" in words:
        yield dataclasses.replace(plain, shape="corpus")
    elif "queries" in words:
        qrels = _existing(folder / f"{stem.replace('queries', 'qrels')}.tsv", f"{file.name} needs it")
        own = folder / f"{stem.replace('queries', 'corpus')}.jsonl"
        corpus = own if own.is_file() else folder / f"{'.'.join([*words[: words.index('queries')], 'corpus'])}.jsonl"
        queries = dataclasses.replace(plain, shape="queries", files=(file, qrels, _existing(corpus, f"{file.name} needs it")))
        yield queries
        if words[-1] == "train":
            yield dataclasses.replace(queries, shape="query pairs", split="-".join(word for word in words if word != "queries"))
    elif task["type"] == "sts":
        yield dataclasses.replace(plain, shape="sts")
        if words[-1] == "train":
            yield dataclasses.replace(plain, shape="sts pairs", split=f"{plain.split}_pairs")
    elif task["type"] == "classification":
        yield dataclasses.replace(plain, shape="classification")
    elif task["type"].startswith("image-caption") and words[0] != "speech":
        yield dataclasses.replace(plain, shape="captions")
        records = read_records(file, FIELDS["captions"])
        languages = {language for record in records for language in record.get("captions_multilingual", ())} - {"en"}
        for language in sorted(languages):
            yield dataclasses.replace(plain, shape="translations", split=f"{language}-{plain.split}", language=language)
    else:
        yield plain
        if "classification" in task["type"]:
            yield dataclasses.replace(plain, shape="pair classes", split=f"{plain.split}_classes")


def examples_of(split: SplitSource) -> Iterator[Example]:
    """The split's examples in the order of its records, under unique keys.

    Raises:
        ValueError: A record lacks a field, its media are missing, or qrels and records do not fit together.
    """
    records = read_records(split.files[0], FIELDS[split.shape])
    if split.shape in ("queries", "query pairs"):
        examples = _judged(split, records)
    else:
        examples = (example for record in records for example in _from_record(split, record))
    keys: set[str] = set()
    for example in examples:
        yield dataclasses.replace(example, key=_unused(example.key, keys))


def _from_record(split: SplitSource, record: Mapping[str, Any]) -> Iterator[Example]:
    key, meta, label = key_of(str(record["id"])), _meta(record), record.get("label")
    match split.shape:
        case "pair":
            yield Example(key, _item(split, record, "query"), _item(split, record, "target"), label=label, meta=meta)
        case "corpus":
            yield Example(key, None, _item(split, record, "target"), meta=meta)
        case "classification":
            yield Example(key, _item(split, record, "input"), label_item(record["label"]), label=label, meta=meta)
        case "pair classes":
            query, target = _item(split, record, "query"), _item(split, record, "target")
            yield Example(key, _classified(query, target), label_item(record["label"]), label=label, meta=meta)
        case "sts" | "sts pairs":
            if split.shape == "sts" or record["score"] >= STS_POSITIVE:
                yield Example(key, _item(split, record, "a"), _item(split, record, "b"), score=record["score"], meta=meta)
        case "captions":
            image = _item(split, record, "image")
            for number, caption in enumerate(record["captions"]):
                yield Example(f"{key}-{number}", text_item(caption), image, meta=meta)
        case "translations":
            caption = record.get("captions_multilingual", {}).get(split.language)
            if caption is not None:
                yield Example(key, text_item(caption), _item(split, record, "image"), meta=meta)


def _judged(split: SplitSource, records: Iterator[dict[str, Any]]) -> Iterator[Example]:
    """Queries with what is relevant to them: as keys of the corpus, or one pair a relevant document."""
    file, qrels_file, corpus_file = split.files
    documents: dict[str, tuple[str, dict[str, Any]]] = {}
    keys: set[str] = set()
    for document in read_records(corpus_file, FIELDS["corpus"]):
        documents.setdefault(str(document["id"]), (_unused(key_of(str(document["id"])), keys), document))
    qrels = read_qrels(qrels_file)
    for query_id, grades in qrels.items():
        strangers = [document_id for document_id in grades if document_id not in documents]
        if strangers:
            raise ValueError(
                f"{qrels_file}: query {query_id!r} is judged against {strangers[0]!r}, which {corpus_file.name} does not hold; "
                "judgements must name its ids: correct the one or the other"
            )
    for record in records:
        grades = qrels.get(str(record["id"]))
        if grades is None:
            raise ValueError(
                f"{file}: query {record['id']!r} has no line in {qrels_file.name}; every query needs at least one: add it or "
                "take the query out"
            )
        query, key = _item(split, record, "query"), key_of(str(record["id"]))
        if split.shape == "queries":
            relevant = {documents[document_id][0]: grade for document_id, grade in grades.items()}
            yield Example(key, query, relevant=relevant, meta=_meta(record))
        else:
            for document_id in (document_id for document_id, grade in grades.items() if grade > 0):
                yield Example(key, query, _item(split, documents[document_id][1], "target"), meta=_meta(record))


def _classified(query: Item, target: Item) -> Item:
    """What of a labelled pair is classified: its media, or both its texts as one."""
    if query.is_text and target.is_text:
        return text_item(" ".join(str(part.data) for part in query.parts + target.parts))
    return query if target.is_text else target


def label_item(label: str) -> Item:
    """A class as something to lie near: its label, readable."""
    return text_item(label.replace("_", " "))


def read_records(file: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, in order.

    Raises:
        ValueError: A line is no JSON object or lacks one of `fields`; names file, line and record.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error}); a line holds one record: correct it") from error
            yield complete(record, fields, f"{file}, line {number}")


def read_qrels(file: Path) -> dict[str, dict[str, float]]:
    """Query id to corpus id to grade, from a tab-separated file with a head line."""
    qrels: dict[str, dict[str, float]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[1:], 2):
        try:
            query, document, grade = line.split("\t")
            qrels.setdefault(query, {})[document] = float(grade)
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is {line!r}; a line holds query-id, corpus-id and score between tabs: correct it"
            ) from error
    return qrels


def _item(split: SplitSource, record: Mapping[str, Any], field: str) -> Item:
    content = record[field]
    parts = content["parts"] if isinstance(content, dict) and "parts" in content else [content]
    title = content.get("title") if isinstance(content, dict) else None
    return Item(tuple(_part(split, record["id"], part, is_target=field == "target") for part in parts), title or None)


def _part(split: SplitSource, record_id: str, content: Any, *, is_target: bool) -> Part:
    kinds = [kind for kind in CONTENT if isinstance(content, dict) and isinstance(content.get(kind), str)]
    if len(kinds) != 1:
        raise ValueError(
            f"{split.files[0]}: record {record_id!r} holds the content {content!r}; content has exactly one of "
            f"{', '.join(CONTENT)}: correct the record"
        )
    if kinds == ["text"]:
        return Part("code" if split.code[is_target] else "text", content["text"])
    path, kind = PurePosixPath(content[kinds[0]]), kinds[0]
    file = split.files[0].parent / path
    if path.is_absolute() or ".." in path.parts or not file.is_file():
        raise ValueError(
            f"{split.files[0]}: record {record_id!r} names {str(path)!r}, but {file} is no file; media lie below the folder of "
            "the JSONL file: put it there or take the record out"
        )
    return Part(
        "page" if kind == "image" and split.set.startswith("document/") else kind, file.read_bytes(), path.suffix[1:].lower()
    )


def _meta(record: Mapping[str, Any]) -> dict[str, Any] | None:
    return {field: value for field, value in record.items() if field not in NOT_META} or None


def _unused(key: str, taken: set[str]) -> str:
    """The key, or its first numbered form that is free; taken from then on."""
    free = next(name for name in itertools.chain([key], (f"{key}-{n}" for n in itertools.count(2))) if name not in taken)
    taken.add(free)
    return free


def _at_least_one(split: SplitSource) -> Iterator[Example]:
    examples = examples_of(split)
    first = next(examples, None)
    if first is None:
        raise ValueError(
            f"{split.files[0]} gives no example for the split {split.split!r}; a split needs at least one: complete the file "
            f"or leave {split.set} out of `sets`"
        )
    return itertools.chain([first], examples)


def _digests(split: SplitSource) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in split.files}


def _read_tasks(root: Path) -> list[dict[str, Any]]:
    file = root / "tasks.json"
    if not file.is_file():
        raise ValueError(f"{root} is no data pack: it has no tasks.json; give the folder that holds that file as `source`")
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); it holds a list of sets: correct it") from error
    return [complete(task, ("name", "type", "modality", "files", "licence"), str(file)) for task in tasks]


def _read_origins(root: Path, sets: set[str]) -> dict[str, str]:
    """Set to the line `- from: ..` of its section in SOURCES.md."""
    origins, section = {}, ""
    for line in _existing(root / "SOURCES.md", "it says where the sets come from").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].strip()
        elif line.startswith("- from:"):
            origins[section] = line.removeprefix("- from:").strip()
    unsourced = sorted(sets - set(origins))
    if unsourced:
        raise ValueError(f"{root / 'SOURCES.md'} has no line `- from:` below `## {unsourced[0]}`; every set needs one: add it")
    return origins


def _existing(file: Path, reason: str) -> Path:
    if not file.is_file():
        raise ValueError(f"{file} is missing and {reason}; the pack must hold it: put it back")
    return file


def complete(record: Any, fields: tuple[str, ...], where: str) -> dict[str, Any]:
    """The record, which is an object with all of `fields`.

    Raises:
        ValueError: It is not; names it, and `where` it stands.
    """
    missing = [field for field in fields if not isinstance(record, dict) or field not in record]
    if missing:
        name = record.get("id", record.get("name")) if isinstance(record, dict) else record
        raise ValueError(
            f"{where}: record {name!r} lacks {', '.join(missing)}; a record here has {', '.join(fields)}: complete it or take "
            "it out"
        )
    return record
