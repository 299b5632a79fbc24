"""The loss with its gradients as one operator of torch, which is all that autograd, torch.compile, DDP and FSDP see of it.

An operator keeps them out of the chunks and launches inside: nothing of those is traced, differentiated again, or recomputed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.chunked import contrastive_chunked
from kernels.problem import HALF, Needs, Problem, Solution, may_look, row_scales
from kernels.reference import contrastive_per_prefix

TEMPERATURES = (1e-6, 1e12)  # beyond them scores leave the range of fp32


class ContrastiveLoss(NamedTuple):
    """`loss`: scalar, fp32 or wider, weighted sum over prefixes. `per_prefix`: (K,), detached, unweighted."""

    loss: Tensor
    per_prefix: Tensor


def solve(problem: Problem, impl: str) -> ContrastiveLoss:
    if impl == "reference":
        with torch.autocast(problem.query_BD.device.type, enabled=False):
            problem, _ = _prepare(problem, keep_half=False)
            per_prefix_K = contrastive_per_prefix(problem)
            return ContrastiveLoss((per_prefix_K * per_prefix_K.new_tensor(problem.weights)).sum(), per_prefix_K.detach())
    tensors = problem[:4]  # query, passage, negative, temperature
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    loss, per_prefix, *_ = _contrastive(*problem, needs, impl)
    return ContrastiveLoss(loss, per_prefix.detach())


def _solver(impl: str) -> Callable[[Problem, Needs], Solution]:
    if impl == "chunked":
        return contrastive_chunked
    from kernels.fused import contrastive_fused  # Triton exists on Linux only

    return contrastive_fused


def _prepare(problem: Problem, keep_half: bool) -> tuple[Problem, list[Tensor | None]]:
    """The problem in the dtype it is computed in, rows in the safe range, and the powers of two that brought them there.

    Raises:
        ValueError: A vector holds NaN or infinity, τ is out of range, or a negative_row is no row.
    """
    given = [x.contiguous() for x in (problem.query_BD, problem.passage_ND, problem.negative_MD) if x is not None]
    if not keep_half:
        given = [x.float() if x.dtype in HALF else x for x in given]
    scales = row_scales([x[:, : problem.prefixes[-1]] for x in given])
    query_BD, passage_ND, *negative = (x if scale is None else x * scale for x, scale in zip(given, scales, strict=True))
    if may_look(query_BD):
        _check_values(problem)
    ids = (problem.query_id_N, problem.passage_id_N, problem.negative_row_M, problem.negative_id_M)
    query_id, passage_id, negative_row, negative_id = (None if x is None else x.contiguous() for x in ids)
    problem = problem._replace(
        query_BD=query_BD,
        passage_ND=passage_ND,
        negative_MD=negative[0] if negative else None,
        query_id_N=query_id,
        passage_id_N=passage_id,
        negative_row_M=negative_row,
        negative_id_M=negative_id,
    )
    return problem, scales


def _check_values(problem: Problem) -> None:
    lowest, highest = TEMPERATURES
    if not lowest <= problem.temperature.detach() <= highest:
        raise ValueError(f"temperature is {problem.temperature.item()}; it must be above 0, between {lowest:g} and {highest:g}")
    row_M, num_rows = problem.negative_row_M, len(problem.query_BD)
    if row_M is not None and not bool(((row_M >= 0) & (row_M < num_rows)).all()):
        raise ValueError(f"negative_row holds {row_M.min().item()} to {row_M.max().item()}; there are {num_rows} rows")


def _gradient_dtype(x: Tensor) -> torch.dtype:
    """Of the gradient that is made with the loss: fp16 would underflow before a gradient scaler multiplies it."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


@torch.library.custom_op("polyphony::contrastive", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _contrastive(
    query: Tensor,
    passage: Tensor,
    negative: Tensor | None,
    temperature: Tensor,
    query_id: Tensor | None,
    passage_id: Tensor | None,
    negative_row: Tensor | None,
    negative_id: Tensor | None,
    prefixes: Sequence[int],
    weights: Sequence[float],
    offset: int,
    see_all: bool,
    hardness: float,
    margin: float | None,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts (K,) and the gradients of query, passage, negative and temperature; empty where none is needed."""
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
        tuple(weights),
        offset,
        see_all,
        hardness,
        margin,
    )
    with torch.cuda.device_of(query):
        problem, scales = _prepare(problem, keep_half=impl == "triton")
        solution = _solver(impl)(problem, Needs(*needs))
        gradients = []
        for x, gradient, scale in zip((query, passage, negative), solution[2:5], (*scales, None)[:3], strict=True):
            if x is None or gradient is None:
                gradients.append(query.new_empty(0))
            else:
                gradients.append((gradient if scale is None else gradient * scale).to(_gradient_dtype(x)).contiguous())
    heat = solution.temperature
    gradients.append(temperature.new_empty(0) if heat is None else heat.to(temperature.device, temperature.dtype))
    return solution.loss, solution.per_prefix_K, gradients[0], gradients[1], gradients[2], gradients[3]


@_contrastive.register_fake
def _(query, passage, negative, temperature, *others):
    prefixes, needs = others[4], others[-2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    loss, per_prefix = query.new_empty((), dtype=wide), query.new_empty(len(prefixes), dtype=wide)
    gradients = (
        query.new_empty(0) if x is None or not needed else x.new_empty(x.shape, dtype=_gradient_dtype(x))
        for x, needed in zip((query, passage, negative, temperature), needs, strict=True)
    )
    return loss, per_prefix, *gradients


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # nobody differentiates the other outputs
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if x is None or not needed else x.dtype for x, needed in zip(inputs[:4], inputs[-2], strict=True)]
    ctx.num_others = len(inputs) - 4


def _backward(ctx, grad_loss, *_):
    gradients = [
        None if dtype is None or grad_loss is None else _scaled(gradient, grad_loss, dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *gradients, *[None] * ctx.num_others


torch.library.register_autograd("polyphony::contrastive", _backward, setup_context=_save)


@torch.library.custom_op("polyphony::scaled", mutates_args=())
def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that was made with the loss, times the gradient of the loss."""
    return (gradient * by.to(gradient.device)).to(dtype)


@_scaled.register_fake
def _(gradient, by, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _refuse(ctx, grad):
    raise RuntimeError(
        "contrastive_loss makes its gradient with the loss and has no second derivative; use impl='reference' for one"
    )


torch.library.register_autograd("polyphony::scaled", _refuse)
