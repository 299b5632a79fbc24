"""Weights of linear layers laid out once as oneDNN reads them, for inference in fp32 on a CPU; it multiplies faster than MKL.

The operators are those that torch.compile uses when it freezes weights. Where torch lacks them nothing changes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 1024  # of a product, which the layout is chosen for: our choice, any number gives the same values


def prepack(module: nn.Module) -> None:
    """Have a module's linear layers multiply so whenever nothing is differentiated; values differ by rounding alone.

    Weights that change meanwhile are laid out anew. Costs the memory of the weights once more.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__dict__["forward"] = partial(_forward, layer, LaidOut())


class LaidOut:
    """A weight as oneDNN reads it, and which version of the weight that is; a copy begins without."""

    def __init__(self) -> None:
        self.version: tuple[int, int] | None = None
        self.weight = torch.empty(0)

    def __deepcopy__(self, memo: dict) -> "LaidOut":
        return LaidOut()


def _forward(layer: nn.Linear, laid_out: LaidOut, x: Tensor) -> Tensor:
    weight = layer.weight
    is_plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and type(weight) is nn.Parameter
    is_left = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if not is_plain or is_left or not x.numel():
        return F.linear(x, weight, layer.bias)
    version = (weight._version, weight.data_ptr())
    if laid_out.version != version:
        laid_out.version, laid_out.weight = version, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return torch.ops.mkldnn._linear_pointwise(x, laid_out.weight, layer.bias, "none", [], "")
