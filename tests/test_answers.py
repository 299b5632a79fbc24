"""Promises of kept answers: paid once, whole after any end, of one model, within the budget."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from llms import Scripted

from datamodules.curation.prompts import Message
from datamodules.sample import Part
from lightning_modules.llm.answers import Answers, Budget, BudgetSpentError
from lightning_modules.llm.interface import MALFORMED, Answer, Request, Sampling

ROOT = Path(__file__).parent.parent


def request(text: str, **more) -> Request:
    return Request((Message("user", (Part("text", text),)),), **more)


def echo(asked: Request) -> Answer:
    return Answer(asked.messages[0].text.upper(), input_tokens=3, output_tokens=2)


def ask(folder: Path, llm: Scripted, texts: str, budget: Budget = Budget()) -> list[Answer]:  # noqa: B008
    answers = Answers(folder, llm, budget, [0])
    with answers.of_block(0) as block:
        return block.ask([request(text) for text in texts])


def test_answers_come_in_order_and_equal_requests_are_paid_once(tmp_path):
    llm = Scripted(echo)
    assert [answer.text for answer in ask(tmp_path, llm, "abcab")] == list("ABCAB")
    assert len(llm.asked) == 3
    again = Scripted(echo)
    assert [answer.text for answer in ask(tmp_path, again, "cbd")] == list("CBD")
    assert [asked.messages[0].text for asked in again.asked] == ["d"]


@pytest.mark.parametrize(
    "other",
    [
        request("a", seed=1),
        request("a", sampling=Sampling(temperature=0.1)),
        request("a", schema={}),
        request("a", continuation="x"),
        request("b"),
        Request((Message("system", (Part("text", "a"),)),)),
        Request((Message("user", (Part("code", "a"),)),)),
        Request((Message("user", (Part("image", b"a", "png"),)),)),
    ],
)
def test_what_changes_an_answer_changes_the_request(other):
    assert other.key != request("a").key


def test_sampling_changes_no_likelihood():
    likelihoods = [request("a", continuation="x", seed=n, sampling=Sampling(temperature=n)) for n in (0, 1)]
    assert likelihoods[0].key == likelihoods[1].key


def test_another_llm_is_asked_anew(tmp_path):
    ask(tmp_path, Scripted(echo), "a")
    other = Scripted(echo, name="other", model="other")
    ask(tmp_path, other, "a")
    assert len(other.asked) == 1


def test_a_model_that_changed_is_refused_and_its_answer_not_kept(tmp_path):
    ask(tmp_path, Scripted(echo), "a")
    with pytest.raises(ValueError, match=r"scripted answers as 'n' now, but its answers in .* are of 'm'; they are not mixed"):
        ask(tmp_path, Scripted(echo, model="n"), "ab")
    assert len((tmp_path / "000000.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_line_that_a_kill_cut_off_is_asked_again(tmp_path, cut):
    ask(tmp_path, Scripted(echo), "abc")
    file = tmp_path / "000000.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    lines = file.read_bytes().count(b"\n")
    again = Scripted(echo)
    assert [answer.text for answer in ask(tmp_path, again, "abc")] == list("ABC")
    assert len(again.asked) == 3 - lines
    assert sorted(json.loads(line)["text"] for line in file.read_text().splitlines()) == list("ABC")


def test_a_damaged_line_is_named(tmp_path):
    ask(tmp_path, Scripted(echo), "ab")
    file = tmp_path / "000000.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=r"000000.jsonl, line 1 is damaged"):
        ask(tmp_path, Scripted(echo), "ab")


def test_what_was_answered_before_the_llm_died_is_kept(tmp_path):
    with pytest.raises(OSError, match="does not answer"):
        ask(tmp_path, Scripted(echo, dies_after=2), "abcd")
    again = Scripted(echo)
    ask(tmp_path, again, "abcd")
    assert len(again.asked) == 2


@pytest.mark.parametrize(
    ("error", "tokens", "times"), [("cut off", 7, 1), ("longer than the context", 0, 2), (MALFORMED, 7, 2)]
)
def test_errors_are_kept_when_they_cost_something_and_would_come_again(tmp_path, error, tokens, times):
    llm = Scripted(lambda asked: Answer(error=error, input_tokens=tokens))
    for _ in range(2):
        assert ask(tmp_path, llm, "a")[0].error == error
    assert len(llm.asked) == times


def test_what_malformed_answers_cost_counts_in_later_runs_too(tmp_path):
    llm = Scripted(lambda asked: Answer(error=MALFORMED, input_tokens=100))
    for _ in range(3):
        ask(tmp_path, llm, "a")
    assert Answers(tmp_path, llm, Budget(), [0]).spending.input_tokens == 300


def test_a_likelihood_that_is_not_finite_is_an_error(tmp_path):
    llm = Scripted(lambda asked: Answer(log_likelihood=float("-inf"), input_tokens=1))
    for _ in range(2):
        assert ask(tmp_path, llm, "a")[0].error == "no finite likelihood"
    assert len(llm.asked) == 1


def test_an_error_that_no_model_answered_is_no_other_model(tmp_path):
    assert ask(tmp_path, Scripted(lambda asked: Answer(error="e", input_tokens=1), model=""), "a")[0].error == "e"
    assert [answer.error for answer in ask(tmp_path, Scripted(echo), "ab")] == ["e", None]


def test_a_block_belongs_to_one_process(tmp_path):
    answers = Answers(tmp_path, Scripted(echo), Budget(), [])
    with answers.of_block(3), pytest.raises(ValueError, match=r"another process is at work on .*000003.jsonl"):
        answers.of_block(3).__enter__()


def test_a_budget_in_tokens_is_never_exceeded_and_goes_on_when_raised(tmp_path):
    def counted(asked: Request) -> Answer:
        return Answer("x", input_tokens=len(asked.messages[0].text), output_tokens=random.Random(asked.key).randint(1, 512))

    texts = [chr(n) for n in range(97, 117)]
    for budget in (700, 2000, 3000):
        llm = Scripted(counted)
        with pytest.raises(BudgetSpentError, match=r"does not cover another request: .* is kept in .* again"):
            ask(tmp_path, llm, "".join(texts), Budget(max_tokens=budget))
        lines = [json.loads(line) for line in (tmp_path / "000000.jsonl").read_text().splitlines()]
        spent = sum(line["input_tokens"] + line["output_tokens"] for line in lines)
        assert budget - 577 < spent <= budget  # a byte, 64 for the message, and 512 written are set aside for the next one
    ask(tmp_path, Scripted(counted), "".join(texts))
    lines = [json.loads(line)["key"] for line in (tmp_path / "000000.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 20


def test_what_requests_under_way_may_take_is_set_aside(tmp_path):
    class Eager(Scripted):
        def answers(self, requests):
            taken = list(requests)
            self.taken = len(taken)
            yield from super().answers(taken)

    llm = Eager(echo)
    with pytest.raises(BudgetSpentError):
        ask(tmp_path, llm, "abcdef", Budget(max_tokens=2 * 577))
    assert llm.taken == 2
    assert len(llm.asked) == 2


def test_a_budget_in_money(tmp_path):
    budget = Budget(max_cost=10.0, input_price=1_000_000.0, output_price=100_000.0)  # an answer costs 3 + 0.2
    llm = Scripted(echo)
    with pytest.raises(BudgetSpentError, match=r"tokens read and 0 written, 0.00 paid"):
        ask(tmp_path, llm, "abc", budget)  # 65 are set aside for reading
    answers = Answers(tmp_path / "n", llm, Budget(max_cost=120.0, input_price=1e6, output_price=1e5), [])
    with (
        answers.of_block(0) as block,
        pytest.raises(BudgetSpentError, match=r"1 answers of 3 tokens read and 2 written, 3.20 paid"),
    ):
        block.ask([request("a"), request("b" * 60)])
    for wrong, message in (({"max_cost": 1.0}, "needs the prices"), ({"max_tokens": -1}, "may be negative")):
        with pytest.raises(ValueError, match=message):
            Budget(**wrong)  # type: ignore[arg-type]


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from llms import Scripted
from test_answers import echo, request
from lightning_modules.llm.answers import Answers, Budget
def slow(asked):
    time.sleep(0.004)
    return echo(asked)
with Answers(Path({folder!r}), Scripted(slow), Budget(), [0]).of_block(0) as block:
    print("begun", flush=True)
    block.ask([request(str(n)) for n in range(60)])
    print("done", flush=True)
"""


def test_killed_at_any_moment_the_answers_are_the_same_set_and_none_twice(tmp_path):
    chance, kills, said = random.Random(0), 0, ""
    while "done" not in said:
        code = KILLED.format(root=str(ROOT), folder=str(tmp_path))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            process.wait(chance.uniform(0.02, 0.12) if kills < 4 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        said += process.stdout.read()
        process.stdout.close()
        process.wait()
    assert kills > 1
    lines = [json.loads(line) for line in (tmp_path / "000000.jsonl").read_text().splitlines()]
    assert sorted(int(line["text"]) for line in lines) == list(range(60))
    assert len({line["key"] for line in lines}) == 60
