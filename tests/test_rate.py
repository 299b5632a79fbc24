"""Promises of conf=rate: ratings with reasons, thresholds, expected grades and likelihoods as computed by hand."""

import math

import pytest
from llm_server import ScriptedServer, echo
from llms import Scripted, shown
from test_train import run

from datamodules.sample import Example, text_item
from datamodules.shards import Split, write_split
from lightning_modules.llm.interface import Answer, Request
from lightning_modules.rate import RaterSpec, rate

WORDS = ["oak", "ash", "elm", "fir", "yew"]
QUALITY = {"quality": RaterSpec("quality", at_least=3)}
CANDIDATES = {name: RaterSpec(name, of="candidates") for name in ("relevance", "likelihood")}


@pytest.fixture
def pairs(tmp_path) -> str:
    examples = [Example(f"k{n}", text_item(f"find {word}"), text_item(f"about {word}")) for n, word in enumerate(WORDS)]
    write_split(tmp_path / "pairs", examples, about={"licence": "own"})
    return str(tmp_path / "pairs")


@pytest.fixture
def mined(tmp_path) -> tuple[str, str]:
    """Two queries with three candidates of a corpus of five; the target of the second was not found."""
    write_split(tmp_path / "corpus", [Example(f"c{n}", target=text_item(f"about {word}")) for n, word in enumerate(WORDS)])
    near = [{"position": n, "key": f"c{n}", "cosine": 0.9 - n / 10} for n in range(3)]
    near[1]["is_target"] = True
    far = [{"position": n, "key": f"c{n}", "cosine": 0.5} for n in (0, 4)]
    examples = [
        Example("q0", text_item("find ash"), text_item("about ash"), meta={"candidates": near}),
        Example("q1", text_item("find yew"), text_item("my own yew"), meta={"candidates": far, "seed": {"cosine": 0.3}}),
    ]
    write_split(tmp_path / "mined", examples)
    return str(tmp_path / "mined"), str(tmp_path / "corpus")


def judge(request: Request):
    score = {"oak": 5, "ash": 3, "elm": 2, "fir": 6, "yew": 4}[shown(request, "Query: find ")]
    return {"reason": f"for {score}", "score": score}


def test_examples_below_the_threshold_go_aside_with_the_reason(pairs, tmp_path):
    rate(pairs, QUALITY, Scripted(judge), str(tmp_path / "out"))
    made = Split(tmp_path / "out")
    ratings = {key: (made.read(n).meta or {})["ratings"]["quality"] for n, key in enumerate(made.keys)}
    assert {key: (found["value"], found["reason"]) for key, found in ratings.items()} == {
        "k0": (5.0, "for 5"), "k1": (3.0, "for 3"), "k4": (4.0, "for 4"),
    }  # fmt: skip
    assert all(found["prompt"].startswith("quality@") for found in ratings.values())
    assert all((found["llm"], found["seed"]) == ("scripted", 0) for found in ratings.values())
    about = made.manifest["about"]
    assert about["aside"] == {"quality below 3": 1, "quality: not of the schema": 1}
    assert about["made_by"]["licence"] == "own"
    assert about["made_by"]["raters"]["quality"]["at_least"] == 3


def test_raters_are_asked_in_order_and_only_of_what_is_left(pairs, tmp_path):
    (tmp_path / "short.yaml").write_text("user: 'Short? {query}'\nanswer: {long: {type: number}}")
    raters = {**QUALITY, "length": RaterSpec(str(tmp_path / "short.yaml"), field="long", at_least=0)}
    llm = Scripted(
        lambda request: (
            {"long": -1 if "oak" in request.messages[-1].text else 1.5}
            if "Short?" in request.messages[-1].text
            else judge(request)
        )
    )
    rate(pairs, raters, llm, str(tmp_path / "out"))
    assert sum("Short?" in request.messages[-1].text for request in llm.asked) == 3
    made = Split(tmp_path / "out")
    assert made.keys == ["k1", "k4"]
    assert list((made.read(0).meta or {})["ratings"]) == ["quality", "length"]
    assert made.manifest["about"]["aside"]["length below 0"] == 1


def test_candidates_get_the_expected_grade_and_the_querys_likelihood(mined, tmp_path):
    def script(request: Request):
        passage = request.messages[-1].text.rpartition("Passage: ")[2].partition("\n")[0]
        if request.continuation.startswith(" find"):  # type: ignore[union-attr]
            return -float(len(passage))
        return {" Not Relevant": math.log(1), " Somewhat Relevant": math.log(2), " Highly Relevant": math.log(1)}.get(
            str(request.continuation), math.log(4 if "ash" in passage else 1e-9)
        )

    source, corpus = mined
    rate(source, CANDIDATES, Scripted(script), str(tmp_path / "out"), corpus=corpus)
    made = Split(tmp_path / "out")
    first, second = ((made.read(n).meta or {})["candidates"] for n in range(2))
    assert [one["key"] for one in first] == ["c0", "c1", "c2"]
    assert first[1]["relevance"] == pytest.approx((1 * 0 + 2 * 1 + 1 * 2 + 4 * 3) / 8)
    assert first[0]["relevance"] == pytest.approx((0 + 2 + 2) / 4)
    assert [one["likelihood"] for one in first] == [-9.0] * 3
    assert [(one["position"], one["likelihood"], one.get("is_target")) for one in second] == [
        (0, -9.0, None),
        (4, -9.0, None),
        (None, -10.0, True),
    ]
    assert made.manifest["about"]["counts"]["candidates rated by relevance"] == 6


def test_a_candidate_without_a_rating_is_left_out_and_counted(mined, tmp_path):
    source, corpus = mined
    llm = Scripted(lambda r: Answer(error="longer than the context") if "about elm" in r.messages[-1].text else -1.0)
    rate(source, CANDIDATES, llm, str(tmp_path / "out"), corpus=corpus)
    made = Split(tmp_path / "out")
    assert [one["key"] for one in (made.read(0).meta or {})["candidates"]] == ["c0", "c1"]
    assert made.manifest["about"]["counts"]["candidates without relevance: longer than the context"] == 1


def test_texts_with_a_label_are_rated_too(tmp_path):
    (tmp_path / "p.yaml").write_text("user: '{query} is {label}?'\nanswer: {score: {type: integer}}")
    write_split(tmp_path / "s", [Example("a", text_item("it is bad"), label="sad"), Example("b", text_item("so good"))])
    raters = {"fits": RaterSpec(str(tmp_path / "p.yaml"))}
    rate(str(tmp_path / "s"), raters, Scripted(lambda request: {"score": 4}), str(tmp_path / "out"))
    made = Split(tmp_path / "out")
    assert made.keys == ["a"]
    assert (made.read(0).meta or {})["ratings"]["fits"]["value"] == 4
    assert made.manifest["about"]["aside"] == {"no label": 1}


def test_an_example_whose_own_target_cannot_be_rated_goes_aside(mined, tmp_path):
    source, corpus = mined
    llm = Scripted(lambda r: Answer(error="refused") if "my own yew" in r.messages[-1].text else -1.0)
    rate(source, CANDIDATES, llm, str(tmp_path / "out"), corpus=corpus)
    made = Split(tmp_path / "out")
    assert made.keys == ["q0"]
    assert made.manifest["about"]["aside"] == {"relevance: refused": 1}


def test_what_cannot_work_is_refused_before_anything_is_asked(pairs, mined, tmp_path):
    llm = Scripted(judge)
    (tmp_path / "no.yaml").write_text("user: x\nanswer: {reason: {type: string}}")
    for raters, message in (
        ({}, "give raters"),
        ({"a": RaterSpec(str(tmp_path / "no.yaml"))}, "has no number 'score' in its answer; name it in `field`"),
        ({"cosine": RaterSpec("quality")}, "cannot be called 'cosine'"),
        ({"a": RaterSpec("likelihood", field="score")}, "has no answer with fields"),
        (CANDIDATES, "give corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            rate(pairs, raters, llm, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="at_least is for ratings of examples"):
        RaterSpec("relevance", of="candidates", at_least=1)
    with pytest.raises(ValueError, match="'k0' has no candidates; find them with conf=mine"):
        rate(pairs, CANDIDATES, llm, str(tmp_path / "out"), corpus=mined[1])
    with pytest.raises(ValueError, match=r"candidate 'c0' of 'q0' is not at its place in .*pairs"):
        rate(mined[0], CANDIDATES, llm, str(tmp_path / "other"), corpus=pairs)
    assert not llm.asked


def test_the_command_with_a_servers_likelihoods(mined, tmp_path):
    """The scripted server's likelihood of a text is the sum over its tokens; ours must be that of the continuation alone."""
    source, corpus = mined
    with ScriptedServer() as server:
        where = ["llm.init_args.model=a-model", f"llm.init_args.base_url={server.base_url}"]
        run("conf=rate_candidates", f"source={source}", f"corpus={corpus}", f"out={tmp_path / 'out'}", *where)
        body = next(r.body for r in server.requests if r.body["prompt"].endswith("find yew"))
    logprobs = echo(body)["choices"][0]["logprobs"]
    start = body["prompt"].rindex(" find yew")
    ends, at = [], 0
    for token in logprobs["tokens"]:
        at += len(token)
        ends.append(at)
    own = [p for p, end in zip(logprobs["token_logprobs"], ends, strict=True) if start < end <= len(body["prompt"])]
    found = (Split(tmp_path / "out").read(1).meta or {})["candidates"]
    assert sum(own) in [pytest.approx(one["likelihood"]) for one in found]
