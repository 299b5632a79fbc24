"""What tests share: a small world of shards, a tiny encoder, and media made on the spot."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)

from datamodules.processors.composed import ComposedProcessor, ProcessorConfig  # noqa: E402
from datamodules.processors.tokenizer import train_tokenizer  # noqa: E402
from datamodules.world import write_world  # noqa: E402
from lightning_modules.encoder.composed import ComposedConfig  # noqa: E402
from lightning_modules.encoder.embedder import Embedder, EncoderConfig  # noqa: E402
from lightning_modules.encoder.towers import TowerConfig  # noqa: E402

TEXTS = ["a small red circle", "ein großer blauer Stern", "def f(x): return x + 1", "0123456789", "the cat sat on the mat"]
TINY_TEXT = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TINY_VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": ""}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Shards of 96 training and 24 test scenes, every set."""
    root = tmp_path_factory.mktemp("world")
    write_world(str(root), num_train=96, num_test=24, seed=3, num_workers=1)
    return root


@pytest.fixture(scope="session")
def processor() -> ComposedProcessor:
    return ComposedProcessor(ProcessorConfig(vocab_size=300), train_tokenizer(TEXTS, 300))


@pytest.fixture
def tiny_config() -> EncoderConfig:
    picture = TowerConfig(arguments=dict(TINY_VIT), stem="conv")
    sound = TowerConfig(arguments=dict(TINY_VIT), stem="conv", in_chans=1)
    routes = {"image": "picture", "page": "picture", "video": "picture", "audio": "sound"}
    backbone = ComposedConfig(text=dict(TINY_TEXT), towers={"picture": picture, "sound": sound}, routes=routes)
    return EncoderConfig(backbone, embedding_dim=16, prefixes=(4, 8, 16))


@pytest.fixture
def tiny_encoder(tiny_config) -> Embedder:
    torch.manual_seed(0)
    encoder = Embedder(tiny_config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return encoder


def picture_bytes(format: str = "PNG", *, width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def sound_bytes(
    format: str = "WAV", *, seconds: float = 0.5, rate: int = 16_000, channels: int = 1, pitch: float = 440.0
) -> bytes:
    time = np.arange(round(seconds * rate)) / rate
    wave = np.repeat(0.5 * np.sin(2 * np.pi * pitch * time)[:, None], channels, axis=1)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format)
    return file.getvalue()
