"""Promises of shards: readable by WebDataset, checked on every read, never half-written."""

import errno
import json
from pathlib import Path

import pytest
from samples import picture_bytes, sound_bytes
from webdataset.compat import WebDataset

from datamodules.record import to_record
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split, write_split

EXAMPLES = [
    Example(
        f"e{n}",
        Item((Part("text", f"query {n} ü"), Part("image", picture_bytes(seed=n), "png"), Part("text", "end"))),
        media_item("audio", sound_bytes(pitch=200 + n), "wav"),
        (text_item("no", title="t"), media_item("image", picture_bytes(seed=n + 50), "png")),
        label="class",
        score=n / 2,
        relevant={"d1": 1.0},
        meta={"language": "en"},
    )
    for n in range(7)
] + [Example("only-target", target=text_item("document"))]


def test_what_is_written_is_read_back(tmp_path):
    assert write_split(tmp_path / "set" / "train", EXAMPLES, about={"licence": "none"}, examples_per_shard=3) == 8
    split = Split(tmp_path / "set" / "train")
    assert [split.read(n) for n in range(len(split))] == EXAMPLES
    assert [shard["num_examples"] for shard in split.manifest["shards"]] == [3, 3, 2]
    assert split.manifest["about"] == {"licence": "none"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_plain_webdataset_reads_the_same_bytes(tmp_path):
    write_split(tmp_path / "train", EXAMPLES, examples_per_shard=100)
    read = list(WebDataset(str(tmp_path / "train" / "000000.tar"), shardshuffle=False))
    for sample, example in zip(read, EXAMPLES, strict=True):
        written = to_record(example)
        assert sample["__key__"] == written["__key__"]
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == {
            k: v for k, v in written.items() if k != "__key__"
        }


def test_the_same_examples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_split(tmp_path / name, EXAMPLES)
    assert (tmp_path / "a" / "000000.tar").read_bytes() == (tmp_path / "b" / "000000.tar").read_bytes()
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_a_flipped_byte_is_found_and_named(tmp_path):
    write_split(tmp_path / "train", EXAMPLES)
    tar = tmp_path / "train" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"query 3") + 2] ^= 1
    tar.write_bytes(data)
    split = Split(tmp_path / "train")
    assert split.read(2) == EXAMPLES[2]
    with pytest.raises(ValueError, match=r"000000\.tar: e3\.json is damaged"):
        split.read(3)


def test_a_missing_short_or_changed_shard_is_refused_at_the_door(tmp_path):
    def fresh():
        write_split(tmp_path / "train", EXAMPLES, examples_per_shard=4)
        return tmp_path / "train"

    (fresh() / "000001.tar").unlink()
    with pytest.raises(ValueError, match=r"000001\.tar is missing though"):
        Split(tmp_path / "train")
    tar = fresh() / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ValueError, match="its manifest says"):
        Split(tmp_path / "train")
    table = fresh() / "examples.npy"
    table.write_bytes(table.read_bytes().replace(b"e0", b"e9"))
    with pytest.raises(ValueError, match="was changed after it was written"):
        Split(tmp_path / "train")
    manifest = fresh() / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shards": [], "num_examples": 0}))
    with pytest.raises(ValueError, match="is empty"):
        Split(tmp_path / "train")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "polyphony-shards/9"}))
    with pytest.raises(ValueError, match="this version reads"):
        Split(tmp_path / "train")


def test_no_split_names_the_splits_beside_it(tmp_path):
    write_split(tmp_path / "set" / "train", EXAMPLES)
    with pytest.raises(ValueError, match="Splits found beside it: train"):
        Split(tmp_path / "set" / "tset")


def test_an_empty_split_and_a_repeated_key_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="gave no example"):
        write_split(tmp_path / "train", [])
    with pytest.raises(ValueError, match="'e0' came twice"):
        write_split(tmp_path / "train", [EXAMPLES[0], EXAMPLES[0]])
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_keeps_the_former_split(tmp_path, monkeypatch):
    write_split(tmp_path / "train", EXAMPLES)
    rename = Path.rename

    def refuse(path, target):
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="could not write"):
        write_split(tmp_path / "train", EXAMPLES[:2])
    assert len(Split(tmp_path / "train")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_full_disk_keeps_the_former_split(tmp_path):
    write_split(tmp_path / "train", EXAMPLES)

    def examples():
        yield EXAMPLES[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_split(tmp_path / "train", examples())
    assert len(Split(tmp_path / "train")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
