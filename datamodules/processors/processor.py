"""Items to inputs: what the processors of all backbones share. Stored with every encoder."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.media.limits import DecodeLimits
from datamodules.processors.inputs import Inputs, cat_padded
from datamodules.sample import MEDIA_KINDS, TEXT_KINDS, Item

BYTES_PER_TOKEN = 3.0  # our choice: only the order of lengths counts, and where the limit on text tokens cuts them


@dataclass(frozen=True)
class ProcessorConfig:
    """How items become inputs. Stored with every checkpoint.

    Args:
        tokenizer: Folder or hub name of a pretrained tokenizer; None trains one on the tasks' texts.
        native: Folder or hub name of a multimodal model, whose own processor then makes the inputs; see `NativeProcessor`.
        revision: Of the hub repository.
        vocab_size: Size of the tokenizer that is trained when none is named.
        max_text_tokens: Text tokens of an item.
        too_long: What becomes of longer ones: cut at the end and counted, or refused.
        view_size: Side in pixels of a view of an image, a page tile or a frame.
        page_grid: Rows and columns of tiles that a page is cut into.
        seconds_per_view: Seconds of sound in a view; the last one is padded with silence.
        num_mels: Height of a spectrogram view.
        num_frames: Width of a spectrogram view.
        tokens_per_view: Kind of media to the number of places of one view.
        decode: Limits of what a medium may hold, and how densely video is sampled.
    """

    tokenizer: str | None = None
    native: str | None = None
    revision: str | None = None
    vocab_size: int = 1024
    max_text_tokens: int = 512
    too_long: Literal["truncate", "refuse"] = "truncate"
    view_size: int = 64
    page_grid: tuple[int, int] = (2, 1)
    seconds_per_view: float = 1.0
    num_mels: int = 64
    num_frames: int = 64
    tokens_per_view: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEDIA_KINDS, 16))
    decode: DecodeLimits = field(default_factory=DecodeLimits)

    def __post_init__(self) -> None:
        if self.native is not None and self.tokenizer is not None:
            raise ValueError("give either processor.native, which has a tokenizer of its own, or processor.tokenizer, not both")
        if set(self.tokens_per_view) != set(MEDIA_KINDS) or min(self.tokens_per_view.values()) < 1:
            raise ValueError(
                f"tokens_per_view is {self.tokens_per_view}; it must give a number above 0 for each of {', '.join(MEDIA_KINDS)}"
            )


class Processor(ABC):
    """Items to `Inputs`.

    Args:
        config: Sizes and limits.
        tokenizer: A fast transformers tokenizer.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer, a {type(tokenizer).__name__}, has no fast form; name one with a tokenizer.json")
        self.config, self.tokenizer = config, tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.first_ids = [int(first)] if isinstance(first, int) else []
        self.last_ids = [int(last)] if isinstance(last, int) else []

    def text(self, ids: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of a text in the sequence, and its views by name, of which most backbones need none."""
        return ids, {}

    @abstractmethod
    def medium(self, kind: str, content: Any) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of a decoded medium in the sequence, and its views (V, ..) by name."""

    @abstractmethod
    def num_tokens(self, extents: np.ndarray) -> np.ndarray:
        """Lengths (P,) that items of some extents (P,) `EXTENT` will have as sequences, about."""

    def __call__(self, items: Sequence[Item]) -> Inputs:
        """Inputs of decoded items.

        Raises:
            ValueError: An item is too long and such are refused, a kind of media cannot be taken, or an item comes to no token
                at all (an empty text under a tokenizer without begin or end).
        """
        tokens = self.tokens([str(part.content) for item in items for part in item.parts if part.kind in TEXT_KINDS])
        media: dict[str, list[Tensor]] = defaultdict(list)
        rows, views, digests, truncated = zip(*(self._sequence(item, tokens, media) for item in items), strict=True)
        lengths = torch.tensor([len(ids) for ids in rows])
        if not lengths.all():
            raise ValueError("an item came to no token: its text is empty and the tokenizer adds no begin or end")
        return Inputs(
            torch.from_numpy(np.concatenate(rows)),
            lengths,
            {name: cat_padded(found) for name, found in media.items()},
            {name: torch.tensor([row[name] for row in views]) for name in media},
            torch.tensor(digests),
            sum(truncated),
        )

    def tokens(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids of each text, without begin and end, all encoded in one call."""
        backend = self._backend()
        backend.encode_special_tokens = True  # a text that spells one is text
        return iter([encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)])

    def _backend(self) -> Any:
        """The tokenizer itself, which pads and cuts nothing: transformers' layer above it takes a while of its own."""
        backend: Any = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return backend

    def _sequence(
        self, item: Item, tokens: Iterator[list[int]], media: dict[str, list[Tensor]]
    ) -> tuple[np.ndarray, Counter[str], int, bool]:
        """Token ids and places of one item, its views by name, a hash of both, and whether text was cut.

        Its texts come next in `tokens`; its views are appended to `media`.
        """
        ids, room, truncated, num_views = list(self.first_ids), self.config.max_text_tokens, False, Counter()
        digest = hashlib.blake2b(digest_size=8)
        for part in item.parts:
            assert part.content is not None, "decode items before processing them"
            if part.kind in TEXT_KINDS:
                text_ids = next(tokens)
                truncated |= len(text_ids) > room
                places, views = self.text(text_ids[:room])
                room -= min(room, len(text_ids))
            else:
                places, views = self.medium(part.kind, part.content)
            ids += places
            for name, tensor in views.items():
                media[name].append(tensor)
                digest.update(tensor.numpy().tobytes())
                num_views[name] += len(tensor)
        if truncated and self.config.too_long == "refuse":
            most = self.config.max_text_tokens
            raise ValueError(
                f"an item has more than {most} text tokens; raise data.processor.max_text_tokens, or set "
                "data.processor.too_long=truncate to cut such items at the end"
            )
        whole = np.array(ids + self.last_ids, np.int64)
        digest.update(whole.tobytes())
        return whole, num_views, int.from_bytes(digest.digest(), "little", signed=True), truncated

    def num_text_tokens(self, extents: np.ndarray) -> np.ndarray:
        """Text tokens (P,) of items of some extents, about."""
        return np.minimum(extents["text"] / BYTES_PER_TOKEN, self.config.max_text_tokens)

    def save(self, folder: Path) -> None:
        """Write `processor.json` and the tokenizer's files."""
        (folder / "processor.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1))
        self._backend()  # a padding that a call has left in it would become every modality's default when it is read again
        self.tokenizer.save_pretrained(folder)
