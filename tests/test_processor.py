"""Promises of the composed processor: one interleaved sequence, places that match views, nothing cut in silence."""

import dataclasses

import numpy as np
import pytest
import torch
from samples import ids_of
from transformers import CanineTokenizer

from datamodules.media.video import Film
from datamodules.processors.composed import BEGIN, END, SOFT, ComposedProcessor, place_id
from datamodules.processors.inputs import Inputs
from datamodules.processors.loading import load_processor
from datamodules.processors.processor import ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Item, Part

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 255, (48, 80, 3), dtype=np.uint8)


def part(kind, value):
    return Part(kind, value if isinstance(value, str) else b"x", "" if isinstance(value, str) else "png", content=value)


def test_parts_keep_their_order(processor):
    inputs = processor([Item((part("text", "cat"), part("image", PICTURE), part("code", "x+1")))])
    words = [processor.tokenizer(text)["input_ids"] for text in ("cat", "x+1")]
    picture = [place_id("image", BEGIN), *[place_id("image", SOFT)] * 16, place_id("image", END)]
    assert inputs.token_ids.tolist() == [*words[0], *picture, *words[1], processor.tokenizer.eos_token_id]
    assert inputs.lengths.tolist() == [len(inputs.token_ids)]


def test_places_are_negative_and_distinct():
    ids = {place_id(kind, role) for kind in ("image", "page", "audio", "video") for role in (BEGIN, SOFT, END)}
    assert len(ids) == 12
    assert max(ids) < 0


@pytest.mark.parametrize(
    ("kind", "content", "num_views"),
    [
        ("image", PICTURE, 1),
        ("page", [PICTURE, PICTURE], 4),
        ("video", Film(np.stack([PICTURE] * 3), 3.0), 3),
        ("audio", np.zeros(16_000, np.float32), 1),
        ("audio", np.zeros(40_000, np.float32), 3),
    ],
)
def test_media_become_views_with_their_places(processor, kind, content, num_views):
    inputs = processor([Item((part(kind, content),))])
    shape = (num_views, 1, 64, 64) if kind == "audio" else (num_views, 3, 64, 64)
    assert inputs.media[kind].shape == shape
    assert inputs.media[kind].dtype == (torch.float32 if kind == "audio" else torch.uint8)
    assert inputs.num_views[kind].tolist() == [num_views]
    assert int((inputs.token_ids == place_id(kind, SOFT)).sum()) == 16 * num_views


def test_a_page_is_cut_into_tiles_row_by_row(processor):
    page = np.zeros((128, 64, 3), np.uint8)
    page[64:] = 200
    tiles = processor([Item((part("page", [page]),))]).media["page"]
    assert tiles[0].max() == 0
    assert tiles[1].min() == 200


def test_tiles_run_along_rows_first(processor):
    config = dataclasses.replace(processor.config, page_grid=(2, 3))
    page = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 64, 0), 64, 1)[..., None].repeat(3, 2)
    tiles = ComposedProcessor(config, processor.tokenizer).views("page", [page, page + 10])
    assert [(tile.min().item(), tile.max().item()) for tile in tiles] == [(n + m, n + m) for m in (0, 10) for n in range(6)]


def test_a_higher_pitch_stands_higher_in_the_spectrogram(processor):
    time = np.arange(16_000, dtype=np.float32) / 16_000
    rows = [
        processor.views("audio", np.sin(2 * np.pi * pitch * time).astype(np.float32))[0, 0].mean(1).argmax().item()
        for pitch in (200, 800, 3000)
    ]
    assert rows == sorted(set(rows))


def test_long_text_is_cut_and_counted(processor):
    short = ComposedProcessor(dataclasses.replace(processor.config, max_text_tokens=5), processor.tokenizer)
    inputs = short(
        [
            Item(
                (part("text", "the cat sat on the mat"), part("text", "more")),
            ),
            Item((part("text", "cat"),)),
        ]
    )
    assert inputs.num_truncated == 1
    assert inputs.lengths[0] == 6


def test_padding_is_on_the_right_and_masked(processor):
    inputs = processor([Item((part("text", "cat"),)), Item((part("text", "the cat sat on the mat"),))])
    token_ids, mask, places = inputs.padded()
    length, longest = inputs.lengths.tolist()
    assert mask.tolist() == [[1] * length + [0] * (longest - length), [1] * longest]
    assert torch.equal(token_ids[mask.bool()], inputs.token_ids)
    assert torch.equal(token_ids.flatten()[places], inputs.token_ids)


def test_rows_take_their_media_with_them_and_columns_are_joined(processor):
    items = [
        Item((part("text", "cat"),)),
        Item((part("image", PICTURE), part("text", "mat"), part("image", PICTURE[::-1]))),
        Item((part("audio", np.ones(20_000, np.float32)),)),
        Item((part("image", PICTURE[:, ::-1]),)),
    ]
    alone = [processor([item]) for item in items]
    whole = processor(items)
    for chosen in (np.array([2, 0]), np.array([3, 1, 3]), np.array([0])):
        expected, found = processor([items[row] for row in chosen]), whole.rows(chosen)
        for one in (found, Inputs.join([alone[row] for row in chosen])):
            assert torch.equal(one.token_ids, expected.token_ids)
            assert torch.equal(one.lengths, expected.lengths)
            assert one.media.keys() == expected.media.keys() == one.num_views.keys()
            for kind, views in expected.media.items():
                assert torch.equal(one.media[kind], views)
                assert torch.equal(one.num_views[kind], expected.num_views[kind])


def test_it_is_the_same_after_saving(processor, tmp_path):
    processor.save(tmp_path)
    again = load_processor(tmp_path)
    assert again.config == processor.config
    item = Item((part("text", "ein großer blauer Stern"), part("image", PICTURE)))
    assert torch.equal(again([item]).token_ids, processor([item]).token_ids)


def test_a_trained_tokenizer_loses_nothing():
    tokenizer = train_tokenizer(["the cat"] * 3, 280)
    text = "日本 🙂 \t tabs\n  and spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(["x"], 100)


def test_a_tokenizer_without_a_fast_form_is_refused(processor):
    with pytest.raises(ValueError, match="CanineTokenizer, has no fast form"):
        ComposedProcessor(processor.config, CanineTokenizer())


def test_texts_are_cut_into_what_transformers_makes_of_them(processor):
    texts = ["", "a  b", "ein großer Stern\n", "日本 🙂", "<pad> and <eos>"]
    processor.tokenizer(texts, padding=True, truncation=True, max_length=3)  # leaves its ways with the tokenizer
    made = processor([Item((part("text", text),)) for text in texts])
    expected = processor.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [ids[:-1].tolist() for ids in ids_of(made)] == expected


def test_a_text_cannot_spell_a_special_token(processor):
    ids = processor([Item((part("text", "a<eos>b<pad>"),))]).token_ids.tolist()
    assert ids.count(processor.tokenizer.eos_token_id) == 1
    assert processor.tokenizer.pad_token_id not in ids


def test_tokens_per_view_must_name_every_kind():
    with pytest.raises(ValueError, match="for each of image, page, audio, video"):
        ProcessorConfig(tokens_per_view={"image": 4})
