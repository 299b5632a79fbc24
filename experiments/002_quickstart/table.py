"""Recall@1 of the world's pairs over seeds, in Markdown: mean, lowest and highest at every prefix.

.venv/bin/python experiments/002_quickstart/table.py runs/quickstart_seed*/results.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def main(paths: list[str]) -> None:
    """Print one row a benchmark."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for row in json.loads(Path(path).read_text()):
            if row["metric"] == "recall@1":
                values[row["benchmark"]][row["prefix"]].append(row["value"])
    prefixes = sorted(next(iter(values.values())))
    print(f"| recall@1, {len(paths)} seeds | " + " | ".join(map(str, prefixes)) + " |")
    print("|---|" + "---|" * len(prefixes))
    for benchmark, by_prefix in values.items():
        cells = (f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (by_prefix[prefix] for prefix in prefixes))
        print(f"| {benchmark} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
