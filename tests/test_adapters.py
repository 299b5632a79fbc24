"""Promises of LoRA and DoRA: nothing changes at the start, adapters alone learn, merged weights give the same vectors."""

import copy
import math
import re
from typing import Any

import native_models
import pytest
import torch
import torch.nn.functional as F
import transformers
from samples import TINY_TEXT
from test_compute import FAMILIES, assert_same, encoder_of, texts, vectors_and_gradients
from test_encoder import ITEMS
from test_optimizer import Trained, rates_of
from torch import Tensor, nn

from lightning_modules.adapters import LoRAConfig, inject, is_adapter, linear_layers, merged, unmoved
from lightning_modules.encoder.checkpoint import load_encoder, load_weights, save_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder
from lightning_modules.encoder.towers import Tower, TowerConfig
from lightning_modules.optimizer import OptimizerConfig, freeze, optimizer_of

KINDS = {
    "lora": LoRAConfig(rank=3, alpha=5.0),
    "dora": LoRAConfig(rank=3, alpha=5.0, dora=True),
}
COMPOSITES = ("embedding_gemma2", "qwen3_vl", "qwen3_omni_moe")


class Holder(nn.Module):
    """Has a transformers model where an encoder has its own."""

    def __init__(self, family: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone: Any = transformers.AutoModel.from_config(native_models.FAMILIES[family].build()[0])


@torch.no_grad()
def taught(encoder: Any, config: LoRAConfig) -> Any:
    """An encoder with adapters that change something."""
    inject(encoder, config)
    random = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if is_adapter(name):
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(parameter * (1 + 0.2 * noise) if parameter.ndim == 1 else 0.1 * noise)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_no_vector_changes_at_the_start(tiny_encoder, processor, kind):
    inputs = processor(ITEMS)
    before = tiny_encoder(inputs)
    names = inject(tiny_encoder, KINDS[kind])
    assert isinstance(tiny_encoder, Embedder)
    assert torch.equal(tiny_encoder(inputs), before)
    assert len(names) == 2 * 7 + 2 * 5
    assert all(parameter.requires_grad for parameter in tiny_encoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_family_is_adapted_and_merged(family, kind):
    plain, inputs = encoder_of(family), texts(5, 9, 2, 9)
    before = plain(inputs)
    encoder = copy.deepcopy(plain)
    inject(encoder, KINDS[kind])
    assert torch.equal(encoder(inputs), before)
    encoder = taught(copy.deepcopy(plain), KINDS[kind])
    adapted = encoder(inputs)
    assert (F.normalize(adapted, dim=-1) - F.normalize(before, dim=-1)).abs().max() > 1e-2
    load_weights(plain, merged(encoder.state_dict(), KINDS[kind]), "merged")
    torch.testing.assert_close(plain(inputs), adapted, rtol=1e-5, atol=1e-5 * float(adapted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("family", COMPOSITES)
def test_a_pattern_reaches_the_text_stack_of_a_composite_and_nothing_else(family):
    plain = Holder(family)
    ids = torch.arange(3, 20)[None]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = plain.backbone(**arguments).last_hidden_state
    names = inject(plain, LoRAConfig(targets=(r"backbone\.language_model\..*(q|v)_proj",)))
    assert names == [f"backbone.language_model.layers.{layer}.self_attn.{x}_proj" for layer in range(2) for x in "qv"]
    assert torch.equal(plain.backbone(**arguments).last_hidden_state, before)


def test_a_linear_layer_inside_a_wrapper_is_found_by_the_wrappers_name():
    config = LoRAConfig(targets=(r"backbone\.vision_tower\..*q_proj",))
    wrapper = "backbone.vision_tower.encoder.layers.0.self_attn.q_proj"
    plain = Holder("embedding_gemma2")
    assert not isinstance(plain.get_submodule(wrapper), nn.Linear)
    assert inject(plain, config) == [f"{wrapper}.linear"]


def test_a_name_is_matched_as_it_is_written():
    holder = nn.Module()
    holder.one, holder.one_two = nn.ModuleDict({"two": nn.Linear(2, 2)}), nn.Linear(2, 2)
    assert inject(holder, LoRAConfig(targets=("one",))) == ["one.two"]


def test_peft_merges_to_the_same_weights(tiny_encoder):
    for config in KINDS.values():
        encoder = taught(copy.deepcopy(tiny_encoder), config)
        weights = merged(encoder.state_dict(), config)
        for module in encoder.modules():
            if hasattr(module, "merge"):
                module.merge(safe_merge=True)
        for name, weight in weights.items():
            layer, _, last = name.rpartition(".")
            found = encoder.get_submodule(layer) if layer else encoder
            expected = getattr(getattr(found, "base_layer", found), last)
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_what_is_merged_is_a_copy(tiny_encoder):
    encoder = taught(tiny_encoder, KINDS["dora"])
    before = copy.deepcopy(encoder.state_dict())
    merged(encoder.state_dict(), KINDS["dora"])
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "compute",
    [ComputeConfig("packed"), ComputeConfig("padded"), ComputeConfig(max_tokens=60)],
    ids=["packed", "padded", "parts"],
)
def test_the_folder_of_an_adapted_encoder_gives_its_vectors(tiny_encoder, processor, tmp_path, kind, compute):
    encoder, inputs = taught(tiny_encoder, KINDS[kind]), processor(ITEMS)
    weights = merged(encoder.state_dict(), KINDS[kind])
    save_encoder(tmp_path / "encoder", encoder, processor, provenance={}, weights=weights)
    encoder.use(compute)
    adapted = encoder(inputs)
    loaded, _ = load_encoder(tmp_path / "encoder")
    assert not any(map(is_adapter, loaded.state_dict()))
    found = loaded.eval()(inputs)
    torch.testing.assert_close(found, adapted, rtol=1e-5, atol=1e-5 * float(adapted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_adapter_and_nothing_else(tiny_config, processor, kind):
    stage = nn.Module()
    stage.encoder = taught(Embedder(tiny_config), KINDS[kind])
    freeze(stage, OptimizerConfig())
    stage.encoder(processor(ITEMS)).square().sum().backward()
    for name, parameter in stage.encoder.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_adapter(name), name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_layouts_and_recomputed_layers_have_the_same_gradients(tiny_encoder, processor, kind):
    stage, inputs = nn.Module(), processor(ITEMS)
    stage.encoder = encoder = taught(tiny_encoder, KINDS[kind])
    freeze(stage, OptimizerConfig())
    expected = vectors_and_gradients(encoder, inputs, ComputeConfig("packed"))
    assert len(expected) == 1 + sum(map(is_adapter, encoder.state_dict()))
    for compute in (ComputeConfig("padded"), ComputeConfig(max_tokens=20, checkpoint_layers=True)):
        assert_same(vectors_and_gradients(encoder, inputs, compute), expected, 1e-4)


def test_dropout_before_adapters_is_noticed_and_drawn_again_alike():
    encoder = encoder_of()
    inject(encoder, KINDS["lora"])
    assert not encoder.draws
    encoder = taught(encoder_of(), LoRAConfig(rank=3, dropout=0.5)).train()
    assert encoder.draws
    inputs = texts(9, 5, 7, 9, 3)
    once, again = (
        vectors_and_gradients(encoder, inputs, ComputeConfig(max_tokens=12, checkpoint_layers=recomputed))
        for recomputed in (False, True)
    )
    assert_same(again, once)
    same = encoder(texts(*[4] * 2).rows(torch.tensor([0, 0]).numpy()))
    assert not torch.equal(same[0], same[1])


def test_adapters_have_the_rate_and_the_rule_of_their_part():
    module = Trained(TINY_TEXT, "conv")
    names = inject(module.encoder, LoRAConfig(rank=2, dora=True, targets=("backbone", "projection")))
    freeze(module, OptimizerConfig())
    rates = rates_of(module, OptimizerConfig(learning_rate=0.5, layer_decay=0.5, rates={"text": 0.5, "towers": 0.25}))
    for name in names:
        part = {"backbone.text.layers.0": 1 / 8, "backbone.text.layers.1": 1 / 4, "backbone.towers": 1 / 8, "projection": 1 / 2}
        expected = next(rate for start, rate in part.items() if name.startswith(start))
        found = {rate for n, rate in rates.items() if n.startswith(f"encoder.{name}.")}
        assert found == {expected}, name
    assert len(rates) == 3 * len(names) + 1  # and what lies outside the encoder
    groups = optimizer_of(module, OptimizerConfig(name="muon", weight_decay=0.1)).param_groups
    by_name = {p: n for n, p in module.named_parameters()}
    muon = {by_name[p] for group in groups if "momentum" in group for p in group["params"]}
    within = [name for name in names if name.startswith("backbone")]
    assert muon == {f"encoder.{name}.{x}.default.weight" for name in within for x in ("lora_A", "lora_B")}
    undecayed = {by_name[p] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {n for n in by_name.values() if "magnitude" in n} | {"log_temperature"}


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["backbone.text"], [], r"backbone\.text\..*_proj"),
        (["backbone"], ["backbone.text"], r"backbone\.towers\..*"),
        (
            [r"backbone\.text.*(q|v)_proj", "projection"],
            [r".*layers\.0.*"],
            r"backbone\.text\.layers\.1\..*[qv]_proj|projection.0",
        ),
        (["backbone.towers.*"], [r".*project", ".*mlp"], r"backbone\.towers\..*attn\.(qkv|proj)"),
    ],
)
def test_patterns_choose_the_linear_layers(tiny_encoder, targets, exclude, expected):
    found = linear_layers(tiny_encoder, LoRAConfig(targets=tuple(targets), exclude=tuple(exclude)))
    linear = [name for name, module in tiny_encoder.named_modules() if isinstance(module, nn.Linear)]
    assert found == [name for name in linear if re.fullmatch(expected, name)]
    assert found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora has rank 0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
        (
            {"targets": ("backbone.txt",)},
            "lora.targets holds 'backbone.txt', which matches no name of the encoder; near it: backbone.text",
        ),
        ({"exclude": ("tower",)}, "lora.exclude holds 'tower', which matches no name of the encoder; near it: backbone.towers"),
        ({"targets": ("(",)}, "lora.targets holds '(', which is no regular expression: "),
        ({"targets": ()}, "lora.targets is empty"),
        (
            {"targets": (".*embed_tokens",)},
            "lora.targets match backbone.text.embed_tokens, a Embedding, which is no linear layer",
        ),
        ({"targets": (r".*(attn\.proj|stem|embed\.project)",)}, "a Conv2d, which is no linear layer and holds none"),
        ({"exclude": ("backbone",)}, "lora.exclude takes out all that lora.targets ['backbone'] match"),
    ],
)
def test_what_a_person_gets_wrong_gets_one_sentence(tiny_encoder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        inject(tiny_encoder, LoRAConfig(**options))
    assert "\n" not in str(caught.value)


def test_what_is_excluded_may_be_no_linear_layer(tiny_encoder):
    pattern = r".*(attn\.proj|embed\.project)"
    names = linear_layers(tiny_encoder, LoRAConfig(targets=(pattern,), exclude=(r".*patch_embed",)))
    assert names == [f"backbone.towers.{tower}.model.blocks.0.attn.proj" for tower in ("picture", "sound")]


def test_a_row_of_zeros_is_refused_where_its_length_divides(tiny_encoder):
    with torch.no_grad():
        tiny_encoder.backbone.text.layers[1].mlp.up_proj.weight[3] = 0
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has a row of zeros; put it into lora.exclude"):
        inject(tiny_encoder, KINDS["dora"])
    inject(tiny_encoder, KINDS["lora"])


@pytest.mark.parametrize(
    ("model", "arguments", "silent"),
    [
        ("beit_base_patch16_224", {"depth": 1, "img_size": 64}, ["blocks.0.attn.qkv"]),
        ("swinv2_tiny_window8_256", {"depths": [1], "window_size": 4, "img_size": [64, 64]}, ["layers.0.blocks.0.attn.qkv"]),
        ("swin_tiny_patch4_window7_224", {"depths": [1], "window_size": 4, "img_size": [64, 64]}, []),
    ],
)
def test_layers_that_a_tower_never_calls_are_refused(model, arguments, silent):
    heads = 2 if "depth" in arguments else [2]
    holder = nn.Module()
    holder.tower = Tower(TowerConfig(model, arguments={"embed_dim": 24, "num_heads": heads, **arguments}), 8)
    if silent:
        message = f"match 1 layers that their tower never calls, as it takes their weights .* them tower.model.{silent[0]};"
        with pytest.raises(ValueError, match=message):
            inject(copy.deepcopy(holder), LoRAConfig(targets=("tower",)))
    names = inject(holder, LoRAConfig(targets=("tower",), exclude=(r".*attn\.qkv",) if silent else ()))
    assert any(name.endswith("attn.qkv") for name in names) == (not silent)
    assert holder.training
    assert not any(module._forward_hooks for module in holder.modules())


def test_putting_adapters_in_moves_no_running_mean():
    holder = nn.Module()
    holder.tower = Tower(TowerConfig("test_efficientnet"), 8)
    before = {name: value.clone() for name, value in holder.named_buffers()}
    assert inject(holder, LoRAConfig(targets=("tower",))) == ["tower.project"]
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in holder.named_buffers())


def test_a_weight_of_several_names_is_refused(tiny_encoder):
    mlp = tiny_encoder.backbone.text.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    with pytest.raises(ValueError, match=r"several names: .*gate_proj\.weight, .*up_proj\.weight; exclude it"):
        inject(tiny_encoder, KINDS["lora"])


def test_adapters_that_did_nothing_are_known(tiny_encoder):
    encoder = taught(tiny_encoder, KINDS["lora"])
    weights: dict[str, Tensor] = copy.deepcopy(encoder.state_dict())
    assert unmoved(encoder, weights) == []
    for name in ("backbone.text.layers.0.mlp.up_proj", "backbone.towers.sound.project"):
        weights[f"{name}.lora_B.default.weight"].zero_()
    encoder.get_submodule("backbone.towers.sound.project").requires_grad_(False)
    assert unmoved(encoder, weights) == ["backbone.text.layers.0.mlp.up_proj"]


def test_weights_of_a_fixed_table_stay_fixed(tiny_encoder):
    fixed = tiny_encoder.backbone.boundaries["image"].requires_grad_(False)
    inject(tiny_encoder, KINDS["lora"])
    assert not fixed.requires_grad
