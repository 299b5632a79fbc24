"""The procedural world: what its splits hold, and that its renderings tell its scenes apart."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import datamodules.world as world_module
from datamodules.decode import decode_example
from datamodules.media.audio import decode_audio
from datamodules.media.limits import DecodeLimits
from datamodules.media.video import decode_video
from datamodules.sample import Example, Item
from datamodules.shards import Split
from datamodules.world import (
    SETS,
    example_of,
    find_near_misses,
    flac_bytes,
    mp4_bytes,
    neighbours_of,
    sample_scenes,
    write_world,
)
from datamodules.world_render import (
    LANGUAGES,
    MOTIONS,
    RHYTHMS,
    Scene,
    SceneObject,
    animation,
    caption,
    picture,
    sound,
)

NUM_TRAIN, NUM_TEST = 60, 12
SHAPES_OF_CONTENT = {"image": (64, 64, 3), "page": (128, 64, 3), "audio": (16_000,), "video": (4, 64, 64, 3)}
MOST_OBJECTS = Scene(
    (
        SceneObject("circle", "red", "small", 0),
        SceneObject("star", "blue", "large", 4),
        SceneObject("cross", "black", "small", 8),
    ),
    "left",
    "slow",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_worker")
    write_world(str(out), num_train=NUM_TRAIN, num_test=NUM_TEST, seed=3, num_workers=1)
    return out / "world"


def read_all(folder: Path) -> list[Example]:
    split = Split(folder)
    return [split.read(position) for position in range(len(split))]


def visible(example: Example) -> str:
    assert example.meta is not None
    return str(example.meta["scene"]["objects"])


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def log_mel(wave: np.ndarray) -> np.ndarray:
    """64 frames of 25 ms by 64 triangular bands up to 8 kHz, HTK's scale: 2595 log10(1 + f / 700)."""
    padded = np.pad(wave, (0, 400))
    frames = np.stack([padded[250 * number : 250 * number + 400] for number in range(64)])
    power = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66) / 2595) - 1)
    hertz = np.arange(257)[:, None] * 16_000 / 512
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.log(power @ np.maximum(0, np.minimum(rising, falling)) + 1e-3)


def heard(scene: Scene) -> np.ndarray:
    return log_mel(decode_audio(flac_bytes(sound(scene)), "flac", DecodeLimits()))


@pytest.mark.parametrize("name", SETS)
def test_train_and_test_share_no_visible_scene(world: Path, name: str) -> None:
    train, test = ([visible(example) for example in read_all(world / name / split)] for split in ("train", "test"))
    assert (len(set(train)), len(set(test))) == (NUM_TRAIN, NUM_TEST)
    assert not set(train) & set(test)


def test_the_bytes_depend_on_the_seed_but_not_on_the_number_of_workers(world: Path, tmp_path: Path) -> None:
    write_world(str(tmp_path / "two"), num_train=NUM_TRAIN, num_test=NUM_TEST, seed=3, num_workers=2)
    assert bytes_below(world) == bytes_below(tmp_path / "two" / "world")
    assert sample_scenes(20, 3) != sample_scenes(20, 4)


def test_scenes_differ_visibly_even_where_there_are_few() -> None:
    scenes = sample_scenes(3000, 0)  # about 240 of one object, of which there are 720
    assert len({scene.objects for scene in scenes}) == 3000
    assert sample_scenes(300, 0) == scenes[:300]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_example_decodes_to_the_documented_shapes(world: Path, name: str, split: str) -> None:
    query_modality, target_modality = name.split("-")
    for example in read_all(world / name / split):
        decoded = decode_example(example, DecodeLimits())
        assert decoded.query is not None
        assert decoded.target is not None
        assert len(decoded.negatives) == (1 if split == "train" else 0)
        assert decoded.query.modality == query_modality
        for item in (decoded.target, *decoded.negatives):
            assert item.modality == target_modality
        for item in (decoded.query, decoded.target, *decoded.negatives):
            assert_documented_shapes(item)


def assert_documented_shapes(item: Item) -> None:
    for part in item.parts:
        if part.kind in SHAPES_OF_CONTENT:
            (content,) = part.content if part.kind == "page" else (getattr(part.content, "frames", part.content),)
            assert content.shape == SHAPES_OF_CONTENT[part.kind]
        else:
            assert part.content


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_four_frames_of_a_video_differ_and_follow_the_motion(motion: str) -> None:
    scene = replace(MOST_OBJECTS, motion=motion)
    frames = decode_video(mp4_bytes(animation(scene)), "mp4", DecodeLimits()).frames.astype(int)
    for first in range(4):
        for second in range(first):
            # a small object covers over 40 of 4096 pixels, and its colour is over 100 from the background in some channel
            assert (np.abs(frames[first] - frames[second]).max(axis=-1) > 60).sum() > 40
    axis, step = {"left": (1, -16), "right": (1, 16), "up": (0, -16), "down": (0, 16)}[motion]
    for before, after in pairwise(frames):
        assert np.abs(np.roll(before, step, axis) - after).mean() < 2  # what compression may leave of 255


def test_the_video_keeps_the_colours_up_to_the_edges() -> None:
    for scene in sample_scenes(30, 9):
        frames = animation(scene)
        decoded = decode_video(mp4_bytes(frames), "mp4", DecodeLimits()).frames
        # a third of the range; with halved colour resolution half of all scenes err by more, at some pixel of an edge
        assert np.abs(decoded.astype(int) - frames).max() < 85, scene


@pytest.mark.parametrize("name", SETS)
def test_a_hard_negative_is_neither_its_target_nor_a_test_target(world: Path, name: str) -> None:
    train, test = read_all(world / name / "train"), read_all(world / name / "test")
    tested = {example.target.content_id for example in test if example.target is not None}
    for example in train:
        (negative,) = example.negatives
        assert example.target is not None
        assert negative.content_id != example.target.content_id
        assert negative.content_id not in tested


def test_a_near_miss_changes_one_attribute_and_never_shows_a_forbidden_scene() -> None:
    scenes = sample_scenes(50, 0)
    for scene in scenes:
        neighbours = list(neighbours_of(scene, random.Random(0)))
        allowed = neighbours.pop()
        (near_miss,) = find_near_misses([scene], {neighbour.objects for neighbour in neighbours}, seed=0)
        assert near_miss.objects == allowed.objects
        lost, won = set(scene.objects) - set(near_miss.objects), set(near_miss.objects) - set(scene.objects)
        ((before, after),) = zip(lost, won, strict=True)
        assert sum(getattr(before, name) != getattr(after, name) for name in ("shape", "colour", "size", "cell")) == 1
        with pytest.raises(ValueError, match="lower num_test"):
            find_near_misses([scene], {neighbour.objects for neighbour in neighbours_of(scene, random.Random(0))}, seed=0)


def test_the_hard_negative_of_a_written_split_avoids_its_test_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *tested, allowed = neighbours_of(MOST_OBJECTS, random.Random(0))
    monkeypatch.setattr(world_module, "SETS", ("text-image",))
    monkeypatch.setattr(world_module, "sample_scenes", lambda num_scenes, seed: [MOST_OBJECTS, *tested])
    write_world(str(tmp_path), num_train=1, num_test=len(tested), num_workers=1)
    (example,) = read_all(tmp_path / "world" / "text-image" / "train")
    (negative,) = decode_example(example, DecodeLimits()).negatives
    assert np.array_equal(negative.parts[0].content, picture(allowed))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_names_everything_and_leaves_no_hole(language: str) -> None:
    words = LANGUAGES[language]
    for number, scene in enumerate(sample_scenes(200, 1)):
        text = caption(scene, language, random.Random(number), moving=True, sounding=True)
        assert not set("{}/") & set(text)
        assert words.motions[list(MOTIONS).index(scene.motion)] in text
        assert words.rhythms[list(RHYTHMS).index(scene.rhythm)] in text
        for thing in scene.objects:
            assert words.places[thing.cell].lower() in text.lower()
        if len(scene.objects) > 1:
            assert words.counts[len(scene.objects) - 2].lower() in text.lower()


@pytest.mark.parametrize(
    ("language", "circle", "star"),
    [
        ("en", "a small red circle at the top left", "a large blue star in the middle"),
        ("de", "ein kleiner roter Kreis oben links", "ein großer blauer Stern genau in der Mitte"),
        ("fr", "un petit cercle rouge en haut à gauche", "une grande étoile bleue au centre"),
        ("es", "un círculo rojo pequeño arriba a la izquierda", "una estrella azul grande justo en el centro"),
    ],
)
def test_adjectives_agree_with_their_noun(language: str, circle: str, star: str) -> None:
    captions = [caption(MOST_OBJECTS, language, random.Random(number)).lower() for number in range(20)]
    assert any(circle.lower() in text and star.lower() in text for text in captions)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_of_distinct_scenes_differ(language: str) -> None:
    scenes = [MOST_OBJECTS, *neighbours_of(MOST_OBJECTS, random.Random(0)), *sample_scenes(300, 2)]
    assert len({caption(scene, language, random.Random(0)) for scene in scenes}) == len({scene.objects for scene in scenes})


def test_a_caption_tells_motion_and_rhythm_only_where_asked() -> None:
    other = replace(MOST_OBJECTS, motion="right", rhythm="fast")
    for moving, sounding in ((False, False), (True, False), (False, True)):
        texts = [caption(scene, "en", random.Random(0), moving=moving, sounding=sounding) for scene in (MOST_OBJECTS, other)]
        assert (texts[0] != texts[1]) == (moving or sounding)


def test_sounds_of_scenes_that_differ_in_one_attribute_differ_in_log_mel() -> None:
    spectrum = heard(MOST_OBJECTS)
    others = [
        *neighbours_of(MOST_OBJECTS, random.Random(0)),
        *(replace(MOST_OBJECTS, rhythm=rhythm) for rhythm in ("steady", "fast")),
    ]
    for other in others:
        # a factor of e in power, in at least 10 of the 64 × 64 places: a marker alone fills 7 frames
        assert (np.abs(heard(other) - spectrum) > 1).sum() >= 10, other


def test_a_mixed_query_tells_exactly_the_objects_that_it_does_not_draw() -> None:
    num_checked = 0
    for number, scene in enumerate(sample_scenes(120, 5)):
        example = decode_example(example_of("mixed-image", number, scene, None, seed=5), DecodeLimits())
        assert example.query is not None
        assert example.meta is not None
        parts = example.query.parts
        assert [part.kind for part in parts] in (["text", "image"], ["text", "image", "text"])
        if example.meta["language"] != "en":  # in English no place's name is a part of another's
            continue
        num_checked += 1
        told = {thing for thing in scene.objects if LANGUAGES["en"].places[thing.cell] in str(parts[0].data).lower()}
        assert told
        assert told < set(scene.objects) or len(scene.objects) == 1
        drawn = tuple(thing for thing in scene.objects if thing not in told)
        assert np.array_equal(parts[1].content, picture(replace(scene, objects=drawn)))
    assert num_checked > 30


def test_a_split_with_the_same_settings_is_left_and_another_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "world" / "text-code" / "test" / "manifest.json"
    write_world(str(tmp_path), num_train=2, num_test=2, num_workers=1)
    written = manifest.stat().st_mtime_ns
    capsys.readouterr()
    write_world(str(tmp_path), num_train=2, num_test=2, num_workers=1)
    assert manifest.stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("it was written with the same settings\n") == 2 * len(SETS)
    write_world(str(tmp_path), num_train=3, num_test=2, num_workers=1)
    assert manifest.stat().st_mtime_ns != written


@pytest.mark.parametrize("counts", [{"num_train": 0}, {"num_test": 0}, {"num_workers": 0}, {"num_train": 100_000}])
def test_impossible_counts_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed: each at least 1"):
        write_world(str(tmp_path), **counts)
    assert not list(tmp_path.iterdir())
