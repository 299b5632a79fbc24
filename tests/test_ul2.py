"""Promises of the UL2 corruption: nothing is lost, rate and span length hold on average, one seed makes one corruption."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.order import generator
from datamodules.ul2 import Denoiser, UL2Config, corrupt

FIRST = 1000
SENTINELS = range(FIRST, FIRST + 600)
MIXTURE = UL2Config().denoisers
denoisers = st.sampled_from([*MIXTURE.values(), Denoiser(0.5, 1), Denoiser(0.6, 1.5), Denoiser(0.9, 9), Denoiser(0.99)])


def spans_of(decoder_ids: np.ndarray) -> list[list[int]]:
    """What follows each sentinel, which must come in order."""
    spans: list[list[int]] = []
    for token_id in decoder_ids.tolist():
        if token_id >= FIRST:
            assert token_id == FIRST + len(spans)
            spans.append([])
        else:
            spans[-1].append(token_id)
    return spans


def put_together(encoder_ids: np.ndarray, decoder_ids: np.ndarray) -> list[int]:
    """The encoder's side with each sentinel replaced by its span."""
    spans = spans_of(decoder_ids)
    assert [token_id for token_id in encoder_ids.tolist() if token_id >= FIRST] == list(range(FIRST, FIRST + len(spans)))
    whole = []
    for token_id in encoder_ids.tolist():
        whole += spans[token_id - FIRST] if token_id >= FIRST else [token_id]
    return whole


@given(st.integers(1, 3) | st.integers(1, 600), denoisers, st.integers(0, 2**32))
def test_both_sides_together_are_the_sequence(length, denoiser, seed):
    token_ids = np.random.default_rng(seed).integers(0, FIRST, length)
    sides = corrupt(token_ids, denoiser, SENTINELS, np.random.default_rng(seed))
    assert put_together(*sides) == token_ids.tolist()
    spans = spans_of(sides.decoder_ids)
    assert all(spans)
    assert len(spans) <= denoiser.most_spans(length)
    assert not any(a >= FIRST and b >= FIRST for a, b in zip(sides.encoder_ids, sides.encoder_ids[1:], strict=False))
    assert sides.encoder_ids.dtype == sides.decoder_ids.dtype == np.int64


def test_spans_lie_apart_however_their_numbers_are_rounded():
    random = np.random.default_rng(0)
    for length in [*range(1, 30)] * 20:
        sides = corrupt(np.arange(length), Denoiser(0.6, 1.5), SENTINELS, random)
        assert put_together(*sides) == list(range(length))


@pytest.mark.parametrize("name", MIXTURE)
@pytest.mark.parametrize("length", [512, 100])
def test_rate_and_mean_span_hold_on_average(name, length):
    denoiser, random = MIXTURE[name], np.random.default_rng(0)
    found = [spans_of(corrupt(np.arange(length), denoiser, SENTINELS, random).decoder_ids) for _ in range(2000)]
    taken = np.array([sum(map(len, spans)) for spans in found])
    assert abs(taken.mean() / length - denoiser.rate) < 0.0005
    if denoiser.mean_span is None:
        assert {len(spans) for spans in found} == {1}
    elif denoiser.rate * length > denoiser.mean_span:  # of fewer tokens one span is all there can be
        assert taken.sum() / sum(map(len, found)) == pytest.approx(denoiser.mean_span, rel=0.02)


def test_a_prefix_lm_reads_the_first_share_and_writes_the_rest():
    encoder_ids, decoder_ids = corrupt(np.arange(100), MIXTURE["prefix"], SENTINELS, np.random.default_rng(0))
    assert encoder_ids.tolist() == [*range(75), FIRST]
    assert decoder_ids.tolist() == [FIRST, *range(75, 100)]


@pytest.mark.parametrize(("length", "denoiser", "num_places"), [(5, Denoiser(0.4, 2), 4), (4, Denoiser(0.5, 1), 3)])
def test_every_place_of_the_spans_is_equally_likely(length, denoiser, num_places):
    random = np.random.default_rng(0)
    found = Counter(tuple(corrupt(np.arange(length), denoiser, SENTINELS, random).encoder_ids) for _ in range(4000))
    assert len(found) == num_places
    assert all(abs(number / 4000 - 1 / num_places) < 0.03 for number in found.values())  # four standard deviations


def test_the_lengths_of_spans_differ():
    spans = spans_of(corrupt(np.arange(512), MIXTURE["spans-12-50"], SENTINELS, np.random.default_rng(0)).decoder_ids)
    assert len(set(map(len, spans))) > 5


@pytest.mark.parametrize("name", MIXTURE)
def test_the_same_seed_corrupts_the_same_way_and_another_does_not(name):
    def sides(seed: int, step: int):
        both = corrupt(np.arange(101), MIXTURE[name], SENTINELS, generator(seed, "denoising", step))
        return [ids.tolist() for ids in both]

    assert sides(0, 7) == sides(0, 7)
    if name != "prefix":
        assert sides(0, 7) not in (sides(1, 7), sides(0, 8))


def test_the_mixture_is_that_of_t5gemma_2():
    found = {(denoiser.mean_span, denoiser.rate, denoiser.weight) for denoiser in MIXTURE.values()}
    assert found == {(3, 0.15, 1), (12, 0.5, 1), (32, 0.15, 1), (32, 0.5, 1), (None, 0.25, 4)}
    assert UL2Config().shares.tolist() == [0.125, 0.125, 0.125, 0.125, 0.5]


def test_a_text_that_comes_to_a_sentinel_is_refused():
    with pytest.raises(ValueError, match=r"a text comes to token 1003, a sentinel; set data.ul2.first_sentinel"):
        corrupt(np.array([1, 1003, 2]), MIXTURE["prefix"], SENTINELS, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoiser(0.0), "a denoiser has rate 0.0"),
        (lambda: Denoiser(1.0, 3), "a denoiser has rate 1.0"),
        (lambda: Denoiser(0.5, 3, -1), "weight -1"),
        (lambda: Denoiser(0.5, 0.5), "make it at least 1,"),
        (lambda: Denoiser(0.9, 3), "its spans could not lie apart, make it at least 9, or null"),
        (lambda: UL2Config(0), "ul2.sequence_length is 0"),
        (lambda: UL2Config(denoisers={}), "no denoiser has a weight above 0"),
        (lambda: UL2Config(denoisers={"a": Denoiser(0.5, weight=0)}), "no denoiser has a weight above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
