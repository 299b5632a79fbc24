"""What tests share: a small world of shards, a processor, a tiny encoder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported; on a GPU experiments/bench/loss.py checks them
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

from samples import TEXTS, TINY_TEXT, TINY_VIT  # noqa: E402
from trials import Zygote  # noqa: E402

from datamodules.processors.composed import ComposedProcessor  # noqa: E402
from datamodules.processors.processor import ProcessorConfig  # noqa: E402
from datamodules.processors.tokenizer import train_tokenizer  # noqa: E402
from datamodules.world import write_world  # noqa: E402
from lightning_modules.encoder.backbone import BackboneConfig  # noqa: E402
from lightning_modules.encoder.embedder import Embedder, EncoderConfig  # noqa: E402
from lightning_modules.encoder.towers import TowerConfig  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Shards of 96 training and 24 test scenes, every set."""
    root = tmp_path_factory.mktemp("world")
    write_world(str(root), num_train=96, num_test=24, seed=3, num_workers=1)
    return root


@pytest.fixture(scope="session")
def zygote(world) -> Iterator[Zygote]:
    """Begins runs over that world in a moment."""
    zygote = Zygote(world)
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As forked runs have: bytes are compared; and threads that wait for one another cost tiny models more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processor() -> ComposedProcessor:
    return ComposedProcessor(ProcessorConfig(vocab_size=300), train_tokenizer(TEXTS, 300))


@pytest.fixture
def tiny_config() -> EncoderConfig:
    picture = TowerConfig(arguments=dict(TINY_VIT), stem="conv")
    sound = TowerConfig(arguments=dict(TINY_VIT), stem="conv", in_chans=1)
    routes = {"image": "picture", "page": "picture", "video": "picture", "audio": "sound"}
    backbone = BackboneConfig(text=dict(TINY_TEXT), towers={"picture": picture, "sound": sound}, routes=routes)
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
