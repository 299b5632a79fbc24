"""Promises of a teacher's vectors: bit for bit from an array through a shard to a batch, and nothing damaged gets through."""

import io
import tarfile
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.collate import Collate
from datamodules.decode import decode_example
from datamodules.media.limits import DecodeLimits
from datamodules.record import from_record, to_record
from datamodules.sample import BadExampleError, Example, Item, Part
from datamodules.shards import Split, write_split
from datamodules.tasks import TaskSpec
from datamodules.vector import from_npy, to_npy


def item(text: str, teacher: np.ndarray | None = None) -> Item:
    return Item((Part("text", text),), teacher=teacher)


def numbers(seed: int, dtype: str = "float32", width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(dtype)


def bits(vector: np.ndarray | None) -> tuple[str, bytes]:
    assert vector is not None
    return vector.dtype.str, vector.tobytes()


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_come_back_from_a_shard_bit_for_bit(tmp_path, dtype):
    examples = [
        Example("a", item("q", numbers(0, dtype)), item("t", numbers(1, dtype)), (item("n"), item("m", numbers(2, dtype)))),
        Example("b", item("q2"), item("t2", numbers(3, dtype))),
    ]
    write_split(tmp_path / "s", examples)
    split = Split(tmp_path / "s")
    for position, example in enumerate(examples):
        found = decode_example(split.read(position), DecodeLimits())
        assert found == example
        for place in ("query", "target"):
            stored, given_item = getattr(found, place), getattr(example, place)
            assert (stored.teacher is None) == (given_item.teacher is None)
            assert stored.teacher is None or bits(stored.teacher) == bits(given_item.teacher)
    assert split.read(0).negatives[0].teacher is None
    assert bits(split.read(0).negatives[1].teacher) == bits(examples[0].negatives[1].teacher)
    with tarfile.open(tmp_path / "s" / "000000.tar") as tar:
        names = {name for name in tar.getnames() if name.endswith(".npy")}
    assert names == {"a.query.npy", "a.target.npy", "a.negative1.npy", "b.target.npy"}


def test_a_damaged_vector_is_told_by_its_name(tmp_path):
    write_split(tmp_path / "s", [Example("a", item("q", numbers(0)), item("t"))])
    tar = tmp_path / "s" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(numbers(0).tobytes())] ^= 1
    tar.write_bytes(data)
    with pytest.raises(BadExampleError, match=r"000000\.tar: a\.query\.npy is damaged"):
        Split(tmp_path / "s").read(0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(np.array([1.0, np.nan], "<f4")), "NaN or infinity"),
        (saved(np.array([1.0, np.inf], "<f2")), "NaN or infinity"),
        (saved(np.ones(2)), "little-endian float16 or float32"),
        (saved(np.ones(2, ">f4")), "little-endian float16 or float32"),
        (saved(np.ones((2, 2), "<f4")), "of one dimension"),
        (saved(np.array([{}])), "no .npy"),
        (saved(np.ones(0, "<f4")), "0 dimensions"),
        (saved(np.ones(2**16 + 1, "<f2")), "65537 dimensions"),
        (saved(np.ones(3, "<f4"))[:-1], "11 bytes for 3"),
        (saved(np.ones(3, "<f4")) + b"x", "13 bytes for 3"),
        (b"", "no .npy"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "no .npy"),
    ],
)
def test_what_is_no_vector_is_refused_as_a_malformed_record(data, message):
    record = to_record(Example("a", item("q", numbers(0)), item("t")))
    with pytest.raises(ValueError, match=message):
        from_record("a", {name: value for name, value in record.items() if name != "__key__"} | {"query.npy": data})


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=4), st.integers(0, 160))
def test_any_bytes_are_a_vector_or_a_value_error(seed, changes, length):
    data = bytearray(to_npy(numbers(seed)))
    for place, value in changes:
        data[place % len(data)] = value
    data = bytes(data[: length or None])
    try:
        found = from_npy(data)
    except ValueError:
        return
    with warnings.catch_warnings(action="ignore"):
        assert bits(found) == bits(np.load(io.BytesIO(data), allow_pickle=False))


def test_a_vector_that_could_not_be_read_is_not_written():
    for teacher in (np.ones(3), np.ones((1, 3), "f4"), np.full(3, np.nan, "f4")):
        with pytest.raises(ValueError, match="vector"):
            to_record(Example("a", item("q", teacher)))


def test_a_batch_holds_the_vectors_of_its_items_and_nan_where_there_are_none(processor):
    examples = [
        Example("a", item("qa", numbers(0)), item("ta"), tuple(item(f"n{n}", numbers(n)) for n in range(9))),
        Example("b", item("qb"), item("tb")),
        Example("c", item("qc", numbers(2, "float16")), item("tc"), (item("m"),)),
    ]
    decoded = [decode_example(example, DecodeLimits()) for example in examples]
    collate = Collate({"t": TaskSpec("x", query_prompt="q: {text}", target_prompt="t: {text}", negatives=3)}, processor, 0.0, 0)
    batch = collate("t", 0, decoded).to("cpu")
    assert batch.query_vector is not None
    assert batch.query_vector.isnan().all(1).tolist() == [False, True, False]
    assert np.array_equal(batch.query_vector[2].numpy(), numbers(2, "float16").astype(np.float32))
    assert batch.target_vector is not None
    assert batch.target_vector.isnan().all()
    assert batch.negative_vector is not None
    assert batch.negative_id is not None
    contents = {negative.content_id: negative.teacher for example in examples for negative in example.negatives}
    assert len(batch.negative_vector) == 4  # three of the nine, and the only one
    for content, vector in zip(batch.negative_id.tolist(), batch.negative_vector, strict=True):
        teacher = contents[content]
        assert vector.isnan().all() if teacher is None else np.array_equal(vector.numpy(), teacher)
    pairs = batch.pairs()
    assert (pairs.negative, pairs.negative_vector, pairs.negative_row) == (None, None, None)
    assert torch.equal(pairs.query_id, batch.query_id)


def test_a_batch_without_vectors_has_none_and_two_teachers_are_refused(processor):
    examples = [Example(str(n), item("q", numbers(n, width=4 + n)), item("t")) for n in range(2)]
    collate = Collate({"t": TaskSpec("x")}, processor, 0.0, 0)
    with pytest.raises(ValueError, match=r"task 't': examples have teacher vectors of widths \[4, 5\]"):
        collate("t", 0, [decode_example(example, DecodeLimits()) for example in examples])
    plain = collate("t", 0, [decode_example(Example("a", item("q"), item("t")), DecodeLimits())])
    assert (plain.query_vector, plain.target_vector, plain.negative_vector) == (None, None, None)
