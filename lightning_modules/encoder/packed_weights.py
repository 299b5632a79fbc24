"""Rounded weights as a file holds them: whole numbers of 4 or 8 bits, two of 4 in a byte, and the scales of their blocks.

A matrix `name` becomes `name.int4` (rows, columns / 2) uint8 or `name.int8` (rows, columns) int8, beside `name.scale`
(rows, blocks) float32; a block is a run of neighbours in a row. Nothing else need be known to read them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SCALE = ".scale"


class Rounded(NamedTuple):
    """A matrix in few bits: number · scale of its block.

    Args:
        number: Whole numbers (R, C) int8; of 4 bits −8 to 7.
        scale: Of each block of C / S neighbours (R, S) float32.
        bits: 4 or 8.
    """

    number: Tensor
    scale: Tensor
    bits: int

    def weight(self) -> Tensor:
        """What it stands for (R, C) float32."""
        blocks_RSB = self.number.view(*self.scale.shape, -1).float() * self.scale[..., None]
        return blocks_RSB.flatten(1)


def pack(name: str, rounded: Rounded) -> dict[str, Tensor]:
    """Tensors of a file, by name; columns of 4 bits are an even number."""
    number = rounded.number
    if rounded.bits == 4:
        nibble = (number & 15).view(torch.uint8)  # the lower four bits of a two's complement
        number = nibble[:, 0::2] | nibble[:, 1::2] << 4  # the left neighbour in the lower half
    return {f"{name}.int{rounded.bits}": number.contiguous(), name + SCALE: rounded.scale.contiguous()}


def unpack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, the rounded ones as float32; what is not rounded passes as it is."""
    found = {}
    for name, tensor in weights.items():
        whole, _, form = name.rpartition(".")
        if form in ("int4", "int8") and whole + SCALE in weights:
            number = _apart(tensor) if form == "int4" else tensor
            found[whole] = Rounded(number, weights[whole + SCALE], int(form[3:])).weight()
        elif not (form == "scale" and any(f"{whole}.{packed}" in weights for packed in ("int4", "int8"))):
            found[name] = tensor
    return found


def _apart(number: Tensor) -> Tensor:
    nibbles = torch.stack([number & 15, number >> 4], dim=-1).flatten(1)
    return ((nibbles ^ 8).view(torch.int8)) - 8  # the sign of four bits carried into eight
