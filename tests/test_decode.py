"""Promises of decoding: every format arrives in its documented shape, limits hold, bad bytes get one clear error."""

import copy
import io
import signal
import struct
import threading
import time
import warnings
from contextlib import suppress
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from samples import picture_bytes, sound_bytes

from datamodules import decode
from datamodules.decode import decode_example, decode_item, decode_part
from datamodules.media.limits import DecodeLimits, time_limit
from datamodules.sample import BadExampleError, Example, Part, media_item

LIMITS = DecodeLimits()


def video_bytes(format: str, codec: str, *, seconds: int, rate: int, size: int = 32) -> bytes:
    """A clip whose brightness is 20 × the second shown."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for n in range(seconds * rate):
            pixels = np.full((size, size, 3), 20 * (n // rate), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def pdf_bytes(num_pages: int) -> bytes:
    file = io.BytesIO()
    pages = [Image.new("RGB", (60, 80), colour) for colour in ("red", "white", "blue", "black", "green", "grey", "pink")][
        :num_pages
    ]
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def content(kind, data, format, limits=LIMITS):
    return decode_part(Part(kind, data, format), limits).content


@pytest.mark.parametrize(("format", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_pictures_become_height_by_width_by_rgb(format, name):
    pixels = content("image", picture_bytes(name, width=40, height=30), format)
    assert pixels.shape == (30, 40, 3)
    assert pixels.dtype == np.uint8
    if format == "png":
        assert (pixels == np.asarray(Image.open(io.BytesIO(picture_bytes(name, width=40, height=30))))).all()


def test_transparency_is_laid_on_white():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(file, "PNG")
    assert (content("image", file.getvalue(), "png") == 255).all()


def test_pictures_stand_upright_and_sixteen_bits_keep_their_light():
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(file, "JPEG", exif=turned)
    assert content("image", file.getvalue(), "jpg").shape == (40, 30, 3)
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 128 << 8, dtype=np.uint16)).save(file, "PNG")
    assert (content("image", file.getvalue(), "png") == 128).all()


@pytest.mark.parametrize("format", ["wav", "flac", "ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_sound_becomes_mono_at_16_khz(format, rate, channels):
    wave = content("audio", sound_bytes(format.upper(), seconds=0.5, rate=rate, channels=channels, pitch=440), format)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 8000) <= 1
    assert abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave) == pytest.approx(440, abs=4)
    assert np.abs(wave).max() == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(("format", "muxer", "codec"), [("mp4", "mp4", "libx264"), ("webm", "webm", "libvpx-vp9")])
def test_video_gives_one_frame_a_second(format, muxer, codec):
    frames, seconds = content("video", video_bytes(muxer, codec, seconds=5, rate=4), format)
    assert seconds == pytest.approx(5, abs=0.1)
    assert frames.shape == (5, 32, 32, 3)
    assert np.allclose(frames.mean(axis=(1, 2, 3)), [0, 20, 40, 60, 80], atol=6)


def test_long_video_is_sampled_uniformly():
    data = video_bytes("mp4", "libx264", seconds=10, rate=2)
    frames = content("video", data, "mp4", DecodeLimits(max_frames=5)).frames
    assert np.allclose(frames.mean(axis=(1, 2, 3)), [20, 60, 100, 140, 180], atol=6)
    assert len(content("video", data, "mp4", DecodeLimits(frames_per_second=2, max_frames=32)).frames) == 20


def test_pdf_pages_are_rendered_in_order():
    pages = content("page", pdf_bytes(3), "pdf", DecodeLimits(page_height=80))
    assert [page.shape for page in pages] == [(80, 60, 3)] * 3
    assert [tuple(page[40, 30]) for page in pages] == [(254, 0, 0), (255, 255, 255), (0, 0, 254)] or np.allclose(
        [page[40, 30] for page in pages], [(255, 0, 0), (255, 255, 255), (0, 0, 255)], atol=3
    )


def test_a_page_may_be_a_picture():
    assert [page.shape for page in content("page", picture_bytes("WEBP"), "webp")] == [(30, 40, 3)]


@pytest.mark.parametrize(
    ("kind", "data", "format", "limits", "message"),
    [
        ("image", picture_bytes(), "png", DecodeLimits(max_pixels=100), "measures 40 x 30; allowed: at most 100"),
        ("image", picture_bytes("BMP"), "bmp", LIMITS, "format 'bmp' is not read"),
        ("image", picture_bytes("BMP"), "png", LIMITS, "does not decode"),
        ("image", picture_bytes()[:200], "png", LIMITS, "does not decode"),
        ("image", b"", "jpg", LIMITS, "does not decode"),
        ("audio", sound_bytes(seconds=2), "wav", DecodeLimits(max_audio_seconds=1), "lasts 2.0 s"),
        ("audio", b"RIFF", "wav", LIMITS, "does not decode"),
        ("audio", sound_bytes(), "mp3", LIMITS, "format 'mp3' is not read"),
        ("video", b"\x00" * 100, "mp4", LIMITS, "does not decode"),
        ("video", video_bytes("mp4", "libx264", seconds=3, rate=1), "mp4", DecodeLimits(max_video_seconds=2), "lasts 3.0 s"),
        ("page", pdf_bytes(7), "pdf", LIMITS, "has 7 pages; allowed: 1 to 6"),
        ("page", b"%PDF-1.4", "pdf", LIMITS, "does not decode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_gets_one_clear_error(kind, data, format, limits, message):
    with pytest.raises(ValueError, match=message):
        decode_part(Part(kind, data, format), limits)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_takes_too_long_is_refused_and_the_alarm_is_put_back():
    former = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    began = time.monotonic()
    with pytest.raises(BadExampleError, match=r"longer than the 0.1 s") as caught, time_limit(0.1):
        spin(5)
    assert caught.value.cause == "too slow"
    assert time.monotonic() - began < 1
    assert signal.getsignal(signal.SIGALRM) is former[0]
    assert signal.getitimer(signal.ITIMER_REAL) == pytest.approx(former[1], abs=1)


def test_a_time_limit_holds_where_its_error_is_swallowed_once():
    def swallowing() -> None:
        with suppress(BadExampleError):
            spin(5)
        spin(5)

    began = time.monotonic()
    with pytest.raises(BadExampleError), time_limit(0.1):
        swallowing()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("outer", "inner"), [(0.1, 5.0), (5.0, 0.1)])
def test_the_shorter_of_two_nested_time_limits_holds(outer, inner):
    began = time.monotonic()
    with pytest.raises(BadExampleError, match=r"0\.1 s"), time_limit(outer), time_limit(inner):
        spin(3)
    assert time.monotonic() - began < 1


def test_an_outer_time_limit_goes_on_after_an_inner_one():
    def two_steps() -> None:
        with time_limit(0.2):
            spin(0.01)
        spin(3)

    with pytest.raises(BadExampleError, match=r"0\.3 s"), time_limit(0.3):
        two_steps()


def test_another_thread_has_no_time_limit():
    done = []

    def work() -> None:
        with time_limit(0.01):
            spin(0.1)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_items_and_examples_have_a_time_limit():
    item, limits = media_item("image", picture_bytes(), "png"), DecodeLimits(max_seconds=1e-6)
    for decoding in (lambda: decode_item(item, limits), lambda: decode_example(Example("a", query=item), limits)):
        with pytest.raises(BadExampleError) as caught:
            decoding()
        assert caught.value.cause == "too slow"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError("deep"),
        OverflowError("large"),
        SystemError("C"),
        ZeroDivisionError("zero"),
        struct.error("short"),
        KeyError("a\nb"),
        DeprecationWarning("old"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_of_a_library_means_that_the_bytes_are_bad(error, monkeypatch):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setitem(decode.DECODERS, "image", fail)
    with pytest.raises(BadExampleError, match=r"^this image \(png, 1 bytes\) does not decode: .+$") as caught:
        decode_part(Part("image", b"x", "png"), LIMITS)
    assert caught.value.cause == "does not decode"


def test_a_librarys_warning_neither_shows_nor_stops(monkeypatch):
    monkeypatch.setitem(decode.DECODERS, "image", lambda *_: warnings.warn("odd", stacklevel=1))
    decode_part(Part("image", b"x", "png"), LIMITS)


def test_a_refusal_keeps_its_cause_between_processes():
    error = copy.copy(BadExampleError("a b", "too long"))  # through what it is made again from in another process
    assert (str(error), error.cause) == ("a b", "too long")
    assert BadExampleError("made by a loader from its message").cause == "does not decode"


def test_large_frames_are_scaled_down_in_their_shape():
    data = video_bytes("mp4", "libx264", seconds=2, rate=1, size=64)
    frames = content("video", data, "mp4", DecodeLimits(max_frame_pixels=16 * 16)).frames
    assert frames.shape == (2, 16, 16, 3)
    assert np.allclose(frames.mean(axis=(1, 2, 3)), [0, 20], atol=6)


def test_a_large_picture_equals_the_same_converted_at_once():
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1000, 4), dtype=np.uint8)
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(file, "PNG", exif=turned, compress_level=1)
    white = Image.alpha_composite(Image.new("RGBA", (1000, 1500), "white"), Image.fromarray(pixels)).convert("RGB")
    assert (content("image", file.getvalue(), "png") == np.rot90(np.asarray(white), -1)).all()
