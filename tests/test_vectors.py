"""Promises of stored vectors: pairs of files whole or absent, one sequence of mapped chunks, nothing of another making."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changes import ROOT
from rich.console import Console

from datamodules.job import ArrayTask
from datamodules.sample import Example, text_item
from datamodules.shards import Split, write_split
from lightning_modules.vectors import Vectors

KILLED = """
import os, signal, sys
import numpy as np
from datamodules.job import ArrayTask
from datamodules.shards import Split
from lightning_modules.vectors import Vectors

folder, split, when = sys.argv[1:]
given = {"prompt": None, "encoder": "e", "prefix": 4, "dtype": "float32", "block_size": 10, "task": ArrayTask(0, 1)}
vectors = Vectors(folder, Split(split), "target", **given)
real, left = os.replace, [int(when)]

def replace(*places):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*places)

os.replace = replace
for block in range(vectors.num_blocks):
    at = np.array(vectors.positions(block))
    vectors.store(block, at + 1000, np.repeat(at[:, None], 4, 1).astype(np.float32))
"""


@pytest.fixture
def split(tmp_path) -> Split:
    examples = [Example(f"k{n:02d}", text_item(f"q {n}"), text_item(f"t {n}")) for n in range(34)]
    write_split(tmp_path / "split", examples)
    return Split(tmp_path / "split")


def opened(folder: Path, split: Split, *, index: int = 0, size: int = 1, **more: Any) -> Vectors:
    given: dict[str, Any] = {"prompt": None, "encoder": "e", "prefix": 4, "dtype": "float32", "block_size": 10, **more}
    return Vectors(folder, split, given.pop("column", "target"), task=ArrayTask(index, size), **given)


def values(positions: range | np.ndarray) -> np.ndarray:
    return np.repeat(np.array(positions)[:, None], 4, 1).astype(np.float32)


def fill(vectors: Vectors, *, ids: int = 1000) -> list[int]:
    """Store what is not done: at each position its own number; the blocks that were."""
    stored = []
    for block in vectors.blocks(Console(quiet=True)):
        positions = vectors.positions(block)
        vectors.store(block, np.array(positions) + ids, values(positions))
        stored.append(block)
    return stored


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_blocks_read_as_one_sequence(split, tmp_path):
    vectors = opened(tmp_path / "v", split)
    assert vectors.missing() == [0, 1, 2, 3]
    assert fill(vectors) == [0, 1, 2, 3]
    assert vectors.missing() == []
    assert vectors.ids().tolist() == list(range(1000, 1034))
    chunks = list(vectors.chunks())
    assert [len(chunk.positions) for chunk in chunks] == [10, 10, 10, 4]
    np.testing.assert_array_equal(np.concatenate([chunk.positions for chunk in chunks]), np.arange(34))
    np.testing.assert_array_equal(np.concatenate([chunk.vectors for chunk in chunks]), values(range(34)))
    wanted = np.arange(34) % 5 == 3
    some = list(vectors.chunks(wanted))
    assert np.concatenate([chunk.positions for chunk in some]).tolist() == [3, 8, 13, 18, 23, 28, 33]
    np.testing.assert_array_equal(np.concatenate([chunk.vectors for chunk in some]), values(np.flatnonzero(wanted)))
    at = np.array([33, 0, 12, 12, 31, 9])
    np.testing.assert_array_equal(vectors.rows(at), values(at))
    assert vectors.rows(np.array([], np.int64)).shape == (0, 4)


def test_chunks_are_mapped_and_not_loaded(split, tmp_path):
    vectors = opened(tmp_path / "v", split)
    fill(vectors)
    for chunk in vectors.chunks():
        assert isinstance(chunk.vectors, np.memmap)
        assert not chunk.vectors.flags.writeable


def test_half_precision_is_stored_and_rows_are_single(split, tmp_path):
    vectors = opened(tmp_path / "v", split, dtype="float16")
    fill(vectors)
    assert next(vectors.chunks()).vectors.dtype == np.float16
    assert vectors.rows(np.array([3])).dtype == np.float32


def test_tasks_in_any_order_write_the_bytes_of_one(split, tmp_path):
    fill(opened(tmp_path / "one", split))
    for index in (2, 0, 1):
        task = opened(tmp_path / "three", split, index=index, size=3)
        assert fill(task) == [b for b in range(4) if b % 3 == index]
        assert (not task.missing()) == (index == 1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


def test_a_block_without_both_files_is_made_again(split, tmp_path):
    fill(opened(tmp_path / "v", split))
    whole = files_of(tmp_path / "v")
    for spoil in (
        lambda: (tmp_path / "v" / "000001.npy").unlink(),
        lambda: (tmp_path / "v" / "000001.ids.npy").unlink(),
        lambda: (tmp_path / "v" / "blocks" / "000001.json").unlink(),
        lambda: (tmp_path / "v" / "000001.npy").write_bytes(whole["000001.npy"][:-1]),
    ):
        spoil()
        vectors = opened(tmp_path / "v", split)
        assert vectors.missing() == [1]
        assert fill(vectors) == [1]
        assert files_of(tmp_path / "v") == whole


@pytest.mark.parametrize("when", [1, 5])
def test_a_process_killed_at_any_rename_leaves_whole_blocks_to_go_on_from(split, tmp_path, when):
    fill(opened(tmp_path / "whole", split))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "v"), str(split.folder), str(when)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    vectors = opened(tmp_path / "v", split)
    assert vectors.missing() == list(range(when // 3, 4))  # ids, vectors, and that they are done: three renames to a block
    fill(vectors)
    left = {name: data for name, data in files_of(tmp_path / "v").items() if not name.endswith(".partial")}
    assert left == files_of(tmp_path / "whole")


def test_vectors_of_another_making_are_refused(split, tmp_path):
    fill(opened(tmp_path / "v", split))
    write_split(tmp_path / "other", [Example("k", text_item("q"), text_item("t"))])
    changes: tuple[tuple[str, Any], ...] = (
        ("encoder", "f"),
        ("prompt", "x {text}"),
        ("prefix", 2),
        ("dtype", "float16"),
        ("block_size", 11),
        ("column", "query"),
    )
    for name, value in changes:
        with pytest.raises(ValueError, match=f"was begun otherwise: {name} was .*, now .*{value}.*Give another folder"):
            opened(tmp_path / "v", split, **dict[str, Any]({name: value}))
    with pytest.raises(ValueError, match="split was"):
        opened(tmp_path / "v", Split(tmp_path / "other"))


def test_what_cannot_be_written_is_named_and_leaves_nothing(split, tmp_path, monkeypatch):
    vectors = opened(tmp_path / "v", split)

    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"could not write .*000000\.ids\.npy: No space left"):
        fill(vectors)
    assert not list((tmp_path / "v").glob("*.npy*"))
    assert not list((tmp_path / "v").glob("*.partial"))
