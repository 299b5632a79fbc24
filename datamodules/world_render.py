"""A scene of the procedural world and its renderings: picture, page, animation, sound, code, captions in four languages.

Everything here is a function of the scene and, where there is a choice of words or order, of a `random.Random` that the
caller made. Sizes, colours, pitches and words are our choice: small enough for two CPU cores, and no two scenes look,
sound or read alike.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from datamodules.media.audio import SAMPLE_RATE

COLOURS = {
    "red": (215, 25, 35),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "yellow": (245, 205, 0),
    "pink": (255, 110, 205),
    "brown": (130, 75, 25),
    "black": (20, 20, 20),
    "turquoise": (0, 205, 205),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # row, column
RHYTHMS = {"slow": 3, "steady": 6, "fast": 12}  # pulses in the second; multiples of 3 give every slot the same
NUM_CELLS = 9

PICTURE_PIXELS = 64
CELL_PIXELS = 20
MARGIN_PIXELS = 2
RADIUS_PIXELS = {"small": 5, "large": 9}
BACKGROUND = (245, 245, 240)
GREY = (150, 150, 150)
NUM_FRAMES = 4
STEP_PIXELS = 16  # no multiple of it below 64 maps the grid onto itself: the frames differ
SLOT_SAMPLES = SAMPLE_RATE // 3
MARKER_HERTZ = (5600.0, 6600.0, 7600.0)  # above the highest partial, 2 × 2400 Hz


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene; `cell` counts row by row from the top left, 0 to 8."""

    shape: str
    colour: str
    size: str
    cell: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in ascending cells, and what a still picture does not show: motion and rhythm.

    `objects` is the visible part: scenes that agree in it look alike.
    """

    objects: tuple[SceneObject, ...]
    motion: str
    rhythm: str

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.objects]
        assert cells == sorted(set(cells)), cells


def picture(scene: Scene) -> np.ndarray:
    """What a still camera sees: uint8 (64, 64, 3)."""
    pixels = np.full((PICTURE_PIXELS, PICTURE_PIXELS, 3), BACKGROUND, np.uint8)
    for thing in scene.objects:
        row, column = (MARGIN_PIXELS + CELL_PIXELS * index for index in divmod(thing.cell, 3))
        tile = _tile(thing.shape, COLOURS[thing.colour], RADIUS_PIXELS[thing.size], CELL_PIXELS, BACKGROUND)
        pixels[row : row + CELL_PIXELS, column : column + CELL_PIXELS] = tile
    return pixels


def page(scene: Scene) -> np.ndarray:
    """A document page: the picture as its figure, and a table with a row for each object: uint8 (128, 64, 3)."""
    pixels = np.full((2 * PICTURE_PIXELS, PICTURE_PIXELS, 3), 255, np.uint8)
    pixels[:PICTURE_PIXELS] = picture(scene)
    pixels[67:69, 4:44] = GREY
    for number in range(3):
        row = pixels[72 + 16 * number : 86 + 16 * number]
        if number < len(scene.objects):
            _fill_table_row(row, scene.objects[number])
        else:
            row[3:5, 4:60] = row[8:10, 4:50] = GREY
    pixels[121:123, 4:60] = GREY
    return pixels


def animation(scene: Scene) -> np.ndarray:
    """The picture moving on by a quarter of its width each second, around the edges: uint8 (4, 64, 64, 3)."""
    still = picture(scene)
    down, right = (STEP_PIXELS * step for step in MOTIONS[scene.motion])
    return np.stack([np.roll(still, (down * second, right * second), axis=(0, 1)) for second in range(NUM_FRAMES)])


def sound(scene: Scene) -> np.ndarray:
    """One second in three slots, an object in each: float64 (16000,) at 16 kHz in [-1, 1].

    Colour is pitch. Shape is voice: a circle holds its pitch, a triangle rises, a cross falls, a star trembles, a square
    adds its octave. A large object has a companion an octave below, and the rhythm pulses through all of it. A high
    marker tells the cell: its frequency the row, the third of the slot in which it sounds the column.
    """
    wave = np.zeros(SAMPLE_RATE)
    for slot, thing in enumerate(scene.objects):
        voice = _voice(thing.shape, thing.colour, thing.size, scene.rhythm)
        wave[slot * SLOT_SAMPLES : (slot + 1) * SLOT_SAMPLES] = voice + _marker(thing.cell)
    return wave


@cache
def _tile(shape: str, colour: tuple[int, int, int], radius: float, pixels: int, background: tuple[int, int, int]) -> np.ndarray:
    """An anti-aliased shape in the middle of a square: uint8 (pixels, pixels, 3)."""
    fine = 8
    mask = Image.new("L", (pixels * fine, pixels * fine))
    draw, middle, reach = ImageDraw.Draw(mask), pixels * fine / 2, radius * fine

    def around(*corners: tuple[float, float]) -> list[tuple[float, float]]:
        return [(middle + reach * x, middle + reach * y) for x, y in corners]

    if shape == "circle":
        draw.ellipse(around((-1, -1), (1, 1)), fill=255)
    elif shape == "square":
        draw.rectangle(around((-0.85, -0.85), (0.85, 0.85)), fill=255)
    elif shape == "triangle":
        draw.polygon(around((0, -1), (1, 0.85), (-1, 0.85)), fill=255)
    elif shape == "star":
        angles = np.pi * np.arange(10) / 5
        reaches = np.where(np.arange(10) % 2, 0.4, 1.05)
        draw.polygon(around(*zip(reaches * np.sin(angles), -reaches * np.cos(angles), strict=True)), fill=255)
    else:
        draw.rectangle(around((-1, -0.3), (1, 0.3)), fill=255)
        draw.rectangle(around((-0.3, -1), (0.3, 1)), fill=255)
    cover = np.asarray(mask.resize((pixels, pixels), Image.Resampling.BOX), float)[..., None] / 255
    return np.round(cover * np.asarray(colour) + (1 - cover) * np.asarray(background)).astype(np.uint8)


def _fill_table_row(row: np.ndarray, thing: SceneObject) -> None:
    """Colour swatch, shape icon, size bar and a small grid with the cell marked, into uint8 (14, 64, 3)."""
    row[2:12, 3:13] = COLOURS[thing.colour]
    row[1:13, 17:29] = _tile(thing.shape, (60, 60, 60), 5.5, 12, (255, 255, 255))
    row[5:9, 33 : 37 if thing.size == "small" else 46] = (60, 60, 60)
    row[1:13, 49:61] = (215, 215, 215)
    top, left = (4 * index for index in divmod(thing.cell, 3))
    row[1 + top : 5 + top, 49 + left : 53 + left] = (20, 20, 20)


@cache
def _voice(shape: str, colour: str, size: str, rhythm: str) -> np.ndarray:
    """A slot's sound without its marker: float64 (SLOT_SAMPLES,)."""
    seconds = np.arange(SLOT_SAMPLES) / SAMPLE_RATE
    bend = np.ones(SLOT_SAMPLES)  # stays within half the step between two pitches, a factor of 1.14
    if shape in ("triangle", "cross"):
        bend += np.linspace(-0.13, 0.13, SLOT_SAMPLES) * (1 if shape == "triangle" else -1)
    elif shape == "star":
        bend += 0.12 * np.sin(2 * np.pi * 9 * seconds)
    pitch = 400.0 * 6 ** (list(COLOURS).index(colour) / (len(COLOURS) - 1))
    phase = 2 * np.pi * np.cumsum(pitch * bend) / SAMPLE_RATE
    wave = np.sin(phase)
    if shape == "square":
        wave += 0.7 * np.sin(2 * phase)
    if size == "large":
        wave += 0.8 * np.sin(phase / 2)
    pulses = 0.2 + 0.8 * np.sin(np.pi * RHYTHMS[rhythm] * seconds) ** 2
    return 0.27 * wave * pulses * _fade(SLOT_SAMPLES)


@cache
def _marker(cell: int) -> np.ndarray:
    row, column = divmod(cell, 3)
    length = SLOT_SAMPLES // 3
    wave = np.zeros(SLOT_SAMPLES)
    tone = np.sin(2 * np.pi * MARKER_HERTZ[row] * np.arange(length) / SAMPLE_RATE)
    wave[column * length : (column + 1) * length] = 0.15 * tone * _fade(length)
    return wave


def _fade(num_samples: int) -> np.ndarray:
    """Rises and falls within 5 ms, so that no slot begins or ends with a click."""
    edge = np.arange(num_samples) / (0.005 * SAMPLE_RATE)
    return np.minimum(1, np.minimum(edge, edge[::-1]))


def code(scene: Scene, rng: random.Random) -> str:
    """A snippet that would build the scene, in one of three syntaxes, its objects in any order."""
    syntax = rng.choice(("python", "markup", "json"))
    rows = [
        (o.shape, o.colour, SIZES.index(o.size) + 1, *divmod(o.cell, 3)) for o in rng.sample(scene.objects, len(scene.objects))
    ]
    if syntax == "python":
        calls = (
            f'scene.add({shape}, color="{colour}", size={size}, at=({row}, {column}))'
            for shape, colour, size, row, column in rows
        )
        return "\n".join(("scene = Scene()", *calls))
    if syntax == "markup":
        tags = (
            f'  <{shape} fill="{colour}" scale="{size}" x="{column}" y="{row}"/>' for shape, colour, size, row, column in rows
        )
        return "\n".join(("<scene>", *tags, "</scene>"))
    names = ("type", "color", "size", "row", "col")
    return "[\n" + ",\n".join("  " + json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n]"


@dataclass(frozen=True)
class Language:
    """Words and sentences of one language; `a/b` in a word are its forms for the two genders.

    Args:
        genders: For each shape, 0 for the first form and 1 for the second.
        phrase: Order of article, size, colour and shape.
        alone: Sentences around one object.
        several: Sentences around a count and objects.
        additions: Sentences that name objects besides those of a picture.
        closings: What may follow that picture.
    """

    genders: tuple[int, ...]
    article: str
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    phrase: str
    places: tuple[str, ...]
    conjunction: str
    counts: tuple[str, ...]
    alone: tuple[str, ...]
    several: tuple[str, ...]
    motions: tuple[str, ...]
    moving: tuple[str, ...]
    rhythms: tuple[str, ...]
    sounding: tuple[str, ...]
    additions: tuple[str, ...]
    closings: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


LANGUAGES = {
    "en": Language(
        genders=(0, 0, 0, 0, 0),
        article="a",
        shapes=SHAPES,
        colours=tuple(COLOURS),
        sizes=SIZES,
        phrase="{article} {size} {colour} {shape}",
        places=_words(
            "at the top left, at the top centre, at the top right, on the left, in the middle, on the right, "
            "at the bottom left, at the bottom centre, at the bottom right"
        ),
        conjunction="and",
        counts=("two objects", "three objects"),
        alone=("{objects}.", "there is {objects}.", "a scene with {objects}."),
        several=("{count}: {objects}.", "there are {count}: {objects}.", "a scene with {count}: {objects}."),
        motions=_words("to the left, to the right, upwards, downwards"),
        moving=("everything moves {motion}.", "all of it drifts {motion}."),
        rhythms=tuple(RHYTHMS),
        sounding=("the rhythm is {rhythm}.", "it sounds in a {rhythm} rhythm."),
        additions=("add {objects} to this picture.", "the picture below, and also {objects}."),
        closings=("Put both together.", "That is the whole scene."),
    ),
    "de": Language(
        genders=(0, 1, 1, 0, 1),
        article="ein",
        shapes=_words("Kreis, Quadrat, Dreieck, Stern, Kreuz"),
        colours=_words(
            "roter/rotes, grüner/grünes, blauer/blaues, gelber/gelbes, pinker/pinkes, brauner/braunes, "
            "schwarzer/schwarzes, türkiser/türkises"
        ),
        sizes=("kleiner/kleines", "großer/großes"),
        phrase="{article} {size} {colour} {shape}",
        places=_words(
            "oben links, oben in der Mitte, oben rechts, links in der Mitte, genau in der Mitte, rechts in der Mitte, "
            "unten links, unten in der Mitte, unten rechts"
        ),
        conjunction="und",
        counts=("zwei Objekte", "drei Objekte"),
        alone=("{objects}.", "hier ist {objects}.", "die Szene: {objects}."),
        several=("{count}: {objects}.", "hier sind {count}: {objects}.", "in der Szene sind {count}: {objects}."),
        motions=_words("nach links, nach rechts, nach oben, nach unten"),
        moving=("alles bewegt sich {motion}.", "die Bewegung geht {motion}."),
        rhythms=_words("langsam, gleichmäßig, schnell"),
        sounding=("der Rhythmus ist {rhythm}.", "es klingt {rhythm}."),
        additions=("zu diesem Bild kommt noch: {objects}.", "das folgende Bild, dazu {objects}."),
        closings=("Beides gehört zusammen.", "Das ist die ganze Szene."),
    ),
    "fr": Language(
        genders=(0, 0, 0, 1, 1),
        article="un/une",
        shapes=_words("cercle, carré, triangle, étoile, croix"),
        colours=_words("rouge, vert/verte, bleu/bleue, jaune, rose, brun/brune, noir/noire, turquoise"),
        sizes=("petit/petite", "grand/grande"),
        phrase="{article} {size} {shape} {colour}",
        places=_words(
            "en haut à gauche, en haut au milieu, en haut à droite, à gauche au milieu, au centre, à droite au milieu, "
            "en bas à gauche, en bas au milieu, en bas à droite"
        ),
        conjunction="et",
        counts=("deux objets", "trois objets"),
        alone=("{objects}.", "il y a {objects}.", "une scène avec {objects}."),
        several=("{count} : {objects}.", "il y a {count} : {objects}.", "une scène avec {count} : {objects}."),
        motions=_words("vers la gauche, vers la droite, vers le haut, vers le bas"),
        moving=("tout se déplace {motion}.", "le mouvement va {motion}."),
        rhythms=_words("lent, régulier, rapide"),
        sounding=("le rythme est {rhythm}.", "cela sonne à un rythme {rhythm}."),
        additions=("ajouter à cette image {objects}.", "l'image suivante, avec en plus {objects}."),
        closings=("Les deux vont ensemble.", "Voilà toute la scène."),
    ),
    "es": Language(
        genders=(0, 0, 0, 1, 1),
        article="un/una",
        shapes=_words("círculo, cuadrado, triángulo, estrella, cruz"),
        colours=_words("rojo/roja, verde, azul, amarillo/amarilla, rosa, marrón, negro/negra, turquesa"),
        sizes=("pequeño/pequeña", "grande"),
        phrase="{article} {shape} {colour} {size}",
        places=_words(
            "arriba a la izquierda, arriba en el centro, arriba a la derecha, a la izquierda, justo en el centro, "
            "a la derecha, abajo a la izquierda, abajo en el centro, abajo a la derecha"
        ),
        conjunction="y",
        counts=("dos objetos", "tres objetos"),
        alone=("{objects}.", "hay {objects}.", "una escena con {objects}."),
        several=("{count}: {objects}.", "hay {count}: {objects}.", "una escena con {count}: {objects}."),
        motions=_words("hacia la izquierda, hacia la derecha, hacia arriba, hacia abajo"),
        moving=("todo se mueve {motion}.", "el movimiento va {motion}."),
        rhythms=_words("lento, regular, rápido"),
        sounding=("el ritmo es {rhythm}.", "suena con un ritmo {rhythm}."),
        additions=("añadir a esta imagen {objects}.", "la imagen siguiente y además {objects}."),
        closings=("Las dos cosas van juntas.", "Esa es toda la escena."),
    ),
}


def caption(scene: Scene, language: str, rng: random.Random, *, moving: bool = False, sounding: bool = False) -> str:
    """The scene in words: size, colour, shape and place of every object in any order, the count where there are several.

    Args:
        scene: What is described.
        language: A key of `LANGUAGES`.
        rng: Chooses among paraphrases and orders.
        moving: Name the motion too.
        sounding: Name the rhythm too.
    """
    words = LANGUAGES[language]
    if len(scene.objects) == 1:
        sentences = [rng.choice(words.alone).format(objects=_listing(scene.objects, words, rng))]
    else:
        count = words.counts[len(scene.objects) - 2]
        sentences = [rng.choice(words.several).format(count=count, objects=_listing(scene.objects, words, rng))]
    if moving:
        sentences.append(rng.choice(words.moving).format(motion=words.motions[list(MOTIONS).index(scene.motion)]))
    if sounding:
        sentences.append(rng.choice(words.sounding).format(rhythm=words.rhythms[list(RHYTHMS).index(scene.rhythm)]))
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def addition(objects: Sequence[SceneObject], language: str, rng: random.Random) -> tuple[str, str | None]:
    """Words before a picture that add these objects to it, and what half of the time follows it."""
    words = LANGUAGES[language]
    text = rng.choice(words.additions).format(objects=_listing(objects, words, rng))
    return text[0].upper() + text[1:], rng.choice(words.closings) if rng.random() < 0.5 else None


def _listing(objects: Sequence[SceneObject], words: Language, rng: random.Random) -> str:
    place_first = rng.random() < 0.25
    phrases = []
    for thing in rng.sample(objects, len(objects)):
        shape = SHAPES.index(thing.shape)
        named = words.phrase.format(
            article=_form(words.article, words.genders[shape]),
            size=_form(words.sizes[SIZES.index(thing.size)], words.genders[shape]),
            colour=_form(words.colours[list(COLOURS).index(thing.colour)], words.genders[shape]),
            shape=words.shapes[shape],
        )
        place = words.places[thing.cell]
        phrases.append(f"{place} {named}" if place_first else f"{named} {place}")
    *others, last = phrases
    return f"{', '.join(others)} {words.conjunction} {last}" if others else last


def _form(word: str, gender: int) -> str:
    forms = word.split("/")
    return forms[min(gender, len(forms) - 1)]
