"""What an LLM is asked and what it answers, whether it runs in this process or behind a server."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.curation.prompts import Message

MALFORMED = "malformed answer"  # the one error that may be gone when the same is asked again


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Args:
        max_tokens: Most tokens of it; one that is cut off there is of no use.
        temperature: 0 takes the most probable token each time.
        top_p: Draws from the fewest tokens that have this probability together.
    """

    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}; allowed: max_tokens >= 1, temperature >= 0, 0 < top_p <= 1")


@dataclass(frozen=True)
class Request:
    """One question.

    Args:
        messages: The conversation, which ends with the user's turn.
        sampling: How the answer is drawn.
        seed: Of the drawing; a request that is made again has another one.
        schema: JSON schema that the answer must follow, for backends that can hold a model to it.
        continuation: Text whose log-likelihood after the messages' texts is wanted, instead of an answer. The messages' texts
            then stand one after another as they are, two line feeds between them, without a chat template.
    """

    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    seed: int = 0
    schema: Mapping[str, Any] | None = None
    continuation: str | None = None

    @property
    def key(self) -> str:
        """A hash of all of it: equal requests have one answer."""
        messages = [[message.role, [_part_key(part.kind, part.data) for part in message.parts]] for message in self.messages]
        drawn = None if self.continuation is not None else [self.sampling.__dict__, self.seed, self.schema]
        asked = json.dumps([messages, drawn, self.continuation], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def prefix(self) -> str:
        """The messages' texts as a continuation meets them."""
        return "\n\n".join(message.text for message in self.messages)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text: The answer, empty for a continuation.
        log_likelihood: Of a continuation: the sum over its tokens, in nats.
        num_scored: How many tokens that were.
        input_tokens: Tokens read.
        output_tokens: Tokens written.
        model: What the backend says has answered.
        error: Why this request has no answer ("longer than the context", "cut off", `MALFORMED`, ..), or None.
    """

    text: str = ""
    log_likelihood: float | None = None
    num_scored: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    model: str = ""
    error: str | None = None


class LLM(ABC):
    """A large language model. Nothing is loaded or reached before the first request."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What its answers are kept under: the model and everything else of it that changes answers."""

    @abstractmethod
    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers as they come, each with its request's number; requests are taken from the iterable only as needed.

        Raises:
            ValueError: It cannot answer requests of this kind at all.
            OSError: It cannot be reached, or no longer.
        """


def _part_key(kind: str, data: str | bytes) -> list[str]:
    return [kind, data if isinstance(data, str) else hashlib.sha256(data).hexdigest()]
