"""Promises of mteb's benchmarks: its scores are ours, every prefix comes of one pass, and what is no number is none."""

import dataclasses
import io
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from samples import picture_bytes, sound_bytes
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, v_measure_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.media.limits import DecodeLimits
from datamodules.sample import Item, Part, media_item, text_item
from lightning_modules import metrics, suite_rows, suites
from lightning_modules.encoder.embedder import Embedder, cut
from lightning_modules.ranking import Relevance, ranks
from lightning_modules.suite_encoder import items_of
from lightning_modules.suites import SuiteSpec, judge_suites
from lightning_modules.vectors import Chunk

ROOT = Path(__file__).parent.parent
PACK = ROOT.parent / "shared" / "data"
QUERY, DOCUMENT = "task: search result | query: {text}", "title: {title} | text: {text}"
SIMILAR, CLASS = "task: sentence similarity | query: {text}", "task: classification | query: {text}"
PROMPTS: dict[str, str | None] = {"query": QUERY, "document": DOCUMENT, "STS": SIMILAR, "Classification": CLASS}
WIDTHS = (4, 8, 16)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*beta:UserWarning:mteb", "ignore:.*superseded:UserWarning:mteb"),
    pytest.mark.filterwarnings("ignore:.*ill-defined:sklearn.exceptions.UndefinedMetricWarning"),
]


@pytest.fixture(scope="module")
def local() -> Any:
    """tests/mteb_tasks.py."""
    pytest.importorskip("mteb")
    import mteb_tasks

    return mteb_tasks


@pytest.fixture
def judged(tiny_encoder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Judged(tiny_encoder, processor, tmp_path)


class Judged:
    """Judges tasks with the tiny encoder; `passes` holds how many items went through it each time."""

    def __init__(self, encoder: Embedder, processor: Any, folder: Path) -> None:
        self.encoder, self.processor, self.folder, self.out = encoder, processor, folder, folder / "mteb" / "results"
        self.passes: list[int] = []
        encoder.register_forward_hook(lambda _, inputs, vectors: self.passes.append(len(vectors)))

    def __call__(self, *tasks: Any, **changes: Any) -> list[dict[str, Any]]:
        spec = SuiteSpec(list(tasks), changes.pop("prompts", PROMPTS), changes.pop("languages", None))
        options = {"model_name": "runs/tiny/encoder", "revision": "0123456789abcdef99", "widths": WIDTHS}
        options |= {"batch_size": 7, "device": "cpu"} | changes
        return judge_suites(spec, self.encoder, self.processor, self.folder, **options)


def sentences(number: int, seed: int = 0, *, words: int = 6) -> list[str]:
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(random.choice(letters, 5)) for _ in range(1 + n % words)) for n in range(number)]


def vectors_of(encoder: Any, processor: Any, items: list[Item], template: str | None = None) -> torch.Tensor:
    """Vectors of items one by one, as nothing of the suites makes them."""
    with torch.inference_mode():
        found = [processor([decode_item(with_prompt(item, template), DecodeLimits())]) for item in items]
        return torch.cat([encoder(one) for one in found])


def sounds(number: int) -> list[dict[str, Any]]:
    waves = [soundfile.read(io.BytesIO(sound_bytes(pitch=150.0 + 40 * n)))[0] for n in range(number)]
    return [{"array": wave.astype(np.float32), "sampling_rate": 16_000} for wave in waves]


def sound_item(sound: dict[str, Any]) -> Item:
    file = io.BytesIO()
    soundfile.write(file, sound["array"], sound["sampling_rate"], format="WAV", subtype="FLOAT")
    return media_item("audio", file.getvalue(), "wav")


def our_probe(width: int) -> Any:
    """The classifier of `metrics.classification`."""
    return make_pipeline(FunctionTransformer(lambda x: np.asarray(x) * width**0.5), LogisticRegression(max_iter=1000))


def our_accuracy(train: torch.Tensor, classes: list[int], test: torch.Tensor, labels: list[int], width: int) -> float:
    given = {
        "train_ND": cut(train, width),
        "train_class_N": torch.tensor(classes),
        "label_CD": torch.eye(max(classes) + 1, width),
    }
    return metrics.classification(cut(test, width), torch.tensor(labels), **given)["accuracy_probe"].mean()


def our_retrieval(query_QD: torch.Tensor, document_CD: torch.Tensor, relevant_QC: Any) -> dict[str, float]:
    """The measures of `conf=evaluate`, from its own ranks."""
    query, candidate = np.nonzero(np.asarray(relevant_QC))
    relevance = Relevance(query, candidate, np.ones(len(query)))
    chunks = [Chunk(np.arange(len(document_CD)), document_CD.numpy())]
    rank_R = ranks(query_QD, chunks, relevance, width=query_QD.shape[1], depth=metrics.DEPTH)
    found = metrics.retrieval(rank_R, query, relevance.gain, len(query_QD))
    return {name: values.mean() for name, values in found.items()}


def simple_task(local: Any, name: str = "LocalSTS", **more: Any) -> Any:
    texts = sentences(12)
    pairs = [
        {"sentence1": a, "sentence2": b, "score": float(n % 5)} for n, (a, b) in enumerate(zip(texts, texts[::-1], strict=True))
    ]
    return local.sts(name, pairs, **more)


def value_of(rows: list[dict[str, Any]], benchmark: str, prefix: int = 16) -> float:
    (row,) = (row for row in rows if row["benchmark"] == benchmark and row["prefix"] == prefix)
    assert row["value"] is not None, row["note"]
    return row["value"]


def scores_of(out: Path, task: str, prefix: int) -> dict[str, Any]:
    """What mteb's file says of the only subset."""
    (file,) = out.glob(f"*-{prefix}d/*/{task}.json")
    return json.loads(file.read_text())["scores"]["test"][0]


def test_retrieval_is_scored_as_we_score_it(local, judged, tiny_encoder, processor):
    bodies, titles, asked = sentences(40), sentences(40, 1, words=2), sentences(15, 2)
    corpus = [
        {"id": f"d{n}", "title": title if n % 3 else "", "text": body}
        for n, (title, body) in enumerate(zip(titles, bodies, strict=True))
    ]
    relevant = np.random.default_rng(3).random((15, 40)) < 0.08
    relevant[:, 0] |= ~relevant.any(1)
    qrels = {f"q{q}": {f"d{d}": 1 for d in np.flatnonzero(row)} for q, row in enumerate(relevant)}
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(asked)]
    rows = judged(local.retrieval("LocalRetrieval", corpus, queries, qrels))
    assert judged.passes == [7, 7, 1, 7, 7, 7, 7, 7, 5]
    documents = [text_item(body, title=title if n % 3 else None) for n, (title, body) in enumerate(zip(titles, bodies))]  # noqa: B905
    query_QD = vectors_of(tiny_encoder, processor, [text_item(text) for text in asked], QUERY)
    document_CD = vectors_of(tiny_encoder, processor, documents, DOCUMENT)
    for width in WIDTHS:
        ours = our_retrieval(cut(query_QD, width), cut(document_CD, width), relevant)
        theirs = scores_of(judged.out, "LocalRetrieval", width)
        assert theirs["exact_ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-6)
        assert theirs["exact_hit_rate_at_5"] == pytest.approx(ours["recall@5"], abs=1e-6)
        assert theirs["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-6)
        assert value_of(rows, "mteb.LocalRetrieval/text-text", width) == theirs["ndcg_at_10"]
    assert {row["metric"] for row in rows} == {"ndcg_at_10"}


def test_grades_count_as_in_pytrec_eval(local, judged, tiny_encoder, processor):
    import pytrec_eval

    bodies, asked = sentences(20, 4), sentences(5, 5)
    grades = np.random.default_rng(6).integers(0, 4, (5, 20))
    qrels = {f"q{q}": {f"d{d}": int(grade) for d, grade in enumerate(row)} for q, row in enumerate(grades)}
    corpus = [{"id": f"d{n}", "text": body} for n, body in enumerate(bodies)]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(asked)]
    judged(local.retrieval("Graded", corpus, queries, qrels), prompts={}, widths=[8])
    query_QD, document_CD = (vectors_of(tiny_encoder, processor, [text_item(t) for t in texts]) for texts in (asked, bodies))
    score_QC = (cut(query_QD, 8) @ cut(document_CD, 8).T).double()
    run = {f"q{q}": {f"d{d}": float(score) for d, score in enumerate(row)} for q, row in enumerate(score_QC)}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    expected = np.mean([scores["ndcg_cut_10"] for scores in found.values()])
    assert scores_of(judged.out, "Graded", 8)["exact_ndcg_at_10"] == pytest.approx(expected, abs=1e-6)


def test_similarity_is_scored_as_we_score_it(local, judged, tiny_encoder, processor):
    left, right, gold = sentences(30, 7), sentences(30, 8), np.random.default_rng(9).random(30) * 5
    pairs = [{"sentence1": a, "sentence2": b, "score": float(c)} for a, b, c in zip(left, right, gold, strict=True)]
    rows = judged(local.sts("LocalSTS", pairs))
    left_D, right_D = (vectors_of(tiny_encoder, processor, [text_item(t) for t in side], SIMILAR) for side in (left, right))
    for width in WIDTHS:
        cosine = (cut(left_D, width) * cut(right_D, width)).sum(-1)
        ours = metrics.spearman(cosine.numpy(), gold)
        assert value_of(rows, "mteb.LocalSTS/text-text", width) == pytest.approx(ours, abs=1e-6)


def test_classification_is_scored_as_we_score_it(local, judged, tiny_encoder, processor):
    texts, classes = sentences(90, 10), [n * 7 % 3 for n in range(90)]
    records = [{"text": text, "label": label} for text, label in zip(texts, classes, strict=True)]
    for width in WIDTHS:
        probe = {"evaluator_model": our_probe(width), "n_experiments": 1, "samples_per_label": 99}
        rows = judged(local.classification(f"Classes{width}", records[:60], records[60:], **probe), widths=[width])
        found = vectors_of(tiny_encoder, processor, [text_item(text) for text in texts], CLASS)
        ours = our_accuracy(found[:60], classes[:60], found[60:], classes[60:], width)
        assert value_of(rows, f"mteb.Classes{width}/text-text", width) == pytest.approx(ours, abs=1e-6)


def test_clustering_is_scored_as_scikit_learn_scores_it_and_each_prefix_on_the_same_sample(
    local, judged, tiny_encoder, processor
):
    texts, labels = sentences(50, 11), [n % 4 for n in range(50)]
    records = [{"sentences": text, "labels": label} for text, label in zip(texts, labels, strict=True)]
    size = {"max_document_to_embed": 30, "max_documents_per_cluster": 25, "n_clusters": 3}
    rows = judged(local.clustering("LocalClusters", records, **size))
    assert sum(judged.passes) == 30  # of three prefixes
    found = vectors_of(tiny_encoder, processor, [text_item(text) for text in texts])
    for width in WIDTHS:
        draws, expected = random.Random(42), []
        sample = draws.sample(range(50), k=30)
        points, classes = cut(found, width)[sample].numpy(), np.array(labels)[sample]
        model = MiniBatchKMeans(4, batch_size=512, init="k-means++", n_init=1, random_state=42)  # pyright: ignore[reportArgumentType]
        for _ in range(3):
            some = draws.choices(range(30), k=25)
            expected.append(v_measure_score(classes[some], model.fit_predict(points[some])))
        value = value_of(rows, "mteb.LocalClusters/text-text", width)
        assert value == pytest.approx(np.mean(expected), abs=1e-6)


def test_bitext_is_scored_as_we_score_it_and_has_rows_by_language(local, judged, tiny_encoder, processor):
    texts = {subset: (sentences(12, seed), sentences(12, seed + 1)) for subset, seed in (("de-en", 20), ("fr-en", 30))}
    pairs = {subset: [{"sentence1": a, "sentence2": b} for a, b in zip(*sides, strict=True)] for subset, sides in texts.items()}
    languages = {"de-en": ["deu-Latn", "eng-Latn"], "fr-en": ["fra-Latn", "eng-Latn"]}
    rows = judged(local.bitext("LocalBitext", pairs, languages=languages))
    for width in WIDTHS:
        values = []
        for subset, sides in texts.items():
            one, other = (cut(vectors_of(tiny_encoder, processor, [text_item(t) for t in side]), width) for side in sides)
            predicted = (one @ other.T).argmax(1).numpy()
            values.append(f1_score(range(12), predicted, average="weighted"))
            (file,) = judged.out.glob(f"*-{width}d/*/LocalBitext.json")
            (written,) = (s for s in json.loads(file.read_text())["scores"]["test"] if s["hf_subset"] == subset)
            recall = our_retrieval(one, other, np.eye(12))["recall@1"]
            assert written["accuracy"] == pytest.approx(recall, abs=1e-6)
            name = f"mteb.LocalBitext_{subset.replace('-', '_')}/text-text"
            assert value_of(rows, name, width) == pytest.approx(values[-1], abs=1e-6)
        assert value_of(rows, "mteb.LocalBitext/text-text", width) == pytest.approx(np.mean(values), abs=2e-6)
    assert rows[0]["benchmark"] == "mteb.LocalBitext/text-text"
    grouped = {(row["group"], row["language"]) for row in rows if "group" in row}
    assert grouped == {("mteb.LocalBitext", "deu-eng"), ("mteb.LocalBitext", "fra-eng")}


@pytest.mark.parametrize("category", ["t2i", "i2t"])
def test_search_between_texts_and_pictures_is_scored_as_we_score_it(local, judged, tiny_encoder, processor, category):
    texts, data = sentences(14, 40), [picture_bytes(seed=n) for n in range(14)]
    captions = [{"id": f"t{n}", "text": text} for n, text in enumerate(texts)]
    pictures = [{"id": f"i{n}", "image": {"bytes": one, "path": None}} for n, one in enumerate(data)]
    asked, corpus = (captions, pictures) if category == "t2i" else (pictures, captions)
    qrels = {query["id"]: {document["id"]: 1} for query, document in zip(asked, corpus, strict=True)}
    rows = judged(local.retrieval("Pictures", corpus, asked, qrels, type_="Any2AnyRetrieval", category=category))
    text = vectors_of(tiny_encoder, processor, [text_item(t) for t in texts], QUERY if category == "t2i" else DOCUMENT)
    picture = vectors_of(tiny_encoder, processor, [media_item("image", one, "png") for one in data])
    one, other = (text, picture) if category == "t2i" else (picture, text)
    for width in WIDTHS:
        ours = our_retrieval(cut(one, width), cut(other, width), np.eye(14))
        theirs = scores_of(judged.out, "Pictures", width)
        assert theirs["exact_ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-6)
        assert theirs["exact_hit_rate_at_5"] == pytest.approx(ours["recall@5"], abs=1e-6)
    assert {row["benchmark"] for row in rows} == {f"mteb.Pictures/{'text-image' if category == 't2i' else 'image-text'}"}
    assert sum(judged.passes) - 28 == 28


def test_sounds_are_classified_as_we_classify_them(local, judged, tiny_encoder, processor):
    order = np.random.default_rng(1).permutation(30)
    heard, classes = [sounds(30)[n] for n in order], [int(n) // 10 for n in order]
    records = [{"audio": sound, "label": label} for sound, label in zip(heard, classes, strict=True)]
    more = {"type_": "AudioClassification", "category": "a2c", "input_column_name": "audio", "n_experiments": 1}
    more |= {"evaluator_model": our_probe(16), "samples_per_label": 99}
    rows = judged(local.classification("Sounds", records[:18], records[18:], **more), widths=[16])
    found = vectors_of(tiny_encoder, processor, [sound_item(sound) for sound in heard])
    ours = our_accuracy(found[:18], classes[:18], found[18:], classes[18:], 16)
    assert value_of(rows, "mteb.Sounds/audio-text") == pytest.approx(ours, abs=1e-6)


def test_an_item_of_text_and_picture_is_interleaved_and_a_page_is_a_page(tiny_encoder):
    picture = Image.open(io.BytesIO(picture_bytes()))
    batch = {"id": ["a"], "text": ["what is this?"], "image": [picture]}
    (item,) = items_of(batch, template=QUERY, picture="image")
    assert [part.kind for part in item.parts] == ["text", "image"]
    assert with_prompt(item, QUERY) == item
    (page,) = items_of({"image": [picture.convert("CMYK")]}, template=None, picture="page")
    assert decode_item(page, DecodeLimits()).parts[0].content[0].shape == (30, 40, 3)
    document = {"text": ["head body"], "body": ["body"], "title": ["head"]}
    (titled,), (whole,) = (list(items_of(document, template=t, picture="image")) for t in (DOCUMENT, None))
    assert (titled, whole) == (text_item("body", title="head"), text_item("head body"))
    with pytest.raises(ValueError, match="mteb gives the columns label; an item needs one of text, image"):
        list(items_of({"label": [1]}, template=None, picture="image"))
    with pytest.raises(ValueError, match="gives an image as bytes"):
        list(items_of({"image": [b"x"]}, template=None, picture="image"))


def test_media_arrive_without_loss(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 3, 32, 48), dtype=np.uint8)
    pixels = Image.open(io.BytesIO(picture_bytes()))
    stereo = {"array": np.stack([np.full(1600, 0.25), np.full(1600, -0.5)]), "sampling_rate": 16_000}
    (item,) = items_of({"image": [pixels], "audio": [stereo], "video": [frames]}, template=None, picture="image")
    picture, film, sound = (part.content for part in decode_item(item, DecodeLimits()).parts)
    np.testing.assert_array_equal(picture, np.asarray(pixels))
    np.testing.assert_array_equal(film.frames, frames.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(sound, np.full(1600, -0.125, np.float32))
    path = tmp_path / "film.mp4"
    path.write_bytes(film_bytes(frames))
    for given in (path, str(path), path.read_bytes(), {"bytes": None, "path": str(path)}):
        (other,) = items_of({"video": [given]}, template=None, picture="image")
        assert other.parts == (item.parts[1],)
    with pytest.raises(ValueError, match=r"frames must be uint8 of \(T, 3, H, W\)"):
        list(items_of({"video": [frames[0]]}, template=None, picture="image"))


def test_films_and_sounds_in_their_files_are_judged(local, judged, tiny_encoder, processor):
    frames = np.random.default_rng(0).integers(0, 255, (6, 2, 3, 32, 48), dtype=np.uint8)
    data = [film_bytes(one) for one in frames], [sound_bytes("FLAC", pitch=200.0 + 90 * n) for n in range(6)]
    pairs = [{"video": {"bytes": a, "path": None}, "audio": {"bytes": b, "path": None}} for a, b in zip(*data, strict=True)]
    corpus = [{"id": f"v{n}", **pair} for n, pair in enumerate(pairs)]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(sentences(6))]
    qrels = {f"q{n}": {f"v{n}": 1} for n in range(6)}
    rows = judged(local.retrieval("Films", corpus, queries, qrels, type_="Any2AnyRetrieval", category="t2va"))
    assert [row["benchmark"] for row in rows] == ["mteb.Films/text-mixed"] * 3
    items = [Item((Part("video", a, "mp4"), Part("audio", b, "flac"))) for a, b in zip(*data, strict=True)]
    query_QD = vectors_of(tiny_encoder, processor, [text_item(text) for text in sentences(6)], QUERY)
    ours = our_retrieval(cut(query_QD, 8), cut(vectors_of(tiny_encoder, processor, items), 8), np.eye(6))
    theirs = scores_of(judged.out, "Films", 8)
    assert theirs["exact_ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-6)


def film_bytes(frames: np.ndarray) -> bytes:
    (item,) = items_of({"video": [frames]}, template=None, picture="image")
    assert isinstance(item.parts[0].data, bytes)
    return item.parts[0].data


def test_a_row_is_of_the_agreed_shape_and_the_files_are_mtebs(local, judged, tmp_path):
    import mteb

    rows = judged(simple_task(local))
    assert [row["prefix"] for row in rows] == [4, 8, 16]
    for row in rows:
        assert -1 <= row["value"] <= 1
        assert row == {
            "benchmark": "mteb.LocalSTS/text-text",
            "metric": "cosine_spearman",
            "dtype": "float32",
            "prompts": True,
            "bytes": 4 * row["prefix"],
            **{name: row[name] for name in ("prefix", "value")},
            **dict.fromkeys(("low", "high", "chance", "num_queries", "num_candidates")),
        }
    (folder,) = judged.out.glob("polyphony__runs_tiny_encoder-8d/0123456789abcdef-*")
    meta = json.loads((folder / "model_meta.json").read_text())
    assert (meta["name"], meta["embed_dim"]) == ("polyphony/runs_tiny_encoder-8d", 8)
    cache = mteb.ResultCache(tmp_path / "mteb")
    result = cache.load_task_result("LocalSTS", meta["name"], meta["revision"])
    assert result is not None
    assert result.get_score() == rows[1]["value"]


def test_a_second_run_runs_no_encoder_and_says_the_same(local, judged):
    first = judged(simple_task(local))
    assert judged.passes
    judged.passes.clear()
    assert judged(simple_task(local)) == first
    assert judged.passes == []
    wider = judged(simple_task(local), widths=[2, 4, 8])
    assert wider[1:] == first[:2]
    assert sum(judged.passes) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": {**PROMPTS, "STS": "other: {text}"}},
        {"prompts": {}},
        {"revision": "fedcba9876543210"},
        {"task": {"revision": "2"}},
        {"processor": {"max_text_tokens": 5}},
    ],
)
def test_results_of_other_prompts_weights_inputs_or_data_are_not_taken(local, judged, processor, monkeypatch, change):
    first = judged(simple_task(local))
    judged.passes.clear()
    if "processor" in change:
        monkeypatch.setattr(processor, "config", dataclasses.replace(processor.config, **change["processor"]))
    others = {name: value for name, value in change.items() if name in ("prompts", "revision")}
    again = judged(simple_task(local, **change.get("task", {})), **others)
    assert judged.passes
    assert all(row["prompts"] is (change.get("prompts") != {}) for row in again)
    judged.passes.clear()
    if "task" not in change:
        monkeypatch.undo()
        assert judged(simple_task(local)) == first
        assert judged.passes == []


def test_a_kind_of_media_that_the_encoder_lacks_is_no_number_and_nothing_is_loaded(local, tiny_config, processor, tmp_path):
    backbone = dataclasses.replace(tiny_config.backbone, towers={}, routes={})
    encoder = Embedder(dataclasses.replace(tiny_config, backbone=backbone))
    never = AssertionError("it was loaded")
    picture = local.made(
        type(simple_task(local)).__mro__[1], "Seen", "VisualSTS(eng)", "cosine_spearman", never, category="i2i"
    )
    film = local.made(type(simple_task(local)).__mro__[1], "Film", "STS", "cosine_spearman", never, category="va2va")
    given = {"model_name": "m", "revision": "r", "widths": [8, 16], "batch_size": 4, "device": "cpu"}
    rows = judge_suites(SuiteSpec([picture, film, simple_task(local)]), encoder, processor, tmp_path, **given)
    notes = {row["benchmark"]: (row["value"], row["note"]) for row in rows if "note" in row}
    assert notes == {
        "mteb.Seen/image-image": (None, "not supported: the encoder takes no image"),
        "mteb.Film/mixed-mixed": (None, "not supported: the encoder takes no audio and no video"),
    }
    assert len(rows) == 6
    assert all(row["value"] is not None for row in rows[4:])


def test_missing_data_and_other_errors_are_said_and_the_other_tasks_go_on(local, judged):
    import mteb
    from mteb.abstasks import AbsTaskSTS

    gone = local.made(AbsTaskSTS, "Gone", "STS", "cosine_spearman", ConnectionError("no route to\n host"))
    broken = local.clustering("Broken", [{"sentences": "a", "other": 1}])
    suite = mteb.Benchmark(name="Mine (v1)", tasks=[gone, broken, simple_task(local)])
    rows = judged(suite)
    found = {row["benchmark"]: row for row in rows if row["prefix"] == 4}
    assert found["mteb.Gone/text-text"]["value"] is None
    assert found["mteb.Gone/text-text"]["note"] == (
        "no data: mteb wants them from local/Gone (revision 1) on the hub: ConnectionError: no route to host"
    )
    assert found["mteb.Broken/text-text"]["value"] is None
    assert found["mteb.Broken/text-text"]["note"].startswith("error: ValueError: Missing required columns")
    assert found["mteb.LocalSTS/text-text"]["value"] is not None
    assert found["mteb.Mine_v1/text-text"]["value"] is None
    assert found["mteb.Mine_v1/text-text"]["note"] == "no number for 2 of 3 tasks: Gone, Broken"
    assert len(rows) == 3 * 3 + 2 * 3


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_what_is_not_finite_is_no_number(local, judged, tiny_encoder):
    constant = local.sts("Constant", [{"sentence1": t, "sentence2": t[::-1], "score": 1.0} for t in sentences(5)])
    for row in judged(constant):
        assert (row["value"], row["note"]) == (None, "mteb's score is nan")
    for row in judged(constant):  # from its file
        assert (row["value"], row["note"]) == (None, "mteb's score is nan")
    with torch.no_grad():
        next(iter(tiny_encoder.projection.parameters()))[0, 0] = torch.nan
    corpus = [{"id": f"d{n}", "text": text} for n, text in enumerate(sentences(5))]
    for row in judged(local.retrieval("Search", corpus, corpus, {"d1": {"d1": 1}}), revision="other"):
        assert row["value"] is None
        assert row["note"].startswith("error: ValueError: the encoder makes vectors that are not finite")


def test_means_are_those_of_mtebs_leaderboard(local, judged, tmp_path):
    import mteb
    from mteb.benchmarks._benchmark_metrics import _compute_mean_task, _compute_mean_task_type

    pairs = {"default": [{"sentence1": a, "sentence2": b} for a, b in zip(sentences(9), sentences(9, 1), strict=True)]}
    tasks = [simple_task(local, "One"), simple_task(local, "Two"), local.bitext("Three", pairs)]
    suite = mteb.Benchmark(name="Mine (v1)", tasks=tasks)
    rows = judged(suite)
    assert [row["metric"] for row in rows if row["benchmark"] == "mteb.Mine_v1/text-text"][:2] == [
        "mean_task",
        "mean_task_type",
    ]
    for width in WIDTHS:
        results = []
        for task in tasks:
            (file,) = judged.out.glob(f"*-{width}d/*/{task.metadata.name}.json")
            results.append(mteb.TaskResult.from_disk(file))
            results[-1].__dict__["task"] = task
        means = {row["metric"]: row["value"] for row in rows if row["prefix"] == width and row["metric"].startswith("mean")}
        assert means["mean_task"] == pytest.approx(_compute_mean_task(results), abs=1e-12)
        assert means["mean_task_type"] == pytest.approx(_compute_mean_task_type(results), abs=1e-12)
        assert means["mean_task"] != means["mean_task_type"]


def test_a_task_that_is_the_mean_of_others_is_judged(local, judged):
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    parts = [
        simple_task(local, "PartOne"),
        local.sts("PartTwo", [{"sentence1": a, "sentence2": a[2:] + "x", "score": float(len(a))} for a in sentences(9, 5)]),
    ]
    metadata = AggregateTaskMetadata(
        name="Whole", description="x", tasks=parts, main_score="cosine_spearman", type="STS", eval_splits=["test"]
    )
    task = type("Whole", (AbsTaskAggregate,), {"metadata": metadata})()
    rows = judged(task, parts[0])
    assert sum(judged.passes) == 12 + 18
    for width in WIDTHS:
        values = [scores_of(judged.out, part.metadata.name, width)["main_score"] for part in parts]
        assert value_of(rows, "mteb.Whole/text-text", width) == pytest.approx(np.mean(values), abs=1e-6)
    judged.passes.clear()
    assert judged(task, parts[0]) == rows
    assert judged.passes == []


def test_shuffled_labels_give_chance(local, judged):
    shuffle = np.random.default_rng(0).permutation
    texts = [f"{('red', 'green')[n % 2]} {word}" for n, word in enumerate(sentences(240, 50))]
    labels = shuffle([n % 2 for n in range(240)]).tolist()
    records = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    rows = judged(local.classification("Shuffled", records[:120], records[120:], n_experiments=2), widths=[16])
    assert rows[0]["value"] == pytest.approx(0.5, abs=3 * (0.25 / 120) ** 0.5)  # three standard errors of 120 coin flips
    corpus = [{"id": f"d{n}", "text": text} for n, text in enumerate(texts)]
    qrels = {f"d{n}": {f"d{other}": 1} for n, other in enumerate(shuffle(240).tolist())}
    judged(local.retrieval("ShuffledSearch", corpus, corpus, qrels), widths=[16], prompts={})
    found = scores_of(judged.out, "ShuffledSearch", 16)["exact_hit_rate_at_5"]
    assert found == pytest.approx(5 / 240, abs=3 * (5 / 240 / 240) ** 0.5)


def test_what_is_limited_to_some_languages_is_another_benchmark(local, judged):
    pairs = [{"sentence1": a, "sentence2": b} for a, b in zip(sentences(9), sentences(9, 1), strict=True)]
    subsets = {"de": ["deu-Latn"], "fr": ["fra-Latn"], "fr-ca": ["fra-Latn"]}
    task = local.bitext("Limited", dict.fromkeys(subsets, pairs), languages=subsets)
    whole = judged(task)
    labels = {row["benchmark"]: row.get("language") for row in whole}
    assert labels == {
        "mteb.Limited/text-text": None,
        "mteb.Limited_de/text-text": "deu",
        "mteb.Limited_fr/text-text": "fr",
        "mteb.Limited_fr_ca/text-text": "fr-ca",
    }
    judged.passes.clear()
    rows = judged(task, languages=["fra"])
    assert {row["benchmark"] for row in rows if "group" not in row} == {"mteb.Limited_fr_fr_ca/text-text"}
    assert judged.passes == []
    assert {row["benchmark"] for row in judged(task, languages=["deu"])} == {"mteb.Limited_de/text-text"}
    assert task.hf_subsets == ["de", "fr", "fr-ca"]
    with pytest.raises(ValueError, match=r"nothing of .* is in swa"):
        judged(task, languages=["swa"])


def test_many_subsets_have_rows_by_language(local, judged, monkeypatch):
    monkeypatch.setattr(suite_rows, "MAX_SUBSET_ROWS", 2)
    languages = {f"{a[:2]}-{b[:2]}": [f"{a}-Latn", f"{b}-Latn"] for a, b in (("deu", "eng"), ("fra", "eng"), ("fra", "deu"))}
    pairs = {
        subset: [{"sentence1": a, "sentence2": b} for a, b in zip(sentences(7, n), sentences(7, n + 9), strict=True)]
        for n, subset in enumerate(languages)
    }
    rows = judged(local.bitext("Many", pairs, languages=languages), widths=[16])
    (file,) = judged.out.glob("*-16d/*/Many.json")
    scores = {entry["hf_subset"]: entry["main_score"] for entry in json.loads(file.read_text())["scores"]["test"]}
    for code, subsets in {"deu": ["de-en", "fr-de"], "eng": ["de-en", "fr-en"], "fra": ["fr-en", "fr-de"]}.items():
        assert value_of(rows, f"mteb.Many_{code}/text-text") == pytest.approx(np.mean([scores[s] for s in subsets]))
    assert len(rows) == 4


def test_every_benchmark_and_prompt_of_the_configuration_is_known_to_mteb(local):
    text = (ROOT / "conf" / "benchmarks" / "mteb.yaml").read_text()
    named = re.findall(r"^#   ([\w()., -]+?)  +(\d+) tasks", text, flags=re.MULTILINE)
    assert len(named) == 10
    for name, number in named:
        assert len(suites._suite(name, None).tasks) == int(number)
    documents = suites._suite("ViDoRe(v2)", None).tasks
    assert {(suite_rows.sides_of(task), *suites._kinds_of(task)) for task in documents} == {("text-page", "page")}
    spec = SuiteSpec(**yaml.safe_load(text)["suites"])
    suites._check_prompts(spec.prompts, [])
    every = {suite_rows.name_of(task) for name, _ in named for task in suites._suite(name, None).tasks}
    assert all(re.fullmatch(r"mteb\.[\w.]+", name) for name in every)
    assert len(every) == len(
        {task.metadata.name + str(task.hf_subsets) for name, _ in named for task in suites._suite(name, None).tasks}
    )


@pytest.mark.parametrize(
    ("tasks", "prompts", "message"),
    [
        (["MTEB(eng, v22)"], {}, r"no benchmark and no task called 'MTEB\(eng, v22\)'; benchmarks near it: MTEB\(eng, v2\);"),
        (["STS12"], {"STSS": None, "STS-query": None}, "suites.prompts has STSS, no task and no type of task"),
    ],
)
def test_a_name_that_mteb_does_not_know_is_refused(local, judged, tasks, prompts, message):
    with pytest.raises(ValueError, match=message):
        judged(*tasks, prompts=prompts)


def test_a_specification_that_cannot_be_meant_is_refused(judged, monkeypatch):
    with pytest.raises(ValueError, match=r"suites\.tasks is empty"):
        SuiteSpec([])
    with pytest.raises(ValueError, match=r"suites.prompts.STS is 'x'; it must hold \{text\} exactly once"):
        SuiteSpec(["STS12"], {"STS": "x"})
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match=r"suites need mteb .*pip install -e '.\[eval\]'"):
        judged("STS12")


def test_where_the_hub_does_not_answer_a_task_is_left_out_at_once(local, judged, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    began = time.perf_counter()
    rows = judged("STS12", simple_task(local))
    assert time.perf_counter() - began < 10
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().out
    assert not constants.HF_HUB_OFFLINE
    assert rows[0]["note"].startswith("no data: mteb wants them from mteb/sts12-sts (revision ")
    assert rows[3]["value"] is not None


def lines(path: str, number: int) -> list[dict[str, Any]]:
    """Records of the data pack, taken at equal distances."""
    every = [json.loads(line) for line in (PACK / path).read_text().splitlines()]
    return every[:: max(1, len(every) // number)][:number]


@pytest.mark.skipif(not PACK.is_dir(), reason="needs ../shared/data")
def test_on_real_data_mtebs_scores_are_ours(local, judged, tiny_encoder, processor):
    """Cranfield, STS-B, tweet emotion, AG News, Tatoeba, fashion products, spoken digits, sprites."""
    texts = lambda *given: vectors_of(tiny_encoder, processor, [text_item(text) for text in given[:-1]], given[-1])  # noqa: E731
    search, expected, tasks = {}, {}, []

    judgements = [line.split() for line in (PACK / "text/cranfield/qrels.test.tsv").read_text().splitlines()[1:]]
    corpus = {line["id"]: line["target"] for line in lines("text/cranfield/corpus.jsonl", 10**6)}
    asked = {line["id"]: line["query"]["text"] for line in lines("text/cranfield/queries.test.jsonl", 5)}
    qrels = {query: {document: 1 for other, document, _ in judgements if other == query} for query in asked}
    kept = sorted({document for documents in qrels.values() for document in documents} & corpus.keys())
    records = [{"id": key, "title": corpus[key]["title"], "text": corpus[key]["text"]} for key in kept]
    tasks.append(local.retrieval("Cranfield", records, [{"id": q, "text": t} for q, t in asked.items()], qrels))
    documents = [text_item(corpus[key]["text"], title=corpus[key]["title"] or None) for key in kept]
    relevant = torch.tensor([[key in qrels[query] for key in kept] for query in asked])
    search["Cranfield"] = texts(*asked.values(), QUERY), vectors_of(tiny_encoder, processor, documents, DOCUMENT), relevant

    fashion = lines("image/fashion_products/test.jsonl", 20)
    data = [(PACK / "image/fashion_products" / line["target"]["image"]).read_bytes() for line in fashion]
    captions = [{"id": f"t{n}", "text": line["query"]["text"]} for n, line in enumerate(fashion)]
    pictures = [{"id": f"i{n}", "image": {"bytes": one, "path": None}} for n, one in enumerate(data)]
    found = vectors_of(tiny_encoder, processor, [media_item("image", one, "jpg") for one in data])
    same = torch.tensor([[a["text"] == b["text"] for b in captions] for a in captions])
    for name, sides, category in (("Shown", (captions, pictures), "t2i"), ("Told", (pictures, captions), "i2t")):
        grades = {a["id"]: {b["id"]: 1 for n, b in enumerate(sides[1]) if same[m, n]} for m, a in enumerate(sides[0])}
        tasks.append(local.retrieval(name, sides[1], sides[0], grades, type_="Any2AnyRetrieval", category=category))
    told = [line["text"] for line in captions]
    search |= {"Shown": (texts(*told, QUERY), found, same), "Told": (found, texts(*told, DOCUMENT), same)}

    sprites = lines("video/sprites/test.jsonl", 8)
    films = [(PACK / "video/sprites" / line["target"]["video"]).read_bytes() for line in sprites]
    asked = [{"id": f"q{n}", "text": line["query"]["text"]} for n, line in enumerate(sprites)]
    stored = [{"id": f"v{n}", "video": {"bytes": one, "path": None}} for n, one in enumerate(films)]
    grades = {f"q{n}": {f"v{n}": 1} for n in range(8)}
    tasks.append(local.retrieval("Sprites", stored, asked, grades, type_="Any2AnyRetrieval", category="t2v"))
    found = vectors_of(tiny_encoder, processor, [media_item("video", one, "mp4") for one in films])
    search["Sprites"] = texts(*(line["text"] for line in asked), QUERY), found, torch.eye(8, dtype=torch.bool)

    pairs = [(line["a"]["text"], line["b"]["text"], line["score"]) for line in lines("text/stsb/en.test.jsonl", 40)]
    tasks.append(local.sts("STSB", [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in pairs]))
    left, right, gold = zip(*pairs, strict=True)
    cosine = (cut(texts(*left, SIMILAR), 16) * cut(texts(*right, SIMILAR), 16)).sum(-1)
    expected["STSB"] = metrics.spearman(cosine.numpy(), np.array(gold, float))

    probe = {"evaluator_model": our_probe(16), "n_experiments": 1, "samples_per_label": 999}
    split = [lines(f"text/tweet_emotion/{name}.jsonl", 30) for name in ("train", "test")]
    records = [[{"text": line["input"]["text"], "label": line["label_id"]} for line in part] for part in split]
    tasks.append(local.classification("Emotions", *records, **probe))
    (train, classes), (test, labels) = (
        (texts(*(line["text"] for line in part), CLASS), [line["label"] for line in part]) for part in records
    )
    expected["Emotions"] = our_accuracy(train, classes, test, labels, 16)

    split = [lines(f"audio/fsdd/{name}.jsonl", 30) for name in ("train", "test")]
    digits = [
        [((PACK / "audio/fsdd" / line["input"]["audio"]).read_bytes(), line["label_id"]) for line in part] for part in split
    ]
    records = [[{"audio": {"bytes": data, "path": None}, "label": label} for data, label in part] for part in digits]
    more = {"type_": "AudioClassification", "category": "a2c", "input_column_name": "audio"}
    tasks.append(local.classification("Digits", *records, **probe, **more))
    (train, classes), (test, labels) = (
        (
            vectors_of(tiny_encoder, processor, [media_item("audio", data, "flac") for data, _ in part]),
            [label for _, label in part],
        )
        for part in digits
    )
    expected["Digits"] = our_accuracy(train, classes, test, labels, 16)

    news = lines("text/agnews/test.jsonl", 60)
    size = {"max_documents_per_cluster": 40, "n_clusters": 2}
    records = [{"sentences": line["query"]["text"], "labels": line["label_id"]} for line in news]
    tasks.append(local.clustering("News", records, **size))
    points, classes = (
        cut(texts(*(line["sentences"] for line in records), None), 16).numpy(),
        np.array([line["labels"] for line in records]),
    )
    draws, values = random.Random(42), []
    model = MiniBatchKMeans(len(set(classes)), batch_size=512, n_init=1, random_state=42)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        some = draws.choices(range(60), k=40)
        values.append(v_measure_score(classes[some], model.fit_predict(points[some])))
    expected["News"] = np.mean(values)

    subsets = {
        f"{code}-eng": [
            (line["query"]["text"], line["target"]["text"]) for line in lines(f"text/tatoeba/{code}-eng.test.jsonl", 25)
        ]
        for code in ("deu", "jpn")
    }
    pairs = {name: [{"sentence1": a, "sentence2": b} for a, b in sides] for name, sides in subsets.items()}
    tasks.append(
        local.bitext("Tatoeba", pairs, languages={"deu-eng": ["deu-Latn", "eng-Latn"], "jpn-eng": ["jpn-Jpan", "eng-Latn"]})
    )
    values = []
    for sides in subsets.values():
        one, other = (cut(texts(*side, None), 16) for side in zip(*sides, strict=True))
        values.append(f1_score(range(25), (one @ other.T).argmax(1).numpy(), average="weighted"))
    expected["Tatoeba"] = np.mean(values)

    rows = {row["benchmark"].partition("/")[0]: row for row in judged(*tasks, widths=[16])}
    assert not [row["note"] for row in rows.values() if "note" in row]
    for name, (query_QD, document_CD, relevant) in search.items():
        ours = our_retrieval(cut(query_QD, 16), cut(document_CD, 16), relevant)
        theirs = scores_of(judged.out, name, 16)
        assert theirs["exact_ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-6), name
        assert theirs["exact_hit_rate_at_5"] == pytest.approx(ours["recall@5"], abs=1e-6), name
        assert theirs["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-6), name
    for name, value in expected.items():
        assert rows[f"mteb.{name}"]["value"] == pytest.approx(value, abs=1e-6), name
