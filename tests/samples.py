"""Small things to test with: texts, sizes of a tiny encoder, pictures and sounds made on the spot."""

import io

import numpy as np
import soundfile
from PIL import Image

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
