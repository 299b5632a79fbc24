"""A prompt kept as a file: what an LLM is shown of a record, examples of good answers, and what an answer must look like.

    system: Who answers, and how.
    user: "Passage: {passage}"            # {name} is a field of the record, a draw, or what an earlier answer filled in
    shots:                                # values of the same fields, and the answer to them
      - {passage: "..", answer: {query: ".."}}
    draws: {language: [English, German]}  # each takes one of its values, by seed and record
    answer: {query: {type: string}}       # properties of a JSON schema, all of them required and no others allowed
    checks: {original: {query: passage}}  # what a schema cannot say, see `CHECKS`
    makes: {examples: [..]}               # of `conf=generate`, see `datamodules.curation.synthesis`

Instead of `answer`, a prompt that an LLM's probabilities answer has `continuation: "{query}"`, the text whose likelihood is
wanted, or `grades: {"Yes": 1, "No": 0}`, texts of which the expected grade is. Media of a field are put where its name stands.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, SchemaError

from datamodules.record import parse_json
from datamodules.sample import Item, Part, text_item

FIELD = re.compile(r"\{(\w+)\}")
THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)  # what models that reason write before they answer
FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*|\n+")
TEXT = {"type": "string"}
ITEM = {"anyOf": [TEXT, {"type": "array", "items": {"$ref": "#/$defs/item"}}, {"$ref": "#/$defs/code"}]}
EXAMPLE = {
    "type": "object",
    "properties": {
        **{name: {"$ref": "#/$defs/item"} for name in ("query", "target")},
        "negatives": {"type": "array", "items": {"$ref": "#/$defs/item"}},
        "label": TEXT,
        "score": {"type": ["string", "number"]},
    },
}
FILE = {  # of a prompt
    "type": "object",
    "additionalProperties": False,
    "required": ["user"],
    "properties": {
        "system": TEXT,
        "user": TEXT,
        "shots": {"type": "array", "items": {"type": "object", "required": ["answer"]}},
        "draws": {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
        "answer": {"type": "object", "additionalProperties": {"type": "object"}},
        "checks": {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": TEXT}},
        "continuation": TEXT,
        "grades": {"type": "object", "minProperties": 2, "additionalProperties": {"type": "number"}},
        "makes": {
            "type": "object",
            "properties": {"each": TEXT, "tail": {"type": "number"}, "examples": {"type": "array", "items": EXAMPLE}},
        },
    },
    "$defs": {
        "item": ITEM,
        "code": {"type": "object", "properties": {"code": TEXT}, "required": ["code"], "additionalProperties": False},
    },
}
RESERVED = {"passage", "item"}  # what an answer's fields cannot be called
MAX_PROMPT_BYTES = 2**20  # our choice

Value = str | int | float | Item


class UnusableAnswerError(ValueError):
    """An answer that is not what its prompt asked for; `cause` says why in words that can be counted."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user` or `assistant`.
        parts: Texts and media, in order.
    """

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its texts, without media."""
        return "".join(part.data for part in self.parts if isinstance(part.data, str))


@dataclass(frozen=True)
class Prompt:
    """What `read_prompt` makes of a file; the module says what its fields mean."""

    name: str
    sha256: str
    user: str
    system: str | None = None
    shots: tuple[Mapping[str, Any], ...] = ()
    draws: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None
    checks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    makes: Mapping[str, Any] | None = None
    continuation: str | None = None
    grades: Mapping[str, float] | None = None

    @cached_property
    def fields(self) -> set[str]:
        """The names that a record, a draw or another answer has to fill."""
        return {name for template in (self.user, self.continuation or "") for name in FIELD.findall(template)}

    @cached_property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of an answer."""
        if self.answer is None:
            return None
        properties = {name: dict(value) for name, value in self.answer.items()}
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def messages(self, values: Mapping[str, Value]) -> tuple[Message, ...]:
        """The conversation for a record.

        Args:
            values: Name to value; `fields` are needed, others ignored.

        Raises:
            ValueError: A field has no value.
        """
        messages = [] if self.system is None else [Message("system", (Part("text", self.system.strip()),))]
        for shot in self.shots:
            messages.append(Message("user", filled(self.user, shot).parts))
            answer = shot["answer"] if isinstance(shot["answer"], str) else json.dumps(shot["answer"], ensure_ascii=False)
            messages.append(Message("assistant", (Part("text", answer),)))
        return (*messages, Message("user", filled(self.user, values).parts))

    def parse(self, text: str, values: Mapping[str, Value]) -> dict[str, Any]:
        """What a JSON answer says, alone or in one fenced block; thoughts before it do not count.

        Raises:
            UnusableAnswerError: It is no JSON, does not follow the schema, or a check fails.
        """
        said = THOUGHT.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
        fenced = FENCED.fullmatch(said)
        try:
            answer = parse_json((fenced[1] if fenced else said).strip().encode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise UnusableAnswerError(f"no JSON ({error}): {text[:99]!r}", "no JSON") from error
        error = next(iter(Draft202012Validator(self.schema or {}).iter_errors(answer)), None)
        if error is not None:
            place = ".".join(map(str, error.absolute_path)) or "the answer"
            raise UnusableAnswerError(f"{place}: {error.message[:199]}", "not of the schema")
        for check, fields in self.checks.items():
            for name, other in fields.items():
                given = values.get(other, answer.get(other, ""))
                if not CHECKS[check](_fold(str(answer[name])), _fold(text_of(given))):
                    raise UnusableAnswerError(f"{name} is {answer[name]!r:.199}", f"{name} is not {check}")
        return answer


def read_prompt(path: str | Path) -> Prompt:
    """A prompt's file.

    Raises:
        ValueError: There is none, or it is not what the module says; names the key.
    """
    path = Path(path)
    if not path.is_file():
        found = ", ".join(sorted(other.name for other in path.parent.glob("*.yaml")))
        raise ValueError(f"there is no prompt {path}; prompts in {path.parent}: {found or 'none'}")
    data = path.read_bytes()
    try:
        if len(data) > MAX_PROMPT_BYTES:
            raise ValueError(f"it has more than {MAX_PROMPT_BYTES} bytes")
        return _checked(path.stem, hashlib.sha256(data).hexdigest(), yaml.safe_load(data.decode("utf-8")))
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError, SchemaError) as error:
        raise ValueError(f"the prompt {path} cannot be used: {' '.join(str(error).split())[:300]}") from error


def _checked(name: str, sha256: str, found: Any) -> Prompt:
    _check_names(found)
    error = next(iter(Draft202012Validator(FILE).iter_errors(found)), None)
    if error is not None:
        place = ".".join(map(str, error.absolute_path)) or "the file"
        raise ValueError(f"{place}: {error.message[:199]}")
    if sum(found.get(way) is not None for way in ("answer", "continuation", "grades")) != 1:
        raise ValueError("it needs one of `answer`, `continuation` and `grades`")
    draws = {draw: tuple(map(str, values)) for draw, values in found.pop("draws", {}).items()}
    if not all(draws.values()):
        raise ValueError("a draw has no values to draw from")
    if reserved := RESERVED & (found.get("answer") or {}).keys():
        raise ValueError(f"a field of its answer cannot be called {min(reserved)}")
    user, shots = found.pop("user").rstrip("\n"), tuple(found.pop("shots", ()))  # what is scored follows its last character
    prompt = Prompt(name, sha256, user, draws=draws, shots=shots, **found)
    if prompt.schema is not None:
        Draft202012Validator.check_schema(prompt.schema)
    if unknown := prompt.checks.keys() - CHECKS.keys():
        raise ValueError(f"there is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    for check, fields in prompt.checks.items():
        if strangers := fields.keys() - (prompt.answer or {}).keys():
            raise ValueError(f"the check {check} names {', '.join(strangers)}, which an answer does not have")
        if strangers := set(fields.values()) - (prompt.answer or {}).keys() - prompt.fields:
            raise ValueError(f"the check {check} compares with {', '.join(strangers)}, which is neither shown nor answered")
    for number, shot in enumerate(prompt.shots, 1):
        if missing := ({*FIELD.findall(prompt.user), "answer"}) - shot.keys():
            raise ValueError(f"shot {number} lacks {', '.join(sorted(missing))}")
        if prompt.answer is not None:
            prompt.parse(json.dumps(shot["answer"], ensure_ascii=False), shot)
    return prompt


def _check_names(found: Any) -> None:
    """Raises ValueError where a key is no text, as YAML reads Yes, No and numbers."""
    if isinstance(found, dict):
        for key, value in found.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text; put it in quotation marks")
            _check_names(value)
    elif isinstance(found, list):
        for value in found:
            _check_names(value)


def filled(template: str, values: Mapping[str, Value]) -> Item:
    """A template with its names replaced, once: a value may hold braces. An item's media stand where its name stood.

    Raises:
        ValueError: A name has no value.
    """
    parts: list[Part] = []
    for number, piece in enumerate(FIELD.split(template)):  # texts and names take turns
        if number % 2:
            if piece not in values:
                raise ValueError(f"{{{piece}}} is filled by nothing; there are {', '.join(sorted(values))}")
            value = values[piece]
            new = value.parts if isinstance(value, Item) else (Part("text", str(value)),)
        else:
            new = (Part("text", piece),)
        for part in new:
            if parts and isinstance(part.data, str) and isinstance(parts[-1].data, str):
                parts[-1] = Part("text", parts[-1].data + part.data)
            elif part.data:
                parts.append(part)
    return Item(tuple(parts)) if parts else text_item("")


def text_of(value: Value) -> str:
    """What a value says in text; media say nothing."""
    return (
        "\n".join(str(part.data) for part in value.parts if part.kind in ("text", "code"))
        if isinstance(value, Item)
        else str(value)
    )


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is_extractive(text: str, source: str) -> bool:
    return all(sentence.strip() in source for sentence in SENTENCE_END.split(text) if sentence)


CHECKS = {
    "extractive": _is_extractive,  # each sentence of the one stands in the other
    "original": lambda text, source: text not in source,  # it is not a piece of the other
}
