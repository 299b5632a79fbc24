"""Promises of native backbones: each family is bidirectional, blind to its neighbours, trains whole and is its publisher's."""

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from native_models import FAMILIES, tokenizer_with, write_model
from PIL import Image
from samples import TINY_TEXT
from test_train import run
from torch._dynamo import config as dynamo_config
from torch.nn.attention import flex_attention

from datamodules.media.audio import SAMPLE_RATE
from datamodules.media.video import Film
from datamodules.processors.inputs import Inputs
from datamodules.processors.loading import new_processor
from datamodules.processors.native import NativeProcessor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.sample import Item, Part
from lightning_modules.adapters import LoRAConfig, inject, is_adapter, merged
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import load_encoder, save_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig, probe, require_cached_is_plain
from lightning_modules.encoder.native import require_its_inputs
from lightning_modules.objective.objective import Objective, ObjectiveConfig

RANDOM = np.random.default_rng(0)
PICTURES = [RANDOM.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(3)]
FILM = Film(RANDOM.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), 4.0)
SOUND = (RANDOM.standard_normal(12_000) * 0.1).astype(np.float32)
NATIVE = [family for family in FAMILIES if not family.startswith("siglip")]


def part(kind: str, content: Any) -> Part:
    return Part(kind, content, content=content) if kind == "text" else Part(kind, b"x", "bin", content)


def item(*parts: tuple[str, Any]) -> Item:
    return Item(tuple(part(kind, content) for kind, content in parts))


def items_of(family: str) -> list[Item]:
    """An item of each kind that the family takes, and mixed ones."""
    found = [item(("text", "the cat")), item(("text", "a"), ("image", PICTURES[1]), ("text", " b "), ("image", PICTURES[2]))]
    contents = {"image": PICTURES[0], "page": PICTURES[:2], "video": FILM, "audio": SOUND}
    found += [item((kind, contents[kind])) for kind in FAMILIES[family].kinds]
    if "audio" in FAMILIES[family].kinds:
        found.append(item(("video", FILM), ("audio", SOUND[:9000]), ("text", "x")))
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Family to a model's folder as its publisher would write it."""
    root = tmp_path_factory.mktemp("native")
    return cache(lambda family: write_model(root / family, family))


def encoder_of(folder: Path, **fields: Any) -> Embedder:
    torch.manual_seed(0)
    backbone = BackboneConfig(pretrained=str(folder), **fields)
    return Embedder(EncoderConfig(backbone, embedding_dim=16, prefixes=(8, 16))).eval()


def processor_of(folder: Path, **fields: Any) -> Processor:
    return new_processor(ProcessorConfig(native=str(folder), max_text_tokens=40, **fields), None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_neighbours_padding_and_order_change_nothing(folder, family):
    encoder, processor, items = encoder_of(folder(family)), processor_of(folder(family)), items_of(family)
    probe(encoder)
    together = encoder(processor(items))
    assert together.shape == (len(items), 16)
    alone = torch.cat([encoder(processor([one])) for one in items])
    turned = encoder(Inputs.join([processor([one]) for one in items[::-1]])).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, turned, rtol=1e-4, atol=1e-5)
    assert (torch.pdist(together) > 1e-3).all()  # every part of every item counts
    one, other = (
        encoder(processor([item(("text", "a"), ("image", x), ("image", y))])) for x, y in (PICTURES[:2], PICTURES[1::-1])
    )
    assert (family.startswith("siglip")) == torch.allclose(one, other, atol=1e-5)  # order counts but for late fusion


@pytest.mark.parametrize("family", NATIVE)
def test_every_token_sees_every_other_beside_media(folder, family):
    encoder, processor = encoder_of(folder(family)), processor_of(folder(family))
    for one in items_of(family)[1:]:
        inputs = processor([Item((part("text", "cat"), *one.parts, part("text", "sat")))])
        changed = dataclasses.replace(inputs, token_ids=inputs.token_ids.clone())
        changed.token_ids[-1] = processor.tokenizer.get_vocab()["a"]
        with torch.no_grad():
            moved = (encoder.backbone(inputs)[0] - encoder.backbone(changed)[0]).abs().max()
        assert moved > 1e-4, one.modality


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns_and_a_step_lowers_the_loss(folder, family):
    encoder, processor, items = encoder_of(folder(family)), processor_of(folder(family)), items_of(family)
    inputs = processor([*items, *items[::-1]])
    objective = Objective(ObjectiveConfig(temperature=0.1, spread_out=0.0), prefixes=(8, 16), embedding_dim=16)
    ids = torch.arange(len(items))
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def loss() -> torch.Tensor:
        query, target = encoder.train()(inputs).chunk(2)
        return objective(query, target, query_id=ids, target_id=ids).total

    before = loss()
    before.backward()
    silent = [n for n, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    optimizer.step()
    assert loss() < before - 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_encoders_folder_stands_alone(folder, family, tmp_path):
    copy, items = tmp_path / "model", items_of(family)
    shutil.copytree(folder(family), copy)
    encoder, processor = encoder_of(copy), processor_of(copy)
    expected = encoder(processor(items))
    save_encoder(tmp_path / "encoder", encoder, processor, provenance={})
    shutil.rmtree(copy)
    again, its_processor = load_encoder(tmp_path / "encoder")
    assert torch.equal(again.eval()(its_processor(items)), expected)
    probe(again)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_layers_run_again_give_the_same_gradients(folder, family):
    encoder, inputs = encoder_of(folder(family)), processor_of(folder(family))(items_of(family))
    encoder.use(ComputeConfig(max_tokens=40, checkpoint_layers=True))
    assert len(encoder.parts(inputs.lengths.numpy())) > (1 if family in NATIVE else 0)
    require_cached_is_plain(encoder, inputs)


def whole_prompt(family: str, processor: Any) -> dict[str, Any]:
    """Words and two pictures as the publisher's own processor takes them in one call."""
    begin, end = {"qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"), "qwen3_vl": ("<|vision_start|>", "<|vision_end|>")}.get(
        family, ("<|vision_bos|>", "<|vision_eos|>") if "omni" in family else ("", "")
    )
    place = begin + processor.image_token + end
    pictures = [Image.fromarray(picture) for picture in PICTURES[1:]]
    return dict(processor(text=[f"a{place} b {place}"], images=[pictures], return_tensors="pt"))


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_tokens_and_states_are_those_of_transformers_itself(folder, family):
    encoder, processor = encoder_of(folder(family)), processor_of(folder(family))
    ours = processor([items_of(family)[1]])
    batch = whole_prompt(family, transformers.AutoProcessor.from_pretrained(folder(family)))
    ends_itself = "gemma" not in family  # a Qwen tokenizer adds nothing; ours ends a text then
    assert ours.token_ids.tolist()[: -1 if ends_itself else None] == batch["input_ids"][0].tolist()
    model = transformers.AutoModel.from_pretrained(folder(family)).eval()
    model.config.get_text_config().is_causal = False
    if ends_itself:
        batch["input_ids"] = ours.token_ids[None]
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if "mm_token_type_ids" in batch:
            batch["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 1))
    for name in ("token_type_ids", "mm_token_type_ids") if "gemma" in family else ():
        batch.pop(name, None)
    expected = model(**batch).last_hidden_state[0]
    torch.testing.assert_close(encoder.backbone(ours), expected, rtol=1e-5, atol=1e-5)


def reach(encoder: Embedder, inputs: Inputs, token: int) -> set[int]:
    """How far from a token the tokens lie that move its state, through one layer."""
    model = encoder.backbone.model
    found = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: found.append(call[2]) or call[2].retain_grad())
    model.language_model.layers = model.language_model.layers[:1]
    encoder.backbone(inputs)[token].sum().backward()
    handle.remove()
    return {int(place) - token for place in found[0].grad[0].abs().sum(-1).nonzero()}


def test_windows_reach_as_far_to_both_sides(folder):
    for family in ("gemma3", "gemma4", "embedding_gemma2"):
        encoder = encoder_of(folder(family))
        inputs = encoder.backbone.text_inputs([torch.arange(100, 130)])
        assert reach(encoder, inputs, 12) == set(range(-4, 5)), family


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_a_model_that_stays_causal_is_refused(folder, family):
    encoder = encoder_of(folder(family))
    for module in encoder.backbone.model.modules():
        if getattr(module, "is_causal", None) is False:
            module.is_causal = True
    encoder.backbone.model.config.get_text_config().is_causal = True
    with pytest.raises(ValueError, match="still causal"):
        probe(encoder)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "gemma4_unified"])
@torch.no_grad()
def test_attention_implementations_agree(folder, family):
    inputs = processor_of(folder(family))(items_of(family))
    eager, sdpa = (encoder_of(folder(family), attention=attention) for attention in ("eager", "sdpa"))
    for encoder in (eager, sdpa):
        probe(encoder)
    torch.testing.assert_close(eager(inputs), sdpa(inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"which cannot be packed; set compute.layout=auto"):
        sdpa.use(ComputeConfig("packed"))


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@torch.no_grad()
def test_flex_attention_agrees(folder, monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    inputs = processor_of(folder("gemma3"))(items_of("gemma3"))
    flex = encoder_of(folder("gemma3"), attention="flex_attention")
    with dynamo_config.patch(disable=True):  # compiling its kernels takes a minute
        probe(flex)
        torch.testing.assert_close(flex(inputs), encoder_of(folder("gemma3"))(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "gemma4"])
def test_a_text_that_spells_a_placeholder_stays_text(folder, family):
    processor = processor_of(folder(family))
    assert isinstance(processor, NativeProcessor)
    inputs = processor([item(("text", f"{processor.placeholders['image']}<eos>"))])
    special = set(processor.tokenizer.all_special_ids)
    assert not special & set(inputs.token_ids.tolist()[len(processor.first_ids) : -1])
    encoder_of(folder(family))(inputs)


def test_a_film_carries_the_times_of_its_frames(folder):
    for family, times in {
        "gemma4": ["00:00 ", "00:01 ", "00:02 ", "00:03 "],
        "qwen3_vl": ["<1.0 seconds>", "<3.0 seconds>"],
    }.items():
        processor = processor_of(folder(family))
        text = processor.tokenizer.decode(processor([item(("video", FILM))]).token_ids)
        places = [text.index(time) for time in times]
        assert places == sorted(places)
        single = Film(FILM.frames[:1], 1.0)
        assert torch.isfinite(encoder_of(folder(family))(processor([item(("video", single))]))).all()


def test_sounds_of_any_length_are_taken_whole(folder):
    wave = (RANDOM.standard_normal(10 * SAMPLE_RATE) * 0.1).astype(np.float32)
    for family in ("gemma4", "qwen2_5_omni", "qwen3_omni_moe", "gemma4_unified"):
        processor = processor_of(folder(family))
        assert isinstance(processor, NativeProcessor)
        place = processor.tokenizer.get_vocab()[processor.placeholders["audio"]]
        numbers = [
            int((processor([item(("audio", wave[:n]))]).token_ids == place).sum()) for n in (400, 4 * SAMPLE_RATE, len(wave))
        ]
        assert 0 < numbers[0] < numbers[1]
        assert numbers[2] == pytest.approx(2.5 * numbers[1], rel=0.05)  # the small Qwens take four seconds at a time
    louder = wave.copy()
    louder[-800:] += 1.0
    inputs = processor_of(folder("qwen2_5_omni"))([item(("audio", sound)) for sound in (wave, louder)])
    one, other = encoder_of(folder("qwen2_5_omni"))(inputs)
    assert (one - other).abs().max() > 1e-6


def test_texts_that_are_too_long_are_cut_and_counted_or_refused(folder):
    long = item(("text", "cat " * 100), ("image", PICTURES[0]))
    cut = processor_of(folder("gemma3"))([long])
    assert (cut.num_truncated, int(cut.lengths)) == (1, 1 + 40 + 10)
    with pytest.raises(ValueError, match=r"more than 40 text tokens; raise data.processor.max_text_tokens"):
        processor_of(folder("gemma3"), too_long="refuse")([long])


def test_lengths_are_about_what_they_will_be(folder):
    processor = processor_of(folder("gemma4"))
    extents = np.zeros(1, [("text", "i8"), ("pictures", "i8"), ("audio", "f8"), ("video", "f8")])
    extents["pictures"], extents["audio"], extents["video"] = 2, 3.0, 4.0
    assert processor.num_tokens(extents) == pytest.approx(2 * 62 + 3 * 25 + 4 * 68, rel=0.1)


def test_what_cannot_be_gets_one_sentence(folder, tmp_path):
    gemma3 = folder("gemma3")
    with pytest.raises(ValueError, match="this encoder takes no audio; it takes text, code and image, page"):
        processor_of(gemma3)([item(("audio", SOUND))])
    with pytest.raises(ValueError, match="this encoder takes no audio"):
        processor_of(folder("siglip"))([item(("audio", SOUND))])

    without = tmp_path / "without"
    shutil.copytree(gemma3, without)
    (without / "model.safetensors").unlink()
    torch.save({}, without / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot build backbone.text .*safetensors"):
        encoder_of(without)

    strange = transformers.AutoProcessor.from_pretrained(gemma3)
    strange.tokenizer = tokenizer_with({"image_token": "<other>"})
    with pytest.raises(ValueError, match="lacks <start_of_image>, by which its processor marks media"):
        NativeProcessor(ProcessorConfig(native="x"), strange)

    disagrees = tmp_path / "disagrees"
    shutil.copytree(gemma3, disagrees)
    settings = json.loads((disagrees / "processor_config.json").read_text())
    (disagrees / "processor_config.json").write_text(json.dumps({**settings, "image_seq_length": 9}))
    with pytest.raises(ValueError, match=r"the model refuses what its processor made: .*; take both from the same checkpoint"):
        encoder_of(gemma3)(processor_of(disagrees)([item(("image", PICTURES[0]))]))

    with pytest.raises(ValueError, match=r"takes media itself; leave out backbone.towers"):
        Embedder(EncoderConfig(BackboneConfig(pretrained=str(gemma3), routes={}, towers={"a": _tower()}), 16, (16,)))
    with pytest.raises(ValueError, match=r"no model can be read from .*nowhere"):
        encoder_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no processor can be loaded from"):
        processor_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="comes to 2100 tokens, the model takes 2048"):
        encoder_of(gemma3)(encoder_of(gemma3).backbone.text_inputs([torch.full((2100,), 20)]))
    with pytest.raises(ValueError, match=r"max_text_tokens is 64; the text tower of .* takes 63"):
        new_processor(ProcessorConfig(native=str(folder("siglip")), max_text_tokens=64), None)


def test_inputs_that_a_backbone_does_not_know_are_refused(folder, tmp_path):
    native, plain = ProcessorConfig(native="somewhere"), ProcessorConfig(tokenizer="somewhere")
    own, text = (
        encoder_of(folder("gemma3")).backbone,
        Embedder(EncoderConfig(BackboneConfig(text=TINY_TEXT), 16, (16,))).backbone,
    )
    for backbone, fitting, other in ((own, native, plain), (text, plain, native)):
        require_its_inputs(backbone, fitting)
        with pytest.raises(ValueError, match=r"data.processor.native is \w+, but the backbone is a"):
            require_its_inputs(backbone, other)
    text.text.save_pretrained(tmp_path)
    pretrained = encoder_of(tmp_path).backbone
    require_its_inputs(pretrained, plain)
    with pytest.raises(ValueError, match=r"a new tokenizer's ids would mean other words to it; set data.processor.tokenizer="):
        require_its_inputs(pretrained, ProcessorConfig())


def _clip() -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"text_config": {**sizes, "vocab_size": 64}, "vision_config": {**sizes, "image_size": 16, "patch_size": 8}}


def _tower() -> Any:
    from lightning_modules.encoder.towers import TowerConfig

    return TowerConfig()


def test_a_stage_trains_a_pretrained_model_with_its_own_processor(folder, world, tmp_path):
    stage = tmp_path / "stage.yaml"
    stage.write_text(
        f"include: [trainer/default, model/native]\nrun: lightning_modules.prefinetune.PreFineTune\n"
        f"data: {{root: {world}, tasks: {{image: {{shards: world/text-image/train, kind: retrieval, batch_size: 8}}}}}}\n"
    )
    small = ["model.encoder.embedding_dim=16", "model.encoder.prefixes=[8,16]", "trainer.max_steps=3", "data.num_workers=1"]
    small += [f"model.encoder.backbone.pretrained={folder('gemma3')}", f"trainer.default_root_dir={tmp_path}"]
    shown = run("fit", "--config", str(stage), *small, "trainer.accelerator=cpu", "data.processor.native=null", ok=False)
    assert "error: data.processor.native is None, but the backbone is a NativeBackbone; set it to" in shown
    run("fit", "--config", str(stage), *small, "trainer.accelerator=cpu")
    encoder, processor = load_encoder(tmp_path / "encoder")
    assert torch.isfinite(encoder(processor(items_of("gemma3")))).all()
    before = encoder_of(folder("gemma3")).state_dict()
    moved = [name for name, weight in encoder.state_dict().items() if not torch.equal(weight, before[name])]
    assert any("vision_tower" in name for name in moved)
    assert any("language_model" in name for name in moved)


@pytest.mark.parametrize("family", ["gemma4", "qwen3_vl", "siglip2"])
def test_weights_in_half_precision_give_nearly_the_same_vectors(folder, family):
    inputs = processor_of(folder(family))(items_of(family))
    half = encoder_of(folder(family), dtype="bfloat16")
    probe(half)
    near = torch.nn.functional.cosine_similarity(encoder_of(folder(family))(inputs), half(inputs))
    assert near.min() > 0.995


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_learn_everywhere_and_merge(folder, family, dora):
    config = LoRAConfig(rank=2, dora=dora)
    encoder, inputs = encoder_of(folder(family)), processor_of(folder(family))(items_of(family))
    before = encoder(inputs).detach()
    inject(encoder, config)
    assert torch.equal(encoder(inputs), before)
    adapters = {name: parameter for name, parameter in encoder.named_parameters() if is_adapter(name)}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vectors = encoder(inputs)
    vectors.square().sum().backward()
    assert [name for name, parameter in adapters.items() if parameter.grad is None or not parameter.grad.any()] == []
    plain = encoder_of(folder(family))
    plain.load_state_dict(merged(encoder.state_dict(), config))
    torch.testing.assert_close(plain(inputs), vectors, rtol=1e-4, atol=1e-5)
