"""`conf=teach`: a teacher's vectors beside every query, target and hard negative of training splits, for embedding matching.

Source: EmbeddingGemma (arXiv 2509.20354) matches a larger embedding model's vectors, also those of hard negatives. Each split
is written anew below another root, as it was but for the vectors, which have unit length; training on that root finds them.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from datamodules.corpus import Corpus
from datamodules.processors.inputs import Inputs
from datamodules.sample import BadExampleError, Example, Item, key_of
from datamodules.shards import Split, is_written, write_split
from datamodules.tasks import Mixture
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, cut, device_named, probe
from lightning_modules.encoder.prepacked import prepack

Templates = dict[str, str | None]  # column to the template around its text


def teach(
    checkpoint: str,
    root: str,
    data: Mixture,
    out: str,
    *,
    prompts: bool = True,
    dtype: Literal["float16", "float32"] = "float16",
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
    batch_size: int = 256,
    num_workers: int = 1,
    device: str = "auto",
) -> None:
    """Write the training splits of a configuration once more, with an encoder's vectors in them.

    A split that was written from the same examples by the same encoder with the same prompts stays as it is; any other is
    written whole or not at all. Keys of foreign tars are made fit for ours (`key_of`).

    Args:
        checkpoint: The teacher: an encoder's folder, or one of sentence-transformers.
        root: Folder that the splits lie in.
        data: The training tasks; those of rate 0 are left out, as in training.
        out: Folder that the splits with vectors go to, in the same places below it.
        prompts: Whether the tasks' prompts go around texts, as they do in training; false for a teacher that knows none.
        dtype: Of the stored vectors.
        compute: How a batch goes through the encoder: memory and time.
        batch_size: Examples embedded at once, sorted by length among them.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda`, or `auto` for the best there is.

    Raises:
        ValueError: There is no task, two tasks disagree on a split's prompts, `out` is `root`, an example is bad, or the
            teacher takes no media of a kind.
    """
    if Path(out).resolve() == Path(root).resolve():
        raise ValueError(f"out is {out}, where the splits are read from; give another folder")
    templates = _templates(data, prompts)
    splits = {folder: Split(Path(root) / folder) for folder in templates}  # before a teacher is loaded
    encoder, processor = load_encoder(checkpoint)
    probe(encoder)
    encoder = encoder.to(device_named(device)).eval()
    encoder.use(compute)
    prepack(encoder)
    teacher = {"path": checkpoint, "sha256": read_provenance(checkpoint)["sha256"], "dtype": dtype}
    console, num_kept = Console(), 0
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for folder, split in splits.items():
            made_by = teacher | {"prompts": templates[folder]}
            about = {**split.manifest["about"], "teacher": made_by, "made_of": split.digest}
            if is_written(Path(out) / folder, about):
                num_kept += 1
                continue
            batches = Corpus(split, templates[folder], processor, batch_size).loader(num_workers)
            vectors = (vector.astype(dtype) for batch in batches for vector in _vectors(encoder, batch.inputs))
            examples = progress.track(_taught(split, vectors), total=len(split), description=folder)
            try:
                write_split(Path(out) / folder, examples, about=about)
            except BadExampleError as error:
                raise BadExampleError(f"{error}; conf=verify root={root} leaves bad examples out", error.cause) from error
    width = encoder.config.embedding_dim
    console.print(f"{len(splits) - num_kept} splits with vectors of {width} dimensions below {out}", soft_wrap=True)
    if num_kept:
        console.print(f"{num_kept} of {len(splits)} splits had been written by this teacher and were left as they are")


def _templates(data: Mixture, prompts: bool) -> dict[str, Templates]:
    """Split to the templates around the texts of its columns."""
    found: dict[str, Templates] = {}
    for name, task in data.tasks.items():
        if task.rate > 0:
            query, target = (task.query_prompt, task.target_prompt) if prompts else (None, None)
            wanted: Templates = {"query": query, "target": target, "negatives": target}
            if found.setdefault(task.shards, wanted) != wanted:
                raise ValueError(
                    f"task {name!r} puts other prompts around {task.shards} than one before it, and an item has one vector; "
                    "embed them in two runs, or give prompts=false"
                )
    if not found:
        raise ValueError("no task has a rate above 0; include a mixture or give data.tasks")
    return found


@torch.inference_mode()
def _vectors(encoder: Embedder, inputs: Inputs) -> np.ndarray:
    """Unit vectors (N, D) in fp32."""
    return cut(encoder(inputs.to(encoder.device)), encoder.config.embedding_dim).cpu().numpy()


def _taught(split: Split, vectors: Iterator[np.ndarray]) -> Iterator[Example]:
    """The examples of a split, each item with the next vector."""

    def taught(item: Item | None) -> Item:
        assert item is not None  # whoever made the vectors has refused it
        return dataclasses.replace(item, teacher=next(vectors))

    for position in range(len(split)):
        example = split.read(position)
        query, target = taught(example.query), taught(example.target)
        negatives = tuple(taught(negative) for negative in example.negatives)
        yield dataclasses.replace(example, key=key_of(example.key), query=query, target=target, negatives=negatives)
