"""An encoder as a folder: `encoder.json`, `model.safetensors`, the processor. Written beside its place and renamed into it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.files import replace_folder, sha256_of
from datamodules.processors.loading import load_processor
from datamodules.processors.processor import Processor
from datamodules.processors.sentence_transformers import is_sentence_transformers
from datamodules.record import read_json
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.embedder import Embedder, EncoderConfig, leaves
from lightning_modules.encoder.packed_weights import unpack
from lightning_modules.encoder.sentence_transformers import load_sentence_transformers, provenance_of
from lightning_modules.encoder.towers import TowerConfig

FORMAT = "polyphony-encoder/1"
WEIGHTS = "model.safetensors"


def save_encoder(
    folder: str | Path,
    encoder: Embedder,
    processor: Processor,
    *,
    provenance: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an encoder's folder, replacing a former one only when the new one is whole.

    Args:
        folder: Where it will be.
        encoder: What is saved.
        processor: Saved with it.
        provenance: What made it (stage, steps, parents, ..); JSON values.
        weights: Its state, where the encoder itself has only a share of it, or it is written in another form (`packed`).

    Raises:
        ValueError: A weight is not finite.
        OSError: The disk is full or the place not writable; the former folder stays.
    """
    folder = Path(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights or encoder.state_dict()).items()}
    if lost := not_finite(encoder, weights):
        raise ValueError(f"{lost[0]} holds values that are not finite; nothing was written to {folder}")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(weights, beside / WEIGHTS)
        processor.save(beside)
        config = dataclasses.replace(encoder.config, backbone=encoder.backbone.standalone)
        described = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "provenance": dict(provenance),
            "sha256": sha256_of(beside / WEIGHTS),
        }
        (beside / "encoder.json").write_text(json.dumps(described, indent=1))
        replace_folder(folder, beside)
    except (SafetensorError, OSError) as error:
        raise OSError(f"could not write {folder}: {error}; is the disk full? A former checkpoint there is kept") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def not_finite(module: torch.nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of what in a module's state is NaN, or infinite where it is no buffer: a layer that clips may have no limits."""
    limits = {name for name, _ in module.named_buffers()}
    return [name for name, x in state.items() if (x.isnan() if name in limits else ~x.isfinite()).any()]


def load_encoder(folder: str | Path) -> tuple[Embedder, Processor]:
    """The encoder and its processor, from a folder of ours or of sentence-transformers, as all that follow.

    Raises:
        ValueError: No encoder lies there, or its weights were changed.
    """
    folder = Path(folder)
    if is_sentence_transformers(folder):
        return load_sentence_transformers(folder)
    config, weights = read_config(folder), read_weights(folder)
    _require_outline(config, weights, str(folder))
    encoder = Embedder(config, load_pretrained=False)
    load_weights(encoder, weights, str(folder))
    return encoder, load_processor(folder)


def read_config(folder: str | Path) -> EncoderConfig:
    """The shape of the encoder in a folder."""
    if is_sentence_transformers(Path(folder)):
        return load_sentence_transformers(folder)[0].config
    values = _described(Path(folder))["config"]
    try:
        return config_from_json(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/encoder.json is damaged ({error}); use another copy of this checkpoint") from error


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What made the encoder in a folder, and its weights' SHA-256."""
    if is_sentence_transformers(Path(folder)):
        return provenance_of(folder)
    described = _described(Path(folder))
    return {**described["provenance"], "sha256": described["sha256"]}


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The weights in a folder, checked against their SHA-256; rounded ones as the numbers that they stand for."""
    folder = Path(folder)
    if is_sentence_transformers(folder):
        return load_sentence_transformers(folder)[0].state_dict()
    described = _described(folder)
    if not (folder / WEIGHTS).is_file() or sha256_of(folder / WEIGHTS) != described["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is missing or was changed after it was written; use another copy of this checkpoint"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return unpack({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); use another copy of this checkpoint") from error


def load_weights(encoder: Embedder, weights: Mapping[str, Tensor], where: str) -> None:
    """Put weights into an encoder; every tensor must be there with its shape, see `require_same_shape`."""
    require_same_shape(encoder, weights, where)
    own = encoder.state_dict()
    encoder.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in weights.items()})


def require_same_shape(
    encoder: Embedder, weights: Mapping[str, Tensor], where: str, *, own: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse weights that are not exactly an encoder's.

    Args:
        encoder: What they are for.
        weights: Name to tensor.
        where: They come from.
        own: Those of the encoder's that are meant; None means all.

    Raises:
        ValueError: A tensor is missing, left over, or of another shape; the first few are named.
    """
    own = encoder.state_dict() if own is None else own
    wrong = [f"{n} (missing)" for n in own.keys() - weights.keys()] + [
        f"{n} (not in the model)" for n in weights.keys() - own.keys()
    ]
    wrong += [
        f"{n} ({tuple(weights[n].shape)} in the checkpoint, {tuple(own[n].shape)} in the model)"
        for n in own.keys() & weights.keys()
        if weights[n].shape != own[n].shape
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint {where} is of another shape: {len(wrong)} tensors differ, "
            f"among them {', '.join(sorted(wrong)[:3])}; "
            "leave out model.encoder to take the checkpoint's own shape"
        )


def _require_outline(config: EncoderConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse a described shape that is not that of the weights before memory is taken for it: it may come from anywhere."""
    counts = ("num_hidden_layers", "depth", "encoder_layers", "num_layers")
    for layers in (value for name, value in leaves(dataclasses.asdict(config.backbone)) if name in counts):
        if not isinstance(layers, int) or layers > len(weights):
            raise ValueError(
                f"the checkpoint {where} is of another shape: {layers} layers are described, it has {len(weights)} tensors"
            )
    with torch.device("meta"):
        require_same_shape(Embedder(config, load_pretrained=False), weights, where)


def config_from_json(values: dict[str, Any]) -> EncoderConfig:
    """An `EncoderConfig` from what `dataclasses.asdict` and JSON made of it."""
    fields = dict(values["backbone"])
    fields["towers"] = {name: TowerConfig(**tower) for name, tower in fields["towers"].items()}
    return EncoderConfig(**{**values, "backbone": BackboneConfig(**fields), "prefixes": tuple(values["prefixes"])})


def _described(folder: Path) -> dict[str, Any]:
    file = folder / "encoder.json"
    if not file.is_file():
        raise ValueError(
            f"no encoder in {folder}: {file.name} is missing; name the folder that a run wrote, as runs/finetune/encoder, "
            "or one of sentence-transformers"
        )
    try:
        described = read_json(file)
        if not (isinstance(described["config"], dict) and isinstance(described["provenance"], dict)):
            raise ValueError("its config or provenance is no mapping")
        if not isinstance(described["sha256"], str):
            raise ValueError("it has no hash")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another copy of this checkpoint") from error
    if described.get("format") != FORMAT:
        raise ValueError(f"{file} has format {described.get('format')!r}, this version reads {FORMAT!r}")
    return described


def trainable(encoder: torch.nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
