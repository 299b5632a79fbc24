"""Promises of rates and rules: who moves how fast by which rule."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from samples import TINY_TEXT, TINY_VIT
from torch import nn
from torch.optim import AdamW, Muon

from lightning_modules.encoder.composed import ComposedConfig
from lightning_modules.encoder.embedder import Embedder, EncoderConfig
from lightning_modules.encoder.towers import TowerConfig
from lightning_modules.optimizer import OptimizerConfig, base_rate, factor_of, freeze, optimizer_of, warmup_cosine

BERT = {
    "model_type": "bert",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GEMMA = {**TINY_TEXT, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
SWIN = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "img_size": [64, 64]}
TOWERS = {
    "conv": TowerConfig(arguments=dict(TINY_VIT), stem="conv"),
    "vit": TowerConfig(arguments=dict(TINY_VIT)),
    "swin": TowerConfig("swin_tiny_patch4_window7_224", arguments=SWIN),
    "convolutions": TowerConfig("test_convnext"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "text alone": {"text": TINY_TEXT},
    "one tower, wide projection": {"text": TINY_TEXT, "tower": "conv", "hidden_dim": 48},
    "bert": {"text": BERT, "tower": "vit"},
    "gemma": {"text": GEMMA, "tower": "swin"},
    "convolutions": {"text": TINY_TEXT, "tower": "convolutions"},
}
RULES = [
    OptimizerConfig(),
    OptimizerConfig(name="muon"),
    OptimizerConfig(name="muon", layer_decay=0.5, rates={"towers": 0.5, "boundaries": 0, "projection": 2.0, "objective": 0.1}),
]


class Trained(nn.Module):
    """What a stage is to its optimiser: an encoder, and a parameter outside it."""

    def __init__(self, text: dict[str, Any], tower: str | None = None, hidden_dim: int | None = None) -> None:
        super().__init__()
        towers = {} if tower is None else {"picture": TOWERS[tower]}
        routes = {} if tower is None else {"image": "picture", "page": "picture"}
        backbone = ComposedConfig(text=dict(text), towers=towers, routes=routes, tokens={"image": 1, "page": 1})
        torch.manual_seed(0)
        self.encoder = Embedder(EncoderConfig(backbone, embedding_dim=16, prefixes=(4, 16), hidden_dim=hidden_dim))
        self.log_temperature = nn.Parameter(torch.tensor(-3.0))


def rates_of(module: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Name of each parameter that is trained to its rate."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = optimizer_of(module, config).param_groups
    return {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}


def by_muon(module: nn.Module) -> set[str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = optimizer_of(module, OptimizerConfig(name="muon")).param_groups
    return {names[parameter] for group in groups if "momentum" in group for parameter in group["params"]}


def test_the_rate_rises_over_the_warmup_and_falls_to_zero():
    factor = factor_of(0.1, 100)
    assert [factor(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0, abs=1e-12)


def test_only_matrices_decay_and_frozen_weights_stay_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    groups = optimizer_of(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (2, 0.0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", RULES, ids=["adamw", "muon", "all"])
def test_every_trainable_parameter_is_in_one_group(shape, config):
    module = Trained(**SHAPES[shape])
    freeze(module, config)
    groups = optimizer_of(module, config).param_groups
    met = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(met) == len(set(met))
    assert set(met) == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert all(group["weight_decay"] == (0.01 if p.ndim >= 2 else 0.0) for group in groups for p in group["params"])


def test_without_options_the_groups_are_adamws_matrices_and_vectors():
    module = Trained(TINY_TEXT, "conv")
    optimizer = optimizer_of(module, OptimizerConfig(weight_decay=0.1))
    assert type(optimizer) is AdamW
    parameters = list(module.parameters())
    for group, dims in zip(optimizer.param_groups, ((2, 3, 4), (0, 1)), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters if p.ndim in dims]
        assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.98))


def test_each_layer_and_part_has_the_rate_that_its_equation_says():
    module = Trained({**TINY_TEXT, "num_hidden_layers": 3}, "conv")
    rates = rates_of(module, OptimizerConfig(learning_rate=0.8, layer_decay=0.5, rates={"text": 0.5, "towers": 0.25}))
    text = "encoder.backbone.text."
    expected = {f"{text}embed_tokens": 0.05, f"{text}layers.0": 0.1, f"{text}layers.1": 0.2, f"{text}layers.2": 0.4}
    expected |= {f"{text}norm": 0.4, "encoder.backbone.towers": 0.2}
    expected |= dict.fromkeys(("encoder.backbone.boundaries", "encoder.projection", "log_temperature"), 0.8)
    for name, rate in rates.items():
        assert rate == pytest.approx(next(r for start, r in expected.items() if name.startswith(start)), rel=1e-12), name
    assert all(any(name.startswith(start) for name in rates) for start in expected)


def test_a_bert_has_its_embeddings_as_layer_0():
    rates = rates_of(Trained(BERT), OptimizerConfig(learning_rate=1.0, layer_decay=0.1))
    text = "encoder.backbone.text."
    assert {rate for name, rate in rates.items() if name.startswith(f"{text}embeddings.")} == {0.1**2}
    assert {rate for name, rate in rates.items() if name.startswith(f"{text}encoder.layer.0.")} == {0.1}
    assert {rate for name, rate in rates.items() if name.startswith((f"{text}encoder.layer.1.", f"{text}pooler"))} == {1.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_schedule_multiplies_each_rate_and_the_log_has_the_base_rate(name):
    config = OptimizerConfig(name=name, learning_rate=0.4, warmup=0.5, rates={"text": 0.1, "projection": 2.0})
    optimizer = optimizer_of(Trained(TINY_TEXT), config)
    schedule = warmup_cosine(optimizer, config, 8)
    for factor in (0.25, 0.5, 0.75, 1.0, 1.0):
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        assert rates == pytest.approx([0.04 * factor, 0.4 * factor, 0.8 * factor])
        assert base_rate(optimizer) == pytest.approx(0.4 * factor)
        optimizer.step()
        schedule.step()


def test_a_rate_of_0_freezes_a_part():
    module, config = Trained(TINY_TEXT, "conv"), OptimizerConfig(name="muon", rates={"text": 0, "objective": 0.0})
    freeze(module, config)
    optimizer = optimizer_of(module, config)
    set_gradients(module, 0)
    before = copy.deepcopy(module.state_dict())
    optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("encoder.backbone.text.", "log_temperature")), name
    assert {id(parameter) for parameter in optimizer.state} == {id(p) for p in module.parameters() if p.requires_grad}


def set_gradients(module: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random) if parameter.requires_grad else None


def test_muon_moves_the_linear_layers_of_text_model_and_towers():
    text = {f"layers.{layer}.self_attn.{name}_proj.weight" for layer in range(2) for name in "qkvo"}
    text |= {f"layers.{layer}.mlp.{name}_proj.weight" for layer in range(2) for name in ("gate", "up", "down")}
    tower = {f"model.blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} | {"project.weight"}
    expected = {f"encoder.backbone.text.{n}" for n in text} | {f"encoder.backbone.towers.picture.{n}" for n in tower}
    assert by_muon(Trained(TINY_TEXT, "conv", hidden_dim=48)) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_moves_no_embedding_table_convolution_or_vector(shape):
    module = Trained(**SHAPES[shape])
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    for name in by_muon(module):
        assert shapes[name] == 2
        assert not any(word in name for word in ("embed", "table", "patch", "stem", "boundaries", "projection", "pos_")), name


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_the_two_rules_together_are_each_rule_on_its_own(is_reloaded):
    module = Trained(TINY_TEXT, "conv")
    apart = copy.deepcopy(module)
    config = OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0.1)
    optimizer, matrices = optimizer_of(module, config), by_muon(module)
    parameters = list(apart.named_parameters())
    muon = Muon(
        [p for n, p in parameters if n in matrices], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    others = [(p, 0.1 if p.ndim >= 2 else 0.0) for n, p in parameters if n not in matrices]
    adamw = AdamW([{"params": [p], "weight_decay": decay} for p, decay in others], lr=0.01, betas=(0.9, 0.98))
    for step in range(4):
        if is_reloaded and step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = optimizer_of(module, config)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for each in (module, apart):
            set_gradients(each, step)
        assert optimizer.step(lambda step=step: step) == step
        muon.step()
        adamw.step()
        for (name, one), (_, other) in zip(module.named_parameters(), parameters, strict=True):
            assert torch.equal(one, other), (step, name)


def test_without_gradients_nothing_moves_and_no_moment_changes():
    module = Trained(TINY_TEXT)
    optimizer = optimizer_of(module, OptimizerConfig(name="muon"))
    set_gradients(module, 0)
    optimizer.step()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close((module.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rates": {"tower": 0.1}},
            "optimizer.rates names tower; the parts of a stage are text, towers, boundaries, projection,",
        ),
        ({"rates": {"text": -0.1}}, "optimizer.rates holds {'text': -0.1}; a rate's multiplier is a number from 0"),
        ({"rates": {"text": float("nan")}}, "optimizer.rates holds"),
        ({"rates": dict.fromkeys(("text", "projection", "objective"), 0)}, "which freezes everything; leave a part to train"),
        ({"layer_decay": 0.0}, "optimizer.layer_decay is 0.0"),
        ({"layer_decay": 1.5}, "optimizer.layer_decay is 1.5"),
        ({"momentum": 1.0}, "momentum 1.0; allowed"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        (
            {"name": "muon", "rates": {"text": 0}},
            "optimizer.name is muon, but no matrix within text model or towers is trained",
        ),
    ],
)
def test_what_a_person_gets_wrong_gets_one_sentence(options, message):
    def build() -> None:
        module, config = Trained(TINY_TEXT), OptimizerConfig(**options)
        freeze(module, config)
        optimizer_of(module, config)

    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_be_told_apart_are_refused():
    module = Trained({**BERT, "model_type": "albert", "embedding_size": 16, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="AlbertModel has 0 lists of its 3 layers where one is needed to tell them apart"):
        optimizer_of(module, OptimizerConfig(layer_decay=0.9))
    assert optimizer_of(module, OptimizerConfig())


@pytest.mark.parametrize(
    "other", [{"name": "adamw"}, {"rates": {"text": 0.2}}, {"layer_decay": 0.5}, {"rates": {"text": 0.1, "projection": 0.1}}]
)
def test_a_state_of_other_groups_is_refused(other):
    config = {"name": "muon", "rates": {"text": 0.1}}
    module = Trained(TINY_TEXT)
    state = optimizer_of(module, OptimizerConfig(**config)).state_dict()
    optimizer_of(module, OptimizerConfig(**config, learning_rate=1.0)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"made with another optimizer\.name, rates or layer_decay"):
        optimizer_of(module, OptimizerConfig(**{**config, **other})).load_state_dict(state)
