"""Promises of training a part: patterns say which, a checkpoint holds that alone, and goes on exactly on the same rest only."""

import dataclasses
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from samples import TINY_TEXT
from test_optimizer import Trained, callbacks
from test_sharded import LAYOUTS, NEAR, distance
from torch import nn
from trials import Run, consumed, weights_hash

from lightning_modules.adapters import LoRAConfig, inject, is_adapter
from lightning_modules.checkpoints import FOLDER, VerifiedCheckpointIO, in_order, newest
from lightning_modules.configuration import CONF
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance, read_weights
from lightning_modules.optimizer import OptimizerConfig, freeze
from lightning_modules.soup import soup
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
    linear = {
        name.removesuffix(".weight") for name in all_names() if re.search(r"(_proj|\.attn\.\w+|fc\d|picture\.project)\.w", name)
    }
    assert len(linear) == 2 * 7 + 5
    adapters = {f"{name}.lora_{x}.default.weight" for name in linear for x in "AB"}
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


def test_the_hash_is_of_frozen_names_shapes_and_bytes():
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
    module.one.weight.data = module.one.weight.data.view(1, 4)
    found.add(frozen_sha256(module))
    module.one.weight.data = module.one.weight.data.view(2, 2)
    with torch.no_grad():
        module.one.weight[1, 1] += 1e-7
    found.add(frozen_sha256(module))
    module.norm.bias.requires_grad_(False)
    found.add(frozen_sha256(module))
    assert len(found) == 5


STILL = ["model.encoder.backbone.text.attention_dropout=0.0", "trainer.max_steps=6"]
LORA = [
    "model.lora.rank=2",
    "model.lora.alpha=8",
    "model.optimizer.train=[backbone.boundaries]",
    "model.optimizer.learning_rate=0.01",
]
ALL = [*LORA, "model.lora.dropout=0.1", "model.objective.learn_temperature=true", "model.optimizer.rates={objective: 0}"]
ALL += ["model.snapshot_every=4", callbacks(0.9), "trainer.max_steps=8"]


def begun(zygote, out: Path, *more: str) -> Path:
    run = zygote.begin(out, *more)
    assert run.wait() == [0], run.log()
    return out


@pytest.fixture(scope="module")
def base(zygote, tmp_path_factory) -> Path:
    """A run that trains everything, whose encoder the others begin from."""
    return begun(zygote, tmp_path_factory.mktemp("base"), "trainer.max_steps=4")


def init_from(base: Path) -> list[str]:
    return [f"model.init_from={base / 'encoder'}"]


@pytest.fixture(scope="module")
def straight(zygote, base, tmp_path_factory) -> Path:
    """A run of adapters with dropout and an average, which nothing stopped."""
    return begun(zygote, tmp_path_factory.mktemp("straight"), *ALL, *init_from(base))


def checkpoint(out: Path) -> dict[str, Any]:
    return VerifiedCheckpointIO().load_checkpoint(in_order(out / FOLDER)[0])


def test_a_checkpoint_holds_what_is_trained_and_the_hash_of_the_rest(straight, base):
    held = checkpoint(straight)
    encoder = {name for name in held["state_dict"] if name.startswith("encoder.")}
    assert {name for name in encoder if not is_adapter(name)} == {
        f"encoder.backbone.boundaries.{kind}" for kind in ("image", "page", "audio", "video")
    }
    assert len([name for name in encoder if is_adapter(name)]) == 2 * (7 + 2 * 5)
    assert all(name.startswith("objective.queue.") for name in held["state_dict"].keys() - encoder)  # not its temperature
    assert {f"encoder.{name}" for name in held["callbacks"]["EMA"]["average"]} == encoder
    assert len(held["optimizer_states"][0]["state"]) == len(encoder)
    assert re.fullmatch("[0-9a-f]{64}", held["frozen_sha256"])
    sizes = [sum(path.stat().st_size for path in in_order(out / FOLDER)[:1]) for out in (straight, base)]
    assert sizes[0] < sizes[1] / 3


def test_the_encoder_that_is_written_is_the_frozen_one_with_adapters_merged(straight, base):
    weights, before = read_weights(straight / "encoder"), read_weights(base / "encoder")
    load_encoder(straight / "encoder")
    name = "backbone.text.layers.0.mlp.up_proj"
    average = checkpoint(straight)["callbacks"]["EMA"]["average"]
    up, down = (average[f"{name}.lora_{x}.default.weight"] for x in "BA")
    torch.testing.assert_close(weights[f"{name}.weight"], before[f"{name}.weight"] + 4.0 * up @ down, rtol=1e-5, atol=1e-6)
    assert weights.keys() == before.keys()
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    linear = {name for name in weights if re.search(r"(_proj|\.attn\.\w+|fc\d|towers\.\w+\.project)\.weight$", name)}
    assert moved == linear | {name for name in weights if "boundaries" in name}
    assert len(linear) == 7 + 2 * 5


def test_provenance_says_what_was_merged_and_the_screen_what_is_trained(straight, base):
    for folder in ("encoder-000004", "encoder"):
        provenance = read_provenance(straight / folder)
        expected = {
            "rank": 2,
            "alpha": 8.0,
            "dropout": 0.1,
            "dora": False,
            "targets": ["backbone"],
            "exclude": [],
            "layers": 17,
        }
        assert provenance["lora"] == expected
        assert provenance["ema"] == 0.9
        assert provenance["parents"][0]["sha256"] == read_provenance(base / "encoder")["sha256"]
    held = checkpoint(straight)["state_dict"]
    num_trained = sum(weight.numel() for name, weight in held.items() if name.startswith("encoder."))
    num_all = sum(weight.numel() for weight in read_weights(base / "encoder").values()) + num_trained - 4 * 2 * 32
    log = (straight / "log-0").read_text()
    assert f"{num_trained} of the encoder's {num_all} parameters are trained, with adapters beside 17 linear layers" in log
    assert log.count("adapters are as they began") == 1
    assert "5 of 17 adapters are as they began, among them backbone.towers.spectrogram" in log.partition("encoder-000004")[0]


def test_a_run_of_adapters_killed_at_any_moment_goes_on_exactly(zygote, straight, base, tmp_path):
    chance = random.Random(0)
    for step in (2, 5):
        run = zygote.begin(tmp_path, *ALL, *init_from(base))
        run.wait_for_step(step)
        time.sleep(chance.uniform(0.0, 0.1))
        run.send(signal.SIGKILL)
        run.wait()
        assert newest(tmp_path / FOLDER)
    begun(zygote, tmp_path, *ALL, *init_from(base))
    assert consumed(tmp_path) == consumed(straight)
    assert weights_hash(tmp_path) == weights_hash(straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.lora.alpha=4"], "error: the checkpoint was made with model.lora {'rank': 2, 'alpha': 8.0"),
        (
            ["model.optimizer.train=[projection]"],
            "error: the checkpoint was made with another model.optimizer.train, freeze or",
        ),
        (["model.init_from=straight"], "error: the checkpoint was trained on other frozen weights than this run has"),
        (["model.encoder.backbone.text.head_dim=4"], "is of another shape"),
    ],
)
def test_going_on_with_something_else_is_refused(zygote, straight, base, tmp_path, change, message):
    change = [word.replace("straight", str(straight / "encoder")) for word in change]
    first = [] if "head_dim" in change[0] else init_from(base)
    run = zygote.begin(tmp_path, *ALL, *first, *change, f"ckpt_path={in_order(straight / FOLDER)[0]}")
    assert run.wait() == [1]
    assert message in run.log()
    assert "Traceback" not in run.log()


def test_a_run_without_adapters_does_not_go_on_from_one_with_them(zygote, straight, base, tmp_path):
    run = zygote.begin(tmp_path, *init_from(base), f"ckpt_path={in_order(straight / FOLDER)[0]}")
    assert run.wait() == [1]
    assert "this run has None; go on with that of the checkpoint" in run.log()
    frozen = ["model.optimizer.freeze=[projection]", f"ckpt_path={in_order(base / FOLDER)[0]}"]
    run = zygote.begin(tmp_path / "other", *frozen, "trainer.max_steps=9")
    assert run.wait() == [1]
    assert "made with another model.optimizer.train, freeze or rates: 1 tensors are trained" in run.log()


def test_runs_of_adapters_are_averaged_as_any_other(zygote, straight, base, tmp_path):
    other = begun(
        zygote, tmp_path / "other", *LORA, *init_from(base), "model.lora.dora=true", "data.seed=7", "trainer.max_steps=4"
    )
    folders = [str(out / "encoder") for out in (straight, other)]
    soup(folders, str(tmp_path / "soup"))
    found, (one, two) = read_weights(tmp_path / "soup"), map(read_weights, folders)
    assert all(torch.allclose(found[name], (one[name] + two[name]) / 2, atol=1e-6) for name in found)
    assert read_provenance(folders[1])["lora"]["dora"] is True


def test_the_stage_of_adapters_runs_as_it_is_written(zygote, base, world, tmp_path):
    task = "{world/text-image: {shards: world/text-image/train, kind: retrieval, batch_size: 4}}"
    given = [f"data.root={world}", f"data.tasks={task}", *init_from(base), "data.num_workers=0", "trainer.max_steps=2"]
    arguments = ["conf=finetune_lora", *given, f"trainer.default_root_dir={tmp_path}"]
    run = Run(zygote, tmp_path, [zygote.ask(arguments=arguments, environment={}, log=str(tmp_path / "log-0"))])
    assert run.wait() == [0], run.log()
    written = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "lora.yaml").model.lora)
    assert isinstance(written, dict)
    assert read_provenance(tmp_path / "encoder")["lora"] == {**written, "layers": 17}
    assert written == {**dataclasses.asdict(LoRAConfig()), "targets": ["backbone"], "exclude": []}


def test_adapters_are_trained_in_half_precision(zygote, base, tmp_path):
    more = [*init_from(base), "trainer.precision=bf16-mixed", "model.lora.dora=true", "trainer.accumulate_grad_batches=2"]
    out, name = begun(zygote, tmp_path, *STILL, *LORA, *more), "backbone.text.layers.0.mlp.up_proj.weight"
    weights, before = read_weights(out / "encoder"), read_weights(base / "encoder")
    assert weights[name].dtype == torch.float32
    assert not torch.equal(weights[name], before[name])
    assert all(torch.equal(weights[name], before[name]) for name in before if "norm" in name)


@pytest.fixture(scope="module")
def layouts(zygote, tmp_path_factory) -> dict[str, Path]:
    """Layout to a run of DoRA in parts, one process and two."""
    root, found = tmp_path_factory.mktemp("layouts"), {}
    more = [*STILL, *LORA, "model.lora.dora=true", "model.compute.max_tokens=64", "model.compute.checkpoint_layers=true"]
    more += ["model.compare_cached=true", callbacks(0.9)]
    for layout, (world_size, strategy) in LAYOUTS.items():
        found[layout] = root / layout
        run = zygote.begin(found[layout], *more, *strategy, world_size=world_size)
        assert run.wait() == [0] * world_size, run.log()
    return found


@pytest.mark.parametrize("layout", ["ddp", "sharded"])
def test_adapters_learn_the_same_on_several_ranks(layouts, layout):
    assert consumed(layouts[layout]) == consumed(layouts["one"])
    assert distance(layouts[layout], layouts["one"]) < NEAR
    one, other = (checkpoint(layouts[name]) for name in ("one", layout))
    assert {name: x.shape for name, x in one["state_dict"].items()} == {
        name: x.shape for name, x in other["state_dict"].items()
    }
    assert one["frozen_sha256"] == other["frozen_sha256"]
