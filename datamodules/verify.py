"""`conf=verify`: every example of every split is read and decoded once; what cannot be used goes to the quarantine lists.

A split's list lies beside its manifest as `quarantine.json`, and whoever opens the split leaves those examples out. Examples
are tried by processes that are killed when one hangs them, so that it cannot hold up a run later. What was tried before a stop
is not tried again.
"""

import hashlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from datamodules.files import replace_file, sha256_of
from datamodules.loader import die_with_parent
from datamodules.media.limits import DecodeLimits
from datamodules.sample import BadExampleError
from datamodules.shards import Split, write_quarantine
from datamodules.stream import Source

CHUNK = 256  # examples that a process tries before it ends
GRACE_SECONDS = 10.0  # beyond the limit on decoding, before a process that tells nothing is killed
SAVE_SECONDS = 10.0
Bad = tuple[int, str, str, str, str]  # row, shard, key, cause, message


def verify(
    root: str,
    *,
    splits: list[str] | None = None,
    num_workers: int = 2,
    decode: DecodeLimits = DecodeLimits(),  # noqa: B008 (frozen)
) -> None:
    """Try every example and write the quarantine lists.

    Args:
        root: Folder that the splits lie in; a local one, as the lists are written there.
        splits: Their folders below it; None for all.
        num_workers: Processes that decode.
        decode: Limits of what a medium may hold; those of the runs to come.

    Raises:
        ValueError: There is no split, or one cannot be opened.
    """
    console = Console()
    folders = (
        [Path(root) / name for name in splits] if splits else sorted(path.parent for path in Path(root).rglob("manifest.json"))
    )
    if not folders:
        raise ValueError(
            f"there is no split below {root}; write some with conf=prepare or conf=world, or index tars with conf=index"
        )
    table = Table("split", "examples", "bad", "why")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    num_examples = num_bad = 0
    with Progress(*columns, console=console, transient=True) as progress:
        for folder in folders:
            split = Split(folder, quarantine=False)
            bar = progress.add_task(str(folder.relative_to(root)), total=len(split))
            bad = []
            for done, found in _tried(split, decode, num_workers):
                progress.update(bar, completed=done)
                bad = found
            write_quarantine(folder, split.manifest, bad)
            progress.remove_task(bar)
            why = ", ".join(f"{cause}: {number:,}" for cause, number in Counter(cause for *_, cause, _ in bad).most_common())
            table.add_row(str(folder.relative_to(root)), f"{len(split):,}", f"{len(bad):,}", why)
            num_examples, num_bad = num_examples + len(split), num_bad + len(bad)
            for shard in _changed_shards(split):
                console.print(f"{shard} is not the file that was indexed, though its examples may be whole", soft_wrap=True)
    table.add_section()
    table.add_row("all", f"{num_examples:,}", f"{num_bad:,}", "")
    console.print(table)
    if num_bad:
        console.print("bad examples are listed in each split's quarantine.json; runs leave them out from now on")


def _changed_shards(split: Split) -> Iterator[str]:
    for shard in split.manifest["shards"]:
        path = split.shards.fetch(shard["name"], sha256=shard["sha256"], size=shard["bytes"])
        if sha256_of(path) != shard["sha256"]:
            yield f"{split.shards}/{shard['name']}"


def _tried(split: Split, limits: DecodeLimits, num_workers: int) -> Iterator[tuple[int, list[Bad]]]:
    """How many examples were tried, and which of them are bad, again and again until all were."""
    journal = Path(str(split.folder)) / ".verified.json"
    stamp = hashlib.sha256(json.dumps([split.digest, asdict(limits)], sort_keys=True).encode()).hexdigest()
    done, bad = _read_journal(journal, stamp)
    chunks = [first for first in range(0, len(split), CHUNK) if first not in done]
    running: list[_Trial] = []
    saved = time.monotonic()
    yield _num_done(done, split), bad
    try:
        while chunks or running:
            while chunks and len(running) < num_workers:
                first = chunks.pop(0)
                running.append(_Trial(split, limits, first, first, min(first + CHUNK, len(split))))
            wait([trial.results for trial in running], timeout=0.5)
            for trial in list(running):
                if not trial.is_over():
                    continue
                running.remove(trial)
                bad += trial.bad
                if trial.row < trial.stop:  # it hung, or took its process with it: another one goes on behind it
                    running.append(_Trial(split, limits, trial.chunk, trial.row + 1, trial.stop))
                    continue
                done.add(trial.chunk)
                yield _num_done(done, split), sorted(bad)
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                told = [found for found in bad if found[0] // CHUNK * CHUNK in done]
                replace_file(journal, json.dumps([stamp, sorted(done), told]))
    finally:
        for trial in running:
            trial.end()
    journal.unlink(missing_ok=True)


def _num_done(done: set[int], split: Split) -> int:
    return sum(min(CHUNK, len(split) - first) for first in done)


def _read_journal(path: Path, stamp: str) -> tuple[set[int], list[Bad]]:
    try:
        found, done, bad = json.loads(path.read_text())
    except (OSError, ValueError):
        return set(), []
    return (set(done), [tuple(entry) for entry in bad]) if found == stamp else (set(), [])


@dataclass
class _Trial:
    """A process that tries the examples of rows [first, stop) of a chunk.

    `row` is the one it is at, or `stop` when it is through.
    """

    split: Split
    limits: DecodeLimits
    chunk: int
    first: int
    stop: int
    bad: list[Bad] = field(default_factory=list)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.results, theirs = context.Pipe(duplex=False)
        self.row, self._heard = self.first, time.monotonic()
        arguments = (self.split, self.limits, self.first, self.stop, theirs)
        self._process = context.Process(target=_try_rows, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def is_over(self) -> bool:
        """Take what it has told; whether it has ended, or was ended because it told nothing for too long."""
        try:
            while self.results.poll():
                self.row, found = self.results.recv()
                self.bad += found
                self._heard = time.monotonic()
        except EOFError:
            self._process.join()
            if self.row < self.stop:
                self._blame("crashes", f"its process ended with status {self._process.exitcode}")
            return True
        if time.monotonic() - self._heard > self.limits.max_seconds + GRACE_SECONDS:
            self.end()
            self._blame("hangs", f"decoding did not come back within {self.limits.max_seconds + GRACE_SECONDS:g} s")
            return True
        return False

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _blame(self, cause: str, why: str) -> None:
        self.bad.append((self.row, self.split.shard(self.row), self.split.key(self.row), cause, why))


def _try_rows(split: Split, limits: DecodeLimits, first: int, stop: int, results: Connection) -> None:
    """Tell each row before it is tried, with what was bad about the one before it."""
    die_with_parent()
    source = Source(split, limits)
    bad: list[Any] = []
    for row in range(first, stop):
        results.send((row, bad))
        bad = []
        try:
            source.read(row)
        except BadExampleError as error:
            bad = [(row, split.shard(row), split.key(row), error.cause, str(error))]
    results.send((stop, bad))
