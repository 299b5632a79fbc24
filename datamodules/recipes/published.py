"""`conf=prepare_published`: the data sets of the papers' tables outside mteb, as they are published, to shards.

Each goes to `<out>/<dataset>/<split>`, the splits that `conf/benchmarks/<dataset>.yaml` names. Layouts and where to get the
data are said in `datamodules.recipes.captioned` and `.passages`, and by the error that names what is missing.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from datamodules.files import sha256_of
from datamodules.recipes.captioned import CAPTIONED
from datamodules.recipes.layouts import MISSING, Folder, Made
from datamodules.recipes.passages import PASSAGES
from datamodules.sample import Example
from datamodules.shards import Split, is_written, write_split

DATASETS = {**CAPTIONED, **PASSAGES}


def prepare(dataset: str, source: str, out: str = "shards/published", *, split: str | None = None) -> None:
    """Shards of a published data set, one folder `<out>/<dataset>/<split>` a split.

    A split whose files (by SHA-256), licence and source are those in its manifest stays as it is; any other is written anew.
    Media are not compared: delete a split's folder when only its media changed. Media that `<source>/missing.txt` lists are
    left out with what is said of them; what is left out of a split is told.

    Args:
        dataset: Its name, that of its file below conf/benchmarks.
        source: The folder that the published files lie in, unpacked.
        out: The folder that the shards go to.
        split: Which of its splits; None is that of the papers' tables.

    Raises:
        ValueError: The data set or split is unknown, a file is missing, or a record is incomplete, says nothing, or has nothing
            relevant to it.
    """
    folder = folder_of(dataset, source)
    chosen = splits_of(folder, split)
    about = {"set": dataset, "licence": folder.layout.licence, "source": folder.layout.home}
    digest, console = cache(sha256_of), Console()
    table = Table("set", "split", "examples", "MB")
    num_kept, notes = 0, list[str]()
    columns = (*Progress.get_default_columns()[:1], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for made in chosen:
            to = Path(out) / dataset / made.name
            files = {str(file.relative_to(folder.root)): digest(file) for file in made.files}
            if is_written(to, about | {"files": files}):
                num_kept += 1
            else:
                folder.left_out.clear()
                examples = progress.track(_at_least_one(made, folder.root), total=None, description=made.name)
                write_split(to, examples, about=about | {"files": files})
                notes += [f"{made.name}: left out {number:,} x {what}" for what, number in folder.left_out.items()]
            manifest = Split(to).manifest
            size = sum(shard["bytes"] for shard in manifest["shards"])
            table.add_row(dataset, made.name, f"{manifest['num_examples']:,}", f"{size / 1e6:.1f}")
    console.print(table)
    if num_kept:
        console.print(f"{num_kept} of {len(chosen)} splits had been written from the same files and were left as they are")
    for note in notes:
        console.print(note, soft_wrap=True)
    if folder.missing:
        console.print(f"{folder.root / MISSING} leaves media out: numbers are not those of the published set", soft_wrap=True)


def folder_of(dataset: str, source: str | Path) -> Folder:
    """The folder of a data set.

    Raises:
        ValueError: The data set is unknown.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}; known are {', '.join(DATASETS)}")
    return Folder(Path(source), dataset, DATASETS[dataset])


def splits_of(folder: Folder, split: str | None = None) -> list[Made]:
    """Every split that `prepare` writes, without writing any.

    Raises:
        ValueError: The split is unknown, or a file is missing.
    """
    known = folder.layout.splits
    if split is not None and split not in known:
        raise ValueError(f"split is {split!r}; {folder.dataset} has {', '.join(known)}")
    return folder.layout.read(folder, split or known[0])


def _at_least_one(made: Made, source: Path) -> Iterator[Example]:
    examples = made.examples()
    first = next(examples, None)
    if first is None:
        raise ValueError(
            f"{made.files[0].relative_to(source)} in {source} gives no example for the split {made.name!r}; a split needs at "
            "least one: give the file as it was published"
        )
    return itertools.chain([first], examples)
