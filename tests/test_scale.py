"""Promises of experiments/008_scale: its arithmetic is that of hand and of what was counted, and moves the right way."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from datamodules.order import Order
from datamodules.plan import rows_of_rank

FOLDER = Path(__file__).parent.parent / "experiments" / "008_scale"
COUNTED = json.loads((FOLDER / "counted.json").read_text())
FITS = json.loads((FOLDER.parent / "bench" / "fits.json").read_text())


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiment_008_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


laws = loaded("laws")


def test_parameters_and_activations_are_those_of_fits():
    rows = {(row["model"][:5], row["GPUs"]): row for row in FITS["rows"]}
    for model, name in ((laws.SMALL, "270 M"), (laws.LARGE, "8 B (")):
        row = rows[name, 1]
        assert (model.text.parameters + model.vocab * model.text.hidden) / 1e6 == pytest.approx(row["parameters, M"])
        for column, checkpointed in (("activations", False), ("layers checkpointed", True)):
            found = model.text.activations(FITS["tokens"], checkpointed=checkpointed) / 2**30
            assert found == pytest.approx(row[column])


def test_flops_of_a_text_pair_are_those_of_hand():
    layers = 18 * (2 * 640 * 4 * 256 + 2 * 640 * 256 + 3 * 640 * 2048)
    by_hand = 6 * layers * 320 + 14 * 18 * 1024 * (64**2 + 256**2) + 12 * 640 * 3072
    assert laws.TEXT.flops(laws.SMALL) == by_hand


def test_the_law_of_flops_is_what_torch_counts():
    found = loaded("counted").flops()
    assert found["weights"] + found["attention"] == found["counted"]


def test_a_ring_takes_what_nccl_s_model_says():
    # 64 GPUs, 8 nodes: 56 steps within nodes, 7 between; a megabyte goes by LL128, a gigabyte by Simple
    assert laws.ring(1e6, 64) == pytest.approx(10e-6 + 56 * 1.9e-6 + 7 * 4.0e-6 + 1e6 * 63 / 64 / 345e9 / 0.92)
    assert laws.ring(1e9, 64) == pytest.approx(8.4e-6 + 56 * 3.4e-6 + 7 * 9.6e-6 + 1e9 * 63 / 64 / 345e9)
    assert laws.ring(1e9, 1) == 0


def test_recomputation_is_counted_once_a_forward_pass():
    for parts, checkpointed, mended, work in ((1, 0, 0, 3), (2, 0, 0, 3.5), (4, 1, 0, 4.75), (1, 0, 1, 3), (4, 0, 1, 4)):
        assert laws.Layout(True, parts, bool(checkpointed), bool(mended)).recompute == pytest.approx(work / 3)


def test_bytes_on_the_wire_are_those_of_hand():
    # 65,536 vectors of 3,072 x 4 bytes, two sides, forward and backward; 63 of 64 shares come from elsewhere
    step = laws.step_of(laws.LARGE, laws.TEXT, 64, 65_536, laws.Layout(True, 3, False))
    assert step.bytes["vectors"] == 4 * 805_306_368 * 63 / 64
    layers = 36 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 12_288)
    rest = 151_936 * 4096 + 472e6 + 4096 * 3072
    assert step.bytes["weights"] == (2 * 3 * 4 * layers + 4 * rest) * 63 / 64
    assert step.bytes["gradients"] == 4 * (layers + rest) * 63 / 64


def test_what_was_counted_is_what_is_assumed():
    for row in COUNTED["steps"]:
        moved, most, layers = row["bytes"], row["most"], row["layers"]
        wide = 2 if row["precision"] == "bf16 by FSDP2" else 4
        gathered = moved["forward, gathered"] + moved["backward, gathered"] - wide * row["rest"]
        assert gathered == pytest.approx(laws.GATHERS_A_PART * row["parts"] * wide * layers, rel=0.01)
        assert moved["backward, reduced"] - row["vectors"] == pytest.approx(4 * (layers + row["rest"]), rel=0.01)
        assert most["whole"] / layers == pytest.approx(wide if row["parts"] > 1 else wide / 3, rel=0.02)  # of 3 layers, one
        if row["precision"] == "bf16-mixed":
            assert most["cast"] / layers == pytest.approx(2, rel=0.02)
        if row["precision"] == "bf16-mixed" and row["parts"] > 1:
            assert 2 < most["gradient"] / layers < 2.4
    # two sides of 16 vectors of 48 in fp32; 9 sizes of two ranks; two ids of 16 pairs
    assert COUNTED["steps"][0]["bytes"]["objective, gathered"] == 2 * 16 * 48 * 4 + 9 * 2 * 8 + 2 * 16 * 8


@pytest.mark.full
def test_counting_again_gives_the_same():
    assert loaded("counted").counted() == COUNTED


@pytest.mark.parametrize("model", [laws.SMALL, laws.LARGE], ids=lambda model: model.name)
def test_more_gpus_are_faster_and_never_more_than_in_proportion(model):
    layout = laws.Layout(True, 1, False)
    steps = [laws.step_of(model, laws.TEXT, gpus, 65_536, layout).total for gpus in laws.GPUS]
    for slower, faster in itertools.pairwise(steps):
        assert slower / 2 <= faster < slower


@pytest.mark.parametrize("sharded", [True, False])
def test_memory_falls_with_gpus_and_rises_with_the_batch(sharded):
    def used(gpus: int, batch: int) -> float:
        return sum(laws.memory(laws.LARGE, laws.TEXT, gpus, batch, laws.Layout(sharded, 1, True)).values())

    assert used(64, 32_768) > used(128, 32_768) > used(512, 32_768)
    assert used(64, 16_384) < used(64, 32_768) < used(64, 65_536)


def test_what_is_chosen_fits_and_a_larger_memory_is_never_slower():
    for model in (laws.SMALL, laws.LARGE):
        h100, h200 = (laws.best(model, laws.TEXT, 64, 65_536, gpu) for gpu in ("H100", "H200"))
        assert sum(laws.memory(model, laws.TEXT, 64, 65_536, h100[0]).values()) <= laws.USABLE * laws.MEMORY["H100"]
        assert h200[1].total <= h100[1].total


def test_a_checkpoint_of_shares_is_written_faster_and_read_whole_by_every_rank():
    size, write, resume, node = laws.checkpoint(laws.LARGE, 64, sharded=True)
    alone = laws.checkpoint(laws.LARGE, 64, sharded=False)
    assert size == 12 * laws.LARGE.parameters == alone[0]
    assert write < alone[1] / 30
    assert node == 16 * size  # eight ranks, each with all shares and what is put together of them
    assert resume >= 64 * size / laws.CLUSTER_READ


def test_the_script_prints_every_table():
    printed = subprocess.run([sys.executable, FOLDER / "laws.py"], capture_output=True, text=True, check=True).stdout
    assert printed in (FOLDER / "README.md").read_text()


def test_every_node_reads_from_every_shard_in_the_windowed_order():
    order = Order(64_000, tuple(range(1000, 64_001, 1000)), window=8)
    nodes, batch = 8, 512
    met = [set() for _ in range(nodes)]
    for step in range(64_000 // batch):
        positions = order.positions((0, "examples", 0), np.arange(step * batch, (step + 1) * batch))
        for node in range(nodes):
            met[node] |= {*(positions[rows_of_rank(batch, node, nodes)] // 1000).tolist()}
    assert all(len(shards) == 64 for shards in met)
