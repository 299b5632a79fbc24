"""An Example and the files of its WebDataset sample: of our own layout, or of a tar that somebody else wrote.

Ours is `<key>.json` followed by its media, named by the place they fill: `<key>.query.0.jpg` is part 0 of the query,
`<key>.negative1.0.ogg` part 0 of the second hard negative, `<key>.negative1.npy` a teacher's vector of it. The JSON is

    {"query": {"parts": [{"kind": "text", "text": ".."}, {"kind": "image", "file": "query.1.jpg"}], "title": "..",
               "teacher": "query.npy"},
     "target": {..}, "negatives": [{..}], "label": "..", "score": 1.0, "relevant": {"<key>": 1.0}, "meta": {..}}

with absent fields left out. Of other tars, `Columns` says which fields make a query and a target.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from datamodules.sample import KINDS, TEXT_KINDS, Example, Item, Part
from datamodules.vector import from_npy, to_npy

MAX_JSON_BYTES = 16 * 2**20  # our choice
KIND_OF = {
    **dict.fromkeys(("txt", "text", "caption", "cls", "transcript"), "text"),
    **dict.fromkeys(("py", "java", "js", "go", "rb", "php", "c", "cpp", "rs", "sh", "sql", "cs"), "code"),
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("wav", "flac", "ogg"), "audio"),
    **dict.fromkeys(("mp4", "webm"), "video"),
    "pdf": "page",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Which fields of a foreign tar's samples make an example.

    A field is an extension as in the tar (`jpg`, `txt`, `seg.png`), a value inside a JSON file (`json:caption`), or either of
    them with its kind before it (`page=png`, `code=txt`) where the extension alone says another one.

    Args:
        query: The query's parts, in order.
        target: The target's parts.
        negative: The parts of one hard negative.
        label: The class.
        score: The gold similarity.
    """

    query: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    label: str | None = None
    score: str | None = None

    def __post_init__(self) -> None:
        if not self.query and not self.target:
            raise ValueError("give query or target: the fields of the samples that make them, as query=[txt] target=[jpg]")
        for field in (*self.query, *self.target, *self.negative):
            kind_of(field)

    @property
    def fields(self) -> set[str]:
        """The extensions that are read."""
        single = [name for name in (self.label, self.score) if name is not None]
        return {_taken_apart(field)[1] for field in (*self.query, *self.target, *self.negative, *single)}


def kind_of(field: str) -> str:
    """The kind of content that a field of `Columns` holds."""
    kind, extension, path = _taken_apart(field)
    found = kind or ("text" if path else KIND_OF.get(extension.rpartition(".")[2]))
    if found not in KINDS:
        raise ValueError(f"what kind is the field {field!r}? Put it before: {', '.join(f'{kind}={field}' for kind in KINDS)}")
    return found


def _taken_apart(field: str) -> tuple[str, str, str]:
    kind, equals, rest = field.rpartition("=")
    extension, _, path = rest.partition(":")
    return kind if equals else "", extension, path


def to_record(example: Example) -> dict[str, Any]:
    """An example as WebDataset writes it: `__key__`, `json`, and one entry per file of media or vector.

    Raises:
        ValueError: The key cannot be a file's name in a tar; a teacher's vector is none.
    """
    if any(character in "./\\" or character.isspace() for character in example.key):
        raise ValueError(f"bad example key {example.key!r}: a shard's keys hold no dot, slash or white space")
    files: dict[str, bytes] = {}

    def item(name: str, value: Item) -> dict[str, Any]:
        parts = []
        for number, part in enumerate(value.parts):
            if part.kind in TEXT_KINDS:
                parts.append({"kind": part.kind, "text": part.data})
            else:
                file = f"{name}.{number}.{part.format}"
                assert isinstance(part.data, bytes)
                files[file] = part.data
                parts.append({"kind": part.kind, "file": file})
        described: dict[str, Any] = {"parts": parts} if value.title is None else {"parts": parts, "title": value.title}
        if value.teacher is not None:
            described["teacher"] = f"{name}.npy"
            files[f"{name}.npy"] = to_npy(value.teacher)
        return described

    record: dict[str, Any] = {}
    if example.query is not None:
        record["query"] = item("query", example.query)
    if example.target is not None:
        record["target"] = item("target", example.target)
    if example.negatives:
        record["negatives"] = [item(f"negative{m}", negative) for m, negative in enumerate(example.negatives)]
    for name in ("label", "score", "relevant", "meta"):
        if getattr(example, name) is not None:
            record[name] = getattr(example, name)
    payload = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    return {"__key__": example.key, "json": payload, **files}


def from_record(key: str, files: Mapping[str, bytes], columns: Columns | None = None) -> Example:
    """The inverse of `to_record`, from field name to bytes; or the example that `columns` makes of foreign files.

    Raises:
        ValueError: The files do not make an example; says what is missing or of another type.
    """
    if columns is not None:
        return _from_columns(key, files, columns)
    record = _checked(parse_json(_file(files, "json")), dict, "the record")
    unknown = record.keys() - {"query", "target", "negatives", "label", "score", "relevant", "meta"}
    if unknown:
        raise ValueError(f"the record has the unknown field {min(unknown)[:99]!r}")
    negatives = _checked(record.get("negatives", []), list, "negatives")
    relevant = _optional(record, "relevant", dict)
    if relevant is not None:
        relevant = {key: _number(grade, "a grade in `relevant`") for key, grade in relevant.items()}
    return Example(
        key,
        _item(record["query"], files) if "query" in record else None,
        _item(record["target"], files) if "target" in record else None,
        tuple(_item(negative, files) for negative in negatives),
        _optional(record, "label", str),
        None if record.get("score") is None else _number(record["score"], "`score`"),
        relevant,
        _optional(record, "meta", dict),
    )


def parse_json(data: bytes, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, bounded in size and depth.

    Raises:
        ValueError: It is anything else.
    """
    if len(data) > max_bytes:
        raise ValueError(f"a JSON file of {len(data)} bytes is larger than {max_bytes}")
    try:
        text = data.decode("utf-8")
        value = DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # half a pair of surrogates is no character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise ValueError("a JSON file holds half a surrogate pair, which UTF-8 does not have") from None
    except RecursionError:
        raise ValueError("a JSON file is nested too deeply") from None


def read_json(path: Path) -> Any:
    """`parse_json` of a file, of which no more is read than is allowed.

    Raises:
        OSError: It cannot be read.
        ValueError: It is anything but strict JSON.
    """
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(f"a JSON file holds {text[:20]}, which is no number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"a JSON file holds {name}, which is no number")


DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)  # made once: making one takes longer than using it


def _item(value: Any, files: Mapping[str, bytes]) -> Item:
    value = _checked(value, dict, "an item")
    parts = [_part(_checked(part, dict, "a part"), files) for part in _checked(value.get("parts"), list, "`parts`")]
    teacher = _optional(value, "teacher", str)
    return Item(tuple(parts), _optional(value, "title", str), None if teacher is None else from_npy(_file(files, teacher)))


def _part(part: Mapping[str, Any], files: Mapping[str, bytes]) -> Part:
    kind = part.get("kind")
    if kind in TEXT_KINDS:
        return Part(kind, _checked(part.get("text"), str, "a part's `text`"))
    name = _checked(part.get("file"), str, "a part's `file`")
    return Part(_checked(kind, str, "a part's `kind`"), _file(files, name), name.rpartition(".")[2])


def _from_columns(key: str, files: Mapping[str, bytes], columns: Columns) -> Example:
    values: dict[str, Any] = {}

    def value_of(field: str) -> Any:
        _, extension, path = _taken_apart(field)
        if not path:
            return _file(files, extension)
        if extension not in values:
            values[extension] = parse_json(_file(files, extension))
        value = values[extension]
        for name in path.split("."):
            value = _checked(value, dict, f"{field!r}").get(name)
        return value

    def part(field: str) -> Part:
        kind, value = kind_of(field), value_of(field)
        if kind in TEXT_KINDS:
            return Part(kind, value.decode("utf-8") if isinstance(value, bytes) else _checked(value, str, f"{field!r}"))
        return Part(kind, _checked(value, bytes, f"{field!r}"), _taken_apart(field)[1].rpartition(".")[2])

    def item(fields: Sequence[str]) -> Item | None:
        return Item(tuple(part(field) for field in fields)) if fields else None

    def text(field: str) -> str:
        value = value_of(field)
        return value.decode("utf-8").strip() if isinstance(value, bytes) else str(value)

    negative = item(columns.negative)
    return Example(
        key,
        item(columns.query),
        item(columns.target),
        () if negative is None else (negative,),
        None if columns.label is None else text(columns.label),
        None if columns.score is None else _number(float(text(columns.score)), f"{columns.score!r}"),
    )


def _file(files: Mapping[str, bytes], field: str) -> bytes:
    if field not in files:
        raise ValueError(f"it has no file {field[:99]!r}; it has {', '.join(sorted(files)[:9]) or 'none'}")
    return files[field]


def _optional(record: Mapping[str, Any], name: str, wanted: type | tuple[type, ...]) -> Any:
    return None if record.get(name) is None else _checked(record[name], wanted, f"`{name}`")


def _checked(value: Any, wanted: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"{what} is of type {type(value).__name__}, which it must not be")
    return value


def _number(value: Any, what: str) -> float:
    _checked(value, (int, float), what)
    if not abs(value) < 1e300:  # also what is no number, or has thousands of digits
        raise ValueError(f"{what} is no number that can be used")
    return float(value)
