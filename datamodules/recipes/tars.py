"""Tars that somebody else wrote, made a split by one pass over them: only an index is written, the tars stay where they are.

    python train.py conf=index source=/data/pairs query=[txt] target=[jpg]
    python train.py conf=index source="s3://bucket/{0000..0099}.tar" out=shards/pairs query=[json:caption] target=[jpg]

Samples are grouped as WebDataset groups them, by the name up to the first dot of the file's own name. A tar that is damaged or
holds what a shard may not stops the pass; a sample that makes no example goes to the quarantine list.
"""

from collections import Counter
from pathlib import Path

from braceexpand import braceexpand
from rich.console import Console
from rich.table import Table

from datamodules.index import write_index
from datamodules.record import Columns
from datamodules.shards import write_quarantine
from datamodules.store import Store


def index(
    source: str,
    out: str | None = None,
    *,
    query: tuple[str, ...] = (),
    target: tuple[str, ...] = (),
    negative: tuple[str, ...] = (),
    label: str | None = None,
    score: str | None = None,
    licence: str = "not stated",
    num_workers: int = 1,
) -> None:
    """Index tars, so that tasks can name the folder as their shards.

    A field is an extension (`jpg`, `txt`), a value in a JSON file (`json:caption`), or either with its kind before it
    (`page=png`, `code=txt`). With neither query nor target the tars must be of our own layout, see `datamodules.record`.

    Args:
        source: A folder of tars, or their paths with braces as `/data/{000..099}.tar`; local or of a store.
        out: Folder that the index is written to; None is the source itself, which must then be local.
        query: Fields that make the query, in order.
        target: Fields that make the target.
        negative: Fields that make one hard negative.
        label: Field of the class.
        score: Field of the gold similarity.
        licence: Goes into the manifest.
        num_workers: Processes that read.

    Raises:
        ValueError: There is no tar, one holds what a shard may not, or no sample makes an example.
    """
    console = Console()
    columns = None
    if query or target or negative or label or score:
        columns = Columns(tuple(query), tuple(target), tuple(negative), label, score)
    store, names = _tars(source)
    if out is None and not store.is_local:
        raise ValueError(f"{store} is remote; give out=<a local folder> for its index")
    folder = Path(store.root if out is None else out)
    at = None if store.is_local and folder.resolve() == Path(store.root).resolve() else store
    about = {"licence": licence, "source": source}
    folder.mkdir(parents=True, exist_ok=True)
    manifest = write_index(folder, store, names, columns=columns, about=about, at=at, num_workers=num_workers, console=console)
    malformed = manifest["malformed"]
    if len(malformed) == manifest["num_examples"]:
        (folder / "manifest.json").unlink()
        raise ValueError(f"no sample of {source} makes an example; the first does not because: {malformed[0][3]}")
    write_quarantine(folder, manifest, [(row, shard, key, "malformed record", why) for row, shard, key, why in malformed])
    table = Table("shards", "examples", "MB", "fields", "malformed")
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    fields, num_examples = ", ".join(manifest["fields"]), manifest["num_examples"]
    table.add_row(f"{len(names):,}", f"{num_examples:,}", f"{size:,.1f}", fields, f"{len(malformed):,}")
    console.print(table)
    for why, number in Counter(why for *_, why in malformed).most_common(5):
        console.print(f"{number:,} x {why}", markup=False)
    console.print(f"index in {folder}", soft_wrap=True)


def _tars(source: str) -> tuple[Store, list[str]]:
    """The folder that the tars lie in and their names there, in order."""
    if "{" in source or source.endswith(".tar"):
        root, _, _ = source.partition("{")[0].rpartition("/")
        names = [path[len(root) + 1 if root else 0 :] for path in braceexpand(source)]
        store = Store(root or ("/" if source.startswith("/") else "."))
        missing = [name for name in names if not store.exists(name)]
        if missing:
            raise ValueError(f"{len(missing)} of the {len(names)} tars of {source} are missing, the first is {missing[0]}")
        return store, names
    store = Store(source)
    names = [name for name in store.names() if name.endswith(".tar")]
    if not names:
        raise ValueError(f"there is no tar in {source}; give a folder of tars, or paths with braces as /data/{{000..099}}.tar")
    return store, names
