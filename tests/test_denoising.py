"""Promises of the denoising batches: every text is in them once and whole, whatever the workers, and sentinels are no text."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import TEXTS, ids_of, picture_bytes
from test_training_data import data_of
from test_ul2 import put_together

from datamodules import denoising
from datamodules.denoising import Denoise, DenoisingBatch, DenoisingData, sentinels_of, start_of, text_of
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.tasks import TaskSpec
from datamodules.ul2 import UL2Config

UL2 = UL2Config(16, first_sentinel=1000)
PICTURE = media_item("image", picture_bytes(), "png")
TASKS = {
    "world/text-text": TaskSpec("world/text-text/train", query_prompt="task: search result | query: {text}", batch_size=8),
    "world/text-code": TaskSpec("world/text-code/train", batch_size=4),
}


def batch_of(processor: Processor, *examples: Example, step: int = 0) -> DenoisingBatch:
    denoise = Denoise(processor, UL2, sentinels_of(processor.tokenizer, UL2), start=0, seed=0)
    return denoise("a/b", step, examples, rows=np.arange(len(examples)))


def sequences_of(batch: DenoisingBatch, processor: Processor) -> list[list[int]]:
    """The sequences that the batch was made of, put together again."""
    written = batch.target.split(batch.decoder.lengths.tolist())
    end = len(processor.last_ids)
    assert all(ids[len(ids) - end :].tolist() == processor.last_ids for ids in written)
    sides = zip(ids_of(batch.encoder), written, strict=True)
    return [put_together(read.numpy()[len(processor.first_ids) :], out.numpy()[: len(out) - end]) for read, out in sides]


def test_texts_lie_end_to_end_and_are_cut_at_the_length(processor):
    examples = [Example(f"k{n}", text_item(TEXTS[n]), text_item(TEXTS[n + 1])) for n in range(3)]
    texts = [TEXTS[n] for n in (0, 1, 1, 2, 2, 3)]
    expected = [token_id for text in texts for token_id in [*processor.tokenizer.encode(text, add_special_tokens=False), 1]]
    batch = batch_of(processor, *examples)
    sequences = sequences_of(batch, processor)
    assert [token_id for sequence in sequences for token_id in sequence] == expected
    assert {len(sequence) for sequence in sequences[:-1]} == {16}
    assert 1 <= len(sequences[-1]) <= 16
    assert batch.keys == ["k0", "k1", "k2"]
    assert len(batch.denoiser) == len(sequences)


def test_the_decoder_reads_what_it_wrote_before(processor):
    batch = batch_of(processor, Example("k", text_item(TEXTS[1]), text_item(TEXTS[2])))
    written = batch.target.split(batch.decoder.lengths.tolist())
    for read, ids in zip(ids_of(batch.decoder), written, strict=True):
        assert read.tolist() == [0, *ids[:-1].tolist()]


def test_a_begin_stands_before_what_the_encoder_reads(processor):
    begun = copy.copy(processor)
    begun.first_ids = [7]
    plain, other = (batch_of(p, Example("k", text_item(TEXTS[1]))) for p in (processor, begun))
    assert [ids.tolist() for ids in ids_of(other.encoder)] == [[7, *ids.tolist()] for ids in ids_of(plain.encoder)]


def test_every_step_takes_out_other_spans(processor):
    example = Example("k", text_item(" ".join(TEXTS) * 9))
    one, again, other = (batch_of(processor, example, step=step) for step in (0, 0, 1))
    assert torch.equal(one.denoiser, again.denoiser)
    assert torch.equal(one.target, again.target)
    assert not torch.equal(one.denoiser, other.denoiser)


def test_a_text_stands_behind_its_title_and_media_have_none():
    parts = (Part("text", "one"), PICTURE.parts[0], Part("code", "two"))
    assert text_of(Item(parts, title="head")) == "head\none\ntwo"
    assert text_of(text_item("one")) == "one"
    assert text_of(PICTURE) is None


def test_items_without_text_are_counted_and_a_task_without_any_is_refused(processor):
    batch = batch_of(processor, Example("k", text_item("cat"), PICTURE), Example("l", PICTURE), Example("m", text_item("mat")))
    assert batch.num_without_text == 2
    with pytest.raises(ValueError, match=r"task 'a/b' has no text to denoise in 2 items; set its rate to 0"):
        batch_of(processor, Example("k", PICTURE), Example("l", PICTURE))


def test_every_denoiser_comes_at_its_share(processor):
    examples = [Example(f"k{n}", text_item(" ".join(TEXTS) * 20)) for n in range(40)]
    batch = batch_of(processor, *examples)
    shares = batch.denoiser.bincount(minlength=5) / len(batch.denoiser)
    torch.testing.assert_close(shares, torch.tensor([0.125] * 4 + [0.5]), atol=0.03, rtol=0)  # of 2,000


def data(world: Path, tmp_path: Path, monkeypatch, **arguments) -> DenoisingData:
    monkeypatch.setattr("test_training_data.TrainingData", DenoisingData)
    ul2 = UL2Config(arguments.pop("length", 32))
    found = data_of(world, tmp_path, tasks=TASKS, processor=ProcessorConfig(vocab_size=380), ul2=ul2, **arguments)
    assert isinstance(found, DenoisingData)
    return found


def batches(found: DenoisingData, number: int = 6) -> list[DenoisingBatch]:
    iterator = iter(found.train_dataloader())
    return [next(iterator) for _ in range(number)]  # pyright: ignore[reportReturnType]


def test_batches_follow_from_seed_and_step_alone(world, tmp_path, monkeypatch):
    one, other = (batches(data(world, tmp_path, monkeypatch, num_workers=workers)) for workers in (0, 2))
    resumed = data(world, tmp_path, monkeypatch)
    resumed.load_state_dict(resumed.state_dict())  # after five steps
    for a, b in [*zip(one, other, strict=True), (one[5], batches(resumed, 1)[0])]:
        assert (a.task, a.step, a.keys) == (b.task, b.step, b.keys)
        assert all(torch.equal(x, y) for x, y in ((a.target, b.target), (a.denoiser, b.denoiser)))
        assert torch.equal(a.encoder.token_ids, b.encoder.token_ids)
    assert not torch.equal(batches(data(world, tmp_path, monkeypatch, seed=1), 1)[0].target, one[0].target)


def test_two_ranks_corrupt_in_different_ways(world, tmp_path, monkeypatch):
    seen = [batches(data(world, tmp_path, monkeypatch, rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    assert not set(seen[0].keys) & set(seen[1].keys)
    made = []
    monkeypatch.setattr(denoising, "generator", lambda *key: (made.append(key), np.random.default_rng(0))[1])
    for rank in (0, 1):
        batches(data(world, tmp_path, monkeypatch, rank=rank, world_size=2), 1)
    assert len(set(made)) == 2


def test_prompts_stay_out(world, tmp_path, monkeypatch):
    found = data(world, tmp_path, monkeypatch)
    for batch in batches(found):
        text = found.processor.tokenizer.decode([i for sequence in sequences_of_data(batch, found) for i in sequence])
        assert "search result" not in text


def sequences_of_data(batch: DenoisingBatch, found: DenoisingData) -> list[list[int]]:
    """As `sequences_of`, with the sentinels renamed to those that `put_together` knows."""
    names = {sentinel: 1000 + n for n, sentinel in enumerate(found.sentinels)}
    for ids in (batch.encoder.token_ids, batch.target):
        ids.apply_(lambda token_id: names.get(token_id, token_id))
    return sequences_of(batch, found.processor)


def test_going_on_with_another_corruption_is_refused(world, tmp_path, monkeypatch):
    state = data(world, tmp_path, monkeypatch).state_dict()
    with pytest.raises(ValueError, match="made with other tasks, shards, rates, batch sizes or seed"):
        data(world, tmp_path, monkeypatch, length=33).load_state_dict(state)


def test_sentinels_are_the_tokenizers_reserve_or_lie_behind_it():
    tokenizer = train_tokenizer(TEXTS, 300)
    size, needed = len(tokenizer), UL2Config(64).num_sentinels
    assert list(sentinels_of(tokenizer, UL2Config(64))) == list(range(size, size + needed))
    assert list(sentinels_of(tokenizer, UL2Config(64, first_sentinel=290))) == list(range(290, 290 + needed))
    tokenizer.add_tokens([f"<unused{n}>" for n in range(9)])
    assert list(sentinels_of(tokenizer, UL2Config(64))) == list(range(size, size + needed))
    with pytest.raises(
        ValueError, match=r"keeps 9 entries in reserve, sequences of 512 tokens need 26 sentinels; set data.ul2"
    ):
        sentinels_of(tokenizer, UL2Config(512))


def test_a_decoder_starts_from_the_begin_or_else_from_padding(processor):
    assert start_of(processor) == processor.tokenizer.pad_token_id
    begun = copy.copy(processor)
    begun.first_ids = [7]
    assert start_of(begun) == 7
    bare = ComposedProcessor(processor.config, train_tokenizer(TEXTS, 300))
    bare.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither a begin nor a padding token"):
        start_of(bare)
