"""The ranks of relevant candidates among all others: exact, by candidates in chunks, in memory that a setting bounds.

Letters: Q queries, N candidates of a chunk, D width (a prefix), R judged pairs, K depth, L shortlist.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_modules.encoder.embedder import cut
from lightning_modules.neighbours import highest
from lightning_modules.precision import Dtype, asked, stored
from lightning_modules.vectors import Chunk

MAX_SCORES = 2**24  # that exist at a time: 64 MiB; our choice
SHORTLIST = 4  # candidates for each of the depth that are compared again (binary_rescored), as sentence-transformers has it


class Relevance(NamedTuple):
    """Which candidates are relevant to which query: R pairs, none twice.

    Args:
        query: Numbers of queries (R,) int64.
        candidate: Positions of candidates, as chunks name them (R,) int64.
        gain: How relevant (R,) float64, above 0.
    """

    query: np.ndarray
    candidate: np.ndarray
    gain: np.ndarray


@torch.inference_mode()
def ranks(
    query_QD: Tensor,
    chunks: Iterable[Chunk],
    relevance: Relevance,
    *,
    width: int,
    depth: int,
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """The rank of each relevant candidate (R,) int64, from 1; exact up to the depth, and beyond it some number above it.

    Of candidates with equal scores the relevant come last, and of these the less relevant first, so that an encoder that
    tells nothing apart scores nothing.

    Args:
        query_QD: Unit vectors.
        chunks: All candidates, positions ascending; one chunk is in memory at a time.
        relevance: Whose ranks.
        width: The prefix.
        depth: Up to which ranks matter.
        dtype: How candidates are stored. `binary_rescored` makes a shortlist by Hamming distance, and orders it by the products
            of fp32 queries with the same bits.
        device: Where they are compared.
    """
    unit_QD = cut(query_QD.to(device, torch.float32), width)
    find = _rescored if dtype == "binary_rescored" else _scored
    score_R, best_QK = find(unit_QD, _pieces(chunks, relevance, width, dtype, device), relevance, depth, dtype)
    order_R = np.lexsort((relevance.gain, -score_R, relevance.query))
    ordered = relevance.query[order_R]
    num_before = (best_QK[torch.from_numpy(ordered)] >= torch.from_numpy(score_R[order_R])[:, None]).sum(1).numpy()
    is_first = np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
    of_query = np.arange(len(ordered)) - np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
    found = np.where(np.isneginf(score_R[order_R]), depth + 1, num_before + of_query + 1)
    return found[order_R.argsort()]


class _Piece(NamedTuple):
    """Stored vectors of a chunk (N, D), and of the pairs whose candidates they hold which they are (P,), and where (P,)."""

    stored_ND: Tensor
    pair: np.ndarray
    column: np.ndarray


def _pieces(
    chunks: Iterable[Chunk], relevance: Relevance, width: int, dtype: Dtype, device: str | torch.device
) -> Iterator[_Piece]:
    order = np.argsort(relevance.candidate, kind="stable")
    candidates = relevance.candidate[order]
    for chunk in chunks:
        if not len(chunk.positions):
            continue
        low, high = np.searchsorted(candidates, [chunk.positions[0], chunk.positions[-1] + 1])
        column = np.searchsorted(chunk.positions, candidates[low:high])
        unit_ND = cut(torch.from_numpy(np.array(chunk.vectors, np.float32)).to(device), width)
        yield _Piece(stored(unit_ND, dtype), order[low:high], column)


def _rows(num_queries: int, num_columns: int) -> Iterator[slice]:
    """Queries that are scored together."""
    step = max(1, MAX_SCORES // num_columns)
    return (slice(first, min(num_queries, first + step)) for first in range(0, num_queries, step))


def _within(rows: slice, piece: _Piece, relevance: Relevance) -> tuple[np.ndarray, Tensor, Tensor]:
    """Of a piece's pairs those of some queries: which, and their rows and columns."""
    query = relevance.query[piece.pair]
    own = (query >= rows.start) & (query < rows.stop)
    return piece.pair[own], torch.from_numpy(query[own] - rows.start), torch.from_numpy(piece.column[own])


def _scored(
    unit_QD: Tensor, pieces: Iterable[_Piece], relevance: Relevance, depth: int, dtype: Dtype
) -> tuple[np.ndarray, Tensor]:
    """Scores of the relevant (R,), and the highest of the others of each query (Q, K)."""
    asked_QD = asked(unit_QD, dtype)
    score_R = np.full(len(relevance.query), -np.inf, np.float32)
    best_QK = torch.full((len(unit_QD), depth), -torch.inf, device=unit_QD.device)
    for piece in pieces:
        for rows in _rows(len(unit_QD), len(piece.stored_ND)):
            score_QN = asked_QD[rows] @ piece.stored_ND.T
            pair, row, column = _within(rows, piece, relevance)
            score_R[pair] = score_QN[row, column].cpu().numpy()
            score_QN[row, column] = -torch.inf
            near_QK = score_QN.topk(min(depth, score_QN.shape[1])).values
            best_QK[rows] = torch.cat([best_QK[rows], near_QK], 1).topk(depth).values
    return score_R, best_QK.cpu()


def _rescored(
    unit_QD: Tensor, pieces: Iterable[_Piece], relevance: Relevance, depth: int, dtype: Dtype
) -> tuple[np.ndarray, Tensor]:
    """As `_scored`, of a shortlist by Hamming distance; −∞ for the relevant that are not on it."""
    num_queries, length = len(unit_QD), SHORTLIST * depth
    bits_QD = stored(unit_QD, dtype)
    near_QL = torch.full((num_queries, length), -torch.inf, device=unit_QD.device)
    score_QL, pair_QL = near_QL.clone(), torch.full((num_queries, length), -1, device=unit_QD.device)
    for piece in pieces:
        for rows in _rows(num_queries, len(piece.stored_ND)):
            near_QN = bits_QD[rows] @ piece.stored_ND.T
            pair, row, column = _within(rows, piece, relevance)
            pair_QN = torch.full_like(near_QN, -1, dtype=torch.int64)
            pair_QN[row, column] = torch.from_numpy(pair).to(unit_QD.device)
            near_QN[row, column] -= 0.5  # whole numbers otherwise: of equal distances the relevant come last
            score_QN = unit_QD[rows] @ piece.stored_ND.T
            merged = [
                torch.cat(pieces, 1)
                for pieces in ((near_QL[rows], near_QN), (score_QL[rows], score_QN), (pair_QL[rows], pair_QN))
            ]
            column_QL = highest(merged[0], length)
            near_QL[rows], score_QL[rows], pair_QL[rows] = (values.gather(1, column_QL) for values in merged)
    score_R = np.full(len(relevance.query), -np.inf, np.float32)
    score_R[pair_QL[pair_QL >= 0].cpu().numpy()] = score_QL[pair_QL >= 0].cpu().numpy()
    return score_R, score_QL.masked_fill(pair_QL >= 0, -torch.inf).topk(depth).values.cpu()
