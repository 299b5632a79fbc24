"""MP4 and WebM to frames at even times, from the file's own bytes alone."""

import io
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from datamodules.media.limits import DecodeLimits, check_format, check_pixels, require
from datamodules.sample import BadExampleError

VIDEO_FORMATS = {"mp4": "mp4", "webm": "matroska"}
MAX_FRAME_BYTES = 4096 * 2160 * 12 // 8  # of a decoded frame, of which a codec may keep 16; 12 bits a pixel are usual
MAX_FRAME_RATE = 240  # frames a second of video
OFFLINE = {"protocol_whitelist": "none", "enable_drefs": "0"}  # a video is its own bytes: no other file, no network


class Film(NamedTuple):
    """A decoded video.

    Args:
        frames: uint8 (T, H, W, 3), at the middles of T equal spans, in the size of the first.
        seconds: How long it lasts.
    """

    frames: np.ndarray
    seconds: float


def decode_video(data: bytes, format: str, limits: DecodeLimits) -> Film:
    """MP4 or WebM to its frames at even times."""
    check_format("video", format, VIDEO_FORMATS)
    bound = {"max_pixels": str(min(limits.max_pixels, MAX_FRAME_BYTES * 8 // 12))}  # 12 bits a pixel are the fewest in use
    options = OFFLINE | bound
    with av.open(io.BytesIO(data), mode="r", format=VIDEO_FORMATS[format], options=options) as container:
        require(bool(container.streams.video), "this file has no video stream", "no video stream")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # starting threads costs more than a short clip
        stream.codec_context.options = bound
        _check_frame(stream.codec_context, limits)
        seconds = container.duration / av.time_base if container.duration else 0.0
        require(seconds > 0, "this video lasts 0 s", "no frame")
        longest = limits.max_video_seconds
        require(seconds <= longest, f"this video lasts {seconds:.1f} s; allowed: at most {longest} s", "too long")
        num_frames = min(limits.max_frames, max(1, round(seconds * limits.frames_per_second)))
        wanted = [(i + 0.5) * seconds / num_frames for i in range(num_frames)]
        decoded = _decoded(container, stream, math.ceil(seconds * MAX_FRAME_RATE), limits)
        return Film(_frames_at(decoded, wanted, limits), seconds)


def _decoded(container: Any, stream: Any, max_decoded: int, limits: DecodeLimits) -> Iterator[Any]:
    """The frames of a stream; its codec is checked after every packet, as what the file's head declares may be a lie."""
    number = 0
    for packet in container.demux(stream):
        frames = packet.decode()
        _check_frame(stream.codec_context, limits)
        number += len(frames)
        require(number <= max_decoded, f"this video has more than {MAX_FRAME_RATE} frames a second", "too many frames")
        yield from frames


def _frames_at(frames: Iterator[Any], wanted: list[float], limits: DecodeLimits) -> np.ndarray:
    """The frame shown at each of the wanted times (ascending, seconds); the last one stays to the end."""
    shown = next(frames, None)
    if shown is None:
        raise BadExampleError("this video holds no frame", "no frame")
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
    require(known, f"a frame takes more than {MAX_FRAME_BYTES} bytes or has no size", "too many pixels")
    check_pixels(codec.width, codec.height, limits)
    num_bytes = codec.width * codec.height * (codec.format.padded_bits_per_pixel if codec.format else 12) // 8
    require(num_bytes <= MAX_FRAME_BYTES, f"a frame takes {num_bytes} bytes; allowed: {MAX_FRAME_BYTES}", "too many pixels")
