"""What comes twice: pairs within a split, and contents of one column in others; equal is what has the same content id."""

from collections.abc import Mapping

import numpy as np

from datamodules.curation.survey import Survey


def repeats(found: Survey) -> list[tuple[int, int]]:
    """Examples whose query and target both stood together before: their position and that of the first, ascending."""
    whole = found.present.all(1)
    ids, positions = found.ids[whole], found.positions[whole]
    order = np.lexsort(ids.T)  # stable: equal pairs stay in their order
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (ids[order][1:] != ids[order][:-1]).any(1)
    first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))]
    pairs = zip(positions[order[~is_first]].tolist(), positions[first[~is_first]].tolist(), strict=True)
    return sorted(pairs)


class Contents:
    """Which contents some columns hold, and where each lies first.

    Args:
        columns: A split's folder and a column's name to content ids (N,) and positions (N,) of the column's items.
    """

    def __init__(self, columns: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]) -> None:
        self._columns = list(columns)
        none = np.zeros(0, np.int64)
        ids = np.concatenate([none, *(ids for ids, _ in columns.values())])
        numbers = np.repeat(np.arange(len(columns)), [len(ids) for ids, _ in columns.values()])
        positions = np.concatenate([none, *(positions for _, positions in columns.values())])
        self.ids, first = np.unique(ids, return_index=True)
        self._numbers, self._positions = numbers[first].astype(np.int32), positions[first]

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Whether it holds each content (P,)."""
        if not len(self.ids):
            return np.zeros(len(ids), bool)
        return self.ids[np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)] == ids

    def place(self, content: int) -> tuple[str, int]:
        """Folder and position of the first example with a content that it holds."""
        row = int(np.searchsorted(self.ids, content))
        return self._columns[self._numbers[row]][0], int(self._positions[row])
