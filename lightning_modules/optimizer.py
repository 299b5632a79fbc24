"""Which parameter moves by which rule and at which rate, and the rate's schedule.

The defaults are our choice: no paper publishes optimiser, rate or schedule. Muon is Keller Jordan's
(kellerjordan.github.io/posts/muon), with the step's size of arXiv 2502.16982; a rate by layer is ELECTRA's (arXiv 2003.10555)
and BEiT's (arXiv 2106.08254).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.adapters import is_adapter, plain_name
from lightning_modules.trained import above, is_below, matching

ENCODER = "encoder."
TEXTS = tuple(f"{ENCODER}backbone.{text}." for text in ("text", "model.language_model", "model.text_model"))
PREFIXES = {  # the first that fits
    "text": TEXTS,
    "towers": (f"{ENCODER}backbone.towers.", f"{ENCODER}backbone.model."),
    "boundaries": (f"{ENCODER}backbone.boundaries.",),
    "projection": (f"{ENCODER}pooling.", f"{ENCODER}projection."),
    "decoder": ("decoder.",),
}
PARTS = (*PREFIXES, "objective")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon beside it, with linear warm-up and cosine decay to 0.

    Args:
        name: `adamw` for everything; `muon` for the matrices of linear layers within text model, towers and decoder, AdamW
            for all else (embeddings, boundaries, convolutions, vectors, projection, objective). Muon's step is scaled to the
            size of AdamW's, so that one rate and one weight decay serve both.
        learning_rate: At the end of the warm-up, where `rates` and `layer_decay` leave it.
        weight_decay: Of matrices; vectors and scalars have none.
        betas: Of AdamW.
        momentum: Of Muon.
        warmup: Share of the run's steps that the rate rises over.
        rates: Part of the stage to what its rate is multiplied by, 1 for those left out. The parts are `text`, `towers`,
            `boundaries` and `projection` of the encoder (the last with a learnt pooling), the `decoder` of an adaptation, and
            `objective`, which is whatever else there is (a learnt temperature). 0 freezes a part: it has no gradient and no
            optimiser state, its dropout stays on.
        train: Patterns (see `trained`) of the encoder's weights that are trained, all others are frozen; None trains all of
            them, or none where the encoder has adapters. Adapters are always trained.
        freeze: Patterns of what is frozen, adapters too. It wins over `train`, as does a rate of 0.
        layer_decay: The rate of the text model's layer l of L is multiplied by layer_decay ** (L - l), that of what comes
            before its layers (embeddings) by layer_decay ** L; what comes after them has the last one's. 1 switches it off.
        max_skipped: Updates in a row that may be left out because loss or gradient is not finite; one more stops the run. 0
            stops it at the first. Our choice.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.95
    warmup: float = 0.05
    rates: dict[str, float] = field(default_factory=dict)
    train: tuple[str, ...] | None = None
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    max_skipped: int = 2

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, warmup {self.warmup}; allowed: above 0, and a share in [0, 1)"
            )
        if self.max_skipped < 0:
            raise ValueError(f"optimizer.max_skipped is {self.max_skipped}; it must be at least 0, which stops at the first")
        if unknown := [part for part in self.rates if part not in PARTS]:
            raise ValueError(f"optimizer.rates names {', '.join(unknown)}; the parts of a stage are {', '.join(PARTS)}")
        if wrong := {part: rate for part, rate in self.rates.items() if not 0 <= rate < math.inf}:
            raise ValueError(f"optimizer.rates holds {wrong}; a rate's multiplier is a number from 0 (frozen) on")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"optimizer.layer_decay is {self.layer_decay}, momentum {self.momentum}; allowed: in (0, 1], and in [0, 1)"
            )


def freeze(module: nn.Module, config: OptimizerConfig) -> None:
    """Take the gradient from what is not trained: parts whose rate is 0, and of the encoder what `train` and `freeze` say.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to train.
    """
    encoder = [name.removeprefix(ENCODER) for name, _ in module.named_parameters() if name.startswith(ENCODER)]
    known = [outer for name in encoder for outer in above(plain_name(name))]
    frozen = matching(config.freeze, known, "optimizer.freeze")
    trained = None if config.train is None else matching(config.train, known, "optimizer.train")
    if trained is None and not any(map(is_adapter, encoder)):
        trained = set(known)
    for name, parameter in module.named_parameters():
        own = plain_name(name.removeprefix(ENCODER))
        is_chosen = not name.startswith(ENCODER) or is_adapter(name) or is_below(own, trained or set())
        if not is_chosen or is_below(own, frozen) or config.rates.get(part_of(name)) == 0:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"optimizer.rates is {config.rates}, freeze {config.freeze} and train {config.train}, which freezes everything; "
            "leave a part to train"
        )


def optimizer_of(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser over the trainable parameters of a stage, one group for each rule, multiplier and decay among them.

    Raises:
        ValueError: The text model's layers cannot be told apart, or Muon has no matrix to train.
    """
    groups = parameter_groups(module, config)
    matrices = [group for group in groups if group["muon"]]
    if config.name == "muon" and not matrices:
        raise ValueError("optimizer.name is muon, but no matrix within text model or towers is trained; make it adamw")
    others = [group for group in groups if not group["muon"]]
    optimizer: Optimizer = AdamW(others, lr=config.learning_rate, betas=config.betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue] (Lightning would not clip)
    if matrices:
        muon = Muon(matrices, lr=config.learning_rate, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
        optimizer = Together(muon, optimizer)
    optimizer.register_load_state_dict_pre_hook(_require_same_groups)
    return optimizer


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, with the rate at the end of the warm-up and its multiplier."""
    factors, hidden = layer_factors(module, config.layer_decay), hidden_matrices(module) if config.name == "muon" else set()
    found: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            multiplier = config.rates.get(part_of(name), 1.0) * factors.get(name, 1.0)
            found.setdefault((name in hidden, parameter.ndim >= 2, multiplier), []).append(parameter)
    return [
        {
            "params": found[muon, decays, multiplier],
            "lr": config.learning_rate * multiplier,
            "weight_decay": config.weight_decay if decays else 0.0,
            "multiplier": multiplier,
            "muon": muon,
        }
        for muon, decays, multiplier in sorted(found, reverse=True)
    ]


def part_of(name: str) -> str:
    """The part of a stage that a parameter of this name belongs to."""
    return next((part for part, prefixes in PREFIXES.items() if name.startswith(prefixes)), "objective")


def layer_factors(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Name of each of the text model's parameters to what its layer multiplies the rate by; empty when that is 1.

    The last layer keeps the rate itself; ELECTRA and BEiT, which have a head behind it, lower it too.

    Raises:
        ValueError: The text model does not have its layers in one list.
    """
    if layer_decay == 1:
        return {}
    names = [name for name, _ in module.named_modules() if f"{name}." in TEXTS]
    text: Any = module.get_submodule(names[0])
    num_layers = text.config.num_hidden_layers
    lists = [f"{n}." for n, inner in text.named_modules() if isinstance(inner, nn.ModuleList) and len(inner) == num_layers]
    outermost = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    if len(outermost) != 1:
        raise ValueError(
            f"optimizer.layer_decay is {layer_decay}, but {type(text).__name__} has {len(outermost)} lists of its {num_layers} "
            "layers where one is needed to tell them apart; make it 1"
        )
    factors, layer = {}, 0
    for name, _ in text.named_parameters():
        if name.startswith(outermost[0]):
            layer = 1 + int(name.removeprefix(outermost[0]).partition(".")[0])
        factors[f"{names[0]}.{name}"] = layer_decay ** (num_layers - layer)
    return factors


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the weights that Muon moves: of linear layers in text model, towers and decoder, neither way in nor way out."""
    weights = {f"{name}.weight" for name, inner in module.named_modules() if isinstance(inner, nn.Linear)}
    return {name for name in weights if part_of(name) in ("text", "towers", "decoder")}


def _require_same_groups(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse a state whose moments are of other parameters, or whose multipliers would replace those that were asked for."""
    own, other = (
        [(g.get("muon", False), g.get("multiplier", 1.0), len(g["params"])) for g in groups]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if own != other:
        raise ValueError(
            "the checkpoint was made with another optimizer.name, rates or layer_decay, or another number of parameters; "
            "go on with those that it was made with"
        )


class Together(Optimizer):
    """Several optimisers as the one that a trainer wants: their groups in a row, their state in one place."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = [(optimizer, len(optimizer.param_groups)) for optimizer in optimizers]
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        begin = 0
        for optimizer, num_groups in self.optimizers:  # loading a state puts other groups and another state in place
            optimizer.param_groups, optimizer.state = self.param_groups[begin : begin + num_groups], self.state
            optimizer.step()
            begin += num_groups
        return loss


def base_rate(optimizer: Optimizer) -> float:
    """The learning rate of a parameter whose multiplier is 1."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("multiplier", 1.0)


def warmup_cosine(optimizer: Optimizer, config: OptimizerConfig, num_steps: int) -> LambdaLR:
    """The schedule over `num_steps` optimiser steps; a factor of every group's own rate."""
    return LambdaLR(optimizer, factor_of(config.warmup, num_steps))


def factor_of(warmup: float, num_steps: int) -> Callable[[int], float]:
    """Step to the learning rate's factor: up to 1 over the warm-up, then a half cosine down to 0."""
    rising = max(1, round(warmup * num_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rising) / max(1, num_steps - rising))))

    return factor
