"""The ways in which batches are made of a task's shards: ours, webdataset's, and reading alone. Compared by `stream.py`."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from webdataset.compat import WebDataset

from datamodules.collate import Collate, with_prompt
from datamodules.decode import decode_example
from datamodules.loader import loader_of
from datamodules.processors.inputs import Inputs
from datamodules.processors.passes import passes_of
from datamodules.processors.processor import ProcessorConfig
from datamodules.record import from_record
from datamodules.sample import Example
from datamodules.stream import Source, StepStream
from datamodules.tar import TarReader
from datamodules.tasks import TaskSpec
from datamodules.training import TrainingData

PROCESSOR = ProcessorConfig(vocab_size=2048, max_text_tokens=256)  # as in conf/model/small.yaml
OURS, SAME_WORK, ON_LISTS = "ours", "webdataset, same processor", "webdataset, tokenizer on lists"
OURS_DECODED, SAME_DECODED = "ours, decoded only", "webdataset, decoded only"
Run = Callable[[], Iterator[float]]  # numbers of examples as they are delivered, without end


class Work:
    """A task's shards, and the ways in which batches are made of them."""

    def __init__(self, root: Path, spec: TaskSpec, processor: Path) -> None:
        self.spec, self.data = spec, TrainingData(str(root), {"task": spec}, init_from=str(processor))
        self.data.setup("fit")
        self.processor, self.split = self.data.processor, self.data.splits["task"]
        self.shards = sorted((root / spec.shards).glob("*.tar"))
        self.num_bytes = sum(shard.stat().st_size for shard in self.shards)

    def contestants(self, num_workers: int) -> dict[str, Run]:
        """Ours first, then what it is compared with."""

        def counted(make: Callable[..., Iterator[Any]], *arguments: Any) -> Run:
            return lambda: (self.spec.batch_size for _ in make(num_workers, *arguments))

        runs = {
            OURS: counted(self.ours),
            SAME_WORK: counted(self.webdataset, self.processed),
            OURS_DECODED: counted(self.ours, keys_of),
            SAME_DECODED: counted(self.webdataset, keys_of),
        }
        example = self.split.read(0)
        if example.query is not None and example.target is not None and example.query.is_text and example.target.is_text:
            runs[ON_LISTS] = counted(self.webdataset, self.tokenized_together)
            runs["webdataset, tokenizer one by one"] = counted(self.webdataset, self.tokenized_singly)
        if not num_workers:
            each = len(self.split) / len(self.shards)
            for read in (os_read, walk_headers, tar_reader):
                runs[f"raw, {read.__name__}"] = lambda read=read: (
                    read(shard) or each for shard in itertools.cycle(self.shards)
                )
        return runs

    def ours(self, num_workers: int, collate: Any = None) -> Iterator[Any]:
        """Batches as training gets them, or what `collate` makes of decoded examples."""
        collate = collate or Collate({"task": self.spec}, self.processor, self.data.prompt_dropout, seed=0)
        sources = {"task": Source(self.split, PROCESSOR.decode)}
        stream = StepStream(self.data.plan, sources, collate, first_step=0, num_steps=10**9, rank=0, world_size=1)
        return iter(loader_of(stream, num_workers))

    def webdataset(self, num_workers: int, collate: Callable[[list[Example]], Any]) -> Iterator[Any]:
        """What `collate` makes of decoded examples that webdataset read and shuffled."""
        urls = [str(shard) for shard in self.shards] * 10_000  # its argument `repeat` has no effect (webdataset 1.0.2)
        samples = WebDataset(urls, shardshuffle=False).shuffle(1000).map(decoded)
        return iter(loader_of(samples.batched(self.spec.batch_size, collation_fn=collate), num_workers))

    def processed(self, examples: Sequence[Example]) -> list[Inputs]:
        """Both sides through our processor."""
        return [self.processor([with_prompt(getattr(e, side), prompt) for e in examples]) for side, prompt in self._sides()]

    def tokenized_together(self, examples: Sequence[Example]) -> list[Any]:
        """Both sides through the tokenizer, a list of texts at a time."""
        setting: Any = {"padding": True, "truncation": True, "max_length": PROCESSOR.max_text_tokens, "return_tensors": "pt"}
        return [self.processor.tokenizer(texts, **setting) for texts in self._texts(examples)]

    def tokenized_singly(self, examples: Sequence[Example]) -> list[Any]:
        """Both sides through the tokenizer, text by text as a `map` does, then padded."""
        tokenizer, setting = self.processor.tokenizer, {"truncation": True, "max_length": PROCESSOR.max_text_tokens}
        rows = [[tokenizer(text, **setting)["input_ids"] for text in texts] for texts in self._texts(examples)]
        return [tokenizer.pad({"input_ids": side}, return_tensors="pt") for side in rows]

    def padding(self) -> dict[str, float]:
        """Share of what goes through the encoder that is padding, over 50 batches: in passes, and whole. Packs have none."""
        ours = itertools.islice(([batch.query, batch.target] for batch in self.ours(0)), 50)
        sides = [side.lengths.numpy() for sides in ours for side in sides]
        in_passes = [(lengths.sum(), sum(lengths[rows].max() * len(rows) for rows in passes_of(lengths))) for lengths in sides]
        whole = itertools.islice(self.webdataset(0, self.processed), 50)
        padded = [(side.lengths.sum(), side.lengths.max() * len(side)) for sides in whole for side in sides]
        return {
            name: 1 - float(sum(tokens for tokens, _ in counts) / sum(places for _, places in counts))
            for name, counts in (("in passes", in_passes), ("whole", padded))
        }

    def _texts(self, examples: Sequence[Example]) -> Iterator[list[str]]:
        for side, prompt in self._sides():
            yield [with_prompt(getattr(example, side), prompt).parts[0].content for example in examples]

    def _sides(self) -> tuple[tuple[str, str | None], ...]:
        return ("query", self.spec.query_prompt), ("target", self.spec.target_prompt)


def decoded(sample: dict[str, Any]) -> Example:
    files = {name: data for name, data in sample.items() if not name.startswith("__")}
    return decode_example(from_record(sample["__key__"], files), PROCESSOR.decode)


def keys_of(*arguments: Any, **_: Any) -> list[str]:
    """A batch that costs nothing to hand over; the examples come last."""
    return [example.key for example in arguments[-1]]


def os_read(shard: Path) -> None:
    """The file from end to end and nothing else: the ceiling."""
    descriptor = os.open(shard, os.O_RDONLY)
    while os.read(descriptor, 2**20):
        pass
    os.close(descriptor)


def walk_headers(shard: Path) -> None:
    """Member by member, nothing checked."""
    with shard.open("rb") as file:
        while (header := file.read(512)).strip(b"\x00"):
            size = int(header[124:135], 8)
            file.read(size + -size % 512)


def tar_reader(shard: Path) -> None:
    """The indexer's: every byte accounted for and hashed."""
    for _ in TarReader(shard):
        pass
