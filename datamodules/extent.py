"""How much an item holds, from texts and headers alone: how long it will be, before any tokenizer is known."""

import contextlib
import io

import av
import numpy as np
import pypdfium2
import soundfile

from datamodules.media.video import OFFLINE, VIDEO_FORMATS
from datamodules.sample import TEXT_KINDS, Item, Part

# Bytes of text in UTF-8, pictures (images and pages), seconds of sound and of film.
EXTENT = np.dtype([("text", "<u4"), ("pictures", "<u2"), ("audio", "<f4"), ("video", "<f4")])


def extent_of(item: Item | None) -> tuple[int, int, float, float]:
    """An item's row of `EXTENT`; nothing for None, and for media whose header cannot be read (`conf=verify` finds those)."""
    parts = () if item is None else item.parts
    return (
        sum(len(str(part.data).encode()) for part in parts if part.kind in TEXT_KINDS),
        min(sum(_pictures(part) for part in parts if part.kind in ("image", "page")), 2**16 - 1),
        sum((_seconds_of_audio(part) for part in parts if part.kind == "audio"), 0.0),
        sum((_seconds_of_video(part) for part in parts if part.kind == "video"), 0.0),
    )


def _pictures(part: Part) -> int:
    if part.format != "pdf":
        return 1
    assert isinstance(part.data, bytes)
    with contextlib.suppress(pypdfium2.PdfiumError), contextlib.closing(pypdfium2.PdfDocument(part.data)) as document:
        return len(document)
    return 0


def _seconds_of_audio(part: Part) -> float:
    assert isinstance(part.data, bytes)
    with contextlib.suppress(soundfile.SoundFileError), soundfile.SoundFile(io.BytesIO(part.data)) as file:
        return file.frames / max(1, file.samplerate)
    return 0.0


def _seconds_of_video(part: Part) -> float:
    assert isinstance(part.data, bytes)
    with (
        contextlib.suppress(av.FFmpegError, KeyError),
        av.open(io.BytesIO(part.data), mode="r", format=VIDEO_FORMATS[part.format], options=OFFLINE) as container,
    ):
        return (container.duration or 0) / av.time_base
    return 0.0
