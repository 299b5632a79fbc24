"""What an exported graph is tried on, with the vectors that the encoder itself has for it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.processors.composed import BEGIN, END, SOFT, place_id
from datamodules.processors.inputs import Inputs
from datamodules.processors.native import DualProcessor
from datamodules.processors.processor import Processor
from datamodules.sample import Item, Part
from lightning_modules.encoder.composed import ComposedBackbone
from lightning_modules.encoder.embedder import Embedder, cut
from lightning_modules.encoder.native import DualBackbone
from lightning_modules.encoder.packing import first_position
from lightning_modules.onnx_graphs import padding_of, places_of

PROBES = ((1, 1), (3, 1), (4, 3), (1, 5))  # items and views of the probes of a medium: our choice
LONGEST = 1024  # tokens of the longest probe, where items may be longer and no window is: our choice, time alone


class Feed(NamedTuple):
    """What goes into a graph, and the vectors (N, D) that the encoder itself has for it."""

    inputs: dict[str, Tensor]
    expected: Tensor


def feed_of(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of token ids, padded on the right, and their mask."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def begin_and_end(processor: Processor) -> tuple[list[int], list[int]]:
    """Token ids before and behind those of a text."""
    if isinstance(processor, DualProcessor):
        return processor.begin, processor.end
    return processor.first_ids, processor.last_ids


def longest_text(encoder: Embedder, processor: Processor) -> int:
    """Most tokens of an item of text alone, begin and end included."""
    longest = processor.config.max_text_tokens + sum(map(len, begin_and_end(processor)))
    positions = getattr(encoder.backbone.text.config, "max_position_embeddings", None)
    return longest if positions is None else min(longest, positions - first_position(encoder.backbone.text))


@torch.inference_mode()
def text_feeds(encoder: Embedder, processor: Processor, texts: Sequence[str]) -> list[Feed]:
    """Texts in batches of four, with the vectors that the encoder has for them."""
    begin, end = begin_and_end(processor)
    most, feeds = processor.config.max_text_tokens, []
    for start in range(0, len(texts), 4):
        batch = list(texts[start : start + 4])
        rows = [torch.tensor([*begin, *ids[:most], *end]) for ids in processor.tokens(batch)]
        items = [Item((Part("text", text, content=text),)) for text in batch]
        feeds.append(Feed(feed_of(rows), vectors_of(encoder, processor(items))))
    return feeds


@torch.inference_mode()
def random_feeds(encoder: Embedder, processor: Processor) -> list[Feed]:
    """Random tokens of every length from one to the longest text's, and the vectors that the encoder has for them."""
    feeds: list[Feed] = []
    settings = encoder.backbone.text.config
    window = max(getattr(settings, name, None) or 0 for name in ("sliding_window", "local_attention"))
    generator = torch.Generator().manual_seed(0)
    longest = min(max(LONGEST, window + 64), longest_text(encoder, processor))
    for lengths in ((1,), (1, 1, 2), (longest,), (3, min(40, longest), 1, 17 % longest + 1)):
        ids = [torch.randint(2, encoder.backbone.vocab_size, (length,), generator=generator) for length in lengths]
        feeds.append(_random_feed(encoder, processor, ids))
    return feeds


def _random_feed(encoder: Embedder, processor: Processor, ids: list[Tensor]) -> Feed:
    inputs = encoder.backbone.text_inputs(ids)
    if not isinstance(encoder.backbone, DualBackbone):
        return Feed(feed_of(inputs.token_ids.split(inputs.lengths.tolist())), vectors_of(encoder, inputs))
    whole = torch.full((len(ids), encoder.backbone.length), padding_of(processor))
    for row, of_item in zip(whole, ids, strict=True):
        row[: len(of_item)] = of_item
    inputs.media["input_ids"] = whole
    return Feed(feed_of(ids), vectors_of(encoder, inputs))


@torch.inference_mode()
def medium_feeds(encoder: Embedder, processor: Processor, kind: str) -> list[Feed]:
    """Made-up views of items of one medium, with the vectors that the encoder has for them."""
    feeds = []
    for num_items, wanted in PROBES:
        num_views = min(wanted, most_views(encoder, processor, kind))
        views = random_views(encoder, processor, kind, num_items, num_views)
        if not isinstance(encoder.backbone, ComposedBackbone):
            ids, name = places_of(encoder, processor, kind) * num_views, "pixel_values"
        else:
            soft = [place_id(kind, SOFT)] * (num_views * encoder.backbone.tokens[kind])
            ids, name = [place_id(kind, BEGIN), *soft, place_id(kind, END)], kind
        ids = torch.tensor([*processor.first_ids, *ids, *processor.last_ids])
        lengths, counts = torch.full((num_items,), len(ids)), torch.full((num_items,), num_views)
        inputs = Inputs(ids.repeat(num_items), lengths, {name: views.flatten(0, 1)}, {name: counts})
        feeds.append(Feed({"views": views}, vectors_of(encoder, inputs)))
    return feeds


def most_views(encoder: Embedder, processor: Processor, kind: str) -> int:
    """How many views of a medium alone the text model has positions for."""
    positions = getattr(encoder.backbone.text.config, "max_position_embeddings", None)
    if positions is None or not isinstance(encoder.backbone, ComposedBackbone):
        return 2**31
    around = 2 + len(processor.first_ids) + len(processor.last_ids) + first_position(encoder.backbone.text)
    return (positions - around) // encoder.backbone.tokens[kind]


def random_views(encoder: Embedder, processor: Processor, kind: str, num_items: int, num_views: int) -> Tensor:
    """Smooth views with noise on them (N, V, ..), of the shape and type that the processor makes.

    Raises:
        NotExportableError: It makes more than views of one shape.
    """
    generator = torch.Generator().manual_seed(num_items + num_views)
    channels, size = 3, [64, 64]
    if is_composed := isinstance(encoder.backbone, ComposedBackbone):
        tower: Any = encoder.backbone.towers[encoder.backbone.routes[kind]]
        channels, *size = tower.view_shape
    else:
        places_of(encoder, processor, kind)
    coarse = torch.rand(num_items * num_views, channels, 4, 4, generator=generator)
    fine = F.interpolate(coarse, size=size, mode="bilinear")
    fine = 0.9 * fine + 0.1 * torch.rand(fine.shape, generator=generator)
    if kind == "audio":
        return (2.5 * fine - 1).unflatten(0, (num_items, num_views))  # see `ComposedProcessor._spectrograms`
    views = (255 * fine).to(torch.uint8)
    if not is_composed:
        pictures = views.permute(0, 2, 3, 1).numpy()
        views = torch.cat([processor.medium("image", picture)[1]["pixel_values"] for picture in pictures])
    return views.unflatten(0, (num_items, num_views))


def vectors_of(encoder: Embedder, inputs: Inputs) -> Tensor:
    """The encoder's own unit vectors (N, D)."""
    return cut(encoder(inputs), encoder.config.embedding_dim)
