"""Promises of decoding: every format arrives in its documented shape, limits hold, bad bytes get one clear error."""

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from samples import picture_bytes, sound_bytes

from datamodules.decode import DecodeLimits, decode_part
from datamodules.sample import Part

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
    frames = content("video", video_bytes(muxer, codec, seconds=5, rate=4), format)
    assert frames.shape == (5, 32, 32, 3)
    assert np.allclose(frames.mean(axis=(1, 2, 3)), [0, 20, 40, 60, 80], atol=6)


def test_long_video_is_sampled_uniformly():
    data = video_bytes("mp4", "libx264", seconds=10, rate=2)
    frames = content("video", data, "mp4", DecodeLimits(max_frames=5))
    assert np.allclose(frames.mean(axis=(1, 2, 3)), [20, 60, 100, 140, 180], atol=6)
    assert len(content("video", data, "mp4", DecodeLimits(frames_per_second=2, max_frames=32))) == 20


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
