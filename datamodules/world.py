"""A procedural multimodal world for the quick start and tests: small scenes, and seven sets of pairs that show them.

A scene holds one to three objects on a 3 × 3 grid, a motion and a rhythm. Every set pairs the same scenes in other forms
(`<query>-<target>`), in a `train` and a `test` split that share no visible scene. Each training example carries one hard
negative: the target of a near miss, the scene with one attribute of one object changed.
"""

import io
import multiprocessing
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from datamodules.media.audio import SAMPLE_RATE
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split, write_split
from datamodules.world_render import (
    COLOURS,
    MOTIONS,
    NUM_CELLS,
    RHYTHMS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    addition,
    animation,
    caption,
    code,
    page,
    picture,
    sound,
)

WORLD_VERSION = 1  # to be raised whenever the same settings would give other bytes
SETS = ("text-image", "text-page", "text-audio", "text-video", "text-code", "text-text", "mixed-image")
LANGUAGE_DRAW = ("en", "en", "en", "de", "fr", "es")
OBJECT_COUNT_WEIGHTS = (0.08, 0.42, 0.5)  # there are only 720 scenes of one object
MAX_SCENES = 100_000  # finished chunks wait in memory; 43 million scenes differ visibly
CHUNK_SCENES = 50


def write_world(out: str, *, num_train: int = 6000, num_test: int = 200, seed: int = 0, num_workers: int = 2) -> None:
    """Write the procedural world: seven sets of paired renderings below `<out>/world/`, each with a train and a test split.

    A split that was written with the same settings is left as it is. The bytes do not depend on the number of workers.

    Args:
        out: The data root.
        num_train: Training examples of each set, each with one hard negative.
        num_test: Test examples of each set; they share no visible scene with training, its hard negatives included.
        seed: Chooses the scenes and the words.
        num_workers: Processes that render; 1 renders in this one.

    Raises:
        ValueError: A count is below 1, the scenes are more than 100,000, or the test scenes leave a training scene no
            near miss.
        OSError: The disk is full or the place is not writable.
    """
    if min(num_train, num_test, num_workers) < 1 or num_train + num_test > MAX_SCENES:
        raise ValueError(
            f"num_train is {num_train}, num_test {num_test}, num_workers {num_workers}; allowed: each at least 1, "
            f"num_train + num_test at most {MAX_SCENES:,}"
        )
    settings = {"version": WORLD_VERSION, "num_train": num_train, "num_test": num_test, "seed": seed}
    about = {"source": "procedural, datamodules/world.py", "licence": "Apache-2.0", "world": settings}
    scenes = sample_scenes(num_train + num_test, seed)
    near_misses = find_near_misses(scenes[:num_train], {scene.objects for scene in scenes[num_train:]}, seed)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with _workers(num_workers) as in_order, Progress(*columns) as progress:
        for name in SETS:
            for split, first, last in (("train", 0, num_train), ("test", num_train, num_train + num_test)):
                folder = Path(out) / "world" / name / split
                if _is_written(folder, about):
                    progress.console.print(f"{folder} is left as it is: it was written with the same settings", soft_wrap=True)
                    continue
                chunks = _chunks(name, scenes, near_misses, first, last, seed)
                examples = (example for rendered in in_order(render_chunk, chunks) for example in rendered)
                bar = progress.track(examples, total=last - first, description=f"world/{name}/{split}")
                write_split(folder, bar, about={**about, "description": f"procedural scenes, {name}, {split}"})


def sample_scenes(num_scenes: int, seed: int) -> list[Scene]:
    """Scenes that all differ visibly; a shorter list is the beginning of a longer one."""
    rng = random.Random(f"{seed} scenes")
    scenes: dict[tuple[SceneObject, ...], Scene] = {}
    while len(scenes) < num_scenes:
        scene = draw_scene(rng)
        scenes.setdefault(scene.objects, scene)
    return list(scenes.values())


def draw_scene(rng: random.Random) -> Scene:
    """One scene; every number of objects has its weight, all else is uniform."""
    (num_objects,) = rng.choices((1, 2, 3), OBJECT_COUNT_WEIGHTS)
    cells = sorted(rng.sample(range(NUM_CELLS), num_objects))
    objects = tuple(SceneObject(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZES), cell) for cell in cells)
    return Scene(objects, rng.choice(tuple(MOTIONS)), rng.choice(tuple(RHYTHMS)))


def find_near_misses(scenes: Sequence[Scene], forbidden: Collection[tuple[SceneObject, ...]], seed: int) -> list[Scene]:
    """For each scene one that differs in one attribute of one object and whose objects are not forbidden.

    Raises:
        ValueError: All neighbours of a scene are forbidden.
    """
    found = []
    for number, scene in enumerate(scenes):
        neighbours = neighbours_of(scene, random.Random(f"{seed} {number} near miss"))
        near_miss = next((neighbour for neighbour in neighbours if neighbour.objects not in forbidden), None)
        if near_miss is None:
            raise ValueError(f"training scene {number} has only test scenes as near misses; lower num_test ({len(forbidden)})")
        found.append(near_miss)
    return found


def neighbours_of(scene: Scene, rng: random.Random) -> Iterator[Scene]:
    """All scenes that differ in one attribute of one object, in random order."""
    free_cells = set(range(NUM_CELLS)) - {thing.cell for thing in scene.objects}
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "cell": sorted(free_cells)}
    changes = [
        (thing, attribute, value)
        for thing in scene.objects
        for attribute, allowed in values.items()
        for value in allowed
        if value != getattr(thing, attribute)
    ]
    rng.shuffle(changes)
    for thing, attribute, value in changes:
        others = [other for other in scene.objects if other is not thing]
        objects = sorted((*others, replace(thing, **{attribute: value})), key=lambda changed: changed.cell)
        yield replace(scene, objects=tuple(objects))


@dataclass(frozen=True)
class Chunk:
    """What a worker renders at once: scenes of one set, numbered from `first`; no near misses for a test split."""

    name: str
    seed: int
    first: int
    scenes: tuple[Scene, ...]
    near_misses: tuple[Scene, ...]


def _chunks(
    name: str, scenes: Sequence[Scene], near_misses: Sequence[Scene], first: int, last: int, seed: int
) -> Iterator[Chunk]:
    for start in range(first, last, CHUNK_SCENES):
        chosen = slice(start, min(start + CHUNK_SCENES, last))
        yield Chunk(name, seed, start, tuple(scenes[chosen]), tuple(near_misses[chosen]))


def render_chunk(chunk: Chunk) -> list[Example]:
    """The examples of a chunk, in order."""
    near_misses = chunk.near_misses or (None,) * len(chunk.scenes)
    pairs = zip(chunk.scenes, near_misses, strict=True)
    return [example_of(chunk.name, chunk.first + place, *pair, seed=chunk.seed) for place, pair in enumerate(pairs)]


def example_of(name: str, number: int, scene: Scene, near_miss: Scene | None, *, seed: int) -> Example:
    """The example of a set that shows this scene; target and hard negative are worded alike."""
    query_rng = random.Random(f"{seed} {number} {name} query")
    language = query_rng.choice(LANGUAGE_DRAW if name != "text-text" else ("de", "fr", "es"))
    shown = [scene] if near_miss is None else [scene, near_miss]
    target, *negatives = (target_of(name, each, random.Random(f"{seed} {number} {name} target")) for each in shown)
    return Example(
        key=f"{number:06d}",
        query=query_of(name, scene, language, query_rng),
        target=target,
        negatives=tuple(negatives),
        meta={"language": language, "scene": as_json(scene)},
    )


def query_of(name: str, scene: Scene, language: str, rng: random.Random) -> Item:
    """A caption; for `mixed-image` words for the first objects around a picture of the remaining ones."""
    if name != "mixed-image":
        return text_item(caption(scene, language, rng, moving=name == "text-video", sounding=name == "text-audio"))
    num_told = rng.randint(1, max(1, len(scene.objects) - 1))
    opening, closing = addition(scene.objects[:num_told], language, rng)
    remaining = replace(scene, objects=scene.objects[num_told:])
    parts = (Part("text", opening), Part("image", png_bytes(picture(remaining)), "png"))
    return Item(parts if closing is None else (*parts, Part("text", closing)))


def target_of(name: str, scene: Scene, rng: random.Random) -> Item:
    """The scene in the form that the set's name ends with."""
    match name.rpartition("-")[2]:
        case "image":
            return media_item("image", png_bytes(picture(scene)), "png")
        case "page":
            return media_item("page", png_bytes(page(scene)), "png")
        case "audio":
            return media_item("audio", flac_bytes(sound(scene)), "flac")
        case "video":
            return media_item("video", mp4_bytes(animation(scene)), "mp4")
        case "code":
            return text_item(code(scene, rng), kind="code")
        case "text":
            return text_item(caption(scene, "en", rng))
    raise AssertionError(name)


def as_json(scene: Scene) -> dict[str, Any]:
    """The scene in JSON values."""
    objects = [{"shape": o.shape, "colour": o.colour, "size": o.size, "cell": o.cell} for o in scene.objects]
    return {"objects": objects, "motion": scene.motion, "rhythm": scene.rhythm}


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mp4_bytes(frames: np.ndarray) -> bytes:
    """uint8 (T, H, W, 3) as H.264 at one frame a second, in full colour resolution: 4:2:0 would smear small objects."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "superfast", "tune": "zerolatency", "crf": "20"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.thread_count = 1  # the bytes depend on the number of threads
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def flac_bytes(wave: np.ndarray) -> bytes:
    """Samples in [-1, 1] as mono 16 kHz FLAC, rounded to 10 bits, which halves the file."""
    file = io.BytesIO()
    soundfile.write(file, np.round(wave * 512) / 512, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


@contextmanager
def _workers(num_workers: int) -> Iterator[Callable[..., Iterable[list[Example]]]]:
    """A map that keeps the order, over a pool of processes or in this one."""
    if num_workers == 1:
        yield map
    else:
        with multiprocessing.Pool(num_workers) as pool:
            yield pool.imap


def _is_written(folder: Path, about: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    try:
        return Split(folder).manifest["about"].get("world") == about["world"]
    except ValueError:  # damaged: it is written again
        return False
