"""Weights rounded to 4 or 8 bits, by torchao: which matrices and how (a scheme), in training and for a file.

Source: EmbeddingGemma (arXiv 2509.20354) names the three schemes; the size of a block is not published, public exports take 32.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.encoder.packed_weights import Rounded, pack
from lightning_modules.trained import is_below, matching

ATTENTION = re.compile("attn|attention", re.IGNORECASE)  # in the name of a module of transformers or timm


@dataclass(frozen=True)
class QuantizationConfig:
    """How an encoder's matrices are rounded: those of linear layers and of embeddings; all else stays as it is.

    Args:
        scheme: `int4` and `int8`: every block of `block` neighbours in a row has a scale. `mixed`: attention has 8 bits and a
            scale for each row (output channel), all else 4 bits in blocks. `bf16` rounds nothing and halves the file.
        block: Numbers that share a scale.
        keep: Patterns of full names within the encoder, of matrices' modules or of modules above them, that stay as they are.
    """

    scheme: Literal["int4", "int8", "mixed", "bf16"] = "int4"
    block: int = 32
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block < 2 or self.block % 2:
            raise ValueError(f"quantization.block is {self.block}; it must be an even number, as 32")


class Rounding(NamedTuple):
    """How one matrix is rounded: bits, and the neighbours in a row that share a scale, None for the whole row."""

    bits: int
    block: int | None


def plan_of(encoder: nn.Module, config: QuantizationConfig) -> dict[str, Rounding]:
    """Full names of the modules whose matrices are rounded, and how.

    Raises:
        ValueError: A row does not divide into blocks, a pattern matches nothing, or nothing is left to round.
    """
    if config.scheme == "bf16":
        return {}
    modules = dict(encoder.named_modules())
    kept = matching(config.keep, filter(None, modules), "quantization.keep")
    plan = {
        name: _rounding(name, config)
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.Embedding) and not is_below(name, kept)
    }
    for name, (_, block) in plan.items():
        columns = modules[name].weight.shape[1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        if block is not None and columns % block:
            raise ValueError(
                f"{name} has rows of {columns} numbers, which do not divide into blocks of {block}; set quantization.block to "
                f"a divisor, or leave it out with quantization.keep=['{re.escape(name)}']"
            )
    if not plan:
        raise ValueError("quantization.keep leaves no matrix to be rounded")
    return plan


def _rounding(name: str, config: QuantizationConfig) -> Rounding:
    if config.scheme == "mixed" and ATTENTION.search(name):
        return Rounding(8, None)
    return Rounding(8 if config.scheme == "int8" else 4, config.block)


def fake_quantize(encoder: nn.Module, plan: Mapping[str, Rounding]) -> None:
    """Have matrices act as their rounded selves, with gradients that pass the rounding by, to every number (straight-through).

    The modules' own code runs on, that of families which scale their embeddings too; their parameters keep their names.
    """
    for name, rounding in plan.items():
        module = encoder.get_submodule(name)
        module.__class__ = _rounded_class(type(module), rounding)


def _rounded_class(cls: type[nn.Module], rounding: Rounding) -> type[nn.Module]:
    """A module's class whose weight is read rounded."""
    return type(cls.__name__, (cls,), {"weight": property(lambda module: _Round.apply(module._parameters["weight"], rounding))})


class _Round(torch.autograd.Function):
    """The weight that a file would hold. torchao's own stand-in gives no gradient to a number that is clamped, which the
    largest of a block is wherever it is positive."""

    @staticmethod
    def forward(ctx: Any, weight_RC: Tensor, rounding: Rounding) -> Tensor:
        return rounded(weight_RC, rounding).weight().to(weight_RC.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def packed(weights: Mapping[str, Tensor], plan: Mapping[str, Rounding]) -> dict[str, Tensor]:
    """An encoder's weights as its folder holds them: rounded as they acted in training, see `packed_weights`; under an empty
    plan in bfloat16.

    Raises:
        ValueError: torchao is missing.
    """
    if not plan:
        return {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    found = {name: tensor for name, tensor in weights.items() if name.removesuffix(".weight") not in plan}
    for name, rounding in plan.items():
        found |= pack(f"{name}.weight", rounded(weights[f"{name}.weight"].cpu(), rounding))
    return found


@torch.no_grad()
def rounded(weight_RC: Tensor, rounding: Rounding) -> Rounded:
    """The nearest whole numbers: a block's largest magnitude is half a step beyond the largest number of its bits."""
    block, dtype = (1, rounding.block or weight_RC.shape[1]), getattr(torch, f"int{rounding.bits}")
    tensor = require_torchao().IntxUnpackedToInt8Tensor.from_hp(weight_RC.detach().float(), block, dtype)
    return Rounded(tensor.qdata, tensor.scale.view(len(weight_RC), -1), rounding.bits)


def require_torchao() -> Any:
    """torchao's quantisation.

    Raises:
        ValueError: It is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            import torchao.quantization
    except ImportError as error:
        raise ValueError(f"rounding weights needs torchao ({error}): pip install -e '.[quantize]'") from error
    return torchao.quantization
