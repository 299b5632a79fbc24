"""Small things to test with: texts, sizes of a tiny encoder, pictures and sounds made on the spot."""

import gc
import io
import json
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from torch import Tensor
from webdataset.compat import WebDataset

from datamodules.processors.inputs import Inputs
from datamodules.sample import Example, media_item, text_item
from datamodules.stream import Source

TEXTS = ["a small red circle", "ein großer blauer Stern", "def f(x): return x + 1", "0123456789", "the cat sat on the mat"]
TINY_TEXT = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TINY_VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": ""}

# Overrides of conf/quickstart/prefinetune that make a run of seconds.
TINY = [
    "data.num_workers=0",
    "data.steps_per_block=14",
    "data.processor.vocab_size=400",
    *(f"data.tasks.world/{name}.batch_size=4" for name in ("text-image", "text-page", "text-audio", "text-video")),
    *(f"data.tasks.world/{name}.batch_size=4" for name in ("text-code", "text-text", "mixed-image")),
    "model.encoder.embedding_dim=16",
    "model.encoder.prefixes=[4,16]",
    "model.encoder.backbone.text.vocab_size=400",
    "model.encoder.backbone.text.hidden_size=32",
    "model.encoder.backbone.text.intermediate_size=48",
    "model.encoder.backbone.text.num_hidden_layers=1",
    "model.encoder.backbone.text.head_dim=8",
    *(f"model.encoder.backbone.towers.{name}.arguments={json.dumps(TINY_VIT)}" for name in ("image", "spectrogram")),
]


def ids_of(inputs: Inputs) -> list[Tensor]:
    """Token ids of each item."""
    return list(inputs.token_ids.split(inputs.lengths.tolist()))


def picture_bytes(format: str = "PNG", *, width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def sound_bytes(
    format: str = "WAV", *, seconds: float = 0.5, rate: int = 16_000, channels: int = 1, pitch: float = 440.0
) -> bytes:
    time = np.arange(round(seconds * rate)) / rate
    wave = np.repeat(0.5 * np.sin(2 * np.pi * pitch * time)[:, None], channels, axis=1)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format)
    return file.getvalue()


def zeros(number: int) -> bytes:
    """That many zero bytes, deflated: about a thousandth."""
    deflate, pieces = zlib.compressobj(1), []
    for start in range(0, number, 2**20):
        pieces.append(deflate.compress(bytes(min(2**20, number - start))))
    return b"".join(pieces) + deflate.flush()


def png_file(width: int, height: int, bits: int, colour: int, data: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the declared size and type of colour around deflated `data`, whatever they are."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pieces = [head, *chunks, (b"IDAT", data), (b"IEND", b"")]
    checked = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in pieces]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def wav_file(*, rate: int = 16_000, channels: int = 1, data: bytes = bytes(32_000), size: int | None = None) -> bytes:
    """A WAV of 16 bits whose head declares what it is told."""
    width = 2 * channels & 0xFFFF
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, min(2**32 - 1, rate * width), width, 16)
    body = b"WAVEfmt " + head + b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pdf_file(*objects: bytes, trailer: bytes = b"") -> bytes:
    """A PDF of the objects 1, 2, ..; the first is its catalogue."""
    data, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    count = len(objects) + 1
    last = b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (count, trailer, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % count + table + last


def stream_object(data: bytes, entries: bytes = b"") -> bytes:
    """A PDF's stream with these entries in its dictionary."""
    return b"<<%s/Length %d>>stream\n" % (entries, len(data)) + data + b"\nendstream"


def pairs(number: int, *, text: str = "text") -> list[Example]:
    """Examples k000, k001, ..: a text and a small picture, no two alike."""
    pictures = (picture_bytes(width=6, height=4, seed=n) for n in range(number))
    return [Example(f"k{n:03d}", text_item(f"{text} {n}"), media_item("image", p, "png")) for n, p in enumerate(pictures)]


@dataclass(frozen=True)
class Watched(Source):
    """A source that writes into its split's `read.txt` which positions are read, in whatever process."""

    def read(self, position: int) -> Example:
        with Path(str(self.split.folder), "read.txt").open("a") as file:
            file.write(f"{position}\n")
        return super().read(position)


def keys_of(task: str, step: int, examples: Sequence[Example], *, rows: Any, faults: tuple[Any, ...]) -> Any:
    """Stands in for collating: what a batch was made for and of."""
    return task, step, [example.key for example in examples], rows.tolist(), faults


def read_by_webdataset(*tars: Path, **options: Any) -> list[dict[str, Any]]:
    """What plain webdataset makes of some tars, in order; it leaves files open, which are closed here."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        samples = list(WebDataset([str(tar) for tar in tars], shardshuffle=False, **options))
        gc.collect()
    return samples
