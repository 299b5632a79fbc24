"""Promises of prompts: what a record is shown as, which answers are taken, and that every file of conf/prompts works."""

import json
from pathlib import Path

import pytest
from llms import prompt
from samples import picture_bytes

from datamodules.curation.prompts import UnusableAnswerError, filled, read_prompt
from datamodules.curation.synthesis import check_makes, draw, examples_of, values_of
from datamodules.sample import Example, Item, Part, media_item, text_item

PROMPTS = sorted((Path(__file__).parent.parent / "conf" / "prompts").glob("*.yaml"))
ANSWER = {"query": {"type": "string", "minLength": 2}}
PICTURE = media_item("image", picture_bytes(), "png")


def read(tmp_path: Path, text: str):
    (tmp_path / "p.yaml").write_text(text)
    return read_prompt(tmp_path / "p.yaml")


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_every_prompt_of_conf_can_be_used(path):
    """Its shots pass its own schema and checks when it is read; what it makes is made of what it has."""
    found = read_prompt(path)
    if found.makes is not None:
        check_makes(found, {*found.fields, "passage"})
        assert path.stem == "captions" or len(found.shots) >= (3 if path.stem == "swim_ir" else 1)
        answer = found.shots[0]["answer"] if found.shots else dict.fromkeys(found.answer or {}, "something else")
        values = {**dict.fromkeys(found.fields, "x"), "passage": text_item("shown"), **(found.shots or ({},))[0]}
        values["passage"] = text_item(str(values["passage"]))
        for example in examples_of(found, "k", values, answer, {"by": "generate"}, {"by": "source"}):
            assert example.query or example.target
    else:
        assert path.stem in ("quality", "relevance", "likelihood")
        assert found.fields == {"query", "passage"}
    assert found.user == found.user.rstrip("\n")


def test_messages_are_system_shots_and_the_record():
    shots = ({"passage": "one", "answer": {"query": "é?"}}, {"passage": "two", "answer": {"query": "?!"}})
    found = prompt(user="P: {passage}", system=" Be brief. \n", shots=shots, answer=ANSWER)
    messages = found.messages({"passage": text_item("three"), "other": "x"})
    assert [(message.role, message.text) for message in messages] == [
        ("system", "Be brief."),
        ("user", "P: one"),
        ("assistant", '{"query": "é?"}'),
        ("user", "P: two"),
        ("assistant", '{"query": "?!"}'),
        ("user", "P: three"),
    ]


def test_a_value_is_put_in_once_and_media_stand_where_their_name_stood():
    assert filled("{a}{b} {c", {"a": "{b}", "b": "{a}"}).parts == (Part("text", "{b}{a} {c"),)
    mixed = Item((Part("text", "left"), *PICTURE.parts, Part("code", "right")))
    assert filled("<{a}>", {"a": mixed}).parts == (Part("text", "<left"), *PICTURE.parts, Part("text", "right>"))
    assert filled("{a}", {"a": PICTURE}).parts == PICTURE.parts
    with pytest.raises(ValueError, match=r"\{b\} is filled by nothing; there are a"):
        filled("{a}{b}", {"a": 1})


@pytest.mark.parametrize(
    "text", ['{"query": "hm"}', ' {"query": "hm"}\n', '```json\n{"query": "hm"}\n```', '```\n{"query": "hm"}\n```\n']
)
def test_json_is_taken_alone_or_in_one_fence(text):
    assert prompt(user="", answer=ANSWER).parse(text, {}) == {"query": "hm"}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no JSON"),
        ("Sure! {}", "no JSON"),
        ('<think>cut off {"query": "hm"}', "no JSON"),
        ('{"query": "hm"}<think></think>', "no JSON"),
        ('{"query": "hm"} {"query": "hm"}', "no JSON"),
        ('{"query": "hm"', "no JSON"),
        ('{"query": NaN}', "no JSON"),
        ('{"query": "\\ud800"}', "no JSON"),
        ("[" * 10**5, "no JSON"),
        ('```\n{"query": "hm"}\n```\nHope that helps', "no JSON"),
        ('["query"]', "not of the schema"),
        ("{}", "not of the schema"),
        ('{"query": "h"}', "not of the schema"),
        ('{"query": 17}', "not of the schema"),
        ('{"query": "hm", "more": 1}', "not of the schema"),
    ],
)
def test_any_other_answer_is_refused_with_its_cause(text, cause):
    with pytest.raises(UnusableAnswerError) as error:
        prompt(user="", answer=ANSWER).parse(text, {})
    assert error.value.cause == cause


def test_checks_hold_what_a_schema_cannot_say():
    passage = text_item("The Bridge  was opened.\nIt was closed.\nNobody knows why.")
    extractive = prompt(user="", answer=ANSWER, checks={"extractive": {"query": "passage"}})
    for query in ("It was closed.", "the bridge was opened. Nobody knows why."):
        assert extractive.parse(json.dumps({"query": query}), {"passage": passage})
    original = prompt(user="", answer=ANSWER, checks={"original": {"query": "passage"}})
    assert original.parse('{"query": "when was the bridge opened"}', {"passage": passage})
    for found, query, cause in (
        (extractive, "It was opened.", "query is not extractive"),
        (original, "IT WAS closed", "query is not original"),
    ):
        with pytest.raises(UnusableAnswerError) as error:
            found.parse(json.dumps({"query": query}), {"passage": passage})
        assert error.value.cause == cause


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not of type 'object'"),
        ("system: x", "'user' is a required property"),
        ("user: x\nusr: y\nanswer: {}", "'usr' was unexpected"),
        ("user: x\nanswer: {passage: {}}", "cannot be called passage"),
        ("user: x\ngrades: {Yes: 1, No: 0}", "the key True is no text; put it in quotation marks"),
        ("user: x\ngrades: [a, b]", "grades: .* is not of type 'object'"),
        ("user: x\ncontinuation: 5", "continuation: 5 is not of type 'string'"),
        ("user: x\nsystem: 5\nanswer: {}", "system: 5 is not of type 'string'"),
        ("user: x\nanswer: {q: {}}\nmakes: [1]", "makes: .* is not of type 'object'"),
        ("user: x\nanswer: {q: {}}\nmakes: {tail: half}", "makes.tail: 'half' is not of type 'number'"),
        ("user: x\nanswer: {q: {}}\nmakes: {examples: [{query: x, negatives: y}]}", "negatives: 'y' is not of type 'array'"),
        ("user: x\nanswer: {q: {}}\nmakes: {examples: [{query: {text: y}}]}", "is not valid under any of the given schemas"),
        ("user: '{a}'\nanswer: {q: {}}\nchecks: {original: {q: b}}", "compares with b, which is neither shown nor answered"),
        ("user: x", "one of `answer`, `continuation` and `grades`"),
        ("user: x\nanswer: {}\ncontinuation: y", "one of `answer`"),
        ("user: x\nanswer: {q: {type: nothing}}", "'nothing' is not valid"),
        ("user: x\nanswer: {q: {type: string}}\nchecks: {funny: {q: q}}", "no check funny"),
        ("user: x\nanswer: {q: {type: string}}\nchecks: {original: {r: q}}", "names r, which an answer does not have"),
        ("user: '{a}'\nanswer: {q: {type: string}}\nshots: [{answer: {q: x}}]", "shot 1 lacks a"),
        ("user: x\nanswer: {q: {type: string}}\nshots: [{answer: {q: 1}}]", "1 is not of type 'string'"),
        ("user: x\nanswer: {}\ndraws: {a: []}", "draws.a: .* should be non-empty"),
        ("user: !!python/name:os.system x", "cannot be used"),
        ("user: 'x", "cannot be used"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused_when_it_is_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_a_missing_prompt_names_those_that_are_there(tmp_path):
    read(tmp_path, "user: x\nanswer: {}")
    with pytest.raises(ValueError, match=r"no prompt .*q.yaml; prompts in .*: p.yaml"):
        read_prompt(tmp_path / "q.yaml")


def test_the_hash_of_a_prompt_is_that_of_its_file(tmp_path):
    assert read(tmp_path, "user: x\nanswer: {}").sha256 != read(tmp_path, "user: x \nanswer: {}").sha256


def test_a_record_shows_its_items_and_what_its_meta_says():
    example = Example(
        "k", text_item("q"), text_item("t", title="T"), label="l", meta={"language": "de", "year": 3, "tags": [1]}
    )
    values = values_of(example, "target")
    assert values == {
        "key": "k", "query": example.query, "target": example.target, "passage": example.target,
        "title": "T", "label": "l", "language": "de", "year": 3,
    }  # fmt: skip
    assert values_of(example, "query")["title"] == "none"
    for empty in (Example("k", text_item("q")), Example("k", text_item("q"), text_item(" \n"))):
        with pytest.raises(UnusableAnswerError) as error:
            values_of(empty, "target")
        assert error.value.cause == "empty passage"


def test_draws_are_of_seed_and_record_alone():
    found = prompt(user="", draws={"a": tuple("xyz"), "b": tuple("xyz")})
    first = {key: draw(found, {}, 0, key)[0] for key in map(str, range(300))}
    assert first == {key: draw(found, {}, 0, key)[0] for key in reversed(first)}
    assert {tuple(value.items()) for value in first.values()} == {(("a", a), ("b", b)) for a in "xyz" for b in "xyz"}
    assert any(draw(found, {}, 1, key)[0] != value for key, value in first.items())


def test_an_answer_becomes_the_examples_that_makes_says():
    whole = {"query": ["{task}: ", "source"], "target": {"code": "{edited}"}, "negatives": ["{task}!", "source"]}
    makes = {"examples": [{**whole, "label": "c {n}", "score": "{n}"}, {"target": "source"}]}
    found = prompt(user="", answer={name: {} for name in ("task", "edited", "n")}, makes=makes)
    check_makes(found, {"passage"})
    values = {"passage": text_item("def f", kind="code")}
    answer = {"task": "rename {edited}", "edited": "def g", "n": 2}
    first, second = examples_of(found, "k", values, answer, {"by": "llm"}, {"by": "source"})
    assert first.query == Item((Part("text", "rename {edited}: "), Part("code", "def f")))
    assert first.target == text_item("def g", kind="code")
    assert first.negatives == (text_item("rename {edited}!"), values["passage"])
    assert (first.key, first.label, first.score) == ("k-0", "c 2", 2.0)
    assert first.meta == {"provenance": {name: {"by": "llm"} for name in ("query", "target", "negatives", "label", "score")}}
    assert (second.key, second.query, second.target) == ("k-1", None, values["passage"])
    assert second.meta == {"provenance": {"target": {"by": "source"}}}


def test_of_a_long_list_the_tail_is_taken():
    makes = {"each": "films", "tail": 0.4, "examples": [{"target": "{item}"}]}
    found = prompt(user="", answer={"films": {"type": "array"}}, makes=makes)
    check_makes(found, set())
    answer = {"films": ["a", "b", "c", "d", "e", "f"]}
    made = examples_of(found, "k", {}, answer, {}, {})
    assert [(one.key, one.target) for one in made] == [(k, text_item(t)) for k, t in (("k-0", "d"), ("k-1", "e"), ("k-2", "f"))]
    with pytest.raises(UnusableAnswerError, match="films is empty"):
        examples_of(found, "k", {}, {"films": []}, {}, {})


def test_an_empty_field_or_a_score_that_is_none_is_refused():
    for template, cause in (({"query": "{q}"}, "query is empty"), ({"query": "x", "score": "{q}"}, "score is no number")):
        found = prompt(user="", answer={"q": {}}, makes={"examples": [template]})
        with pytest.raises(UnusableAnswerError) as error:
            examples_of(found, "k", {}, {"q": " "}, {}, {})
        assert error.value.cause == cause


@pytest.mark.parametrize(
    ("makes", "message"),
    [
        (None, "needs `answer`, and `makes` with `examples`"),
        ({"examples": []}, "needs `answer`, and `makes`"),
        ({"examples": [{"label": "x"}]}, "an example has query or target"),
        ({"examples": [{"query": "x", "title": "y"}]}, "an example has query or target"),
        ({"examples": [{"query": "{nobody}"}]}, r"names \{nobody\}, which no record has; there are passage, q, query, shown"),
        ({"examples": [{"query": "x"}], "tail": 0.5}, "`tail` is a share"),
        ({"examples": [{"query": "{item}"}], "each": "q"}, "'q', which is no array"),
        ({"examples": [{"query": "{item}"}]}, r"names \{item\}, but its makes has no `each`"),
    ],
)
def test_makes_that_cannot_work_is_refused_before_anything_is_asked(makes, message):
    with pytest.raises(ValueError, match=message):
        check_makes(prompt(user="{shown}", answer=ANSWER | {"q": {}}, makes=makes), {"shown", "passage"} - {"query"})


def test_a_prompt_that_shows_what_records_do_not_have_is_refused():
    found = prompt(user="{person}", answer=ANSWER, makes={"examples": [{"query": "{query}"}]})
    with pytest.raises(ValueError, match=r"names \{person\}, which no record has; there are passage, query"):
        check_makes(found, {"passage"})
