"""The nearest of stored embeddings to a query: all compared, or a shortlist by fewer dimensions, by signs or by an index.

Whatever made the shortlist, its candidates are compared again in the width that is asked for, so that cosines are true ones.
Source of the shortlist by a prefix: Matryoshka representations, arXiv 2205.13147, section 4.3 (adaptive retrieval).

Letters: Q queries, N vectors, D width of a query, k neighbours, C candidates.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules.sample import Item, Part
from datamodules.tasks import apply_prompt
from kernels.contrastive import check_prefixes
from lightning_modules.embeddings import Embeddings
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance
from lightning_modules.encoder.embedder import cut, device_named, probe
from lightning_modules.encoder.prepacked import prepack
from lightning_modules.neighbours import Index, IndexSettings, Kind, Neighbours, built_once, compared, exact, require_faiss
from lightning_modules.vectors import Chunk

# Our choice.
HELD_BYTES = 2**30  # of vectors that stay in memory; a larger store is read anew for each search that compares all
CHUNK = 8192  # vectors that are compared at a time
QUERIES_AT_ONCE = 64  # whose candidates are compared again together


class Searcher:
    """Searches stored embeddings.

    Args:
        embeddings: What is searched.
        index: `exact` compares all; `hnsw`, `ivfpq` and `ivfsq8` are FAISS's, which find most; `binary` compares the signs of
            all by Hamming distance. An index lies beside the vectors, where the first search builds it.
        shortlist: Dimensions that candidates are chosen by; None for all that are stored.
        settings: `oversampling` is for any shortlist, the rest for an index.

    Raises:
        ValueError: The shortlist is no width, FAISS is missing for an index, or the index does not fit.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        *,
        index: Kind = "exact",
        shortlist: int | None = None,
        settings: IndexSettings = IndexSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.embeddings, self.settings, self.kind = embeddings, settings, index
        self.first = embeddings.width if shortlist is None else shortlist
        check_prefixes((self.first,), embeddings.width)
        self.modalities = np.array(embeddings.modalities)
        self._held: dict[int, np.ndarray] = {}
        self._index = None if index == "exact" else self._built(index)

    def search(
        self, query_QD: Tensor | np.ndarray, k: int, *, prefix: int | None = None, modality: str | None = None
    ) -> Neighbours:
        """The k nearest rows, or all where there are fewer; of equal ones the lower row.

        Where an index finds fewer than there are (a rare modality, say), all are compared for that query.

        Args:
            query_QD: Of any length, at least as wide as the prefix.
            k: How many.
            prefix: Width of the comparison; None for all that is stored.
            modality: Of the rows; None for all.

        Raises:
            ValueError: k is below 1, the prefix is narrower than what the shortlist is made by, or wider than a vector, or
                nothing is of the modality.
        """
        width = self.embeddings.width if prefix is None else prefix
        check_prefixes((width,), self.embeddings.width)
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        if width < self.first and (self._index is not None or self.first < self.embeddings.width):
            raise ValueError(
                f"the prefix is {width}, but candidates are chosen by {self.first} dimensions; give shortlist={width}"
            )
        wanted = None if modality is None else self._of(modality)
        query_QD = torch.as_tensor(query_QD, dtype=torch.float32)
        found = [self._nearest(part_QD, k, width, wanted) for part_QD in query_QD.split(QUERIES_AT_ONCE)]
        return Neighbours(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _nearest(self, query_QD: Tensor, k: int, width: int, wanted: np.ndarray | None) -> Neighbours:
        unit_QD = cut(query_QD, width)
        num = len(self.embeddings) if wanted is None else int(wanted.sum())
        num_candidates = min(k * self.settings.oversampling, num)
        by_signs = self.kind == "binary" and wanted is not None  # FAISS selects nothing there
        if (self._index is None and self.first >= width) or num_candidates == num or by_signs:
            return exact(unit_QD, self._chunks(width, wanted), k)
        short_QD = cut(query_QD, self.first)
        if self._index is None:
            position_QC = np.sort(exact(short_QD, self._chunks(self.first, wanted), num_candidates).positions, axis=1)
        else:
            position_QC = self._index.candidates(short_QD, num_candidates, wanted)
        found = compared(unit_QD, position_QC, min(k, num), lambda rows: self._rows(rows, width))
        if (lacking_Q := found.positions[:, -1] < 0).any():
            for column, whole in zip(
                found, exact(unit_QD[torch.from_numpy(lacking_Q)], self._chunks(width, wanted), k), strict=True
            ):
                column[lacking_Q] = whole
        return found

    def _of(self, modality: str) -> np.ndarray:
        """Which rows (N,) are of a modality."""
        wanted = self.modalities == modality
        if not wanted.any():
            raise ValueError(f"nothing here is of modality {modality!r}; there are: {', '.join(sorted(set(self.modalities)))}")
        return wanted

    def _built(self, kind: Kind) -> Index:
        require_faiss()
        self.settings.check(kind, self.first)
        name = f"{kind}.faiss" if self.first == self.embeddings.width else f"{kind}-{self.first}.faiss"
        return built_once(
            self.embeddings.folder / name,
            kind,
            lambda: self._chunks(self.first),
            np.arange(len(self.embeddings)),
            self.first,
            self.settings,
            made_by=[self.embeddings.about, self.first],
        )

    def _chunks(self, width: int, wanted: np.ndarray | None = None) -> Iterator[Chunk]:
        rows = np.arange(len(self.embeddings)) if wanted is None else np.flatnonzero(wanted)
        for first in range(0, len(rows), CHUNK):
            own = rows[first : first + CHUNK]
            yield Chunk(own, self._rows(own, width))

    def _rows(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Unit vectors (C, width), from memory where they are held."""
        if (held := self._in_memory(width)) is None:
            return self.embeddings.vectors(rows, width)
        is_run = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        return held[rows[0] : rows[-1] + 1] if is_run else held[rows]

    def _in_memory(self, width: int) -> np.ndarray | None:
        """All vectors (N, width), where they and those held before take no more than `HELD_BYTES`."""
        if width not in self._held:
            num_bytes = 4 * len(self.embeddings) * (width + sum(self._held))
            if num_bytes > HELD_BYTES:
                return None
            self._held[width] = self.embeddings.vectors(None, width)
        return self._held[width]


class QueryEncoder:
    """Makes a query's vector by the encoder that made the stored ones.

    Args:
        embeddings: What will be searched.
        checkpoint: The encoder's folder; None for where it lay when they were made.
        task: Of the prompt around queries of text alone; None for none.
        device: `cpu`, `cuda`, or `auto`.

    Raises:
        ValueError: No encoder lies there, or another one.
    """

    def __init__(
        self, embeddings: Embeddings, checkpoint: str | None, *, task: str | None = "search result", device: str = "auto"
    ) -> None:
        made_by = embeddings.about["encoder"]
        checkpoint = checkpoint or str(made_by["path"])
        if (found := read_provenance(checkpoint)["sha256"]) != made_by["sha256"]:
            raise ValueError(
                f"{embeddings.folder} was made by another encoder ({made_by['path']}, SHA-256 {made_by['sha256'][:12]}..) than "
                f"{checkpoint} ({found[:12]}..): their vectors do not lie in one space; give checkpoint=<that one>"
            )
        self.encoder, self.processor = load_encoder(checkpoint)
        probe(self.encoder)
        self.encoder = self.encoder.to(device_named(device)).eval()
        prepack(self.encoder)
        self.prompt = None if task is None else f"task: {task} | query: {{text}}"
        self.limits = self.processor.config.decode

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Vectors (Q, D) of decoded items.

        Raises:
            ValueError: The encoder does not take their kind of media.
        """
        prompted = [self._prompted(item) for item in items]
        return self.encoder(self.processor(prompted).to(self.encoder.device)).float().cpu()

    def _prompted(self, item: Item) -> Item:
        if not item.is_text or self.prompt is None:
            return item
        texts = (apply_prompt(self.prompt, str(part.data)) for part in item.parts)
        return Item(tuple(Part(part.kind, text, "", text) for part, text in zip(item.parts, texts, strict=True)))
