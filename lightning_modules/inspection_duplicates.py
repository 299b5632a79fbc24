"""The section of an inspection that tells what comes twice: pairs within a split, and what benchmarks judge in training."""

from collections import Counter
from collections.abc import Mapping
from html import escape

from datamodules.curation.duplicates import Contents, repeats
from datamodules.curation.survey import COLUMNS, Shards
from datamodules.sample import TEXT_KINDS, Item
from datamodules.tasks import BenchmarkSpec, TaskSpec
from lightning_modules.inspection_sections import card, counted, present
from lightning_modules.listing import Listing, Section

MAX_SHOWN = 3  # duplicates that are shown of a column: our choice
MAX_CHARACTERS = 80  # of a text among them: our choice
NOTE = (
    "Equal is what has the same content: text after NFKC and white-space folding, code letter by letter, media by their bytes. "
    "A repeated pair stood in its split before. Texts of labels, the targets of classification, are left out of the search for "
    "what is both judged and trained on; each content counts for the split where it lies first."
)
Column = tuple[str, str]  # a split's folder, and `query` or `target`


def duplicates_section(tasks: Mapping[str, TaskSpec], benchmarks: Mapping[str, BenchmarkSpec], shards: Shards) -> Section:
    """What comes twice within a training split, and what of the benchmarks comes in any."""
    within, pairs = _within_splits(tasks, shards)
    judged: dict[Column, list[str]] = {}
    for name, spec in benchmarks.items():
        for column in judged_columns(spec):
            judged.setdefault(column, []).append(name)
    known = {column: names for column, names in judged.items() if column[0] in shards.surveys}
    shared, examples, cards = _with_benchmarks(_trained(tasks, shards), known, shards)
    missing = f" Of {len(judged) - len(known)} more the split is not there." if len(known) < len(judged) else ""
    searched = (
        f" Of {len(known)} columns that benchmarks judge, {len(shared)} hold what is trained on.{missing}" if judged else ""
    )
    return Section(
        "duplicates",
        "Duplicates",
        NOTE + ("" if within else " No pair is repeated.") + searched,
        (
            Listing(("<split", "repeated pairs", "of"), within),
            Listing(("<split", "<key", "<same as", "<<query"), pairs),
            Listing(("<judged split", "<column", "also trained on", "share", "<<in", "<<benchmarks"), shared),
            Listing(("<judged split", "<<key", "<trained on in", "<<as", "<<content"), examples),
        ),
        f'<div class="query sample">{"".join(cards)}</div>' if cards else "",
    )


def judged_columns(spec: BenchmarkSpec) -> list[Column]:
    """What a benchmark embeds of its splits; the texts of labels are no column's."""
    if spec.measure == "classification":
        return [(spec.shards, "target" if spec.reverse else "query")]
    return [(spec.shards, "query"), (spec.corpus or spec.shards, "target")]


def _within_splits(tasks: Mapping[str, TaskSpec], shards: Shards) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """How many pairs are repeated in each training split, and the first of them."""
    counts, first = [], []
    for folder in dict.fromkeys(task.shards for _, task in present(tasks, shards)):
        split, found = shards.splits[folder], repeats(shards.surveys[folder])
        if found:
            counts.append((folder, f"{len(found):,}", f"{len(shards.surveys[folder].positions):,}"))
        for position, earlier in found[:MAX_SHOWN]:
            query = split.read(position).query
            assert query is not None
            first.append((folder, split.key(position), split.key(earlier), _excerpt(query)))
    return counts, first


def _trained(tasks: Mapping[str, TaskSpec], shards: Shards) -> Contents:
    """What training embeds, but for the texts of labels."""
    columns = {
        (task.shards, column): shards.surveys[task.shards].contents(column)
        for _, task in present(tasks, shards)
        for column in (COLUMNS[:1] if task.kind == "classification" else COLUMNS)
    }
    return Contents(columns)


def _with_benchmarks(
    trained: Contents, judged: Mapping[Column, list[str]], shards: Shards
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[str]]:
    """How much of each judged column is trained on, the first examples of it, and cards of those with media."""
    shared, examples, cards = [], [], []
    for (folder, column), names in judged.items():
        split = shards.splits[folder]
        ids, positions = shards.surveys[folder].contents(column)
        is_shared = trained.holds(ids)
        if not is_shared.any():
            continue
        places = [trained.place(content) for content in ids[is_shared].tolist()]
        count = f"{is_shared.sum():,} of {len(ids):,}", f"{is_shared.mean():.1%}"
        shared.append((folder, column, *count, counted(Counter(place for place, _ in places)), ", ".join(names)))
        for position, (place, other) in list(zip(positions[is_shared].tolist(), places, strict=True))[:MAX_SHOWN]:
            item = getattr(split.read(position), column)
            examples.append((folder, split.key(position), place, shards.splits[place].key(other), _excerpt(item)))
            if not item.is_text:
                cards.append(card(f"<span>{escape(folder)}</span><span>{escape(split.key(position))}</span>", item))
    return shared, examples, cards


def _excerpt(item: Item) -> str:
    """An item on one line."""
    shown = " ".join(str(p.data) if p.kind in TEXT_KINDS else f"[{p.kind}, {len(p.data):,} bytes]" for p in item.parts)
    return shown if len(shown) <= MAX_CHARACTERS else f"{shown[:MAX_CHARACTERS]} …"
