"""Promises of conf=verify and conf=index: what is bad is found, named and left out; nothing hangs or is tried twice."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from samples import picture_bytes
from webdataset.writer import TarWriter

import datamodules.verify
from datamodules.index import index_tar
from datamodules.media.limits import DecodeLimits
from datamodules.recipes.tars import index
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split, write_split
from datamodules.stream import Source
from datamodules.verify import verify


def a_split(folder: Path, bad: dict[int, bytes], number: int = 20) -> Path:
    contents = [bad.get(n, picture_bytes(seed=n)) for n in range(number)]
    examples = [
        Example(f"k{n:03d}", text_item(f"text {n}"), media_item("image", data, "png")) for n, data in enumerate(contents)
    ]
    write_split(folder, examples, examples_per_shard=7)
    return folder


def listed(folder: Path) -> list[dict]:
    return json.loads((folder / "quarantine.json").read_text())["examples"]


def test_what_cannot_be_used_is_listed_with_its_cause_and_left_out(tmp_path, capsys):
    folder = a_split(tmp_path / "set" / "train", {4: b"no picture", 19: b""})
    tar = folder / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"text 9")] ^= 1
    tar.write_bytes(data)
    verify(str(tmp_path))
    found = listed(folder)
    assert [(bad["key"], bad["shard"].rpartition("/")[2], bad["cause"]) for bad in found] == [
        ("k004", "000000.tar", "does not decode"),
        ("k009", "000001.tar", "damaged bytes"),
        ("k019", "000002.tar", "does not decode"),
    ]
    split = Split(folder)
    assert len(split) == 17
    assert split.keys == [f"k{n:03d}" for n in range(20) if n not in (4, 9, 19)]
    assert [split.read(position).key for position in range(17)] == split.keys
    assert [split.key(position) for position in range(17)] == split.keys
    assert split.shard_ends.tolist() == [6, 12, 17]
    assert len(Split(folder, quarantine=False)) == 20
    shown = capsys.readouterr().out
    assert "does not decode: 2, damaged bytes: 1" in shown
    assert "000001.tar is not the file that was indexed" in shown


def test_a_clean_split_gets_no_list_and_loses_an_old_one(tmp_path):
    folder = a_split(tmp_path / "train", {3: b"bad"})
    verify(str(tmp_path))
    assert len(listed(folder)) == 1
    a_split(folder, {})
    verify(str(tmp_path), splits=["train"])
    assert not (folder / "quarantine.json").exists()


def test_a_list_for_other_shards_is_refused(tmp_path):
    folder = a_split(tmp_path / "train", {3: b"bad"})
    verify(str(tmp_path))
    old = (folder / "quarantine.json").read_text()
    a_split(folder, {}, 30)
    (folder / "quarantine.json").write_text(old)
    with pytest.raises(ValueError, match="made for other shards"):
        Split(folder)
    (folder / "quarantine.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Split(folder)


def test_an_example_that_hangs_or_kills_its_process_is_found_too(tmp_path, monkeypatch):
    folder = a_split(tmp_path / "train", {})
    read = Source.read

    def wicked(self, position):
        if self.split.key(position) == "k005":
            time.sleep(60)
        if self.split.key(position) in ("k006", "k019"):
            os._exit(7)
        return read(self, position)

    monkeypatch.setattr(Source, "read", wicked)
    monkeypatch.setattr(datamodules.verify, "GRACE_SECONDS", 0.5)
    verify(str(tmp_path), decode=DecodeLimits(max_seconds=1.0))
    assert [(bad["key"], bad["cause"]) for bad in listed(folder)] == [
        ("k005", "hangs"),
        ("k006", "crashes"),
        ("k019", "crashes"),
    ]


def test_what_was_written_down_before_a_stop_is_not_tried_again(tmp_path, monkeypatch):
    folder = a_split(tmp_path / "train", {1: b"bad", 15: b"bad"})
    monkeypatch.setattr(datamodules.verify, "CHUNK", 4)
    monkeypatch.setattr(datamodules.verify, "SAVE_SECONDS", 0.0)
    log = tmp_path / "tried"
    read = Source.read

    def noted(self, position):
        with log.open("a") as lines:
            lines.write(f"{position}\n")
        if position == 13 and not (tmp_path / "go").exists():
            time.sleep(60)
        return read(self, position)

    monkeypatch.setattr(Source, "read", noted)
    tried = datamodules.verify._tried(Split(folder, quarantine=False), DecodeLimits(), 1)
    while next(tried)[0] < 12:
        pass
    time.sleep(0.2)
    del tried
    (tmp_path / "go").touch()
    before = log.read_text().split()
    verify(str(tmp_path))
    assert sorted(map(int, log.read_text().split()[len(before) :])) == list(
        range(8, 20)
    )  # the last chunk was not written down yet
    assert [bad["key"] for bad in listed(folder)] == ["k001", "k015"]
    assert not (folder / ".verified.json").exists()


def test_there_must_be_a_split(tmp_path):
    with pytest.raises(ValueError, match="there is no split below"):
        verify(str(tmp_path))


def foreign(folder: Path, number: int = 5) -> None:
    folder.mkdir()
    with TarWriter(str(folder / "a.tar")) as tar:
        for n in range(number):
            tar.write(
                {"__key__": f"x/{n}", "txt": f"caption {n}", "png": picture_bytes(seed=n), "json": {"deep": {"text": f"{n}"}}}
            )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_tars_of_others_become_a_split_where_they_lie(tmp_path, capsys):
    foreign(tmp_path / "tars")
    index(str(tmp_path / "tars"), query=("txt", "json:deep.text"), target=("page=png",), label="txt")
    split = Split(tmp_path / "tars")
    example = split.read(3)
    assert example == Example(
        "x/3",
        Item((Part("text", "caption 3"), Part("text", "3"))),
        media_item("page", picture_bytes(seed=3), "png"),
        label="caption 3",
    )
    assert "index in" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_index_may_lie_elsewhere_and_samples_that_make_no_example_are_left_out(tmp_path, capsys):
    foreign(tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "b.tar", "w") as tar:
        for name, data in {"y0.txt": b"alone", "y1.txt": b"whole", "y1.png": picture_bytes()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pattern = f"{tmp_path}/tars/{{a,b}}.tar"
    index(pattern, out=str(tmp_path / "index"), query=("txt",), target=("png",), num_workers=2)
    split = Split(tmp_path / "index")
    assert split.keys == [*(f"x/{n}" for n in range(5)), "y1"]
    assert split.read(5).query == text_item("whole")
    assert listed(tmp_path / "index")[0]["key"] == "y0"
    assert "1 x it has no file 'png'; it has txt" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": ("seg.xyz",)}, "what kind is the field 'seg.xyz'"),
        ({"label": "txt"}, "give query or target"),
        ({"query": ("jpg",)}, "no sample of .* makes an example; .* no file 'jpg'"),
        ({}, "no sample of .* makes an example; .* the record has the unknown field 'deep'"),
    ],
)
def test_what_cannot_be_indexed_is_refused(tmp_path, arguments, message):
    foreign(tmp_path / "tars")
    with pytest.raises(ValueError, match=message):
        index(str(tmp_path / "tars"), **arguments)
    assert not (tmp_path / "tars" / "manifest.json").exists()


def test_missing_tars_are_named(tmp_path):
    foreign(tmp_path / "tars")
    with pytest.raises(ValueError, match=r"1 of the 2 tars .* are missing, the first is b.tar"):
        index(f"{tmp_path}/tars/{{a,b}}.tar", query=("txt",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no tar in"):
        index(str(tmp_path / "empty"), query=("txt",))


def test_indexing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    foreign(tmp_path / "tars")
    (tmp_path / "tars" / "b.tar").write_bytes((tmp_path / "tars" / "a.tar").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"b\.tar"):
        index(str(tmp_path / "tars"), query=("txt",))
    (tmp_path / "tars" / "b.tar").write_bytes((tmp_path / "tars" / "a.tar").read_bytes())
    indexed = []
    monkeypatch.setattr(
        "datamodules.index.index_tar", lambda path, columns: (indexed.append(path.name), index_tar(path, columns))[1]
    )
    index(str(tmp_path / "tars"), query=("txt",))
    assert indexed == ["b.tar"]
    assert len(Split(tmp_path / "tars")) == 10
