"""Items to the inputs of a composed backbone: one interleaved sequence of tokens and places for media.

A text part becomes its token ids. A medium becomes views of one size (an image one, a page a grid of tiles, a video one a
frame, audio one a second), and in the sequence: BEGIN, `tokens_per_view` × SOFT for each view, END. These places are negative
ids, so that any tokenizer serves unchanged; the backbone fills them with learnt boundaries and the tower's tokens, in order.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.audio_utils import mel_filter_bank

from datamodules.media.audio import SAMPLE_RATE
from datamodules.media.limits import DecodeLimits
from datamodules.record import read_json
from datamodules.sample import MEDIA_KINDS, TEXT_KINDS, Item

BEGIN, SOFT, END = range(3)
BYTES_PER_TOKEN = 3.0  # our choice: only the order of lengths counts, and where the limit on text tokens cuts them


def place_id(kind: str, role: int) -> int:
    """The negative id of a medium's BEGIN, SOFT or END."""
    return -1 - (3 * MEDIA_KINDS.index(kind) + role)


@dataclass
class Inputs:
    """Model inputs of N items, end to end: T tokens and no padding.

    Args:
        token_ids: (T,) int64; negative ids are places for media, see `place_id`.
        lengths: Tokens and places of each item (N,) int64; stays on the CPU, where the passes are planned.
        media: Kind to its views in order of appearance: uint8 (V, 3, H, W), for audio float32 (V, 1, mels, frames).
        num_views: Kind to the views of each item (N,) int64, on the CPU.
        digests: 64 bits of a hash of each item's tokens and views (N,) int64, on the CPU; None where nobody made them.
        num_truncated: Items whose text was cut to the limit.
    """

    token_ids: Tensor
    lengths: Tensor
    media: dict[str, Tensor] = field(default_factory=dict)
    num_views: dict[str, Tensor] = field(default_factory=dict)
    digests: Tensor | None = None
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def join(cls, columns: Sequence["Inputs"]) -> "Inputs":
        """The items of several inputs one after another."""
        media, num_views = {}, {}
        for kind in {kind: None for column in columns for kind in column.media}:
            media[kind] = torch.cat([column.media[kind] for column in columns if kind in column.media])
            none = [torch.zeros(len(column), dtype=torch.int64) for column in columns]
            num_views[kind] = torch.cat([c.num_views.get(kind, zeros) for c, zeros in zip(columns, none, strict=True)])
        digests = [column.digests for column in columns if column.digests is not None]
        return cls(
            torch.cat([column.token_ids for column in columns]),
            torch.cat([column.lengths for column in columns]),
            media,
            num_views,
            torch.cat(digests) if len(digests) == len(columns) else None,
            sum(column.num_truncated for column in columns),
        )

    def distinct(self) -> tuple["Inputs", np.ndarray]:
        """Each item once, in the order of their first appearance, and which of them each item is (N,)."""
        if self.digests is None:
            return self, np.arange(len(self))
        _, first, which = np.unique(self.digests.numpy(), return_index=True, return_inverse=True)
        order = first.argsort()
        return (self if len(first) == len(self) else self.rows(first[order])), order.argsort()[which]

    def rows(self, rows: np.ndarray) -> "Inputs":
        """The items of some rows, in that order."""
        media = {}
        for kind, views in self.media.items():
            places = _places(self.num_views[kind].numpy(), rows)
            if len(places):
                media[kind] = views[torch.from_numpy(places).to(views.device)]
        return Inputs(
            self.token_ids[torch.from_numpy(_places(self.lengths.numpy(), rows)).to(self.token_ids.device)],
            self.lengths[rows],
            media,
            {kind: self.num_views[kind][rows] for kind in media},
            None if self.digests is None else self.digests[rows],
        )

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Padded on the right to the longest, L: token ids (N, L), mask (N, L) int64, where each token lies in N · L (T,)."""
        lengths = self.lengths.numpy()
        mask = np.arange(lengths.max()) < lengths[:, None]
        places = torch.from_numpy(np.flatnonzero(mask)).to(self.token_ids.device)
        token_ids = self.token_ids.new_zeros(mask.size).index_copy(0, places, self.token_ids)
        return token_ids.view(mask.shape), torch.from_numpy(mask.astype(np.int64)).to(self.token_ids.device), places

    def to(self, device: torch.device | str) -> Self:
        """The inputs with what the encoder reads on a device."""
        return dataclasses.replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            media={kind: views.to(device, non_blocking=True) for kind, views in self.media.items()},
        )

    def pin_memory(self) -> Self:
        """The inputs in memory from which copies to a GPU need not be waited for."""
        return dataclasses.replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            media={kind: views.pin_memory() for kind, views in self.media.items()},
        )


def _places(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the elements of some rows lie when rows of these lengths lie end to end."""
    starts, counts = (lengths.cumsum() - lengths)[rows], lengths[rows]
    return np.arange(counts.sum()) + np.repeat(starts - (counts.cumsum() - counts), counts)


@dataclass(frozen=True)
class ProcessorConfig:
    """How items become inputs. Stored with every checkpoint.

    Args:
        tokenizer: Folder or hub name of a pretrained tokenizer; None trains one on the tasks' texts.
        vocab_size: Size of the tokenizer that is trained when none is named.
        max_text_tokens: Text tokens of an item; longer ones are cut at the end and counted.
        view_size: Side in pixels of a view of an image, a page tile or a frame.
        page_grid: Rows and columns of tiles that a page is cut into.
        seconds_per_view: Seconds of sound in a view; the last one is padded with silence.
        num_mels: Height of a spectrogram view.
        num_frames: Width of a spectrogram view.
        tokens_per_view: Kind of media to the number of places of one view.
        decode: Limits of what a medium may hold, and how densely video is sampled.
    """

    tokenizer: str | None = None
    vocab_size: int = 1024
    max_text_tokens: int = 512
    view_size: int = 64
    page_grid: tuple[int, int] = (2, 1)
    seconds_per_view: float = 1.0
    num_mels: int = 64
    num_frames: int = 64
    tokens_per_view: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEDIA_KINDS, 16))
    decode: DecodeLimits = field(default_factory=DecodeLimits)

    def __post_init__(self) -> None:
        if set(self.tokens_per_view) != set(MEDIA_KINDS) or min(self.tokens_per_view.values()) < 1:
            raise ValueError(
                f"tokens_per_view is {self.tokens_per_view}; it must give a number above 0 for each of {', '.join(MEDIA_KINDS)}"
            )


class ComposedProcessor:
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
        self.mel_filters = torch.tensor(
            mel_filter_bank(
                num_frequency_bins=257,
                num_mel_filters=config.num_mels,
                min_frequency=20.0,
                max_frequency=SAMPLE_RATE / 2,
                sampling_rate=SAMPLE_RATE,
                mel_scale="slaney",
                norm=None,
            ),
            dtype=torch.float32,
        )
        self.window = torch.hann_window(512)

    def __call__(self, items: Sequence[Item]) -> Inputs:
        """Inputs of decoded items.

        Raises:
            ValueError: An item comes to no token at all (an empty text under a tokenizer without begin or end).
        """
        tokens = self._tokens([str(part.content) for item in items for part in item.parts if part.kind in TEXT_KINDS])
        media = {kind: [] for kind in MEDIA_KINDS}
        rows, views, digests, truncated = zip(*(self._sequence(item, tokens, media) for item in items), strict=True)
        lengths = torch.tensor([len(ids) for ids in rows])
        if not lengths.all():
            raise ValueError("an item came to no token: its text is empty and the tokenizer adds no begin or end")
        return Inputs(
            torch.from_numpy(np.concatenate(rows)),
            lengths,
            {kind: torch.cat(found) for kind, found in media.items() if found},
            {kind: torch.tensor([row[kind] for row in views]) for kind, found in media.items() if found},
            torch.tensor(digests),
            sum(truncated),
        )

    def _tokens(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids of each text, without begin and end, all encoded in one call."""
        backend: Any = self.tokenizer.backend_tokenizer  # asked directly: transformers' layer above it takes a while of its own
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # a text that spells one is text
        return iter([encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)])

    def _sequence(
        self, item: Item, tokens: Iterator[list[int]], media: dict[str, list[Tensor]]
    ) -> tuple[np.ndarray, Counter[str], int, bool]:
        """Token ids and places of one item, its views by kind, a hash of both, and whether text was cut.

        Its texts come next in `tokens`; its views are appended to `media`.
        """
        ids, room, truncated, num_views = list(self.first_ids), self.config.max_text_tokens, False, Counter()
        digest = hashlib.blake2b(digest_size=8)
        for part in item.parts:
            assert part.content is not None, "decode items before processing them"
            if part.kind in TEXT_KINDS:
                text_ids = next(tokens)
                truncated |= len(text_ids) > room
                ids += text_ids[:room]
                room -= min(room, len(text_ids))
            else:
                views = self.views(part.kind, part.content)
                media[part.kind].append(views)
                digest.update(views.numpy().tobytes())
                num_views[part.kind] += len(views)
                soft = [place_id(part.kind, SOFT)] * (len(views) * self.config.tokens_per_view[part.kind])
                ids += [place_id(part.kind, BEGIN), *soft, place_id(part.kind, END)]
        whole = np.array(ids + self.last_ids, np.int64)
        digest.update(whole.tobytes())
        return whole, num_views, int.from_bytes(digest.digest(), "little", signed=True), truncated

    def views(self, kind: str, content: Any) -> Tensor:
        """The views of one decoded medium: uint8 (V, 3, size, size), for audio float32 (V, 1, mels, frames)."""
        size = self.config.view_size
        if kind == "audio":
            return self._spectrograms(torch.from_numpy(content))
        if kind == "page":
            rows, columns = self.config.page_grid
            pages = [_resize(page, columns * size, rows * size) for page in content]
            tiled = np.stack(pages).reshape(len(pages), rows, size, columns, size, 3).swapaxes(2, 3)
            pictures = tiled.reshape(-1, size, size, 3)
        else:
            pictures = np.stack([_resize(picture, size, size) for picture in ([content] if kind == "image" else content)])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def _spectrograms(self, wave: Tensor) -> Tensor:
        """Log-mel spectrograms of successive spans: (log10 of the power + 2) / 4, so -1 in silence and about 1.5 at most."""
        config = self.config
        span = round(config.seconds_per_view * SAMPLE_RATE)
        num_views = -(-len(wave) // span)
        wave = torch.nn.functional.pad(wave, (0, num_views * span - len(wave)))
        hop = span // config.num_frames
        spectrum = torch.stft(
            wave.view(num_views, span),
            n_fft=512,
            hop_length=hop,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.abs().square()[:, :, : config.num_frames]
        mel = torch.einsum("fm,vft->vmt", self.mel_filters, power)
        return ((mel.clamp(min=1e-6).log10() + 2.0) / 4.0)[:, None]

    def num_tokens(self, extents: np.ndarray) -> np.ndarray:
        """Lengths (P,) that items of some extents (P,) `EXTENT` will have as sequences, about."""
        config = self.config
        text = np.minimum(extents["text"] / BYTES_PER_TOKEN, config.max_text_tokens)
        pictures = extents["pictures"] * config.tokens_per_view["image"]
        audio = np.ceil(extents["audio"] / config.seconds_per_view) * config.tokens_per_view["audio"]
        frames = np.minimum(np.ceil(extents["video"] * config.decode.frames_per_second), config.decode.max_frames)
        return text + pictures + audio + frames * config.tokens_per_view["video"]

    def save(self, folder: Path) -> None:
        """Write `processor.json` and the tokenizer's files."""
        (folder / "processor.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1))
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The processor that `save` wrote.

        Raises:
            ValueError: None lies there, or it is damaged.
        """
        try:
            values = read_json(folder / "processor.json")
            values["decode"] = DecodeLimits(**values["decode"])
            values["page_grid"] = tuple(values["page_grid"])
            config = ProcessorConfig(**values)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            return cls(config, tokenizer)
        except Exception as error:  # the tokenizer's libraries raise types of their own
            raise ValueError(f"the processor in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))
