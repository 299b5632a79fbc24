"""Promises of the stream: the same batches for any number of workers and ranks, prompts as the papers say, clear refusals."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import ids_of, picture_bytes

from datamodules.collate import Collate, with_prompt
from datamodules.decode import decode_example
from datamodules.media.limits import DecodeLimits
from datamodules.processors.processor import ProcessorConfig
from datamodules.sample import Example, content_id_of_label, media_item, text_item
from datamodules.shards import Split, write_split
from datamodules.tasks import BenchmarkSpec, TaskSpec, modalities_of
from datamodules.training import TrainingData

TASKS = {
    "world/text-image": TaskSpec(
        "world/text-image/train", query_prompt="task: search result | query: {text}", batch_size=8, negatives=1
    ),
    "world/text-text": TaskSpec("world/text-text/train", batch_size=4, rate=2.0),
}


def data_of(world: Path, tmp_path: Path, *, rank=0, world_size=1, **arguments) -> TrainingData:
    """TrainingData with a stand-in for the trainer it asks for rank and folder."""
    defaults = {"processor": ProcessorConfig(vocab_size=400), "steps_per_block": 9, "num_workers": 0}
    data = TrainingData(str(world), arguments.pop("tasks", TASKS), **{**defaults, **arguments})
    data.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        world_size=world_size,
        global_rank=rank,
        max_steps=30,
        max_epochs=1,
        accumulate_grad_batches=1,
        default_root_dir=str(tmp_path),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=4)),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data: TrainingData, number: int):
    iterator = iter(data.train_dataloader())
    return [next(iterator) for _ in range(number)]


def test_workers_do_not_change_the_batches(world, tmp_path):
    runs = [batches(data_of(world, tmp_path, num_workers=workers), 12) for workers in (0, 1, 2)]
    for straight, *others in zip(*runs, strict=True):
        for other in others:
            assert (other.task, other.keys, other.step) == (straight.task, straight.keys, straight.step)
            assert torch.equal(other.query.token_ids, straight.query.token_ids)
            assert torch.equal(other.target_id, straight.target_id)
    assert {batch.task for batch in runs[0]} == set(TASKS)


def test_two_ranks_share_the_global_batch(world, tmp_path):
    whole = batches(data_of(world, tmp_path), 9)
    parts = [batches(data_of(world, tmp_path, rank=rank, world_size=2), 9) for rank in (0, 1)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert left.task == right.task == one.task
        lengths = dict(zip(one.keys, one.query.lengths.tolist(), strict=True))
        for part in (left, right):  # the same prompts were dropped
            assert part.query.lengths.tolist() == [lengths[key] for key in part.keys]
        assert len(left.keys) == len(right.keys)
        assert sorted(left.keys + right.keys) == sorted(one.keys)


def test_going_on_at_a_step_gives_the_batches_from_there(world, tmp_path):
    straight = batches(data_of(world, tmp_path), 9)
    resumed = data_of(world, tmp_path)
    resumed.load_state_dict(resumed.state_dict())
    assert [batch.keys for batch in batches(resumed, 4)] == [batch.keys for batch in straight[5:]]


def test_going_on_with_other_data_is_refused(world, tmp_path):
    state = data_of(world, tmp_path).state_dict()
    other = {**TASKS, "world/text-text": dataclasses.replace(TASKS["world/text-text"], rate=3.0)}
    with pytest.raises(ValueError, match="other tasks, shards, rates, batch sizes or seed"):
        data_of(world, tmp_path, tasks=other).load_state_dict(state)


def test_a_batch_is_one_tasks_with_its_own_size_and_negatives(world, tmp_path):
    for batch in batches(data_of(world, tmp_path), 9):
        spec = TASKS[batch.task]
        assert len(batch.keys) == len(batch.query) == len(batch.target) == spec.batch_size
        split = Split(world / spec.shards)
        by_key: dict[str, Any] = {key: split.read(position) for position, key in enumerate(split.keys)}
        assert batch.target_id.tolist() == [by_key[key].target.content_id for key in batch.keys]
        if spec.negatives:
            assert batch.negative_row is not None
            assert batch.negative_row.tolist() == list(range(8))
            assert batch.negative_id.tolist() == [by_key[key].negatives[0].content_id for key in batch.keys]
        else:
            assert batch.negative is None


def test_prompts_are_dropped_at_random_and_never_put_on_media(world, tmp_path):
    data = data_of(world, tmp_path, prompt_dropout=0.5)
    image = [batch for batch in batches(data, 27) if batch.task == "world/text-image"]
    texts = [data.processor.tokenizer.decode(row[row > 1]) for batch in image for row in ids_of(batch.query)]
    share = sum(str(text).startswith("task: search result | query: ") for text in texts) / len(texts)
    assert 0.3 < share < 0.7
    picture = media_item("image", b"x", "png")
    assert with_prompt(picture, "task: {text}") is picture


def test_passages_without_a_title_say_none():
    prompted = with_prompt(text_item("body"), "title: {title} | text: {text}")
    assert prompted.parts[0].data == "title: none | text: body"
    assert (
        with_prompt(text_item("body", title="head"), "title: {title} | text: {text}").parts[0].data
        == "title: head | text: body"
    )


def test_targets_with_equal_labels_are_equal_on_request(processor):
    examples = [Example(str(n), text_item(f"q{n}"), text_item(f"t{n}"), label="joy" if n < 2 else "fear") for n in range(3)]
    decoded = [decode_example(example, DecodeLimits()) for example in examples]
    batch = Collate({"t": TaskSpec("x", kind="classification")}, processor, 0.0, 0)("t", 0, decoded)
    assert batch.target_id.tolist() == [content_id_of_label(label) for label in ("joy", "joy", "fear")]
    with pytest.raises(ValueError, match="has no label"):
        Collate({"t": TaskSpec("x", kind="classification")}, processor, 0.0, 0)(
            "t", 0, [dataclasses.replace(decoded[0], label=None)]
        )


def pictures(folder: Path, num_bad: int, number: int = 40) -> dict[str, TaskSpec]:
    """A task over pictures of which the first few are none."""
    data = [b"no picture"] * num_bad + [picture_bytes()] * (number - num_bad)
    write_split(
        folder / "pictures", [Example(f"k{n}", text_item("x"), media_item("image", d, "png")) for n, d in enumerate(data)]
    )
    return {"t": TaskSpec("pictures", batch_size=8)}


def test_a_bad_example_is_replaced_the_same_way_for_any_number_of_workers_and_told(tmp_path):
    tasks = pictures(tmp_path, 3)
    runs = [batches(data_of(tmp_path, tmp_path, tasks=tasks, num_workers=workers), 20) for workers in (0, 2)]
    assert [batch.keys for batch in runs[0]] == [batch.keys for batch in runs[1]]
    assert not {"k0", "k1", "k2"} & {key for batch in runs[0] for key in batch.keys}
    faults = [fault for batch in runs[0] for fault in batch.faults]
    assert {fault.key for fault in faults} == {"k0", "k1", "k2"}
    assert {fault.cause for fault in faults} == {"does not decode"}
    assert all(fault.shard.endswith("pictures/000000.tar") for fault in faults)
    assert len(faults) >= 12  # each of the three comes once in five batches, four times over


def test_bad_examples_are_counted_listed_and_a_storm_of_them_is_told(tmp_path):
    data = data_of(tmp_path, tmp_path, tasks=pictures(tmp_path, 3))
    seen = batches(data, 20)
    for batch in seen[:5]:
        logged = data.note(batch)
        assert logged["share_of_steps"] == 1.0
        assert logged["bad_examples"] == sum(data.faults.values())
    assert data.storm is None
    for batch in seen[5:]:
        data.note(batch)
    assert data.storm is not None
    assert "of the 160 examples read so far were bad (does not decode: " in data.storm
    lines = [json.loads(line) for line in (tmp_path / "faults-rank0.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [fault.key for batch in seen for fault in batch.faults]
    assert "does not decode" in lines[0]["message"]


def test_a_damaged_example_does_not_keep_a_tokenizer_from_being_trained(tmp_path):
    tasks = pictures(tmp_path, 0)
    tar = tmp_path / "pictures" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b'"text": "x"')] ^= 1
    tar.write_bytes(data)
    seen = batches(data_of(tmp_path, tmp_path, tasks=tasks), 5)
    assert [fault.cause for batch in seen for fault in batch.faults] == ["damaged bytes"]


def test_a_hundred_bad_examples_in_a_row_stop_the_run(tmp_path):
    data = data_of(tmp_path, tmp_path, tasks=pictures(tmp_path, 8, 8))
    with pytest.raises(
        ValueError, match=r"100 examples in a row cannot be used.*pictures/000000.tar: example 'k\d'.*conf=verify"
    ):
        batches(data, 1)


def test_the_tokenizer_is_made_once_and_again_for_other_data(world, tmp_path):
    first, again = data_of(world, tmp_path), data_of(world, tmp_path)
    assert len(list(tmp_path.glob("tokenizer-*"))) == 1
    assert first.processor.tokenizer.get_vocab() == again.processor.tokenizer.get_vocab()
    data_of(world, tmp_path, tasks={"world/text-code": TaskSpec("world/text-code/train", batch_size=4)})
    assert len(list(tmp_path.glob("tokenizer-*"))) == 2


def test_what_cannot_be_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"either data\.processor"):
        TrainingData(str(world), TASKS)
    with pytest.raises(ValueError, match="prompt_dropout is 2"):
        data_of(world, tmp_path, prompt_dropout=2.0)
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of the 3 ranks"):
        data_of(world, tmp_path, world_size=3, tasks={"t": TASKS["world/text-text"]}).train_dataloader()
    data = data_of(world, tmp_path)
    data.trainer.max_epochs = 2  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="max_epochs is 2; the stream is one epoch long"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="no task has a rate above 0"):
        TrainingData(str(world), {}, init_from="x")
    with pytest.raises(ValueError, match="exactly once"):
        TaskSpec("x", query_prompt="no place for text")
    with pytest.raises(ValueError, match="linear probe"):
        BenchmarkSpec("classification", "x")
    with pytest.raises(ValueError, match="must be named"):
        modalities_of("world/text-smell")


def collated(processor, spec: TaskSpec, examples: list[Example], *, step: int = 0, dropout: float = 0.0):
    decoded = [decode_example(example, DecodeLimits()) for example in examples]
    return Collate({"t": spec}, processor, dropout, 0)("t", step, decoded)


def texts_of(processor, inputs) -> list[str]:
    return [str(processor.tokenizer.decode(row[:-1])) for row in ids_of(inputs)]


def test_targets_and_hard_negatives_carry_the_targets_prompt(processor):
    spec = TaskSpec("x", query_prompt="q: {text}", target_prompt="title: {title} | text: {text}", negatives=2)
    examples = [Example(str(n), text_item(f"a{n}"), text_item(f"b{n}"), (text_item(f"c{n}", title="t"),)) for n in range(2)]
    batch = collated(processor, spec, examples)
    assert texts_of(processor, batch.query) == ["q: a0", "q: a1"]
    assert texts_of(processor, batch.target) == ["title: none | text: b0", "title: none | text: b1"]
    assert texts_of(processor, batch.negative) == ["title: t | text: c0", "title: t | text: c1"]


def test_equal_queries_have_equal_ids_and_hard_negatives_know_their_row(processor):
    examples = [
        Example("a", text_item("same"), text_item("x"), (text_item("n1"), text_item("n2"), text_item("n3"))),
        Example("b", text_item("other"), text_item("y")),
        Example("c", text_item(" same "), text_item("z"), (text_item("n1"),)),
    ]
    batch = collated(processor, TaskSpec("x", negatives=2), examples)
    ids = batch.query_id.tolist()
    assert ids[0] == ids[2] != ids[1]
    assert batch.negative_row is not None
    assert batch.negative_row.tolist() == [0, 0, 2]


def test_each_step_drops_prompts_anew(processor):
    examples = [Example(str(n), text_item(f"a{n}"), text_item("b")) for n in range(16)]
    spec = TaskSpec("x", query_prompt="q: {text}")
    dropped = [
        tuple(
            text.startswith("q: ")
            for text in texts_of(processor, collated(processor, spec, examples, step=step, dropout=0.5).query)
        )
        for step in range(3)
    ]
    assert len(set(dropped)) == 3


def test_a_hard_negative_that_names_the_own_class_is_known_to_the_mask(processor):
    examples = [Example("a", text_item("x"), text_item("card arrival"), (text_item("card arrival"),), label="card_arrival")] * 2
    batch = collated(processor, TaskSpec("x", kind="classification", negatives=1), examples)
    assert batch.negative_id is not None
    assert torch.equal(batch.negative_id, batch.target_id)
