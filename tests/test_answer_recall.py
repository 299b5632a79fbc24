"""Promises of R@5kt: the tokens, the cut and the substrings of the official evaluation, on cases worked by hand."""

import re
from collections.abc import Iterator

import pytest

from lightning_modules.answer_recall import answer_recall, tokens_of


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Tokyo (東京) is the capital.", "Tokyo ( 東京 ) is the capital ."),
        ("Japan's 1,234 people; it isn't small!", "Japan 's 1,234 people ; it is n't small !"),
        ("At 10:30, he paid $3.14 - half.", "At 10:30 , he paid $ 3.14 - half ."),
        ("well-known and/or so--called", "well-known and/or so -- called"),
        ("J. R. Smith left the U.S. in May", "J. R. Smith left the U.S. in May"),
        ("He left the U.S.", "He left the U.S ."),
        ("one. Two... three", "one . Two ... three"),
        ("O'Neill said \"yes\": they'll go", "O'Neill said \" yes \" : they 'll go"),
        ("DON'T", "DO N'T"),
        ("", ""),
    ],
)
def test_texts_fall_into_tokens(text: str, tokens: str) -> None:
    assert list(tokens_of(text)) == tokens.split()


def test_an_answer_counts_where_it_is_a_substring_of_the_joined_tokens() -> None:
    passages = ["Tokyo is the capital of Japan.", "It grew from Edo."]
    assert answer_recall(passages, ["capital of Japan"]) == 1.0
    assert answer_recall(passages, ["Edo"]) == 1.0
    assert answer_recall(passages, ["Kyoto", "Edo"]) == 1.0
    assert answer_recall(passages, ["Kyoto"]) == 0.0
    assert answer_recall(passages, ["tokyo"]) == 0.0  # letter by letter
    assert answer_recall(passages, ["apital"]) == 1.0  # within a word, too
    assert answer_recall(passages, ["Japan ."]) == 1.0
    assert answer_recall(passages, ["Japan."]) == 0.0  # the answer is not tokenised
    assert answer_recall(passages, ["Japan . It grew"]) == 1.0  # over the end of a passage


def test_only_the_first_tokens_count() -> None:
    passages = ["a b c", "d e f"]
    for number, token in enumerate("abcdef", 1):
        assert answer_recall(passages, [token], max_tokens=number) == 1.0
        assert answer_recall(passages, [token], max_tokens=max(1, number - 1)) == (1.0 if number == 1 else 0.0)
    assert answer_recall(passages, ["d e"], max_tokens=5) == 1.0
    assert answer_recall(passages, ["d e"], max_tokens=4) == 0.0


def test_the_default_is_five_thousand_tokens() -> None:
    assert answer_recall(["word " * 4999, "here there"], ["here"]) == 1.0
    assert answer_recall(["word " * 4999, "here there"], ["there"]) == 0.0


def test_no_more_texts_are_taken_than_needed() -> None:
    taken: list[int] = []

    def ranked() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield f"text {number}"

    assert answer_recall(ranked(), ["text 2"]) == 1.0
    assert taken == [0, 1, 2]
    taken.clear()
    assert answer_recall(ranked(), ["none"], max_tokens=5) == 0.0
    assert taken == [0, 1, 2]
    taken.clear()
    assert answer_recall(ranked(), ["none"], max_tokens=4) == 0.0
    assert taken == [0, 1]


def test_empty_texts_and_few_texts_are_no_answer() -> None:
    assert answer_recall([], ["a"]) == 0.0
    assert answer_recall(["", "a"], ["a"]) == 1.0
    assert answer_recall(["b", "", "c"], ["b c"]) == 1.0


@pytest.mark.parametrize(("answers", "tokens", "said"), [([], 5, "the answers are []"), ([""], 5, "['']"), (["a"], 0, "is 0")])
def test_what_cannot_be_judged_is_refused(answers: list[str], tokens: int, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        answer_recall(["a"], answers, tokens)
