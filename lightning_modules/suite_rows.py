"""Results of mteb as rows of results.json: a task's, those of its languages, and the means of a benchmark."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from lightning_modules.suite_encoder import picture_kind

MAX_SUBSET_ROWS = 100  # our choice: a task of more subsets (FLORES has 41,412 pairs of languages) has rows by language
MODALITY_WORDS = {"t": "text", "a": "audio", "v": "video", "c": "text"}  # of a category's letters; c is a label


def word(name: str) -> str:
    """A name of word characters and dots."""
    return re.sub(r"[^\w.]+", "_", name).strip("_")


def name_of(task: Any) -> str:
    """The set's part of a benchmark's name; a task that is limited to some subsets or splits is another than the whole."""
    name = task.metadata.name
    every = (task.metadata.hf_subsets, task.metadata.eval_splits)
    for chosen, whole in zip((task.hf_subsets, task.eval_splits), every, strict=True):
        if not task.is_aggregate and set(chosen) != set(whole):
            digest = hashlib.blake2b(json.dumps(sorted(chosen)).encode(), digest_size=3).hexdigest()
            name += "_" + ("_".join(sorted(chosen)) if len(chosen) <= 3 else f"{len(chosen)}_of_{len(whole)}_{digest}")
    return f"mteb.{word(name)}"


def sides_of(task: Any) -> str:
    """`<query modality>-<target modality>`."""
    if task.is_aggregate:
        sides = {sides_of(part) for part in task.metadata.tasks}
        return sides.pop() if len(sides) == 1 else "mixed-mixed"
    words = MODALITY_WORDS | {"i": picture_kind(task.metadata)}
    if task.metadata.category is None:
        kinds = {words[kind[0]] for kind in task.metadata.modalities}
        side = kinds.pop() if len(kinds) == 1 else "mixed"
        return f"{side}-{side}"
    sides = task.metadata.category.split("2")
    return "-".join(words[side] if len(side) == 1 else "mixed" for side in sides)


def task_rows(task: Any, found: dict[int, Any]) -> Iterator[dict[str, Any]]:
    """A task's rows at each prefix, and after them those of its subsets or languages."""
    name, sides, metric = name_of(task), sides_of(task), task.metadata.main_score
    for width in found:
        result = found[width]
        value = {"note": result} if isinstance(result, str) else _number(result.get_score())
        yield {"benchmark": f"{name}/{sides}", "metric": metric, "prefix": width, "value": None} | value
    if task.is_aggregate or not task.metadata.is_multilingual or len(task.hf_subsets) == 1:
        return
    by_subset = len(task.hf_subsets) <= MAX_SUBSET_ROWS
    label = _subset_labels(task)
    for width, result in found.items():
        scores: dict[tuple[str, str], list[float]] = {}
        for entry in () if isinstance(result, str) else (entry for split in result.scores.values() for entry in split):
            subset, codes = entry["hf_subset"], dict.fromkeys(code.split("-")[0] for code in entry["languages"])
            for group in [(subset, label[subset])] if by_subset else [(code, code) for code in codes]:
                scores.setdefault(group, []).append(entry["main_score"])
        for (part, language), values in scores.items():
            row = {"benchmark": f"{name}_{word(part)}/{sides}", "metric": metric, "prefix": width, "value": None}
            yield row | {"group": name, "language": language} | _number(float(np.mean(values)))


def _subset_labels(task: Any) -> dict[str, str]:
    """Subset to its languages (`deu`, `deu-eng`), or to its own name where these do not tell it from others."""
    codes = task.metadata.hf_subsets_to_langscripts
    labels = {subset: "-".join(dict.fromkeys(code.split("-")[0] for code in codes[subset])) for subset in task.hf_subsets}
    times = Counter(labels.values())
    return {subset: label if times[label] == 1 else subset for subset, label in labels.items()}


def _number(value: float) -> dict[str, Any]:
    if not math.isfinite(value):
        return {"value": None, "note": f"mteb's score is {value}"}
    return {"value": float(value)}


def mean_rows(name: str, tasks: list[Any], found: dict[str, dict[int, Any]], widths: list[int]) -> Iterator[dict[str, Any]]:
    """Mean by task, and by type of task the mean of the types' means, as mteb's leaderboard has them."""
    sides = {sides_of(task) for task in tasks}
    benchmark = f"mteb.{word(name)}/{sides.pop() if len(sides) == 1 else 'mixed-mixed'}"
    for width in widths:
        scores: dict[str, list[float]] = {}  # by type of task
        lost = []
        for task in tasks:
            result = found[name_of(task)][width]
            score = math.nan if isinstance(result, str) else result.get_score()
            scores.setdefault(task.metadata.type, []).append(score)
            lost += [] if math.isfinite(score) else [task.metadata.name]
        means = {
            "mean_task": np.mean([score for of_type in scores.values() for score in of_type]),
            "mean_task_type": np.mean([float(np.mean(of_type)) for of_type in scores.values()]),
        }
        for metric, mean in means.items():
            some = ", ".join(lost[:3]) + (", .." if len(lost) > 3 else "")
            note = {"note": f"no number for {len(lost)} of {len(tasks)} tasks: {some}"}
            value = {"value": None} | note if lost else {"value": float(mean)}
            yield {"benchmark": benchmark, "metric": metric, "prefix": width} | value
