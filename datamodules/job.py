"""A long job over records, cut into blocks that the tasks of an array share: each becomes one shard, whole or absent.

    <out>/made_by.json         what the job was begun with; to go on with anything else is refused
    <out>/000123.tar           what block 123 made: a WebDataset tar, see `datamodules.record`; absent where it made nothing
    <out>/blocks/000123.json   written last: the shard's SHA-256, counts, and the records that were set aside with their causes
    <out>/answers/000123.jsonl an LLM's answers as they came, see `lightning_modules.llm.answers`
    <out>/manifest.json        with its tables the index, by the task that finds no block missing: a split like any other

Task i of n does the blocks b with b mod n = i. It may be killed at any moment and holds one block in memory.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from datamodules.files import replace_file, sha256_of
from datamodules.index import write_index
from datamodules.record import parse_json, read_json
from datamodules.sample import Example
from datamodules.shards import MAX_MANIFEST_BYTES, Split, write_tar
from datamodules.store import Store

MADE_BY, BLOCKS = "made_by.json", "blocks"


class Aside(NamedTuple):
    """A record that made nothing: its key, why in words that can be counted, and what was met."""

    key: str
    cause: str
    message: str = ""


@dataclass(frozen=True)
class ArrayTask:
    """Which of how many tasks this process is."""

    index: int
    size: int


def array_task(index: int | None, size: int | None) -> ArrayTask:
    """The task that the numbers name; where none is given, that of a Slurm job array, else the only one.

    Raises:
        ValueError: One number is given without the other, or there is no such task.
    """
    if index is None and size is None:
        environment = [os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN")]
        number, count, first = (int(value) if value else None for value in environment)
        index, size = (0, 1) if number is None or count is None else (number - (first or 0), count)
    if index is None or size is None or not 0 <= index < size:
        raise ValueError(f"array_index is {index}, array_size {size}; give both, the index from 0 to size - 1")
    return ArrayTask(index, size)


class Job:
    """A job's blocks: which are to be done here, and what became of the others.

    Args:
        out: Its folder.
        made_by: All that decides what it makes, in JSON values.
        num_records: Records that it goes over.
        block_size: Records of a block.
        task: Which blocks are done here.

    Raises:
        ValueError: The folder holds what was made by something else; says by what.
    """

    def __init__(self, out: str | Path, made_by: Mapping[str, Any], num_records: int, block_size: int, task: ArrayTask) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        self.out, self.num_records, self.block_size, self.task = Path(out), num_records, block_size, task
        self.made_by = {**made_by, "num_records": num_records, "block_size": block_size}
        self.num_blocks = -(-num_records // block_size)
        (self.out / BLOCKS).mkdir(parents=True, exist_ok=True)
        with locked(self.out / ".begin"):
            if not (self.out / MADE_BY).exists():
                if found := sorted(self.out.glob("*.tar")):
                    raise ValueError(f"{self.out} holds {found[0].name} of another making; give another folder as out")
                replace_file(self.out / MADE_BY, json.dumps(self.made_by, indent=1, ensure_ascii=False, sort_keys=True))
        begun = read_json(self.out / MADE_BY)
        changed = sorted(key for key in begun.keys() | self.made_by.keys() if begun.get(key) != self.made_by.get(key))
        if changed:
            told = "; ".join(f"{key} was {begun.get(key)!r:.99}, now {self.made_by.get(key)!r:.99}" for key in changed)
            raise ValueError(f"{self.out} was begun otherwise: {told}. Give another folder as out, or delete that one")

    @property
    def own_blocks(self) -> range:
        """The blocks of this task, done or not."""
        return range(self.task.index, self.num_blocks, self.task.size)

    def todo(self) -> list[int]:
        """The blocks that are to be done here."""
        return [block for block in self.own_blocks if not self.is_done(block)]

    def blocks(self, console: Console, todo: list[int] | None = None) -> Iterator[int]:
        """The blocks that are to be done here, as they were told or are now, with a progress bar."""
        own, missing = self.own_blocks, self.todo() if todo is None else todo
        if len(missing) < len(own):
            console.print(f"{len(own) - len(missing)} of {len(own)} blocks had been done and are left as they are")
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(missing, total=len(missing), description=f"blocks of {self.out.name}")

    def positions(self, block: int) -> range:
        """The records of a block."""
        return range(block * self.block_size, min(self.num_records, (block + 1) * self.block_size))

    def is_done(self, block: int) -> bool:
        """Whether a block's shard is there as it was written."""
        try:
            done = self._read(block)
        except FileNotFoundError:
            return False
        tar = self.out / self._tar(block)
        return not done["num_examples"] or (tar.is_file() and tar.stat().st_size == done["bytes"])

    def write(self, block: int, examples: Iterable[Example], counts: Mapping[str, int], aside: Sequence[Aside] = ()) -> None:
        """Write a block's shard, and then that it is done.

        Raises:
            ValueError: A key came twice.
            OSError: The disk is full or the place is not writable; the block is then not done.
        """
        tar = self.out / self._tar(block)
        beside = tar.with_name(f".{tar.name}.{os.getpid()}.partial")
        try:
            done: dict[str, Any] = {"num_examples": write_tar(beside, examples)}
            if done["num_examples"]:
                done |= {"bytes": beside.stat().st_size, "sha256": sha256_of(beside)}
                os.replace(beside, tar)
        except OSError as error:
            raise OSError(error.errno, f"could not write {tar}: {error.strerror or error}") from error
        finally:
            beside.unlink(missing_ok=True)
        done |= {"counts": dict(counts), "aside": [found._asdict() for found in aside]}
        replace_file(self._described(block), json.dumps(done, ensure_ascii=False))

    def finish(self, console: Console) -> dict[str, Any] | None:
        """Make a split of the shards if no block is missing, and say what became of the records.

        Returns:
            The manifest; None while blocks are missing.

        Raises:
            ValueError: A shard is no longer as it was written, or nothing at all was kept.
        """
        missing = [block for block in range(self.num_blocks) if not self.is_done(block)]
        if missing:
            console.print(f"{len(missing)} of {self.num_blocks} blocks are missing (of other tasks), the first is {missing[0]}")
            return None
        with locked(self.out / ".index"):
            found = self._manifest()
            counts, causes, names = Counter[str](), Counter[str](), {}
            for block in range(self.num_blocks):
                done = self._read(block)
                counts.update(done["counts"])
                causes.update(record["cause"] for record in done["aside"])
                if done["num_examples"]:
                    names[self._tar(block)] = done["sha256"]
            if not names:
                raise ValueError(f"nothing was kept of {self.num_records:,} records: {told(causes)}; see {self.out / BLOCKS}")
            about = {"made_by": self.made_by, "counts": dict(sorted(counts.items())), "aside": dict(causes.most_common())}
            if found is None or found["about"] != about or {s["name"]: s["sha256"] for s in found["shards"]} != names:
                found = write_index(self.out, Store(self.out), list(names), about=about, console=console)
                changed = [shard["name"] for shard in found["shards"] if shard["sha256"] != names[shard["name"]]]
                if changed:
                    (self.out / "manifest.json").unlink()
                    raise ValueError(f"{self.out / changed[0]} is no longer as it was written; delete it and run the job again")
        console.print(f"{found['num_examples']:,} examples of {self.num_records:,} records in {self.out}", soft_wrap=True)
        if causes:
            console.print(f"{causes.total():,} set aside: {told(causes)}", soft_wrap=True)
        return found

    def aside(self) -> Iterator[Aside]:
        """What was set aside, block by block."""
        for block in range(self.num_blocks):
            yield from (Aside(**record) for record in self._read(block)["aside"])

    def _manifest(self) -> dict[str, Any] | None:
        file = self.out / "manifest.json"
        return parse_json(file.read_bytes(), MAX_MANIFEST_BYTES) if file.is_file() else None

    def _read(self, block: int) -> dict[str, Any]:
        file = self._described(block)
        try:
            done = parse_json(file.read_bytes(), MAX_MANIFEST_BYTES)
            assert isinstance(done["num_examples"], int)
            return done
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); delete it, and the block is made again") from error

    @staticmethod
    def _tar(block: int) -> str:
        return f"{block:06d}.tar"

    def _described(self, block: int) -> Path:
        return self.out / BLOCKS / f"{block:06d}.json"


def made_from(folder: str, split: Split) -> dict[str, Any]:
    """What a job's `made_by` says of the split that it goes over."""
    about = split.manifest["about"]
    before = made_by_of(split)
    inherited = {name: before[name] for name in ("corpus", "corpus_digest") if before.get(name) is not None}
    return {
        "source": folder,
        "source_digest": split.digest,
        "licence": about.get("licence") or before.get("licence"),
        **inherited,
    }


def made_by_of(split: Split) -> dict[str, Any]:
    """What the job that wrote a split was begun with; empty where it was no job."""
    found = split.manifest["about"].get("made_by")
    return found if isinstance(found, dict) and "stage" in found else {}


def told(causes: Mapping[str, int]) -> str:
    """Causes and how often, the most frequent first."""
    return ", ".join(f"{number:,} x {cause}" for cause, number in Counter(causes).most_common()) or "no cause"


def digest_of(*described: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def locked(file: Path, *, waits: bool = True) -> Iterator[bool]:
    """Held by one process at a time, until it ends in whatever way; yields whether it is, always so where it waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
