"""The masked cosine-softmax loss over all MRL prefixes: one function, three implementations with the same numbers.

`reference` writes the equation down, `chunked` makes one pass over the prefixes in plain torch, `triton` fuses it on a GPU; the
last two make the gradients together with the loss. Source: see `kernels.reference`.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels.operator import ContrastiveLoss, solve
from kernels.problem import HALF, Problem

FLOATS = (*HALF, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")


def contrastive_loss(
    query: Tensor,
    passage: Tensor,
    *,
    prefixes: Sequence[int],
    temperature: float | Tensor,
    query_id: Tensor | None = None,
    passage_id: Tensor | None = None,
    offset: int = 0,
    negative: Tensor | None = None,
    negative_row: Tensor | None = None,
    negative_id: Tensor | None = None,
    negatives: Literal["own", "all"] = "own",
    hardness: float = 0.0,
    margin: float | None = None,
    weights: Sequence[float] | None = None,
    directions: Literal["query", "both"] = "query",
    impl: Literal["auto", "triton", "chunked", "reference"] = "auto",
) -> ContrastiveLoss:
    """Mean over the rows of −log softmax at the own passage, summed over prefixes.

    A row that sees nothing but its own passage adds 0, so B = 1 without hard negatives gives 0. Vectors may have any finite
    scale. A prefix of zeros, or one below 2⁻⁵⁰ of its vector's length, has cosine 0 with everything and gets no gradient.

    Args:
        query: This rank's queries (B, D), fp16, bf16, fp32 or fp64.
        passage: Positives of all ranks (N, D), N ≥ B; row i's own is column offset + i.
        prefixes: Increasing widths, the last at most D.
        temperature: τ between 1e-6 and 1e12, a float or a 0-d tensor (which then gets a gradient).
        query_id: Content ids of all ranks' queries (N,) int64; None means all distinct.
        passage_id: Content ids of the passages (N,) int64; None means all distinct.
        offset: Column of row 0's own passage.
        negative: Hard negatives (M, D), any number for each row, or None.
        negative_row: The row each belongs to (M,) int64.
        negative_id: Their content ids (M,) int64; None means distinct from everything.
        negatives: `own`: a row sees its own hard negatives (the papers). `all`: every row sees every one, less those equal in
            content to the row's positive. In both an own one that equals the own positive is dropped.
        hardness: α; 0 switches it off. It weights a row's own hard negatives by e^{α · cosine}, without gradient.
        margin: Passages and hard negatives whose cosine with a row exceeds that of its own passage by more than this, a number
            between −2 and 2, do not count for it at that prefix: they may be no negatives. The choice carries no gradient and
            holds in both `directions`; rounding settles ties. None, like 2, lets everything count.
        weights: One weight for each prefix; None means 1.
        directions: `query`: every query finds its passage (the papers). `both` adds the loss of every passage finding its
            query, without hard negatives; it needs the queries of all ranks (N = B).
        impl: `auto` takes triton for half-precision inputs on a GPU that can run it, else chunked.

    Returns:
        The loss and its parts, in fp32 (fp64 for fp64 inputs); with `both`, of both directions together. Gradients have the
        dtype of the inputs. They are made with the loss: a second derivative is refused, except by `reference`.

    Raises:
        ValueError: Shapes, dtypes, devices, prefixes or ids do not fit; temperature is out of range; an input is NaN or
            infinite; `triton` was asked for and cannot run. While a CUDA graph is captured nobody can look at values: NaN in,
            NaN out.
    """
    for name, value, allowed in (
        ("negatives", negatives, ("own", "all")),
        ("directions", directions, ("query", "both")),
        ("impl", impl, IMPLEMENTATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(float(temperature), dtype=torch.float64)
    problem = Problem(
        query,
        passage,
        negative,
        temperature,
        query_id,
        passage_id,
        negative_row,
        negative_id,
        tuple(prefixes),
        tuple(weights) if weights is not None else (1.0,) * len(prefixes),
        offset,
        negatives == "all",
        float(hardness),
        None if margin is None or margin == 2 else float(margin),  # rounded, cosines may differ by more than 2
    )
    _check(problem)
    if directions == "both" and len(passage) != len(query):
        raise ValueError(f"directions 'both' needs all ranks' queries: there are {len(query)} for {len(passage)} passages")
    implementation = _implementation(impl, query.device, query.dtype)
    if negative is None or len(negative):
        out = solve(problem, implementation)
    else:
        out = solve(problem._replace(negative_MD=None, negative_row_M=None, negative_id_M=None), implementation)
        out = out._replace(loss=out.loss + negative.sum())  # 0; it stays in the graph, its gradient is as empty as it
    if directions == "query":
        return out
    back = contrastive_loss(
        passage,
        query,
        prefixes=prefixes,
        temperature=temperature,
        query_id=passage_id,
        passage_id=query_id,
        margin=margin,
        weights=weights,
        impl=impl,
    )
    return ContrastiveLoss(out.loss + back.loss, out.per_prefix + back.per_prefix)


def check_prefixes(prefixes: Sequence[int], width: int) -> None:
    """Raises ValueError unless the prefixes increase and fit into `width`."""
    if not prefixes or prefixes[0] < 1 or any(a >= b for a, b in itertools.pairwise(prefixes)):
        raise ValueError(f"prefixes are {list(prefixes)}; they must be positive and increase")
    if prefixes[-1] > width:
        raise ValueError(f"prefix {prefixes[-1]} is wider than the embedding, which has {width} dimensions")


def _implementation(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that `auto` stands for here; whether `triton`, asked for by name, can run."""
    if impl in ("chunked", "reference"):
        return impl
    if impl == "auto" and (device.type != "cuda" or dtype not in HALF):
        return "chunked"
    reason = _why_not_triton(device, dtype)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl is 'triton', which cannot run here: {reason}")
    _say_once(f"the loss runs in plain torch, not in Triton: {reason}")
    return "chunked"


@torch.compiler.assume_constant_result
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        from kernels.fused import why_not
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return why_not(device, dtype)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _check(problem: Problem) -> None:
    """Whatever can be said of a problem without looking at values."""
    query, passage, negative = problem.query_BD, problem.passage_ND, problem.negative_MD
    if query.ndim != 2 or passage.ndim != 2 or query.shape[1] != passage.shape[1] or not len(query):
        raise ValueError(
            f"query has shape {tuple(query.shape)} and passage {tuple(passage.shape)}; "
            "they must be (B, D) and (N, D), B at least 1"
        )
    if problem.offset < 0 or problem.offset + len(query) > len(passage):
        raise ValueError(f"offset {problem.offset} with {len(query)} queries does not fit into {len(passage)} passages")
    check_prefixes(problem.prefixes, query.shape[1])
    temperature = problem.temperature
    if temperature.ndim or not temperature.is_floating_point():
        raise ValueError(f"temperature is a {temperature.dtype} of shape {tuple(temperature.shape)}; it must be one float")
    if temperature.device not in (torch.device("cpu"), query.device):
        raise ValueError(f"temperature is on {temperature.device}; it must be on {query.device}, as the vectors are")
    if not all(map(math.isfinite, (*problem.weights, problem.hardness))):
        raise ValueError(f"weights are {list(problem.weights)} and hardness is {problem.hardness}; they must be finite")
    if problem.margin is not None and not -2 <= problem.margin <= 2:
        raise ValueError(f"margin is {problem.margin}; it must be between -2 and 2, or None to count everything")
    if len(problem.weights) != len(problem.prefixes):
        raise ValueError(f"{len(problem.weights)} weights for {len(problem.prefixes)} prefixes; there must be one for each")
    if (negative is None) != (problem.negative_row_M is None) or (negative is None and problem.negative_id_M is not None):
        raise ValueError("negative and negative_row must be given together, and negative_id only with them")
    if negative is not None and (negative.ndim != 2 or negative.shape[1] != query.shape[1]):
        raise ValueError(f"negative has shape {tuple(negative.shape)}; it must be (M, {query.shape[1]})")
    for name, ids, length in (
        ("query_id", problem.query_id_N, len(passage)),
        ("passage_id", problem.passage_id_N, len(passage)),
        ("negative_row", problem.negative_row_M, 0 if negative is None else len(negative)),
        ("negative_id", problem.negative_id_M, 0 if negative is None else len(negative)),
    ):
        if ids is not None and (ids.shape != (length,) or ids.dtype != torch.int64 or ids.device != query.device):
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)}, {ids.dtype}, on {ids.device}; "
                f"it must be ({length},), torch.int64, on {query.device}"
            )
    for name, x in (("query", query), ("passage", passage), ("negative", negative)):
        if x is not None and (x.dtype not in FLOATS or (x.dtype, x.device) != (query.dtype, query.device)):
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}; vectors must be fp16, bf16, fp32 or fp64, and all like query: "
                f"{query.dtype} on {query.device}"
            )
