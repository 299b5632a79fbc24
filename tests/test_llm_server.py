"""What is sent to an OpenAI-compatible server, what its replies become, what happens when it fails: over real connections."""

import base64
import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai._base_client
import pytest
from llm_server import Reply, ScriptedServer, chat, echo

from datamodules.curation.prompts import Message
from datamodules.sample import Part
from lightning_modules.llm import server as module
from lightning_modules.llm.interface import Answer, Request, Sampling
from lightning_modules.llm.server import Server

KEY = "sk-a-secret-of-21-letters"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Short pauses, no key and no proxy."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def question(text: str = "Why?", **others: Any) -> Request:
    return Request((Message("user", (Part("text", text),)),), **others)


def asked(script, *requests: Request, **arguments: Any) -> tuple[list[Answer], ScriptedServer]:
    """Answers in the requests' order."""
    with ScriptedServer(script) as server:
        found = dict(Server("a-model", server.base_url, **arguments).answers(requests or (question(),)))
    return [found[number] for number in range(len(found))], server


def answer_to(reply: Reply | str, request: Request | None = None, **arguments: Any) -> Answer:
    """To one request, when the server always replies so."""
    return asked(lambda body, number: reply, request or question(), **arguments)[0][0]


def completion(reply: Reply | None = None, **changes: Any) -> dict[str, Any]:
    """A chat completion whose message, choice or top has changes."""
    made = chat({"model": "a-model", "messages": [{"content": "Why?"}]}, reply or Reply())
    for name, value in changes.items():
        place = {"choices": made, "usage": made, "message": made["choices"][0], "finish_reason": made["choices"][0]}
        place.get(name, made["choices"][0]["message"])[name] = value
    return made


def error_body(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": None}}


def test_a_chat_sends_messages_sampling_and_seed():
    messages = (Message("system", (Part("text", "Be "), Part("code", "brief."))), Message("user", (Part("text", "Why?"),)))
    request = Request(messages, Sampling(max_tokens=7, temperature=0.25, top_p=0.5), seed=11, schema={"type": "object"})
    _, server = asked(lambda body, number: "so", request)
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].body == {
        "model": "a-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "max_tokens": 7,
        "temperature": 0.25,
        "top_p": 0.5,
        "seed": 11,
    }


def test_a_schema_is_sent_to_be_followed_only_where_answers_are_constrained():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
    _, server = asked(lambda body, number: "{}", question(schema=schema), question(), constrain=True, concurrency=1)
    expected = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert [request.body.get("response_format") for request in server.requests] == [expected, None]


def test_what_changes_answers_is_in_the_name():
    assert Server("a-model", "http://a/v1").name == Server("a-model", "http://b/v1", concurrency=3).name == "a-model"
    assert Server("a-model", "http://a/v1", constrain=True).name == "a-model constrained"


def test_media_are_sent_in_place_as_the_protocol_has_them():
    parts = (
        Part("text", "See "),
        Part("image", b"\xff\xd8", "JPG"),
        Part("page", b"\x89P", "png"),
        Part("audio", b"RIFF", "wav"),
        Part("audio", b"OggS", "ogg"),
        Part("video", b"\x00\x01", "mp4"),
    )
    _, server = asked(lambda body, number: "so", Request((Message("user", parts),)))
    assert server.requests[0].body["messages"][0]["content"] == [
        {"type": "text", "text": "See "},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9g="}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVA="}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": "T2dnUw==", "format": "ogg"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAE="}},
    ]
    assert base64.b64decode("UklGRg==") == b"RIFF"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request((Message("user", (Part("page", b"%PDF", "pdf"),)),)), "a PDF page, which this backend does not take"),
        (Request((Message("user", (Part("image", b"x", "mp4"),)),)), "image of format 'mp4', which this backend does not take"),
        (
            Request((Message("user", (Part("image", b"x", "png"),)),), continuation="so"),
            "media before a continuation, which this backend does not take",
        ),
        (question("\ud800"), "text that UTF-8 does not have"),
    ],
)
def test_a_request_that_the_protocol_cannot_carry_is_answered_by_an_error_and_not_sent(request_, error):
    answers, server = asked(lambda body, number: "so", request_)
    assert answers == [Answer(model="a-model", error=error)]
    assert server.requests == []


def test_an_answer_has_the_servers_text_model_and_counts():
    usage = {"prompt_tokens": 21, "completion_tokens": 4, "total_tokens": 25}
    body = completion(Reply("Ωhy not?", model="a-model-2"), usage=usage)
    assert answer_to(Reply(body=body)) == Answer("Ωhy not?", input_tokens=21, output_tokens=4, model="a-model-2")


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": None}, {"prompt_tokens": -1, "completion_tokens": "4"}, 3])
def test_tokens_that_the_server_does_not_count_are_estimated(usage):
    request = Request((Message("user", (Part("text", "123456789"), Part("image", b"x" * 9999, "png"))),))
    answer = answer_to(Reply(body=completion(Reply("ΩΩΩ"), usage=usage)), request)  # 9 bytes are 3 tokens, 6 bytes 2
    assert (answer.text, answer.input_tokens, answer.output_tokens) == ("ΩΩΩ", 1003, 2)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"finish_reason": "length"}, "cut off"),
        ({"finish_reason": "content_filter"}, "refused"),
        ({"finish_reason": "content_filter", "content": None}, "refused"),
        ({"content": None, "refusal": "I will not."}, "refused"),
        ({"content": "", "refusal": "I will not."}, "refused"),
    ],
)
def test_an_answer_that_is_cut_off_or_refused_counts_its_tokens_and_says_so(changes, error):
    usage = {"prompt_tokens": 5, "completion_tokens": 512, "total_tokens": 517}
    answer = answer_to(Reply(body=completion(Reply("a beg"), usage=usage, **changes)))
    assert answer == Answer(input_tokens=5, output_tokens=512, model="a-model", error=error)


def test_an_empty_answer_is_an_answer():
    assert answer_to("") == Answer("", input_tokens=1, output_tokens=0, model="a-model")


def test_a_continuation_is_scored_by_the_tokens_of_an_echoed_prompt():
    request = Request(
        (Message("user", (Part("text", "the cat"),)), Message("user", (Part("text", "sat"),))), continuation=" on the mat"
    )
    answers, server = asked(lambda body, number: Reply(), request)
    assert server.requests[0].path == "/v1/completions"
    assert server.requests[0].body == {
        "model": "a-model",
        "prompt": "the cat\n\nsat on the mat",
        "echo": True,
        "max_tokens": 0,
        "logprobs": 1,
        "temperature": 0,
    }
    expected = -0.5 * (len(" on") + len(" the") + len(" mat"))
    assert answers == [Answer(log_likelihood=expected, num_scored=3, input_tokens=6, output_tokens=0, model="a-model")]


@pytest.mark.parametrize(
    ("prefix", "continuation", "tokens", "scored"),
    [
        ("ab", "cd", ["a", "b", "c", "d"], ["c", "d"]),
        ("ab", "cd", ["a", "bc", "d"], ["bc", "d"]),  # one that straddles the boundary counts
        ("ab", "cd", ["<s>", "a", "b", "c", "d"], ["c", "d"]),  # which shifts vLLM's offsets by 3
        ("ab", " cd ef", ["<s>", "ab", "cd", "ef"], ["cd", "ef"]),  # sentencepiece's tokens lose the space before them
        ("ab ", "cd", ["<s>", "ab", "cd"], ["cd"]),
        ("aa", "aa", ["<s>", "a", "a", "a", "a"], ["a", "a"]),
        ("ab", "😀d", ["a", "b", "\ufffd", "\ufffd", "d"], ["\ufffd", "\ufffd", "d"]),
        ("ab", "😀d", ["a", "b", "", "", "😀", "d"], ["", "", "😀", "d"]),  # as newer vLLM shows them
        ("a😀", "cd", ["a", "\ufffd", "\ufffd", "c", "d"], ["c", "d"]),
        ("ab", "", ["a", "b"], []),
    ],
)
def test_the_tokens_that_reach_beyond_the_prefix_are_scored(prefix, continuation, tokens, scored):
    request = question(prefix, continuation=continuation)
    with ScriptedServer(lambda body, number: Reply(body=echo(body, tokens))) as server:
        ((_, answer),) = Server("a-model", server.base_url).answers([request])
    assert (answer.error, answer.num_scored) == (None, len(scored))
    assert answer.log_likelihood == -0.5 * sum(map(len, scored))


@pytest.mark.parametrize("counted", [True, False])
def test_a_server_that_must_write_a_token_is_asked_for_one_which_is_not_scored(counted):
    def script(body, number):
        if body["max_tokens"] == 0:
            return Reply(status=400, body=error_body("max_tokens must be at least 1, got 0"))
        made = echo(body)
        return Reply(body=made if counted else made | {"usage": None})

    requests = [question("the cat", continuation=" sat")] * 3
    answers, server = asked(script, *requests, concurrency=1)
    assert [(answer.log_likelihood, answer.num_scored) for answer in answers] == [(-2.0, 1)] * 3
    assert [request.body["max_tokens"] for request in server.requests] == [0, 1, 1, 1]  # which is asked for once


def test_a_prompt_that_is_too_long_is_not_taken_for_a_server_that_must_write_a_token():
    long = Reply(status=400, body=error_body("This model's maximum context length is 8 tokens"))
    requests = [
        question("the", continuation=" cat"),
        question("long", continuation=" cat"),
        question("the", continuation=" cat"),
    ]
    answers, server = asked(lambda body, number: long if "long" in body["prompt"] else Reply(), *requests, concurrency=1)
    assert [answer.error for answer in answers] == [None, "longer than the context", None]
    assert [request.body["max_tokens"] for request in server.requests] == [0, 0, 0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda choice: choice.update(logprobs=None),
        lambda choice: choice["logprobs"].update(tokens=None),
        lambda choice: choice["logprobs"].update(token_logprobs=[None, -1.0, None]),
    ],
)
def test_a_server_that_gives_no_likelihoods_of_a_prompt_stops_the_run(spoil):
    def script(body, number):
        made = echo(body)
        spoil(made["choices"][0])
        return Reply(body=made)

    with pytest.raises(ValueError, match=r"gives no likelihoods of a prompt \(.*`vllm serve a-model`"):
        asked(script, question("the cat", continuation=" sat"))


def test_a_continuation_of_nothing_has_no_likelihood():
    answer = answer_to(Reply(), question("", continuation="cat"))
    assert (answer.error, answer.log_likelihood) == ("a continuation with nothing before it", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "the cat lay"},
        {"text": "sat"},
        {"logprobs": {"tokens": ["the", " dog", " sat"], "token_logprobs": [None, -1.0, -1.0]}, "text": "the cat  sat"},
        {"logprobs": {"tokens": ["the", " cat", " lay"], "token_logprobs": [None, -1.0, -1.0]}},
        {"logprobs": {"tokens": ["the", " cat", " sat"], "token_logprobs": [None, -1.0]}},
        {"logprobs": {"tokens": ["the", " cat", " sat"], "token_logprobs": [None, -1.0, "-1"]}},
        {"logprobs": {"tokens": ["at"], "token_logprobs": [-1.0]}},
    ],
)
def test_an_echo_that_does_not_fit_the_prompt_is_malformed(changes):
    def script(body, number):
        made = echo(body)
        made["choices"][0].update(changes)
        return Reply(body=made)

    answers, _ = asked(script, question("the cat", continuation=" sat"))
    assert [answer.error for answer in answers] == ["malformed answer"]


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (400, "This model's maximum context length is 8 tokens.", "longer than the context"),
        (400, "the prompt is too long", "longer than the context"),
        (400, "'max_tokens' or 'max_completion_tokens' is too large: 9", "longer than the context"),
        (413, "exceeds the maximum length", "longer than the context"),
        (400, "an  image\nis broken" + "!" * 300, "refused by the server: an image is broken" + "!" * 182),
        (422, "no such role", "refused by the server: no such role"),
        (413, "too large", "refused by the server: too large"),
        (400, "'max_tokens' is not supported with this model", None),
    ],
)
def test_a_request_that_the_server_refuses_is_answered_by_its_reason(status, message, error):
    answers, server = asked(lambda body, number: Reply(status=status, body=error_body(message)))
    assert answers == [Answer(model="a-model", error=error or f"refused by the server: {message}")]
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<html>no</html>", {"detail": [{"msg": "no"}]}, {"object": "error", "message": "no"}, b""])
def test_a_refusal_of_any_shape_is_understood(body):
    answer = answer_to(Reply(status=400, body=body))
    assert (answer.error or "").startswith("refused by the server: ")
    assert "no" in (answer.error or "")


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, ValueError, "does not let OPENAI_API_KEY use 'a-model' (HTTP 401: bad key)"),
        (403, ValueError, "does not let OPENAI_API_KEY use 'a-model' (HTTP 403: bad key)"),
        (404, ValueError, "has no 'a-model', or not at this address (HTTP 404: bad key); it has a-model, another-model"),
        (402, OSError, "does not answer (HTTP 402: bad key); answers so far are kept, run the command again to go on"),
    ],
)
def test_a_server_that_lets_nobody_in_stops_the_run_at_once(status, kind, words):
    with ScriptedServer(lambda body, number: Reply(status=status, body=error_body("bad key"))) as server:
        with pytest.raises(kind) as raised:
            list(Server("a-model", server.base_url, concurrency=1).answers([question()] * 3))
        assert str(raised.value) == f"the server at {server.base_url} {words}"
        assert len(server.requests) == 1


def test_a_wrong_address_is_named_even_where_nothing_lists_models():
    with ScriptedServer() as server, pytest.raises(ValueError, match=r"has no 'a-model', or not at this address \(HTTP 404"):
        list(Server("a-model", server.base_url.replace("/v1", "/v2")).answers([question()]))


@pytest.mark.parametrize("bad", [Reply(status=500), Reply(status=503), Reply(status=429), Reply(closed=True), Reply(delay=9)])
def test_what_may_pass_is_tried_again(bad):
    answers, server = asked(lambda body, number: bad if number < 2 else "so", timeout=0.5 if bad.delay else 60)
    assert [(answer.text, answer.error) for answer in answers] == [("so", None)]
    assert len(server.requests) == 3


@pytest.mark.parametrize("header", ["retry-after-ms", "Retry-After"])
def test_a_server_that_names_a_pause_gets_it(header):
    reply = Reply(status=429, headers={header: "300" if header.endswith("ms") else "0.3"})
    _, server = asked(lambda body, number: "so" if number else reply)
    assert 0.3 <= server.requests[1].time - server.requests[0].time < 2  # its own would be 0.01


def test_pauses_double(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.1)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 8)
    _, server = asked(lambda body, number: "so" if number > 2 else Reply(status=500))
    times = [request.time for request in server.requests]
    pauses = [after - before for before, after in pairwise(times)]
    assert all(pause >= 0.75 * planned for pause, planned in zip(pauses, (0.1, 0.2, 0.4), strict=True))  # up to 25 % less


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Reply(status=500, body=error_body("out of memory")), "HTTP 500: out of memory"),
        (Reply(status=429, body=error_body("quota"), headers={"Retry-After": "0"}), "HTTP 429: quota"),
        (Reply(delay=9), "nothing in 0.5 s"),
        (Reply(closed=True), "Server disconnected without sending a response."),
    ],
)
def test_a_server_that_does_not_recover_stops_the_run_and_says_how_to_go_on(bad, why):
    with ScriptedServer(lambda body, number: bad) as server:
        llm = Server("a-model", server.base_url, timeout=0.5 if bad.delay else 60, max_retries=2)
        with pytest.raises(OSError, match="does not answer") as raised:
            list(llm.answers([question()]))
        assert len(server.requests) == 3
    text = f"the server at {server.base_url} does not answer ({why}); answers so far are kept, run the command again to go on"
    assert str(raised.value) == text


def test_a_server_that_dies_stops_the_run_after_what_it_has_answered():
    with ScriptedServer(lambda body, number: str(number)) as server:
        answers = Server("a-model", server.base_url, concurrency=1, max_retries=1).answers([question()] * 9)
        assert [next(answers)[1].text for _ in range(3)] == ["0", "1", "2"]
        server.stop()
        with pytest.raises(OSError, match=r"does not answer \(All connection attempts failed\); answers so far are kept"):
            list(answers)


def test_answers_that_come_with_a_failure_are_given_before_it():
    def script(body, number):
        time.sleep(0.2 * body["seed"])
        return Reply(status=401, body=error_body("no")) if body["seed"] == 1 else "so"

    with ScriptedServer(script) as server:
        answers = Server("a-model", server.base_url, concurrency=3).answers(question(seed=seed) for seed in (1, 2, 0))
        assert next(answers)[0] == 2
        time.sleep(1)  # both others come meanwhile
        assert next(answers)[0] == 1
        with pytest.raises(ValueError, match="does not let"):
            next(answers)


MALFORMED = {
    "no JSON": Reply(body=b"Hello"),
    "HTML": Reply(body=b"<html></html>", headers={"Content-Type": "text/html"}),
    "nothing": Reply(body=b""),
    "not UTF-8": Reply(body=b'{"choices": "\xff"}'),
    "a list": Reply(body=[]),
    "null": Reply(body=b"null"),
    "NaN": Reply(body=b'{"choices": NaN}'),
    "deep": Reply(body=b"[" * 100_000),
    "no choices": Reply(body={}),
    "empty choices": Reply(body=completion(choices=[])),
    "choices of text": Reply(body=completion(choices=["so"])),
    "no message": Reply(body=completion(message=None)),
    "content null": Reply(body=completion(content=None)),
    "content of parts": Reply(body=completion(content=[{"type": "text", "text": "so"}])),
    "aborted": Reply(body=completion(finish_reason="abort")),
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_answer_is_asked_for_again_three_times_and_then_given_up(bad):
    answers, server = asked(lambda body, number: bad)
    assert answers == [Answer(input_tokens=4, model="a-model", error="malformed answer")]  # "Why?" is one token, sent 4 times
    assert len(server.requests) == 4
    answers, server = asked(lambda body, number: bad if number < 3 else "so")
    assert [(answer.text, answer.error) for answer in answers] == [("so", None)]


def test_an_answer_that_breaks_off_is_asked_for_again_and_then_given_up():
    answers, server = asked(lambda body, number: Reply(cut=True), max_retries=2)
    assert [answer.error for answer in answers] == ["malformed answer"]
    assert len(server.requests) == 3
    answers, server = asked(lambda body, number: Reply("so", cut=number < 2), max_retries=2)
    assert [(answer.text, answer.error) for answer in answers] == [("so", None)]


@pytest.mark.parametrize(
    ("bad", "last"),
    [(Reply(body=b"Hello"), "malformed answer"), (Reply(status=400, body=error_body("no")), "refused by the server: no")],
)
def test_twenty_answers_in_a_row_without_sense_stop_the_run(bad, last, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0)

    def script(body, number):
        return "so" if body["seed"] == 19 else bad

    requests = [question(seed=seed) for seed in range(60)]
    given = []
    with ScriptedServer(script) as server, pytest.raises(OSError, match="20 answers of 'a-model'") as raised:
        given.extend(Server("a-model", server.base_url, concurrency=1).answers(requests))
    assert str(raised.value).endswith(f"the last as: {last}; answers so far are kept, run the command again to go on")
    assert [number for number, _ in given] == list(range(40))  # 19, one that resets the count, and 20


def test_requests_are_taken_as_needed_and_no_more_than_the_concurrency_are_under_way():
    taken, most, under_way, lock = [], 0, 0, threading.Lock()

    def requests() -> Iterator[Request]:
        for number in range(12):
            taken.append(number)
            yield question(str(number))

    def script(body, number):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return body["messages"][0]["content"]

    with ScriptedServer(script) as server:
        answers = Server("a-model", server.base_url, concurrency=3).answers(requests())
        assert taken == []  # nothing before the first answer is wanted
        found = {}
        for number, answer in answers:
            found[number] = answer.text
            assert len(taken) <= len(found) + 3 - 1
    assert found == {number: str(number) for number in range(12)}
    assert most == 3


def test_a_late_answer_holds_up_no_other():
    with ScriptedServer(lambda body, number: Reply(delay=0.5 if body["seed"] == 0 else 0)) as server:
        requests = (question(seed=seed) for seed in range(6))
        order = [number for number, _ in Server("a-model", server.base_url, concurrency=2).answers(requests)]
    assert order[-1] == 0
    assert sorted(order) == list(range(6))


def test_nothing_is_reached_before_the_first_answer_is_wanted():
    with ScriptedServer() as server:
        answers = Server("a-model", server.base_url).answers(iter([question()]))
        time.sleep(0.05)
        assert server.requests == []
        assert len(list(answers)) == 1


def test_a_consumer_that_stops_leaves_no_thread_and_waits_for_nobody():
    threads = threading.active_count()
    with ScriptedServer(lambda body, number: Reply(delay=0 if body["seed"] == 0 else 60)) as server:
        answers = Server("a-model", server.base_url, concurrency=4).answers(question(seed=seed) for seed in range(9))
        assert next(answers)[0] == 0
        begun = time.monotonic()
        assert isinstance(answers, Iterator)
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - begun < 2
        assert not [thread for thread in threading.enumerate() if thread.name == "llm-server"]
    assert threading.active_count() == threads


def test_an_error_of_the_requests_ends_the_run_as_it_is():
    def requests() -> Iterator[Request]:
        yield question()
        raise LookupError("no more")

    with ScriptedServer(lambda body, number: Reply(delay=60)) as server, pytest.raises(LookupError, match="no more"):
        list(Server("a-model", server.base_url).answers(requests()))
    assert not [thread for thread in threading.enumerate() if thread.name == "llm-server"]


def test_an_interpreter_ends_with_answers_under_way():
    program = """
import sys
from datamodules.curation.prompts import Message
from datamodules.sample import Part
from lightning_modules.llm.interface import Request
from lightning_modules.llm.server import Server
requests = [Request((Message("user", (Part("text", "Why?"),)),), seed=seed) for seed in range(4)]
answers = Server("a-model", sys.argv[1]).answers(requests)
print(next(answers)[0])
"""
    with ScriptedServer(lambda body, number: Reply(delay=0 if body["seed"] == 0 else 60)) as server:
        command = [sys.executable, "-c", program, server.base_url]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_requests_keep_their_pace():
    _, server = asked(lambda body, number: "so", *[question()] * 5, requests_per_minute=600)
    times = [request.time for request in server.requests]
    assert times[4] - times[0] >= 0.35  # four pauses of 0.1 s, less what the first connection takes


@pytest.mark.parametrize(
    ("max_tokens", "num_read", "least", "most"),
    [
        (998, 20, 0.25, 5),  # two requests of 30 tokens, 5 ms each, which the estimates would make 10 s
        (8, 110, 1.15, 9),  # and of 120, which the estimates would make 0.1 s
    ],
)
def test_tokens_keep_their_pace_by_what_the_server_counts(max_tokens, num_read, least, most):
    usage = {"prompt_tokens": num_read, "completion_tokens": 10, "total_tokens": num_read + 10}
    request = question("x" * 8, sampling=Sampling(max_tokens=max_tokens))
    reply = Reply(body=completion(usage=usage))
    _, server = asked(lambda body, number: reply, *[request] * 3, tokens_per_minute=12_000, concurrency=1)
    assert least <= server.requests[2].time - server.requests[0].time < most


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    answers, server = asked(lambda body, number: Reply(status=400, body=error_body(f"no {KEY}, no")))
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert [answer.error for answer in answers] == ["refused by the server: no ***, no"]
    with pytest.raises(ValueError, match=r"HTTP 401: Incorrect API key provided: \*\*\*") as raised:
        answer_to(Reply(status=401, body=error_body(f"Incorrect API key provided: {KEY}")))
    answer_to(Reply(body=error_body(KEY)))
    llm = Server("a-model", "http://a/v1")
    assert KEY not in caplog.text + str(raised.value) + repr(vars(llm)) + llm.name
    assert raised.value.__suppress_context__
    assert not [record for record in caplog.records if record.name.startswith(("openai", "http"))]


def test_a_server_without_a_key_gets_a_dummy(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    _, server = asked(lambda body, number: "so")
    assert server.requests[0].headers["authorization"] == "Bearer no-key-is-set"


@pytest.mark.parametrize("key", ["sk-Ωsecret", "sk-\nsecret"])
def test_a_key_that_no_header_takes_is_refused_without_being_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters that no key has") as raised:
        list(Server("a-model", "http://127.0.0.1:1/v1").answers([question()]))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "base_url",
    [
        *("", "127.0.0.1:8000/v1", "ftp://a/v1", "http:///v1", "http://[::1", "http://a:99999/v1", "file:///etc/passwd"),
        *("http://user:secret@a/v1", "http://user@a/v1", "http://a/v1?key=secret", "http://a/v1#secret"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_being_shown(base_url):
    with pytest.raises(ValueError, match="base_url must be an address such as http") as raised:
        Server("a-model", base_url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"concurrency": 0}, {"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"timeout": 0}, {"timeout": math.nan}),
        *({"timeout": math.inf}, {"max_retries": -1}, {"model": ""}),
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments):
    with pytest.raises(ValueError, match="allowed: a name, counts >= 1, timeout > 0, max_retries >= 0"):
        Server(**{"model": "a-model", "base_url": "http://a/v1", **arguments})


def test_without_the_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    llm = Server("a-model", "http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[llm\]'"):
        list(llm.answers([question()]))


def test_the_scripted_server_counts_offsets_as_vllm_does():
    made = echo({"model": "a-model", "prompt": "the cat", "max_tokens": 1}, ["<s>", "the", " cat"])
    assert made["choices"][0]["logprobs"] == {
        "tokens": ["<s>", "the", " cat", " end"],
        "token_logprobs": [None, -1.5, -2.0, -2.0],
        "text_offset": [0, 3, 6, 10],
        "top_logprobs": None,
    }
    assert made["choices"][0]["text"] == "the cat end"
    assert json.loads(json.dumps(made)) == made
