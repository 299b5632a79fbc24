"""Promises of the decoder: it is T5Gemma's where the text model is a Gemma 2, and the text model itself without the encoder."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from samples import TINY_TEXT
from torch import Tensor

from datamodules.processors.inputs import Inputs
from lightning_modules.encoder.backbone import BackboneConfig, checkpoint_transformers
from lightning_modules.encoder.composed import ComposedBackbone
from lightning_modules.encoder.decoder import FAMILIES, CrossAttention, Decoder

SIZE = int(TINY_TEXT["vocab_size"])
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA2 = {**SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
MORE = {"gemma2": GEMMA2, "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 5}, "qwen2": {"head_dim": None}}


def text_of(family: str) -> dict:
    fields = {**TINY_TEXT, "model_type": family, **MORE.get(family, {})}
    return {name: value for name, value in fields.items() if value is not None}


def made(family: str) -> tuple[ComposedBackbone, Decoder]:
    """An encoder and its decoder with weights that are large enough to tell mistakes from rounding."""
    torch.manual_seed(0)
    backbone = ComposedBackbone(BackboneConfig(text=text_of(family))).eval()
    spread(backbone)
    return backbone, Decoder(backbone.text)


@torch.no_grad()
def spread(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)


def inputs_of(*lengths: int, seed: int = 1) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    return Inputs(torch.randint(2, SIZE, (sum(lengths),), generator=random), torch.tensor(lengths))


READ, WRITTEN = inputs_of(9, 5, 12), inputs_of(4, 11, 7, seed=2)


def logits_of(backbone: ComposedBackbone, decoder: Decoder, read: Inputs = READ, written: Inputs = WRITTEN) -> Tensor:
    return decoder(written, read, backbone(read, packed=backbone.packs))


def t5gemma_of(backbone: ComposedBackbone, decoder: Decoder) -> transformers.T5GemmaForConditionalGeneration:
    """transformers' model with the same weights, which it names otherwise."""
    fields = {name: value for name, value in text_of("gemma2").items() if name != "model_type"}
    sides = [transformers.T5GemmaModuleConfig(**fields) for _ in range(2)]
    config = transformers.T5GemmaConfig(encoder=sides[0], decoder=sides[1], vocab_size=SIZE)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()

    def renamed(name: str) -> str:
        name = name.replace(".layer.", ".").replace("input_layernorm", "pre_self_attn_layernorm")
        return name.replace("post_attention_layernorm", "post_self_attn_layernorm")

    weights = {f"model.encoder.{renamed(name)}": weight for name, weight in backbone.text.state_dict().items()}
    weights |= {f"model.decoder.{renamed(name)}": weight for name, weight in decoder.text.state_dict().items()}
    weights["lm_head.out_proj.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def test_a_gemma_2_becomes_the_t5gemma_of_transformers():
    backbone, decoder = made("gemma2")
    spread(decoder)  # cross-attention apart from self-attention
    model = t5gemma_of(backbone, decoder)
    (read, mask, places), (written, written_mask, written_places) = READ.padded(), WRITTEN.padded()
    expected = model(input_ids=read, attention_mask=mask, decoder_input_ids=written, decoder_attention_mask=written_mask)
    states = backbone(READ, packed=backbone.packs)
    torch.testing.assert_close(states, expected.encoder_last_hidden_state.flatten(0, 1)[places], rtol=1e-5, atol=1e-5)
    logits = decoder(WRITTEN, READ, states)
    torch.testing.assert_close(logits, expected.logits.flatten(0, 1)[written_places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_the_encoders_part_the_decoder_is_the_language_model(family):
    backbone, decoder = made(family)
    for layer in decoder.text.layers:
        layer.cross_attn.o_proj.weight.zero_()
    config = copy.deepcopy(decoder.text.config)
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.model.load_state_dict(backbone.text.state_dict())
    token_ids, mask, places = WRITTEN.padded()
    expected = model(input_ids=token_ids, attention_mask=mask).logits.flatten(0, 1)[places]
    torch.testing.assert_close(logits_of(backbone, decoder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_attention_starts_from_self_attention_and_its_norms(family):
    backbone, decoder = made(family)
    behind = "post_feedforward_layernorm" in dict(backbone.text.layers[0].named_children())
    for own, layer in zip(backbone.text.layers, decoder.text.layers, strict=True):
        expected, found = own.self_attn.state_dict(), layer.cross_attn.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(layer.pre_cross_attn_layernorm.weight, own.input_layernorm.weight)
        assert bool(list(layer.post_cross_attn_layernorm.parameters())) == behind
        if behind:
            assert torch.equal(layer.post_cross_attn_layernorm.weight, own.post_attention_layernorm.weight)
    shared = {parameter.data_ptr() for parameter in backbone.parameters()} & {p.data_ptr() for p in decoder.parameters()}
    assert not shared


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2"])
@torch.no_grad()
def test_cross_attention_is_its_equation(family):
    backbone, _ = made(family)
    attention = backbone.text.layers[0].self_attn
    states, memory = torch.randn(3, 5, 32), torch.randn(3, 6, 32)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    found = CrossAttention(attention)(states, memory, mask)
    q_norm, k_norm = (getattr(attention, name, torch.nn.Identity()) for name in ("q_norm", "k_norm"))
    for row in range(3):
        heads = []
        seen = memory[row, mask[row]]
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            query = q_norm(attention.q_proj(states[row])[:, own])
            scores = query @ k_norm(attention.k_proj(seen)[:, shared]).T * attention.scaling
            scores = 2.0 * torch.tanh(scores / 2.0) if family == "gemma2" else scores
            heads.append(F.softmax(scores, dim=-1) @ attention.v_proj(seen)[:, shared])
        torch.testing.assert_close(found[row], attention.o_proj(torch.cat(heads, -1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_written_later_moves_nothing_and_what_is_read_everything(family):
    backbone, decoder = made(family)
    read, written = inputs_of(9), inputs_of(7, seed=2)
    logits = logits_of(backbone, decoder, read, written)
    written.token_ids[4] += 1
    moved = (logits_of(backbone, decoder, read, written) - logits).abs().amax(1)
    assert moved[:4].max() == 0
    assert moved[4:].min() > 1e-4
    for place in (0, 8):
        changed = inputs_of(9)
        changed.token_ids[place] += 1
        assert (logits_of(backbone, decoder, changed, inputs_of(7, seed=2)) - logits).abs().amax(1).min() > 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@torch.no_grad()
def test_neighbours_do_not_change_logits(family):
    backbone, decoder = made(family)
    together = logits_of(backbone, decoder).split(WRITTEN.lengths.tolist())
    for row, expected in enumerate(together):
        alone = logits_of(backbone, decoder, READ.rows([row]), WRITTEN.rows([row]))  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2"])
def test_every_parameter_of_both_sides_learns(family):
    backbone, decoder = made(family)
    F.cross_entropy(logits_of(backbone, decoder), WRITTEN.token_ids).backward()
    named = [*backbone.named_parameters(), *decoder.named_parameters()]
    assert [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()] == []


def test_layers_that_run_again_have_the_same_gradients():
    gradients, num_runs = [], []
    for again in (False, True):
        backbone, decoder = made("qwen3")
        if again:
            decoder.train()
            checkpoint_transformers(decoder.text)
        runs = []
        decoder.text.layers[1].cross_attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        states = backbone(READ, packed=True)
        loss = F.cross_entropy(decoder(WRITTEN, READ, states), WRITTEN.token_ids)
        gradients.append(torch.autograd.grad(loss, [states, *decoder.parameters()]))
        num_runs.append(len(runs))
    assert num_runs == [1, 2]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_dropout_reaches_cross_attention():
    backbone = ComposedBackbone(BackboneConfig(text={**text_of("qwen3"), "attention_dropout": 0.5}))
    for family in ("sdpa", "softcap"):
        cross = CrossAttention(backbone.text.layers[0].self_attn).train()
        cross.softcap = 5.0 if family == "softcap" else None
        states, memory, mask = torch.randn(1, 5, 32), torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)
        assert not torch.equal(cross(states, memory, mask), cross(states, memory, mask))
        cross.eval()
        assert torch.equal(cross(states, memory, mask), cross(states, memory, mask))


def test_what_is_no_decoder_is_refused():
    bert = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    backbone = ComposedBackbone(BackboneConfig(text={**bert, "intermediate_size": 48}))
    with pytest.raises(
        ValueError, match=r"the text model is a bert, which is no decoder that can be adapted; name one of gemma,"
    ):
        Decoder(backbone.text)
