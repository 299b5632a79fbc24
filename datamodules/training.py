"""TrainingData: plan, stream and collate as a LightningDataModule."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from datamodules.cache import Cache
from datamodules.collate import Batch, Collate, with_prompt
from datamodules.loader import loader_of
from datamodules.order import Order
from datamodules.plan import STEPS_PER_BLOCK, Plan, PlannedTask
from datamodules.processors.loading import load_processor, new_processor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import BadExampleError, Item
from datamodules.shards import Split
from datamodules.store import Store
from datamodules.stream import Source, StepStream
from datamodules.tasks import TaskSpec

# Our choice: a run goes on past so many bad examples, and past one in so many; both together are a storm.
TOLERATED_FAULTS = 10
TOLERATED_SHARE = 1 / 10_000


@dataclass(frozen=True)
class CacheConfig:
    """Where shards of remote stores are kept.

    Args:
        folder: A local folder; the ranks of a machine share it.
        max_gigabytes: Most it holds; the longest unused shards go first.
    """

    folder: str = "~/.cache/polyphony"
    max_gigabytes: float = 100.0


class TrainingData(L.LightningDataModule):
    """Streams single-task batches in an order that follows from (seed, step) alone.

    Args:
        root: Folder that the tasks' shards lie in, local or of a store (s3://, gs://, hf://, https://).
        tasks: Name to task; see `TaskSpec`.
        processor: How items become inputs; None takes it from `init_from`.
        init_from: An encoder's folder whose processor (tokenizer and sizes) is used.
        seed: Of the order and of the prompt dropout.
        steps_per_block: Every task has exactly its share of each block of so many steps.
        window_shards: Shards in a window of the windowed order, for stores whose cache cannot hold everything; None for the
            global order.
        prompt_dropout: Share of queries that go without their prompt. Our choice: no paper publishes it.
        max_tokenizer_texts: Texts that a tokenizer is trained on, taken evenly from the tasks.
        cache: Where shards of remote stores are kept.
        num_workers: Processes that read and decode beside the training process; 0 does it there.
        start_method: How they are started.
        max_wait_seconds: Longest wait for a batch of theirs before the run is given up; 0 waits for ever.
    """

    def __init__(
        self,
        root: str,
        tasks: dict[str, TaskSpec],
        *,
        processor: ProcessorConfig | None = None,
        init_from: str | None = None,
        seed: int = 0,
        steps_per_block: int = STEPS_PER_BLOCK,
        window_shards: int | None = None,
        prompt_dropout: float = 0.1,
        max_tokenizer_texts: int = 50_000,
        cache: CacheConfig = CacheConfig(),
        num_workers: int = 1,
        start_method: Literal["fork", "forkserver", "spawn"] = "fork",
        max_wait_seconds: float = 900.0,
    ) -> None:
        super().__init__()
        if (processor is None) == (init_from is None):
            raise ValueError(
                "give either data.processor (a new one) or data.init_from (that of an encoder), not both and not none"
            )
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"data.prompt_dropout is {prompt_dropout}; it must lie in [0, 1]")
        if window_shards is not None and window_shards < 1:
            raise ValueError(f"data.window_shards is {window_shards}; it must be at least 1, or null for the global order")
        self.tasks = {name: task for name, task in tasks.items() if task.rate > 0}
        self.processor_config, self.init_from = processor, init_from
        self.seed, self.steps_per_block, self.prompt_dropout = seed, steps_per_block, prompt_dropout
        self.window_shards = window_shards
        self.max_tokenizer_texts, self.num_workers = max_tokenizer_texts, num_workers
        self.start_method, self.max_wait_seconds = start_method, max_wait_seconds
        self.next_step = self.num_examples = 0
        self.faults: Counter[str] = Counter()
        self.root = Store(root, cache=Cache(Path(cache.folder).expanduser(), int(cache.max_gigabytes * 1e9)))
        self.splits = {name: Split(self.root / task.shards) for name, task in self.tasks.items()}
        self.plan = self._make_plan(None)

    def _make_plan(self, processor: Processor | None) -> Plan:
        """The run's plan; with the processor's lengths once that is known."""
        planned = {}
        for name, task in self.tasks.items():
            split = self.splits[name]
            ends = None if self.window_shards is None else tuple(split.shard_ends.tolist())
            order = Order(len(split), ends, self.window_shards or 1)
            lengths = None if processor is None else _Lengths(split, processor)
            planned[name] = PlannedTask(order, task.batch_size, task.rate, lengths)
        return Plan(planned, seed=self.seed, steps_per_block=self.steps_per_block)

    def prepare_data(self) -> None:
        config = self.processor_config
        is_new = config is not None and config.tokenizer is None and config.native is None
        if config is not None and is_new and not self._tokenizer_folder().exists():
            tokenizer = train_tokenizer(self._texts(), config.vocab_size)
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
            self.processor = load_processor(self.init_from)
        else:
            config = self.processor_config
            own = config.tokenizer or (self._tokenizer_folder() if config.native is None else None)
            self.processor = new_processor(config, own)
        self.plan = self._make_plan(self.processor)

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
            self.collate(),
            first_step=self.next_step,
            num_steps=self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=world_size,
        )
        return loader_of(stream, self.num_workers, start_method=self.start_method, max_wait_seconds=self.max_wait_seconds)

    def collate(self) -> Callable[..., Batch]:
        """What makes batches of examples."""
        return Collate(self.tasks, self.processor, self.prompt_dropout, self.seed)

    def note(self, batch: Batch) -> dict[str, float]:
        """Count a batch that is trained on; bad examples are counted by cause and written to `faults-rank<r>.jsonl`.

        Returns:
            What the log shows of it: the task's share of the steps so far, faults so far.
        """
        assert self.trainer is not None
        self.num_examples += len(batch.keys)
        if batch.faults:
            self.faults.update(fault.cause for fault in batch.faults)
            file = Path(self.trainer.default_root_dir) / f"faults-rank{self.trainer.global_rank}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(dataclasses.asdict(fault), ensure_ascii=False) + "\n" for fault in batch.faults)
        _, earlier = self.plan.task_of(batch.step)
        return {
            "share_of_steps": (earlier + 1) / (batch.step + 1),
            "bad_examples": float(self.faults.total()),
        }

    @property
    def storm(self) -> str | None:
        """What is wrong with the data when more examples are bad than a run goes on past, else None."""
        bad = self.faults.total()
        if bad <= max(TOLERATED_FAULTS, TOLERATED_SHARE * self.num_examples):
            return None
        causes = ", ".join(f"{cause}: {number}" for cause, number in self.faults.most_common())
        return (
            f"{bad} of the {self.num_examples} examples read so far were bad ({causes}); faults-rank*.jsonl lists them. "
            "Run conf=verify on the shards, which writes the quarantine lists that leave them out"
        )

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
        tasks = {
            name: [task.batch_size, task.rate, split.digest]
            for (name, task), split in zip(self.tasks.items(), self.splits.values(), strict=True)
        }
        order = [self.seed, self.steps_per_block, self.window_shards]
        described = json.dumps(["plan/2", tasks, order], sort_keys=True)
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
                try:
                    example = split.read(position)
                except BadExampleError:  # told and replaced when its step comes
                    continue
                for item, prompt in ((example.query, task.query_prompt), (example.target, task.target_prompt)):
                    if isinstance(item, Item):
                        yield from (str(p.data) for p in with_prompt(item, prompt).parts if isinstance(p.data, str))


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Positions to the lengths of their query and target together, from the index alone."""

    split: Split
    processor: Processor

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        extents = self.split.extents(positions)
        return self.processor.num_tokens(extents["query"]) + self.processor.num_tokens(extents["target"])
