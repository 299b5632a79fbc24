"""Random problems for the contrastive loss, and its results side by side."""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from kernels.contrastive import contrastive_loss


def random_problem(
    seed: int,
    *,
    rows: int,
    passages: int,
    width: int,
    prefixes: tuple[int, ...],
    negatives: int = 0,
    contents: int | None = None,
    zeros: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of the loss: passages near their queries, `contents` different content ids (None: no ids)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def ids(length: int) -> Tensor | None:
        return None if contents is None else torch.randint(0, contents, (length,), generator=generator)

    offset = int(torch.randint(0, passages - rows + 1, (), generator=generator))
    query, passage = randn(rows, width), randn(passages, width)
    passage[offset : offset + rows] += query
    if zeros:
        query[0, : prefixes[0]] = 0
        passage[offset, : prefixes[0]] = 0
        passage[-1] = 0
    problem = {
        "query": query.to(dtype),
        "passage": passage.to(dtype),
        "prefixes": prefixes,
        "query_id": ids(passages),
        "passage_id": ids(passages),
        "offset": offset,
        "weights": tuple(0.5 + k for k in range(len(prefixes))),
    }
    if negatives:
        problem["negative"] = randn(negatives, width).to(dtype)
        problem["negative_row"] = torch.randint(0, rows, (negatives,), generator=generator)
        problem["negative_id"] = ids(negatives)
    return problem


def margin_near(problem: dict[str, Any], near: float) -> float:
    """A margin within 0.01 of `near`, as far as can be from the differences that it decides on: rounding settles ties."""
    vectors = [problem[name].double() for name in ("query", "passage", "negative") if name in problem]
    own_columns = slice(problem["offset"], problem["offset"] + len(problem["query"]))
    found = []
    for width in problem["prefixes"]:
        query, *others = (F.normalize(x[:, :width], dim=1) for x in vectors)
        own_B1 = (query * others[0][own_columns]).sum(1, keepdim=True)
        found.append((query @ torch.cat(others).T - own_B1).flatten())
    difference = torch.cat(found)
    ends = difference.new_tensor([near - 0.01, near + 0.01])
    edges = torch.cat([ends, difference[(difference - near).abs() < 0.01]]).sort().values
    gap, place = edges.diff().max(0)
    assert gap > 2e-6, "the differences of cosines are too close to each other"
    return (edges[place] + gap / 2).item()


@st.composite
def problems(draw, *, max_rows: int, max_others: int, max_width: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Any problem of at most these sizes, with a margin or without; `max_others` bounds foreign passages and hard negatives."""
    rows = draw(st.integers(1, max_rows))
    near = draw(st.sampled_from([None, -0.2, 0.0, 0.1, 0.5]))
    prefixes = tuple(sorted(draw(st.sets(st.integers(1, max_width), min_size=1, max_size=4))))
    problem = random_problem(
        draw(st.integers(0, 2**31)),
        rows=rows,
        passages=rows + draw(st.integers(0, max_others)),
        width=prefixes[-1] + draw(st.integers(0, 5)),
        prefixes=prefixes,
        negatives=draw(st.integers(0, max_others)),
        contents=draw(st.sampled_from([None, 1, 3, 30])),
        zeros=draw(st.booleans()),
        dtype=dtype,
    )
    return problem if near is None else problem | {"margin": margin_near(problem, near)}


def results(problem: dict[str, Any], temperature: float, **changes: Any) -> dict[str, Tensor]:
    """Loss, parts, and the gradients of vectors and temperature, in fp64."""
    arguments = problem | changes
    dtype = arguments.pop("dtype", None)
    heat = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    leaves = {name: arguments[name] for name in ("query", "passage", "negative") if name in arguments}
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    out = contrastive_loss(**arguments | leaves, temperature=heat)
    out.loss.backward()
    gradients = {name: x.grad for name, x in (leaves | {"temperature": heat}).items()}
    found = {"loss": out.loss.detach(), "per_prefix": out.per_prefix, **gradients}
    assert all(torch.isfinite(x).all() for x in found.values()), "a result is not finite"
    return {name: x.double() for name, x in found.items()}


def assert_close(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    loss: float,
    gradient: float,
    rounding: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Relative errors of norms, and what follows from cosines that are off by `rounding`.

    That moves an exponent by 1/τ of it, hence a loss absolutely and a gradient relatively; a gradient which cancels, as a
    radial one does, keeps about ten of these roundings, and that of τ has another 1/τ.
    """
    for name, value in expected.items():
        error, is_loss = (found[name] - value).norm().item(), name in ("loss", "per_prefix")
        exponent = rounding / temperature
        floor = exponent if is_loss else 10 * exponent / (temperature if name == "temperature" else 1)
        allowed = max(loss if is_loss else gradient, 10 * exponent) * value.norm().item() + floor
        assert error <= allowed, f"{name} is off by {error:.2e}, {allowed:.2e} is allowed"
