"""Promises of mteb's benchmarks: mteb's scores are ours, every prefix comes of one pass, and nothing is a number that is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.media.limits import DecodeLimits
from datamodules.sample import Item, media_item, text_item
from lightning_modules import metrics
from lightning_modules.encoder.embedder import cut
from lightning_modules.suites import SuiteSpec, judge_suites

ROOT = Path(__file__).parent.parent
PACK = ROOT.parent / "shared" / "data"
QUERY, DOCUMENT = "task: search result | query: {text}", "title: {title} | text: {text}"
SIMILAR, CLASS = "task: sentence similarity | query: {text}", "task: classification | query: {text}"
PROMPTS: dict[str, str | None] = {"query": QUERY, "document": DOCUMENT, "STS": SIMILAR, "Classification": CLASS}
WIDTHS = (4, 8, 16)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*beta:UserWarning:mteb", "ignore:.*superseded:UserWarning:mteb"),
]


@pytest.fixture(scope="module")
def local() -> Any:
    """tests/mteb_tasks.py."""
    pytest.importorskip("mteb")
    import mteb_tasks

    return mteb_tasks


@pytest.fixture
def judged(tiny_encoder, processor, tmp_path):
    """Judges tasks with the tiny encoder; how often it is given items is in `passes`."""

    def judge(*tasks: Any, **changes: Any) -> list[dict[str, Any]]:
        spec = SuiteSpec(list(tasks), changes.pop("prompts", PROMPTS), changes.pop("languages", None))
        options = {"model_name": "runs/tiny/encoder", "revision": "0123456789abcdef99", "widths": WIDTHS}
        return judge_suites(spec, tiny_encoder, processor, tmp_path, **(options | {"batch_size": 7, "device": "cpu"} | changes))

    passes: list[int] = []
    tiny_encoder.register_forward_hook(lambda _, inputs, vectors: passes.append(len(vectors)))
    judge.passes, judge.out = passes, tmp_path / "mteb" / "results"  # pyright: ignore[reportFunctionMemberAccess]
    return judge


def sentences(number: int, seed: int = 0, *, words: int = 6) -> list[str]:
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(random.choice(letters, 5)) for _ in range(1 + n % words)) for n in range(number)]


def vectors_of(encoder: Any, processor: Any, items: list[Item], template: str | None = None) -> torch.Tensor:
    """Vectors of items one by one, as nothing of the suites makes them."""
    with torch.inference_mode():
        found = [processor([decode_item(with_prompt(item, template), DecodeLimits())]) for item in items]
        return torch.cat([encoder(one) for one in found])


def value_of(rows: list[dict[str, Any]], benchmark: str, prefix: int = 16) -> float:
    (value,) = (row["value"] for row in rows if row["benchmark"] == benchmark and row["prefix"] == prefix)
    return value


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
        ours = metrics.retrieval(cut(query_QD, width) @ cut(document_CD, width).T, torch.from_numpy(relevant))
        theirs = scores_of(judged.out, "LocalRetrieval", width)
        assert theirs["exact_ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-6)
        assert theirs["exact_hit_rate_at_5"] == pytest.approx(ours["recall@5"], abs=1e-6)
        assert theirs["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-6)
        assert value_of(rows, "mteb.LocalRetrieval/text-text", width) == theirs["ndcg_at_10"]
    assert {row["metric"] for row in rows} == {"ndcg_at_10"}
