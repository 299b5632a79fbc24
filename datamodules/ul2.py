"""UL2 corruption: a sequence of token ids to what an encoder reads of it and what a decoder writes.

Spans are taken out of the sequence. For the encoder a sentinel stands in the place of each, for the decoder each follows its
sentinel, so that both sides put together are the sequence. A prefix LM takes one span, the end of the sequence.

Source: UL2 (arXiv 2205.05131) for the mixture of denoisers, T5 (arXiv 1910.10683, section 3.1.4) for spans and sentinels. We
depart from T5 in that a sequence may begin with a span and end with a token that stays and in that numbers are rounded at
random, and from UL2 in that no token names the denoiser.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a sequence.

    Args:
        rate: Share of the tokens that is taken out, in (0, 1); at least one token is.
        mean_span: Mean length of the spans, in tokens; None takes the end of the sequence as one span (prefix LM).
        weight: Share of the sequences, relative to the other denoisers' weights.
    """

    rate: float
    mean_span: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or self.weight < 0:
            raise ValueError(f"a denoiser has rate {self.rate} and weight {self.weight}; allowed: in (0, 1), and at least 0")
        shortest = max(1.0, round(self.rate / (1 - self.rate), 6))  # with one token between any two spans
        if self.mean_span is not None and not self.mean_span >= shortest:
            raise ValueError(
                f"a denoiser has mean_span {self.mean_span} at rate {self.rate}; its spans could not lie apart, "
                f"make it at least {shortest:g}, or null for one span at the end"
            )

    def counts(self, length: int, random: np.random.Generator) -> tuple[int, int]:
        """How many of so many tokens are taken out, and in how many spans: rounded at random, so that both hold on average."""
        num_taken = max(1, int(self.rate * length + random.random()))
        if self.mean_span is None:
            return num_taken, 1
        num_spans = max(1, int(num_taken / self.mean_span + random.random()))
        return num_taken, min(num_spans, length - num_taken + 1)  # a token that stays lies between two of them

    def most_spans(self, length: int) -> int:
        """The largest number of spans in so many tokens."""
        return 1 if self.mean_span is None else math.ceil(math.ceil(self.rate * length) / self.mean_span)


def _mixture() -> dict[str, Denoiser]:
    """The tasks that T5Gemma 2 (arXiv 2512.14856) is trained on."""
    spans = ((3, 0.15), (12, 0.5), (32, 0.15), (32, 0.5))
    named = {f"spans-{mean}-{100 * rate:.0f}": Denoiser(rate, mean) for mean, rate in spans}
    return {**named, "prefix": Denoiser(0.25, weight=4.0)}


@dataclass(frozen=True)
class UL2Config:
    """What a step's texts become.

    Args:
        sequence_length: Tokens of a sequence, in which documents lie end to end. Our choice.
        first_sentinel: Token id of the first sentinel, which the others follow. None takes the entries that the tokenizer keeps
            in reserve (`<unused0>`, `<extra_id_0>`, ..), and where it has none the ids behind its last.
        denoisers: Name to denoiser.
    """

    sequence_length: int = 512
    first_sentinel: int | None = None
    denoisers: dict[str, Denoiser] = field(default_factory=_mixture)

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"ul2.sequence_length is {self.sequence_length}; it must be at least 1")
        if not any(denoiser.weight for denoiser in self.denoisers.values()):
            raise ValueError("no denoiser has a weight above 0; give at least one in data.ul2.denoisers")

    @property
    def num_sentinels(self) -> int:
        """Most spans of a sequence."""
        return max(denoiser.most_spans(self.sequence_length) for denoiser in self.denoisers.values())

    @property
    def shares(self) -> np.ndarray:
        """Share of the sequences of each denoiser."""
        weights = np.array([denoiser.weight for denoiser in self.denoisers.values()])
        return weights / weights.sum()


class Corrupted(NamedTuple):
    """Both sides of a sequence, int64, without begin and end: what stays, with sentinels; and each sentinel with its span."""

    encoder_ids: np.ndarray
    decoder_ids: np.ndarray


def corrupt(token_ids: np.ndarray, denoiser: Denoiser, sentinels: Sequence[int], random: np.random.Generator) -> Corrupted:
    """A sequence with spans taken out; all ways to place spans of that number and total length are equally likely.

    Args:
        token_ids: The sequence (L,), at least one token.
        denoiser: How many tokens, in how many spans.
        sentinels: Token ids that stand for the first span, the second, ..; `most_spans` of them.
        random: Where the spans come from.

    Raises:
        ValueError: The sequence holds a sentinel.
    """
    num_taken, num_spans = denoiser.counts(len(token_ids), random)
    marks = np.asarray(sentinels[:num_spans], np.int64)
    assert len(marks) == num_spans
    if (met := np.isin(token_ids, sentinels)).any():
        raise ValueError(f"a text comes to token {token_ids[met][0]}, a sentinel; set data.ul2.first_sentinel to unused ids")
    num_kept = len(token_ids) - num_taken
    if denoiser.mean_span is None:
        kept_before = np.array([num_kept])
    else:
        kept_before = np.sort(random.choice(num_kept + 1, num_spans, replace=False))
    lengths = _parts(num_taken, num_spans, random)
    taken_before = lengths.cumsum() - lengths
    places = np.arange(num_taken) + np.repeat(kept_before, lengths)
    return Corrupted(
        np.insert(np.delete(token_ids, places), kept_before, marks), np.insert(token_ids[places], taken_before, marks)
    )


def _parts(total: int, number: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of so many parts of a total, each at least 1; all ways to cut it are equally likely."""
    cuts = np.sort(random.choice(total - 1, number - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
