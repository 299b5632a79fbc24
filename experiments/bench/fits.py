"""What a training step of models of 270 M to 8 B parameters holds on 1 and on 8 GPUs: arithmetic, checked against a small case.

    python experiments/bench/fits.py [--tokens 16384] [--out FILE]

Weights, gradients and AdamW's two moments are in fp32 (bf16-mixed: products in bf16): 16 bytes a parameter, shared out over the
GPUs by FSDP2. Activations are what autograd saves of the tokens that are in memory at once on one GPU
(`model.compute.max_tokens`): the bytes of a token in one layer are c · (1, hidden, MLP, queries, keys), all widths; the
coefficients c are solved from what small Qwen3 models save under bf16 autocast, and checked on one more. With
`checkpoint_layers` every layer keeps its input, and one layer at a time is whole. Left out: the loss's own memory, which is
small (loss.py); and what FSDP2 gathers, which with several parts of a batch is the whole model (experiments/008_scale).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stream import CONSOLE, show  # puts the project on the path too

from datamodules.processors.inputs import Inputs
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.embedder import Embedder, EncoderConfig

GIB = 2**30
BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "AdamW": 8}


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder's layers, and parameters beside them (towers).

    Args:
        hidden: Width of the stream.
        mlp: Width inside the MLP.
        heads: Queries.
        groups: Keys and values.
        head: Width of each.
        layers: How many.
        vocab: Rows of the embedding.
        beside: Parameters of towers.
    """

    hidden: int
    mlp: int
    heads: int
    groups: int
    head: int
    layers: int
    vocab: int
    beside: int = 0

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.groups)
        return self.vocab * self.hidden + self.layers * (attention + 3 * self.hidden * self.mlp) + self.beside

    @property
    def widths(self) -> list[int]:
        return [1, self.hidden, self.mlp, self.heads * self.head, self.groups * self.head]

    def settings(self) -> dict[str, Any]:
        names = {"hidden_size": self.hidden, "intermediate_size": self.mlp, "num_attention_heads": self.heads}
        names |= {"num_key_value_heads": self.groups, "head_dim": self.head, "num_hidden_layers": self.layers}
        return {"model_type": "qwen3", "vocab_size": self.vocab, **names}


MODELS = {
    "270 M (Gemma 3 270M's shape)": Shape(640, 2048, 4, 1, 256, 18, 262_144),
    "740 M (EmbeddingGemma 2: with towers of 472 M)": Shape(640, 2048, 4, 1, 256, 18, 262_144, 472_000_000),
    "2 B (Qwen3 1.7B's shape)": Shape(2048, 6144, 16, 8, 128, 28, 151_936),
    "8 B (Qwen3 8B's shape)": Shape(4096, 12_288, 32, 8, 128, 36, 151_936),
}
SMALL = [Shape(*widths, layers=1, vocab=64) for widths in ((64, 96, 4, 2, 16), (96, 96, 4, 2, 16), (64, 192, 4, 2, 16))]
SMALL += [Shape(*widths, layers=1, vocab=64) for widths in ((64, 96, 8, 2, 16), (64, 96, 8, 4, 16), (64, 96, 8, 8, 16))]
CHECK = Shape(128, 320, 8, 4, 32, layers=3, vocab=64)


def saved(shape: Shape, tokens: int = 64) -> float:
    """Bytes that autograd saves for each token of a text, without the weights; storages that are saved twice count once."""
    torch.manual_seed(0)
    width = shape.hidden
    encoder = Embedder(EncoderConfig(BackboneConfig(text=shape.settings()), width, (width,))).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= tokens:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    inputs = Inputs(torch.randint(2, shape.vocab, (tokens,)), torch.tensor([tokens]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        encoder(inputs)
    cast = sum(p.numel() * 2 for n, p in encoder.named_parameters() if n.endswith("proj.weight") or "projection" in n)
    return (sum(found.values()) - cast) / tokens  # autocast keeps weights in bf16 once, which the table does not count


def coefficients() -> np.ndarray:
    """Bytes of a token in a layer for each of `Shape.widths`."""
    deep = [Shape(**{**vars(shape), "layers": 3}) for shape in SMALL]
    bytes_of_layer = [(saved(three) - saved(one)) / 2 for one, three in zip(SMALL, deep, strict=True)]
    return np.linalg.lstsq(np.array([shape.widths for shape in SMALL]), np.array(bytes_of_layer), rcond=None)[0]


def activations(shape: Shape, tokens: int, bytes_of: np.ndarray, *, checkpointed: bool) -> float:
    layer = float(bytes_of @ shape.widths) * tokens
    return shape.layers * 4 * shape.hidden * tokens + layer if checkpointed else shape.layers * layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="in memory at once on each GPU, model.compute.max_tokens")
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bytes_of = coefficients()
    predicted = CHECK.layers * float(bytes_of @ CHECK.widths)
    measured = (saved(Shape(**{**vars(CHECK), "layers": 4})) - saved(Shape(**{**vars(CHECK), "layers": 1}))) / 3 * CHECK.layers
    check = {"predicted": predicted, "measured": measured, "apart": predicted / measured - 1}
    CONSOLE.print(
        "bytes of a token in a layer:", dict(zip(("1", "hidden", "mlp", "queries", "keys"), bytes_of.round(2), strict=True))
    )
    CONSOLE.print("the check, bytes a token:", check)
    rows = []
    for name, shape in MODELS.items():
        for gpus in (1, 8):
            parts = {part: shape.parameters * size / gpus / GIB for part, size in BYTES_PER_PARAMETER.items()}
            whole, less = (activations(shape, arguments.tokens, bytes_of, checkpointed=c) / GIB for c in (False, True))
            fixed = sum(parts.values())
            rows.append({"model": name, "parameters, M": shape.parameters / 1e6, "GPUs": gpus, **parts})
            rows[-1] |= {
                "activations": whole,
                "layers checkpointed": less,
                "in all": fixed + whole,
                "in all, less": fixed + less,
            }
    show(f"GiB on each GPU, {arguments.tokens} tokens at once", rows)
    if arguments.out:
        figures = {
            "torch": torch.__version__,
            "tokens": arguments.tokens,
            "bytes": bytes_of.tolist(),
            "check": check,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
