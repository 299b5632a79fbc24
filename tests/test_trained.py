"""Promises of training a part: patterns say which weights, and what is frozen has a hash."""

import re

import pytest
import torch
from samples import TINY_TEXT
from test_optimizer import Trained
from torch import nn

from lightning_modules.adapters import LoRAConfig, inject, is_adapter
from lightning_modules.optimizer import OptimizerConfig, freeze
from lightning_modules.trained import frozen_sha256, trained_state

TEXT = "encoder.backbone.text."


def trained_names(config: OptimizerConfig, lora: LoRAConfig | None = None, num_layers: int = 2) -> set[str]:
    module = Trained({**TINY_TEXT, "num_hidden_layers": num_layers}, "conv")
    if lora is not None:
        inject(module.encoder, lora)
    freeze(module, config)
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def all_names(num_layers: int = 2) -> set[str]:
    return trained_names(OptimizerConfig(), num_layers=num_layers)


def test_towers_can_be_frozen():
    frozen = all_names() - trained_names(OptimizerConfig(freeze=("backbone.towers",)))
    assert frozen == {name for name in all_names() if name.startswith("encoder.backbone.towers.")}
    assert frozen


def test_the_last_layer_alone_can_be_trained():
    config = OptimizerConfig(train=(r"backbone.text.layers.1", r"projection\.0\.weight"))
    found = trained_names(config, num_layers=12)
    layer = {name for name in all_names(12) if name.startswith(f"{TEXT}layers.1.")}
    assert len(layer) == 11
    assert found == layer | {"encoder.projection.0.weight", "log_temperature"}


def test_what_is_frozen_wins_over_what_is_trained():
    config = OptimizerConfig(train=("backbone.text",), freeze=(r"backbone\.text\..*norm",), rates={"objective": 0})
    found = trained_names(config)
    assert found == {name for name in all_names() if name.startswith(TEXT) and "norm" not in name}
    assert trained_names(OptimizerConfig(train=("backbone",), rates={"text": 0, "towers": 0})) == {
        "encoder.backbone.boundaries.image",
        "encoder.backbone.boundaries.page",
        "log_temperature",
    }


def test_with_adapters_the_rest_is_frozen_but_for_what_is_named():
    lora = LoRAConfig(rank=2)
    adapters = {name for name in trained_names(OptimizerConfig(), lora) if is_adapter(name)}
    assert trained_names(OptimizerConfig(), lora) == adapters | {"log_temperature"}
    more = OptimizerConfig(
        train=("projection", r"backbone\.text\.layers\.0\.mlp\.up_proj\.weight"), freeze=("backbone.towers",)
    )
    named = {"encoder.projection.0.weight", f"{TEXT}layers.0.mlp.up_proj.base_layer.weight", "log_temperature"}
    assert trained_names(more, lora) == named | {name for name in adapters if ".towers." not in name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"freeze": ("backbone.tower",)},
            "optimizer.freeze holds 'backbone.tower', which matches no name of the encoder; near it: backbone.towers, backbone",
        ),
        (
            {"train": (r"layers\.1",)},
            r"optimizer.train holds 'layers\\.1', which matches no name of the encoder; near it: backbone",
        ),
        ({"train": ("[",)}, "optimizer.train holds '[', which is no regular expression"),
        ({"train": (), "rates": {"objective": 0}}, "which freezes everything; leave a part to train"),
        ({"freeze": (".*",), "rates": {"objective": 0}}, "which freezes everything; leave a part to train"),
    ],
)
def test_what_a_person_gets_wrong_gets_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        trained_names(OptimizerConfig(**options))
    assert "\n" not in str(caught.value)


class Normed(nn.Module):
    """Two names of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.other = self.one


def test_the_trained_state_has_buffers_and_no_name_of_a_frozen_weight():
    module = Normed()
    assert trained_state(module).keys() == module.state_dict().keys()
    module.one.weight.requires_grad_(False)
    module.norm.bias.requires_grad_(False)
    assert trained_state(module).keys() == {"norm.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_the_hash_is_of_frozen_names_types_and_bytes():
    module = Normed()
    assert frozen_sha256(module) is None
    module.one.weight.requires_grad_(False)
    before = frozen_sha256(module)
    with torch.no_grad():
        module.norm.weight.add_(1)
    assert frozen_sha256(module) == before
    half = Normed()
    half.load_state_dict(module.state_dict())
    half.one.weight.requires_grad_(False)
    assert frozen_sha256(half) == before
    found = {before, frozen_sha256(half.bfloat16())}
    with torch.no_grad():
        module.one.weight[1, 1] += 1e-7
    found.add(frozen_sha256(module))
    module.norm.bias.requires_grad_(False)
    found.add(frozen_sha256(module))
    assert len(found) == 4
