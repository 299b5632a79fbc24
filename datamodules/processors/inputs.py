"""What an encoder reads: token sequences end to end, and the media whose places they hold."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass
class Inputs:
    """Model inputs of N items, end to end: T tokens and no padding.

    Args:
        token_ids: (T,) int64; places for media are what the backbone's processor makes them.
        lengths: Tokens and places of each item (N,) int64; stays on the CPU, where the passes are planned.
        media: Name to the views of all items in order of appearance (V, ..); names and shapes are the processor's.
        num_views: Name to the views of each item (N,) int64, on the CPU.
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
            media[kind] = cat_padded([column.media[kind] for column in columns if kind in column.media])
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


def cat_padded(views: Sequence[Tensor]) -> Tensor:
    """Views one after another, with zeros behind the shorter ones: those of sounds may be of any length."""
    longest = [max(sizes) for sizes in zip(*(view.shape[1:] for view in views), strict=True)]
    if all(list(view.shape[1:]) == longest for view in views):
        return torch.cat(list(views))
    whole = views[0].new_zeros(sum(map(len, views)), *longest)
    for place, view in zip(np.cumsum([0, *map(len, views)]), views, strict=False):
        whole[(slice(place, place + len(view)), *map(slice, view.shape[1:]))] = view
    return whole


def _places(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the elements of some rows lie when rows of these lengths lie end to end."""
    starts, counts = (lengths.cumsum() - lengths)[rows], lengths[rows]
    return np.arange(counts.sum()) + np.repeat(starts - (counts.cumsum() - counts), counts)
