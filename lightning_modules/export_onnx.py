"""An encoder as ONNX graphs that run without torch: one of texts, one of each kind of medium alone, and their int8 twins.

    text.onnx            input_ids, attention_mask (N, L) int64, padded on the right  →  sentence_embedding (N, D)
    image.onnx ..        views (N, V, ..) of items of that medium alone               →  sentence_embedding (N, D)
    *.int8.onnx          the same with weights in int8 per channel, activations quantised as they come (ONNX Runtime)
    *.onnx.data          weights of a graph that is too large for one file
    audio.filters.npy    mel filters, from which the README makes views of sound
    onnx.json            sizes, errors, cosines, versions, what was left out and why
    tokenizer*, processor.json, README.md

Vectors are of unit length and in fp32. Every graph that was written is read again and compared with the encoder.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from datamodules.files import replace_folder
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import Processor
from lightning_modules.encoder.composed import ComposedBackbone
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.native import media_of
from lightning_modules.onnx_files import require_onnx, write_graph
from lightning_modules.onnx_graphs import (
    FromPictures,
    FromText,
    FromViews,
    Graph,
    NotExportableError,
    copy_to_export,
    padding_of,
)
from lightning_modules.onnx_probes import (
    Feed,
    begin_and_end,
    feed_of,
    longest_text,
    medium_feeds,
    random_feeds,
    random_views,
    text_feeds,
)
from lightning_modules.onnx_readme import FILTERS, readme

FORMAT = "polyphony-onnx/1"
ABOUT = "onnx.json"
TOLERANCE = 1e-4  # of a coordinate of a unit vector, in fp32
SAME_AS_IMAGE = ("page", "video")  # what native backbones with views of one shape take as pictures one after another
TEXTS = (  # what errors and the cost of int8 are measured on where no texts are given: our choice
    "cat",
    "a small red circle",
    "How do I get my money back for a card payment that I do not recognise?",
    "The committee approved the budget on Tuesday, but left open how the new line is to be paid for.",
    "ein großer blauer Stern über dem Meer",
    "la bibliothèque ouvre à neuf heures",
    "日本語の短い文です。",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "SELECT name, COUNT(*) FROM orders GROUP BY name ORDER BY 2 DESC;",
    "Water boils at 100 °C at sea level; on a mountain of 3000 m it boils at about 90 °C.",
    "0123456789",
    "In 1905 a clerk at the patent office in Bern published four papers. " * 8,
)


def export_onnx(
    encoder: Embedder,
    processor: Processor,
    folder: Path,
    *,
    int8: bool = True,
    texts: Sequence[str] = TEXTS,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Write an encoder's graphs, replacing a former export only when the new one is whole and was found equal.

    Args:
        encoder: Stays as it is; what is exported is its copy in fp32 on the CPU.
        processor: Whose tokenizer and settings go along.
        folder: Where they will be.
        int8: Also write int8 twins; one that is far from fp32 (`LEAST_COSINE`) is left out, and that is said.
        texts: What errors and the cost of int8 are measured on; as the encoder is used to them, prompts included.
        tolerance: Most that a coordinate may differ from the encoder's.

    Returns:
        What `onnx.json` says.

    Raises:
        ValueError: A library is missing, `folder` holds something else, there is no text, the text model cannot be exported,
            or a graph gives other vectors than the encoder; nothing is left then.
        OSError: The disk is full or the place not writable.
    """
    require_onnx()
    folder = Path(folder)
    if not texts:
        raise ValueError("there is no text to measure the export on; give some of the tasks' own, or leave texts out")
    if folder.exists() and not (folder.is_dir() and ((folder / ABOUT).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} holds something that is no ONNX export; give another folder, or empty it")
    twin = copy_to_export(encoder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        about: dict[str, Any] = _about(twin, processor, tolerance) | {"num_texts": len(texts)}
        for kind in track(["text", *media_of(twin.backbone, processor)], description="export to ONNX", transient=True):
            if kind in SAME_AS_IMAGE and not isinstance(twin.backbone, ComposedBackbone) and "image" in about["graphs"]:
                about["graphs"][kind] = about["graphs"]["image"]
                continue
            try:
                graph, measured, further = _plan(twin, processor, kind, texts)
            except NotExportableError as error:
                about["left_out"][kind] = str(error)
                continue
            file = beside / f"{kind}.onnx"
            about["graphs"][kind] = write_graph(graph, measured, further, file, int8=int8, tolerance=tolerance)
        processor.save(beside)
        if "audio" in about["graphs"] and isinstance(processor, ComposedProcessor):
            np.save(beside / FILTERS, processor.mel_filters.numpy())
        (beside / ABOUT).write_text(json.dumps(about, indent=1))
        (beside / "README.md").write_text(readme(about, processor), encoding="utf-8")
        replace_folder(folder, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _show(about)
    return about


def _about(encoder: Embedder, processor: Processor, tolerance: float) -> dict[str, Any]:
    """What `onnx.json` says before there are graphs."""
    begin, end = begin_and_end(processor)
    text = {"first_ids": begin, "last_ids": end, "max_text_tokens": processor.config.max_text_tokens}
    libraries = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {
        "format": FORMAT,
        "embedding_dim": encoder.config.embedding_dim,
        "prefixes": list(encoder.config.prefixes),
        "text": text | {"max_tokens": longest_text(encoder, processor)},
        "tolerance": tolerance,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "graphs": {},
        "left_out": {},
    }


def _plan(encoder: Embedder, processor: Processor, kind: str, texts: Sequence[str]) -> tuple[Graph, list[Feed], list[Feed]]:
    """A graph, what errors and the cost of int8 are measured on, and what errors alone are."""
    if kind == "text":
        example, axes = feed_of([torch.arange(3, 12), torch.arange(3, 8)]), {0: "batch", 1: "length"}
        graph = Graph(FromText(encoder, padding_of(processor)), example, dict.fromkeys(example, axes))
        return graph, text_feeds(encoder, processor, texts), random_feeds(encoder, processor)
    of_kind = FromViews if isinstance(encoder.backbone, ComposedBackbone) else FromPictures
    example, axes = {"views": random_views(encoder, processor, kind, 2, 3)}, {0: "batch", 1: "views"}
    return Graph(of_kind(encoder, processor, kind), example, {"views": axes}), medium_feeds(encoder, processor, kind), []


def _show(about: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("graph", "MB", "largest error", "int8 MB", "cosine, mean", "least"):
        table.add_column(name, justify="left" if name == "graph" else "right", no_wrap=True)
    for graph in {graph["file"]: graph for graph in about["graphs"].values()}.values():
        int8 = graph.get("int8", {})
        row = [graph["file"], f"{graph['bytes'] / 1e6:.1f}", f"{graph['error']:.1e}"]
        row.append(f"{int8['bytes'] / 1e6:.1f}" if "file" in int8 else "left out" if int8 else "")
        row += [f"{int8[name]:.4f}" if name in int8 else "" for name in ("mean_cosine", "min_cosine")]
        table.add_row(*row)
    console = Console()
    console.print(table)
    for kind, graph in about["graphs"].items():
        if left_out := graph.get("int8", {}).get("left_out"):
            console.print(f"no int8 graph of {kind}: {left_out}", soft_wrap=True)
    for kind, reason in about["left_out"].items():
        console.print(f"no graph of {kind}: {reason}", soft_wrap=True)
