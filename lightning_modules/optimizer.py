"""Parameter groups and the learning rate's schedule. Our choice throughout: no paper publishes optimiser, rate or schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to 0.

    Args:
        learning_rate: At the end of the warm-up.
        weight_decay: Of matrices; vectors and scalars have none.
        betas: Of AdamW.
        warmup: Share of the run's steps that the rate rises over.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, warmup {self.warmup}; allowed: above 0, and a share in [0, 1)"
            )


def adamw(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the trainable parameters of a module."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas)


def warmup_cosine(optimizer: Optimizer, config: OptimizerConfig, num_steps: int) -> LambdaLR:
    """The schedule over `num_steps` optimiser steps."""
    return LambdaLR(optimizer, factor_of(config.warmup, num_steps))


def factor_of(warmup: float, num_steps: int) -> Callable[[int], float]:
    """Step to the learning rate's factor: up to 1 over the warm-up, then a half cosine down to 0."""
    rising = max(1, round(warmup * num_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rising) / max(1, num_steps - rising))))

    return factor
