"""Promises of conf=generate: what passages become, what is set aside and why, and that nothing is paid for twice."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from llm_server import Reply, ScriptedServer
from llms import Scripted, shown
from samples import picture_bytes
from test_job import files_of
from test_train import run

from datamodules.sample import Example, media_item, text_item
from datamodules.shards import Split, write_split
from lightning_modules.generate import generate
from lightning_modules.llm.answers import Budget
from lightning_modules.llm.interface import Answer, Request

PASSAGES = [f"Passage {n} tells of {word}." for n, word in enumerate(["oak", "ash", "elm", "fir", "yew", "bay", "box", "fig"])]
PROMPT = """
user: "Passage: {passage}\\nIn {language}"
draws: {language: [de, fr]}
answer: {query: {type: string, minLength: 3}}
makes: {examples: [{query: "{query}", target: source}]}
"""


@pytest.fixture
def passages(tmp_path) -> str:
    examples = [Example(f"p{n}", target=text_item(text, title=f"T{n}")) for n, text in enumerate(PASSAGES)]
    write_split(tmp_path / "passages", examples, about={"licence": "own"})
    return str(tmp_path / "passages")


@pytest.fixture
def prompt(tmp_path) -> str:
    (tmp_path / "fret.yaml").write_text(PROMPT)
    return str(tmp_path / "fret.yaml")


def asks(request: Request) -> dict:
    return {"query": f"who knows {shown(request, 'tells of ', '.')} in {shown(request, 'In ')}"}


def test_every_passage_gets_a_query_with_its_provenance(passages, prompt, tmp_path):
    llm = Scripted(asks)
    generate(prompt, llm, str(tmp_path / "out"), source=passages, samples=2, block_size=3)
    made = Split(tmp_path / "out")
    assert made.keys == [f"p{n}-{sample}" for n in range(8) for sample in range(2)]
    languages = Counter()
    for position, key in enumerate(made.keys):
        example = made.read(position)
        provenance = (example.meta or {})["provenance"]
        language = provenance["query"]["draws"]["language"]
        languages[language] += 1
        assert example.target == text_item(PASSAGES[int(key[1])], title=f"T{key[1]}")
        assert example.query == text_item(f"who knows {PASSAGES[int(key[1])].split()[-1][:-1]} in {language}")
        assert provenance["query"]["llm"] == "scripted"
        assert provenance["query"]["prompt"].startswith("fret@")
        assert provenance["target"] == {"by": "source", "split": passages, "key": f"p{key[1]}"}
    assert set(languages) == {"de", "fr"}
    about = made.manifest["about"]
    assert about["counts"] == {"records": 8, "answers used": 16, "examples": 16}
    assert about["made_by"]["licence"] == "own"
    assert about["made_by"]["source_digest"] == Split(passages).digest


def test_an_answer_of_no_use_is_asked_for_anew_and_then_set_aside_with_its_cause(passages, prompt, tmp_path):
    tries = Counter()

    def script(request: Request):
        word = shown(request, "tells of ", ".")
        tries[word] += 1
        bad = {"oak": "no json", "ash": {"query": 3}, "elm": {"query": "x"}, "fir": Answer(error="cut off", output_tokens=9)}
        return bad[word] if word in bad and (word != "ash" or tries[word] < 3) else asks(request)

    generate(prompt, Scripted(script), str(tmp_path / "out"), source=passages, attempts=3)
    assert tries == {"oak": 3, "ash": 3, "elm": 3, "fir": 3, "yew": 1, "bay": 1, "box": 1, "fig": 1}
    made = Split(tmp_path / "out")
    assert made.keys == ["p1", "p4", "p5", "p6", "p7"]
    assert made.manifest["about"]["aside"] == {"no JSON": 1, "not of the schema": 1, "cut off": 1}
    aside = json.loads((tmp_path / "out" / "blocks" / "000000.json").read_text())["aside"]
    assert [(record["key"], record["cause"]) for record in aside] == [
        ("p0", "no JSON"),
        ("p2", "not of the schema"),
        ("p3", "cut off"),
    ]
    assert "no json" in aside[0]["message"]


def test_another_attempt_has_another_seed_and_the_same_run_the_same(passages, prompt, tmp_path):
    seeds = []
    for name in "ab":
        llm = Scripted(lambda request: "nothing")
        with pytest.raises(ValueError, match="nothing was kept of 2 records: 2 x no JSON"):
            generate(prompt, llm, str(tmp_path / name), source=passages, num_records=2)
        seeds.append([request.seed for request in llm.asked])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 6


def test_empty_and_repeated_passages_cost_nothing(prompt, tmp_path):
    texts = [" ", "one tells of a.", "two tells of b.", "one  tells of a.", "one tells of a."]
    write_split(tmp_path / "s", [Example(f"{n}", target=text_item(text)) for n, text in enumerate(texts)])
    llm = Scripted(asks)
    generate(prompt, llm, str(tmp_path / "out"), source=str(tmp_path / "s"))
    assert len(llm.asked) == 2
    assert Split(tmp_path / "out").manifest["about"]["aside"] == {"duplicate passage": 2, "empty passage": 1}


def test_a_record_that_lacks_what_is_shown_goes_aside(tmp_path):
    (tmp_path / "p.yaml").write_text(PROMPT.replace("In {language}", "By {author}, in {language}"))
    metas = ({"author": "A"}, None, {"author": ["no", "word"]}, {"author": "B"})
    source, out = str(tmp_path / "s"), str(tmp_path / "out")
    write_split(source, [Example(f"{n}", target=text_item(f"it tells of {n}."), meta=meta) for n, meta in enumerate(metas)])
    generate(str(tmp_path / "p.yaml"), Scripted(lambda request: {"query": "fine"}), out, source=source)
    assert Split(out).keys == ["0", "3"]
    assert Split(out).manifest["about"]["aside"] == {"no author": 2}


def test_stages_build_on_each_other(tmp_path):
    """A list without a source, its tail; persons drawn from one list review the things of another."""
    for name, field in (("persons", "persons"), ("products", "things")):
        llm = Scripted(lambda request, field=field: {field: [f"{field} {n} of {request.seed}" for n in range(4)]})
        generate(name, llm, str(tmp_path / name), num_records=5)
        made = Split(tmp_path / name)
        assert len(made) == 10
        assert all(made.read(n).target.parts[0].data.split()[1] in "23" for n in range(10))  # type: ignore[union-attr]
    llm = Scripted(lambda request: {"counterfactual": "if it were so", "factual": "it is so and not otherwise."})
    generate("counterfactuals", llm, str(tmp_path / "c"), source=str(tmp_path / "products"))
    assert len(Split(tmp_path / "c")) == 20  # keys of stages upon stages do not meet
    llm = Scripted(lambda request: {"review": f"{shown(request, 'Person: ')} says of {shown(request, 'Thing: ')}: hm"})
    persons = {"person": str(tmp_path / "persons")}
    generate("reviews", llm, str(tmp_path / "r"), source=str(tmp_path / "products"), splits=persons)
    made = [Split(tmp_path / "r").read(n) for n in range(10)]
    assert all(example.query is not None and " says of things " in str(example.query.parts[0].data) for example in made)
    assert {example.label for example in made} <= {f"{n} stars" for n in range(1, 6)}
    assert len({(example.meta or {})["provenance"]["query"]["draws"]["person"] for example in made}) > 3


def test_media_are_shown(tmp_path):
    examples = [Example(f"{n}", target=media_item("image", picture_bytes(seed=n), "png")) for n in range(2)]
    write_split(tmp_path / "s", examples)
    llm = Scripted(lambda request: {"caption": "a picture of noise", "question": "what is it?"})
    generate("captions", llm, str(tmp_path / "out"), source=str(tmp_path / "s"))
    assert [part.kind for part in llm.asked[0].messages[-1].parts] == ["image", "text"]
    made = Split(tmp_path / "out")
    assert made.keys == ["0-0", "0-1", "1-0", "1-1"]
    assert made.read(3).target == examples[1].target


def test_any_array_makes_the_same_and_a_rerun_asks_nothing(passages, prompt, tmp_path):
    generate(prompt, Scripted(asks), str(tmp_path / "one"), source=passages, block_size=3)
    for index in (2, 0, 1):
        generate(prompt, Scripted(asks), str(tmp_path / "many"), source=passages, block_size=3, array_index=index, array_size=3)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    llm = Scripted(asks)
    generate(prompt, llm, str(tmp_path / "many"), source=passages, block_size=3)
    generate(prompt, llm, str(tmp_path / "new"), source=passages, block_size=3, answers=str(tmp_path / "one" / "answers"))
    assert not llm.asked
    assert files_of(tmp_path / "new") == files_of(tmp_path / "one")


def test_another_prompt_llm_seed_or_source_is_never_mixed(passages, prompt, tmp_path):
    out = str(tmp_path / "out")
    generate(prompt, Scripted(asks), out, source=passages)
    (tmp_path / "fret.yaml").write_text(PROMPT + "\nsystem: You are another one.")
    with pytest.raises(ValueError, match=r"was begun otherwise: prompt_sha256 was .* Give another folder as out"):
        generate(prompt, Scripted(asks), out, source=passages)
    (tmp_path / "fret.yaml").write_text(PROMPT)
    with pytest.raises(ValueError, match="llm was 'scripted', now 'other'"):
        generate(prompt, Scripted(asks, name="other"), out, source=passages)
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        generate(prompt, Scripted(asks), out, source=passages, seed=1)
    write_split(tmp_path / "passages", [Example("p", target=text_item("x"))])
    with pytest.raises(ValueError, match="source_digest was"):
        generate(prompt, Scripted(asks), out, source=passages)


def test_what_cannot_work_is_refused_before_anything_is_asked(passages, prompt, tmp_path):
    llm, out = Scripted(asks), str(tmp_path / "out")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "give source, .* or num_records"),
        ({"source": passages, "samples": 0}, "each must be at least 1"),
        ({"source": passages, "column": "query"}, "none of the first 8 records of .* has a query with any content"),
        ({"num_records": 2}, r"names \{passage\}, which no record has; there are language, number, query"),
        ({"source": str(tmp_path / "none")}, "no shards in"),
    ]
    for more, message in wrong:
        with pytest.raises(ValueError, match=message):
            generate(prompt, llm, out, **more)
    with pytest.raises(ValueError, match=r"no prompt .*conf/prompts/frett.yaml; prompts in .*fret.yaml"):
        generate("frett", llm, out, source=passages)
    assert not llm.asked
    assert not Path(out).exists()


def test_a_spent_budget_stops_with_what_was_paid_for_and_goes_on(passages, prompt, tmp_path):
    llm = Scripted(asks)
    with pytest.raises(ValueError, match="the budget does not cover another request"):
        generate(prompt, llm, str(tmp_path / "out"), source=passages, block_size=2, budget=Budget(max_tokens=690))
    paid = len(llm.asked)
    assert 0 < paid < 8
    generate(prompt, llm, str(tmp_path / "out"), source=passages, block_size=2)
    assert len(llm.asked) == 8
    generate(prompt, llm, str(tmp_path / "whole"), source=passages, block_size=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def through(server: ScriptedServer, passages: str, prompt: str, out: Path, *more: str, ok: bool = True) -> str:
    where = ["llm.init_args.model=a-model", f"llm.init_args.base_url={server.base_url}", "llm.init_args.max_retries=1"]
    return run("conf=generate", f"source={passages}", f"prompt={prompt}", f"out={out}", "block_size=3", *where, *more, ok=ok)


def test_the_command_as_a_user_runs_it_with_a_server_that_misbehaves_and_then_dies(passages, prompt, tmp_path):
    def script(body, number):
        text = body["messages"][-1]["content"]
        good = json.dumps({"query": f"who knows {text.split('tells of ')[1].split('.')[0]}"})
        if "elm" in text:
            return "I cannot answer that."
        strange = {1: Reply(status=429, headers={"Retry-After": "0"}), 3: Reply(cut=True), 4: Reply(good, delay=0.3)}
        if number == 9:
            stopping.start()
        return strange.get(number, Reply(good))

    out = tmp_path / "out"
    with ScriptedServer(script) as server:
        stopping = threading.Thread(target=server.stop)
        said = through(server, passages, prompt, out, "llm.init_args.concurrency=2", ok=False)
        assert "error: " in said
        assert "Traceback" not in said
        assert "run the command again to go on" in said
        stopping.join()
    paid = sum(len(path.read_text().splitlines()) for path in out.glob("answers/*.jsonl"))
    assert paid > 2
    with ScriptedServer(lambda body, number: script(body, 100)) as server:
        said = through(server, passages, prompt, out)
        asked = len(server.requests)
        assert "7 examples of 8 records" in said
        assert "1 set aside: 1 x no JSON" in said
        assert "answers of" in said
        lines = [json.loads(line) for path in out.glob("answers/*.jsonl") for line in path.read_text().splitlines()]
        keys = [line["key"] for line in lines if line["error"] is None]
        assert len(keys) == len(set(keys)) == 10  # elm three times
        assert len(lines) == paid + asked
        assert {line["error"] for line in lines} == {None, "malformed answer"}  # the one that was cut, for its costs
        through(server, passages, prompt, out)
        assert len(server.requests) == asked
    assert Split(out).keys == ["p0", "p1", "p3", "p4", "p5", "p6", "p7"]


def test_a_server_that_changes_its_model_stops_the_run(passages, prompt, tmp_path):
    with ScriptedServer(lambda body, number: Reply('{"query": "yes"}', model="a" if number < 4 else "b")) as server:
        said = through(server, passages, prompt, tmp_path / "out", "llm.init_args.concurrency=1", ok=False)
    assert "answers as 'b' now, but its answers in" in said
