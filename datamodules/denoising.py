"""Texts of a task's examples to sequences for denoising: packed as in a text shard, corrupted, what an encoder-decoder takes.

The texts of a step's queries and targets, without prompts, lie end to end, each behind its title and closed by the tokenizer's
end; that is cut every `sequence_length` tokens, so no text is lost and none is padded. Each sequence meets one denoiser.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.order import generator
from datamodules.processors.inputs import Inputs
from datamodules.processors.processor import Processor
from datamodules.sample import TEXT_KINDS, Example, Item
from datamodules.tasks import TaskSpec
from datamodules.training import TrainingData
from datamodules.ul2 import UL2Config, corrupt

# Names of entries that tokenizers keep in reserve: Gemma's, T5's, Llama's.
RESERVED = re.compile(r"<unused\d+>|<extra_id_\d+>|<\|reserved_special_token_\d+\|>")


@dataclass
class DenoisingBatch:
    """One step's sequences of one task on one rank; N sequences, U tokens that the decoder writes.

    Args:
        task: Name of the task.
        step: The step it was made for.
        keys: Keys of the examples.
        encoder: What the encoder reads (N items).
        decoder: What the decoder reads (N items): what it is to write, moved one on, behind its start.
        target: What it is to write (U,) int64.
        denoiser: Place of each sequence's denoiser in the configuration (N,) int64.
        num_without_text: Queries and targets that have no text, and are not used.
        faults: Bad examples that others took the place of, see `datamodules.stream.Fault`.
    """

    task: str
    step: int
    keys: list[str]
    encoder: Inputs
    decoder: Inputs
    target: Tensor
    denoiser: Tensor
    num_without_text: int = 0
    faults: tuple[Any, ...] = ()

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("encoder", "decoder", "target", "denoiser")}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Denoise:
    """Makes batches; see the head of this file.

    Args:
        processor: Its tokenizer is used.
        ul2: How sequences are made and corrupted.
        sentinels: Token ids that stand for spans.
        start: Token that the decoder reads first.
        seed: Of the corruption.
    """

    processor: Processor
    ul2: UL2Config
    sentinels: Sequence[int]
    start: int
    seed: int

    def __call__(
        self, task: str, step: int, examples: Sequence[Example], *, rows: np.ndarray, faults: tuple[Any, ...] = ()
    ) -> DenoisingBatch:
        """The batch of a step; arguments as in `datamodules.collate.Collate`.

        Raises:
            ValueError: There is no text, or a text comes to a sentinel.
        """
        items = [item for example in examples for item in (example.query, example.target) if item is not None]
        texts = [text for text in map(text_of, items) if text is not None]
        if not texts:
            raise ValueError(f"task {task!r} has no text to denoise in {len(items)} items; set its rate to 0")
        processor, length = self.processor, self.ul2.sequence_length
        token_ids = np.concatenate([np.array([*ids, *processor.last_ids], np.int64) for ids in processor.tokens(texts)])
        sequences = [token_ids[begin : begin + length] for begin in range(0, len(token_ids), length)]
        random = generator(self.seed, "denoising", step, int(rows[0]))
        denoisers = list(self.ul2.denoisers.values())
        chosen = random.choice(len(denoisers), len(sequences), p=self.ul2.shares)
        sides = [corrupt(ids, denoisers[n], self.sentinels, random) for ids, n in zip(sequences, chosen, strict=True)]
        written = [np.append(side.decoder_ids, processor.last_ids).astype(np.int64) for side in sides]
        return DenoisingBatch(
            task,
            step,
            [example.key for example in examples],
            encoder=_inputs([np.append(processor.first_ids, side.encoder_ids) for side in sides]),
            decoder=_inputs([np.append(self.start, ids[:-1]) for ids in written]),
            target=torch.from_numpy(np.concatenate(written)),
            denoiser=torch.from_numpy(chosen),
            num_without_text=len(items) - len(texts),
            faults=faults,
        )


class DenoisingData(TrainingData):
    """Streams the texts of tasks as sequences to be denoised, in an order that follows from (seed, step) alone.

    Prompts and hard negatives are not used.

    Args:
        root: Folder that the tasks' shards lie in.
        tasks: Name to task.
        ul2: How sequences are made and corrupted.
        arguments: See `TrainingData`.
    """

    def __init__(
        self,
        root: str,
        tasks: dict[str, TaskSpec],
        *,
        ul2: UL2Config = UL2Config(),  # noqa: B008 (frozen)
        **arguments: Any,
    ) -> None:
        super().__init__(root, tasks, **arguments)
        self.ul2 = ul2

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.sentinels, self.start = sentinels_of(self.processor.tokenizer, self.ul2), start_of(self.processor)

    def collate(self) -> Any:
        return Denoise(self.processor, self.ul2, self.sentinels, self.start, self.seed)

    def _plan_digest(self) -> str:
        described = json.dumps([super()._plan_digest(), dataclasses.asdict(self.ul2)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()


def text_of(item: Item) -> str | None:
    """The text of an item behind its title, None where it holds none."""
    texts = [str(part.data) for part in item.parts if part.kind in TEXT_KINDS]
    return "\n".join([item.title, *texts] if item.title else texts) if texts else None


def sentinels_of(tokenizer: PreTrainedTokenizerBase, ul2: UL2Config) -> Sequence[int]:
    """Token ids of as many sentinels as a sequence may need.

    Raises:
        ValueError: The tokenizer keeps some entries in reserve, but too few.
    """
    number = ul2.num_sentinels
    if ul2.first_sentinel is not None:
        return range(ul2.first_sentinel, ul2.first_sentinel + number)
    reserved = sorted(token_id for token, token_id in tokenizer.get_vocab().items() if RESERVED.fullmatch(token))
    if 0 < len(reserved) < number:
        raise ValueError(
            f"the tokenizer keeps {len(reserved)} entries in reserve, sequences of {ul2.sequence_length} tokens need {number} "
            f"sentinels; set data.ul2.first_sentinel to {len(tokenizer)}, or shorten data.ul2.sequence_length"
        )
    return reserved[:number] or range(len(tokenizer), len(tokenizer) + number)


def start_of(processor: Processor) -> int:
    """The token that a decoder reads first: the tokenizer's begin, else its padding, as in T5.

    Raises:
        ValueError: It has neither.
    """
    padding = processor.tokenizer.pad_token_id
    if not processor.first_ids and not isinstance(padding, int):
        raise ValueError("the tokenizer has neither a begin nor a padding token, one of which a decoder starts from; add one")
    return processor.first_ids[0] if processor.first_ids else int(padding)  # pyright: ignore[reportArgumentType]


def _inputs(rows: list[np.ndarray]) -> Inputs:
    return Inputs(torch.from_numpy(np.concatenate(rows).astype(np.int64)), torch.tensor([len(row) for row in rows]))
