"""The words that a job gives to train.py, checked before it waits or runs, each closed by a NUL.

    python -m experiments.slurm.arguments stage conf=finetune ..         a command's own
    python -m experiments.slurm.arguments tasks conf=finetune ..         `all` or `one`: of a node's processes, those it can use
    python -m experiments.slurm.arguments line 3 grid.txt runs/grid      those of the third line of a grid file
    python -m experiments.slurm.arguments blocks conf=generate ..        a command's, where an array can share its work
    python -m experiments.slurm.arguments workers conf=mixture_search ..  a command's, where several jobs can share its trials
    python -m experiments.slurm.arguments grid grid.txt runs/grid        all lines checked, the file kept as runs/grid/grid.txt;
                                                                         prints their number

A line is cut into words as a shell would, and nothing else is done with it: no variable, no command in it is looked at.
A training stage always goes on from its newest checkpoint, on as many processes as the job has.
"""

import ast
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.files import replace_file
from lightning_modules.cluster import keys_of_job
from lightning_modules.configuration import compose
from lightning_modules.recipe_graph import SEARCH
from train import SHARED, parse_command_line

RECIPE = "lightning_modules.recipe.recipe"


def stage(*words: str) -> list[str]:
    """The words of a stage on all of the job's processes."""
    given, config = _read(words)
    if config.get("run") in (SEARCH, RECIPE):
        how = "submit.sh workers" if config["run"] == SEARCH else "action=submit"
        raise ValueError(f"{words[0]} begins jobs' steps by itself; submit it with: {how}")
    if "trainer" not in config:
        return [*words]
    added = {"ckpt_path": "newest"} if "ckpt_path" not in given else {}
    return [*words, *(f"{key}={value}" for key, value in (added | keys_of_job(config, given)).items())]


def tasks(*words: str) -> list[str]:
    """Whether a stage can use all processes of a job, or one."""
    _, config = _read(words)
    return ["all" if "trainer" in config or config.get("run") in SHARED else "one"]


def line(number: str, grid: str, root: str) -> list[str]:
    """The words of a grid's line, with a root folder of its own."""
    words = _words(Path(grid), int(number))
    given, config = _read(words, f"line {number} of {grid}: ")
    own = (
        [] if "trainer" not in config or "trainer.default_root_dir" in given else [f"trainer.default_root_dir={root}/{number}"]
    )
    return stage(*words, *own)


def blocks(*words: str) -> list[str]:
    """The words of a data stage that an array can share."""
    _, config = _read(words)
    module, _, name = str(config.get("run")).rpartition(".")
    tree = ast.parse(Path(*module.split(".")).with_suffix(".py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not any(argument.arg == "array_index" for node in found for argument in (*node.args.args, *node.args.kwonlyargs)):
        raise ValueError(f"{words[0]} has no blocks that an array could share; submit it with: submit.sh stage")
    return [*words]


def workers(*words: str) -> list[str]:
    """The words of a search whose trials several jobs can share."""
    _, config = _read(words)
    if config.get("run") != SEARCH:
        raise ValueError(f"{words[0]} has no trials that several jobs could share; conf=mixture_search has")
    return [*words]


def grid(file: str, root: str) -> list[str]:
    """How many lines a grid has, once each was read and the file is kept where its runs are."""
    path, kept = Path(file), Path(root, "grid.txt")
    text = path.read_text(encoding="utf-8")
    number = len(text.splitlines())
    roots = [
        next(reversed([w for w in line(str(n), file, root) if w.startswith("trainer.default_root_dir=")]), n)
        for n in range(1, number + 1)
    ]
    for n, own in enumerate(roots):
        if own in roots[:n]:
            raise ValueError(f"lines {roots.index(own) + 1} and {n + 1} of {file} have the same {own}; each needs its own")
    if not number:
        raise ValueError(f"{file} has no line")
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        raise ValueError(f"the runs in {root} were begun with another grid, {kept}; give another folder")
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_file(kept, text)
    return [str(number)]


def _words(path: Path, number: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if not 0 < number <= len(lines):
        raise ValueError(f"{path} has no line {number}, its lines are 1 to {len(lines)}")
    try:
        words = shlex.split(lines[number - 1], comments=True)
    except ValueError as error:
        raise ValueError(f"line {number} of {path}: {error}") from error
    if not words:
        raise ValueError(f"line {number} of {path} is empty or a comment; every line must be the arguments of a run")
    return words


def _read(words: tuple[str, ...] | list[str], where: str = "") -> tuple[set[str], dict[str, Any]]:
    """The keys that the words give, and the configuration that they make."""
    try:
        conf, overrides, _ = parse_command_line([*words])
        if conf is None:
            raise ValueError("which stage? Add conf=<stage>")
        return {override.partition("=")[0] for override in overrides}, compose(conf, overrides)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


if __name__ == "__main__":
    kinds: dict[str, Callable[..., list[str]]] = {
        "stage": stage,
        "tasks": tasks,
        "line": line,
        "blocks": blocks,
        "workers": workers,
        "grid": grid,
    }
    try:
        found = kinds[sys.argv[1]](*sys.argv[2:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(found[0], end="") if sys.argv[1] in ("grid", "tasks") else print(*found, sep="\0", end="\0")
