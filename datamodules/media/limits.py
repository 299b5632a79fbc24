"""What a medium may hold, and the refusals that all kinds share.

Limits follow the Gemini API and EmbeddingGemma 2 (`recipe.md`): audio up to 180 s, video up to 120 s at one frame a second and
at most 32 frames, longer ones sampled uniformly, PDF up to 6 pages. The others are our choice, made so that no file takes
512 MiB (`tests/test_hostile_media.py`).
"""

import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datamodules.sample import BadExampleError

MAX_SIDE = 65_535  # pixels of a picture's longer side: what JPEG allows


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


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Refuse what takes longer than that, by the wall clock.

    Works in the main thread alone (a loader's worker process has one of its own), elsewhere it does nothing. It acts when C
    code returns to the interpreter: a library that never does is not stopped. An alarm that is due sooner, such as that of
    an enclosing limit, stays in charge; a later one goes on afterwards.

    Raises:
        BadExampleError: The time is over.
    """
    began = time.monotonic()
    remaining, interval = signal.getitimer(signal.ITIMER_REAL)
    if threading.current_thread() is not threading.main_thread() or 0 < remaining <= seconds:
        yield
        return
    armed = True

    def stop(*_: Any) -> None:
        if armed and time.monotonic() - began >= seconds:
            raise BadExampleError(f"this takes longer than the {seconds:g} s allowed for decoding", "too slow")

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


def check_format(kind: str, format: str, allowed: Collection[str]) -> None:
    require(format in allowed, f"{kind} format {format!r} is not read; allowed: {', '.join(allowed)}", "unknown format")


def check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    size = f"this picture measures {width} x {height}"
    require(width > 0 and height > 0, size, "no pixel")
    require(width * height <= limits.max_pixels, f"{size}; allowed: at most {limits.max_pixels} pixels", "too many pixels")
    require(max(width, height) <= MAX_SIDE, f"{size}; allowed: sides of at most {MAX_SIDE}", "too many pixels")


def require(holds: bool, message: str, cause: str) -> None:
    if not holds:
        raise BadExampleError(message, cause)
