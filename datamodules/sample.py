"""The nouns of the data side: Part, Item, Example, and what is equal to what.

A Part is one piece of content as its bytes arrived. An Item is a sequence of parts that becomes one vector.
An Example is what a shard stores under one key: a query, mostly a target, sometimes hard negatives, a label or a score.
"""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TEXT_KINDS = ("text", "code")
MEDIA_KINDS = ("image", "page", "audio", "video")
KINDS = TEXT_KINDS + MEDIA_KINDS


class BadExampleError(ValueError):
    """An example that cannot be used; `cause` says why in two or three words that can be counted."""

    def __init__(self, message: str, cause: str = "does not decode") -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.cause)


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of content.

    Args:
        kind: One of `KINDS`.
        data: The text itself for text and code, the file's bytes for media.
        format: The file extension of media without its dot (`jpg`, `ogg`, ..), empty for text.
        content: What decoding made of `data`; None before `datamodules.decode` has run.
    """

    kind: str
    data: str | bytes
    format: str = ""
    content: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of content {self.kind!r}; it must be one of {', '.join(KINDS)}")
        wanted = str if self.kind in TEXT_KINDS else bytes
        if not isinstance(self.data, wanted):
            raise ValueError(f"a part of kind {self.kind!r} needs {wanted.__name__}, got {type(self.data).__name__}")


@dataclass(frozen=True, slots=True)
class Item:
    """Interleaved parts that become one vector.

    Args:
        parts: What it consists of.
        title: Used by prompts that name it.
        teacher: Another model's vector of it (T,), float16 or float32, for embedding matching; no part of the content. See
            `datamodules.vector`.
    """

    parts: tuple[Part, ...]
    title: str | None = None
    teacher: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("an item needs at least one part")

    @property
    def modality(self) -> str:
        """The kind shared by all parts, else `mixed`."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def is_text(self) -> bool:
        return all(part.kind in TEXT_KINDS for part in self.parts)

    @property
    def content_id(self) -> int:
        """64-bit signed hash of the content: equal items are the same thing to the loss's mask.

        Text counts after NFKC and white-space folding, code letter by letter, media by their bytes.
        """
        digest = hashlib.blake2b(digest_size=8)
        if self.title is not None:
            _add(digest, "title", _fold(self.title).encode())
        for part in self.parts:
            if part.kind == "text":
                payload = _fold(str(part.data)).encode()
            else:
                payload = part.data.encode() if isinstance(part.data, str) else part.data
            _add(digest, part.kind, payload)
        return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True, slots=True)
class Example:
    """What a shard stores under one key.

    Args:
        key: Unique within its shard; those that we write hold no dot, slash or white space, see `datamodules.record`.
        query: What is embedded first; None in a corpus split, whose documents are targets.
        target: What it should lie near; None where there is only a label, or a corpus decides.
        negatives: Hard negatives of this query.
        label: Name of the class, for classification.
        score: Gold similarity of query and target, for STS.
        relevant: Corpus key to grade, for retrieval over a corpus split.
        meta: Anything else worth keeping (language, source, provenance); JSON values.
    """

    key: str
    query: Item | None = None
    target: Item | None = None
    negatives: tuple[Item, ...] = ()
    label: str | None = None
    score: float | None = None
    relevant: Mapping[str, float] | None = None
    meta: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.key or not self.key.isprintable():
            raise ValueError(f"bad example key {self.key!r}: it needs a character and only printable ones")
        if self.query is None and self.target is None:
            raise ValueError(f"example {self.key!r} has neither a query nor a target")


def key_of(name: str) -> str:
    """A name made fit to be a key: dots, slashes and white space become underscores."""
    return "".join("_" if c in "./\\" or c.isspace() else c for c in name)


def text_item(text: str, *, title: str | None = None, kind: str = "text") -> Item:
    """An item of one text (or code) part."""
    return Item((Part(kind, text),), title)


def media_item(kind: str, data: bytes, format: str) -> Item:
    """An item of one media part."""
    return Item((Part(kind, data, format),))


def content_id_of_label(label: str) -> int:
    """The identity of a class, for tasks whose targets are equal when their labels are; its readable form is the same class."""
    return text_item(f"label: {label.replace('_', ' ')}").content_id


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _add(digest: hashlib.blake2b, kind: str, payload: bytes) -> None:
    digest.update(f"{kind}:{len(payload)}:".encode())
    digest.update(payload)
