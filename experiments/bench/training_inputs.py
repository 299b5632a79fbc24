"""What the trainers of `train_step.py` are given: shards and the same pairs as text, one tokenizer, the same random weights."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from trainers import DENSE
from turns import Job

from datamodules.collate import with_prompt
from datamodules.order import generator
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.recipes.pack import prepare
from datamodules.sample import Example
from datamodules.shards import Split, write_split
from datamodules.tasks import TaskSpec
from datamodules.training import TrainingData
from lightning_modules.configuration import CONF, compose
from lightning_modules.encoder.checkpoint import config_from_json, save_encoder
from lightning_modules.encoder.embedder import Embedder

TASKS = {"banking77": "banking77/class", "agnews": "agnews/title-body", "cosqa": "cosqa/docstring-body"}
MAX_TEXT_TOKENS = 256  # as in conf/model/small.yaml
MAX_HELD_OUT = 500  # every tenth pair, up to so many
NUM_DISTINCT = 64  # pairs that the gradients are compared on
SAME = {"temperature": 0.05, "learning_rate": 5e-4, "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup": 0.05, "clip": 1.0}
BERT: dict[str, Any] = {
    "embedding_dim": 384,
    "prefixes": [96, 192, 384],
    "backbone": {
        "text": {
            "model_type": "bert",
            "vocab_size": 8192,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "towers": {},
    },
}


@dataclass(frozen=True)
class Task:
    """A data set's three splits below the root: `train`, `held_out` and `distinct`."""

    name: str
    spec: TaskSpec

    def shards(self, split: str) -> str:
        return f"{self.name}/{split}"

    def pair(self, example: Example) -> tuple[str, str]:
        """Query and target as text, with their prompts."""
        assert example.query is not None
        assert example.target is not None
        query, target = with_prompt(example.query, self.spec.query_prompt), with_prompt(example.target, self.spec.target_prompt)
        return str(query.parts[0].data), str(target.parts[0].data)


def tasks_from(source: str, root: Path, names: Sequence[str]) -> dict[str, Task]:
    """The data sets' splits, written below `root`."""
    tasks = {}
    for name in names:
        config = yaml.safe_load((CONF / "tasks" / f"{name}.yaml").read_text())
        tasks[name] = Task(name, TaskSpec(**config["data"]["tasks"][TASKS[name]]))
    prepare(source, str(root / "pack"), sets=[task.spec.shards.rpartition("/")[0] for task in tasks.values()])
    for task in tasks.values():
        split = Split(root / "pack" / task.spec.shards)
        examples = [split.read(position) for position in range(len(split))]
        held_out = examples[::10][:MAX_HELD_OUT]
        keys = {example.key for example in held_out}
        write_split(root / task.shards("held_out"), held_out)
        write_split(root / task.shards("train"), [example for example in examples if example.key not in keys])
        write_split(root / task.shards("distinct"), _distinct(task, examples))
    return tasks


def _distinct(task: Task, examples: Sequence[Example]) -> Iterator[Example]:
    """The first pairs that share no text, so that a loss with a mask and one without are the same."""
    taken: set[str] = set()
    num_found = 0
    for example in examples:
        texts = task.pair(example)
        if num_found < NUM_DISTINCT and not taken.intersection(texts):
            taken.update(texts)
            num_found += 1
            yield example


def texts_of(root: Path, task: Task) -> Iterator[str]:
    split = Split(root / task.shards("train"))
    for position in range(len(split)):
        yield from task.pair(split.read(position))


def write_model(folder: Path, name: str, texts: Sequence[str], seed: int) -> list[int]:
    """Random weights and a tokenizer for both: `encoder/` is ours, `text/` and `dense.safetensors` are for the rival.

    Returns:
        The prefixes.
    """
    values = BERT if name == "bert" else compose(CONF / "model" / f"{name}.yaml", [])["model"]["encoder"]
    config = config_from_json(values)
    assert config.backbone.text is not None
    tokenizer = train_tokenizer(texts, config.backbone.text["vocab_size"])
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[end])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.model_max_length = MAX_TEXT_TOKENS + 1  # the rival counts the end, we do not
    torch.manual_seed(seed)
    encoder = Embedder(config)
    processor = ComposedProcessor(
        ProcessorConfig(vocab_size=len(tokenizer), max_text_tokens=MAX_TEXT_TOKENS, tokens_per_view=config.backbone.tokens),
        tokenizer,
    )
    save_encoder(folder / "encoder", encoder, processor, provenance={"made_for": "experiments/bench/train_step.py"})
    encoder.backbone.text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    save_file({DENSE: encoder.state_dict()["projection.0.weight"]}, folder / "dense.safetensors")
    return list(config.prefixes)


class Batches:
    """The batches that our plan makes of a split, as text: what the rival trains on, and what it pads."""

    def __init__(self, root: Path, model: Path, task: Task, split: str, batch_size: int, num_steps: int, seed: int) -> None:
        spec = TaskSpec(task.shards(split), task.spec.kind, batch_size=batch_size)
        data = TrainingData(str(root), {task.name: spec}, init_from=str(model / "encoder"), seed=seed)
        data.setup("fit")
        self.tokenizer, self.steps = data.processor.tokenizer, []
        for step in range(num_steps):
            positions = data.plan.positions(step).copy()
            generator(seed, "rows as a sampler leaves them", step).shuffle(
                positions
            )  # ours lie by length, as our plan has them
            self.steps.append([task.pair(data.splits[task.name].read(int(position))) for position in positions])

    def write(self, file: Path) -> None:
        file.write_text("".join(json.dumps(pair) + "\n" for pairs in self.steps for pair in pairs))

    def padding(self, mini_batch: int | None) -> tuple[float, int]:
        """Share of padding in what goes through the rival's encoder, and the tokens, padding included, of its largest pass."""
        num_tokens, places = 0, []
        for pairs in self.steps:
            for texts in zip(*pairs, strict=True):
                lengths = [len(self.tokenizer.encode(text, truncation=True)) for text in texts]
                size = mini_batch or len(lengths)
                parts = [lengths[first : first + size] for first in range(0, len(lengths), size)]
                num_tokens += sum(lengths)
                places += [len(part) * max(part) for part in parts]
        return 1 - num_tokens / sum(places), max(places)


class Setup:
    """A model's folder, and jobs with it."""

    def __init__(self, folder: Path, root: Path, model: str, tasks: Mapping[str, Task], seed: int = 0) -> None:
        self.folder, self.root, self.seed = folder, root, seed
        folder.mkdir(parents=True)
        self.prefixes = write_model(folder, model, [text for task in tasks.values() for text in texts_of(root, task)], seed)

    def job(self, task: Task, batch_size: int, *, split: str = "train", **settings: Any) -> tuple[Job, Batches]:
        """What both trainers are told, and the batches that they will see."""
        job = Job(
            model=str(self.folder),
            config=str(self.folder / "ours.yaml"),
            pairs=str(self.folder / "pairs.jsonl"),
            batch_size=batch_size,
            prefixes=self.prefixes,
            seed=self.seed,
            **{**SAME, **settings},
        )
        batches = Batches(self.root, self.folder, task, split, batch_size, job.num_steps, self.seed)
        batches.write(Path(job.pairs))
        Path(job.config).write_text(json.dumps(self._config(task, split, job)))  # JSON is YAML
        return job, batches

    def _config(self, task: Task, split: str, job: Job) -> dict[str, Any]:
        """Our stage's configuration: the data and model of the job, and nothing that writes or shows."""
        spec = {"shards": task.shards(split), "kind": task.spec.kind, "batch_size": job.batch_size}
        spec |= {"query_prompt": task.spec.query_prompt, "target_prompt": task.spec.target_prompt}
        encoder = str(self.folder / "encoder")
        data = {"root": str(self.root), "tasks": {task.name: spec}, "init_from": encoder, "seed": job.seed}
        optimizer = {name: getattr(job, name) for name in ("learning_rate", "weight_decay", "betas", "warmup")}
        objective = {"spread_out": 0.0, "temperature": job.temperature}
        off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
        trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "max_steps": job.num_steps}
        trainer |= {"gradient_clip_val": job.clip or None, "default_root_dir": str(self.folder / "ours")}
        return {
            "seed_everything": job.seed,
            "data": {**data, "prompt_dropout": 0.0, "num_workers": 0},
            "model": {"init_from": encoder, "objective": objective, "optimizer": optimizer},
            "trainer": {**dict.fromkeys(off, False), **trainer},
        }


def write_held_out(file: Path, root: Path, task: Task) -> list[tuple[str, str]]:
    split = Split(root / task.shards("held_out"))
    pairs = [task.pair(split.read(position)) for position in range(len(split))]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def recall_at_1(vectors: Path, pairs: Sequence[tuple[str, str]], prefix: int) -> float:
    """Share of held-out queries whose own target is the nearest of all held-out targets; equal targets count once."""
    found = np.load(vectors)
    query, target = found["query"][:, :prefix], found["target"][:, :prefix]
    first = {text: row for row, (_, text) in reversed(list(enumerate(pairs)))}
    rows = sorted(first.values())
    target = target[rows] / np.linalg.norm(target[rows], axis=1, keepdims=True)
    nearest = (query @ target.T).argmax(1)
    return float(np.mean([pairs[rows[place]][1] == own for place, (_, own) in zip(nearest, pairs, strict=True)]))
