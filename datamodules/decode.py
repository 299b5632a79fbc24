"""Bytes to content, bounded: what a part declares is checked before it is decoded, and what cannot be decoded raises.

Text and code pass as they are. Images become uint8 (H, W, 3), pages a list of such, video uint8 (T, H, W, 3),
audio float32 (samples,) mono at 16 kHz. Limits follow the Gemini API and EmbeddingGemma 2 (`recipe.md`): audio up to
180 s, video up to 120 s at one frame a second and at most 32 frames, longer ones sampled uniformly, PDF up to 6 pages.
The other limits are our choice, made so that no file takes 512 MiB (`tests/test_hostile_media.py`).
"""

import dataclasses
import faulthandler
import io
import json
import math
import os
import re
import resource
import signal
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import pypdfium2
import soundfile
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from datamodules.sample import TEXT_KINDS, Example, Item, Part

SAMPLE_RATE = 16_000
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
AUDIO_FORMATS = {"wav": b"RIFF", "flac": b"fLaC", "ogg": b"OggS"}
VIDEO_FORMATS = {"mp4": "mp4", "webm": "matroska"}
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # those that a length follows, and the end

MAX_SIDE = 65_535  # pixels of a picture's longer side: what JPEG allows
MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each passes over all pixels
STRIP_PIXELS = 2**20  # of a picture that are converted at a time
SAMPLE_RATES = (1_000, 192_000)  # Hz
MAX_RATE_RATIO = 50_000  # of the fraction rate / 16 kHz, in lowest terms: the filter that resamples is 20 times as long
MAX_CHANNELS = 16
MAX_SAMPLES = 100_000_000  # of all channels together: 3 minutes at 48 kHz and 11 channels
MAX_PEAK = 100.0  # times full scale; a louder sound was never scaled to [-1, 1], and its power may overflow
BLOCK_FRAMES = 65_536  # of a sound that are read at a time
MAX_FRAME_BYTES = 4096 * 2160 * 12 // 8  # of a decoded frame, of which a codec may keep 16; 12 bits a pixel are usual
MAX_FRAME_RATE = 240  # frames a second of video
OFFLINE = {"protocol_whitelist": "none", "enable_drefs": "0"}  # a video is its own bytes: no other file, no network
MAX_PDF_SECONDS = 4.0
MAX_PDF_BYTES = 384 * 2**20  # of memory, besides what the process has


class RefusedError(ValueError):
    """A part that is not used, and why.

    Args:
        message: One sentence with what was met and what is allowed.
        cause: A few fixed words to count by. "does not decode" means that the bytes are bad; any other that the part may be
            whole but is not of a kind or size that is read: "unknown format", "too many pixels", "no pixel", "too many scans",
            "too many pages", "no page", "too long", "no sound", "sample rate", "too many channels", "not finite", "too loud",
            "no video stream", "no frame", "too many frames", "too slow".
    """

    def __init__(self, message: str, cause: str = "does not decode") -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class DecodeLimits:
    """What a part may hold, and how densely video and pages are sampled.

    Args:
        max_pixels: Most pixels of an image or a frame, and of the pages of a PDF together. An image takes up to 16 bytes a
            pixel while it is decoded.
        max_audio_seconds: Longest audio accepted.
        max_video_seconds: Longest video accepted.
        frames_per_second: How many frames of a second of video are kept.
        max_frames: Most frames of a video; longer ones are sampled uniformly.
        max_frame_pixels: Most pixels of a frame that is kept; larger ones are scaled down to it, keeping their shape.
        max_pages: Most pages of a PDF.
        page_height: Height in pixels that a PDF page is rendered to.
        max_seconds: Wall-clock seconds that decoding an example may take, see `time_limit`.
    """

    max_pixels: int = 25_000_000
    max_audio_seconds: float = 180.0
    max_video_seconds: float = 120.0
    frames_per_second: float = 1.0
    max_frames: int = 32
    max_frame_pixels: int = 1_048_576
    max_pages: int = 6
    page_height: int = 1024
    max_seconds: float = 20.0


def decode_example(example: Example, limits: DecodeLimits) -> Example:
    """The example with the content of every part filled in.

    Raises:
        RefusedError: A part is not used, or all together take too long.
    """
    with time_limit(limits.max_seconds):
        return dataclasses.replace(
            example,
            query=None if example.query is None else decode_item(example.query, limits),
            target=None if example.target is None else decode_item(example.target, limits),
            negatives=tuple(decode_item(negative, limits) for negative in example.negatives),
        )


def decode_item(item: Item, limits: DecodeLimits) -> Item:
    """The item with the content of every part filled in.

    Raises:
        RefusedError: A part is not used, or all together take too long.
    """
    with time_limit(limits.max_seconds):
        return dataclasses.replace(item, parts=tuple(decode_part(part, limits) for part in item.parts))


def decode_part(part: Part, limits: DecodeLimits) -> Part:
    """The part with `content` filled in.

    Raises:
        RefusedError: The format is not one of ours, a limit is exceeded, or the bytes do not decode; its `cause` says which.
    """
    if part.kind in TEXT_KINDS:
        return dataclasses.replace(part, content=part.data)
    assert isinstance(part.data, bytes)
    decoders = {"image": decode_image, "page": decode_page, "audio": decode_audio, "video": decode_video}
    try:
        with warnings.catch_warnings(action="ignore"):  # a file is used or refused, and either way says nothing on the screen
            content = decoders[part.kind](part.data, part.format, limits)
    except RefusedError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, met before ours
        raise RefusedError(str(error), "too many pixels") from error
    except Exception as error:  # the media libraries raise types of their own; all mean that the bytes are bad
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"this {part.kind} ({part.format}, {len(part.data)} bytes) does not decode: {reason}") from error
    return dataclasses.replace(part, content=content)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Refuse what takes longer than that, by the wall clock.

    Works in the main thread alone (a loader's worker process has one of its own), elsewhere it does nothing. It acts when C
    code returns to the interpreter: a library that never does is not stopped. An alarm that is due sooner, such as that of
    an enclosing limit, stays in charge; a later one goes on afterwards.

    Raises:
        RefusedError: The time is over.
    """
    began = time.monotonic()
    remaining, interval = signal.getitimer(signal.ITIMER_REAL)
    if threading.current_thread() is not threading.main_thread() or 0 < remaining <= seconds:
        yield
        return
    armed = True

    def stop(*_: Any) -> None:
        if armed and time.monotonic() - began >= seconds:
            raise RefusedError(f"this takes longer than the {seconds:g} s allowed for decoding", "too slow")

    former = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again, because a library's callback may swallow the error
            yield
            stop()
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former or signal.SIG_DFL)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 1e-3), interval)


def decode_image(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """JPEG, PNG or WebP to uint8 (H, W, 3), upright as EXIF says; transparency is laid on white, 16 bits are cut to 8."""
    _check_format("image", format, IMAGE_FORMATS)
    with Image.open(io.BytesIO(data), formats=tuple(set(IMAGE_FORMATS.values()))) as image:
        _check_pixels(image.width, image.height, limits)
        if image.format == "JPEG":
            scans = _num_scans(data)
            _require(scans <= MAX_SCANS, f"this JPEG has {scans} scans; allowed: at most {MAX_SCANS}", "too many scans")
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
        rows = max(1, STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):  # each whole copy of a picture would take four bytes a pixel
            pixels[top : top + rows] = _rgb(image.crop((0, top, image.width, min(top + rows, image.height))))
        return pixels


def _num_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end marker."""
    position, scans = 2, 0
    while (found := JPEG_MARKER.search(data, position)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return scans


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def decode_page(data: bytes, format: str, limits: DecodeLimits) -> list[np.ndarray]:
    """A PDF or a page image to a list of uint8 (H, W, 3).

    A PDF is drawn in a forked child, where time and memory have bounds that C code cannot pass: a PDF of 600 bytes can
    keep PDFium busy for ever, another fill the memory.
    """
    if format != "pdf":
        return [decode_image(data, format, limits)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _draw_and_exit(data, limits, writer)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            head = json.loads(pipe.readline() or "{}")
            pages = [np.empty((*shape, 3), dtype=np.uint8) for shape in head.get("shapes", [])]
            whole = all(pipe.readinto(page.data) == page.nbytes for page in pages)
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if "refused" in head:
        raise RefusedError(*head["refused"])
    _require(status != -signal.SIGALRM, f"drawing this PDF takes longer than {MAX_PDF_SECONDS:g} s", "too slow")
    _require(
        bool(pages) and whole, f"drawing this PDF fails ({status}) or takes over {MAX_PDF_BYTES >> 20} MiB", "does not decode"
    )
    return pages


def _draw_and_exit(data: bytes, limits: DecodeLimits, writer: int) -> NoReturn:
    """Write one line of JSON, the shapes of a PDF's pages or why there are none, then the pixels."""
    try:
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, min(limits.max_seconds, MAX_PDF_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with suppress(ValueError):  # where the limit is lower already
            resource.setrlimit(resource.RLIMIT_AS, (held + MAX_PDF_BYTES, held + MAX_PDF_BYTES))
        pages = []
        try:
            pages = _draw(data, limits)
            head = {"shapes": [page.shape[:2] for page in pages]}
        except Exception as error:
            cause = getattr(error, "cause", "does not decode")
            head = {"refused": [str(error) if cause != "does not decode" else f"this PDF does not decode: {error!r}", cause]}
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(head).encode() + b"\n")
            for page in pages:
                pipe.write(page.data)
    finally:
        os._exit(0)


def _draw(data: bytes, limits: DecodeLimits) -> list[np.ndarray]:
    document = pypdfium2.PdfDocument(data)
    num_pages = len(document)
    _require(num_pages > 0, "this PDF has no page", "no page")
    _require(
        num_pages <= limits.max_pages, f"this PDF has {num_pages} pages; allowed: 1 to {limits.max_pages}", "too many pages"
    )
    sizes = [document.get_page_size(i) for i in range(num_pages)]
    _require(all(0 < side < math.inf for size in sizes for side in size), f"this PDF's pages measure {sizes}", "no pixel")
    scales: list[Any] = [limits.page_height / height for _, height in sizes]
    widths = [math.ceil(width * scale) for (width, _), scale in zip(sizes, scales, strict=True)]
    _check_pixels(sum(widths), limits.page_height, limits)
    pages = []
    for page, scale in zip(document, scales, strict=True):
        pages.append(np.ascontiguousarray(page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3]))
        page.close()
    return pages


def decode_audio(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """WAV, FLAC or Ogg to float32 (samples,), mono, 16 kHz, in [-1, 1]."""
    _check_format("audio", format, AUDIO_FORMATS)
    _require(data.startswith(tuple(AUDIO_FORMATS.values())), f"this {format} begins with {data[:4]!r}", "unknown format")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate = file.samplerate
        _check_sound(file, limits)
        wave = _mono(file)
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly

        divisor = math.gcd(rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // divisor, rate // divisor)
    return np.ascontiguousarray(wave, dtype=np.float32)


def _check_sound(file: soundfile.SoundFile, limits: DecodeLimits) -> None:
    rate, channels, num_samples = file.samplerate, file.channels, file.frames * file.channels
    low, high, seconds, longest = *SAMPLE_RATES, file.frames / file.samplerate, limits.max_audio_seconds
    _require(low <= rate <= high, f"this audio is sampled at {rate} Hz; allowed: {low} to {high}", "sample rate")
    ratio = rate // math.gcd(rate, SAMPLE_RATE)
    _require(ratio <= MAX_RATE_RATIO, f"this audio's {rate} Hz have no small ratio to {SAMPLE_RATE} Hz", "sample rate")
    _require(
        channels <= MAX_CHANNELS, f"this audio has {channels} channels; allowed: at most {MAX_CHANNELS}", "too many channels"
    )
    _require(seconds > 0, "this audio lasts 0.0 s", "no sound")
    _require(seconds <= longest, f"this audio lasts {seconds:.1f} s; allowed: at most {longest} s", "too long")
    _require(num_samples <= MAX_SAMPLES, f"this audio has {num_samples} samples; allowed: at most {MAX_SAMPLES}", "too long")


def _mono(file: soundfile.SoundFile) -> np.ndarray:
    """The mean of the channels, read block by block: all of them at once may take gigabytes."""
    wave = np.empty(file.frames, dtype=np.float32)
    for start in range(0, len(wave), BLOCK_FRAMES):
        wanted = min(BLOCK_FRAMES, len(wave) - start)
        block = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
        _require(len(block) == wanted, f"this audio ends after {start + len(block)} of {len(wave)} frames", "does not decode")
        peak = float(np.abs(block).max())
        _require(math.isfinite(peak), "this audio holds values that are not finite", "not finite")
        _require(peak <= MAX_PEAK, f"this audio reaches {peak:g} times full scale; allowed: at most {MAX_PEAK:g}", "too loud")
        wave[start : start + wanted] = block
    return wave


def decode_video(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """MP4 or WebM to uint8 (T, H, W, 3): frames at the middles of T equal spans of the clip, in the size of the first."""
    _check_format("video", format, VIDEO_FORMATS)
    bound = {"max_pixels": str(min(limits.max_pixels, MAX_FRAME_BYTES * 8 // 12))}  # 12 bits a pixel are the fewest in use
    options = OFFLINE | bound
    with av.open(io.BytesIO(data), mode="r", format=VIDEO_FORMATS[format], options=options) as container:
        _require(bool(container.streams.video), "this file has no video stream", "no video stream")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # starting threads costs more than a short clip
        stream.codec_context.options = bound
        _check_frame(stream.codec_context, limits)
        seconds = container.duration / av.time_base if container.duration else 0.0
        _require(seconds > 0, "this video lasts 0 s", "no frame")
        longest = limits.max_video_seconds
        _require(seconds <= longest, f"this video lasts {seconds:.1f} s; allowed: at most {longest} s", "too long")
        num_frames = min(limits.max_frames, max(1, round(seconds * limits.frames_per_second)))
        wanted = [(i + 0.5) * seconds / num_frames for i in range(num_frames)]
        return _frames_at(_decoded(container, stream, math.ceil(seconds * MAX_FRAME_RATE), limits), wanted, limits)


def _decoded(container: Any, stream: Any, max_decoded: int, limits: DecodeLimits) -> Iterator[Any]:
    """The frames of a stream; its codec is checked after every packet, as what the file's head declares may be a lie."""
    number = 0
    for packet in container.demux(stream):
        frames = packet.decode()
        _check_frame(stream.codec_context, limits)
        number += len(frames)
        _require(number <= max_decoded, f"this video has more than {MAX_FRAME_RATE} frames a second", "too many frames")
        yield from frames


def _frames_at(frames: Iterator[Any], wanted: list[float], limits: DecodeLimits) -> np.ndarray:
    """The frame shown at each of the wanted times (ascending, seconds); the last one stays to the end."""
    shown = next(frames, None)
    if shown is None:
        raise RefusedError("this video holds no frame", "no frame")
    shrink = min(1.0, math.sqrt(limits.max_frame_pixels / (shown.width * shown.height)))
    width, height = max(1, int(shown.width * shrink)), max(1, int(shown.height * shrink))
    reformatter = VideoReformatter()  # kept over the frames: making one costs more than using it

    def pixels(frame: Any) -> np.ndarray:
        return reformatter.reformat(frame, width, height, "rgb24").to_ndarray()

    start, num_found = shown.time, 0
    found = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
    for frame in frames:
        while num_found < len(wanted) and wanted[num_found] < frame.time - start:
            found[num_found] = pixels(shown)
            num_found += 1
        if num_found == len(wanted):
            return found
        shown = frame
    found[num_found:] = pixels(shown)
    return found


def _check_frame(codec: Any, limits: DecodeLimits) -> None:
    """Check the width, height and pixel format of the frames that a codec makes."""
    known = codec.width > 0 and codec.height > 0  # FFmpeg forgets a size above its own bound
    _require(known, f"a frame takes more than {MAX_FRAME_BYTES} bytes or has no size", "too many pixels")
    _check_pixels(codec.width, codec.height, limits)
    num_bytes = codec.width * codec.height * (codec.format.padded_bits_per_pixel if codec.format else 12) // 8
    _require(num_bytes <= MAX_FRAME_BYTES, f"a frame takes {num_bytes} bytes; allowed: {MAX_FRAME_BYTES}", "too many pixels")


def _check_format(kind: str, format: str, allowed: Collection[str]) -> None:
    _require(format in allowed, f"{kind} format {format!r} is not read; allowed: {', '.join(allowed)}", "unknown format")


def _check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    size = f"this picture measures {width} x {height}"
    _require(width > 0 and height > 0, size, "no pixel")
    _require(width * height <= limits.max_pixels, f"{size}; allowed: at most {limits.max_pixels} pixels", "too many pixels")
    _require(max(width, height) <= MAX_SIDE, f"{size}; allowed: sides of at most {MAX_SIDE}", "too many pixels")


def _require(holds: bool, message: str, cause: str) -> None:
    if not holds:
        raise RefusedError(message, cause)
