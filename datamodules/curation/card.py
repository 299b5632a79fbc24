"""A data card: what is in a split of training data, how it was made, and what was left out; card.json and README.md beside it.

Source: Gebru et al. 2021, Datasheets for Datasets, for what has to be told.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from datamodules.curation.near_duplicates import texts_of
from datamodules.curation.survey import spreads, survey
from datamodules.files import replace_file
from datamodules.job import made_by_of
from datamodules.shards import Split

FORMAT = "polyphony-card/1"
MAX_SURVEYED = 10_000  # examples that are read for the card: our choice
NUM_SHOWN, MAX_SHOWN = 3, 300  # examples, and characters of each text

COUNTS = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": [
        "format",
        "num_records",
        "num_examples",
        "licence",
        "digest",
        "counts",
        "left_out",
        "made_by",
        "columns",
        "shown",
    ],
    "properties": {
        "format": {"const": FORMAT},
        "num_records": {"type": "integer", "minimum": 1},
        "num_examples": {"type": "integer", "minimum": 1},
        "licence": {"type": "string", "minLength": 1},
        "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "counts": COUNTS,
        "left_out": COUNTS,
        "made_by": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["stage"], "properties": {"stage": {"type": "string"}}},
        },
        "columns": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["modalities", "lengths"],
                "properties": {
                    "modalities": COUNTS,
                    "lengths": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
                },
            },
        },
        "labels": {"type": "array", "items": {"type": "string"}},
        "shown": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "string"}}},
    },
}


def write_card(folder: Path) -> dict[str, Any]:
    """Describe a split that a job has finished.

    Returns:
        What card.json holds.

    Raises:
        jsonschema.ValidationError: It would not follow `SCHEMA`, which only a bug can bring about.
    """
    split = Split(folder)
    about = split.manifest["about"]
    found = survey(split, MAX_SURVEYED)
    lengths = spreads(split)
    chain = made_by(split)
    card: dict[str, Any] = {
        "format": FORMAT,
        "num_records": about["made_by"]["num_records"],
        "num_examples": len(split),
        "licence": next((str(made["licence"]) for made in chain if made.get("licence")), "not stated"),
        "digest": split.digest,
        "counts": about["counts"],
        "left_out": about["aside"],
        "made_by": chain,
        "columns": {
            column: {
                "modalities": dict(counted),
                "lengths": {name: list(spread) for (own, name), spread in lengths.items() if own == column},
            }
            for column, counted in found.modalities.items()
        },
        "labels": sorted(found.labels)[:1000],
        "shown": [_shown(split, position) for position in range(0, len(split), -(-len(split) // NUM_SHOWN))],
    }
    Draft202012Validator(SCHEMA).validate(card)
    replace_file(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False))
    replace_file(folder / "README.md", page(card))
    return card


def made_by(split: Split) -> list[dict[str, Any]]:
    """How a split was made, the last step first, as far as the splits that it was made from are still there."""
    made: list[dict[str, Any]] = []
    while True:
        about = split.manifest["about"]
        step = made_by_of(split)
        if not step:  # written by conf=prepare, conf=index or somebody else
            plain = {name: value for name, value in about.items() if isinstance(value, str | int | float)}
            return [*made, {"stage": "source", "digest": split.digest, **plain}]
        made.append({**step, "counts": about.get("counts", {}), "aside": about.get("aside", {})})
        if not step.get("source"):
            return made
        try:
            split = Split(step["source"])
        except (ValueError, OSError):
            return [*made, {"stage": "not there any more", "digest": step.get("source_digest")}]
        if split.digest != step.get("source_digest"):
            return [*made, {"stage": "changed since", "digest": step.get("source_digest")}]


def page(card: Mapping[str, Any]) -> str:
    """The card for people."""
    lines = [
        "---",
        f"license: {json.dumps(card['licence'], ensure_ascii=False)}",
        "---",
        "",
        f"# {card['num_examples']:,} examples",
        "",
    ]
    lines += [f"Made from {card['num_records']:,} records by these steps, the last one first. The same in full: card.json.", ""]
    for step in card["made_by"]:
        known = ("prompt", "llm", "checkpoint", "source", "seed", "licence", "digest")
        told = ", ".join(f"{name} {str(step[name])[:80]}" for name in known if step.get(name) is not None)
        lines.append(f"- **{step['stage']}** {told}")
    lines += ["", "| what | how often |", "|---|---|"]
    lines += [f"| {name} | {number:,} |" for name, number in card["counts"].items()]
    lines += [f"| left out: {name} | {number:,} |" for name, number in card["left_out"].items()]
    lines += ["", "| column | holds | lengths: median, 95th percentile, maximum |", "|---|---|---|"]
    for column, about in card["columns"].items():
        lengths = "; ".join(f"{name} " + ", ".join(f"{x:,.0f}" for x in found) for name, found in about["lengths"].items())
        lines.append(
            f"| {column} | {', '.join(f'{name} {number:,}' for name, number in about['modalities'].items())} | {lengths} |"
        )
    if card["labels"]:
        lines += ["", f"{len(card['labels'])} classes: {', '.join(card['labels'][:20])}" + " ..." * (len(card["labels"]) > 20)]
    for example in card["shown"]:
        lines += ["", *(f"> **{name}** {' '.join(text.split())}  " for name, text in example.items())]
    return "\n".join(lines) + "\n"


def counted(example: Any) -> Counter[str]:
    """Which field of an example was made by whom, as its provenance tells."""
    found = Counter[str]()
    provenance = (example.meta or {}).get("provenance")
    for name, made in provenance.items() if isinstance(provenance, dict) else ():
        for one in (one for one in (made if isinstance(made, list) else [made]) if isinstance(one, dict)):
            found[f"{name} by {one.get('by', 'unknown')}" + (f" with {one['prompt']}" if one.get("prompt") else "")] += 1
    return found


def _shown(split: Split, position: int) -> dict[str, str]:
    example = split.read(position)
    items = {
        "query": example.query,
        "target": example.target,
        **{f"negative {n}": i for n, i in enumerate(example.negatives, 1)},
    }
    shown = {name: (texts_of(item) or item.modality)[:MAX_SHOWN] for name, item in items.items() if item is not None}
    return shown | ({} if example.label is None else {"label": example.label})
