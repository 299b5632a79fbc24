"""Rates of a search as words of a command line, and its tables.

python experiments/009_mixture_search/table.py rates runs/mixture_search/search own|seed|best
python experiments/009_mixture_search/table.py table runs/mixture_search
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

KINDS = ("own", "seed", "best")
SEEDS = (1, 2, 3)


def trials_of(search: Path) -> dict[str, dict[str, Any]]:
    return json.loads((search / "mixture.json").read_text())["trials"]


def rates(search: Path, kind: str) -> list[str]:
    """Overrides that have a run draw at the seed's or the best mixture's rates; none for the stage's own."""
    trials = {name: trial for name, trial in trials_of(search).items() if not name.startswith("alone")}
    if kind == "own":
        return []
    chosen = trials["seed"] if kind == "seed" else max(trials.values(), key=lambda trial: trial["score"])
    tasks = {task for trial in trials_of(search).values() for task in trial["rates"]}
    return [f"data.tasks.{task}.rate={chosen['rates'].get(task, 0.0)}" for task in sorted(tasks)]


def scores_of(folder: Path) -> dict[str, float]:
    """Headline scores by benchmark, and their mean."""
    rows = json.loads((folder / "results.json").read_text())
    found: dict[str, float] = {}
    for row in rows:
        if row["dtype"] == "float32" and row["prompts"]:
            found.setdefault(row["benchmark"], row["value"])
    return found | {"mean": statistics.fmean(found.values())}


def table(runs: Path) -> str:
    """Scores on test splits: mean over seeds, least and most."""
    of = {kind: [scores_of(runs / f"seed-{seed}" / kind) for seed in SEEDS] for kind in KINDS}
    names = list(of["own"][0])
    lines = ["| rates | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind, found in of.items():
        cells = []
        for name in names:
            values = [scores[name] for scores in found]
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    soup = scores_of(runs / "search" / "test")
    lines.append("| the search's soup | " + " | ".join(f"{soup[name]:.3f}" for name in names) + " |")
    for kind in ("seed", "best"):
        ahead = [mine["mean"] - own["mean"] for mine, own in zip(of[kind], of["own"], strict=True)]
        lines.append(f"\n{kind} less own, mean, by seed: " + ", ".join(f"{value:+.4f}" for value in ahead))
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "rates":
        for word in rates(Path(sys.argv[2]), sys.argv[3]):
            print(word)
    else:
        print(table(Path(sys.argv[2])))
