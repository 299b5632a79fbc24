"""What readers of published data sets share: the expected layout, its files and media, and captions judged both ways."""

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.sample import Example, Item, Part, key_of, text_item

MISSING = "missing.txt"
CHUNK = 2**22  # characters that are read at a time from a JSON file that may not fit into memory; our choice
FIRST, NEXT, COLON = (re.compile(pattern) for pattern in (r'\s*\{\s*(?=")', r'\s*,\s*(?=")', r"\s*:\s*"))
LAST, EMPTY = re.compile(r"\s*\}\s*"), re.compile(r"\s*\{\s*\}\s*")


@dataclass(frozen=True, slots=True)
class Made:
    """A split that a data set gives.

    Args:
        name: Of the split.
        files: What it is made from, media aside.
        examples: Gives them in order, anew at each call.
    """

    name: str
    files: tuple[Path, ...]
    examples: Callable[[], Iterator[Example]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A data set as its publisher distributes it.

    Args:
        home: Where to get it.
        licence: What is known of its terms.
        expected: What has to lie in the source folder, as a clause after "must hold".
        splits: Those that can be asked for; the first is that of the papers' tables.
        read: The folder and one of them to what is written.
    """

    home: str
    licence: str
    expected: str
    splits: tuple[str, ...]
    read: Callable[["Folder", str], list[Made]]


@dataclass(frozen=True)
class Folder:
    """A source folder, read as one data set's layout says.

    Args:
        root: The folder.
        dataset: Name of the data set.
        layout: Said where something is missing.
        left_out: How often what was left out, of the split that is being made.
    """

    root: Path
    dataset: str
    layout: Layout
    left_out: Counter[str] = field(default_factory=Counter)

    def file(self, *names: str) -> Path:
        """The first of these files that is there.

        Raises:
            ValueError: None is; says where to get the data and the layout.
        """
        return self.files(*names)[0]

    def files(self, *patterns: str) -> list[Path]:
        """The files that the first pattern which any fits gives, in order.

        Raises:
            ValueError: There is none; says where to get the data and the layout.
        """
        for pattern in patterns:
            if found := sorted(file for file in self.root.glob(pattern) if file.is_file()):
                return found
        raise ValueError(
            f"{self.root} holds no {' or '.join(patterns)}, which {self.dataset} needs. Get the data from {self.layout.home}. "
            f"The folder given as `source` must hold {self.layout.expected}"
        )

    @cached_property
    def missing(self) -> frozenset[str]:
        """Media that the person says cannot be had: the lines of missing.txt."""
        file = self.root / MISSING
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return frozenset(line.strip() for line in lines if line.strip())

    def made_from(self, *files: Path) -> tuple[Path, ...]:
        """These files, and missing.txt where there is one."""
        return (*files, self.root / MISSING) if self.missing else files

    def media(self, kind: str, names: list[str], where: str) -> Part | None:
        """The first of these files that is there; None where missing.txt lists one of them.

        Args:
            kind: `image`, `video` or `audio`.
            names: Below the folder.
            where: The file and the record that name it.

        Raises:
            ValueError: None is there, or a name leads out of the folder.
        """
        if not self.missing.isdisjoint(names):
            self.left_out[f"{kind} in {MISSING}"] += 1
            return None
        for name in map(PurePosixPath, names):
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{where} names {str(name)!r}; media lie below {self.root}: correct the record")
            if (self.root / name).is_file():
                return Part(kind, (self.root / name).read_bytes(), name.suffix[1:].lower())
        raise ValueError(
            f"{where} names {names[0]!r}, but {self.root} holds no {' or '.join(names)}; put it there, or write {names[0]!r} "
            f"on a line of {self.root / MISSING}, which leaves out what cannot be had. Get the data from {self.layout.home}"
        )


@dataclass(frozen=True, slots=True)
class Captioned:
    """An image or a video with what is said of it.

    Args:
        id: Unique within its split.
        names: Where it may lie, below the source folder.
        captions: At least one.
        where: The file and the record, for errors.
    """

    id: str
    names: list[str]
    captions: list[str]
    where: str


def captions_of(
    folder: Folder, split: str, kind: str, captioned: Callable[[], Iterable[Captioned]], *files: Path, both_ways: bool
) -> list[Made]:
    """Captions to media as queries and a corpus, and with `both_ways` media to captions, where any of its captions counts."""

    def found() -> Iterator[tuple[str, Item, Captioned]]:
        for one in captioned():
            if not one.captions:
                raise ValueError(f"{one.where} has no caption; every {kind} needs at least one: add it or take the record out")
            part = folder.media(kind, one.names, one.where)
            if part is not None:
                yield key_of(one.id), Item((part,)), one

    def texts() -> Iterator[tuple[str, Example]]:
        for key, _, one in found():
            for number, caption in enumerate(one.captions):
                yield key, Example(f"{key}-{number}", text_item(said(caption, f"{one.where}, caption {number + 1}")))

    def queries() -> Iterator[Example]:
        for key, example in texts():
            yield dataclasses.replace(example, relevant={key: 1.0})

    def corpus() -> Iterator[Example]:
        for key, item, _ in found():
            yield Example(key, target=item)

    def media_queries() -> Iterator[Example]:
        for key, item, one in found():
            yield Example(key, item, relevant={f"{key}-{number}": 1.0 for number in range(len(one.captions))})

    def captions() -> Iterator[Example]:
        for _, example in texts():
            yield Example(example.key, target=example.query)

    made = [(f"{split}-queries", queries), (f"{split}-corpus", corpus)]
    if both_ways:
        made += [(f"{split}-{kind}_queries", media_queries), (f"{split}-captions", captions)]
    return [Made(name, folder.made_from(*files), examples) for name, examples in made]


def said(text: Any, where: str) -> str:
    """A text without white space around it.

    Raises:
        ValueError: It is none, or says nothing.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} is {text!r:.99}, which is no text; correct it or take it out")
    return text.strip()


def read_object(file: Path, *fields: str) -> dict[str, Any]:
    """A JSON file that is an object with these fields."""
    found = read_whole(file)
    missing = [name for name in fields if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"{file} has no {' and no '.join(missing)} at its top; give the file as it was published")
    return found


def read_list(file: Path) -> list[Any]:
    """A JSON file that is a list."""
    found = read_whole(file)
    if not isinstance(found, list):
        raise ValueError(f"{file} is no JSON list; give the file as it was published")
    return found


def read_whole(file: Path) -> Any:
    """A JSON file of any kind.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); give the file as it was published") from error


def read_rows(file: Path, fields: tuple[str, ...], *, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """Where it stands and what it holds, of each row of a table with a head line.

    Raises:
        ValueError: The table lacks a column, or a row has another number of fields.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter=delimiter, restkey="", strict=True)
        try:
            missing = [column for column in fields if column not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(f"{file} has no column {', '.join(missing)}; its head line must name {', '.join(fields)}")
            for row in rows:
                where = f"{file}, line {rows.line_num}"
                if "" in row or None in row.values():
                    raise ValueError(f"{where} has not the {len(rows.fieldnames or ())} fields of the head line; correct it")
                yield where, row
        except csv.Error as error:
            raise ValueError(f"{file}, line {rows.line_num} is no row of a table ({error}); correct it") from error


def read_entries(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and values of a JSON object, of which one value is in memory at a time.

    Raises:
        ValueError: The file is no JSON object.
    """
    decoder, text, at, before = json.JSONDecoder(), "", 0, FIRST
    with file.open(encoding="utf-8") as stream:
        while True:
            try:
                name, end = decoder.raw_decode(text, _end(before, text, at))
                value, end = decoder.raw_decode(text, _end(COLON, text, end))
                if end == len(text):
                    raise ValueError("a number may go on")
            except ValueError:
                more = stream.read(max(CHUNK, len(text) - at))
                if not more:
                    break
                text, at = text[at:] + more, 0
                continue
            yield str(name), value
            at, before = end, NEXT
    if not (LAST if before is NEXT else EMPTY).fullmatch(text, at):
        raise ValueError(f"{file} is no whole JSON object, near {text[at : at + 40]!r}; give the file as it was published")


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    if found is None:
        raise ValueError("not there yet")
    return found.end()
