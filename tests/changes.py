"""What tests of faults change and look at: bytes of a split's files, tars written by hand, what reading gives then."""

import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import keys_of, pairs

from datamodules.media.limits import DecodeLimits
from datamodules.order import Order
from datamodules.plan import Plan, PlannedTask
from datamodules.sample import BadExampleError, Example
from datamodules.shards import Split, write_split
from datamodules.stream import Source, StepStream
from datamodules.tasks import TaskSpec

FULL = pytest.mark.full


ROOT = Path(__file__).parents[1]


FIRST = "000000.tar"


Change = Callable[[Path], object]


def edited(path: Path, edit: Callable[[bytearray], object]) -> None:
    """Change a file's bytes where it lies: whoever holds it open sees the change."""
    data = bytearray(path.read_bytes())
    edit(data)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def flipped(where: bytes, name: str = FIRST, after: int = 0) -> Change:
    """Flips a bit of the byte that lies so far after the first place of `where` in a file of the split."""

    def flip(data: bytearray) -> None:
        data[data.index(where) + after] ^= 1

    return lambda folder: edited(folder / name, flip)


def outcomes(split: Split) -> dict[int, Example | BadExampleError]:
    """What reading gives at every position."""
    found: dict[int, Example | BadExampleError] = {}
    for position in range(len(split)):
        try:
            found[position] = split.read(position)
        except BadExampleError as error:
            found[position] = error
    return found


def bad_in(split: Split, examples: list[Example]) -> dict[str, str]:
    """Keys that are refused and why; everything else must be as it was written."""
    found = outcomes(split)
    bad = {examples[n].key: error for n, error in found.items() if isinstance(error, BadExampleError)}
    assert [found[n] for n, example in enumerate(examples) if example.key not in bad] == [
        example for example in examples if example.key not in bad
    ]
    assert all(f"{FIRST}: {split.key(int(key[1:]))}." in str(error) for key, error in bad.items())
    return {key: error.cause for key, error in bad.items()}


def stream_of(split: Split, *, batch_size: int = 6, num_steps: int = 5, rank: int = 0, ranks: int = 1, **more) -> StepStream:
    """A stream over one split whose batches are (task, step, keys, rows, faults)."""
    plan = Plan({"t": PlannedTask(Order(len(split)), batch_size, 1.0)}, seed=3)
    source = more.get("source", Source)(split, DecodeLimits())
    collate: Any = keys_of
    return StepStream(plan, {"t": source}, collate, first_step=0, num_steps=num_steps, rank=rank, world_size=ranks)


def foreign(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def once(values: Any, seconds: float = 60.0) -> list[Any]:
    """All a loader gives; a test that hangs is one that fails."""
    began, found = time.monotonic(), []
    for value in values:
        assert time.monotonic() - began < seconds
        found.append(value)
    return found


TASKS = {
    "world/text-image": TaskSpec("world/text-image/train", query_prompt="q: {text}", batch_size=8, negatives=1),
    "world/text-text": TaskSpec("world/text-text/train", batch_size=4, rate=2.0),
}


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with a right checksum, whatever its size says."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind.ljust(101, b"\0") + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return block[:148] + f"{sum(block):06o}\0 ".encode() + block[156:]


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, f"{len(data):011o}".encode(), kind) + data + bytes(-len(data) % 512)


def pax(key: str, value: str) -> bytes:
    record = f" {key}={value}\n"
    length = len(record) + 2
    length += len(str(length)) - 2
    return member(b"pax", f"{len(record) + len(str(len(record) + 2))}{record}".encode(), b"x")


END = bytes(1024)


def other_bytes(folder: Path) -> None:
    """Another shard of the same size in its place, header by header."""
    size = (folder / FIRST).stat().st_size
    write_split(folder.with_name("other"), pairs(12, text="ohno"))
    data = (folder.with_name("other") / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:size].ljust(size, b"\0"))
