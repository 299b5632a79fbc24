"""Promises of rates, rules and average: who moves how fast by which rule, what is averaged, and that a stopped run goes on."""

import copy
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import TINY_TEXT, TINY_VIT
from torch import nn
from torch.optim import AdamW, Muon
from trials import consumed, weights_hash

from lightning_modules.checkpoints import VerifiedCheckpointIO
from lightning_modules.ema import EMA, averaged
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import read_provenance, read_weights
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
        backbone = BackboneConfig(text=dict(text), towers=towers, routes=routes, tokens={"image": 1, "page": 1})
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


def test_the_trainer_may_clip_under_mixed_precision():
    """Lightning refuses to for an optimiser that says, as fused ones do, that it takes a gradient scaler's factor itself."""
    assert not getattr(optimizer_of(Trained(TINY_TEXT, "conv"), OptimizerConfig()), "_step_supports_amp_scaling", False)


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
    for name, parameter in module.named_parameters():
        is_frozen = name.startswith(("encoder.backbone.text.", "log_temperature"))
        assert parameter.requires_grad != is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name
        assert (parameter in optimizer.state) != is_frozen, name


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
    adamw = AdamW([{"params": [p], "weight_decay": decay} for p, decay in others], lr=0.01, betas=(0.9, 0.98), fused=True)
    for step in range(4):
        if is_reloaded and step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = optimizer_of(module, config)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for group in (group for each in (optimizer, muon, adamw) for group in each.param_groups):
            group["lr"] = 0.01 / (1 + step)  # as a schedule does
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
        ({"max_skipped": -1}, "optimizer.max_skipped is -1"),
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


def stage_at(encoder: Embedder, step: int, num_skipped: int, ema: EMA) -> tuple[Any, Any]:
    trainer = SimpleNamespace(global_step=step, ckpt_path=None, is_global_zero=True, callbacks=[ema])
    return trainer, SimpleNamespace(encoder=encoder, guard=SimpleNamespace(num_skipped=num_skipped))


def test_the_average_is_the_weighted_mean_of_the_weights_after_each_update(tiny_encoder):
    ema, name, seen = EMA(decay=0.75), "projection.0.weight", []
    ema.on_train_start(*stage_at(tiny_encoder, 0, 0, ema))
    random = torch.Generator().manual_seed(0)
    for step, num_skipped, is_update in [(1, 0, True), (1, 0, False), (2, 0, True), (3, 1, False), (4, 1, True), (5, 1, True)]:
        weight = tiny_encoder.state_dict()[name]
        weight.copy_(torch.randn(weight.shape, generator=random))  # also where no update was made: it must not be seen
        if is_update:
            seen.append(weight.double().clone())
        ema.on_train_batch_end(*stage_at(tiny_encoder, step, num_skipped, ema), None, None, 0)
    powers = [0.75**k for k in range(len(seen))]
    expected = sum(p * w for p, w in zip(powers, reversed(seen), strict=True)) / sum(powers)
    torch.testing.assert_close(ema.average[name].double(), expected, rtol=1e-6, atol=1e-6)  # fp32's rounding, four times
    trained = copy.deepcopy(tiny_encoder.state_dict())
    with averaged(stage_at(tiny_encoder, 5, 1, ema)[0], tiny_encoder) as provenance:
        assert provenance == {"ema": 0.75}
        assert torch.equal(tiny_encoder.state_dict()[name], ema.average[name])
    torch.testing.assert_close(tiny_encoder.state_dict(), trained, rtol=0, atol=0)


def test_the_average_is_in_fp32_whatever_the_encoder_has(tiny_encoder):
    encoder, ema = tiny_encoder.bfloat16(), EMA(decay=0.999)
    ema.on_train_start(*stage_at(encoder, 0, 0, ema))
    name, steps = "projection.0.weight", 200
    for step in range(1, steps + 1):
        encoder.state_dict()[name].fill_(1.0 + 2.0**-7 * (step % 2))  # neighbours in bf16, whose mean it does not have
        ema.on_train_batch_end(*stage_at(encoder, step, 0, ema), None, None, 0)
    assert ema.average[name].dtype == torch.float32
    assert (ema.average[name] - (1.0 + 2.0**-8)).abs().max() < 1e-4
    with averaged(stage_at(encoder, steps, 0, ema)[0], encoder):
        assert encoder.state_dict()[name].dtype == torch.bfloat16


def test_without_a_decay_nothing_is_averaged_or_kept(tiny_encoder):
    ema = EMA()
    ema.on_train_start(*stage_at(tiny_encoder, 0, 0, ema))
    ema.on_train_batch_end(*stage_at(tiny_encoder, 1, 0, ema), None, None, 0)
    assert ema.state_dict() == {}
    with averaged(stage_at(tiny_encoder, 1, 0, ema)[0], tiny_encoder) as provenance:
        assert provenance == {}
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="the average's decay is"):
            EMA(decay=decay)


def test_an_average_that_begins_late_says_so(tiny_encoder, capsys):
    ema = EMA(decay=0.9)
    trainer, stage = stage_at(tiny_encoder, 7, 0, ema)
    trainer.ckpt_path = "a.ckpt"
    ema.on_train_start(trainer, stage)
    assert "a.ckpt holds no average of the weights; it begins at step 7" in capsys.readouterr().out
    ema.on_train_batch_end(trainer, stage, None, None, 0)
    assert ema.sum == 0.0  # the step's gradients are still being gathered


def callbacks(decay: float | None) -> str:
    kept = "{class_path: lightning_modules.checkpoints.Checkpoints, init_args: {every_steps: 1, keep: 99}}"
    return f"trainer.callbacks=[{kept},{{class_path: lightning_modules.ema.EMA, init_args: {{decay: {decay or 'null'}}}}}]"


NO_QUEUE = "model.objective.queue=0"  # weights alone are compared
MUON_AND_EMA = ["model.optimizer.name=muon", callbacks(0.9)]
LAYERED = [
    *MUON_AND_EMA,
    NO_QUEUE,
    "trainer.max_steps=6",
    "trainer.gradient_clip_val=1.0",
    "model.snapshot_every=4",
    "model.optimizer.layer_decay=0.5",
    "model.optimizer.rates={towers: 0.5, boundaries: 0}",
    "model.encoder.backbone.text.num_hidden_layers=2",
]
OPTIONS = {
    "bf16": [NO_QUEUE, "trainer.precision=bf16-mixed"],
    "gathering": [NO_QUEUE, "trainer.accumulate_grad_batches=2", "model.snapshot_every=2"],
}


@pytest.fixture(scope="module")
def straight(zygote, tmp_path_factory) -> Path:
    """A run of six steps with Muon, a rate for each layer and an average, its third update skipped; every step's checkpoint."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run = zygote.begin(out, *LAYERED, SPOIL=json.dumps({"2": "nan-gradient"}))
    assert run.wait() == [0], run.log()
    return out


def checkpoint(out: Path, step: int) -> dict[str, Any]:
    return VerifiedCheckpointIO().load_checkpoint(out / "checkpoints" / f"step={step:08d}.ckpt")


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints have the same weights, moments and average, bit for bit."""
    for part in (
        lambda state: state["state_dict"],
        lambda state: state["optimizer_states"][0]["state"],
        lambda state: state["callbacks"]["EMA"],
    ):
        torch.testing.assert_close(part(one), part(other), rtol=0, atol=0)


def test_the_saved_encoders_are_the_averaged_ones(straight):
    total, mean, expected = 0.0, {}, {}
    for step in (1, 2, 4, 5, 6):  # the third update was skipped
        total = 0.9 * total + 1.0
        for name, weight in checkpoint(straight, step)["state_dict"].items():
            mean[name] = mean.get(name, 0.0) + (weight.double() - mean.get(name, 0.0)) / total
        expected[step] = dict(mean)
    for folder, step in (("encoder-000004", 4), ("encoder", 6)):
        saved = read_weights(straight / folder)
        assert read_provenance(straight / folder)["ema"] == 0.9
        trained = checkpoint(straight, step)["state_dict"]
        frozen = {name for name in saved if name.startswith("backbone.boundaries.")}
        assert {f"encoder.{name}" for name in saved.keys() - frozen} == trained.keys()
        for name, weight in ((name, saved[name]) for name in saved.keys() - frozen):
            torch.testing.assert_close(weight.double(), expected[step][f"encoder.{name}"], rtol=1e-5, atol=1e-6)
        assert any(not torch.equal(saved[name.removeprefix("encoder.")], weight) for name, weight in trained.items())


def test_a_skipped_update_changes_neither_weight_nor_average(straight):
    assert_same(checkpoint(straight, 3), checkpoint(straight, 2))


def test_a_run_with_everything_on_goes_on_bit_for_bit(straight, zygote, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(straight / "checkpoints" / "step=00000004.ckpt", tmp_path / "run" / "checkpoints")
    run = zygote.begin(tmp_path / "run", *LAYERED)
    assert run.wait() == [0], run.log()
    assert sorted(consumed(tmp_path / "run")) == [4, 5]
    assert weights_hash(tmp_path / "run") == weights_hash(straight)
    one, other = checkpoint(tmp_path / "run", 6), checkpoint(straight, 6)
    assert_same(one, other)
    assert one["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]
    assert one["lr_schedulers"] == other["lr_schedulers"]


def test_going_on_with_other_rates_is_refused(straight, zygote, tmp_path):
    source = straight / "checkpoints" / "step=00000004.ckpt"
    run = zygote.begin(tmp_path / "run", *LAYERED, "model.optimizer.layer_decay=0.9", f"ckpt_path={source}")
    assert run.wait() == [1]
    assert "error: the checkpoint was made with another optimizer.name, rates or layer_decay" in run.log()
    assert "Traceback" not in run.log()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("more", [[callbacks(None)], MUON_AND_EMA], ids=["alone", "with muon and average"])
def test_a_trainers_options_work(option, more, zygote, tmp_path):
    out = tmp_path / "run"
    run = zygote.begin(out, "trainer.max_steps=3", "data.num_workers=0", *OPTIONS[option], *more)
    assert run.wait() == [0], run.log()
    provenance = read_provenance(out / "encoder")
    assert provenance["steps"] == 3
    assert ("ema" in provenance) == (more is MUON_AND_EMA)
    assert len(consumed(out)) == (6 if option == "gathering" else 3)
    assert [path.name for path in out.glob("encoder-*")] == (["encoder-000002"] if option == "gathering" else [])
    first, last = (checkpoint(out, step)["state_dict"] for step in (1, 3))
    assert all(weight.dtype == torch.float32 for weight in last.values())
    assert not torch.equal(first["encoder.projection.0.weight"], last["encoder.projection.0.weight"])
