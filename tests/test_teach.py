"""Promises of conf=teach: every item has the encoder's own vector, splits are whole and not made twice, a student learns."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from changes import foreign
from samples import pairs
from test_train import run, tiny_prefinetune

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.media.limits import DecodeLimits
from datamodules.recipes.tars import index
from datamodules.sample import Example, text_item
from datamodules.shards import Split, write_split
from datamodules.tasks import Mixture, TaskSpec
from lightning_modules import teach as stage
from lightning_modules.encoder.checkpoint import read_provenance, save_encoder
from lightning_modules.encoder.embedder import ComputeConfig, cut
from lightning_modules.teach import teach

TARGET = "title: {title} | {text}"
PROMPTED = TaskSpec("mixed", query_prompt="q: {text}", target_prompt=TARGET)
MIXED = Mixture({"m": PROMPTED, "off": TaskSpec("nowhere", rate=0)})


@pytest.fixture
def teacher(tiny_encoder, processor, tmp_path) -> str:
    save_encoder(tmp_path / "teacher", tiny_encoder, processor, provenance={})
    return str(tmp_path / "teacher")


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Text with pictures, texts with titles, none to three hard negatives."""
    examples = pairs(7)
    for n in range(9):
        negatives = tuple(text_item(f"{m} no {'long ' * m}", title="no") for m in range(n % 4))
        examples.append(Example(f"t{n}", text_item("cat " * n or "none"), text_item(f"the mat {n}", title="mat"), negatives))
    write_split(tmp_path / "root" / "mixed", examples, about={"licence": "own"}, examples_per_shard=5)
    return tmp_path / "root"


def columns_of(example: Example) -> list:
    return [(example.query, "q: {text}"), *((item, TARGET) for item in (example.target, *example.negatives))]


@torch.no_grad()
@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 4), (1, 100)])
def test_every_item_gets_the_teachers_unit_vector_under_its_tasks_prompt(
    teacher, mixed, tiny_encoder, processor, tmp_path, num_workers, batch_size
):
    more = {"batch_size": batch_size, "num_workers": num_workers, "compute": ComputeConfig(max_tokens=60), "device": "cpu"}
    teach(teacher, str(mixed), MIXED, str(tmp_path / "out"), dtype="float32", **more)
    before, after = Split(mixed / "mixed"), Split(tmp_path / "out" / "mixed")
    assert after.keys == before.keys
    for position in range(len(before)):
        given, found = before.read(position), after.read(position)
        assert found == given  # but for the vectors, which are no part of the content
        for item, prompt in columns_of(found):
            alone = tiny_encoder(processor([with_prompt(decode_item(item, DecodeLimits()), prompt)]))
            assert item.teacher.dtype == np.float32
            np.testing.assert_allclose(item.teacher, cut(alone, 16)[0].numpy(), rtol=0, atol=1e-5)


def test_vectors_are_stored_in_half_and_without_prompts_on_request(teacher, mixed, tmp_path):
    for name, more in (("half", {}), ("bare", {"dtype": "float32", "prompts": False})):
        teach(teacher, str(mixed), MIXED, str(tmp_path / name), num_workers=0, device="cpu", **more)
    half, bare = (Split(tmp_path / name / "mixed").read(8) for name in ("half", "bare"))
    assert half.query is not None
    assert bare.query is not None
    assert half.query.teacher is not None
    assert bare.query.teacher is not None
    assert (half.query.teacher.dtype, bare.query.teacher.dtype) == (np.float16, np.float32)
    assert not np.allclose(half.query.teacher, bare.query.teacher, atol=1e-2)
    assert Split(tmp_path / "bare" / "mixed").manifest["about"]["teacher"]["prompts"]["query"] is None


def test_what_is_written_is_not_written_again_until_something_changes(teacher, mixed, tmp_path, monkeypatch, capsys):
    write_split(mixed / "other", pairs(3, text="other"))
    both, out, written = Mixture({**MIXED.tasks, "o": TaskSpec("other")}), str(tmp_path / "out"), []
    write = stage.write_split
    monkeypatch.setattr(
        stage, "write_split", lambda folder, *more, **about: written.append(folder.name) or write(folder, *more, **about)
    )

    def again(**more) -> list[str]:
        written.clear()
        teach(teacher, str(mixed), both, out, num_workers=0, device="cpu", **more)
        return list(written)

    assert again() == ["mixed", "other"]
    about = Split(tmp_path / "out" / "mixed").manifest["about"]
    assert about["licence"] == "own"
    assert about["teacher"]["sha256"] == read_provenance(teacher)["sha256"]
    assert again() == []
    assert "2 of 2 splits had been written by this teacher" in capsys.readouterr().out.replace("\n", " ")
    (tmp_path / "out" / "other" / "000000.tar").unlink()
    assert again() == ["other"]
    write_split(mixed / "other", pairs(4, text="other"))
    assert again() == ["other"]
    assert again(dtype="float32") == ["mixed", "other"]
    assert again(prompts=False, dtype="float32") == ["mixed"]  # the other has none


def test_a_stop_leaves_no_half_split(teacher, mixed, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    teach(teacher, str(mixed), MIXED, str(tmp_path / "out"), num_workers=0, device="cpu")
    former = Split(tmp_path / "out" / "mixed").digest
    monkeypatch.setattr(stage, "_vectors", stopped)
    with pytest.raises(KeyboardInterrupt):
        teach(teacher, str(mixed), MIXED, str(tmp_path / "out"), num_workers=0, device="cpu", dtype="float32")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mixed"]
    assert Split(tmp_path / "out" / "mixed").digest == former


def test_what_cannot_be_embedded_is_refused(teacher, mixed, tmp_path):
    out = str(tmp_path / "out")
    write_split(mixed / "half", [Example("k", text_item("q"))])
    write_split(mixed / "bad", [Example("k", pairs(1)[0].query, pairs(1)[0].target)])
    tar = mixed / "bad" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    twice = Mixture({"a": PROMPTED, "b": TaskSpec("mixed")})
    for mixture, place, message in (
        (Mixture({}), out, "no task has a rate above 0"),
        (MIXED, str(mixed / "x" / ".."), "where the splits are read from; give another folder"),
        (twice, out, "task 'b' puts other prompts around mixed than one before it"),
        (Mixture({"h": TaskSpec("half")}), out, "example 'k' has no target"),
        (Mixture({"b": TaskSpec("bad")}), out, "is damaged .*; conf=verify root=.* leaves bad examples out"),
    ):
        with pytest.raises(ValueError, match=message):
            teach(teacher, str(mixed), mixture, place, num_workers=0, device="cpu")
    assert not list((tmp_path / "out").glob("*"))
    teach(teacher, str(mixed), Mixture({"a": twice.tasks["a"], "b": TaskSpec("mixed")}), out, prompts=False, num_workers=0)


def test_foreign_keys_are_made_fit(teacher, tmp_path):
    (tmp_path / "root" / "far").mkdir(parents=True)
    tar = foreign(tmp_path / "root" / "far" / "x.tar", *((f"a/{n}.{c}", b"cat") for n in range(3) for c in ("txt", "cls")))
    index(str(tar.parent), query=("txt",), target=("cls",))
    assert Split(tar.parent).keys == ["a/0", "a/1", "a/2"]
    teach(teacher, str(tmp_path / "root"), Mixture({"f": TaskSpec("far")}), str(tmp_path / "out"), num_workers=0, device="cpu")
    assert Split(tmp_path / "out" / "far").keys == ["a_0", "a_1", "a_2"]


def test_a_student_of_another_width_learns_from_what_conf_teach_wrote(teacher, world, tmp_path):
    tasks = {f"world/{name}": {"shards": f"world/{name}/train", "batch_size": 4} for name in ("text-image", "text-text")}
    words = ["conf=teach", f"checkpoint={teacher}", f"root={world}", f"out={tmp_path / 'taught'}", "num_workers=0"]
    given = f"data.tasks={json.dumps(tasks)}"
    shown = run(*words, given)
    assert "2 splits with vectors of 16 dimensions below" in shown
    student = ["model.encoder.embedding_dim=8", "model.encoder.prefixes=[4,8]", "model.encoder.pooling=attention"]
    matching = ["model.objective.matching=1", "model.objective.contrastive=0", "model.objective.centring=0"]
    more = ["model.objective.teacher_dim=16", "model.optimizer.learning_rate=0.01", "trainer.max_steps=30", given]
    run(*tiny_prefinetune(tmp_path / "taught", tmp_path / "student", *student, *matching, *more))
    with next((tmp_path / "student" / "logs").glob("version_*/metrics.csv")).open() as file:
        rows = [row["train/world/text-text/matching_query"] for row in csv.DictReader(file)]
    distances = [float(value) for value in rows if value]
    assert distances[-1] < 0.5 * distances[0]
