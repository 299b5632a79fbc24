"""Promises of items made of anything: strings are text, everything else is the medium that it is, without loss or doubt."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import picture_bytes, sound_bytes

from datamodules.decode import decode_item
from datamodules.items import MAX_PICTURES, format_of, item_of
from datamodules.media.limits import DecodeLimits
from datamodules.sample import BadExampleError, Item, Part, text_item

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
WAVE = np.sin(np.arange(8000, dtype=np.float32) / 9)
PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj "
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\ntrailer<</Root 1 0 R>>"
)


def film(num_frames: int = 4) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (num_frames, 8, 10, 3), dtype=np.uint8)


def decoded(thing: object) -> list:
    return [part.content for part in decode_item(item_of(thing), DecodeLimits()).parts]


def kinds(thing: object) -> list[tuple[str, str]]:
    return [(part.kind, part.format) for part in item_of(thing).parts]


@pytest.mark.parametrize("text", ["a.png", "/etc/hostname", "https://example.org/x.png", "file:///etc/hostname", "", "données"])
def test_a_string_is_text_whatever_it_looks_like(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(picture_bytes())
    assert item_of(text) == text_item(text)
    assert item_of([text]) == text_item(text)


def test_a_path_is_of_the_kind_that_its_extension_says(tmp_path):
    files = {
        "a.PNG": (picture_bytes(), ("image", "png")),
        "b.jpeg": (picture_bytes("JPEG"), ("image", "jpeg")),
        "c.ogg": (sound_bytes("OGG"), ("audio", "ogg")),
        "d.pdf": (PDF, ("page", "pdf")),
        "e.txt": ("\ufeffgrün".encode(), ("text", "")),
        "f.md": (b"# x", ("text", "")),
        "g.py": (b"x = 1\n", ("code", "")),
    }
    for name, (data, kind) in files.items():
        (tmp_path / name).write_bytes(data)
        assert kinds(tmp_path / name) == [kind]
    assert item_of(tmp_path / "e.txt") == text_item("grün")
    assert item_of(tmp_path / "g.py").parts[0].data == "x = 1\n"
    assert kinds({"page": tmp_path / "a.PNG"}) == [("page", "png")]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "WAV", "FLAC", "OGG", "pdf", "mp4"])
def test_bytes_are_known_by_how_they_begin(format):
    if format in ("WAV", "FLAC", "OGG"):
        data, kind = sound_bytes(format), "audio"
    elif format in ("pdf", "mp4"):
        data, kind = (PDF, "page") if format == "pdf" else (item_of(film()).parts[0].data, "video")
    else:
        data, kind = picture_bytes(format), "image"
    found = "jpg" if format == "JPEG" else format.lower()
    assert kinds(data) == [(kind, found)]
    assert isinstance(data, bytes)
    assert format_of(data) == found
    assert decoded(data)[0] is not None


def test_arrays_and_pictures_lose_nothing():
    np.testing.assert_array_equal(decoded(PIXELS)[0], PIXELS)
    np.testing.assert_array_equal(decoded(Image.fromarray(PIXELS))[0], PIXELS)
    np.testing.assert_array_equal(decoded(torch.from_numpy(PIXELS))[0], PIXELS)
    for sound in (
        WAVE,
        (WAVE, 16_000),
        {"array": WAVE, "sampling_rate": 16_000},
        {"array": WAVE[None], "sampling_rate": 16000.0},
    ):
        np.testing.assert_array_equal(decoded(sound)[0], WAVE)
    whole = np.array([0, 2**14, -(2**15)] * 9, np.int16)
    np.testing.assert_array_equal(decoded((whole, 16_000))[0], [0, 0.5, -1] * 9)
    for video in (film(), {"array": film(), "video_metadata": {"fps": 1}}):
        content = decoded(video)[0]
        np.testing.assert_array_equal(content.frames, film())
        assert content.seconds == pytest.approx(4)


def test_sound_at_another_rate_is_resampled_and_film_at_another_rate_sampled():
    assert len(decoded((WAVE, 8_000))[0]) == 16_000
    content = decoded({"array": film(8), "video_metadata": {"fps": 4}})[0]
    assert (len(content.frames), content.seconds) == (2, pytest.approx(2))
    assert len(decoded(film(70))[0].frames) == 32  # sampled over the whole length


def test_a_picture_is_upright_as_its_file_says():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decoded(Image.open(io.BytesIO(file.getvalue())))[0], decoded(file.getvalue())[0])
    assert decoded(file.getvalue())[0].shape == (5, 6, 3)


def test_a_list_is_one_item_whose_parts_keep_their_order():
    item = item_of(["see", picture_bytes(), "and hear", (WAVE, 16_000), {"code": "f()"}, Part("text", "end")])
    assert [part.kind for part in item.parts] == ["text", "image", "text", "audio", "code", "text"]
    assert item.modality == "mixed"
    parts = {"title": "t", "parts": ["see", {"image": picture_bytes()}, {"text": "and", "audio": sound_bytes()}]}
    assert [part.kind for part in item_of(parts).parts] == ["text", "image", "text", "audio"]
    assert item_of(parts).title == "t"


def test_a_record_has_its_parts_in_one_order():
    record = {"audio": sound_bytes(), "image": [picture_bytes(), PIXELS], "title": "a", "text": "b", "video": None, "id": 3}
    item = item_of(record)
    assert [part.kind for part in item.parts] == ["text", "image", "image", "audio"]
    assert item.title == "a"
    assert item_of({"text": "b", "title": ""}) == text_item("b")
    assert item_of(item) is item


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (b"plain", "no medium that is read; text is a str"),
        (b"", "no medium that is read"),
        (5, r"nothing is made of int \(5\)"),
        (None, "nothing is made of NoneType"),
        ([], "an empty list is no item"),
        ([["a"]], "cannot hold a list"),
        ({"title": "x"}, "a record needs a value in one of text, code"),
        ({"image": "a.png"}, r"`image` is str \('a.png'\), which is text"),
        ({"text": 5}, "nothing is made of int"),
        ({"text": picture_bytes()}, "which is image"),
        ({"audio": PIXELS}, "`audio` is ndarray .6, 5, 3., which is image"),
        ({"text": "a", "parts": ["b"]}, "no other part beside it"),
        ({"title": 3, "text": "a"}, "`title` is int"),
        (np.zeros((3, 6, 5), np.uint8), r"an array of uint8 \(3, 6, 5\)"),
        (np.zeros((0, 5, 3), np.uint8), "nothing is made of an array"),
        (np.zeros(5, np.int64), "nothing is made of an array of int64"),
        (np.zeros(0, np.float32), "sound is float32"),
        ((np.zeros((100, 2), np.float32), 16_000), "sound of 100 channels"),
        ((WAVE, 0), "the sampling rate is 0"),
        ((WAVE, 16_000.5), "the sampling rate is 16000.5"),
        ((WAVE, float("inf")), "the sampling rate is inf"),
        (np.zeros((2, 4, 4), np.float32), "nothing is made of an array of float32"),
        (np.zeros((2, 4, 4, 4), np.uint8), "a video is uint8"),
        ({"array": film(), "video_metadata": {"fps": 0}}, "a video of 0 frames a second"),
        ([PIXELS] * 7, "it has 7 images; allowed: at most 6"),
        ("half \ud800", "half a character at 5"),
        (Path("nowhere.png"), "nowhere.png cannot be read"),
        (Path("a.xyz"), "the extension '.xyz' is none of md, rst"),
    ],
)
def test_what_makes_no_item_is_refused_by_name(thing, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadExampleError, match=message):
        item_of(thing)


def test_files_that_hold_too_much_or_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BadExampleError, match=r"a.txt is no text in UTF-8"):
        item_of(tmp_path / "a.txt")
    (tmp_path / "b.txt").touch()
    os.truncate(tmp_path / "b.txt", 2**24 + 1)
    with pytest.raises(BadExampleError, match="has more than the 16777216 bytes"):
        item_of(tmp_path / "b.txt")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(BadExampleError, match=r"c.png cannot be read \(Is a directory\)"):
        item_of(tmp_path / "c.png")
    broken = Image.open(io.BytesIO(picture_bytes()[:200]))
    with pytest.raises(BadExampleError, match="this picture does not decode"):
        item_of(broken)


def test_as_many_images_as_are_allowed_are_taken():
    assert len(item_of([PIXELS] * MAX_PICTURES).parts) == 6
    assert isinstance(item_of(Item((Part("text", "a"),))), Item)
