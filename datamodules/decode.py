"""Bytes to content, bounded: what a part declares is checked before it is decoded, and what cannot be decoded raises.

Text and code pass as they are. Images become uint8 (H, W, 3), pages a list of such, video uint8 (T, H, W, 3),
audio float32 (samples,) mono at 16 kHz. Limits follow the Gemini API and EmbeddingGemma 2 (`recipe.md`): audio up to
180 s, video up to 120 s at one frame a second and at most 32 frames, longer ones sampled uniformly, PDF up to 6 pages.
"""

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import pypdfium2
import soundfile
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from datamodules.sample import TEXT_KINDS, Example, Item, Part

SAMPLE_RATE = 16_000
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
AUDIO_FORMATS = ("wav", "flac", "ogg")
VIDEO_FORMATS = {"mp4": "mp4", "webm": "matroska"}


class RefusedError(ValueError):
    """A part that may be whole but is not of a kind or size that is read."""


@dataclass(frozen=True)
class DecodeLimits:
    """What a part may hold, and how densely video and pages are sampled.

    Args:
        max_pixels: Most pixels of an image, a page or a frame.
        max_audio_seconds: Longest audio accepted.
        max_video_seconds: Longest video accepted.
        frames_per_second: How many frames of a second of video are kept.
        max_frames: Most frames of a video; longer ones are sampled uniformly.
        max_pages: Most pages of a PDF.
        page_height: Height in pixels that a PDF page is rendered to.
    """

    max_pixels: int = 40_000_000
    max_audio_seconds: float = 180.0
    max_video_seconds: float = 120.0
    frames_per_second: float = 1.0
    max_frames: int = 32
    max_pages: int = 6
    page_height: int = 1024


def decode_example(example: Example, limits: DecodeLimits) -> Example:
    """The example with the content of every part filled in."""
    return dataclasses.replace(
        example,
        query=None if example.query is None else decode_item(example.query, limits),
        target=None if example.target is None else decode_item(example.target, limits),
        negatives=tuple(decode_item(negative, limits) for negative in example.negatives),
    )


def decode_item(item: Item, limits: DecodeLimits) -> Item:
    """The item with the content of every part filled in."""
    return dataclasses.replace(item, parts=tuple(decode_part(part, limits) for part in item.parts))


def decode_part(part: Part, limits: DecodeLimits) -> Part:
    """The part with `content` filled in.

    Raises:
        ValueError: The format is not one of ours, a limit is exceeded, or the bytes do not decode.
    """
    if part.kind in TEXT_KINDS:
        return dataclasses.replace(part, content=part.data)
    assert isinstance(part.data, bytes)
    decoders = {"image": decode_image, "page": decode_page, "audio": decode_audio, "video": decode_video}
    try:
        content = decoders[part.kind](part.data, part.format, limits)
    except RefusedError:
        raise
    except Exception as error:  # the media libraries raise types of their own; all mean that the bytes are bad
        raise ValueError(f"this {part.kind} ({part.format}, {len(part.data)} bytes) does not decode: {error}") from error
    return dataclasses.replace(part, content=content)


def decode_image(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """JPEG, PNG or WebP to uint8 (H, W, 3), upright as EXIF says; transparency is laid on white, 16 bits are cut to 8."""
    if format not in IMAGE_FORMATS:
        raise RefusedError(f"image format {format!r} is not read; allowed: {', '.join(IMAGE_FORMATS)}")
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        _check_pixels(image.width, image.height, limits)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.asarray(image.convert("RGB"))


def decode_page(data: bytes, format: str, limits: DecodeLimits) -> list[np.ndarray]:
    """A PDF or a page image to a list of uint8 (H, W, 3)."""
    if format != "pdf":
        return [decode_image(data, format, limits)]
    document = pypdfium2.PdfDocument(data)
    try:
        if not 1 <= len(document) <= limits.max_pages:
            raise RefusedError(f"this PDF has {len(document)} pages; allowed: 1 to {limits.max_pages}")
        pages = []
        for page in document:
            width, height = page.get_size()
            scale = limits.page_height / height
            _check_pixels(int(width * scale), limits.page_height, limits)
            pages.append(np.ascontiguousarray(page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3]))
        return pages
    finally:
        document.close()


def decode_audio(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """WAV, FLAC or Ogg to float32 (samples,), mono, 16 kHz, in [-1, 1]."""
    if format not in AUDIO_FORMATS:
        raise RefusedError(f"audio format {format!r} is not read; allowed: {', '.join(AUDIO_FORMATS)}")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        seconds = file.frames / file.samplerate
        if not 0 < seconds <= limits.max_audio_seconds:
            raise RefusedError(
                f"this audio lasts {seconds:.1f} s; allowed: more than 0 and at most {limits.max_audio_seconds} s"
            )
        wave, rate = file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly

        divisor = np.gcd(rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // divisor, rate // divisor)
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    if not np.isfinite(wave).all():
        raise RefusedError("this audio holds values that are not finite")
    return wave


def decode_video(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """MP4 or WebM to uint8 (T, H, W, 3): frames at the middles of T equal spans of the clip."""
    if format not in VIDEO_FORMATS:
        raise RefusedError(f"video format {format!r} is not read; allowed: {', '.join(VIDEO_FORMATS)}")
    with av.open(io.BytesIO(data), mode="r", format=VIDEO_FORMATS[format]) as container:
        if not container.streams.video:
            raise RefusedError("this file has no video stream")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # starting threads costs more than a short clip
        _check_pixels(stream.codec_context.width, stream.codec_context.height, limits)
        seconds = container.duration / av.time_base if container.duration else 0.0
        if not 0 < seconds <= limits.max_video_seconds:
            raise RefusedError(
                f"this video lasts {seconds:.1f} s; allowed: more than 0 and at most {limits.max_video_seconds} s"
            )
        num_frames = min(limits.max_frames, max(1, round(seconds * limits.frames_per_second)))
        wanted = [(i + 0.5) * seconds / num_frames for i in range(num_frames)]
        return np.stack(_frames_at(container, stream, wanted))


def _frames_at(container: Any, stream: Any, wanted: list[float]) -> list[np.ndarray]:
    """The frame shown at each of the wanted times (ascending, seconds); the last one stays to the end."""
    found: list[np.ndarray] = []
    reformatter = VideoReformatter()  # kept over the frames: making one costs more than using it

    def pixels(frame: Any) -> np.ndarray:
        return reformatter.reformat(frame, format="rgb24").to_ndarray()

    shown = None
    start = None
    for frame in container.decode(stream):
        start = frame.time if start is None else start
        while shown is not None and len(found) < len(wanted) and wanted[len(found)] < frame.time - start:
            found.append(pixels(shown))
        if len(found) == len(wanted):
            break
        shown = frame
    if shown is None:
        raise RefusedError("this video holds no frame")
    return found + [pixels(shown)] * (len(wanted) - len(found))


def _check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    if not 0 < width * height <= limits.max_pixels:
        raise RefusedError(f"this picture measures {width} x {height}; allowed: at most {limits.max_pixels} pixels")
