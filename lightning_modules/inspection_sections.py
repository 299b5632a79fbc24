"""Sections of an inspection: what the tasks' splits hold, how long it is, what it looks like, what is bad in it."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape

from datamodules.collate import with_prompt
from datamodules.curation.survey import MISSING, BadExample, Shards, evenly, padding, spreads
from datamodules.sample import Item, Part
from datamodules.shards import Split, quarantined
from datamodules.tasks import TaskSpec
from lightning_modules.listing import Listing, Section
from lightning_modules.page import item_of

REFUSED = "refused"
MAX_BAD = 3  # bad examples that are shown of a split: our choice
MAX_CHARACTERS = 1500  # of a text in a sample: our choice
UNITS = {"text": "bytes of text", "pictures": "pictures", "audio": "seconds of sound", "video": "seconds of film"}


def tasks_section(tasks: Mapping[str, TaskSpec], shards: Shards) -> Section:
    """How much there is of each task, how often it comes, under which licence; and which splits cannot be opened."""
    total = sum(task.rate for task in tasks.values())
    rows, sources = [], []
    for name, task in tasks.items():
        split, share = shards.splits.get(task.shards), task.rate / total
        shown = f"{share:.1%}", str(task.batch_size)
        if split is None:
            state = MISSING if shards.problems[task.shards] == MISSING else REFUSED
            rows.append((name, task.kind, state, "", *shown, "", "", "", ""))
            sources.append((name, task.shards, state))
            continue
        found, epoch = shards.surveys[task.shards], len(split) / task.batch_size
        size = sum(shard["bytes"] for shard in split.manifest["shards"]) / 1e6
        at_least = "" if found.num_read == len(split) else "≥ "
        labels = f"{at_least}{len(found.labels):,}" if found.labels else ""
        steps = f"{epoch:,.1f}", f"{epoch / share:,.0f}"
        rows.append((name, task.kind, f"{len(split):,}", f"{size:,.1f}", *shown, *steps, f"{found.mean_negatives:.2f}", labels))
        sources.append((name, task.shards, str(split.manifest["about"].get("licence", "not stated"))))
    columns = ("<task", "<kind", "examples", "MB", "share", "batch", "epoch", "in the run", "negatives", "labels")
    named = {task.shards for task in tasks.values()}
    problems: dict[str, list[str]] = {}
    for folder, problem in shards.problems.items():
        if problem != MISSING or folder not in named:
            problems.setdefault("missing, for benchmarks" if problem == MISSING else problem, []).append(folder)
    note = (
        "Share of the steps; examples of a batch; steps of the task, and of the whole run, until every example was seen once; "
        "hard negatives of an example (mean); classes among the labels."
    )
    wanted = Listing(("<<problem", "<<splits"), [(problem, ", ".join(folders)) for problem, folders in problems.items()])
    marked = frozenset({MISSING, REFUSED})
    listings = Listing(columns, rows, marked), Listing(("<task", "<shards", "<<licence"), sources, marked), wanted
    return Section("tasks", "Tasks", note, listings)


def lengths_section(tasks: Mapping[str, TaskSpec], shards: Shards) -> Section:
    """What queries and targets hold, how long they are, and what batches of them would pad."""
    rows, batches = [], []
    for name, task in present(tasks, shards):
        split, modalities = shards.splits[task.shards], shards.surveys[task.shards].modalities
        for (column, field), spread in spreads(split).items():
            digits = 0 if field in ("text", "pictures") else 2
            values = (f"{value:,.{digits}f}" for value in spread)
            rows.append((name, column, counted(modalities[column]), UNITS[field], *values))
        shares = padding(split, task.batch_size)
        batches.append((name, str(task.batch_size), *(("", "") if shares is None else (f"{share:.1%}" for share in shares))))
    columns = ("<task", "<column", "<holds", "<measure", "median", "95 %", "longest")
    note = (
        "From the index alone, without prompts. Padding is the share of the places for text (query and target) that batches "
        "fill with nothing: whole ones, and in passes of like length where items cannot lie end to end; no value "
        "where there is no text."
    )
    padded = Listing(("<task", "batch", "padding of whole batches", "in passes"), batches)
    return Section("lengths", "Lengths and modalities", note, (Listing(columns, rows), padded))


def samples_section(tasks: Mapping[str, TaskSpec], shards: Shards, num_samples: int) -> Section:
    """A few examples of each task as they are embedded; only the page shows them."""
    html = []
    for name, task in present(tasks, shards):
        split = shards.splits[task.shards]
        html.append(f"<h3>{escape(name)}</h3>")
        html += [_sample(split, position, task) for position in evenly(len(split), num_samples).tolist()]
    note = "Evenly spaced examples, text in its prompt: query, target, the first hard negative where there is one."
    return Section("samples", "Samples", note, html="".join(html))


def _sample(split: Split, position: int, task: TaskSpec) -> str:
    try:
        example = split.read(position)
    except ValueError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    label = "" if example.label is None else f"<span>label: {escape(example.label)}</span>"
    cards = [card(f"<span>query</span><span>{escape(example.key)}</span>{label}", example.query, task.query_prompt)]
    cards.append(card("<span>target</span>", example.target, task.target_prompt))
    for negative in example.negatives[:1]:
        cards.append(card(f"<span>hard negative, 1 of {len(example.negatives)}</span>", negative, task.target_prompt))
    return f'<div class="query sample">{"".join(cards)}</div>'


def card(tag: str, item: Item | None, prompt: str | None = None) -> str:
    """An item in its prompt, its texts cut, under a tag of HTML."""
    shown = '<p class="note">none</p>' if item is None else item_of(_cut(with_prompt(item, prompt)))
    return f'<div class="item"><p class="tag">{tag}</p>{shown}</div>'


def _cut(item: Item) -> Item:
    def cut(part: Part) -> Part:
        if not isinstance(part.data, str) or len(part.data) <= MAX_CHARACTERS:
            return part
        return Part(part.kind, f"{part.data[:MAX_CHARACTERS]} … ({len(part.data):,} characters)")

    return dataclasses.replace(item, parts=tuple(map(cut, item.parts)))


def bad_section(shards: Shards) -> Section:
    """What the quarantine lists leave out, and what could not be read though no list has it."""
    counts, first = [], []
    for folder, split in shards.splits.items():
        listed = [
            BadExample(*(str(entry.get(name, "")) for name in ("shard", "key", "cause", "message")))
            for entry in quarantined(split.folder, split.manifest)
        ]
        found = shards.surveys[folder]
        for state, causes, bad in (
            ("left out", Counter(entry.cause for entry in listed), listed),
            ("not listed", found.causes, found.bad),
        ):
            if causes:
                counts.append((folder, state, f"{causes.total():,}", counted(causes)))
                first += [(folder, entry.shard, entry.key, entry.cause, entry.message) for entry in bad[:MAX_BAD]]
    note = (
        "Left out: in the split's quarantine list. Not listed: could not be read just now; conf=verify would list them."
        if counts
        else f"None in the quarantine lists, none among the {sum(s.num_read for s in shards.surveys.values()):,} examples read."
    )
    listings = (
        Listing(("<split", "<state", "examples", "<<causes"), counts),
        Listing(("<split", "<<shard", "<<key", "<<cause", "<<message"), first),
    )
    return Section("bad", "Bad examples", note, listings)


def present(tasks: Mapping[str, TaskSpec], shards: Shards) -> Iterator[tuple[str, TaskSpec]]:
    """The tasks whose split is there."""
    return ((name, task) for name, task in tasks.items() if task.shards in shards.splits)


def counted(counts: Counter[str]) -> str:
    """What was counted, most frequent first; a single thing goes without its number."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} {number:,}" for name, number in counts.most_common())
