"""The graph of a recipe: stages, their runs, and what each is made of.

A stage is a configuration below conf/ with further keys. `@name/encoder` in a key's value is a place in the folder of another
stage, which then comes first; `@/encoder` one in its own folder. A stage with an array is run once for each of its entries;
an item of a list that names such a stage becomes one item for each of its runs.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_modules.configuration import CONF, compose
from lightning_modules.lineage import texts_of

ROOT = Path(__file__).parent.parent
SEARCH = "lightning_modules.mixture_search.mixture_search"
PLACE = re.compile(r"@(\w*)(?:\.(\d+))?(/.*)?", re.DOTALL)


@dataclass(frozen=True)
class StageSpec:
    """One stage of a recipe.

    Args:
        conf: Its configuration, as on the command line.
        keys: What else the command line says: dotted keys to values; a mapping is added to what the configuration has there.
        after: Stages that come first although no key names them.
        array: Further keys of each run, for a stage that is run several times; empty for one that is run once.
        slurm: Options of sbatch for its jobs, as {gres: "gpu:8", nodes: 2, time: "24:00:00"}.
    """

    conf: str
    keys: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    array: list[dict[str, Any]] = field(default_factory=list)
    slurm: dict[str, Any] = field(default_factory=dict)


class Run(NamedTuple):
    """One run of a stage.

    Args:
        name: The stage's, with the run's number behind a dot where it is one of several.
        spec: The stage.
        folder: Where its results go.
        keys: All that its command line says, with places still as `@name/..`.
        config: What is composed of them.
        parents: Names of the runs that it needs.
    """

    name: str
    spec: StageSpec
    folder: Path
    keys: dict[str, Any]
    config: dict[str, Any]
    parents: list[str]

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def number(self) -> str:
        """Empty for the only run of a stage."""
        return self.name.partition(".")[2]

    @property
    def trains(self) -> bool:
        return "trainer" in self.config

    @property
    def searches(self) -> bool:
        return self.config.get("run") == SEARCH


Runs = dict[str, Run]


def runs_of(out: Path, stages: dict[str, StageSpec]) -> Runs:
    """All runs by name, parents before what is made of them.

    Raises:
        ValueError: A name is none, a stage that is named is missing, or stages need each other in a ring.
    """
    for name in stages:
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"a stage is called {name!r}; a name is a letter, then letters, digits or underscores")
    found: Runs = {}
    waiting = {name: _needs(name, spec, stages) for name, spec in stages.items()}
    while waiting:
        name = next((name for name, needs in waiting.items() if not needs & waiting.keys()), None)
        if name is None:
            raise ValueError(f"the stages {', '.join(waiting)} need each other in a ring")
        spec, needs = stages[name], waiting.pop(name)
        parents = [run.name for run in found.values() if run.stage in needs]
        for number, more in enumerate(spec.array or [{}]):
            label, folder = (f"{name}.{number}", out / name / str(number)) if spec.array else (name, out / name)
            found[label] = run_of(label, spec, folder, {**spec.keys, **more}, parents)
    return found


def _needs(name: str, spec: StageSpec, stages: dict[str, StageSpec]) -> set[str]:
    """Names of the stages that come before one."""
    places = [PLACE.fullmatch(text) for text in texts_of([spec.keys, spec.array])]
    named = {match[1] for match in places if match is not None and match[1]} | set(spec.after)
    if missing := sorted(named - stages.keys()):
        raise ValueError(f"stage {name!r} needs {', '.join(missing)}; the recipe's stages are {', '.join(stages)}")
    return named


def run_of(name: str, spec: StageSpec, folder: Path, keys: dict[str, Any], parents: list[str]) -> Run:
    """A run with its configuration composed.

    Raises:
        ValueError: There is no such configuration, or it wants values that the keys do not give.
    """
    conf = CONF / f"{spec.conf}.yaml"
    if not conf.is_file():
        raise ValueError(f"stage {name!r} has conf={spec.conf}, but there is no {conf}")
    plain = compose(conf, [], resolve=False)
    keys = dict(leaf for key, value in keys.items() for leaf in leaves_of(key, value, plain))
    if "trainer" in plain:
        keys = {"trainer.default_root_dir": "@", "ckpt_path": "newest"} | keys
    elif "out" in plain:
        keys = {"out": "@"} | keys
    return Run(name, spec, folder, keys, compose(conf, words_of(keys)), parents)


def leaves_of(key: str, value: Any, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A key, or those within a mapping that is added to one of the configuration."""
    there: Any = config
    for name in key.split("."):
        there = there.get(name) if isinstance(there, dict) else None
    if isinstance(value, dict) and isinstance(there, dict) and there:
        for name, inner in value.items():
            yield from leaves_of(f"{key}.{name}", inner, config)
    else:
        yield key, value


def words_of(keys: dict[str, Any]) -> list[str]:
    """Of a command line."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]


def placed(value: Any, run: Run, runs: Runs) -> Any:
    """A value with its places as paths; in a list a place may stand for several.

    Raises:
        ValueError: One stands for several elsewhere, or for none.
    """
    if isinstance(value, dict):
        return {key: placed(inner, run, runs) for key, inner in value.items()}
    if isinstance(value, list):
        return [path for inner in value for path in (_paths(inner, run, runs) or [placed(inner, run, runs)])]
    paths = _paths(value, run, runs)
    if paths is not None and len(paths) != 1:
        raise ValueError(f"{value!r} of stage {run.name!r} stands for {len(paths)} places where one is needed; number the run")
    return value if paths is None else paths[0]


def _paths(value: Any, run: Run, runs: Runs) -> list[str] | None:
    """The paths that a place stands for, None where the value is none."""
    match = PLACE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    stage, number, rest = match[1], match[2], match[3] or ""
    if not stage:
        return [f"{run.folder}{rest}"]
    named = [one for one in runs.values() if one.stage == stage]
    chosen = [one for one in named if number is None or one.number == number]
    if not chosen:
        raise ValueError(f"{value!r} of stage {run.name!r} names no run; {stage!r} has {len(named)}")
    return [f"{one.folder}{rest}" for one in chosen]
