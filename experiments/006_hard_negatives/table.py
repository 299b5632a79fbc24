"""The result table of hard negatives, in Markdown: mean, lowest and highest over seeds, and the mean gain over `none`.

.venv/bin/python experiments/006_hard_negatives/table.py runs/hard_negatives
"""

import json
import sys
from pathlib import Path

METRICS = ("ndcg@10", "mrr@10")
WAYS = {
    "": "not fine-tuned",
    "none": "none",
    "random": "random",
    "last": "last of 20",
    "first": "first of 20",
}


def values(folder: Path) -> dict[tuple[str, str], float]:
    """Benchmark and metric to value."""
    rows = json.loads((folder / "results.json").read_text())
    return {(row["benchmark"], row["metric"]): row["value"] for row in rows if row["metric"] in METRICS}


def main(root: str) -> None:
    """Print a row for each benchmark, metric and way."""
    seeds = sorted(Path(root).glob("seed-*"))
    found = {way: [values(seed / way) for seed in seeds] for way in WAYS}
    print(f"| benchmark | metric | hard negatives | mean of {len(seeds)} seeds | lowest to highest | against none |")
    print("|---|---|---|---|---|---|")
    for name, metric in found["none"][0]:
        for way, told in WAYS.items():
            own = [result[name, metric] for result in found[way]]
            gains = [result[name, metric] - none[name, metric] for result, none in zip(found[way], found["none"], strict=True)]
            gain = f"{sum(gains) / len(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})" if way not in ("", "none") else ""
            spread = f"{min(own):.3f} to {max(own):.3f}"
            print(f"| {name} | {metric} | {told} | {sum(own) / len(own):.3f} | {spread} | {gain} |")


if __name__ == "__main__":
    main(sys.argv[1])
