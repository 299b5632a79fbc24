"""What an LLM's answers become: examples, each field with where it came from.

A prompt's `makes` says how, in names of the record, of its draws and of the answer:

    makes:
      each: reviews            # one set of examples for each element of this list of the answer, which is {item} then
      tail: 0.5                # only of its last share: what an LLM lists late is less usual
      examples:
        - {query: "{query}", target: source}          # source: the item that the LLM was shown
        - {query: [source, "{task}"], target: {code: "{edited}"}, negatives: ["{wrong}"], label: "{label}"}

Source: FRet (Gecko, arXiv 2403.20327); Gemini Embedding (arXiv 2503.07891) for stages, long lists and their tail.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datamodules.curation.prompts import FIELD, Prompt, UnusableAnswerError, Value, filled, text_of
from datamodules.order import generator
from datamodules.sample import Example, Item, Part
from datamodules.shards import Split

SOURCE = "source"
FIELDS = ("query", "target", "negatives", "label", "score")


def values_of(example: Example, column: str, needed: Iterable[str] = ()) -> dict[str, Value]:
    """What a prompt can name of a record: its items, label, score, and what its `meta` holds in words and numbers.

    Args:
        example: The record.
        column: `query` or `target`: the item that is `passage`, and gives `title`.
        needed: Names that it must have.

    Raises:
        UnusableAnswerError: It has no such item, or one without any content, or lacks a name.
    """
    passage: Item | None = getattr(example, column)
    if passage is None or not any(part.data.strip() for part in passage.parts):
        raise UnusableAnswerError(f"no {column}", "empty passage")
    values: dict[str, Value] = {
        name: value for name, value in (example.meta or {}).items() if isinstance(value, str | int | float)
    }
    named = {
        "key": example.key,
        "query": example.query,
        "target": example.target,
        "label": example.label,
        "score": example.score,
    }
    values |= {name: value for name, value in named.items() if value is not None}
    values |= {"passage": passage, "title": passage.title or "none"}
    if missing := sorted(set(needed) - values.keys()):
        raise UnusableAnswerError(f"no {', '.join(missing)}", f"no {missing[0]}")
    return values


def needed_of(prompt: Prompt, drawn: Iterable[str] = ()) -> set[str]:
    """The names that a record has to fill: shown by a prompt or used by what it makes, and neither drawn nor answered."""
    examples = (prompt.makes or {}).get("examples") or []
    names = prompt.fields.union(*(_names(list(example.values())) for example in examples))
    return names - prompt.draws.keys() - (prompt.answer or {}).keys() - set(drawn) - {"item"}


def draw(prompt: Prompt, splits: Mapping[str, Split], seed: int, key: str) -> tuple[dict[str, Value], dict[str, str]]:
    """Values of a prompt's draws for a record, the same each time, and what they were in words.

    Args:
        prompt: Its `draws` are lists of texts.
        splits: Name to a split, of which one example is drawn: its query, else its target.
        seed: Of the job.
        key: Of the record and sample.
    """
    values: dict[str, Value] = {}
    told: dict[str, str] = {}
    for name, texts in prompt.draws.items():
        values[name] = told[name] = texts[int(generator(seed, f"{key} {name}").integers(len(texts)))]
    for name, split in splits.items():
        example = split.read(int(generator(seed, f"{key} {name}").integers(len(split))))
        item = example.query or example.target
        assert item is not None
        values[name], told[name] = item, example.key
    return values, told


def check_makes(prompt: Prompt, known: set[str]) -> None:
    """Raises ValueError when a prompt does not say what its answers become, or names what nothing fills.

    Args:
        prompt: As it was read.
        known: Names that records have, and that are drawn from splits.
    """
    makes = prompt.makes or {}
    examples = makes.get("examples")
    if prompt.answer is None or not isinstance(examples, list) or not examples or makes.keys() - {"examples", "each", "tail"}:
        raise ValueError(f"the prompt {prompt.name} needs `answer`, and `makes` with `examples` and maybe `each` and `tail`")
    if not 0 < makes.get("tail", 1) <= 1 or ("tail" in makes and "each" not in makes):
        raise ValueError(f"the prompt {prompt.name}: `tail` is a share above 0 of the list that `each` names")
    if "each" in makes and prompt.answer.get(makes["each"], {}).get("type") != "array":
        raise ValueError(f"the prompt {prompt.name}: `each` is {makes['each']!r}, which is no array of its answer")
    for example in examples:
        if not isinstance(example, dict) or example.keys() - set(FIELDS) or not example.keys() & {"query", "target"}:
            allowed = ", ".join(FIELDS)
            raise ValueError(f"the prompt {prompt.name} makes {example!r}; an example has query or target, of {allowed}")
        if "each" not in makes and "item" in _names(list(example.values())):
            raise ValueError(f"the prompt {prompt.name} names {{item}}, but its makes has no `each`")
    if strangers := sorted(needed_of(prompt) - known):
        there = ", ".join(sorted(known | prompt.draws.keys() | prompt.answer.keys()))
        raise ValueError(f"the prompt {prompt.name} names {{{strangers[0]}}}, which no record has; there are {there}")


def examples_of(
    prompt: Prompt,
    key: str,
    values: Mapping[str, Value],
    answer: Mapping[str, Any],
    made: Mapping[str, Any],
    source: Mapping[str, Any],
) -> list[Example]:
    """The examples that an answer makes.

    Args:
        prompt: What was asked.
        key: Of the record and sample; where an answer can make several examples, each has a number behind it.
        values: What the LLM was shown.
        answer: What it said.
        made: Provenance of what it wrote.
        source: Provenance of what it was shown.

    Raises:
        UnusableAnswerError: A field came out empty, or the list that is to be taken from did.
    """
    makes = prompt.makes or {}
    elements: Sequence[Any] = [None]
    if "each" in makes:
        whole = answer[makes["each"]]
        elements = whole[len(whole) - math.ceil(len(whole) * makes.get("tail", 1)) :]
    shown = {**values, **{name: _plain(value) for name, value in answer.items()}}
    examples: list[Example] = []
    for element in elements:
        own = shown if element is None else shown | {"item": _plain(element)}
        for template in makes["examples"]:
            name = f"{key}-{len(examples)}" if "each" in makes or len(makes["examples"]) > 1 else key
            examples.append(_example(template, name, own, made, source))
    if not examples:
        raise UnusableAnswerError(f"{makes['each']} is empty", "an empty list")
    return examples


def _example(
    template: Mapping[str, Any], key: str, values: Mapping[str, Value], made: Mapping[str, Any], source: Mapping[str, Any]
) -> Example:
    def item(field: str, wanted: Any) -> Item:
        found = _item(wanted, values)
        if not all(part.data.strip() for part in found.parts):
            raise UnusableAnswerError(f"{field} is empty", f"{field} is empty")
        return found

    items = {name: item(name, template[name]) for name in ("query", "target") if name in template}
    negatives = tuple(item("negatives", wanted) for wanted in template.get("negatives", ()))
    label, score = (text_of(filled(str(template[name]), values)) if name in template else None for name in ("label", "score"))
    provenance = {name: dict(source if template[name] == SOURCE else made) for name in template}
    try:
        number = None if score is None else float(score)
    except ValueError:
        raise UnusableAnswerError(f"score is {score!r}", "score is no number") from None
    return Example(key, items.get("query"), items.get("target"), negatives, label, number, meta={"provenance": provenance})


def _item(wanted: Any, values: Mapping[str, Value]) -> Item:
    if isinstance(wanted, list):
        items = [_item(piece, values) for piece in wanted]
        return Item(tuple(part for item in items for part in item.parts), next((i.title for i in items if i.title), None))
    if isinstance(wanted, Mapping):
        return Item((Part("code", text_of(filled(wanted["code"], values))),))
    if wanted == SOURCE:
        passage = values["passage"]
        assert isinstance(passage, Item)
        return passage
    return filled(str(wanted), values)


def _names(wanted: Any) -> list[str]:
    """The fields that a value of `makes` names."""
    if isinstance(wanted, list):
        return [name for piece in wanted for name in _names(piece)]
    if isinstance(wanted, Mapping):
        return _names(list(wanted.values()))
    return FIELD.findall(str(wanted)) if wanted != SOURCE else ["passage"]


def _plain(value: Any) -> Value:
    return (
        value if isinstance(value, str | int | float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    )
