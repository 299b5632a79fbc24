"""Promises to those who use webdataset: it reads our shards, we read theirs, and its stages may follow our stream."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from samples import keys_of, picture_bytes, read_by_webdataset, sound_bytes
from webdataset.filters import map as mapped
from webdataset.filters import select
from webdataset.pipeline import DataPipeline
from webdataset.writer import ShardWriter, TarWriter

from datamodules.index import write_index
from datamodules.loader import loader_of
from datamodules.media.limits import DecodeLimits
from datamodules.order import Order
from datamodules.plan import Plan, PlannedTask
from datamodules.record import Columns, to_record
from datamodules.sample import BadExampleError, Example, Item, Part, media_item, text_item
from datamodules.shards import Split, write_split
from datamodules.store import Store
from datamodules.stream import Source, StepStream

OURS = [
    Example(
        f"schlüssel-{n}-日本",
        Item((Part("text", f"query {n} ü \0 🎈"), Part("image", picture_bytes(seed=n), "png"), Part("code", "x = 1\n"))),
        media_item("audio", sound_bytes(pitch=200 + n), "wav"),
        (text_item("no", title="Titel"), media_item("page", picture_bytes(seed=n + 50), "png")),
        label="class",
        score=n / 2,
        relevant={"d1": 1.0},
        meta={"language": "de", "nested": [{"a": None}]},
    )
    for n in range(7)
]


def test_plain_webdataset_reads_every_one_of_our_shards_byte_for_byte(tmp_path):
    write_split(tmp_path / "s", OURS, examples_per_shard=3)
    tars = sorted((tmp_path / "s").glob("*.tar"))
    read = read_by_webdataset(*tars)
    assert [sample["__url__"] for sample in read] == [str(tars[n // 3]) for n in range(7)]
    own = ("__url__", "__local_path__")
    plain = [{name: value for name, value in sample.items() if name not in own} for sample in read]
    assert plain == [to_record(example) for example in OURS]


def test_plain_webdataset_reads_the_world(world):
    for folder in sorted(path.parent for path in world.glob("*/*/train/manifest.json")):
        split = Split(folder)
        read = read_by_webdataset(*sorted(folder.glob("*.tar")))
        assert [sample["__key__"] for sample in read] == split.keys
        for position in range(0, len(split), 17):
            written = to_record(split.read(position))
            assert {name: read[position][name] for name in written} == written


PICTURES = [picture_bytes("JPEG", seed=n) for n in range(8)]


def pairs_of_theirs() -> list[dict[str, Any]]:
    """Samples as a user of webdataset writes them: values are encoded by it."""
    return [
        {
            "__key__": f"set/n{n:02d}/Ähre {n}",
            "txt": f"a caption {n} ü",
            "jpg": PICTURES[n],
            "json": {"caption": f"caption {n}", "source": {"name": f"s{n}"}},
            "cls": n % 3,
            "similarity": str(n / 8).encode(),
            "page.png": picture_bytes(seed=n),
        }
        for n in range(8)
    ]


def indexed(folder: Path, tars: Sequence[Path], columns: Columns) -> Split:
    store = Store(tars[0].parent)
    write_index(folder, store, [tar.name for tar in tars], columns=columns, at=store)
    return Split(folder)


def test_their_shards_are_read_after_one_pass(tmp_path):
    with ShardWriter(str(tmp_path / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for sample in pairs_of_theirs():
            writer.write(sample)
    tars = sorted(tmp_path.glob("*.tar"))
    split = indexed(tmp_path / "index", tars, Columns(query=("txt",), target=("jpg",)))
    assert len(tars) == 3
    assert [split.read(n) for n in range(8)] == [
        Example(f"set/n{n:02d}/Ähre {n}", text_item(f"a caption {n} ü"), media_item("image", PICTURES[n], "jpg"))
        for n in range(8)
    ]
    assert split.keys == [sample["__key__"] for sample in read_by_webdataset(*tars)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (Columns(query=("json:caption",), target=("jpg",)), {"query": text_item("caption 5")}),
        (Columns(query=("json:source.name",), target=("jpg",)), {"query": text_item("s5")}),
        (Columns(query=("code=txt",), target=("jpg",)), {"query": text_item("a caption 5 ü", kind="code")}),
        (Columns(query=("txt",), target=("jpg",), label="cls"), {"query": text_item("a caption 5 ü"), "label": "5"}),
        (Columns(query=("txt",), target=("jpg",), label="json:caption"), {"label": "caption 5"}),
        (Columns(query=("txt",), target=("jpg",), score="similarity"), {"score": 5 / 8}),
        (Columns(query=("txt",), target=("jpg",), negative=("json:caption",)), {"negatives": (text_item("caption 5"),)}),
        (
            Columns(query=("txt", "json:caption"), target=("jpg",)),
            {"query": Item((Part("text", "a caption 5 ü"), Part("text", "caption 5")))},
        ),
        (Columns(query=("jpg",)), {"query": media_item("image", PICTURES[5], "jpg"), "target": None}),
        (Columns(target=("page=page.png",)), {"target": media_item("page", picture_bytes(seed=5), "png")}),
    ],
)
def test_columns_say_what_makes_an_example(tmp_path, columns, expected):
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, sample in enumerate(pairs_of_theirs()):
            writer.write({**sample, "cls": number})
    example = indexed(tmp_path / "index", [tmp_path / "a.tar"], columns).read(5)
    assert {name: getattr(example, name) for name in expected} == expected


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_tools_are_read_as_webdataset_reads_them(tmp_path, format):
    """As `tar cf a.tar folder` writes them: folders, upper-case extensions, long names, owners and times."""
    long = "x" * 90 + "/" + "y" * 90
    files = {"a/b.c/one.TXT": b"one", "a/b.c/one.JPG": PICTURES[0], f"{long}.txt": b"two", f"{long}.jpg": PICTURES[1]}
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("a/b.c")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname, info.uid = (
                len(data),
                1_700_000_000,
                "müller" if format != tarfile.USTAR_FORMAT else "m",
                1000,
            )
            tar.addfile(info, io.BytesIO(data))
    split = indexed(tmp_path / "index", [tmp_path / "a.tar"], Columns(query=("txt",), target=("jpg",)))
    expected = [(sample["__key__"], sample["txt"], sample["jpg"]) for sample in read_by_webdataset(tmp_path / "a.tar")]
    assert expected == [("a/b.c/one", b"one", PICTURES[0]), (long, b"two", PICTURES[1])]
    assert [split.read(n) for n in range(2)] == [
        Example(key, text_item(str(text, "utf-8")), media_item("image", picture, "jpg")) for key, text, picture in expected
    ]


def stream_over(split: Split, **more: Any) -> StepStream:
    """Batches (task, step, keys, rows, faults) of decoded examples."""
    plan = Plan({"theirs": PlannedTask(Order(len(split)), 4, 1.0)}, seed=1)
    collate: Any = keys_of
    defaults = {"first_step": 0, "num_steps": 6, "rank": 0, "world_size": 1}
    return StepStream(plan, {"theirs": Source(split, DecodeLimits())}, collate, **{**defaults, **more})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_stream_takes_their_shards(tmp_path, workers):
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for sample in pairs_of_theirs():
            writer.write(sample)
    stream = stream_over(indexed(tmp_path / "index", [tmp_path / "a.tar"], Columns(query=("txt",), target=("jpg",))))
    batches = list(loader_of(stream, workers, max_wait_seconds=60))
    assert [step for _, step, *_ in batches] == list(range(6))
    assert not any(faults for *_, faults in batches)
    keys = [key for _, _, keys, *_ in batches for key in keys]
    assert all(sorted(keys[n : n + 8]) == sorted(sample["__key__"] for sample in pairs_of_theirs()) for n in (0, 8, 16))


def test_a_sample_that_lacks_a_field_is_listed_and_replaced(tmp_path):
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, sample in enumerate(pairs_of_theirs()):
            writer.write({name: value for name, value in sample.items() if (name, number) != ("txt", 3)})
    columns = Columns(query=("txt",), target=("jpg",))
    found = write_index(tmp_path / "index", Store(tmp_path), ["a.tar"], columns=columns, at=Store(tmp_path))
    assert found["malformed"] == [[3, "a.tar", "set/n03/Ähre 3", "it has no file 'txt'; it has jpg"]]
    split = Split(tmp_path / "index")
    with pytest.raises(BadExampleError, match=r"a\.tar: example 'set/n03/Ähre 3' is malformed: it has no file 'txt'") as caught:
        split.read(3)
    assert caught.value.cause == "malformed record"
    batches: list[Any] = list(stream_over(split))
    faults = [fault for *_, faults in batches for fault in faults]
    assert {(fault.key, fault.cause) for fault in faults} == {("set/n03/Ähre 3", "malformed record")}
    assert all(len(keys) == 4 and "set/n03/Ähre 3" not in keys for _, _, keys, *_ in batches)


def step_and_keys(batch: tuple[Any, ...]) -> list[Any]:
    return [batch[1], batch[2]]  # a loader makes lists of tuples


@pytest.mark.parametrize("workers", [0, 2])
def test_webdatasets_stages_may_follow_our_stream(tmp_path, workers):
    write_split(tmp_path / "s", OURS)
    stream = stream_over(Split(tmp_path / "s"))
    batches: list[Any] = list(stream)
    pipeline: Any = DataPipeline(stream, mapped(step_and_keys), select(lambda found: found[0] % 2 == 0))
    assert sorted(loader_of(pipeline, workers, max_wait_seconds=60)) == [step_and_keys(batch) for batch in batches][::2]
    whole: Any = DataPipeline(stream, mapped(step_and_keys))
    assert list(loader_of(whole, workers, max_wait_seconds=60)) == [step_and_keys(batch) for batch in batches]
    resumed: Any = DataPipeline(stream_over(Split(tmp_path / "s"), first_step=3), mapped(step_and_keys))
    assert list(resumed) == [step_and_keys(batch) for batch in batches[3:]]
