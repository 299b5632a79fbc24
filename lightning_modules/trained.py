"""What of a stage is trained, by name, and what its checkpoints hold: that alone, and which weights the rest was.

A pattern is a regular expression that matches a full name within the encoder from end to end: a parameter's, or a module's,
which stands for everything below it. `backbone.text.layers.1` is one layer, and not also the tenth.
"""

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.encoder.checkpoint import require_same_shape


def above(name: str) -> list[str]:
    """A name and the modules that it lies in, the outermost first."""
    return list(itertools.accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}"))


def matching(patterns: Iterable[str], names: Iterable[str], key: str) -> set[str]:
    """The names that one of the patterns matches.

    Args:
        patterns: Regular expressions.
        names: Full names.
        key: Of the configuration that holds the patterns.

    Raises:
        ValueError: A pattern is no regular expression, or matches nothing; the nearest names are told.
    """
    names, found = list(dict.fromkeys(names)), set()
    for pattern in patterns:
        try:
            matched = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"{key} holds {pattern!r}, which is no regular expression: {error}") from error
        if not matched:
            near = difflib.get_close_matches(pattern.replace("\\", ""), names, cutoff=0.0)
            raise ValueError(f"{key} holds {pattern!r}, which matches no name of the encoder; near it: {', '.join(near)}")
        found.update(matched)
    return found


def is_below(name: str, matched: set[str]) -> bool:
    """Whether a name, or a module that it lies in, is among those matched."""
    return any(outer in matched for outer in above(name))


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state without the parameters that are frozen; its buffers are all there, as they may change in training."""
    frozen = {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def frozen_sha256(module: nn.Module) -> str | None:
    """SHA-256 over names, shapes and bytes of a module's frozen parameters; None where nothing is frozen."""
    digest = hashlib.sha256()
    frozen = sorted((name, value.detach()) for name, value in module.named_parameters() if not value.requires_grad)
    for name, value in frozen:
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else None


def require_same_run(stage: Any, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint that other adapters or weights were trained for, or on other frozen weights.

    Args:
        stage: It has an `encoder`, and `made_for`, what its own checkpoints say of it.
        checkpoint: Lightning's.

    Raises:
        ValueError: They are not the same.
    """
    own, held = stage.made_for, {key: checkpoint.get(key) for key in stage.made_for}
    for key in own.keys() - {"frozen_sha256"}:
        if held[key] != own[key]:
            raise ValueError(
                f"the checkpoint was made with model.{key} {held[key]}, this run has {own[key]}; "
                "go on with that of the checkpoint"
            )
    encoder = "encoder."
    weights = {n.removeprefix(encoder): w for n, w in checkpoint["state_dict"].items() if n.startswith(encoder)}
    trained = trained_state(stage.encoder)
    other = sorted(weights.keys() ^ trained.keys())
    if other and set(other) <= stage.encoder.state_dict().keys():
        raise ValueError(
            f"the checkpoint was made with another model.optimizer.train, freeze or rates: {len(other)} tensors are trained "
            f"there and not here, or here and not there, among them {', '.join(other[:3])}; go on with those of the checkpoint"
        )
    require_same_shape(stage.encoder, weights, "given as ckpt_path", own=trained)
    if held["frozen_sha256"] != own["frozen_sha256"]:
        raise ValueError(
            "the checkpoint was trained on other frozen weights than this run has (their SHA-256 differ); "
            "give the model.init_from that it began from, or the same seed_everything where it began from random weights"
        )
