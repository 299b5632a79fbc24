"""Vectors as an index stores them: float32, one signed byte or one bit a dimension; and what a query is compared with.

Letters: Q queries, N vectors, D width (a prefix).
"""

from typing import Literal

import torch
from torch import Tensor

Dtype = Literal["float32", "int8", "binary", "binary_rescored"]
BITS: dict[Dtype, int] = {"float32": 32, "int8": 8, "binary": 1, "binary_rescored": 1}
LARGEST = 127  # of a signed byte; −128 stays unused, so that negation is exact


def bytes_of(width: int, dtype: Dtype) -> int:
    """Bytes of one stored vector."""
    return -(-width * BITS[dtype] // 8)


def stored(unit_ND: Tensor, dtype: Dtype) -> Tensor:
    """What products are taken with, in fp32 (N, D).

    An int8 vector is scaled by its own largest coordinate and is a unit vector again afterwards: a cosine does not know the
    scale, so it need not be stored. A bit is the coordinate's sign, where 0 counts as positive.
    """
    if dtype == "float32":
        return unit_ND
    if dtype == "int8":
        scale_N1 = unit_ND.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        return torch.nn.functional.normalize((unit_ND / scale_N1).round(), dim=-1)
    return torch.where(unit_ND >= 0, 1.0, -1.0)


def asked(unit_QD: Tensor, dtype: Dtype) -> Tensor:
    """Queries as they meet stored vectors (Q, D): as they are, but as bits where Hamming distances rank alone (`binary`)."""
    return stored(unit_QD, dtype) if dtype == "binary" else unit_QD
