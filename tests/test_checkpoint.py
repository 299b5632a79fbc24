"""Promises of an encoder's folder: the same vectors again, refused when changed or of another shape, never half-written."""

import dataclasses
import errno
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from datamodules.sample import Item, Part
from lightning_modules.encoder import checkpoint
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import (
    load_encoder,
    load_weights,
    read_config,
    read_provenance,
    read_weights,
    save_encoder,
)
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig

ITEM = Item((Part("text", "cat", content="cat"), Part("image", b"x", "png", content=np.zeros((64, 64, 3), np.uint8))))


@torch.no_grad()
def test_a_saved_encoder_gives_the_same_vectors(tiny_encoder, processor, tmp_path):
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={"stage": "test"})
    again, own_processor = load_encoder(tmp_path / "encoder")
    assert torch.equal(again.eval()(own_processor([ITEM])), tiny_encoder(processor([ITEM])))
    assert again.config == tiny_encoder.config
    assert read_provenance(tmp_path / "encoder")["stage"] == "test"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_another_shape_names_what_differs(tiny_encoder, tiny_config, processor, tmp_path):
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    other = Embedder(dataclasses.replace(tiny_config, embedding_dim=32, prefixes=(8, 32)))
    with pytest.raises(
        ValueError, match=r"another shape: 1 tensors differ, among them projection.0.weight \(\(16, 32\) in the"
    ):
        load_weights(other, read_weights(tmp_path / "encoder"), "x")


def test_changed_weights_are_refused(tiny_encoder, processor, tmp_path):
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    weights = tmp_path / "encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_encoder(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no encoder in"):
        load_encoder(tmp_path / "elsewhere")


def test_weights_that_are_not_finite_are_not_written(tiny_encoder, processor, tmp_path):
    with torch.no_grad():
        tiny_encoder.projection[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_former_encoder(tiny_encoder, processor, tmp_path, monkeypatch):
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={"stage": "former"})

    def full(weights, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    assert read_provenance(tmp_path / "encoder")["stage"] == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_what_safetensors_calls_an_error_of_its_own_is_named_too(tiny_encoder, processor, tmp_path, monkeypatch):
    def full(weights, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="is the disk full"):
        save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_description_is_named(tiny_encoder, processor, tmp_path):
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    (tmp_path / "encoder" / "encoder.json").write_text('{"format"')
    with pytest.raises(ValueError, match=r"encoder\.json is damaged"):
        load_encoder(tmp_path / "encoder")


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gemma3_text", "modernbert"])
def test_an_encoder_from_a_pretrained_text_model_stands_alone(family, processor, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 320}
    own = {
        "bert": {"layer_norm_eps": 1e-3},
        "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "use_bidirectional_attention": True},
        "modernbert": {"local_attention": 8},
    }
    source = AutoConfig.for_model(family, **sizes, **own[family], pad_token_id=0)
    AutoModel.from_config(source).save_pretrained(tmp_path / "hub")
    made = Embedder(EncoderConfig(BackboneConfig(pretrained=str(tmp_path / "hub")), embedding_dim=8, prefixes=(8,))).eval()
    save_encoder(tmp_path / "encoder", made, processor, provenance={})
    shutil.rmtree(tmp_path / "hub")
    again, own_processor = load_encoder(tmp_path / "encoder")
    texts = [Item((Part("text", text, content=text),)) for text in ("cat", "the cat sat on the mat " * 5)]
    for layout in ("packed", "padded"):
        made.use(ComputeConfig(layout))
        again.use(ComputeConfig(layout))
        assert torch.equal(again.eval()(own_processor(texts)), made(processor(texts)))
    assert again.config.backbone.pretrained is None
    save_encoder(tmp_path / "again", again, own_processor, provenance={})
    assert read_config(tmp_path / "again") == read_config(tmp_path / "encoder")
