"""The two trainers that `train_step.py` compares, each in a process of its own: python trainers.py ours|rival JOB.

The rival's process loads nothing of ours but `turns.py`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from turns import Job, Turns

ROOT = Path(__file__).parents[2]
DENSE = "dense.weight"  # the name of the projection's weight, on both sides


def ours(job: Job) -> None:
    """PreFineTune over TrainingData under Lightning's trainer, all from a configuration."""
    sys.path.insert(0, str(ROOT))
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.cli import LightningCLI

    from datamodules.sample import Item, Part
    from datamodules.training import TrainingData
    from lightning_modules.configuration import compose
    from lightning_modules.prefinetune import PreFineTune

    turns = Turns(job)

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            turns.begin()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            _write_gradients(job, pl_module.encoder, {"backbone.text.": "", "projection.0.weight": DENSE})

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            turns.step_done()

    cli = LightningCLI(
        PreFineTune,
        TrainingData,
        args=compose(Path(job.config), job.overrides),
        run=False,
        save_config_callback=None,
        trainer_defaults={"callbacks": [Watch()]},
        parser_kwargs={"exit_on_error": False},
    )
    cli.trainer.fit(cli.model, cli.datamodule)

    def embed(texts: list[str]) -> Tensor:
        items = [Item((Part("text", text, content=text),)) for text in texts]
        parts = [cli.datamodule.processor(items[first : first + 256]) for first in range(0, len(items), 256)]
        return torch.cat([cli.model.encoder(part) for part in parts])

    if job.held_out:
        cli.model.eval()
        with torch.inference_mode():
            _write_vectors(job, embed)


def rival(job: Job) -> None:
    """Its trainer, collator and losses with their defaults, but for what is made equal on both sides."""
    import pyarrow  # pyright: ignore[reportMissingImports] (optional)
    from datasets import Dataset  # pyright: ignore[reportMissingImports] (optional)
    from sentence_transformers import (  # pyright: ignore[reportMissingImports] (optional)
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler  # pyright: ignore[reportMissingImports] (optional)
    from sentence_transformers.sentence_transformer import losses, modules  # pyright: ignore[reportMissingImports] (optional)
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    text = modules.Transformer(str(Path(job.model) / "text"))
    weight = load_file(Path(job.model) / "dense.safetensors")[DENSE]
    dense = modules.Dense(weight.shape[1], weight.shape[0], bias=False, activation_function=torch.nn.Identity())
    dense.linear.weight.data.copy_(weight)
    model = SentenceTransformer(modules=[text, modules.Pooling(weight.shape[1], "mean"), dense], device="cpu")
    scale = 1 / job.temperature
    if job.mini_batch is None:
        loss: Any = losses.MultipleNegativesRankingLoss(model, scale=scale)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=job.mini_batch)
    loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=job.prefixes)
    turns = Turns(job)

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _write_gradients(job, model, {"0.model.": "", "2.linear.weight": DENSE})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.step_done()

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **others: Any) -> Any:
        in_turn: Any = SequentialSampler(dataset)
        return DefaultBatchSampler(in_turn, batch_size=batch_size, drop_last=drop_last, **others)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(Path(job.config).parent / "rival"),
        max_steps=job.num_steps,
        per_device_train_batch_size=job.batch_size,
        batch_sampler=in_order,
        learning_rate=job.learning_rate,
        adam_beta1=job.betas[0],
        adam_beta2=job.betas[1],
        weight_decay=job.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(job.warmup * job.num_steps)),
        max_grad_norm=job.clip,
        use_cpu=True,
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in Path(job.pairs).read_text().splitlines()]
    table = pyarrow.table({"query": [query for query, _ in rows], "target": [target for _, target in rows]})
    data = Dataset(table, fingerprint="pairs")  # datasets 5.2 fails to make one of a table of pyarrow 26
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[Watch()]).train()
    if job.held_out:
        _write_vectors(job, lambda texts: model.encode(texts, batch_size=256, convert_to_tensor=True))


def _write_gradients(job: Job, model: torch.nn.Module, names: Mapping[str, str]) -> None:
    """The first step's gradients under names that both sides share; parameters without one are left out."""
    if job.gradients is None or Path(job.gradients).exists():
        return
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            shared = next(name.replace(own, common, 1) for own, common in names.items() if name.startswith(own))
            found[shared] = parameter.grad.detach().contiguous().clone()
    save_file(found, job.gradients)


def _write_vectors(job: Job, embed: Any) -> None:
    assert job.held_out is not None
    assert job.vectors is not None
    rows = [json.loads(line) for line in Path(job.held_out).read_text().splitlines()]
    query, target = (embed([row[side] for row in rows]).float().cpu().numpy() for side in range(2))
    np.savez(job.vectors, query=query, target=target)


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(job.threads)
    {"ours": ours, "rival": rival}[sys.argv[1]](job)


if __name__ == "__main__":
    main()
