"""Promises of the encoder: bidirectional, blind to padding and neighbours, interleaved in order, prefixes that stand alone."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from samples import TINY_TEXT

from datamodules.media.video import Film
from datamodules.processors.inputs import Inputs
from datamodules.sample import Item, Part
from lightning_modules.encoder import towers
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.composed import ComposedBackbone
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig, cut, probe
from lightning_modules.encoder.towers import Tower, TowerConfig

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
WAVE = RNG.standard_normal(20_000).astype(np.float32)
FILM = Film(np.stack(PICTURES), 3.0)


def item(*contents):
    parts = []
    for value in contents:
        kind = {str: "text", Film: "video"}.get(type(value)) or ("audio" if value.ndim == 1 else "image")
        parts.append(Part(kind, value if kind == "text" else b"x", "" if kind == "text" else "bin", content=value))
    return Item(tuple(parts))


ITEMS = [
    item("cat"),
    item("the cat", PICTURES[0], "sat on the mat", PICTURES[1]),
    item(WAVE),
    item(FILM),
    item(PICTURES[2], WAVE, "0123456789"),
]


@torch.no_grad()
def test_padding_and_neighbours_do_not_change_an_embedding(tiny_encoder, processor):
    together = tiny_encoder(processor(ITEMS))
    alone = torch.cat([tiny_encoder(processor([one])) for one in ITEMS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    turned = tiny_encoder(processor(ITEMS[::-1])).flip(0)
    torch.testing.assert_close(turned, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("one", ITEMS[1:], ids=["text and pictures", "sound", "video", "all"])
def test_the_last_token_moves_the_first_state(tiny_encoder, processor, one):
    inputs = processor([one])
    changed = inputs.to("cpu")
    changed.token_ids = inputs.token_ids.clone()
    changed.token_ids[-1] = 5
    difference = (tiny_encoder.backbone(inputs)[0] - tiny_encoder.backbone(changed)[0]).abs().max()
    assert difference > 1e-4


@torch.no_grad()
def test_the_order_of_parts_matters(tiny_encoder, processor):
    one = tiny_encoder(processor([item("cat", PICTURES[0], "mat", PICTURES[1])]))
    other = tiny_encoder(processor([item("cat", PICTURES[1], "mat", PICTURES[0])]))
    assert (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).abs().max() > 1e-3


def test_every_parameter_learns(tiny_encoder, processor):
    tiny_encoder(processor([*ITEMS, item(FILM)])).square().sum().backward()
    page = Item((Part("page", b"x", "png", content=[PICTURES[0]]),))
    tiny_encoder(processor([page])).square().sum().backward()
    silent = [name for name, parameter in tiny_encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_the_probe_passes_a_bidirectional_encoder_and_refuses_a_causal_one(tiny_encoder):
    probe(tiny_encoder)
    tiny_encoder.use(ComputeConfig("padded"))  # packs have no causal mask whatever the model says
    for module in tiny_encoder.backbone.text.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    tiny_encoder.backbone.text.config.is_causal = True
    with pytest.raises(ValueError, match="still causal"):
        probe(tiny_encoder)


@pytest.mark.parametrize("vocab_size", [13, 759, 320])
def test_the_probe_knows_every_vocabulary(vocab_size):
    text = {**TINY_TEXT, "vocab_size": vocab_size}
    probe(Embedder(EncoderConfig(BackboneConfig(text=text), embedding_dim=16, prefixes=(16,))))


def test_the_probe_refuses_a_leak_from_padding(tiny_encoder, monkeypatch):
    text = tiny_encoder.backbone.text

    def all_as_one(inputs, *, packed=False):
        return text(inputs_embeds=text.get_input_embeddings()(inputs.token_ids[None])).last_hidden_state[0]

    monkeypatch.setattr(tiny_encoder.backbone, "forward", all_as_one)
    with pytest.raises(ValueError, match="padding or a batch neighbour"):
        probe(tiny_encoder)


@torch.no_grad()
def test_a_cut_vector_is_a_unit_vector(tiny_encoder, processor):
    vectors = tiny_encoder(processor(ITEMS))
    short = cut(vectors, 4)
    torch.testing.assert_close(short.norm(dim=-1), torch.ones(len(ITEMS)))
    torch.testing.assert_close(short, F.normalize(vectors[:, :4], dim=-1))
    with pytest.raises(ValueError, match="prefix 32 is wider than the embedding, which has 16"):
        cut(vectors, 32)


def test_projection_goes_up_and_down_on_request(tiny_config):
    encoder = Embedder(dataclasses.replace(tiny_config, hidden_dim=64))
    assert [tuple(weight.shape) for weight in encoder.projection.parameters()] == [(64, 32), (16, 64)]


@pytest.mark.parametrize("prefixes", [(8, 4, 16), (4, 8), (4, 32), ()])
def test_prefixes_that_do_not_fit_are_refused(tiny_config, prefixes):
    with pytest.raises(ValueError, match="prefix"):
        dataclasses.replace(tiny_config, prefixes=prefixes)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "llama", "mistral"])
def test_decoder_families_become_bidirectional(family):
    text = {**TINY_TEXT, "model_type": family}
    torch.manual_seed(0)
    encoder = Embedder(EncoderConfig(BackboneConfig(text=text), embedding_dim=16, prefixes=(16,))).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    probe(encoder)


@torch.no_grad()
def test_a_pretrained_text_model_gives_its_masked_mean(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path)
    backbone = ComposedBackbone(BackboneConfig(pretrained=str(tmp_path))).eval()
    ids = torch.randint(1, 99, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    inputs = Inputs(ids[mask.bool()], mask.sum(1))
    for packed in (False, True):
        torch.testing.assert_close(backbone(inputs, packed=packed), expected, rtol=1e-5, atol=1e-6)


def test_a_pretrained_model_in_bf16_becomes_an_fp32_encoder(tmp_path):
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertModel(config, add_pooling_layer=False).bfloat16().save_pretrained(tmp_path)
    shape = EncoderConfig(BackboneConfig(pretrained=str(tmp_path)), embedding_dim=16, prefixes=(16,))
    for load_pretrained in (True, False):
        encoder = Embedder(shape, load_pretrained=load_pretrained)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        probe(encoder)


def test_building_a_saved_encoder_asks_no_hub_for_its_towers(monkeypatch):
    asked = []
    create = towers.timm.create_model

    def offline(*arguments, pretrained, **more):
        asked.append(pretrained)
        return create(*arguments, pretrained=False, **more)

    monkeypatch.setattr(towers.timm, "create_model", offline)
    config = TowerConfig(arguments={"embed_dim": 24, "depth": 1, "num_heads": 2}, pretrained=True)
    Tower(config, 32)
    Tower(config, 32, load_pretrained=False)
    assert asked == [True, False]


def test_sizes_that_do_not_fit_are_named(processor, tiny_config):
    encoder = Embedder(tiny_config)
    inputs = processor([ITEMS[1]])
    inputs.media["image"] = inputs.media["image"][..., :32]
    with pytest.raises(ValueError, match=r"a view measures \(3, 64, 32\), its tower takes \(3, 64, 64\)"):
        encoder(inputs)
    short = {**TINY_TEXT, "max_position_embeddings": 20}
    with pytest.raises(ValueError, match=r"an item comes to \d+ tokens, the text model takes 20"):
        Embedder(dataclasses.replace(tiny_config, backbone=dataclasses.replace(tiny_config.backbone, text=short)))(
            processor([ITEMS[1]])
        )


@torch.no_grad()
def test_boundaries_stand_where_a_medium_begins_and_ends(tiny_encoder, processor):
    inputs = processor([item("cat", PICTURES[0], "cat")])
    embedded = tiny_encoder.backbone.embed(inputs.token_ids[None], inputs)[0]
    places = (inputs.token_ids < 0).nonzero().flatten()
    begin, end = tiny_encoder.backbone.boundaries["image"]
    assert torch.equal(embedded[places[0]], begin)
    assert torch.equal(embedded[places[-1]], end)


@pytest.mark.parametrize(
    ("model", "arguments", "tokens"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, 16),
        ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, 4),
        ("test_efficientnet", {}, 4),
        ("test_convnext", {}, 4),
    ],
)
def test_any_timm_model_can_be_a_tower(model, arguments, tokens):
    tower = Tower(TowerConfig(model=model, arguments=arguments, height=64, width=64), 32).eval()
    assert tower(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), tokens).shape == (3, tokens, 32)


def test_token_numbers_that_cannot_be_are_refused(tiny_config):
    backbone = tiny_config.backbone
    with pytest.raises(ValueError, match="tokens of image are 5; they must be a square number"):
        dataclasses.replace(backbone, tokens={**backbone.tokens, "image": 5})
    with pytest.raises(ValueError, match="makes a 4 x 4 map of a view; it cannot give 64 tokens to video"):
        ComposedBackbone(dataclasses.replace(backbone, tokens={**backbone.tokens, "video": 64}))


def test_a_medium_without_a_tower_and_wrong_places_are_refused(processor, tiny_config):
    deaf = Embedder(EncoderConfig(BackboneConfig(text=dict(TINY_TEXT)), embedding_dim=16, prefixes=(16,)))
    with pytest.raises(ValueError, match="no tower for audio; it takes text, code"):
        deaf(processor([ITEMS[2]]))
    inputs = processor([ITEMS[1]])
    inputs.media["image"], inputs.num_views["image"] = inputs.media["image"][:1], torch.tensor([1])
    with pytest.raises(ValueError, match="makes 16 tokens of 1 views, the processor left 32 places"):
        Embedder(tiny_config)(inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs either `text`"),
        ({"text": {"hidden_size": 8}}, "needs `model_type`"),
        ({"text": {**TINY_TEXT, "hiden_size": 8}}, "has no hiden_size; a qwen3 has"),
        ({"text": {**TINY_TEXT, "hidden_size": "abc"}}, "backbone.text is"),
        ({"text": {"model_type": "nonsense"}}, "backbone.text is"),
        ({"text": dict(TINY_TEXT), "towers": {"eye": TowerConfig(model="nonsense")}}, "timm cannot build the tower 'nonsense'"),
        ({"text": dict(TINY_TEXT), "towers": {"eye": TowerConfig(arguments={"foo": 1})}}, "timm cannot build the tower"),
        ({"text": dict(TINY_TEXT), "routes": {"image": "eye"}}, "leads nowhere"),
    ],
)
def test_backbones_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ComposedBackbone(BackboneConfig(**arguments))
