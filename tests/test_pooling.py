"""Promises of poolings and projections: what each is by hand, blind to padding and neighbours, saved, trained, refused."""

import dataclasses

import pytest
import torch
from samples import TINY_TEXT
from torch import nn

from datamodules.processors.inputs import Inputs
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import load_encoder, save_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig, probe, require_cached_is_plain
from lightning_modules.encoder.pooling import AttentionPooling, pool, pooling_of
from lightning_modules.optimizer import OptimizerConfig, freeze, part_of

NAMES = ["mean", "last", "first", "attention", "weighted_mean"]
LENGTHS = torch.tensor([3, 1, 4, 4, 2])
SHAPE = EncoderConfig(BackboneConfig(text=dict(TINY_TEXT)), embedding_dim=16, prefixes=(4, 16))


def encoder_of(pooling="mean", **more) -> Embedder:
    torch.manual_seed(0)
    encoder = Embedder(dataclasses.replace(SHAPE, pooling=pooling, **more)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return encoder


def ids_of_items() -> list[torch.Tensor]:
    ids = torch.randint(2, 300, (int(LENGTHS.sum()),), generator=torch.Generator().manual_seed(1))
    return list(ids.split(LENGTHS.tolist()))


def inputs_of(*given: torch.Tensor) -> Inputs:
    return Inputs(torch.cat(given), torch.tensor([len(one) for one in given]))


def states() -> torch.Tensor:
    return torch.randn(int(LENGTHS.sum()), 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "of_one"),
    [
        ("mean", lambda rows: sum(rows) / len(rows)),
        ("last", lambda rows: rows[-1]),
        ("first", lambda rows: rows[0]),
        ("weighted_mean", lambda rows: sum(n * row for n, row in enumerate(rows, 1)) / sum(range(1, len(rows) + 1))),
    ],
)
def test_a_pooling_is_what_its_name_says(name, of_one):
    expected = torch.stack([of_one(rows) for rows in states().split(LENGTHS.tolist())])
    torch.testing.assert_close(pool(states(), LENGTHS, pooling_of(name, 8)), expected)


def test_attention_pooling_is_torchs_attention_of_one_query():
    torch.manual_seed(0)
    ours = AttentionPooling(8)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = nn.MultiheadAttention(8, 4, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(8), ours.key.weight, ours.value.weight]))
        theirs.out_proj.weight.copy_(torch.eye(8))
        expected = [
            theirs(ours.query[None, None], rows[None], rows[None])[0][0, 0] for rows in states().split(LENGTHS.tolist())
        ]
        torch.testing.assert_close(pool(states(), LENGTHS, ours), torch.stack(expected))


@torch.no_grad()
def test_attention_pooling_begins_as_almost_the_mean():
    torch.manual_seed(0)
    begun, mean = pool(states(), LENGTHS, AttentionPooling(8)), pool(states(), LENGTHS, pooling_of("mean", 8))
    torch.testing.assert_close(begun, mean, rtol=0, atol=0.05)
    assert not torch.equal(begun, mean)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_states_are_pooled_in_fp32(name):
    torch.manual_seed(0)
    low = states().bfloat16()
    pooling = pooling_of(name, 8)
    pooled = pool(low.float(), LENGTHS, pooling)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(low, LENGTHS, pooling)
    assert found.dtype == torch.float32
    maps = 0.02 if name == "attention" else 1e-6  # its maps run in bf16
    torch.testing.assert_close(found, pooled, rtol=maps, atol=maps)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_and_neighbours_do_not_change_a_vector_whatever_the_pooling(name, layout):
    encoder = encoder_of(name)
    encoder.use(ComputeConfig(layout))
    together = encoder(inputs_of(*ids_of_items()))
    alone = torch.cat([encoder(inputs_of(one)) for one in ids_of_items()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.norm(dim=1).min() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_every_pooling_is_proven_and_trained_in_parts(name, capsys):
    encoder = encoder_of(name)
    probe(encoder)
    encoder.use(ComputeConfig(max_tokens=5))
    require_cached_is_plain(encoder, inputs_of(*ids_of_items()))
    assert "gradients in parts are those of a whole batch" in capsys.readouterr().out
    encoder(inputs_of(*ids_of_items())).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_refuses_a_leak_that_the_pooling_meets(name, monkeypatch):
    encoder = encoder_of(name)
    text = encoder.backbone.text

    def all_as_one(inputs, *, packed=False):
        return text(inputs_embeds=text.get_input_embeddings()(inputs.token_ids[None])).last_hidden_state[0]

    monkeypatch.setattr(encoder.backbone, "forward", all_as_one)
    with pytest.raises(ValueError, match="padding or a batch neighbour"):
        probe(encoder)


def test_the_probe_refuses_a_pooling_that_mixes_items(monkeypatch):
    encoder = encoder_of()
    monkeypatch.setattr(encoder, "pooling", lambda states_nLH: states_nLH.mean(1) + states_nLH.mean((0, 1)))
    with pytest.raises(ValueError, match="padding or a batch neighbour"):
        probe(encoder)


@torch.no_grad()
def test_without_a_projection_the_vector_is_what_pooling_gives():
    encoder = encoder_of("first", projection=False, embedding_dim=32, prefixes=(8, 32))
    given = inputs_of(*ids_of_items())
    firsts = [encoder.backbone(inputs_of(one))[0] for one in ids_of_items()]
    torch.testing.assert_close(encoder(given), torch.stack(firsts), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in encoder.named_parameters() if not name.startswith("backbone.")] == []


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["attention", "weighted_mean"])
def test_poolings_and_projections_come_back_from_a_folder(pooling, processor, tmp_path):
    for more in ({}, {"hidden_dim": 24}, {"projection": False, "embedding_dim": 32, "prefixes": (32,)}):
        encoder = encoder_of(pooling, **more)
        save_encoder(tmp_path / "encoder", encoder, processor, provenance={})
        again, _ = load_encoder(tmp_path / "encoder")
        assert again.config == encoder.config
        assert torch.equal(again.eval()(inputs_of(*ids_of_items())), encoder(inputs_of(*ids_of_items())))


@torch.no_grad()
def test_a_folder_from_before_there_was_a_choice_is_pooled_by_the_mean(processor, tmp_path):
    encoder = encoder_of()
    save_encoder(tmp_path / "encoder", encoder, processor, provenance={})
    described = tmp_path / "encoder" / "encoder.json"
    lines = [line for line in described.read_text().splitlines() if '"pooling"' not in line and '"projection"' not in line]
    described.write_text("\n".join(lines).replace('"hidden_dim": null,', '"hidden_dim": null'))
    again, _ = load_encoder(tmp_path / "encoder")
    assert torch.equal(again.eval()(inputs_of(*ids_of_items())), encoder(inputs_of(*ids_of_items())))


def test_a_learnt_pooling_has_the_rate_of_the_projection():
    stage = nn.Module()
    stage.encoder = encoder_of("attention")
    parts = {name: part_of(name) for name, _ in stage.named_parameters()}
    learnt = {name for name in parts if name.startswith("encoder.pooling.")}
    assert {parts[name] for name in learnt} == {"projection"}
    assert len(learnt) == 3
    freeze(stage, OptimizerConfig(rates={"projection": 0}))
    frozen = {name for name, parameter in stage.named_parameters() if not parameter.requires_grad}
    assert frozen == {*learnt, "encoder.projection.0.weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": False}, "embedding_dim is 16, the backbone's width 32; without a projection they must be equal"),
        ({"projection": False, "hidden_dim": 64}, "hidden_dim is 64 without a projection"),
        (
            {"pooling": "attention", "backbone": BackboneConfig(text={**TINY_TEXT, "hidden_size": 30})},
            "attention pooling has 4 heads, which do not divide the backbone's width 30",
        ),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Embedder(dataclasses.replace(SHAPE, **changes))
