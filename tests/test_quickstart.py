"""Promises of the quick start, judged on what `make quickstart` left in runs/quickstart (`pytest -m quickstart`)."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import pytest

RUNS = Path(__file__).parent.parent / "runs" / "quickstart"
PAIRS = {"image", "page", "audio", "video", "code"}
pytestmark = pytest.mark.quickstart


def test_every_modality_pair_reaches_recall_of_seven_in_ten_at_full_width():
    rows = json.loads((RUNS / "results.json").read_text())
    reached = {row["benchmark"]: row["value"] for row in rows if (row["metric"], row["prefix"]) == ("recall@1", 256)}
    wanted = {f"world/text-{other}" for other in PAIRS} | {f"world/{other}-text" for other in PAIRS}
    assert set(reached) == wanted | {"world/text-text", "world/mixed-image", "world/image-mixed"}
    assert {name: value for name, value in reached.items() if value < 0.7} == {}
    assert {row["num_candidates"] for row in rows} == {200}


def test_every_tasks_loss_falls():
    losses = defaultdict(list)
    with (RUNS / "prefinetune" / "logs" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.endswith("/loss") and value:
                    losses[name].append(float(value))
    assert len(losses) == 7
    for name, values in losses.items():
        quarter = len(values) // 4
        assert sum(values[-quarter:]) < 0.7 * sum(values[:quarter]), name


def test_the_report_and_every_encoder_are_there():
    assert "world/text-image" in (RUNS / "report.html").read_text()
    for run in ("prefinetune", "finetune-1", "finetune-2", "."):
        assert (RUNS / run / "encoder" / "model.safetensors").is_file()
