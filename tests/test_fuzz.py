"""Promises of a split under random mutations: it gives its own examples, or refuses; it never gives another one."""

import hashlib
import json
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from changes import FIRST, FULL, outcomes
from samples import pairs

from datamodules.sample import Example
from datamodules.shards import Split, write_split


def reads_checked(split: Split, examples: list[Example]) -> tuple[int, int]:
    """Reads that gave what was written, and reads that were refused; anything else fails."""
    right = 0
    for position, example in enumerate(examples):
        try:
            read = split.read(position)
        except ValueError:
            continue
        assert read == example, f"position {position} gave something else"
        right += 1
    return right, len(examples) - right


def mutate(data: bytearray, chance: random.Random, *, same_size: bool) -> None:
    """Flip, overwrite, duplicate, move, insert or delete, at random."""
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    length = min(chance.choice((1, 8, 512, 1024)), len(data) - max(at, other))
    match chance.randrange(4 if same_size else 6):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + length] = chance.randbytes(length)
        case 2:
            data[at : at + length] = data[other : other + length]
        case 3:
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
            del data[len(data) :]
        case 4:
            data[at:at] = data[other : other + length]
        case 5:
            del data[at : at + length]


class Fuzz:
    """A split in memory, changed and put right again over and over."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.examples = folder, pairs(number)
        write_split(folder, self.examples, examples_per_shard=number // 2)
        self.whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.open = Split(folder)
        self.counts = {"mutants": 0, "refused at the door": 0, "reads verified": 0, "reads refused": 0}
        assert reads_checked(self.open, self.examples) == (number, 0)

    def shard(self, chance: random.Random) -> None:
        """Change a shard that is held open, its size kept."""
        name = f"{chance.randrange(2):06d}.tar"
        data = bytearray(self.whole[name])
        mutate(data, chance, same_size=True)
        data = data[: len(self.whole[name])].ljust(len(self.whole[name]), b"\0")
        with (self.folder / name).open("r+b") as file:
            file.write(data)
        self.count(self.open)
        with (self.folder / name).open("r+b") as file:
            file.write(self.whole[name])

    def opened(self, name: str, chance: random.Random) -> None:
        """Change a file and open the split."""
        data = bytearray(self.whole[name])
        while data == self.whole[name]:
            mutate(data, chance, same_size=False)
        (self.folder / name).write_bytes(data)
        try:
            self.count(Split(self.folder))
        except ValueError:
            self.counts["mutants"] += 1
            self.counts["refused at the door"] += 1
        (self.folder / name).write_bytes(self.whole[name])

    def count(self, split: Split) -> None:
        right, refused = reads_checked(split, self.examples)
        self.counts["mutants"] += 1
        self.counts["reads verified"] += right
        self.counts["reads refused"] += refused


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def fuzzed(memory: Path, num_examples: int, num_mutants: int) -> dict[str, int]:
    """Counts of a run: of ten mutants seven change a shard in place, and each other file is changed once."""
    fuzz, chance = Fuzz(memory / "s", num_examples), random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(num_mutants):
        if number % 10 < 7:
            fuzz.shard(chance)
        else:
            fuzz.opened((FIRST, "examples.npy", "members.npy")[number % 10 - 7], chance)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 256 * 2**20
    print(f"{fuzz.counts}")
    return fuzz.counts


def test_a_mutated_split_gives_its_own_examples_or_none(memory):
    counts = fuzzed(memory, 30, 600)
    assert counts["mutants"] == 600
    assert counts["refused at the door"] >= 120
    assert counts["reads verified"] > 10_000
    assert counts["reads refused"] > 100


@pytest.mark.parametrize("name", ["manifest.json", "examples.npy", "members.npy"])
def test_a_mutated_index_gives_its_own_examples_or_none(memory, name):
    """The tables with their hashes made right: someone else may have written them."""
    fuzz, chance, wrong = Fuzz(memory / "s", 30), random.Random(1), {}
    manifest = fuzz.whole["manifest.json"]
    for _ in range(300):
        data = bytearray(fuzz.whole[name])
        mutate(data, chance, same_size=False)
        (fuzz.folder / name).write_bytes(data)
        if name != "manifest.json":
            values = json.loads(manifest)
            values["tables"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (fuzz.folder / "manifest.json").write_text(json.dumps(values))
        try:
            split = Split(fuzz.folder)
            assert all(example in fuzz.examples for example in outcomes(split).values() if isinstance(example, Example))
        except ValueError:
            pass
        except Exception as error:
            wrong.setdefault(f"{type(error).__name__}: {error}"[:80], bytes(data))
        (fuzz.folder / name).write_bytes(fuzz.whole[name])
        (fuzz.folder / "manifest.json").write_bytes(manifest)
    assert not list(wrong)


@FULL
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_splits(memory):
    counts = fuzzed(memory, 48, 100_000)
    assert counts["mutants"] == 100_000
    assert counts["reads verified"] >= 3_000_000
