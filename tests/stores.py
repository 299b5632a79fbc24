"""Stores of embeddings to search: of numbers, and of the procedural world under a tiny encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samples import TINY_TEXT, TINY_VIT

from datamodules.processors.composed import ComposedProcessor
from datamodules.sample import MEDIA_KINDS, Item, text_item
from datamodules.shards import Split
from lightning_modules.embeddings import Embeddings, write_embeddings
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import read_provenance, save_encoder
from lightning_modules.encoder.embedder import Embedder, EncoderConfig
from lightning_modules.encoder.towers import TowerConfig
from lightning_modules.parts import Described

HOSTILE = "<script>document.title='it ran'</script><img src=x onerror=\"document.title='it ran'\"> ${alert(1)} {{value}}"
SETS = ("text-image", "text-page", "text-audio", "text-video", "text-code", "text-text", "mixed-image")


def of_numbers(folder: Path, vectors: np.ndarray, modalities: Sequence[str] | None = None, **more: Any) -> Embeddings:
    """Unit vectors, of texts unless told otherwise."""
    kinds = ["text"] * len(vectors) if modalities is None else modalities
    items = [Described(f"item {n}", kind, f"text {n}", None, n) for n, kind in enumerate(kinds)]
    write_embeddings(folder, items, vectors, encoder={"path": "runs/x", "sha256": "12"}, block_size=97, **more)
    return Embeddings(folder)


def tiny_encoder(folder: Path, processor: ComposedProcessor) -> Embedder:
    """An encoder of every modality with weights drawn at random, in a folder."""
    torch.manual_seed(0)
    towers = {"picture": TowerConfig(arguments=dict(TINY_VIT), stem="conv")}
    towers["sound"] = TowerConfig(arguments=dict(TINY_VIT), stem="conv", in_chans=1)
    routes = {"image": "picture", "page": "picture", "video": "picture", "audio": "sound"}
    backbone = BackboneConfig(text=dict(TINY_TEXT), towers=towers, routes=routes)
    encoder = Embedder(EncoderConfig(backbone, embedding_dim=16, prefixes=(4, 8, 16))).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    save_encoder(folder, encoder, processor, provenance={"stage": "test"})
    return Embedder.from_checkpoint(folder, device="cpu")


def of_world(folder: Path, world: Path, processor: ComposedProcessor, *, number: int = 6) -> Embeddings:
    """The first items of each set of the world, one with a script in its text, their media as files; encoder in `encoder`."""
    encoder = tiny_encoder(folder / "encoder", processor)
    (folder / "media").mkdir()
    items: list[Item] = []
    described: list[Described] = []
    for name in SETS:
        split = Split(world / "world" / name / "test")
        for position in range(number):
            example = split.read(position)
            item = example.query if name == "mixed-image" else example.target
            assert item is not None
            text = "\n".join(str(part.data) for part in item.parts if part.kind not in MEDIA_KINDS) or None
            path = None
            for part in item.parts:
                if isinstance(part.data, bytes):
                    path = folder / "media" / f"{name}-{position}.{part.format}"
                    path.write_bytes(part.data)
            items.append(item)
            described.append(Described(f"{name}/{position}", item.modality, text, path and str(path), position))
    items.append(text_item(HOSTILE))
    described.append(Described("<b>bold</b>", "text", HOSTILE))
    made_by = {"path": str(folder / "encoder"), "sha256": read_provenance(folder / "encoder")["sha256"]}
    write_embeddings(folder / "store", described, encoder.embed(items), encoder=made_by)
    return Embeddings(folder / "store")
