"""Promises of the data side under faults: no sample lost in silence, none mixed with another, no process that hangs or stays.

Each begins with what plain webdataset 1.0.2 or Lightning 2.6.6 does there, where that is worse.
"""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from changes import FIRST, TASKS, bad_in, edited, flipped, foreign, other_bytes, outcomes, stream_of
from samples import pairs, read_by_webdataset
from webdataset.handlers import ignore_and_continue

from datamodules.cache import Cache
from datamodules.index import index_tar, write_index
from datamodules.order import Order
from datamodules.plan import Plan, PlannedTask
from datamodules.processors.processor import ProcessorConfig
from datamodules.record import Columns
from datamodules.sample import Example, text_item
from datamodules.shards import Split, write_split
from datamodules.store import Store
from datamodules.training import TrainingData


def test_a_flipped_header_byte_loses_no_sample(tmp_path):
    """webdataset reads the samples before it, and the 150 of 250 after it vanish without an error."""
    examples = [Example(f"k{n:03d}", text_item(f"q{n}"), text_item("t")) for n in range(250)]
    write_split(tmp_path / "s", examples)
    flipped(b"k100.json", after=3)(tmp_path / "s")
    assert len(read_by_webdataset(tmp_path / "s" / FIRST)) == 100
    with pytest.raises(ValueError, match=r"the checksum of a header is wrong.*\(at byte 102912\)"):
        index_tar(tmp_path / "s" / FIRST)
    split = Split(tmp_path / "s")  # indexed before: it needs no header
    assert bad_in(split, examples) == {}
    flipped(b'"q123"', after=2)(tmp_path / "s")
    assert bad_in(split, examples) == {"k123": "damaged bytes"}


def test_the_picture_of_one_shard_never_meets_the_text_of_another(tmp_path):
    """webdataset, told to go on after errors, makes a pair of the cut shard's last picture and the next shard's first text."""
    whole = [(f"k{n}.{e}", f"{e} {n} of a".encode()) for n in range(4) for e in ("png", "txt")]
    a = foreign(tmp_path / "a.tar", *whole)
    b = foreign(tmp_path / "b.tar", ("k2.txt", b"txt 2 of b"), ("k7.png", b"png 7 of b"), ("k7.txt", b"txt 7 of b"))
    columns = Columns(query=("txt",), target=("png",))
    found = write_index(tmp_path / "s", Store(tmp_path), [a.name, b.name], columns=columns, at=Store(tmp_path))
    assert [line[2] for line in found["malformed"]] == ["k2"]
    split, before = Split(tmp_path / "s"), len(a.read_bytes())
    edited(a, lambda data: data.__delitem__(slice(data.index(b"txt 2 of a") + 4, None)))
    mixed = read_by_webdataset(a, b, handler=ignore_and_continue)
    assert (mixed[2]["png"], mixed[2]["txt"]) == (b"png 2 of a", b"txt 2 of b")
    with pytest.raises(ValueError, match=r"a\.tar: a member says it has 10 bytes, which are not there"):
        index_tar(a)
    with pytest.raises(ValueError, match=rf"a\.tar has \d+ bytes, its manifest says {before}"):
        Split(tmp_path / "s")
    split = _opened_before(split, a, before)
    read = [example for example in outcomes(split).values() if isinstance(example, Example)]
    assert [(e.key, _words(e)) for e in read] == [(k, (f"txt {k[1]} of {s}", f"png {k[1]} of {s}")) for k, s in KEPT]


KEPT = (("k0", "a"), ("k1", "a"), ("k7", "b"))


def _words(example: Example) -> tuple[str, str]:
    assert example.query is not None
    assert example.target is not None
    return str(example.query.parts[0].data), str(example.target.parts[0].data, "utf-8")  # pyright: ignore[reportArgumentType]


def _opened_before(split: Split, shard: Path, num_bytes: int) -> Split:
    """Let a split open a shard at the size it had, and cut it again."""
    short = shard.stat().st_size
    os.truncate(shard, num_bytes)
    outcomes(split)
    os.truncate(shard, short)
    return split


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_shards_of_the_same_name_stay_apart_in_the_cache(tmp_path, monkeypatch):
    """webdataset's cache names files by their base name: taskB's shard is taskA's."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    examples = {task: pairs(5, text=task) for task in ("taskA", "taskB")}
    for task in examples:
        write_split(tmp_path / "far" / task, examples[task])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "far"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        store = Store(f"http://127.0.0.1:{server.server_address[1]}", cache=Cache(tmp_path / "cache", 2**20))
        try:
            for _ in range(2):
                for task in examples:
                    assert list(outcomes(Split(store / task)).values()) == examples[task]
        finally:
            server.shutdown()
            thread.join()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_every_epoch_has_an_order_of_its_own():
    """webdataset with a fixed seed goes through the shards in the same order every epoch."""
    plan = Plan({"t": PlannedTask(Order(40), 8, 1.0)}, seed=0)
    epochs = [np.concatenate([plan.positions(step) for step in range(5 * n, 5 * n + 5)]).tolist() for n in range(20)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 20


def test_a_damaged_example_is_replaced_and_told_by_the_stream(tmp_path):
    write_split(tmp_path / "s", pairs(12))
    flipped(b'"text 3"', after=3)(tmp_path / "s")
    batches: list[Any] = list(stream_of(Split(tmp_path / "s"), num_steps=6))
    assert all(len(keys) == 6 and "k003" not in keys for _, _, keys, _, _ in batches)
    faults = [fault for *_, faults in batches for fault in faults]
    assert {(fault.task, fault.key, fault.cause) for fault in faults} == {("t", "k003", "damaged bytes")}
    assert [fault.step for fault in faults if fault.shard.endswith(f"s/{FIRST}")] == [fault.step for fault in faults]
    assert len(faults) >= 3  # once an epoch, and when it was drawn as another's replacement


def test_a_shard_that_is_all_bad_stops_the_stream_with_its_reason(tmp_path):
    write_split(tmp_path / "s", pairs(12))
    other_bytes(tmp_path / "s")
    with pytest.raises(ValueError, match=r"100 examples in a row cannot be used.*is damaged.*conf=verify"):
        list(stream_of(Split(tmp_path / "s")))


class AsksForSteps(L.LightningModule):
    """Reads `estimated_stepping_batches` where the optimiser is made, as schedules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.keys = torch.nn.Parameter(torch.zeros(1)), {}

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == self.trainer.max_steps
        return torch.optim.SGD([self.weight], 0.1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.step == 4:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/5.ckpt")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.keys[batch.step] = batch.keys
        return self.weight.sum()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning", "ignore:.*LeafSpec.*:DeprecationWarning"
)
def test_a_schedule_that_asks_for_the_number_of_steps_keeps_the_streams_place(world, tmp_path):
    """Lightning 2.6.6 then drops a loader's state (Lightning#20550)."""

    def fit(num_steps: int, ckpt_path: str | None = None) -> dict[int, list[str]]:
        data = TrainingData(str(world), TASKS, processor=ProcessorConfig(vocab_size=400), steps_per_block=9, num_workers=1)
        off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        quiet: dict[str, Any] = dict.fromkeys(off, False)
        trainer = L.Trainer(accelerator="cpu", max_epochs=1, max_steps=num_steps, default_root_dir=tmp_path, **quiet)
        module = AsksForSteps()
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module.keys

    straight = fit(9)
    assert list(straight) == list(range(9))
    resumed = fit(9, str(tmp_path / "5.ckpt"))
    assert resumed == {step: straight[step] for step in range(5, 9)}
