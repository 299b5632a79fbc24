"""The README.md of an ONNX export: what lies there, what it costs, and code that needs nothing but ONNX Runtime."""

from typing import Any

from datamodules.media.audio import SAMPLE_RATE
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import Processor

FILTERS = "audio.filters.npy"
HEAD = """# An encoder for ONNX Runtime

Each graph gives a vector of {width} dimensions for each item, of unit length, in float32. A dot product is their cosine.
{prefixes}
| graph | MB | largest error | int8 graph | MB | cosine with fp32, mean | least |
|---|---|---|---|---|---|---|
{rows}

The error is the most that a coordinate differs from the encoder's own. int8 graphs take the same inputs; their cosines were
measured on {measured}.
`onnx.json` has the exact numbers, the versions that made them, and what the code below reads.
{left_out}
## Texts

`text.onnx` takes `input_ids` and `attention_mask` (N, L) int64, padded on the right; at most {max_tokens} tokens.
A text carries the prompt that the encoder was trained with, if any. `pip install numpy onnxruntime tokenizers`, then here:

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

FOLDER = Path(".")
about = json.loads((FOLDER / "onnx.json").read_text())["text"]
tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # a text that spells a special token is text
session = onnxruntime.InferenceSession(FOLDER / "text.onnx")


def embed(texts: list[str]) -> np.ndarray:
    found = tokenizer.encode_batch(texts, add_special_tokens=False)
    rows = [[*about["first_ids"], *one.ids[: about["max_text_tokens"]], *about["last_ids"]] for one in found]
    input_ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    attention_mask = np.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
        attention_mask[number, : len(row)] = 1
    return session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})[0]


vectors = embed(["a small red circle", "a large blue star", "0123456789"])
print(vectors @ vectors.T)
short = vectors[:, :{prefix}]
short = short / np.linalg.norm(short, axis=1, keepdims=True)
```
"""
PICTURES = """
## Pictures

`{kind}.onnx` takes `views` (N, V, {shape}) {dtype}: {how}

```python
pictures = np.random.default_rng(0).integers(0, 256, (2, {size}, {size}, 3), dtype=np.uint8)  # two in RGB
{kind}_session = onnxruntime.InferenceSession(FOLDER / "{kind}.onnx")
{kind}_vectors = {kind}_session.run(None, {{"views": pictures.transpose(0, 3, 1, 2)[:, None]}})[0]
```
"""
SOUND = """
## Sound

`audio.onnx` takes `views` (N, V, {shape}) float32: log-mel spectrograms of successive {seconds:g} s at {rate} Hz.

```python
filters = np.load(FOLDER / "{filters}")
window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)


def spectrograms(wave: np.ndarray) -> np.ndarray:
    views = np.pad(wave, (0, -len(wave) % {span})).reshape(-1, {span})
    spans = np.lib.stride_tricks.sliding_window_view(np.pad(views, ((0, 0), (256, 256))), 512, axis=1)
    power = np.abs(np.fft.rfft(spans[:, ::{hop}][:, :{frames}] * window)) ** 2
    mel = np.log10(np.maximum(power @ filters, 1e-6))
    return ((mel.swapaxes(1, 2) + 2) / 4)[:, None].astype(np.float32)


wave = np.sin(np.arange({samples}) * 0.2).astype(np.float32)  # mono, in [-1, 1]
audio_session = onnxruntime.InferenceSession(FOLDER / "audio.onnx")
audio_vectors = audio_session.run(None, {{"views": spectrograms(wave)[None]}})[0]
```
"""


def readme(about: dict[str, Any], processor: Processor) -> str:
    """The text, of what `onnx.json` says."""
    prefixes = about["prefixes"]
    narrow = f"The first {' or '.join(map(str, prefixes[:-1]))} are a vector as well, once they are of unit length again.\n"
    left_out = [f"No graph of {kind}: {reason}." for kind, reason in about["left_out"].items()]
    left_out += [
        f"No int8 graph of {k}: {g['int8']['left_out']}." for k, g in about["graphs"].items() if "left_out" in g.get("int8", {})
    ]
    head = HEAD.format(
        width=about["embedding_dim"],
        prefixes=narrow if prefixes[:-1] else "",
        rows="\n".join(dict.fromkeys(_row(graph) for graph in about["graphs"].values())),
        measured=f"{about['num_texts']} texts and on made-up views"
        if len(about["graphs"]) > 1
        else f"{about['num_texts']} texts",
        left_out="".join(f"\n{line}" for line in left_out) + ("\n" if left_out else ""),
        max_tokens=about["text"]["max_tokens"],
        prefix=prefixes[0],
    )
    return head + "".join(_of_medium(kind, graph, processor) for kind, graph in about["graphs"].items() if kind != "text")


def _row(graph: dict[str, Any]) -> str:
    int8 = graph.get("int8", {})
    cells = [int8.get("file", "none"), f"{int8['bytes'] / 1e6:.1f}" if "file" in int8 else ""]
    cells += [f"{int8[name]:.4f}" if name in int8 else "" for name in ("mean_cosine", "min_cosine")]
    return f"| {graph['file']} | {graph['bytes'] / 1e6:.1f} | {graph['error']:.0e} | {' | '.join(cells)} |"


def _of_medium(kind: str, graph: dict[str, Any], processor: Processor) -> str:
    """How views of a medium are made, and code that embeds some."""
    config, inputs = processor.config, graph["inputs"]["views"]
    shape, size = ", ".join(map(str, inputs["shape"][2:])), config.view_size
    if not isinstance(processor, ComposedProcessor):
        how = (
            f"`pixel_values` as the processor of {config.native} makes them (preprocessor_config.json), V pictures of an item."
        )
        return f"\n## {kind.capitalize()}\n\n`{graph['file']}` takes `views` (N, V, {shape}) {inputs['dtype']}: {how}\n"
    if kind == "audio":
        span = round(config.seconds_per_view * SAMPLE_RATE)
        hop, frames = span // config.num_frames, config.num_frames
        fields = {"shape": shape, "seconds": config.seconds_per_view, "rate": SAMPLE_RATE, "filters": FILTERS, "span": span}
        return SOUND.format(**fields, hop=hop, frames=frames, samples=span + span // 3)
    rows, columns = config.page_grid
    how = {
        "image": f"one view, the picture in RGB at {size} x {size} (bicubic).",
        "page": f"each page in RGB at {columns * size} x {rows * size} (bicubic), cut row by row into {rows * columns} tiles.",
        "video": f"a view a frame in RGB at {size} x {size} (bicubic), {config.decode.frames_per_second:g} frames a second.",
    }[kind]
    if kind == "image":
        return PICTURES.format(kind=kind, shape=shape, dtype=inputs["dtype"], how=how, size=size)
    return f"\n## {kind.capitalize()}\n\n`{graph['file']}` takes `views` (N, V, {shape}) {inputs['dtype']}: {how}\n"
