"""Promises of judging: every stored form and prompt, values for each query, what cannot be judged, resuming, processes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Page
from trials import free_port

from datamodules.sample import Example, text_item
from datamodules.shards import write_split
from datamodules.tasks import BenchmarkSpec
from lightning_modules.block_encoder import BlockEncoder
from lightning_modules.configuration import CONF, compose
from lightning_modules.encoder.checkpoint import save_encoder
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.native import media_of
from lightning_modules.evaluate import evaluate
from lightning_modules.findings import Findings, Judged, Settings
from lightning_modules.judge import Judge
from lightning_modules.precision import BITS

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = {
    "world/text-image": BenchmarkSpec("retrieval", "world/text-image/test", query_prompt="task: {text}", group="world"),
    "world/image-text": BenchmarkSpec("retrieval", "world/text-image/test", reverse=True, metric="ndcg@10"),
}


def judge_of(encoder, processor, root, **more) -> Judge:
    return Judge(encoder, processor, root, batch_size=16, num_workers=0, device="cpu", **more)


@pytest.fixture
def folder(tiny_encoder, processor, tmp_path) -> str:
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={"stage": "test"})
    return str(tmp_path / "encoder")


def read(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def test_every_stored_form_has_a_row_of_the_benchmarks_metric(tiny_encoder, processor, world):
    rows = judge_of(tiny_encoder, processor, world).results(IMAGES, [8, 16], dtypes=list(BITS)).rows
    forms = {(row["benchmark"], row["metric"], row["prefix"], row["dtype"]): row for row in rows}
    assert len(forms) == len(rows) == 2 * 2 * (5 + 3)
    for (benchmark, metric, prefix, dtype), row in forms.items():
        assert dtype == "float32" or metric == ("ndcg@10" if benchmark == "world/image-text" else "recall@1")
        assert row["bytes"] == prefix * BITS[dtype] // 8
        assert 0 <= row["value"] <= 1
    assert next(row["metric"] for row in rows if row["benchmark"] == "world/image-text") == "ndcg@10"
    assert {row["group"] for row in rows if row["benchmark"] == "world/text-image"} == {"world"}


def test_a_mean_lies_in_its_interval_and_is_that_of_the_queries(tiny_encoder, processor, world):
    found = judge_of(tiny_encoder, processor, world).results(IMAGES, [16])
    for row in found.rows:
        if row["low"] is not None:
            values = found.values[f"{row['benchmark']}|{row['metric']}|16|float32|true"]
            assert len(values) == len(found.values[f"{row['benchmark']}|queries"]) == row["num_queries"] == 24
            assert row["value"] == pytest.approx(values.mean())
            assert row["low"] <= row["value"] <= row["high"]
    assert {row["metric"] for row in found.rows if row["low"] is not None} == {"recall@1", "ndcg@10"}
    assert {row["measure"] for row in found.space} == {"spread", "mean_cosine", "isotropy", "hubness", "modality_gap"}


def test_benchmarks_with_prompts_are_judged_without_them_too(tiny_encoder, processor, world):
    rows = judge_of(tiny_encoder, processor, world).results(IMAGES, without_prompts=True).rows
    bare = [row for row in rows if not row["prompts"]]
    assert [(row["benchmark"], row["metric"], row["prefix"]) for row in bare] == [("world/text-image", "recall@1", 16)]
    plain = {"world/text-image": BenchmarkSpec("retrieval", "world/text-image/test")}
    assert bare[0]["value"] == judge_of(tiny_encoder, processor, world).results(plain, [16]).rows[0]["value"]


def test_grades_count_in_ndcg(tiny_encoder, processor, tmp_path):
    texts = [f"document {n}" for n in range(4)]
    write_split(tmp_path / "corpus", [Example(f"d{n}", target=text_item(text)) for n, text in enumerate(texts)])
    grades = {"d0": 3.0, "d1": 1.0}
    write_split(tmp_path / "queries", [Example("q", text_item(texts[1]), relevant=grades)])
    spec = BenchmarkSpec("retrieval", "queries", corpus="corpus", metric="ndcg@10")
    found = judge_of(tiny_encoder, processor, tmp_path).results({"docs/text-text": spec}, [16])
    order = [item.parts[0].data for item, _, _ in found.neighbours[0].found]
    assert order[0] == texts[1]
    gained = 1 + 3 / np.log2(order.index(texts[0]) + 2)
    assert found.rows[0]["value"] == pytest.approx(gained / (3 + 1 / np.log2(3)))


def test_shuffled_judgements_give_chance(tiny_encoder, processor, tmp_path):
    random = np.random.default_rng(0)
    texts = [f"{word} {n}" for n in range(150) for word in ("cat", "mat")]
    shuffled = random.permutation(len(texts))
    for name, order in (("right", range(len(texts))), ("shuffled", shuffled)):
        pairs = (Example(f"p{n}", text_item(text), text_item(texts[int(order[n])])) for n, text in enumerate(texts))
        write_split(tmp_path / name, pairs)
        labelled = (Example(f"c{n}", text_item(text), label=texts[int(order[n])].split()[0]) for n, text in enumerate(texts))
        write_split(tmp_path / f"{name}_classes", labelled)

    def values(name: str) -> dict[str, dict]:
        specs = {
            "pairs/text-text": BenchmarkSpec("retrieval", name, metric="recall@10"),
            "classes/text-text": BenchmarkSpec("classification", f"{name}_classes", train=f"{name}_classes"),
            "groups/text-text": BenchmarkSpec("clustering", f"{name}_classes"),
        }
        rows = judge_of(tiny_encoder, processor, tmp_path).results(specs, [16]).rows
        return {row["metric"]: row for row in reversed(rows)}

    right, wrong = values("right"), values("shuffled")
    assert right["recall@10"]["value"] == 1.0
    assert wrong["recall@10"]["value"] == pytest.approx(10 / 300, abs=0.03)  # three standard errors of 300 queries
    assert wrong["accuracy_zero_shot"]["value"] == pytest.approx(0.5, abs=0.09)
    assert wrong["v_measure"]["value"] == pytest.approx(wrong["v_measure"]["chance"], abs=0.02)
    assert right["accuracy_probe"]["value"] > 0.9


def test_what_an_encoder_does_not_take_is_said_and_never_a_number(tiny_config, processor, world):
    backbone = dataclasses.replace(tiny_config.backbone, towers={}, routes={}, tokens={})
    text_only = Embedder(dataclasses.replace(tiny_config, backbone=backbone))
    assert media_of(text_only.backbone, processor) == ()
    texts = {"world/text-text": BenchmarkSpec("retrieval", "world/text-text/test")}
    rows = judge_of(text_only, processor, world).results({**IMAGES, **texts}).rows
    for row in rows:
        if "image" in row["benchmark"]:
            assert row["value"] is row["low"] is row["chance"] is None
            assert row["note"] == "not supported: the encoder takes no image"
        else:
            assert row["value"] is not None
    with pytest.raises(ValueError, match="'world/text-image' has no value: not supported"):
        judge_of(text_only, processor, world).headline(IMAGES)


def test_an_evaluation_of_nothing_that_is_supported_ends_as_any_other(tiny_config, processor, world, tmp_path):
    backbone = dataclasses.replace(tiny_config.backbone, towers={}, routes={}, tokens={})
    text_only = Embedder(dataclasses.replace(tiny_config, backbone=backbone))
    save_encoder(tmp_path / "encoder", text_only, processor, provenance={})
    evaluate(str(tmp_path / "encoder"), str(tmp_path / "out"), root=str(world), benchmarks=IMAGES, num_workers=0)
    assert {row["value"] for row in read(tmp_path / "out")} == {None}


def test_a_benchmarks_answers_are_looked_for_in_what_is_found(tiny_encoder, processor, tmp_path):
    documents = ["the oak grows", "an ash burns", "the elm bends"]
    write_split(tmp_path / "corpus", [Example(f"d{n}", target=text_item(t, title="drowns")) for n, t in enumerate(documents)])
    asked = [("oak?", ["grows"]), ("ash?", ["drowns"])]
    queries = (Example(f"q{n}", text_item(text), meta={"answers": answers}) for n, (text, answers) in enumerate(asked))
    write_split(tmp_path / "queries", queries)
    spec = BenchmarkSpec("retrieval", "queries", corpus="corpus", metric="answers@5kt")
    found = judge_of(tiny_encoder, processor, tmp_path).results({"xor/text-text": spec}, [16])
    assert [(row["metric"], row["value"], row["chance"]) for row in found.rows] == [("answers@5kt", 0.5, None)]
    write_split(tmp_path / "mute", [Example("q", text_item("oak?"))])
    with pytest.raises(ValueError, match="query 'q' has no answers in its meta"):
        judge_of(tiny_encoder, processor, tmp_path).results(
            {"xor/text-text": BenchmarkSpec("retrieval", "mute", corpus="corpus", metric="answers@5kt")}
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BenchmarkSpec("retrieval", "world/text-text/test", metric="map"), "asks for 'map'; retrieval has recall@1, "),
        (BenchmarkSpec("retrieval", "absent"), "benchmark 'w/text-text': "),
        (BenchmarkSpec("clustering", "world/text-text/test"), "24 of 24 examples have no label"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(tiny_encoder, processor, world, spec, message):
    with pytest.raises(ValueError, match=message):
        judge_of(tiny_encoder, processor, world).results({"w/text-text": spec})


def test_whoever_lacks_the_data_is_told_where_they_come_from(tiny_encoder, processor, world):
    specs = {name: BenchmarkSpec(**spec) for name, spec in compose(CONF / "benchmarks/mscoco.yaml", [])["benchmarks"].items()}
    told = "conf/benchmarks/mscoco.yaml says where its data come from"
    with pytest.raises(ValueError, match=rf"benchmark 'mscoco/text-image': no shards in .*; {told}"):
        judge_of(tiny_encoder, processor, world).results(specs)
    rows = judge_of(tiny_encoder, processor, world).results({**specs, **IMAGES}, [16]).rows
    notes = {row["benchmark"]: row["note"] for row in rows if row["value"] is None}
    assert notes.keys() == specs.keys()
    assert all(note.startswith("no data: ") and note.endswith(told) for note in notes.values())


def test_a_vector_that_is_not_finite_is_refused_with_its_examples(tiny_encoder, processor, world, monkeypatch):
    forward = tiny_encoder.forward
    monkeypatch.setattr(tiny_encoder, "forward", lambda inputs: forward(inputs) * float("nan"))
    with pytest.raises(ValueError, match="a vector that is not finite to one of the examples"):
        judge_of(tiny_encoder, processor, world).results(IMAGES)


def test_a_collapsed_encoder_has_no_correlation_and_says_why(tiny_encoder, processor, tmp_path, monkeypatch):
    write_split(tmp_path / "sts", [Example(f"s{n}", text_item(f"a{n}"), text_item(f"b{n}"), score=float(n)) for n in range(5)])
    forward = tiny_encoder.forward
    monkeypatch.setattr(tiny_encoder, "forward", lambda inputs: torch.ones_like(forward(inputs)))
    rows = judge_of(tiny_encoder, processor, tmp_path).results({"s/text-text": BenchmarkSpec("similarity", "sts")}, [16]).rows
    assert (rows[0]["value"], rows[0]["note"]) == (None, "all cosines are alike: the embeddings have collapsed")


def test_results_can_be_compared_query_by_query(folder, world, tmp_path):
    evaluate(folder, str(tmp_path / "out"), root=str(world), benchmarks=IMAGES, num_workers=0, dtypes=["float32", "int8"])
    with np.load(tmp_path / "out" / "values.npz", allow_pickle=False) as values:
        assert "world/text-image|recall@1|16|int8|true" in values
        assert values["world/text-image|queries"].dtype == np.int64
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "int8" in page.text
    assert json.loads((tmp_path / "out" / "space.json").read_text())
    assert not (tmp_path / "out" / ".vectors").exists()


def test_a_run_that_was_stopped_goes_on_with_the_vectors_it_made(folder, world, tmp_path, monkeypatch):
    embedded = BlockEncoder.embedded
    made: list[str] = []

    def counted(self, split, prompts, blocks, **more):
        for found in embedded(self, split, prompts, blocks, **more):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(str(split.folder))
            yield found

    monkeypatch.setattr(BlockEncoder, "embedded", counted)
    arguments = {"root": str(world), "benchmarks": IMAGES, "num_workers": 0}
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, str(tmp_path / "out"), **arguments)
    assert len(made) == 2
    del made[:]
    evaluate(folder, str(tmp_path / "out"), **arguments)
    assert len(made) == 1  # of three columns: queries with and without a prompt, images
    monkeypatch.setattr(BlockEncoder, "embedded", embedded)
    evaluate(folder, str(tmp_path / "whole"), **arguments)
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_processes_judge_together_what_one_judges_alone(zygote, folder, world, tmp_path):
    spec = {"measure": "retrieval", "shards": "world/text-image/test", "query_prompt": None, "target_prompt": None}
    specs = f"benchmarks={json.dumps({'world/text-image': spec})}"
    arguments = ["conf=evaluate", f"checkpoint={folder}", f"root={world}", specs, "num_workers=0", "device=cpu"]
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = {"one": {}, "two": {**ranks, "RANK": "0"}, "other": {**ranks, "RANK": "1"}}
    pids = []
    for name, environment in processes.items():
        out = tmp_path / ("one" if name == "one" else "two")
        command = {"arguments": [*arguments, f"out={out}"], "environment": environment, "log": str(tmp_path / f"log-{name}")}
        pids.append(zygote.ask(**command))
    statuses = [zygote.ask(wait=pid) for pid in pids]
    assert statuses == [0, 0, 0], "".join(path.read_text() for path in tmp_path.glob("log-*"))
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_equal_queries_keep_names_of_their_own_wherever_they_stand():
    """Two runs are compared query by query; the second of two equal ones must meet the second."""
    findings = Findings()
    judged = Judged(findings, "stsb/text-text", BenchmarkSpec("similarity", "stsb"), Settings([4]))
    judged.sizes(5, 5, np.array([70, -3, 70, 70, -3]))
    assert findings.values["stsb/text-text|queries"].tolist() == [70, -3, 71, 72, -2]
