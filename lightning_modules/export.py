"""`conf=export`: an encoder as sentence-transformers reads it, with a model card; what was written is loaded and compared.

Nothing is left at `out` unless sentence-transformers, reading the folder as a person would, gives the encoder's own vectors.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from datamodules.media.audio import SAMPLE_RATE
from datamodules.media.video import Film
from datamodules.processors.processor import Processor
from datamodules.sample import Item, Part
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance
from lightning_modules.encoder.embedder import Embedder, cut, probe
from lightning_modules.encoder.native import media_of
from lightning_modules.export_folder import as_float32, stock_of, texts_of, write_portable, write_stock
from lightning_modules.model_card import Card, model_card, shown
from lightning_modules.push import refusals

COSINE = 0.99999  # least, of an exported vector and ours
DIFFERENCE = 1e-3  # most, of a coordinate: vectors of an encoder that lie close together all have a high cosine. Our choice
QUERY = "task: {} | query: "
PROMPTS = {  # recipe.md's task strings by sentence-transformers' and mteb's names
    "query": QUERY.format("search result"),
    "document": "title: none | text: ",
    **{task: QUERY.format(task) for task in ("question answering", "fact checking", "code retrieval")},
    **{task: QUERY.format(task) for task in ("classification", "clustering", "sentence similarity")},
    **{name: QUERY.format("classification") for name in ("Classification", "MultilabelClassification")},
    "Clustering": QUERY.format("clustering"),
    **{name: QUERY.format("sentence similarity") for name in ("STS", "PairClassification", "BitextMining", "Summarization")},
}


class Probe(NamedTuple):
    """One thing to embed: what it is called, as our item, and as sentence-transformers takes it."""

    name: str
    item: Item
    given: Any


class Check(NamedTuple):
    """How near the exported vectors are: number of probes, the least cosine, the largest difference of a coordinate."""

    num_probes: int
    cosine: float
    difference: float


def export(
    checkpoint: str,
    out: str,
    *,
    formats: tuple[Literal["sentence_transformers", "onnx"], ...] = ("sentence_transformers",),
    prompts: dict[str, str] | None = None,
    truncate_dim: int | None = None,
    license: str | None = None,
    languages: tuple[str, ...] = (),
    results: str | None = None,
) -> None:
    """Write an encoder so that it can be used without this project, and check it.

    An encoder of text alone becomes stock modules, which need no code, where these give its vectors. Any other is written with
    one module file of ours, `polyphony.py`, for which one loads it with `trust_remote_code=True`. Weights are in fp32.

    Args:
        checkpoint: An encoder's folder, or one of sentence-transformers.
        out: Folder that is written; must not exist.
        formats: `sentence_transformers`, and `onnx` for `<out>/onnx` beside it.
        prompts: Name to what stands before a text; null for the recipe's task strings, or those of the folder where
            sentence-transformers wrote it.
        truncate_dim: Width that sentence-transformers cuts vectors to unless told otherwise; null for all of it.
        license: Of the model, by its name on the hub (apache-2.0, mit, ..); null leaves it unsaid.
        languages: Two-letter codes, for the model card.
        results: Folder of a conf=evaluate of this encoder, whose scores go into the model card.

    Raises:
        ValueError: `out` exists, a number does not fit, or the written folder gives other vectors than the encoder.
    """
    _require_sentence_transformers()
    if "sentence_transformers" not in formats:
        raise ValueError(
            f"formats are {', '.join(formats) or 'none'}; sentence_transformers must be among them, onnx lies beside it"
        )
    folder = Path(out)
    if folder.exists():
        raise ValueError(f"out is {out}, which exists; remove it or give another folder")
    transformers_logging.disable_progress_bar()  # a bar for every file that is read and written
    encoder, processor = load_encoder(checkpoint)
    config, provenance = encoder.config, read_provenance(checkpoint)
    if truncate_dim is not None and truncate_dim not in config.prefixes:
        raise ValueError(f"truncate_dim is {truncate_dim}; the encoder's prefixes are {', '.join(map(str, config.prefixes))}")
    if prompts is None:
        prompts = dict(provenance["prompts"] if provenance.get("stage") == "sentence-transformers" else PROMPTS)
    probe(encoder)
    encoder = as_float32(encoder)
    stock = stock_of(encoder, processor)
    reason = stock if isinstance(stock, str) else None
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    made = beside / folder.name  # sentence-transformers calls a module file's copy in its cache by the folder's name
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        if isinstance(stock, str):
            print(f"a module file is written, as stock modules would not do: {stock}")
            told = {**shown(provenance), "exported_from": provenance["sha256"]}
            write_portable(made, encoder, processor, told, prompts, truncate_dim)
        else:
            write_stock(made, stock, encoder, prompts, truncate_dim)
        check = compare(made, encoder, processor, needs_code=reason is not None)
        extra: dict[str, Any] = {}
        if "onnx" in formats:
            from lightning_modules.export_onnx import export_onnx

            extra["onnx"] = export_onnx(encoder, processor, made / "onnx")
        card = Card(folder.name, encoder, processor, provenance, prompts, truncate_dim, reason, check, extra)
        (made / "README.md").write_text(model_card(card, license, languages, results), encoding="utf-8")
        if wrong := refusals(made):
            raise ValueError(f"the export holds what must not be published: {wrong[0]}")
        made.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{folder}: {check.num_probes} probes, least cosine {check.cosine:.7f}, largest difference {check.difference:.1e}")


def _require_sentence_transformers() -> None:
    try:
        import sentence_transformers
    except ImportError as error:
        raise ValueError("an export needs sentence-transformers; pip install -e '.[export]'") from error
    if int(sentence_transformers.__version__.partition(".")[0]) < 6:
        raise ValueError(f"an export needs sentence-transformers 6 or newer; this is {sentence_transformers.__version__}")


@torch.inference_mode()
def compare(folder: Path, encoder: Embedder, processor: Processor, *, needs_code: bool) -> Check:
    """Load a folder as a person would, and compare its vectors with the encoder's, at every prefix.

    Args:
        folder: Of sentence-transformers.
        encoder: On the CPU, in fp32 and evaluation mode.
        processor: Its own.
        needs_code: Whether it has a module file, which is ours: this very function's caller wrote it.

    Raises:
        ValueError: A vector is another, or is refused on one side alone.
    """
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings(action="ignore"):  # what libraries say of each other
        theirs = SentenceTransformer(str(folder), device="cpu", trust_remote_code=needs_code, local_files_only=True)
    probes = probes_of(encoder, processor)
    expected = torch.cat([encoder(processor([one.item])) for one in probes])
    least, most = 1.0, 0.0
    for prefix in encoder.config.prefixes:
        vectors = theirs.encode(
            [one.given for one in probes],
            batch_size=4,
            truncate_dim=prefix,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        ours = cut(expected, prefix)
        if vectors.shape != ours.shape:
            raise ValueError(f"the export gives vectors {tuple(vectors.shape)} where ours are {tuple(ours.shape)}")
        cosines = torch.nn.functional.cosine_similarity(vectors.double(), ours.double())
        worst, off = int(cosines.nan_to_num(-1.0).argmin()), (vectors - ours).abs().max().item()
        if not (cosines[worst] >= COSINE and off <= DIFFERENCE):
            raise ValueError(
                f"the export gives other vectors than the encoder: for {probes[worst].name} the cosine at prefix {prefix} is "
                f"{cosines[worst]:.6f} (least allowed {COSINE}), a coordinate is off by {off:.1e}; nothing was written"
            )
        least, most = min(least, cosines[worst].item()), max(most, off)
    return Check(len(probes), least, most)


def probes_of(encoder: Embedder, processor: Processor) -> list[Probe]:
    """Texts of many lengths, and of every kind of media that the encoder takes one alone and one among words."""
    found = [Probe(f"the text {text[:30]!r}", Item((_part("text", text),)), text) for text in texts_of(processor)]
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 96 * 80 * 3).reshape(96, 80, 3)
    pictures = [(ramp + random.integers(0, 55, ramp.shape)).astype(np.uint8), random.integers(0, 255, (40, 64, 3), np.uint8)]
    wave = (0.1 * random.standard_normal(int(1.7 * SAMPLE_RATE))).astype(np.float32)
    film = random.integers(0, 255, (3, 48, 64, 3), np.uint8)
    seconds = len(film) / processor.config.decode.frames_per_second
    shown = [Image.fromarray(picture) for picture in pictures]
    media: dict[str, tuple[Any, Any]] = {
        "image": (pictures[0], shown[0]),
        "page": (pictures, {"page": shown}),
        "audio": (wave, {"array": wave, "sampling_rate": SAMPLE_RATE}),
        "video": (Film(film, seconds), {"video": film}),
    }
    for kind in media_of(encoder.backbone, processor):
        content, given = media[kind]
        found.append(Probe(kind, Item((_part(kind, content),)), given))
        mixed = Item((_part("text", "the"), _part(kind, content), _part("text", " and the cat")))
        found.append(Probe(f"{kind} among words", mixed, ["the", given, " and the cat"]))
    return found


def _part(kind: str, content: Any) -> Part:
    return Part(kind, content, content=content) if kind == "text" else Part(kind, b"probe", "bin", content)
