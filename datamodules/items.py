"""An item of anything a person holds: texts, paths, bytes, arrays, pictures of Pillow, and lists of them.

What is no file becomes one without loss (PNG, WAV in floating point, MP4 without loss), so that all media go the same way: the
decoders' limits hold for all. Strings are text, never a path or an address. An item is one vector, however many parts it has.
"""

import io
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image, ImageOps

from datamodules.media.audio import SAMPLE_RATE
from datamodules.record import KIND_OF
from datamodules.sample import MEDIA_KINDS, TEXT_KINDS, BadExampleError, Item, Part
from datamodules.tar import MAX_MEMBER_BYTES

MAX_PICTURES = 6  # images of an item, as in the Gemini API (`recipe.md`)
MAX_TEXT_BYTES = 16 * 2**20  # of a text file: our choice
MAX_CHANNELS = 16  # of an array of sound; what has more has its axes the other way round
FRAME_RATE = 1.0  # of frames that come without one: the rate at which videos are sampled
KINDS = {"md": "text", "rst": "text", **dict.fromkeys(("ts", "h", "cc", "hpp", "kt", "swift", "scala"), "code"), **KIND_OF}
KEYS = ("text", "code", "image", "page", "video", "audio")  # of a record, in the order of its parts
ALSO = {("text", "code"), ("code", "text"), ("image", "page")}  # what may count as another kind, where that is told
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
HEADS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"fLaC", "flac"), (b"OggS", "ogg"), (b"%PDF", "pdf"))
HEADS_LATER = {b"ftyp": (4, "mp4"), b"WEBP": (8, "webp"), b"WAVE": (8, "wav")}


def item_of(thing: Any) -> Item:
    """The item that something makes.

    Args:
        thing: A string (text), a `Path` (of the kind that its extension says), bytes of a medium, a picture of Pillow, an
            array: (T,) float is sound at 16 kHz, (H, W, 3) uint8 an image, (F, H, W, 3) uint8 a video at a frame a second;
            (array, sampling_rate) or {"array": .., "sampling_rate": ..} is sound at another rate, {"array": ..,
            "video_metadata": {"fps": ..}} a video at another. A list of them is one interleaved item. A record {"title": ..,
            "text": .., "code": .., "image": .., "page": .., "video": .., "audio": ..} has parts in that order, or
            {"title": .., "parts": [..]} in its own. An `Item` or `Part` is itself.

    Raises:
        BadExampleError: It is nothing of the sort, a file cannot be read, or there are too many images.
    """
    if isinstance(thing, Item):
        item = thing
    elif is_record(thing):
        item = Item(tuple(_parts_of_record(thing)), _title(thing))
    else:
        item = Item(tuple(_parts(thing)))
    num_images = sum(part.kind == "image" for part in item.parts)
    if num_images > MAX_PICTURES:
        raise BadExampleError(f"it has {num_images} images; allowed: at most {MAX_PICTURES}", "too many images")
    return item


def is_record(thing: Any) -> bool:
    """Whether something is a record of named parts, and not a sound or a video in a dictionary."""
    return isinstance(thing, Mapping) and "array" not in thing


def file_part(path: Path, kind: str | None = None) -> Part:
    """The part that a file holds, of the kind that its extension says unless told.

    Raises:
        BadExampleError: The extension is none of ours, or the file cannot be read or is too large.
    """
    extension = path.suffix.lower().removeprefix(".")
    if extension not in KINDS:
        raise BadExampleError(f"{path.name}: the extension {path.suffix!r} is none of {', '.join(KINDS)}", "unknown extension")
    natural = KINDS[extension]
    most = MAX_TEXT_BYTES if natural in TEXT_KINDS else MAX_MEMBER_BYTES
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise BadExampleError(f"{path} cannot be read ({error.strerror})", "not readable") from error
    if len(data) > most:
        raise BadExampleError(f"{path} has more than the {most} bytes that are read", "too large")
    try:
        part = Part(natural, data, extension) if natural in MEDIA_KINDS else Part(natural, data.decode("utf-8-sig"))
        return _of_kind(part, kind, path.name)
    except UnicodeDecodeError as error:
        raise BadExampleError(f"{path} is no text in UTF-8 ({error})", "not UTF-8") from error


def format_of(data: bytes) -> str | None:
    """The file extension of a medium's bytes by how they begin; None where they are none of ours."""
    for head, extension in HEADS:
        if data.startswith(head):
            return extension
    for head, (place, extension) in HEADS_LATER.items():
        if data[place : place + len(head)] == head:
            return extension
    return "webm" if data.startswith(b"\x1a\x45\xdf\xa3") else None


def medium_part(data: bytes, kind: str | None = None) -> Part:
    """The part that a medium's bytes make, of the kind that they begin as unless told.

    Raises:
        BadExampleError: They begin as none of ours.
    """
    extension = format_of(data)
    if extension is None:
        raise BadExampleError(f"bytes that begin with {data[:8]!r} are no medium that is read; text is a str", "unknown format")
    return _of_kind(Part(KINDS[extension], data, extension), kind, extension)


def whole_text(text: str) -> str:
    """The text itself.

    Raises:
        BadExampleError: It holds half a character (a lone surrogate), which no file can.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadExampleError(f"a text holds half a character at {error.start}", "malformed text") from error
    return text


def _parts(thing: Any) -> Iterator[Part]:
    if not isinstance(thing, list | tuple) or _is_sound(thing):
        yield _part(thing)
        return
    if not thing:
        raise BadExampleError("an empty list is no item", "empty")
    for part in thing:
        if isinstance(part, list) or (isinstance(part, Mapping) and "title" in part):
            raise BadExampleError("a list of parts cannot hold a list or a title; give them one after another", "nested")
        if is_record(part):
            yield from _parts_of_record(part)
        else:
            yield _part(part)


def _parts_of_record(record: Mapping[str, Any]) -> Iterator[Part]:
    if record.get("parts") is not None:
        if not isinstance(record["parts"], list | tuple) or any(record.get(key) is not None for key in KEYS):
            raise BadExampleError("`parts` must be a list, and then no other part beside it", "malformed record")
        yield from _parts(list(record["parts"]))
        return
    found = [(key, record[key]) for key in KEYS if record.get(key) is not None]
    if not found:
        raise BadExampleError(f"a record needs a value in one of {', '.join(KEYS)} or parts", "empty")
    for key, value in found:
        for one in value if isinstance(value, list) else [value]:
            yield _part(one, key)


def _part(thing: Any, kind: str | None = None) -> Part:
    """The part that something makes, of a kind that is told or is plain."""
    if isinstance(thing, Path):
        return file_part(thing, kind)
    if isinstance(thing, bytes | bytearray):
        return medium_part(bytes(thing), kind)
    if isinstance(thing, Part):
        part = thing
    elif isinstance(thing, str):
        part = Part("text", whole_text(thing))
    elif isinstance(thing, Image.Image):
        part = Part("image", _png(thing), "png")
    elif _is_sound(thing):
        part = Part("audio", _wav(thing[0], thing[1]), "wav")
    elif isinstance(thing, Mapping) and "sampling_rate" in thing:
        part = Part("audio", _wav(thing.get("array"), thing["sampling_rate"]), "wav")
    elif isinstance(thing, Mapping) and "array" in thing:
        part = Part("video", _mp4(np.asarray(thing["array"]), (thing.get("video_metadata") or {}).get("fps")), "mp4")
    elif hasattr(thing, "__array__"):
        part = _part_of_array(np.asarray(thing))
    else:
        raise BadExampleError(f"nothing is made of {_told(thing)}", "unknown type")
    return _of_kind(part, kind, _told(thing))


def _of_kind(part: Part, kind: str | None, told: str) -> Part:
    """The part as another kind where it may be that too: text may be code, a picture a page."""
    if kind is None or kind == part.kind:
        return part
    if (part.kind, kind) not in ALSO:
        raise BadExampleError(f"`{kind}` is {told}, which is {part.kind}", "unknown type")
    return Part(kind, part.data, part.format)


def _is_sound(thing: Any) -> bool:
    """Whether something is samples and their rate."""
    return isinstance(thing, tuple) and len(thing) == 2 and hasattr(thing[0], "__array__") and np.ndim(thing[1]) == 0


def _part_of_array(array: np.ndarray) -> Part:
    if array.ndim == 1 and array.dtype.kind == "f":
        return Part("audio", _wav(array, SAMPLE_RATE), "wav")
    if array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8 and array.size:
        return Part("image", _png(Image.fromarray(array)), "png")
    if array.ndim == 4:
        return Part("video", _mp4(array, None), "mp4")
    raise BadExampleError(
        f"nothing is made of an array of {array.dtype} {array.shape}; sound is (T,) float, an image (H, W, 3) uint8, a video "
        "(F, H, W, 3) uint8",
        "unknown type",
    )


def _png(image: Image.Image) -> bytes:
    """A picture as a file, upright as its EXIF says."""
    file = io.BytesIO()
    try:
        image = ImageOps.exif_transpose(image)
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(file, "PNG", compress_level=1)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reads a file when its pixels are asked for
        raise BadExampleError(f"this picture does not decode: {error}") from error
    return file.getvalue()


def _wav(samples: Any, rate: Any) -> bytes:
    """Samples (T,) or (channels, T), floats or int16, as WAV in floating point."""
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2) or not samples.size:
        raise BadExampleError(f"sound is {samples.dtype} {samples.shape}; it must be float or int16, (T,)", "unknown type")
    if samples.ndim == 2 and len(samples) > MAX_CHANNELS:
        raise BadExampleError(f"sound of {len(samples)} channels; its array must be (channels, T)", "unknown type")
    if not (isinstance(rate, int | float | np.number) and np.isfinite(rate) and rate == int(rate) and rate > 0):
        raise BadExampleError(f"the sampling rate is {rate!r}; it must be a whole number of Hz", "sample rate")
    file = io.BytesIO()
    soundfile.write(file, samples.T.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
    return file.getvalue()


def _mp4(frames: np.ndarray, rate: float | None) -> bytes:
    """Frames (F, H, W, 3) uint8 as a video without loss."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise BadExampleError(f"a video is {frames.dtype} {frames.shape}; it must be uint8 (F, H, W, 3)", "unknown type")
    rate = FRAME_RATE if rate is None else rate
    if not isinstance(rate, int | float) or not 0 < rate < 1000:
        raise BadExampleError(f"a video of {rate!r} frames a second; give a number above 0", "frame rate")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        exact = Fraction(rate).limit_denominator(1001)
        stream: Any = container.add_stream("libx264rgb", rate=exact, options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _title(record: Mapping[str, Any]) -> str | None:
    title = record.get("title")
    if title is not None and not isinstance(title, str):
        raise BadExampleError(f"`title` is {_told(title)}; it must be a str", "malformed record")
    return None if not title else whole_text(title)


def _told(thing: Any) -> str:
    """What something is, in a few words."""
    shape = getattr(thing, "shape", None)
    return f"{type(thing).__name__} {shape}" if shape is not None else f"{type(thing).__name__} ({thing!r:.40})"
