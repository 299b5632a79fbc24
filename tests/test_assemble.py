"""Promises of conf=assemble: hand-made corpora in which the right positive, hard negative and drops are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from samples import picture_bytes
from test_job import files_of
from test_train import run

from datamodules.assemble import assemble
from datamodules.curation.candidates import Selection
from datamodules.curation.card import SCHEMA
from datamodules.sample import Example, media_item, text_item
from datamodules.shards import Split, write_split

LONG = (
    "the old bridge over the northern river was opened in the spring of that year by a mayor whose name nobody remembers today "
    * 2
)
FUSED = Selection(rankings=("relevance", "likelihood"), positive="best", max_share=None)


def write(folder: Path, *examples: Example) -> str:
    write_split(folder, examples, about={"licence": "own", "source": "hand-made"})
    return str(folder)


def pair(key: str, query: str, target: str, **more) -> Example:
    return Example(key, text_item(query), text_item(target), **more)


def made(folder: Path) -> dict[str, Example]:
    split = Split(folder)
    return {key: split.read(n) for n, key in enumerate(split.keys)}


def causes(folder: Path) -> dict[str, str]:
    files = sorted((folder / "blocks").glob("*.json"))
    return {record["key"]: record["cause"] for file in files for record in json.loads(file.read_text())["aside"]}


def test_every_record_comes_once_and_apart_from_benchmarks(tmp_path):
    picture = media_item("image", picture_bytes(), "png")
    source = write(
        tmp_path / "source",
        pair("a", "first question", "one passage"),
        pair("b", "first  question", "one passage"),
        pair("c", "second question", "one passage"),
        pair("d", "about the bridge", LONG),
        pair("e", "about the bridge", LONG.replace("mayor", "king", 1)),
        pair("f", "when was the bridge opened", LONG),
        pair("g", "the judged question", "x"),
        pair("h", "y", "the judged passage"),
        Example("i", text_item("a picture"), picture),
        pair("j", "fine", LONG.replace("river", "brook", 1) + "indeed"),
        Example("k", target=text_item("nobody asks")),
    )
    judged = write(
        tmp_path / "test",
        pair("1", "The judged question", "nothing"),
        Example("2", text_item("z"), text_item("the judged passage")),
        Example("3", text_item("zz"), picture),
        Example("4", text_item("fine"), text_item("a class"), label="a class"),
    )
    write(tmp_path / "labels", pair("1", "unrelated", "fine", label="fine"))
    assemble(source, str(tmp_path / "out"), judged=[judged], block_size=3)
    assert causes(tmp_path / "out") == {
        "b": "duplicate", "e": "near duplicate", "h": "in a benchmark", "i": "in a benchmark", "j": "in a benchmark",
        "g": "in a benchmark", "k": "no query",
    }  # fmt: skip
    assert list(made(tmp_path / "out")) == ["a", "c", "d", "f"]
    assemble(source, str(tmp_path / "exact"), judged=[str(tmp_path / "labels")], near=None)
    assert causes(tmp_path / "exact") == {"b": "duplicate", "k": "no query"}


@pytest.fixture
def judged(tmp_path) -> tuple[str, str]:
    """Records whose candidates are rated: positions 0 to 4 of the corpus."""
    corpus = write(tmp_path / "corpus", *(Example(f"c{n}", target=text_item(f"passage {n}")) for n in range(5)))

    def candidate(position: int, relevance: float, likelihood: float, **more) -> dict:
        rated = {"relevance": relevance, "likelihood": likelihood}
        return {"position": position, "key": f"c{position}", "cosine": 0.9 - position / 10, **rated, **more}

    by = {"provenance": {"query": {"by": "generate", "prompt": "fret@1"}, "target": {"by": "source"}}}
    better = [candidate(0, 3, -1), candidate(1, 2, -2, is_target=True), candidate(2, 1, -3), candidate(3, 0, -4)]
    kept = [candidate(0, 1, -3), candidate(1, 3, -1, is_target=True), candidate(4, 0, -9)]
    lost = [
        candidate(0, 3, -1),
        {"position": None, "key": "l", "cosine": 0.2, "relevance": 0, "likelihood": -9, "is_target": True},
    ]
    records = (("better", better, "passage 1"), ("kept", kept, "passage 1"), ("lost", lost, "passage 2"))
    examples = [pair(key, key, target, meta={**by, "candidates": found}) for key, found, target in records]
    return write(tmp_path / "judged", *examples), corpus


def test_best_neighbours_become_positives_and_last_ones_hard_negatives(judged, tmp_path):
    assemble(judged[0], str(tmp_path / "out"), corpus=judged[1], selection=FUSED)
    found = made(tmp_path / "out")
    texts = {
        key: (one.target and one.target.parts[0].data, [n.parts[0].data for n in one.negatives]) for key, one in found.items()
    }
    assert texts == {"better": ("passage 0", ["passage 3"]), "kept": ("passage 1", ["passage 4"]), "lost": ("passage 0", [])}
    counts = Split(tmp_path / "out").manifest["about"]["counts"]
    assert counts["positives that are not the seed"] == 2
    assert counts["hard negatives"] == 2
    assert counts["examples"] == counts["records"] == 3
    meta = found["better"].meta or {}
    assert meta.keys() == {"provenance"}
    assert meta["provenance"]["query"] == {"by": "generate", "prompt": "fret@1"}
    assert meta["provenance"]["target"] == {
        "by": "mine",
        "corpus": judged[1],
        "checkpoint": None,
        "key": "c0",
        "cosine": 0.9,
        "relevance": 3,
        "likelihood": -1,
    }
    assert [one["key"] for one in meta["provenance"]["negatives"]] == ["c3"]
    assert (found["kept"].meta or {})["provenance"]["target"] == {"by": "source"}


def test_what_a_benchmark_holds_becomes_neither_positive_nor_negative(judged, tmp_path):
    test = write(tmp_path / "test", pair("1", "q", "passage 0"), pair("2", "r", "passage 3"))
    assemble(judged[0], str(tmp_path / "out"), corpus=judged[1], selection=FUSED, judged=[test])
    found = made(tmp_path / "out")["better"]
    assert (found.target, found.negatives) == (text_item("passage 1"), (text_item("passage 2"),))
    counts = Split(tmp_path / "out").manifest["about"]["counts"]
    assert counts["candidates left out: in a benchmark"] == 4


def test_what_is_known_to_be_relevant_is_no_hard_negative(tmp_path):
    """Targets of other records with the same query, and what `relevant` names."""
    corpus = write(tmp_path / "corpus", *(Example(f"c{n}", target=text_item(f"passage {n}")) for n in range(5)))
    near = [{"position": n, "key": f"c{n}", "cosine": 0.9 - n / 10} for n in range(5)]
    twice = [
        pair(
            f"{n}",
            "the query",
            f"passage {n}",
            meta={"candidates": [{**one, "is_target": one["position"] == n} for one in near]},
        )
        for n in (0, 4)
    ]
    graded = pair(
        "r", "another", "passage 0", relevant={"c4": 1.0, "c3": 0.0}, meta={"candidates": near, "seed": {"cosine": 0.9}}
    )
    every = Selection(num_negatives=9, max_share=None)
    assemble(write(tmp_path / "s", *twice, graded), str(tmp_path / "out"), corpus=corpus, selection=every)
    texts = {key: {str(item.parts[0].data)[-1] for item in one.negatives} for key, one in made(tmp_path / "out").items()}
    assert texts == {"0": set("123"), "4": set("123"), "r": set("123")}
    assert Split(tmp_path / "out").manifest["about"]["counts"]["candidates left out: known to be relevant"] == 3


def test_a_records_own_negatives_stay_behind_the_mined_ones(judged, tmp_path):
    candidates = (Split(judged[0]).read(0).meta or {})["candidates"]
    meta = {"candidates": candidates, "provenance": {"negatives": {"by": "generate", "prompt": "code_edit@1"}}}
    source = write(tmp_path / "s", pair("k", "q", "passage 1", negatives=(text_item("own"),), meta=meta))
    assemble(source, str(tmp_path / "out"), corpus=judged[1], selection=FUSED)
    found = made(tmp_path / "out")["k"]
    assert [item.parts[0].data for item in found.negatives] == ["passage 3", "own"]
    assert [one["by"] for one in (found.meta or {})["provenance"]["negatives"]] == ["mine", "generate"]


def test_passages_of_labelled_benchmarks_are_kept_apart_too(tmp_path):
    source = write(
        tmp_path / "s", pair("a", "one title", "an article"), pair("b", "two", "other"), pair("c", "title", "other", label="x")
    )
    judged = write(tmp_path / "test", pair("1", "title", "an article", label="sports"))
    assemble(source, str(tmp_path / "out"), judged=[judged])
    assert causes(tmp_path / "out") == {"a": "in a benchmark", "c": "in a benchmark"}


def test_a_negative_near_the_positive_is_left_out(tmp_path):
    texts = (LONG, LONG.replace("mayor", "king", 1), "something else")
    corpus = write(tmp_path / "corpus", *(Example(f"c{n}", target=text_item(text)) for n, text in enumerate(texts)))
    near = [{"position": n, "key": f"c{n}", "cosine": 0.9 - n / 2} for n in range(3)]
    source = write(tmp_path / "s", pair("q", "query", LONG, meta={"candidates": near, "seed": {"cosine": 0.95}}))
    assemble(source, str(tmp_path / "out"), corpus=corpus, selection=Selection(num_negatives=3, max_share=None))
    assert made(tmp_path / "out")["q"].negatives == (text_item("something else"),)
    assert Split(tmp_path / "out").manifest["about"]["counts"]["candidates left out: near the positive"] == 1


def test_a_negative_that_is_the_positive_in_other_clothes_is_left_out(tmp_path):
    corpus = write(
        tmp_path / "corpus", *(Example(f"c{n}", target=text_item(text)) for n, text in enumerate(("same", "same ", "other")))
    )
    near = [{"position": n, "key": f"c{n}", "cosine": 0.9 - n / 2} for n in range(3)]
    source = write(tmp_path / "s", pair("q", "query", "same", meta={"candidates": near, "seed": {"cosine": 0.95}}))
    assemble(source, str(tmp_path / "out"), corpus=corpus, selection=Selection(num_negatives=3, max_share=None))
    assert [item.parts[0].data for item in made(tmp_path / "out")["q"].negatives] == ["other"]
    assert Split(tmp_path / "out").manifest["about"]["counts"]["candidates left out: equal to the positive"] == 2


def test_labels_become_targets_and_other_classes_hard_negatives(tmp_path):
    labels = ["red_wine", "white_wine", "beer"]
    examples = [Example(f"{n}", text_item(f"text {n}"), label=labels[n % 3]) for n in range(12)]
    examples.append(Example("twice", text_item("text 0"), label="beer"))
    source = write(tmp_path / "source", *examples)
    assemble(source, str(tmp_path / "label"), classes="label")
    assemble(source, str(tmp_path / "text"), classes="text")
    found = made(tmp_path / "label")
    assert len(found) == 13  # equal texts of other classes are no duplicates
    for one in found.values():
        assert one.target == text_item(str(one.label).replace("_", " "))
        others = [text_item(label.replace("_", " ")) for label in labels if label != one.label]
        assert one.negatives[0] in others
    class_of: dict[str, set] = {}
    for one in examples:
        class_of.setdefault(str(one.query and one.query.parts[0].data), set()).add(one.label)
    drawn = made(tmp_path / "text")
    for one in drawn.values():
        assert one.target is not None
        assert one.label in class_of[str(one.target.parts[0].data)]
        assert one.target != one.query
        assert class_of[str(one.negatives[0].parts[0].data)] - {one.label}
        assert one.negatives[0] not in (one.query, one.target)
    assert len({str(one.target) for one in drawn.values()}) > 5
    with pytest.raises(ValueError, match="record 'a' has no label, which classes=label needs"):
        assemble(write(tmp_path / "none", pair("a", "b", "c")), str(tmp_path / "x"), classes="label")
    single = write(tmp_path / "one", *(Example(f"{n}", text_item(f"t{n}"), label="one") for n in range(2)))
    with pytest.raises(ValueError, match="all records have the label 'one'"):
        assemble(single, str(tmp_path / "y"), classes="text")


def test_any_array_makes_the_same_wherever_it_was_stopped(tmp_path):
    examples = [pair(f"{n}", f"query {n % 17}", f"target {n % 11}") for n in range(50)]
    source = write(tmp_path / "source", *examples)
    assemble(source, str(tmp_path / "one"), block_size=7)
    assert len(made(tmp_path / "one")) == 50
    many = str(tmp_path / "many")
    for index in (1, 0):
        assemble(source, many, block_size=7, array_index=index, array_size=2)
    assert not (tmp_path / "many" / "manifest.json").exists()
    damaged = tmp_path / "many" / "fingerprints" / "000003.npy"
    whole = damaged.read_bytes()
    np.save(damaged, np.zeros(3))
    with pytest.raises(ValueError, match=r"000003.npy is damaged; delete it, and it is made again"):
        assemble(source, many, block_size=7)
    damaged.write_bytes(whole)
    assemble(source, many, block_size=7, array_index=1, array_size=2)
    assemble(source, many, block_size=7)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_the_data_card_says_what_was_made_of_what(judged, tmp_path):
    assemble(judged[0], str(tmp_path / "one"), corpus=judged[1], selection=FUSED, licence="CC-BY-4.0: with a colon")
    assemble(str(tmp_path / "one"), str(tmp_path / "two"))
    card = json.loads((tmp_path / "two" / "card.json").read_text())
    Draft202012Validator(SCHEMA).validate(card)
    for broken in ({"num_examples": 0}, {"licence": ""}, {"made_by": []}, {"counts": {"a": -1}}, {"more": 1}):
        with pytest.raises(ValidationError):
            Draft202012Validator(SCHEMA).validate(card | broken)
    assert card["num_records"] == card["num_examples"] == 3
    assert card["licence"] == "CC-BY-4.0: with a colon"
    assert card["digest"] == Split(tmp_path / "two").digest
    assert [step["stage"] for step in card["made_by"]] == ["assemble", "assemble", "source"]
    assert card["made_by"][2]["source"] == "hand-made"
    assert card["counts"]["query by generate with fret@1"] == 3
    assert card["counts"]["negatives by mine"] == 2
    assert card["columns"]["target"]["modalities"] == {"text": 3}
    assert card["shown"][0] == {"query": "better", "target": "passage 0", "negative 1": "passage 3"}
    page = (tmp_path / "two" / "README.md").read_text()
    assert yaml.safe_load(page.split("---")[1]) == {"license": "CC-BY-4.0: with a colon"}
    assert "# 3 examples" in page
    assert "| negatives by mine | 2 |" in page
    (tmp_path / "one" / "manifest.json").unlink()
    (tmp_path / "two" / "manifest.json").unlink()
    assemble(judged[0], str(tmp_path / "other"), corpus=judged[1], selection=FUSED)
    assert json.loads((tmp_path / "other" / "card.json").read_text())["licence"] == "own"


def test_the_command_makes_what_training_reads(judged, tmp_path):
    chosen = "selection={rankings: [relevance, likelihood], positive: best, max_share: null}"
    said = run("conf=assemble", f"source={judged[0]}", f"corpus={judged[1]}", f"out={tmp_path / 'out'}", chosen)
    assert "3 examples of 3 records" in said
    assert f"data card in {tmp_path / 'out' / 'README.md'}" in said
    said = run("conf=assemble", f"source={judged[1]}", f"corpus={judged[1]}", f"out={tmp_path / 'x'}", ok=False)
    assert "error: example 'c0' has no candidates; find them with conf=mine" in said
