"""Questions about many records, asked until their answers can be used: JSON that fits its schema, likelihoods, grades."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.curation.prompts import Prompt, UnusableAnswerError, Value, filled, text_of
from datamodules.order import generator
from lightning_modules.llm.answers import BlockAnswers
from lightning_modules.llm.interface import Request, Sampling

Found = dict[str, Any] | UnusableAnswerError


def ask(
    prompt: Prompt,
    values: Sequence[Mapping[str, Value]],
    keys: Sequence[str],
    answers: BlockAnswers,
    *,
    sampling: Sampling,
    seed: int,
    attempts: int,
) -> list[Found]:
    """What an LLM says of records.

    Args:
        prompt: What is asked.
        values: Of each record, for the prompt's fields.
        keys: Of each record, different ones; they and `seed` say how its answer is drawn.
        answers: Kept ones, and the LLM.
        sampling: How answers are drawn.
        seed: Of the job.
        attempts: How often an answer of no use is asked for anew, with another seed, the first time included.

    Returns:
        Of each record the answer's fields; `{"log_likelihood", "num_tokens"}` of a continuation; `{"grade", "probabilities"}`
        of grades; or why there is none.
    """
    if prompt.continuation is not None:
        return _likelihoods(prompt, values, answers)
    if prompt.grades is not None:
        return _grades(prompt, values, answers)
    found: list[Found] = [UnusableAnswerError("", "not asked")] * len(values)
    left = list(range(len(values)))
    for attempt in range(attempts):
        seeds = [int(generator(seed, keys[n], attempt).integers(2**31)) for n in left]
        requests = [
            Request(prompt.messages(values[n]), sampling, own, prompt.schema) for n, own in zip(left, seeds, strict=True)
        ]
        again = []
        for n, answer in zip(left, answers.ask(requests), strict=True):
            try:
                if answer.error is not None:
                    raise UnusableAnswerError(answer.text[:199], answer.error)
                found[n] = prompt.parse(answer.text, values[n])
            except UnusableAnswerError as error:
                found[n] = error
                again.append(n)
        left = again
    return found


def _likelihoods(prompt: Prompt, values: Sequence[Mapping[str, Value]], answers: BlockAnswers) -> list[Found]:
    assert prompt.continuation is not None
    texts = [text_of(filled(prompt.continuation, own)) for own in values]
    requests = [Request(prompt.messages(own), continuation=text) for own, text in zip(values, texts, strict=True)]
    return [
        UnusableAnswerError("", answer.error)
        if answer.error is not None
        else {"log_likelihood": answer.log_likelihood, "num_tokens": answer.num_scored}
        for answer in answers.ask(requests)
    ]


def _grades(prompt: Prompt, values: Sequence[Mapping[str, Value]], answers: BlockAnswers) -> list[Found]:
    """The expected grade, over the probabilities of the grades' texts after the messages.

    Source: Zhuang et al. 2024, "Beyond Yes and No" (arXiv 2310.14122), expected relevance.
    """
    assert prompt.grades is not None
    texts, grades = list(prompt.grades), list(prompt.grades.values())
    asked = answers.ask([Request(prompt.messages(own), continuation=text) for own in values for text in texts])
    found: list[Found] = []
    for first in range(0, len(asked), len(texts)):
        own = asked[first : first + len(texts)]
        error = next((answer.error for answer in own if answer.error is not None), None)
        if error is not None:
            found.append(UnusableAnswerError("", error))
            continue
        scores = [answer.log_likelihood or 0.0 for answer in own]
        weights = [math.exp(score - max(scores)) for score in scores]
        probabilities = [weight / sum(weights) for weight in weights]
        grade = sum(probability * grade for probability, grade in zip(probabilities, grades, strict=True))
        found.append({"grade": grade, "probabilities": dict(zip(texts, probabilities, strict=True))})
    return found
