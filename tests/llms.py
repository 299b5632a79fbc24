"""An LLM that answers from a function, for tests of what is done with answers; servers and models have tests of their own."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datamodules.curation.prompts import Prompt
from lightning_modules.llm.interface import LLM, Answer, Request


class Scripted(LLM):
    """Answers `script(request)`: an Answer, a text, or what is said in JSON; of a continuation its log-likelihood.

    Args:
        script: What it says.
        name: What answers are kept under.
        model: What it says has answered.
        dies_after: Answers after which it cannot be reached.
    """

    def __init__(
        self, script: Callable[[Request], Any], *, name: str = "scripted", model: str = "m", dies_after: int | None = None
    ) -> None:
        self.script, self._name, self.model, self.dies_after = script, name, model, dies_after
        self.asked: list[Request] = []

    @property
    def name(self) -> str:
        return self._name

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        for number, request in enumerate(requests):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise OSError("the server does not answer")
            self.asked.append(request)
            said = self.script(request)
            if not isinstance(said, Answer):
                if request.continuation is not None:
                    said = Answer(log_likelihood=said, num_scored=1, input_tokens=10)
                else:
                    said = Answer(said if isinstance(said, str) else json.dumps(said), input_tokens=10, output_tokens=5)
            yield number, Answer(**{**said.__dict__, "model": self.model})


def shown(request: Request, before: str, after: str = "\n") -> str:
    """What stands in the last message between two texts."""
    return request.messages[-1].text.partition(before)[2].partition(after)[0]


def prompt(**fields: Any) -> Prompt:
    """A prompt without a file."""
    return Prompt("p", "0" * 64, **fields)
