"""Promises of the adaptation: the text model learns to denoise, a killed run goes on exactly, prefinetune starts from it."""

import csv
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from samples import TEXTS, TINY, TINY_TEXT
from test_train import run
from trials import consumed, weights_hash

from datamodules.denoising import Denoise, DenoisingBatch
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Example, text_item
from datamodules.ul2 import UL2Config
from lightning_modules.adapt import Adapt
from lightning_modules.checkpoints import FOLDER, VerifiedCheckpointIO, newest
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import read_config, read_provenance, read_weights
from lightning_modules.encoder.embedder import ComputeConfig, EncoderConfig
from lightning_modules.optimizer import OptimizerConfig, optimizer_of, part_of

TINY_ADAPT = ["conf=adapt", *TINY, "data.processor.vocab_size=380", "data.ul2.sequence_length=64"]
SMALL = [
    *TINY_ADAPT,
    "ckpt_path=newest",
    "trainer.max_steps=12",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks=[{class_path: lightning_modules.checkpoints.Checkpoints, init_args: {every_steps: 3}}]",
    "trainer.logger=false",
    "data.num_workers=1",
    "model.encoder.backbone.text.attention_dropout=0.1",  # what is drawn at random must be the same after a resume
]
TEXT = "encoder.backbone.text."
GEMMA3 = {"model_type": "gemma3_text", "query_pre_attn_scalar": 8, "sliding_window": 64}

GEMMA2 = {**TINY_TEXT, "model_type": "gemma2", "query_pre_attn_scalar": 8}  # which cannot be packed


def stage_of(config: EncoderConfig, **arguments) -> Adapt:
    torch.manual_seed(0)
    return Adapt(config, **arguments)


def batch_of(processor) -> DenoisingBatch:
    ul2 = UL2Config(16, first_sentinel=310)
    examples = [Example(f"k{n}", text_item(TEXTS[n]), text_item(TEXTS[n + 1])) for n in range(4)]
    return Denoise(processor, ul2, range(310, 310 + ul2.num_sentinels), 0, 0)("a/b", 0, examples, rows=np.arange(4))


@pytest.mark.parametrize("text", [TINY_TEXT, {**TINY_TEXT, **GEMMA3}, GEMMA2], ids=["qwen3", "gemma3", "gemma2"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_of_the_optimiser_lowers_the_loss(processor, text, name):
    config = OptimizerConfig(name, learning_rate=3e-3)
    stage = stage_of(EncoderConfig(BackboneConfig(text=text), 16, (16,)), optimizer=config)
    batch, optimizer = batch_of(processor), optimizer_of(stage, config)
    before = stage.losses(batch).mean()
    before.backward()
    optimizer.step()
    assert stage.losses(batch).mean() < before - 0.01


def test_text_model_and_decoder_learn_and_all_else_stays(processor, tiny_config):
    stage = stage_of(tiny_config)
    stage.losses(batch_of(processor)).mean().backward()
    learns = {name for name, parameter in stage.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert learns == {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, _ in stage.named_parameters() if part_of(name) in ("text", "decoder")}


def test_a_frozen_text_model_leaves_the_decoder_to_learn(tiny_config):
    stage = stage_of(tiny_config, optimizer=OptimizerConfig(rates={"text": 0}))
    assert {part_of(name) for name, parameter in stage.named_parameters() if parameter.requires_grad} == {"decoder"}
    stage = stage_of(tiny_config, optimizer=OptimizerConfig(rates={"decoder": 0}))
    assert {part_of(name) for name, parameter in stage.named_parameters() if parameter.requires_grad} == {"text"}


def test_muon_moves_the_decoders_matrices(tiny_config):
    stage = stage_of(tiny_config)
    matrices = {id(p) for g in optimizer_of(stage, OptimizerConfig("muon")).param_groups if g["muon"] for p in g["params"]}
    moved = {name for name, parameter in stage.named_parameters() if id(parameter) in matrices}
    assert "decoder.text.layers.0.cross_attn.q_proj.weight" in moved
    assert "decoder.text.embed_tokens.weight" not in moved


def test_both_layouts_have_the_same_loss(processor, tiny_config):
    losses = [
        stage_of(tiny_config, compute=ComputeConfig(layout)).losses(batch_of(processor)) for layout in ("packed", "padded")
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_are_those_of_both_sides(tiny_config):
    stage = stage_of(tiny_config, compute=ComputeConfig(checkpoint_layers=True))
    for text in (stage.encoder.backbone.text, stage.decoder.text):
        assert all(layer.gradient_checkpointing for layer in text.layers)


def test_tokens_count_alike_on_all_ranks_and_denoisers_are_told_apart(processor, tiny_config, monkeypatch):
    stage, batch = stage_of(tiny_config), batch_of(processor)
    batch.num_without_text = 2
    losses, stage.names = stage.losses(batch).detach(), [f"d{n}" for n in range(5)]
    strategy = SimpleNamespace(reduce=lambda number, reduce_op: number / 2)  # the other rank has no token
    monkeypatch.setattr(Adapt, "trainer", SimpleNamespace(strategy=strategy))
    monkeypatch.setattr(stage, "log", lambda *arguments, **more: None)
    torch.testing.assert_close(stage.training_step(batch, 0).detach(), 2 * losses.mean())
    rows = losses.split(batch.decoder.lengths.tolist())
    told = {name: value for name, value in stage._parts.items() if "@" in name}
    assert len(told) > 1
    for name, value in told.items():
        own = [row for row, n in zip(rows, batch.denoiser.tolist(), strict=True) if f"loss@d{n}" == name]
        assert value == pytest.approx(torch.cat(own).mean().item())
    assert stage._parts["loss"] == pytest.approx(losses.mean().item())
    assert stage._parts["target_tokens"] == len(batch.target)
    assert stage._parts["items_without_text"] == 2
    longest = max(len(row) for row in rows)
    assert stage._parts["padding"] == pytest.approx(1 - len(losses) / (len(rows) * longest))


@pytest.fixture(scope="module")
def adapted(world, tmp_path_factory) -> Path:
    """A run of 20 steps."""
    out = tmp_path_factory.mktemp("runs") / "adapt"
    more = ["trainer.max_steps=20", "trainer.log_every_n_steps=1", "model.optimizer.learning_rate=1e-2"]
    run(*TINY_ADAPT, f"data.root={world}", f"trainer.default_root_dir={out}", *more)
    return out


def test_a_run_leaves_an_encoder_and_the_loss_of_every_denoiser(adapted):
    provenance = read_provenance(adapted / "encoder")
    assert (provenance["stage"], provenance["steps"]) == ("Adapt", 20)
    assert provenance["tasks"] == ["world/text-code", "world/text-text"]
    with next((adapted / "logs").glob("version_*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(loss) for row in rows for name, loss in row.items() if re.fullmatch("train/.*/loss", name) and loss]
    assert losses[0] == pytest.approx(np.log(400), rel=0.02)  # of a run from random weights
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    for name in ("spans-3-15", "spans-12-50", "spans-32-15", "spans-32-50", "prefix"):
        assert any(row.get(f"train/world/text-text/loss@{name}") for row in rows), name


def test_prefinetuning_starts_from_the_adapted_encoder(adapted, world, tmp_path):
    encoder, out = adapted / "encoder", tmp_path / "prefinetune"
    arguments = [word for word in TINY if not word.startswith("data.processor")]
    arguments += [f"model.init_from={encoder}", f"data.root={world}", f"trainer.default_root_dir={out}", "trainer.max_steps=1"]
    as_adapted = ["model.encoder=null", f"data.init_from={encoder}", "data.processor=null"]
    shown = run("conf=quickstart/prefinetune", *arguments, "data.processor.vocab_size=380", ok=False)
    assert f"error: {encoder} knows another tokenizer's tokens than data.processor has; set data.init_from" in shown
    still = ["model.optimizer.learning_rate=1e-12", "model.optimizer.weight_decay=0"]
    run("conf=quickstart/prefinetune", *arguments, *as_adapted, *still)
    before, after = read_weights(encoder), read_weights(out / "encoder")
    assert all(torch.allclose(after[name], weight, atol=1e-6) for name, weight in before.items())
    assert read_provenance(out / "encoder")["parents"][0]["sha256"] == read_provenance(encoder)["sha256"]
    assert (out / "encoder" / "tokenizer.json").read_bytes() == (encoder / "tokenizer.json").read_bytes()
    checkpoint = f"ckpt_path={newest(adapted / FOLDER)}"
    shown = run("conf=quickstart/prefinetune", *arguments, *as_adapted, checkpoint, ok=False)
    assert "error: the checkpoint given as ckpt_path is one of an adaptation; begin a run of its own" in shown
    stage = Adapt(read_config(encoder))
    with pytest.raises(ValueError, match="given as ckpt_path is not one of an adaptation"):
        stage.on_load_checkpoint({"state_dict": {f"encoder.{name}": weight for name, weight in before.items()}})


def test_both_sides_start_from_a_pretrained_decoder(zygote, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{**TINY_TEXT, "vocab_size": 400})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "decoder")
    train_tokenizer(TEXTS, 380).save_pretrained(tmp_path / "decoder")
    backbone = BackboneConfig(pretrained=str(tmp_path / "decoder"))
    stage = Adapt(EncoderConfig(backbone, 16, (16,)))
    sides = stage.encoder.backbone.text.state_dict(), stage.decoder.text.state_dict()
    for name, weight in model.model.state_dict().items():
        assert torch.equal(sides[0][name], weight)
        assert torch.equal(sides[1][re.sub(r"^layers\.(\d+)", r"layers.\1.layer", name)], weight)
    named = ["model.encoder.backbone.text=null", f"model.encoder.backbone.pretrained={tmp_path / 'decoder'}"]
    arguments = [word for word in SMALL if not word.startswith("model.encoder.backbone.text")]
    trial = zygote.begin(tmp_path / "new-tokenizer", *named, base=arguments)
    assert trial.wait() == [1]
    assert "a new tokenizer's ids would mean other words to it; set data.processor.tokenizer=" in trial.log()
    named.append(f"data.processor.tokenizer={tmp_path / 'decoder'}")
    trial = zygote.begin(tmp_path / "run", *named, "trainer.max_steps=2", base=arguments)
    assert trial.wait() == [0], trial.log()
    assert trial.log().count("decoder has an output layer of its own, which is left out") == 1


def begun(zygote, out: Path, *more: str, world_size: int = 1):
    return zygote.begin(out, *more, base=SMALL, world_size=world_size)


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("reference")
    trial = begun(zygote, out)
    assert trial.wait() == [0], trial.log()
    return out


def test_a_run_killed_at_any_moment_goes_on_exactly(zygote, reference, tmp_path):
    chance, out = random.Random(0), tmp_path / "run"
    for _ in range(2):
        trial = begun(zygote, out)
        trial.wait_for_step(chance.randrange(2, 10))
        time.sleep(chance.uniform(0, 0.3))
        trial.send(signal.SIGKILL)
        trial.wait()
    trial = begun(zygote, out)
    assert trial.wait() == [0], trial.log()
    assert consumed(out) == consumed(reference)
    assert weights_hash(out) == weights_hash(reference)
    ends = [VerifiedCheckpointIO().load_checkpoint(newest(folder / FOLDER))["state_dict"] for folder in (out, reference)]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_ranks_share_the_batches_and_every_parameter_is_used(zygote, reference, tmp_path):
    trial = begun(zygote, tmp_path / "run", "trainer.strategy=ddp", world_size=2)  # which waits for ever for one that is not
    assert trial.wait() == [0, 0], trial.log()
    assert consumed(tmp_path / "run") == consumed(reference)


def test_a_gemma_3_is_adapted(zygote, tmp_path):
    text = [f"model.encoder.backbone.text.{name}={value}" for name, value in GEMMA3.items()]
    trial = begun(zygote, tmp_path / "run", *text, "trainer.max_steps=2")
    assert trial.wait() == [0], trial.log()
    assert "post_feedforward_layernorm" in " ".join(read_weights(tmp_path / "run" / "encoder"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.encoder.backbone.text={model_type: bert, vocab_size: 400, hidden_size: 32, num_attention_heads: 4}"],
            "the text model is a bert, which is no decoder that can be adapted; name one of gemma,",
        ),
        (
            ["data.processor.vocab_size=400", "model.encoder.backbone.text.vocab_size=385", "data.processor.vocab_size=384"],
            "need 4 sentinels, here the ids from 384 to 387; the text model has 385",
        ),
        (["data.ul2.first_sentinel=399"], "need 4 sentinels, here the ids from 399 to 402; the text model has 400"),
        (
            ["model.encoder.backbone.text=null", "model.encoder.backbone.pretrained=/nowhere/model"],
            "no model can be read from '/nowhere/model'",
        ),
        (["data.ul2.denoisers.prefix.rate=1.5"], "a denoiser has rate 1.5"),
        (["data.ul2.sequence_length=2047"], "data.ul2.sequence_length is 2047, the text model takes 2048 tokens"),
        (["model.compute.max_tokens=64"], "compute.max_tokens is 64; an adaptation takes a batch whole"),
        (["model.init_from=x"], "model.init_from"),
        (
            ["trainer.strategy={class_path: lightning_modules.sharded.Sharded}", "trainer.accelerator=cpu"],
            "an adaptation does not share its weights out over ranks",
        ),
    ],
)
def test_what_a_person_gets_wrong_gets_one_sentence(zygote, tmp_path, arguments, message):
    trial = begun(zygote, tmp_path / "run", *arguments)
    assert trial.wait() == [1], trial.log()
    shown = [line for line in trial.log().splitlines() if line.startswith("error: ")]
    assert len(shown) == 1
    assert message in shown[0]
    assert "Traceback" not in trial.log()
