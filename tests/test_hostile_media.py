"""Promises of bounded decoding: a hostile file is refused with its cause or decoded, and none hangs or takes the memory.

All files are made here. A fresh process forks for each of them, so that a crash is one file's and growth is exact.
"""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from av.container import InputContainer
from PIL import Image
from samples import pdf_file, picture_bytes, png_file, sound_bytes, stream_object, wav_file, zeros

from datamodules.decode import decode_part
from datamodules.media.limits import DecodeLimits
from datamodules.media.video import OFFLINE
from datamodules.sample import BadExampleError, Part

MAX_SECONDS, MAX_BYTES = 5.0, 512 * 2**20
WIDTH, HEIGHT = 6250, 4000  # together the default limit of pixels
TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: stands upright after a quarter turn
MARKER = Path("/tmp/polyphony-hostile-media-ran-code")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


@dataclass(frozen=True)
class Case:
    """A hostile file. `expected` is the cause of a refusal, a shape, a list of shapes, or a tuple of several such strings."""

    kind: str
    format: str
    build: Callable[[], bytes]
    expected: Any


def picture(mode: str, format: str, *, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, None).save(file, format, **options)
    return file.getvalue()


def many_scans() -> bytes:
    data = picture("RGB", "JPEG", size=(2000, 2000), progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * 500 + b"\xff\xd9"


def animated(format: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (n, n, n)) for n in range(100)]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def sound(format: str, array: np.ndarray, rate: int = 16_000, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, array, rate, format=format, subtype=subtype)
    return file.getvalue()


def silence(format: str, seconds: int, rate: int, channels: int) -> bytes:
    return sound(format, np.zeros((seconds * rate, channels), dtype=np.int16), rate)


def endless_ogg() -> bytes:
    data = sound_bytes("OGG")
    last = data.rindex(b"OggS") + 6
    return data[:last] + (2**62).to_bytes(8, "little") + data[last + 8 :]


def jpeg_of_four_gigapixels() -> bytes:
    size = JPG.index(b"\xff\xc0") + 5
    return JPG[:size] + b"\xff" * 4 + JPG[size + 4 :]


def noise() -> bytes:
    return box(b"mdat", h264(64, 64), lambda body: random.Random(0).randbytes(len(body)))


def flac_of_length(frames: int) -> bytes:
    """A FLAC of half a second whose head declares another number of frames; 0 stands for unknown."""
    data = bytearray(sound_bytes("FLAC"))
    data[21] = data[21] & 0xF0 | frames >> 32
    data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def video(
    format: str,
    codec: str,
    width: int,
    height: int,
    *,
    frames: int = 4,
    rate: int = 1,
    light: int = 0,
    pixels: str = "yuv420p",
    **options: str,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        frame = av.VideoFrame(width, height, pixels)
        for plane, value in zip(frame.planes, (light, 128, 128), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        for n in range(frames):
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def h264(width: int, height: int, **options: Any) -> bytes:
    return video("mp4", "libx264", width, height, preset="ultrafast", **options)


def spliced() -> bytes:
    """A WebM whose frames are first 32 x 32, then 64 x 48."""
    file = io.BytesIO()
    with av.open(io.BytesIO(video("webm", "libvpx", 32, 32))) as first, av.open(file, "w", format="webm") as container:
        stream = container.add_stream_from_template(first.streams.video[0])
        for number, data in enumerate((video("webm", "libvpx", 32, 32), video("webm", "libvpx", 64, 48))):
            with av.open(io.BytesIO(data)) as source:
                assert isinstance(source, InputContainer)
                for packet in source.demux(video=0):
                    if packet.pts is not None:
                        packet.pts = packet.dts = packet.pts + 4000 * number
                        packet.stream = stream
                        container.mux(packet)
    return file.getvalue()


def only_sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def box(name: bytes, data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The MP4 with the body of one box changed, in place."""
    start = data.index(name) + 4
    end = start - 8 + int.from_bytes(data[start - 8 : start - 4], "big")
    body = change(data[start:end])
    assert len(body) == end - start
    return data[:start] + body + data[end:]


def lasting(milliseconds: float) -> bytes:
    """A WebM of 4 frames, a second each, whose head declares another duration."""
    data = video("webm", "libvpx", 32, 32)
    start = data.index(b"\x44\x89\x88") + 3
    return data[:start] + struct.pack(">d", milliseconds) + data[start + 8 :]


def external() -> bytes:
    """A black MP4 that says that its frames lie in another file, which is there and white."""
    target = MARKER.with_suffix(".mp4")
    target.write_bytes(h264(32, 32, light=235))
    path = str(target).encode()
    alias = bytes(10) + bytes([1]) + bytes(27) + bytes(12) + bytes([1]) + bytes(63) + bytes(16)
    alias += bytes(4) + bytes(16)
    alias += struct.pack(">HH", 2, len(path) + len(path) % 2) + path + bytes(len(path) % 2) + struct.pack(">HH", 0xFFFF, 0)
    reference = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    data = h264(32, 32)
    start = data.index(b"url \0\0\0\x01") - 4
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = data.index(name) - 4
        longer = int.from_bytes(data[at : at + 4], "big") + len(reference) - 12
        data = data[:at] + longer.to_bytes(4, "big") + data[at + 4 :]
    return data[:start] + reference + data[start + 12 :]


def page(
    content: bytes = b"",
    *,
    area: str = "0 0 300 400",
    resources: bytes = b"",
    entries: bytes = b"",
    more: Sequence[bytes] = (),
    count: int = 1,
) -> bytes:
    """A PDF of one page; `more` are its objects from number 5 on."""
    return pdf_file(
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count %d>>" % count,
        b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Contents 4 0 R/Resources<<%s>>>>" % (area.encode(), resources),
        stream_object(content, entries),
        *more,
    )


def pages_of_nothing(number: int) -> bytes:
    kids = b" ".join(b"%d 0 R" % (n + 3) for n in range(number))
    leaves = [b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"] * number
    return pdf_file(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, number), *leaves)


def encrypted() -> bytes:
    lock = b"<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>" % (b"41" * 32, b"42" * 32)
    leaf = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"
    head = (b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>")
    return pdf_file(*head, leaf, lock, trailer=b"/Encrypt 4 0 R/ID[<00><00>]")


def drawing_itself() -> bytes:
    form = stream_object(b"/X Do /X Do", b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</X 5 0 R>>>>")
    return page(b"/X Do", resources=b"/XObject<</X 5 0 R>>", more=[form])


def fine_pattern() -> bytes:
    tile = b"/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 1 1]/XStep 0.0001/YStep 0.0001/Resources<<>>"
    paint = b"/Pattern cs /P scn 0 0 300 400 re f"
    return page(paint, resources=b"/Pattern<</P 5 0 R>>", more=[stream_object(b"0 0 1 1 re f", tile)])


def page_picture(width: int, height: int, data: bytes) -> bytes:
    head = b"/Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/DeviceGray/BitsPerComponent 8/Filter/FlateDecode"
    draw = b"300 0 0 400 0 0 cm /I Do"
    return page(draw, resources=b"/XObject<</I 5 0 R>>", more=[stream_object(data, head % (width, height))])


BAD, FULL, UPRIGHT, SHEET = "does not decode", (HEIGHT, WIDTH, 3), (WIDTH, HEIGHT, 3), [(1024, 768, 3)]
PNG, JPG, WEBP = picture_bytes(), picture_bytes("JPEG"), picture_bytes("WEBP")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch) system\n"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


def image(format: str, build: Callable[[], bytes], expected: Any) -> Case:
    return Case("image", format, build, expected)


def audio(format: str, build: Callable[[], bytes], expected: Any) -> Case:
    return Case("audio", format, build, expected)


def movie(format: str, build: Callable[[], bytes], expected: Any) -> Case:
    return Case("video", format, build, expected)


def pdf(build: Callable[[], bytes], expected: Any) -> Case:
    return Case("page", "pdf", build, expected)


CASES = {
    "png that declares 10 gigapixels": image("png", lambda: png_file(100_000, 100_000, 8, 2), "too many pixels"),
    "png one column over the limit": image("png", lambda: png_file(WIDTH + 1, HEIGHT, 8, 2), "too many pixels"),
    "png of one row": image("png", lambda: png_file(25_000_000, 1, 8, 0, zeros(25_000_001)), "too many pixels"),
    "png of no size": image("png", lambda: png_file(0, 0, 8, 2), BAD),
    "png with no data": image("png", lambda: png_file(WIDTH, HEIGHT, 8, 6), BAD),
    "full rgb png": image("png", lambda: png_file(WIDTH, HEIGHT, 8, 2, zeros((3 * WIDTH + 1) * HEIGHT)), FULL),
    "full rgba png, turned": image(
        "png", lambda: png_file(WIDTH, HEIGHT, 8, 6, zeros((4 * WIDTH + 1) * HEIGHT), (b"eXIf", TURNED)), UPRIGHT
    ),
    "full palette png, transparent": image(
        "png",
        lambda: png_file(WIDTH, HEIGHT, 8, 3, zeros((WIDTH + 1) * HEIGHT), (b"PLTE", bytes(range(48))), (b"tRNS", b"\x07\x09")),
        FULL,
    ),
    "full 16 bit png, turned": image(
        "png", lambda: png_file(WIDTH, HEIGHT, 16, 0, zeros((2 * WIDTH + 1) * HEIGHT), (b"eXIf", TURNED)), UPRIGHT
    ),
    "full grey png with alpha": image("png", lambda: png_file(WIDTH, HEIGHT, 8, 4, zeros((2 * WIDTH + 1) * HEIGHT)), FULL),
    "full progressive jpeg, turned": image(
        "jpg",
        lambda: picture("CMYK", "JPEG", progressive=True, subsampling=0, exif=b"Exif\0\0" + TURNED),
        UPRIGHT,
    ),
    "full lossless webp, turned": image(
        "webp", lambda: picture("RGBA", "WEBP", lossless=True, method=0, quality=0, exif=TURNED), UPRIGHT
    ),
    "full lossy webp": image("webp", lambda: picture("RGB", "WEBP", method=0), FULL),
    "webp that declares 268 megapixels": image(
        "webp", lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\x3f\0\xff\x3f\0", (BAD, "too many pixels")
    ),
    "jpeg that declares 4 gigapixels": image("jpg", jpeg_of_four_gigapixels, "too many pixels"),
    "jpeg of 500 scans": image("jpg", many_scans, "too many scans"),
    "png cut in its head": image("png", lambda: PNG[:30], BAD),
    "png cut in its data": image("png", lambda: PNG[: len(PNG) // 2], BAD),
    "jpeg cut in its data": image("jpg", lambda: JPG[: len(JPG) // 2], BAD),
    "webp cut in its data": image("webp", lambda: WEBP[: len(WEBP) // 2], BAD),
    "png flipped": image("png", lambda: PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], BAD),
    "png with a compressed text of 200 MB": image(
        "png", lambda: png_file(1, 1, 8, 2, zeros(4), (b"zTXt", b"a\0\0" + zeros(200 << 20))), BAD
    ),
    "png with a text of 200 MB in utf-8": image(
        "png", lambda: png_file(1, 1, 8, 2, zeros(4), (b"iTXt", b"a\0\1\0\0\0" + zeros(200 << 20))), BAD
    ),
    "png with a profile of 200 MB": image(
        "png", lambda: png_file(1, 1, 8, 2, zeros(4), (b"iCCP", b"a\0\0" + zeros(200 << 20))), (BAD, (1, 1, 3))
    ),
    "png with 200 texts of 1 MB": image(
        "png",
        lambda: png_file(1, 1, 8, 2, zeros(4), *[(b"zTXt", b"a%d\0\0" % n + zeros(2**20)) for n in range(200)]),
        BAD,
    ),
    **{
        f"{name} called png": image("png", lambda name=name: picture_bytes(name), BAD) for name in ("GIF", "TIFF", "BMP", "ICO")
    },
    "svg called png": image("png", lambda: SVG, BAD),
    "eps called jpg": image("jpg", lambda: EPS, BAD),
    "eps": image("eps", lambda: EPS, "unknown format"),
    "nothing": image("png", lambda: b"", BAD),
    "animated png": image("png", lambda: animated("PNG"), (64, 64, 3)),
    "animated webp": image("webp", lambda: animated("WEBP"), (64, 64, 3)),
    "pickle called png": image("png", lambda: pickle.dumps(Evil()), BAD),
    "png with a pickle behind": image("png", lambda: PNG + pickle.dumps(Evil()), (30, 40, 3)),
    "wav at 1 Hz": audio("wav", lambda: wav_file(rate=1), "sample rate"),
    "wav at 0 Hz": audio("wav", lambda: wav_file(rate=0), BAD),
    "wav at 2 GHz": audio("wav", lambda: wav_file(rate=2**31 - 1), "sample rate"),
    "wav at 4 GHz": audio("wav", lambda: wav_file(rate=2**32 - 1), BAD),
    "wav at a prime rate": audio("wav", lambda: wav_file(rate=191_999), "sample rate"),
    "wav at a prime rate for 3 min": audio("wav", lambda: silence("WAV", 180, 49_999, 1), (2_880_000,)),
    "wav at an odd high rate for 3 min": audio("wav", lambda: silence("WAV", 180, 191_996, 1), (2_880_000,)),
    "wav of 3 min and 1 s": audio("wav", lambda: sound("WAV", np.zeros(181_000), 1000, "PCM_U8"), "too long"),
    "wav of 255 channels": audio("wav", lambda: wav_file(channels=255), "too many channels"),
    "wav of 65535 channels": audio("wav", lambda: wav_file(channels=65_535), BAD),
    "wav of no channel": audio("wav", lambda: wav_file(channels=0), BAD),
    "wav that declares 4 GB": audio("wav", lambda: wav_file(size=2**32 - 1), (16_000,)),
    "wav that declares nothing": audio("wav", lambda: wav_file(size=0), "no sound"),
    "wav of no frame": audio("wav", lambda: wav_file(data=b""), "no sound"),
    "wav of not-a-numbers": audio("wav", lambda: sound("WAV", np.full(900, np.nan), subtype="FLOAT"), "not finite"),
    "wav with an infinity": audio("wav", lambda: sound("WAV", np.array([0, 0, np.inf]), subtype="FLOAT"), "not finite"),
    "wav of 1e30": audio("wav", lambda: sound("WAV", np.full(900, 1e30), subtype="FLOAT"), "too loud"),
    "aiff called wav": audio("wav", lambda: sound("AIFF", np.zeros(900)), "unknown format"),
    "flac of 8 silent channels": audio("flac", lambda: silence("FLAC", 62, 192_000, 8), (992_000,)),
    "flac with more of them": audio("flac", lambda: silence("FLAC", 66, 192_000, 8), "too long"),
    "flac of unknown length": audio("flac", lambda: flac_of_length(0), "too long"),
    "flac that declares ten times more": audio("flac", lambda: flac_of_length(80_000), BAD),
    "flac cut": audio("flac", lambda: sound_bytes("FLAC")[:2000], BAD),
    "flac flipped": audio("flac", lambda: sound_bytes("FLAC")[:2000] + b"\xff" * 50 + sound_bytes("FLAC")[2050:], BAD),
    "ogg cut": audio("ogg", lambda: sound_bytes("OGG")[:2000], (BAD, "no sound")),
    "ogg that declares 2**62 frames": audio("ogg", endless_ogg, (BAD, "too long", "no sound")),
    "mp4 of 67 megapixels": movie("mp4", lambda: h264(8192, 8192, frames=1), "too many pixels"),
    "mp4 of 4096 x 2160 with 16 references": movie(
        "mp4",
        lambda: h264(4096, 2160, frames=33, refs="16", bf="0"),
        (32, 743, 1410, 3),
    ),
    "mp4 of 4096 x 2160 at 48 bits a pixel": movie(
        "mp4", lambda: h264(4096, 2160, frames=1, pixels="yuv444p10le"), "too many pixels"
    ),
    "webm of 4096 x 2304": movie(
        "webm",
        lambda: video("webm", "libvpx-vp9", 4096, 2304, frames=1, deadline="realtime"),
        "too many pixels",
    ),
    "mp4 with a longer side": movie("mp4", lambda: h264(16_000, 16), (4, 16, 16_000, 3)),
    "webm of odd size": movie("webm", lambda: video("webm", "libvpx-vp9", 33, 17), (4, 17, 33, 3)),
    "webm that changes size": movie("webm", spliced, (8, 32, 32, 3)),
    "mp4 of 10,000 frames a second": movie("mp4", lambda: h264(32, 32, frames=2000, rate=10_000), "too many frames"),
    "webm that declares 1,000 hours": movie("webm", lambda: lasting(3.6e9), "too long"),
    "webm that declares 1 ms": movie("webm", lambda: lasting(1), "too many frames"),
    "webm that declares 100 s": movie("webm", lambda: lasting(100_000), (32, 32, 32, 3)),
    "webm that declares a negative time": movie("webm", lambda: lasting(-9), "no frame"),
    "webm that declares not-a-number": movie("webm", lambda: lasting(float("nan")), "no frame"),
    "mp4 cut": movie("mp4", lambda: h264(32, 32)[:-300], BAD),
    "webm cut": movie("webm", lambda: video("webm", "libvpx-vp9", 32, 32)[:300], (BAD, "no frame")),
    "mp4 of noise": movie("mp4", noise, (BAD, "no frame")),
    "mp4 without video": movie("mp4", only_sound, "no video stream"),
    "mp4 with frames in another file": movie("mp4", external, "no frame"),
    "playlist called mp4": movie("mp4", lambda: PLAYLIST, BAD),
    "playlist called webm": movie("webm", lambda: PLAYLIST, BAD),
    "concat list called mp4": movie("mp4", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", BAD),
    "concat protocol called mp4": movie("mp4", lambda: b"concat:/etc/passwd|/etc/passwd", BAD),
    "ffmetadata called mp4": movie("mp4", lambda: b";FFMETADATA1\ntitle=x\n", BAD),
    "pickle called mp4": movie("mp4", lambda: pickle.dumps(Evil()), BAD),
    "pdf 1e9 wide": pdf(lambda: page(area="0 0 1000000000 1"), "too many pixels"),
    "pdf 1e9 high": pdf(lambda: page(area="0 0 1 1000000000"), [(1024, 1, 3)]),
    "pdf without a size": pdf(lambda: page(area="0 0 0 0"), [(1024, 792, 3)]),  # PDFium takes US letter
    "pdf of negative size": pdf(lambda: page(area="0 0 -5 -5"), [(1024, 1024, 3)]),
    "pdf of 10,000 pages": pdf(lambda: pages_of_nothing(10_000), "too many pages"),
    "pdf without pages": pdf(lambda: pages_of_nothing(0), (BAD, "no page")),
    "pdf that declares 5 pages": pdf(lambda: page(count=5), BAD),
    "pdf whose pages are a loop": pdf(
        lambda: pdf_file(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[2 0 R]/Count 1>>"), (BAD, "no page")
    ),
    "pdf encrypted": pdf(encrypted, BAD),
    "pdf cut": pdf(lambda: page()[:60], (BAD, "no page")),
    "pdf of garbage": pdf(lambda: page(bytes(range(256)) * 400), SHEET),
    "pdf of brackets": pdf(lambda: page(b"[" * 10**6), SHEET),
    "pdf content of 1 GB": pdf(lambda: page(zeros(2**30), entries=b"/Filter/FlateDecode"), (BAD, "too slow")),
    "pdf picture of 400 megapixels": pdf(lambda: page_picture(20_000, 20_000, zeros(400_000_000)), SHEET),
    "pdf that draws itself": pdf(drawing_itself, (BAD, "too slow")),
    "pdf with a fine pattern": pdf(fine_pattern, "too slow"),
    "pdf with a pickle": pdf(lambda: page() + pickle.dumps(Evil()), SHEET),
}
SEEDS = {
    "jpg": ("image", JPG),
    "png": ("image", PNG),
    "webp": ("image", WEBP),
    "wav": ("audio", sound_bytes()),
    "flac": ("audio", sound_bytes("FLAC")),
    "ogg": ("audio", sound_bytes("OGG")),
    "mp4": ("video", h264(32, 32)),
    "webm": ("video", video("webm", "libvpx-vp9", 32, 32)),
    "pdf": ("page", page(b"0 0 99 99 re f")),
}
NUM_MUTANTS = 36  # of each seed


def mutant(data: bytes, chance: random.Random) -> bytes:
    """The file with some bytes changed, a span cut out or doubled, or its end lost."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
    start, length = chance.randrange(len(changed)), chance.randrange(200)
    change = chance.randrange(5)
    if change == 0:
        del changed[start : start + length]
    elif change == 1:
        changed[start:start] = changed[start : start + length]
    elif change == 2:
        del changed[max(20, start) :]
    return bytes(changed)


def run(folder: Path) -> dict[str, Any]:
    """The outcome of every file of a folder, by name: `result`, `seconds`, `bytes` of growth; none may print."""
    program = [sys.executable, "-W", "error", __file__, str(folder)]
    path = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parent)))
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert not done.stderr, f"decoding says something on the screen: {done.stderr[:2000]}"
    return json.loads(done.stdout)


def report_all(folder: Path) -> None:
    """What the fresh process does: each file in a fork of its own."""
    outcomes = {}
    for file in sorted(folder.iterdir()):
        name, kind, extension = file.name.split(".")
        data = file.read_bytes()
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(30)
            os.write(writer, json.dumps(report(Part(kind, data, extension))).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            outcomes[name] = json.loads(pipe.read() or b'{"result": "crash", "seconds": 99, "bytes": 0}')
        os.waitpid(child, 0)
    print(json.dumps(outcomes))


def report(part: Part) -> dict[str, Any]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        content = decode_part(part, DecodeLimits()).content
        arrays = content if isinstance(content, list) else [getattr(content, "frames", content)]
        result = [array.shape for array in arrays] if isinstance(content, list) else arrays[0].shape
    except BadExampleError as error:
        result = error.cause
    except BaseException as error:
        result = f"raises {type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    after = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"result": result, "seconds": seconds, "bytes": (after - before) * 1024}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hostile")
    MARKER.unlink(missing_ok=True)
    for name, case in CASES.items():
        (folder / f"{name}.{case.kind}.{case.format}").write_bytes(case.build())
    return run(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_with_its_cause_or_decoded(name: str, outcomes: dict[str, Any]) -> None:
    outcome, expected = outcomes[name], json.loads(json.dumps(CASES[name].expected))
    several = isinstance(expected, list) and any(isinstance(choice, str) for choice in expected)
    assert outcome["result"] in (expected if several else [expected])
    assert outcome["seconds"] < MAX_SECONDS
    assert outcome["bytes"] < MAX_BYTES


def test_no_file_runs_code(outcomes: dict[str, Any]) -> None:
    assert outcomes
    assert not MARKER.exists()


def test_the_external_mp4_would_be_read_if_it_were_allowed() -> None:
    allowed = {"enable_drefs": "1", "use_absolute_path": "1"}
    for options, lights in ((allowed, {255}), (allowed | OFFLINE, set())):
        with av.open(io.BytesIO(external()), format="mp4", options=options) as container:
            assert isinstance(container, InputContainer)
            assert {int(frame.to_ndarray(format="gray").max()) for frame in container.decode(video=0)} == lights


def test_mutated_media_are_decoded_or_refused(tmp_path: Path) -> None:
    for extension, (kind, data) in SEEDS.items():
        chance = random.Random(extension)
        for number in range(NUM_MUTANTS):
            (tmp_path / f"{extension}{number}.{kind}.{extension}").write_bytes(mutant(data, chance))
    outcomes = run(tmp_path)
    assert len(outcomes) == NUM_MUTANTS * len(SEEDS)
    wrong = {
        name: outcome
        for name, outcome in outcomes.items()
        if str(outcome["result"]).startswith(("raises", "crash"))
        or outcome["seconds"] > MAX_SECONDS
        or outcome["bytes"] > MAX_BYTES
    }
    assert not wrong


if __name__ == "__main__":
    report_all(Path(sys.argv[1]))
