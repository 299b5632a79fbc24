"""The result table of MiniLM, in Markdown: before, and mean, lowest and highest over seeds after.

.venv/bin/python experiments/003_minilm/table.py runs/minilm
"""

import json
import sys
from pathlib import Path

ROWS = {"banking77/text-text": "recall@1", "stsb_en/text-text": "spearman"}


def values(folder: Path) -> dict[str, float]:
    """Benchmark to its value in a folder's results."""
    rows = json.loads((folder / "results.json").read_text())
    return {row["benchmark"]: row["value"] for row in rows if row["metric"] == ROWS[row["benchmark"]]}


def main(root: str) -> None:
    """Print a row for each benchmark."""
    before = values(Path(root, "before"))
    after = [values(folder) for folder in sorted(Path(root).glob("seed-*"))]
    print(f"| benchmark | metric | before | after, mean of {len(after)} seeds | lowest to highest |\n|---|---|---|---|---|")
    for name, metric in ROWS.items():
        found = [result[name] for result in after]
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(f"| {name} | {metric} | {before[name]:.3f} | {sum(found) / len(found):.3f} | {spread} |")


if __name__ == "__main__":
    main(sys.argv[1])
