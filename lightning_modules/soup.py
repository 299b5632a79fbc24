"""Model soup: the average of encoders' parameters (uniform, weighted, or greedy by a validation score).

Source: Wortsman et al. 2022 (arXiv 2203.05482) for the greedy order; Gemini Embedding and EmbeddingGemma average checkpoints of
one run and across runs, EmbeddingGemma with equal weights.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.processors.loading import load_processor
from datamodules.processors.processor import Processor
from datamodules.tasks import BenchmarkSpec
from lightning_modules.encoder.checkpoint import (
    load_encoder,
    load_weights,
    read_config,
    read_provenance,
    read_weights,
    require_same_shape,
    save_encoder,
)
from lightning_modules.judge import Judge


def soup(
    checkpoints: list[str],
    out: str,
    *,
    method: Literal["uniform", "weighted", "greedy"] = "uniform",
    weights: list[float] | None = None,
    root: str | None = None,
    benchmarks: dict[str, BenchmarkSpec] | None = None,
    batch_size: int = 64,
    num_workers: int = 1,
) -> None:
    """Average encoders and write the result as an encoder's folder, with what went in.

    Args:
        checkpoints: Encoders' folders; all of one shape and tokenizer.
        out: Folder of the soup.
        method: `uniform`; `weighted` by `weights`; `greedy` starts from the best and keeps each further one that does not lower
            the mean headline score of `benchmarks` at full width.
        weights: One for each checkpoint, for `weighted`; they are divided by their sum.
        root: Folder of the shards, for `greedy`.
        benchmarks: What `greedy` validates on. Take splits that no result is reported on.
        batch_size: Items embedded at once, for `greedy`.
        num_workers: Processes that read and decode, for `greedy`.
    """
    if not checkpoints:
        raise ValueError("there is nothing to average; give checkpoints=[folder,folder,..]")
    if (weights is not None) != (method == "weighted"):
        raise ValueError(f"method is {method!r} and weights are {weights}; weights belong to method=weighted and only to it")
    encoder, processor = load_encoder(checkpoints[0])
    ingredients = [read_weights(folder) for folder in checkpoints]
    for folder, ingredient in zip(checkpoints, ingredients, strict=True):
        require_same_shape(encoder, ingredient, folder)
        _check_same_inputs(checkpoints[0], folder)
    scores: dict[str, float] = {}
    if method == "greedy":
        if root is None or not benchmarks:
            raise ValueError("method=greedy needs root and benchmarks to validate on")
        judge = Judge(encoder, processor, Path(root), batch_size=batch_size, num_workers=num_workers, device="auto")
        shares, scores = _greedy(judge, checkpoints, ingredients, benchmarks)
    else:
        shares = _normalised(weights if weights is not None else [1.0] * len(checkpoints), len(checkpoints))
    load_weights(encoder, average(ingredients, shares), "soup")
    parents = [
        {
            "path": folder,
            "sha256": read_provenance(folder)["sha256"],
            "weight": share,
            **({"score": scores[folder]} if scores else {}),
        }
        for folder, share in zip(checkpoints, shares, strict=True)
    ]
    save_encoder(out, encoder.cpu(), processor, provenance={"stage": "soup", "method": method, "parents": parents})
    for parent in parents:
        print(f"{parent['weight']:.3f} x {parent['path']}" + (f" (score {parent['score']:.4f})" if scores else ""))
    print(f"soup in {out}")


def average(ingredients: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """Σ share · weights, summed in float64; integer tensors must agree and pass as they are."""
    averaged = {}
    for name, first in ingredients[0].items():
        if first.is_floating_point():
            total = sum(share * ingredient[name].double() for share, ingredient in zip(shares, ingredients, strict=True))
            assert isinstance(total, Tensor)
            averaged[name] = total.to(first.dtype)
        else:
            if any(not torch.equal(first, ingredient[name]) for ingredient in ingredients):
                raise ValueError(f"{name} holds whole numbers that differ between the checkpoints; they cannot be averaged")
            averaged[name] = first
    return averaged


def _normalised(weights: list[float], num_checkpoints: int) -> list[float]:
    if len(weights) != num_checkpoints or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"weights are {weights} for {num_checkpoints} checkpoints; give one number of at least 0 for each, not all 0"
        )
    return [weight / sum(weights) for weight in weights]


def _greedy(
    judge: Judge, checkpoints: list[str], ingredients: list[dict[str, Tensor]], benchmarks: dict[str, BenchmarkSpec]
) -> tuple[list[float], dict[str, float]]:
    """Shares of the greedy soup, and each ingredient's own score."""

    def score(chosen: list[int]) -> float:
        shares = [1 / len(chosen)] * len(chosen)
        load_weights(judge.encoder, average([ingredients[n] for n in chosen], shares), "soup")
        return judge.headline(benchmarks)

    own = [score([n]) for n in range(len(checkpoints))]
    by_score = sorted(range(len(checkpoints)), key=lambda n: -own[n])
    chosen, best = by_score[:1], own[by_score[0]]
    for candidate in by_score[1:]:
        reached = score([*chosen, candidate])
        if reached >= best:
            chosen, best = [*chosen, candidate], reached
    shares = [1 / len(chosen) if n in chosen else 0.0 for n in range(len(checkpoints))]
    return shares, dict(zip(checkpoints, own, strict=True))


def _check_same_inputs(first: str, other: str) -> None:
    one, two = load_processor(first), load_processor(other)
    for name, differ in (("tokenizer", _rules(one) != _rules(two)), ("processor's settings", one.config != two.config)):
        if differ:
            raise ValueError(
                f"{first} and {other} differ in the {name}; only runs that began from the same encoder can be averaged"
            )
    if read_config(first) != read_config(other):
        raise ValueError(
            f"{first} and {other} differ in the encoder's configuration; only encoders of one kind can be averaged"
        )


def _rules(processor: Processor) -> str:
    """All of a tokenizer."""
    backend: Any = processor.tokenizer.backend_tokenizer
    return backend.to_str()
