"""LoRA and DoRA (arXiv 2106.09685, 2402.09353): small matrices beside frozen linear layers, which are all that is trained.

peft computes them. Which layers they lie beside is found here, by full name, so that no rule for a family of models is applied
to it; and what they add is put into the weights here, in a copy, so that rounding never reaches what is trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.encoder.towers import Tower
from lightning_modules.trained import above, is_below, matching

BASE = ".base_layer."
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
MAGNITUDE = ".lora_magnitude_vector.default.weight"


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers are adapted, and how: y = W x + (alpha / rank) B A x.

    Args:
        rank: Of B A.
        alpha: Its weight is alpha / rank.
        dropout: Of what goes into A.
        dora: Train the length of each row of W beside its direction (DoRA).
        targets: Patterns of full names within the encoder, of linear layers or of modules whose linear layers are all meant.
        exclude: Patterns of what is left out of them.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    dora: bool = False
    targets: tuple[str, ...] = ("backbone",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora has rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; allowed: from 1, above 0, in [0, 1)"
            )
        if not self.targets:
            raise ValueError("lora.targets is empty; name the layers that are adapted, as [backbone]")


def inject(encoder: nn.Module, config: LoRAConfig) -> list[str]:
    """Put adapters beside the linear layers that are meant, and say which; no output changes, and nothing is frozen yet.

    Raises:
        ValueError: A pattern matches nothing or no linear layer, nothing is left, or a layer cannot be adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = linear_layers(encoder, config)
    _require_own_weights(encoder, names, config)
    was_trained = {parameter: parameter.requires_grad for parameter in encoder.parameters()}
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] (any number)
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules="|".join(map(re.escape, names)),
    )
    inject_adapter_in_model(peft_config, encoder)
    for parameter, is_trained in was_trained.items():
        parameter.requires_grad_(is_trained)
    assert sorted(name.removesuffix(UP) for name in encoder.state_dict() if name.endswith(UP)) == sorted(names)
    _require_called(encoder, names)
    return names


def linear_layers(encoder: nn.Module, config: LoRAConfig) -> list[str]:
    """Full names of the linear layers that are meant; torch's own attention takes its `out_proj`'s weight without calling it.

    Raises:
        ValueError: See `inject`.
    """
    modules = {name: module for name, module in encoder.named_modules() if name}
    uncalled = {f"{name}.out_proj" for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in uncalled]
    matched, excluded = (
        matching(patterns, modules, f"lora.{key}")
        for key, patterns in (("targets", config.targets), ("exclude", config.exclude))
    )
    holders = {outer for name in linear for outer in above(name)}
    outermost = [name for name in matched if not is_below(name.rpartition(".")[0], matched)]
    if wrong := sorted(name for name in outermost if name not in holders and not is_below(name, excluded)):
        raise ValueError(
            f"lora.targets match {wrong[0]}, a {type(modules[wrong[0]]).__name__}, which is no linear layer and holds none; "
            "narrow the pattern, or put it into lora.exclude"
        )
    meant = [name for name in linear if is_below(name, matched) and not is_below(name, excluded)]
    if not meant:
        raise ValueError(f"lora.exclude takes out all that lora.targets {list(config.targets)} match; leave a layer to adapt")
    return meant


def _require_own_weights(encoder: nn.Module, names: list[str], config: LoRAConfig) -> None:
    """Refuse layers whose weight is also another's, which would not be merged, or has rows of zeros, by which DoRA divides."""
    weights = dict(encoder.named_parameters(remove_duplicate=False))
    used: dict[nn.Parameter, list[str]] = {}
    for name, weight in weights.items():
        used.setdefault(weight, []).append(name)
    for name in names:
        weight = weights[f"{name}.weight"]
        if len(used[weight]) > 1:
            raise ValueError(
                f"lora.targets match {name}, whose weight has several names: {', '.join(used[weight])}; exclude it"
            )
        if config.dora and not weight.norm(dim=1).all():
            raise ValueError(
                f"lora.dora divides by the length of rows, but {name} has a row of zeros; put it into lora.exclude"
            )


@torch.no_grad()
def _require_called(encoder: nn.Module, names: list[str]) -> None:
    """Refuse adapters that a tower would pass over: some of timm's attentions take the weight of a layer and do not call it."""
    towers = {name: module for name, module in encoder.named_modules() if isinstance(module, Tower)}
    called: set[str] = set()
    hooks = [encoder.get_submodule(n).register_forward_hook(lambda *_, name=n: called.add(name)) for n in names]
    was_training = encoder.training
    encoder.eval()
    for tower in towers.values():
        tower(torch.zeros(1, *tower.view_shape), 1)
    encoder.train(was_training)
    for hook in hooks:
        hook.remove()
    within = tuple(f"{tower}." for tower in towers)
    if silent := [name for name in names if name.startswith(within) and name not in called]:
        raise ValueError(
            f"lora.targets match {len(silent)} layers that their tower never calls, as it takes their weights or does without "
            f"them, among them {', '.join(silent[:3])}; put them into lora.exclude"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((DOWN, UP, MAGNITUDE))


def plain_name(name: str) -> str:
    """A parameter's name before adapters were put in; an adapter's own name stays."""
    return name.replace(BASE, ".")


def merged(weights: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """An encoder's weights under their plain names, with what the adapters add to them, computed in float64 on the CPU.

    Source: W + (alpha / rank) B A, arXiv 2106.09685, section 4.1; for DoRA each row of that at the length that was trained,
    arXiv 2402.09353, equation 5.
    """
    plain = {plain_name(name): weight for name, weight in weights.items() if not is_adapter(name)}
    for layer in (name.removesuffix(UP) for name in weights if name.endswith(UP)):
        weight, up, down = (weights[layer + name].cpu().double() for name in (f"{BASE}weight", UP, DOWN))
        adapted = weight + config.alpha / config.rank * (up @ down)
        if config.dora:
            adapted *= (weights[layer + MAGNITUDE].cpu() / adapted.norm(dim=1))[:, None]
        plain[f"{layer}.weight"] = adapted.to(weights[f"{layer}{BASE}weight"].dtype)
    return plain


def unmoved(encoder: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Adapted layers that are trained and still add exactly nothing: no gradient ever reached them.

    Args:
        encoder: Says which are trained.
        weights: Its state, whole.
    """
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    return [name.removesuffix(UP) for name, up in weights.items() if name.endswith(UP) and name in trained and not up.any()]
