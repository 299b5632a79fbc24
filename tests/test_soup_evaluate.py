"""Promises of soup and evaluation, on a tiny encoder over a small world."""

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from samples import ids_of

from datamodules.collate import Collate
from datamodules.decode import decode_example
from datamodules.media.limits import DecodeLimits
from datamodules.sample import Example, Item, Part, text_item
from datamodules.shards import write_split
from datamodules.tasks import BenchmarkSpec, TaskSpec
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance, read_weights, save_encoder
from lightning_modules.encoder.embedder import cut
from lightning_modules.evaluate import evaluate
from lightning_modules.finetune import FineTune
from lightning_modules.judge import Judge
from lightning_modules.objective.objective import ObjectiveConfig
from lightning_modules.soup import soup

WORLD = {
    "world/text-image": BenchmarkSpec("retrieval", "world/text-image/test"),
    "world/image-text": BenchmarkSpec("retrieval", "world/text-image/test", reverse=True),
    "world/text-video": BenchmarkSpec("retrieval", "world/text-video/test"),
    "world/mixed-image": BenchmarkSpec("retrieval", "world/mixed-image/test"),
}


@pytest.fixture
def encoders(tiny_encoder, processor, tmp_path):
    """Three encoders' folders that differ by noise."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tiny_encoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folders.append(str(tmp_path / f"run{seed}" / "encoder"))
        save_encoder(folders[-1], tiny_encoder, processor, provenance={"stage": "test"})
    return folders


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [({}, [1 / 3] * 3), ({"method": "weighted", "weights": [2.0, 0.0, 6.0]}, [0.25, 0.0, 0.75])],
    ids=["uniform", "weighted"],
)
def test_a_soup_is_the_average_and_says_of_what(encoders, tmp_path, arguments, shares):
    soup(encoders, str(tmp_path / "soup"), **arguments)
    parts, made = [read_weights(folder) for folder in encoders], read_weights(tmp_path / "soup")
    for name, tensor in made.items():
        expected = sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    parents = read_provenance(tmp_path / "soup")["parents"]
    assert [parent["path"] for parent in parents] == encoders
    assert [parent["weight"] for parent in parents] == pytest.approx(shares)
    assert [parent["sha256"] for parent in parents] == [read_provenance(folder)["sha256"] for folder in encoders]


def test_a_greedy_soup_is_at_least_as_good_as_its_best_ingredient(encoders, world, tmp_path):
    benchmarks = {"world/text-image": WORLD["world/text-image"]}
    soup(encoders, str(tmp_path / "soup"), method="greedy", root=str(world), benchmarks=benchmarks, num_workers=0)

    def score(folder):
        judge = Judge(*load_encoder(folder), world, batch_size=16, num_workers=0, device="cpu")
        return judge.headline(benchmarks)

    parents = read_provenance(tmp_path / "soup")["parents"]
    assert [parent["score"] for parent in parents] == pytest.approx([score(folder) for folder in encoders])
    assert score(tmp_path / "soup") >= max(parent["score"] for parent in parents)
    assert any(parent["weight"] > 0 for parent in parents)


def test_soups_that_cannot_be_are_refused(encoders, tmp_path, tiny_encoder, processor):
    with pytest.raises(ValueError, match="nothing to average"):
        soup([], str(tmp_path / "soup"))
    with pytest.raises(ValueError, match="weights belong to method=weighted"):
        soup(encoders, str(tmp_path / "soup"), weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="give one number of at least 0 for each"):
        soup(encoders, str(tmp_path / "soup"), method="weighted", weights=[1.0])
    with pytest.raises(ValueError, match="needs root and benchmarks"):
        soup(encoders, str(tmp_path / "soup"), method="greedy")
    processor_file = tmp_path / "run2" / "encoder" / "processor.json"
    processor_file.write_text(processor_file.read_text().replace('"view_size": 64', '"view_size": 32'))
    with pytest.raises(ValueError, match="differ in the processor's settings"):
        soup([encoders[0], encoders[2]], str(tmp_path / "soup"))
    tokenizer = tmp_path / "run1" / "encoder" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(ValueError, match="differ in the tokenizer"):
        soup(encoders, str(tmp_path / "soup"))
    assert not (tmp_path / "soup").exists()


def test_results_hold_a_row_for_every_benchmark_metric_and_prefix(encoders, world, tmp_path, capsys):
    evaluate(encoders[0], str(tmp_path / "out"), root=str(world), benchmarks=WORLD, batch_size=16, num_workers=0)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    keys = {(row["benchmark"], row["metric"], row["prefix"], row["dtype"]) for row in rows}
    metrics = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")
    assert keys == {(name, metric, prefix, "float32") for name in WORLD for metric in metrics for prefix in (4, 8, 16)}
    assert len(rows) == len(keys)
    for row in rows:
        assert " ".join(row) == (
            "benchmark metric prefix dtype prompts value low high chance num_queries num_candidates bytes group language"
        )
        assert 0 <= row["value"] <= 1
        assert (row["num_queries"], row["num_candidates"]) == (24, 24)
        if row["metric"] == "recall@1":
            assert row["chance"] == pytest.approx(1 / 24)
    assert "world/mixed-image" in (tmp_path / "out" / "report.html").read_text()
    assert "world/text-video" in capsys.readouterr().out


def test_equal_targets_count_once_and_a_corpus_is_ranked_whole(tiny_encoder, processor, tmp_path):
    pairs = [Example(f"p{n}", text_item(f"query {n}"), text_item("cat" if n < 3 else f"mat {n}")) for n in range(5)]
    write_split(tmp_path / "pairs", pairs)
    write_split(tmp_path / "corpus", [Example(f"d{n}", target=text_item(f"document {n}")) for n in range(7)])
    queries = [Example(f"q{n}", text_item(f"query {n}"), relevant={f"d{n}": 1.0, f"d{n + 1}": 2.0}) for n in range(4)]
    write_split(tmp_path / "queries", queries)
    write_split(tmp_path / "lost", [Example("q", text_item("query"), relevant={"d9": 1.0})])
    judge = Judge(tiny_encoder, processor, tmp_path, batch_size=2, num_workers=0, device="cpu")
    rows = judge.results({"pairs/text-text": BenchmarkSpec("retrieval", "pairs")}, [16]).rows
    assert (rows[0]["num_queries"], rows[0]["num_candidates"]) == (5, 3)
    rows = judge.results({"pairs/text-text": BenchmarkSpec("retrieval", "pairs", reverse=True)}, [16]).rows
    assert (rows[0]["num_queries"], rows[0]["num_candidates"]) == (3, 5)
    rows = judge.results({"docs/text-text": BenchmarkSpec("retrieval", "queries", corpus="corpus")}, [16]).rows
    assert (rows[0]["num_queries"], rows[0]["num_candidates"]) == (4, 7)
    assert rows[0]["chance"] == pytest.approx(2 / 7)
    with pytest.raises(ValueError, match="names document 'd9', which corpus does not hold"):
        judge.results({"docs/text-text": BenchmarkSpec("retrieval", "lost", corpus="corpus")})


def test_similarity_and_classification_are_judged(tiny_encoder, processor, tmp_path):
    texts = ["a small red circle", "the cat sat", "ein großer Stern", "0123", "on the mat", "return x"]
    scored = [Example(f"s{n}", text_item(text), text_item(texts[-n]), score=float(n)) for n, text in enumerate(texts)]
    write_split(tmp_path / "sts", scored)
    labelled = [Example(f"c{n}", text_item(text), label=("odd", "even")[n % 2]) for n, text in enumerate(texts * 2)]
    write_split(tmp_path / "classes", labelled)
    judge = Judge(tiny_encoder, processor, tmp_path, batch_size=4, num_workers=0, device="cpu")
    rows = judge.results({"s/text-text": BenchmarkSpec("similarity", "sts")}).rows
    assert [row["metric"] for row in rows] == ["spearman"] * 3
    assert all(-1 <= row["value"] <= 1 and not math.isnan(row["value"]) for row in rows)
    rows = judge.results({"c/text-text": BenchmarkSpec("classification", "classes", train="classes")}, [16]).rows
    assert {row["metric"]: row["chance"] for row in rows} == {"accuracy_probe": 0.5, "accuracy_zero_shot": 0.5}
    assert rows[0]["num_candidates"] == 2
    with pytest.raises(ValueError, match="have no label, which classification needs"):
        judge.results({"s/text-text": BenchmarkSpec("classification", "sts", train="sts")})
    with pytest.raises(ValueError, match="examples without a score"):
        judge.results({"x/text-text": unscored(tmp_path)})


def unscored(root):
    write_split(root / "unscored", [Example("a", text_item("x"), text_item("y"))])
    return BenchmarkSpec("similarity", "unscored")


@pytest.mark.parametrize(
    ("benchmarks", "prefixes", "message"),
    [
        ({}, None, "no benchmark to evaluate"),
        (WORLD, [], "must be positive and increase"),
        (WORLD, [64], "prefix 64 is wider than the embedding, which has 16"),
        ({"world/text-audio": WORLD["world/text-image"]}, None, "says audio for its targets, but its shards hold image"),
        ({"w/text-image": BenchmarkSpec("retrieval", "world/text-image/dev")}, None, "Splits found beside it: test, train"),
        ({"worldimage": WORLD["world/text-image"]}, None, "must be named <set>/<query modality>-<target modality>"),
    ],
)
def test_what_cannot_be_judged_is_refused(tiny_encoder, processor, world, benchmarks, prefixes, message):
    judge = Judge(tiny_encoder, processor, world, batch_size=16, num_workers=0, device="cpu")
    with pytest.raises(ValueError, match=message):
        judge.results(benchmarks, prefixes)


def test_prompts_stay_with_the_side_that_the_split_stores(tiny_encoder, processor, tmp_path):
    write_split(tmp_path / "pairs", [Example(f"p{n}", text_item(f"q{n}"), text_item(f"t{n}")) for n in range(3)])
    prompts = {"query_prompt": "task: {text}", "target_prompt": "title: {title} | text: {text}"}
    for reverse in (False, True):
        judge = Judge(tiny_encoder, processor, tmp_path, batch_size=2, num_workers=0, device="cpu")
        judge.results({"p/text-text": BenchmarkSpec("retrieval", "pairs", **prompts, reverse=reverse)}, [16])
        for column, texts in (("query", ["task: q{}"]), ("target", ["title: none | text: t{}"])):
            prompt = prompts[f"{column}_prompt"]
            items = [Item((Part("text", text.format(n), content=text.format(n)),)) for text in texts for n in range(3)]
            with torch.no_grad():
                expected = tiny_encoder(processor(items))
            found = torch.from_numpy(judge._columns[("pairs", column, prompt)].rows(np.arange(3)))
            torch.testing.assert_close(found, cut(expected, 16), rtol=1e-4, atol=1e-5)


def test_a_grade_of_zero_is_not_relevant(tiny_encoder, processor, tmp_path):
    write_split(tmp_path / "corpus", [Example(f"d{n}", target=text_item(f"document {n}")) for n in range(10)])
    write_split(tmp_path / "queries", [Example("q", text_item("query"), relevant={"d0": 1.0, "d1": 0.0, "d2": 0.0})])
    judge = Judge(tiny_encoder, processor, tmp_path, batch_size=2, num_workers=0, device="cpu")
    rows = judge.results({"docs/text-text": BenchmarkSpec("retrieval", "queries", corpus="corpus")}, [16]).rows
    assert rows[0]["chance"] == pytest.approx(1 / 10)


def test_a_reversed_classification_judges_the_targets(tiny_encoder, processor, tmp_path):
    examples = [
        Example(f"c{n}", text_item("same"), text_item(("cat", "0123")[n % 2]), label=("a", "b")[n % 2]) for n in range(8)
    ]
    write_split(tmp_path / "classes", examples)
    judge = Judge(tiny_encoder, processor, tmp_path, batch_size=4, num_workers=0, device="cpu")
    probe = {}
    for reverse in (False, True):
        spec = BenchmarkSpec("classification", "classes", train="classes", reverse=reverse)
        rows = judge.results({"c/text-text": spec}, [16]).rows
        probe[reverse] = rows[0]["value"]
    assert probe == {False: 0.5, True: 1.0}


def test_hard_negatives_and_the_runs_progress_reach_the_loss(tiny_config, processor):
    examples = [Example(str(n), text_item(f"a{n}"), text_item(f"b{n}"), (text_item(f"c{n}"),)) for n in range(4)]
    decoded = [decode_example(example, DecodeLimits()) for example in examples]
    stage = FineTune(tiny_config, objective=ObjectiveConfig(centring=0.5))
    stage.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]

    def loss(num_negatives: int, step: int) -> float:
        stage._trainer = SimpleNamespace(max_steps=10, global_step=step)  # pyright: ignore[reportAttributeAccessIssue]
        batch = Collate({"t": TaskSpec("x", negatives=num_negatives)}, processor, 0.0, 0)("t", 0, decoded)
        with torch.no_grad():
            return stage.training_step(batch, 0).item()

    assert loss(1, 5) > loss(0, 5)
    assert loss(0, 0) != loss(0, 2) != loss(0, 5)
    assert loss(0, 5) == loss(0, 9)


class Letters(torch.nn.Module):
    """A stand-in whose vector counts the letters a to h of a text: nearest neighbours can be told by hand."""

    config = SimpleNamespace(embedding_dim=8, prefixes=(2, 8))
    backbone, device = SimpleNamespace(routes={}), "cpu"

    def __init__(self, processor):
        super().__init__()
        self.processor = processor

    def forward(self, inputs):
        texts = [str(self.processor.tokenizer.decode(row, skip_special_tokens=True)) for row in ids_of(inputs)]
        return torch.tensor([[text.count(letter) + 0.01 for letter in "abcdefgh"] for text in texts])


def test_scores_are_those_told_by_hand(processor, tmp_path):
    pairs = enumerate([("a", "aab"), ("b", "bba"), ("c", "cccd"), ("d", "ceee")])
    write_split(tmp_path / "pairs", [Example(f"p{n}", text_item(q), text_item(t)) for n, (q, t) in pairs])
    scored = enumerate(("bb", "abb", "aab"))
    write_split(tmp_path / "sts", [Example(f"s{n}", text_item("a"), text_item(t), score=n) for n, t in scored])
    labelled = enumerate([("aa", "a"), ("ab", "a"), ("bb", "b"), ("aabb a", "b")])
    write_split(tmp_path / "classes", [Example(f"c{n}", text_item(t), label=label) for n, (t, label) in labelled])
    letters: Any = Letters(processor)
    judge = Judge(letters, processor, tmp_path, batch_size=3, num_workers=0, device="cpu")
    found = judge.results(
        {
            "pairs/text-text": BenchmarkSpec("retrieval", "pairs"),
            "sts/text-text": BenchmarkSpec("similarity", "sts"),
            "classes/text-text": BenchmarkSpec("classification", "classes", train="classes"),
        }
    )
    value = {(row["benchmark"].split("/")[0], row["metric"], row["prefix"]): row["value"] for row in found.rows}
    # d finds cccd before its own ceee; in the first two dimensions c and d see equal candidates, and ties count against.
    assert value["pairs", "recall@1", 8] == pytest.approx(0.75)
    assert value["pairs", "recall@1", 2] == pytest.approx(0.5)
    assert value["sts", "spearman", 8] == pytest.approx(1.0, abs=1e-5)
    assert value["classes", "accuracy_zero_shot", 8] == pytest.approx(0.75)
    assert [shown.found[0][0].parts[0].data for shown in found.neighbours] == ["aab", "bba", "cccd", "cccd"]
    assert [shown.found[0][2] for shown in found.neighbours] == [True, True, True, False]


def test_a_query_with_nothing_relevant_is_named(tiny_encoder, processor, tmp_path):
    write_split(tmp_path / "corpus", [Example("d0", target=text_item("document"))])
    write_split(tmp_path / "queries", [Example("lost", text_item("query"), relevant={"d0": 0.0})])
    judge = Judge(tiny_encoder, processor, tmp_path, batch_size=2, num_workers=0, device="cpu")
    with pytest.raises(ValueError, match="1 queries have nothing relevant, the first is 'lost'"):
        judge.results({"docs/text-text": BenchmarkSpec("retrieval", "queries", corpus="corpus")})


def test_an_encoder_that_cannot_be_right_is_not_judged(tiny_encoder, processor, world, tmp_path):
    with torch.no_grad():
        for parameter in tiny_encoder.parameters():
            parameter.zero_()
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={"stage": "test"})
    with pytest.raises(ValueError, match="still causal"):
        evaluate(str(tmp_path / "encoder"), str(tmp_path / "out"), root=str(world), benchmarks=WORLD, device="cpu")
    assert not (tmp_path / "out").exists()
