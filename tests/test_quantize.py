"""Promises of rounded weights: what is rounded and how, that training sees what the file holds, and that it helps."""

import copy
import re
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import FAMILIES as NATIVE
from native_models import write_model
from safetensors import safe_open
from test_compute import FAMILIES, encoder_of, texts
from test_encoder import ITEMS
from test_native import encoder_of as native_encoder_of
from test_native import items_of, processor_of
from torch import nn
from trials import Run

from lightning_modules.checkpoints import FOLDER, VerifiedCheckpointIO, in_order
from lightning_modules.encoder.checkpoint import load_encoder, load_weights, read_provenance, read_weights, save_encoder
from lightning_modules.encoder.packed_weights import Rounded, pack, unpack
from lightning_modules.encoder.prepacked import prepack
from lightning_modules.quantization import QuantizationConfig, Rounding, fake_quantize, packed, plan_of, rounded
from lightning_modules.quantize import quantize_post

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEMES = ("int4", "int8", "mixed")


def config_of(scheme: Any = "int4", **fields: Any) -> QuantizationConfig:
    return QuantizationConfig(scheme, **{"block": 8, **fields})


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_packed_numbers_are_read_as_they_were(bits, rows, blocks, seed):
    random = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    number = torch.from_numpy(random.integers(-half, half, (rows, 4 * blocks)).astype(np.int8))
    scale = torch.from_numpy(random.uniform(1e-9, 9, (rows, blocks)).astype(np.float32))
    file = pack("a.b.weight", Rounded(number, scale, bits))
    assert file[f"a.b.weight.int{bits}"].nbytes == rows * 4 * blocks * bits // 8
    other = torch.randn(3)
    read = unpack({**file, "norm.scale": other, "gate.int8": other})  # a weight may be called so
    expected = number.double().view(rows, blocks, 4) * scale.double()[..., None]
    assert torch.equal(read["a.b.weight"], expected.flatten(1).float())
    assert torch.equal(read["norm.scale"], other)
    assert torch.equal(read["gate.int8"], other)
    assert len(read) == 3


@pytest.mark.parametrize("rounding", [Rounding(4, 4), Rounding(8, 4), Rounding(8, None), Rounding(4, None)])
def test_the_largest_of_a_block_is_the_largest_of_its_bits(rounding):
    """Scale and rounding as torchao's symmetric mapping has them, by hand: s = max |w| / (half − ½), q = round(w / s)."""
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.1, 3.0, 2.0, -3.0, 0.4], [1e-3, 0, 0, -2e-3, 7, 6, 5, 4]])
    half = 2 ** (rounding.bits - 1)
    blocks = weight.view(2, -1, rounding.block or 8)
    scale = blocks.abs().amax(-1, keepdim=True) / (half - 0.5)
    expected = (blocks / scale).round().clamp(-half, half - 1)
    found = rounded(weight, rounding)
    assert torch.equal(found.number, expected.flatten(1).to(torch.int8))
    torch.testing.assert_close(found.scale, scale.squeeze(-1))
    torch.testing.assert_close(found.weight(), (expected * scale).flatten(1))


def test_a_row_of_zeros_stays_one():
    assert not rounded(torch.zeros(2, 8), Rounding(4, 8)).weight().any()


def test_the_rounding_passes_gradients_by():
    layer = nn.Linear(8, 3, bias=False)
    fake_quantize(nn.ModuleDict({"a": layer}), {"a": Rounding(4, 8)})
    x = torch.randn(5, 8)
    layer(x).sum().backward()
    parameter = dict(layer.named_parameters())["weight"]
    torch.testing.assert_close(parameter.grad, x.sum(0).expand(3, 8))


def frozen(encoder: nn.Module, plan: dict[str, Rounding]) -> nn.Module:
    """A copy with the weights that a file would hold."""
    other = copy.deepcopy(encoder)
    load_weights(other, unpack(packed(encoder.state_dict(), plan)), "a file")  # pyright: ignore[reportArgumentType]
    return other


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_the_vectors_of_the_file(family, scheme):
    encoder, inputs = encoder_of(family), texts(3, 9, 5)
    plan, before = plan_of(encoder, config_of(scheme)), encoder(inputs)
    expected = frozen(encoder, plan)(inputs)
    names = list(encoder.state_dict())
    fake_quantize(encoder, plan)
    found = encoder(inputs)
    assert list(encoder.state_dict()) == names
    assert torch.equal(found, expected)
    assert (F.normalize(before, dim=-1) - F.normalize(found, dim=-1)).abs().max() > 1e-4
    assert torch.equal(copy.deepcopy(encoder)(inputs), expected)


@cache
def native_folder(root: Path, family: str) -> Path:
    return write_model(root / family, family)


@torch.no_grad()
@pytest.mark.parametrize("family", NATIVE)
def test_native_models_too_also_those_that_scale_their_embeddings(tmp_path_factory, family):
    folder = native_folder(tmp_path_factory.getbasetemp() / "quantised", family)
    encoder, inputs = native_encoder_of(folder), processor_of(folder)(items_of(family))
    plan = plan_of(encoder, QuantizationConfig("mixed", block=2))
    before, expected = encoder(inputs), frozen(encoder, plan)(inputs)
    fake_quantize(encoder, plan)
    torch.testing.assert_close(encoder(inputs), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-4)


def test_attention_of_text_and_towers_keeps_eight_bits_in_the_mixed_scheme(tiny_encoder):
    plan = plan_of(tiny_encoder, config_of("mixed"))
    attention = {name for name, rounding in plan.items() if rounding == Rounding(8, None)}
    assert {name for name in plan if ".self_attn." in name or ".attn." in name} == attention
    assert len(attention) == 2 * 4 + 2 * 2
    assert {plan[name] for name in plan.keys() - attention} == {Rounding(4, 8)}
    matrices = {f"{n}.weight" for n, m in tiny_encoder.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    assert {f"{name}.weight" for name in plan} == matrices
    assert set(plan_of(tiny_encoder, config_of("int4")).values()) == {Rounding(4, 8)}
    assert set(plan_of(tiny_encoder, config_of("int8")).values()) == {Rounding(8, 8)}


def test_what_is_kept_stays_and_what_cannot_be_rounded_is_named(tiny_encoder):
    plan = plan_of(tiny_encoder, config_of(keep=("backbone.towers", r"projection\.0")))
    assert plan
    assert not [name for name in plan if "towers" in name or "projection" in name]
    message = r"\S+ has rows of 24 numbers, which do not divide into blocks of 16; .*quantization.keep=\['"
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(tiny_encoder, config_of(block=16))
    hint = re.search(r"keep=\['(.*)'\]", str(caught.value))
    assert hint is not None
    assert hint[1].replace("\\", "") not in plan_of(tiny_encoder, config_of(keep=(hint[1],)))
    with pytest.raises(ValueError, match="matches no name of the encoder"):
        plan_of(tiny_encoder, config_of(keep=("tower",)))
    with pytest.raises(ValueError, match="leaves no matrix"):
        plan_of(tiny_encoder, config_of(keep=("backbone", "projection")))
    with pytest.raises(ValueError, match="it must be an even number"):
        config_of(block=3)


@torch.no_grad()
@pytest.mark.parametrize("scheme", [*SCHEMES, "bf16"])
def test_a_folder_rounded_afterwards_is_small_and_read_as_any_other(tiny_encoder, processor, tmp_path, scheme):
    save_encoder(tmp_path / "plain", tiny_encoder, processor, provenance={"stage": "test"})
    quantize_post(str(tmp_path / "plain"), str(tmp_path / "small"), config_of(scheme))
    plan = plan_of(tiny_encoder, config_of(scheme))
    rest = 16 if scheme == "bf16" else 32
    bits = {f"{name}.weight": how.bits + (32 / how.block if how.block else 0) for name, how in plan.items()}
    state = tiny_encoder.state_dict()
    rows = sum(len(state[f"{name}.weight"]) for name, how in plan.items() if how.block is None)
    expected = sum(tensor.numel() * bits.get(name, rest) / 8 for name, tensor in state.items()) + 4 * rows
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == expected  # noqa: SIM118
    about = read_provenance(tmp_path / "small")
    assert about["quantization"] == {"scheme": scheme, "block": 8, "keep": []}
    assert about["parents"][0]["sha256"] == read_provenance(tmp_path / "plain")["sha256"]
    encoder, _ = load_encoder(tmp_path / "small")
    prepack(encoder.eval())
    expected = frozen(tiny_encoder, plan)(processor(ITEMS))
    torch.testing.assert_close(encoder(processor(ITEMS)), expected, rtol=1e-4, atol=1e-5)
    similar = F.cosine_similarity(encoder(processor(ITEMS)), tiny_encoder(processor(ITEMS)))
    assert similar.min() > {"int4": 0.5, "mixed": 0.5}.get(scheme, 0.99)


def test_a_damaged_rounded_folder_is_refused(tiny_encoder, processor, tmp_path):
    save_encoder(tmp_path / "plain", tiny_encoder, processor, provenance={"stage": "test"})
    quantize_post(str(tmp_path / "plain"), str(tmp_path / "small"), config_of())
    file = tmp_path / "small" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was written"):
        read_weights(tmp_path / "small")


def distilled(seed: int) -> tuple[float, float]:
    """1 − cosine with the float encoder, mean over texts not trained on: of weights rounded as they are, and trained for it."""
    plain = encoder_of("bert")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    plan, student, num_steps = plan_of(plain, config_of(block=16)), copy.deepcopy(plain), 100
    fake_quantize(student, plan)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / num_steps)
        inputs = texts(*[12] * 32, seed=1000 * seed + step)
        with torch.no_grad():
            target = plain(inputs)
        optimizer.zero_grad()
        (1 - F.cosine_similarity(student(inputs), target)).mean().backward()
        optimizer.step()
    held_out = texts(*[12] * 32, seed=10_000 + seed)
    with torch.no_grad():
        target = plain(held_out)
        off = [(1 - F.cosine_similarity(frozen(one, plan)(held_out), target)).mean().item() for one in (plain, student)]
    return off[0], off[1]


def test_training_for_four_bits_loses_less_than_rounding_afterwards():
    """With each of six seeds, and on average by more than five standard errors: one seed is chance, as fp32 rounds it."""
    found = [distilled(seed) for seed in range(6)]
    left = [trained / post for post, trained in found]
    assert max(left) < 1, found
    assert 1 - mean(left) > 5 * stdev(left) / len(left) ** 0.5, found


@pytest.fixture(scope="module")
def base(zygote, tmp_path_factory) -> Path:
    """A run whose encoder is trained on."""
    out = tmp_path_factory.mktemp("base")
    run = zygote.begin(out, "trainer.max_steps=4")
    assert run.wait() == [0], run.log()
    return out


def quantized(zygote, out: Path, base: Path, world: Path, *more: str, stage: str = "quantize") -> Run:
    task = "{world/text-image: {shards: world/text-image/train, kind: retrieval, batch_size: 4}}"
    arguments = [
        f"conf={stage}",
        f"data.root={world}",
        f"data.tasks={task}",
        f"model.init_from={base / 'encoder'}",
        *(["model.quantization.block=8"] if stage == "quantize" else []),
        "data.num_workers=0",
        "trainer.max_steps=4",
        "trainer.callbacks.1.init_args.every_steps=2",
        f"trainer.default_root_dir={out}",
        *more,
    ]
    out.mkdir(exist_ok=True)
    return Run(zygote, out, [zygote.ask(arguments=arguments, environment={}, log=str(out / "log-0"))])


@pytest.mark.parametrize("more", [[], ["trainer.callbacks.2.init_args.decay=0.5"]], ids=["last", "average"])
def test_the_stage_writes_the_rounded_weights_it_trained(zygote, base, world, tmp_path, more):
    run = quantized(zygote, tmp_path / "run", base, world, *more)
    assert run.wait() == [0], run.log()
    folder = tmp_path / "run" / "encoder"
    about = read_provenance(folder)
    assert about["stage"] == "Quantize"
    assert about["quantization"] == {"scheme": "int4", "block": 8, "keep": []}
    encoder, _ = load_encoder(folder)
    weights = read_weights(folder)
    held = VerifiedCheckpointIO().load_checkpoint(in_order(tmp_path / "run" / FOLDER)[0])
    latent = {name.removeprefix("encoder."): weight for name, weight in held["state_dict"].items() if name[:8] == "encoder."}
    latent |= held["callbacks"].get("EMA", {}).get("average", {})
    expected = unpack(packed(latent, plan_of(encoder, config_of())))
    assert all(torch.equal(expected[name], weights[name]) for name in weights)
    assert not all(torch.equal(latent[name], weights[name]) for name in weights)
    before = read_weights(base / "encoder")
    assert any(not torch.equal(weights[name], before[name]) for name in weights if name.endswith("norm.weight"))


def test_going_on_with_another_rounding_is_refused(zygote, base, world, tmp_path):
    run = quantized(zygote, tmp_path / "run", base, world)
    assert run.wait() == [0], run.log()
    checkpoint = f"ckpt_path={in_order(tmp_path / 'run' / FOLDER)[0]}"
    other = quantized(zygote, tmp_path / "other", base, world, "model.quantization.scheme=int8", checkpoint)
    assert other.wait() == [1]
    assert "the checkpoint was made with model.quantization {'scheme': 'int4'" in other.log()
    plain = quantized(zygote, tmp_path / "plain", base, world, checkpoint, stage="finetune")
    assert plain.wait() == [1]
    assert "the checkpoint was made with model.quantization {'scheme': 'int4'" in plain.log()
    fewer = quantized(zygote, tmp_path / "bf16", base, world, "model.quantization.scheme=bf16")
    assert fewer.wait() == [1]
    assert "rounds no matrix, so there is nothing to train; use conf=quantize_post" in fewer.log()
