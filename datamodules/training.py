"""TrainingData: plan, stream and collate as a LightningDataModule."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from datamodules.collate import Batch, Collate, with_prompt
from datamodules.plan import Plan, PlannedTask
from datamodules.processors.composed import ComposedProcessor, ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Item
from datamodules.shards import Split
from datamodules.stream import Source, StepStream
from datamodules.tasks import TaskSpec


class TrainingData(L.LightningDataModule):
    """Streams single-task batches in an order that follows from (seed, step) alone.

    Args:
        root: Folder that the tasks' shards lie in.
        tasks: Name to task; see `TaskSpec`.
        processor: How items become inputs; None takes it from `init_from`.
        init_from: An encoder's folder whose processor (tokenizer and sizes) is used.
        seed: Of the order and of the prompt dropout.
        steps_per_block: Every task has exactly its share of each block of so many steps.
        prompt_dropout: Share of queries that go without their prompt. Our choice: no paper publishes it.
        max_tokenizer_texts: Texts that a tokenizer is trained on, taken evenly from the tasks.
        num_workers: Processes that read and decode beside the training process; 0 does it there.
    """

    def __init__(
        self,
        root: str,
        tasks: dict[str, TaskSpec],
        *,
        processor: ProcessorConfig | None = None,
        init_from: str | None = None,
        seed: int = 0,
        steps_per_block: int = 1000,
        prompt_dropout: float = 0.1,
        max_tokenizer_texts: int = 50_000,
        num_workers: int = 1,
    ) -> None:
        super().__init__()
        if (processor is None) == (init_from is None):
            raise ValueError(
                "give either data.processor (a new one) or data.init_from (that of an encoder), not both and not none"
            )
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"data.prompt_dropout is {prompt_dropout}; it must lie in [0, 1]")
        self.root, self.tasks = Path(root), {name: task for name, task in tasks.items() if task.rate > 0}
        self.processor_config, self.init_from = processor, init_from
        self.seed, self.steps_per_block, self.prompt_dropout = seed, steps_per_block, prompt_dropout
        self.max_tokenizer_texts, self.num_workers = max_tokenizer_texts, num_workers
        self.next_step = 0
        self.splits = {name: Split(self.root / task.shards) for name, task in self.tasks.items()}
        planned = {n: PlannedTask(len(self.splits[n]), task.batch_size, task.rate) for n, task in self.tasks.items()}
        self.plan = Plan(planned, seed=seed, steps_per_block=steps_per_block)

    def prepare_data(self) -> None:
        if (
            self.processor_config is not None
            and self.processor_config.tokenizer is None
            and not self._tokenizer_folder().exists()
        ):
            tokenizer = train_tokenizer(self._texts(), self.processor_config.vocab_size)
            beside = self._tokenizer_folder().with_suffix(f".{os.getpid()}.partial")
            try:
                tokenizer.save_pretrained(beside)
                beside.rename(self._tokenizer_folder())
            except Exception as error:  # tokenizers raises a bare Exception when the disk is full
                raise OSError(
                    f"could not write the tokenizer to {self._tokenizer_folder()}: {error}; is the disk full?"
                ) from error
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def setup(self, stage: str) -> None:
        del stage
        if self.processor_config is None:
            assert self.init_from is not None
            self.processor = ComposedProcessor.load(Path(self.init_from))
        else:
            named = self.processor_config.tokenizer or self._tokenizer_folder()
            self.processor = ComposedProcessor(self.processor_config, AutoTokenizer.from_pretrained(named))

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        world_size = self.trainer.world_size
        if self.trainer.max_epochs != 1:
            raise ValueError(
                f"trainer.max_epochs is {self.trainer.max_epochs}; the stream is one epoch long, set trainer.max_steps"
            )
        for name, task in self.tasks.items():
            if task.batch_size % world_size:
                raise ValueError(f"task {name!r}: batch_size {task.batch_size} is no multiple of the {world_size} ranks")
        stream = StepStream(
            self.plan,
            {name: Source(split, self.processor.config.decode) for name, split in self.splits.items()},
            Collate(self.tasks, self.processor, self.prompt_dropout, self.seed),
            first_step=self.next_step,
            num_steps=self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=world_size,
        )
        return loader_of(stream, self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"next_step": self.trainer.fit_loop.epoch_loop.total_batch_idx + 1, "plan": self._plan_digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["plan"] != self._plan_digest():
            raise ValueError(
                "the checkpoint was made with other tasks, shards, rates, batch sizes or seed; "
                "resume with the same data configuration, or start anew with model.init_from"
            )
        self.next_step = state_dict["next_step"]

    def _plan_digest(self) -> str:
        shards = {name: [shard["sha256"] for shard in split.manifest["shards"]] for name, split in self.splits.items()}
        tasks = {name: [task.batch_size, task.rate] for name, task in self.tasks.items()}
        described = json.dumps([tasks, shards, self.seed, self.steps_per_block], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def _tokenizer_folder(self) -> Path:
        """Beside the run, named by what it is trained on, so that other data never meets an old tokenizer."""
        assert self.trainer is not None
        assert self.processor_config is not None
        prompts = {name: [task.query_prompt, task.target_prompt] for name, task in self.tasks.items()}
        described = f"{self._plan_digest()} {self.processor_config.vocab_size} {self.max_tokenizer_texts} {prompts}"
        return Path(self.trainer.default_root_dir) / f"tokenizer-{hashlib.sha256(described.encode()).hexdigest()[:12]}"

    def _texts(self) -> Iterator[str]:
        """Texts of queries and targets with their prompts, evenly from every task."""
        each = max(1, self.max_tokenizer_texts // (2 * len(self.tasks)))
        for name, split in self.splits.items():
            task = self.tasks[name]
            for position in range(0, len(split), max(1, len(split) // each)):
                example = split.read(position)
                for item, prompt in ((example.query, task.query_prompt), (example.target, task.target_prompt)):
                    if isinstance(item, Item):
                        yield from (str(p.data) for p in with_prompt(item, prompt).parts if isinstance(p.data, str))


def loader_of(dataset: Any, num_workers: int) -> DataLoader[Any]:
    """A loader over a data set that yields whole batches."""
    workers = {"multiprocessing_context": "fork", "prefetch_factor": 4, "persistent_workers": False} if num_workers else {}
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
        **workers,
    )


def _one_thread(worker: int) -> None:
    del worker
    torch.set_num_threads(1)
