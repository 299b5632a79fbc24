"""Our encoder as mteb asks for one: its batches to items, and the vector of each item made once for all prefixes.

Sources: mteb's EncoderProtocol (mteb/models/models_protocols.py) and its batches (mteb/types/_encoder_io.py), of version 2.26.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.processors.processor import Processor
from datamodules.sample import Item, Part
from lightning_modules.encoder.embedder import Embedder, cut

MODALITIES = ("text", "image", "video", "audio")  # columns of mteb's batches, in mteb's order within an interleaved item
SORTED_BATCHES = 64  # our choice: batches of text that are sorted by length together; media are not kept waiting in memory
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
VIDEO_MAGIC = {b"ftyp": "mp4", b"\x1a\x45\xdf\xa3": "webm"}


class Vectors:
    """Vectors of all items of a task in full width, each made once, whatever the prefix that is asked for.

    Args:
        encoder: On its device, in evaluation mode.
        processor: Its own.
        batch_size: Items embedded at once.
    """

    def __init__(self, encoder: Embedder, processor: Processor, batch_size: int) -> None:
        self.encoder, self.processor, self.batch_size = encoder, processor, batch_size
        self.drop()

    def drop(self) -> None:
        """Forget all of them."""
        self._places: dict[bytes, int] = {}
        self._table = np.empty((0, self.encoder.config.embedding_dim), np.float32)
        self._number = 0

    def of(self, items: Iterable[Item], width: int) -> np.ndarray:
        """Unit vectors (N, width) of items, in their order.

        Raises:
            ValueError: A medium is bad or too long, the encoder does not take it, or a vector is not finite.
        """
        rows: list[int] = []
        waiting: list[Item] = []
        for item in items:
            identity = _identity(item)
            if identity not in self._places:
                self._places[identity] = len(self._places)
                waiting.append(item)
            rows.append(self._places[identity])
            if len(waiting) >= self.batch_size * (SORTED_BATCHES if item.is_text else 1):
                self._make(waiting)
                waiting = []
        if waiting:
            self._make(waiting)
        return cut(torch.from_numpy(self._table[rows, :width]), width).numpy()

    @torch.inference_mode()
    def _make(self, items: list[Item]) -> None:
        """Append the vectors of items to the table."""
        by_length = sorted(range(len(items)), key=lambda n: sum(len(part.data) for part in items[n].parts))
        first, self._number = self._number, self._number + len(items)
        if self._number > len(self._table):
            grown = np.empty((max(self._number, 2 * len(self._table)), self._table.shape[1]), np.float32)
            grown[:first] = self._table[:first]
            self._table = grown
        for start in range(0, len(items), self.batch_size):
            some = by_length[start : start + self.batch_size]
            inputs = self.processor([decode_item(items[n], self.processor.config.decode) for n in some])
            vectors = self.encoder(inputs.to(self.encoder.device)).cpu().numpy()
            bad = int((~np.isfinite(vectors).all(axis=1)).sum())
            if bad:
                raise ValueError(f"the encoder makes vectors that are not finite, {bad} of a batch of {len(some)}")
            self._table[[first + n for n in some]] = vectors


@dataclass
class SuiteEncoder:
    """What mteb takes for a model: an encoder at one prefix.

    Args:
        vectors: Shared by all prefixes.
        width: The prefix.
        mteb_model_meta: mteb's ModelMeta.
        prompts: mteb's name of a prompt to our template; None is none.
    """

    vectors: Vectors
    width: int
    mteb_model_meta: Any
    prompts: Mapping[str, str | None]

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **options: Any
    ) -> np.ndarray:
        """Unit vectors (N, width) of the items of a DataLoader of mteb's."""
        from mteb.models.abs_encoder import get_prompt_name

        name = get_prompt_name(dict.fromkeys(self.prompts, ""), task_metadata, prompt_type)
        template = None if name is None else self.prompts[name]
        picture = picture_kind(task_metadata)
        items = (item for batch in inputs for item in items_of(batch, template=template, picture=picture))
        return self.vectors.of((with_prompt(item, template) for item in items), self.width)

    def similarity(self, one: Any, other: Any) -> Any:
        """Cosines (N, M)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(one, other)

    def similarity_pairwise(self, one: Any, other: Any) -> Any:
        """Cosines (N,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(one, other)


def items_of(batch: Mapping[str, Any], *, template: str | None, picture: str) -> Iterator[Item]:
    """The items of a batch of mteb's; where it has several modalities, each item has a part of each.

    Args:
        batch: Columns by name. A document's `text` is its title and its `body` in one.
        template: Of the prompt. Where it names the title, a document's title and body are kept apart.
        picture: What an image is to us: `image` or `page`.

    Raises:
        ValueError: A row holds nothing that we know, or in a form that we do not.
    """
    columns = [name for name in MODALITIES if name in batch]
    if not columns:
        raise ValueError(f"mteb gives the columns {', '.join(batch)}; an item needs one of {', '.join(MODALITIES)}")
    is_titled = template is not None and "{title}" in template and "body" in batch
    for row in range(len(batch[columns[0]])):
        found = {name: batch[name][row] for name in columns if batch[name][row] is not None}
        title = None
        if is_titled and "text" in found:
            found["text"], title = batch["body"][row], batch["title"][row] if "title" in batch else None
        parts = tuple(_part(name, value, picture) for name, value in found.items())
        if not parts:
            raise ValueError(f"mteb gives a row without content in any of the columns {', '.join(columns)}")
        yield Item(parts, title or None)


def _part(modality: str, value: Any, picture: str) -> Part:
    if modality == "text":
        return Part("text", value)
    if modality == "image":
        return Part(picture, _png(value), "png")
    if modality == "audio":
        return Part("audio", _wav(value), "wav")
    return _video(value)


def _png(image: Any) -> bytes:
    if not isinstance(image, Image.Image):
        raise ValueError(f"mteb gives an image as {type(image).__name__}; only pictures of Pillow are read")
    if image.mode not in PNG_MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _wav(sound: Any) -> bytes:
    """A sound's own file, or its samples as WAV in floating point, which loses nothing."""
    if isinstance(sound, dict) and "array" not in sound:
        return _file_of(sound)
    samples = np.asarray(sound["array"], np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples.T, int(sound["sampling_rate"]), format="WAV", subtype="FLOAT")  # mteb: channels first
    return file.getvalue()


def _video(film: Any) -> Part:
    """A video's own file, which the decoders of `datasets` remember, or its frames as one."""
    film = getattr(film, "_hf_encoded", film)
    data = _file_of(film) if isinstance(film, dict | str | Path | bytes) else _mp4(np.asarray(film))
    return Part("video", data, VIDEO_MAGIC.get(data[4:8]) or VIDEO_MAGIC.get(data[:4]) or "unknown")


def _file_of(medium: Any) -> bytes:
    """The bytes of a medium that is given as such, as a path, or as `datasets` stores it."""
    if isinstance(medium, dict):
        medium = medium["path"] if medium.get("bytes") is None else medium["bytes"]
    return medium if isinstance(medium, bytes) else Path(medium).read_bytes()


def undecoded(data: Any) -> Any:
    """A task's data with sound and video as files, where `datasets` lacks what it decodes them with; we decode them anyway."""
    from datasets import Audio, Dataset, Video, config

    if config.TORCHCODEC_AVAILABLE:
        return data
    if isinstance(data, dict):
        for name, value in data.items():
            data[name] = undecoded(value)
    if isinstance(data, Dataset):
        for name, feature in data.features.items():
            if isinstance(feature, Audio | Video):
                data = data.cast_column(name, type(feature)(decode=False))
    return data


def _mp4(frames: np.ndarray) -> bytes:
    """Frames (T, 3, H, W) uint8, one a second, without loss."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"mteb gives a video as {frames.dtype} {frames.shape}; frames must be uint8 of (T, 3, H, W)")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264rgb", rate=1, options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "rgb24"
        for pixels in frames.transpose(0, 2, 3, 1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def picture_kind(task_metadata: Any) -> str:
    """What a task's images are to us: pages of documents are pages."""
    return "page" if task_metadata.type == "DocumentUnderstanding" else "image"


def _identity(item: Item) -> bytes:
    """A digest of an item as the encoder gets it. `Item.content_id` would fold white space, which may change a vector."""
    digest = hashlib.blake2b(digest_size=16)
    for part in item.parts:
        payload = part.data.encode() if isinstance(part.data, str) else part.data
        digest.update(f"{part.kind} {part.format} {len(payload)} ".encode())
        digest.update(payload)
    return digest.digest()
