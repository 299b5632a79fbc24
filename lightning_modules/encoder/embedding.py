"""Anything to unit vectors: items are made, embedded in batches of like length, and come back in their order.

Prompts are those of Gemini Embedding 2 and EmbeddingGemma (`recipe.md`, task strings). Shapes: N items, D width (a prefix).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.extent import EXTENT
from datamodules.items import is_record, item_of
from datamodules.processors.inputs import Inputs
from datamodules.processors.processor import Processor
from datamodules.sample import Item
from kernels.contrastive import check_prefixes
from lightning_modules.encoder.checkpoint import load_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, cut, device_named, probe
from lightning_modules.encoder.prepacked import prepack
from lightning_modules.progress import bar_of

QUERY_TASKS = ("search result", "question answering", "fact checking", "code retrieval")
SYMMETRIC_TASKS = ("classification", "clustering", "sentence similarity")
TASKS = {
    **{name: f"task: {name} | query: {{text}}" for name in (*QUERY_TASKS, *SYMMETRIC_TASKS)},
    "document": "title: {title} | text: {text}",
}
WINDOW_ITEMS = 8192  # distinct items that are sorted by length together: our choice
WINDOW_BYTES = 2**26  # of their texts and files, all of which are in memory: our choice
MAX_TOKENS = 16384  # of a batch: our choice
MEDIA_COST = 16  # texts of a batch that an item with media takes the place of: our choice
Refuse = Callable[[int, ValueError], None]  # told the number of an item that cannot be embedded, and why


def template_of(task: str | None) -> str | None:
    """The prompt of a task.

    Raises:
        ValueError: There is no such task.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}, or None for no prompt")
    return None if task is None else TASKS[task]


def load_embedder(path: str | Path, device: str) -> Embedder:
    """See `Embedder.from_checkpoint`."""
    encoder, processor = load_encoder(path)
    encoder = encoder.to(device_named(device)).eval()
    probe(encoder)
    encoder.use(ComputeConfig(max_tokens=MAX_TOKENS))
    prepack(encoder)
    encoder.processor = processor
    return encoder


def embed_things(
    encoder: Embedder,
    things: Iterable[Any],
    prefix: int | None,
    task: str | None,
    batch_tokens: int,
    batch_size: int,
    progress: bool,
) -> np.ndarray:
    """See `Embedder.embed`."""
    if encoder.processor is None:
        raise ValueError("this encoder has no processor to read items with; make it with Embedder.from_checkpoint")
    if isinstance(things, str | bytes | Path | Item) or hasattr(things, "__array__") or is_record(things):
        raise ValueError(f"items is one {type(things).__name__}; give a list of items, [item] for one")
    if min(batch_tokens, batch_size) < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}, batch_size {batch_size}; both must be at least 1")
    width = encoder.config.embedding_dim if prefix is None else prefix
    check_prefixes((width,), encoder.config.embedding_dim)
    encoder.eval()
    table = _Table(encoder, encoder.processor, width, batch_tokens, batch_size)
    total = len(things) if hasattr(things, "__len__") else None  # pyright: ignore[reportArgumentType]
    with bar_of(None) if progress else nullcontext() as bar:
        ticket = None if bar is None else bar.add_task("items", total=total)
        for item in _items(things, template_of(task)):
            done = table.add(item)
            if bar is not None and ticket is not None and done:
                bar.update(ticket, completed=done)
        return table.vectors()


def _items(things: Iterable[Any], template: str | None) -> Iterator[Item]:
    """Items in their prompts.

    Raises:
        ValueError: One cannot be made; names its number.
    """
    for number, thing in enumerate(things):
        try:
            yield with_prompt(item_of(thing), template)
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from error


class _Table:
    """Vectors of distinct items, and which of them each item has; some items wait until there are enough to sort."""

    def __init__(self, encoder: Embedder, processor: Processor, width: int, batch_tokens: int, batch_size: int) -> None:
        self.encoder, self.processor, self.width = encoder, processor, width
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self._places: dict[bytes, int] = {}
        self._rows: list[int] = []
        self._waiting: list[tuple[int, Item]] = []  # the number at which an item came first, and itself
        self._num_bytes = 0
        self._made: list[np.ndarray] = []

    def add(self, item: Item) -> int:
        """Take the next item; how many were embedded, where some now were."""
        identity = identity_of(item)
        if identity not in self._places:
            self._places[identity] = len(self._places)
            self._waiting.append((len(self._rows), item))
            self._num_bytes += sum(len(part.data) for part in item.parts)
        self._rows.append(self._places[identity])
        if len(self._waiting) < WINDOW_ITEMS and self._num_bytes < WINDOW_BYTES:
            return 0
        self._make()
        return len(self._rows)

    def vectors(self) -> np.ndarray:
        """Unit vectors of all items that came (N, D)."""
        if self._waiting:
            self._make()
        return np.concatenate([np.empty((0, self.width), np.float32), *self._made])[self._rows]

    def _make(self) -> None:
        numbers, items = zip(*self._waiting, strict=True)
        self._waiting, self._num_bytes = [], 0

        def refuse(place: int, error: ValueError) -> None:
            raise ValueError(f"item {numbers[place]}: {error}") from error

        found = np.empty((len(items), self.width), np.float32)
        for places in batches_of(items, self.processor, self.batch_tokens, self.batch_size):
            _, inputs = prepared([items[place] for place in places], self.processor, lambda n, e, at=places: refuse(at[n], e))
            assert inputs is not None
            found[places] = unit_vectors(self.encoder, inputs, self.width, lambda n, e, at=places: refuse(at[n], e))[1]
        self._made.append(found)


def batches_of(items: Sequence[Item], processor: Processor, batch_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Places of items that go together: texts of like length, the longest first, of about so many tokens; media in their order.

    No medium is looked into, which may be hostile: the encoder itself cuts batches that are longer than it allows.
    """
    texts = [place for place, item in enumerate(items) if item.is_text]
    extents = np.zeros(len(texts), EXTENT)
    extents["text"] = [sum(len(str(part.data).encode()) for part in items[place].parts) for place in texts]
    lengths = processor.num_tokens(extents)
    batch: list[int] = []
    longest = 0.0
    for n in np.argsort(-lengths, kind="stable").tolist():
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest > batch_tokens):
            yield batch
            batch = []
        longest = max(lengths[n], longest if batch else 0.0)
        batch.append(texts[n])
    if batch:
        yield batch
    media = [place for place, item in enumerate(items) if not item.is_text]
    at_once = max(1, batch_size // MEDIA_COST)
    yield from (media[start : start + at_once] for start in range(0, len(media), at_once))


def prepared(items: Sequence[Item], processor: Processor, refuse: Refuse) -> tuple[list[int], Inputs | None]:
    """Inputs of items and which of them they are; media are decoded one by one, so that one is in memory at a time.

    Args:
        items: In their prompts.
        processor: Makes the inputs.
        refuse: Told of those that cannot be used, which are left out.
    """
    texts = [place for place, item in enumerate(items) if item.is_text]
    groups = [texts] * bool(texts) + [[place] for place, item in enumerate(items) if not item.is_text]
    places: list[int] = []
    made: list[Inputs] = []
    while groups:
        group = groups.pop(0)
        try:
            made.append(processor([decode_item(items[place], processor.config.decode) for place in group]))
        except ValueError as error:
            if len(group) == 1:
                refuse(group[0], error)
            else:
                groups = [[place] for place in group] + groups
            continue
        places += group
    if not made:
        return [], None
    inputs = made[0] if len(made) == 1 else Inputs.join(made)
    order = np.argsort(places)
    return sorted(places), inputs if len(made) == 1 else inputs.rows(order)


@torch.inference_mode()
def unit_vectors(encoder: Embedder, inputs: Inputs, width: int, refuse: Refuse) -> tuple[list[int], np.ndarray]:
    """Unit vectors (N, width) float32, and which of the inputs have one.

    Args:
        encoder: In evaluation mode.
        inputs: On any device.
        width: A prefix.
        refuse: Told of those that the encoder does not take or whose vectors are not finite, which are left out.
    """
    inputs = inputs.to(encoder.device)
    try:
        vectors, places = encoder(inputs).cpu(), list(range(len(inputs)))
    except ValueError as error:
        if len(inputs) > 1:  # to find out whose fault it is
            return _one_by_one(encoder, inputs, width, refuse)
        refuse(0, error)
        return [], np.empty((0, width), np.float32)
    vectors = cut(vectors, width)
    good = (vectors.isfinite().all(dim=1) & vectors.any(dim=1)).tolist()
    for place in (place for place in places if not good[place]):
        refuse(place, NotFiniteError("the encoder gives it a vector of no length or that is not finite"))
    return [place for place in places if good[place]], vectors[torch.tensor(good)].numpy()


def _one_by_one(encoder: Embedder, inputs: Inputs, width: int, refuse: Refuse) -> tuple[list[int], np.ndarray]:
    places, made = [], [np.empty((0, width), np.float32)]
    for place in range(len(inputs)):
        row = inputs.rows(np.array([place]))
        own, vector = unit_vectors(encoder, row, width, lambda _, error, place=place: refuse(place, error))
        places += [place] * len(own)
        made.append(vector)
    return places, np.concatenate(made)


class NotFiniteError(ValueError):
    """An item whose vector cannot be used."""

    cause = "vector not finite"


def identity_of(item: Item) -> bytes:
    """A digest of an item as the encoder gets it. `Item.content_id` would fold white space, which may change a vector."""
    digest = hashlib.blake2b(digest_size=16)
    for part in item.parts:
        payload = part.data.encode("utf-8", "surrogatepass") if isinstance(part.data, str) else part.data
        digest.update(f"{part.kind} {part.format} {len(payload)} ".encode())
        digest.update(payload)
    return digest.digest()
