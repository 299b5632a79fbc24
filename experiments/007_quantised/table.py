"""Size and quality of MiniLM at every prefix, rounded afterwards and trained for it, in Markdown: mean of the seeds, and range.

.venv/bin/python experiments/007_quantised/table.py runs/quantised
"""

import json
import sys
from pathlib import Path

METRICS = {"banking77/text-text": "recall@1", "stsb_en/text-text": "spearman"}
FORMS = {
    "finetune": "fp32",
    "bf16-rounded": "bf16",
    "int8-rounded": "int8, rounded afterwards",
    "int8-trained": "int8, trained for it",
    "mixed-rounded": "mixed, rounded afterwards",
    "mixed-trained": "mixed, trained for it",
    "int4-rounded": "int4, rounded afterwards",
    "int4-trained": "int4, trained for it",
    "int4-rounded-longer": "int4, rounded after as many steps more",
}


def values(folder: Path, benchmark: str) -> dict[int, float]:
    """Prefix to the headline metric."""
    rows = json.loads((folder / "results.json").read_text())
    metric = METRICS[benchmark]
    plain = [row for row in rows if row.get("dtype", "float32") == "float32" and row.get("prompts", True)]
    return {row["prefix"]: row["value"] for row in plain if (row["benchmark"], row["metric"]) == (benchmark, metric)}


def main(root: str) -> None:
    """Print a table for each benchmark, and the differences between training for int4 and rounding afterwards."""
    seeds = sorted(Path(root).glob("seed-*"))
    for benchmark, metric in METRICS.items():
        found = {form: [values(seed / form, benchmark) for seed in seeds] for form in FORMS}
        prefixes = sorted(found["finetune"][0])
        print(f"\n| {benchmark} {metric} | MB | {' | '.join(map(str, prefixes))} |\n|---|---|{'---|' * len(prefixes)}")
        for form, name in FORMS.items():
            size = (seeds[0] / form / "encoder" / "model.safetensors").stat().st_size / 1e6
            cells = []
            for prefix in prefixes:
                several = [value[prefix] for value in found[form]]
                cells.append(f"{sum(several) / len(several):.3f} ({min(several):.3f} to {max(several):.3f})")
            print(f"| {name} | {size:.1f} | {' | '.join(cells)} |")
        for other in ("int4-rounded", "int4-rounded-longer"):
            pairs = list(zip(found["int4-trained"], found[other], strict=True))
            gains = {prefix: [trained[prefix] - post[prefix] for trained, post in pairs] for prefix in prefixes}
            told = ", ".join(f"{prefix}: {min(g):+.3f} to {max(g):+.3f}" for prefix, g in gains.items())
            print(f"\n{benchmark}, int4 trained less {FORMS[other]}, by seed: {told}")


if __name__ == "__main__":
    main(sys.argv[1])
