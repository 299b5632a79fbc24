"""The nearest of many unit vectors: by comparing all, or by a FAISS index whose finds are compared again with what is stored.

Letters: Q queries, N vectors of a chunk, D width, k neighbours, C candidates of an index, of which some may be −1: none.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.files import replace_file, sha256_of
from datamodules.job import digest_of, locked
from datamodules.record import read_json
from lightning_modules.vectors import Chunk

Kind = Literal["exact", "binary", "ivfpq", "ivfsq8", "hnsw"]
QUERIES_AT_ONCE = 64  # whose candidates are compared again together: memory
TRAINING_PER_LIST = 39  # FAISS holds fewer vectors of a centroid for too few to train it
PQ_CENTROIDS = 256


class Neighbours(NamedTuple):
    """The nearest first: positions (Q, k) int64 and cosines (Q, k) float32; −1 and −∞ where an index found no more."""

    positions: np.ndarray
    cosines: np.ndarray


@dataclass(frozen=True)
class IndexSettings:
    """How an index is built and searched; nothing of it matters to exact search.

    Args:
        oversampling: Candidates for each neighbour that is wanted, all of which are compared again with the stored vectors.
        num_training: Most vectors that it is trained on, taken at equal distances.
        num_lists: Of the inverted file; None for 4√N (FAISS's guidelines), fewer where these could not be trained.
        num_probes: Lists that a search goes through.
        code_bytes: Of a vector's product quantisation; a divisor of the width (ivfpq).
        num_links: Of a vector in the graph (hnsw).
        build_effort, search_effort: Candidates held while the graph is built and searched, efConstruction and efSearch (hnsw).
    """

    oversampling: int = 10
    num_training: int = 65_536
    num_lists: int | None = None
    num_probes: int = 32
    code_bytes: int = 32
    num_links: int = 32
    build_effort: int = 80
    search_effort: int = 128

    def __post_init__(self) -> None:
        if wrong := [name for name, value in vars(self).items() if value is not None and value < 1]:
            raise ValueError(f"{wrong[0]} of the index is {getattr(self, wrong[0])}; it must be at least 1")

    def check(self, kind: Kind, width: int) -> None:
        """Raises ValueError where vectors of a width cannot be quantised so."""
        if kind == "ivfpq" and width % self.code_bytes:
            raise ValueError(f"code_bytes of the index is {self.code_bytes}, no divisor of the vectors' width {width}")


@torch.inference_mode()
def exact(query_QD: Tensor, chunks: Iterable[Chunk], k: int, device: str | torch.device = "cpu") -> Neighbours:
    """The k vectors of the highest cosine with each query; of equal ones that of the lower position.

    Products are in fp32, in an order that is the same for chunks of the same sizes.

    Args:
        query_QD: Unit vectors.
        chunks: All vectors to choose from, the positions ascending; one chunk is in memory at a time.
        k: How many; where there are fewer vectors, all.
        device: Where they are compared.
    """
    assert k >= 1
    query_QD = query_QD.to(device, torch.float32)
    best_QK = torch.empty(len(query_QD), 0, device=device)
    position_QK = torch.empty(len(query_QD), 0, dtype=torch.int64, device=device)
    for chunk in chunks:
        cosine_QN = query_QD @ torch.from_numpy(np.require(chunk.vectors, np.float32, "W")).to(device).T
        if best_QK.shape[1] == k and not (cosine_QN > best_QK[:, -1:]).any():
            continue
        position_QN = torch.from_numpy(np.array(chunk.positions, np.int64)).to(device).expand_as(cosine_QN)
        merged_QM = torch.cat([best_QK, cosine_QN], 1)  # of equal ones, those met before stand before
        column_QK = highest(merged_QM, k)
        best_QK = merged_QM.gather(1, column_QK)
        position_QK = torch.cat([position_QK, position_QN], 1).gather(1, column_QK)
    return Neighbours(position_QK.cpu().numpy(), best_QK.cpu().numpy())


def highest(score_QM: Tensor, k: int) -> Tensor:
    """Columns of the k highest scores of each row, the highest first, equal ones from left to right (Q, k)."""
    k = min(k, score_QM.shape[1])
    score_QK, column_QK = score_QM.topk(k)  # which of equal ones it takes is open
    is_crowded_Q = (score_QM >= score_QK[:, -1:]).sum(1) > k
    if is_crowded_Q.any():
        column_QK[is_crowded_Q] = score_QM[is_crowded_Q].sort(dim=1, descending=True, stable=True).indices[:, :k]
    column_QK = column_QK.sort(dim=1).values
    order_QK = score_QM.gather(1, column_QK).sort(dim=1, descending=True, stable=True).indices
    return column_QK.gather(1, order_QK)


class Index:
    """A FAISS index over vectors, and where each stands.

    Args:
        index: What FAISS made.
        positions: Of its vectors, in the order in which they were added.
        settings: How it is searched.
    """

    def __init__(self, index: Any, positions: np.ndarray, settings: IndexSettings) -> None:
        assert index.ntotal == len(positions)
        faiss = require_faiss()
        self.index, self.positions, self.settings = index, positions, settings
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = settings.search_effort
        elif not isinstance(index, faiss.IndexLSH):
            faiss.extract_index_ivf(index).nprobe = settings.num_probes

    @classmethod
    def build(
        cls, kind: Kind, chunks: Callable[[], Iterable[Chunk]], positions: np.ndarray, width: int, settings: IndexSettings
    ) -> "Index":
        """An index over all vectors. A graph (hnsw) that is built by several threads is another one each time.

        Args:
            kind: Which; not `exact`.
            chunks: All vectors, each time it is called; one chunk is in memory at a time.
            positions: Theirs.
            width: D.
            settings: How it is built.

        Raises:
            ValueError: FAISS is missing, or the vectors are too few, or of another width than can be quantised so.
        """
        faiss = require_faiss()
        every = -(-len(positions) // settings.num_training)
        num_training = -(-len(positions) // every)
        lists = min(settings.num_lists or round(4 * len(positions) ** 0.5), max(1, num_training // TRAINING_PER_LIST))
        described = {"ivfpq": f"IVF{lists},PQ{settings.code_bytes}", "ivfsq8": f"IVF{lists},SQ8"}
        settings.check(kind, width)
        if kind == "ivfpq" and num_training < PQ_CENTROIDS:
            raise ValueError(f"{num_training} vectors are too few to train index=ivfpq, it needs {PQ_CENTROIDS}; take exact")
        if kind == "binary":  # signs without a rotation, by Hamming distance
            index = faiss.IndexLSH(width, width, False, False)
        else:
            index = faiss.index_factory(width, described.get(kind, f"HNSW{settings.num_links}"), faiss.METRIC_INNER_PRODUCT)
        if kind == "hnsw":
            index.hnsw.efConstruction = settings.build_effort
        elif kind != "binary":
            if kind == "ivfpq":  # an annealing for searches by Hamming distance, which are not made: most of the training time
                index.do_polysemous_training = False
            index.train(_sample(chunks(), every))
        for chunk in chunks():
            if len(chunk.positions):
                index.add(np.ascontiguousarray(chunk.vectors, np.float32))
        return cls(index, positions, settings)

    def search(self, query_QD: Tensor, k: int, rows: Callable[[np.ndarray], np.ndarray]) -> Neighbours:
        """The k nearest of k · oversampling candidates, compared in fp32; of equal ones that of the lower position.

        Args:
            query_QD: Unit vectors.
            k: How many; where there are fewer vectors, all.
            rows: The stored vectors (C, D) at positions (C,).
        """
        num_candidates = min(k * self.settings.oversampling, len(self.positions))
        found = [
            compared(part_QD, self.candidates(part_QD, num_candidates), min(k, num_candidates), rows)
            for part_QD in query_QD.cpu().split(QUERIES_AT_ONCE)
        ]
        return Neighbours(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def candidates(self, query_QD: Tensor, num: int, wanted: np.ndarray | None = None) -> np.ndarray:
        """Positions (Q, num) of what it holds for the nearest, ascending.

        Args:
            query_QD: Unit vectors.
            num: How many.
            wanted: Which of its vectors, in the order in which they were added, may be candidates (bool); None means all.
        """
        faiss = require_faiss()  # with torch's threads of now
        given = {} if wanted is None else {"params": self._only(faiss, wanted)}
        _, labels_QC = self.index.search(query_QD.cpu().float().contiguous().numpy(), num, **given)
        return np.sort(np.where(labels_QC >= 0, self.positions[labels_QC], -1), axis=1)

    def _only(self, faiss: Any, wanted: np.ndarray) -> Any:
        """How it is searched where some of its vectors do not count."""
        assert not isinstance(self.index, faiss.IndexLSH), "FAISS selects nothing there"
        selector = faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))
        if isinstance(self.index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self.settings.search_effort)
        return faiss.SearchParametersIVF(sel=selector, nprobe=self.settings.num_probes)

    def save(self, file: Path, made_for: str) -> None:
        """Write it, and then what it was made for.

        Raises:
            OSError: The disk is full or the place is not writable.
        """
        beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            require_faiss().write_index(self.index, str(beside))
            replace_file(_described(file), json.dumps({"made_for": made_for, "sha256": sha256_of(beside)}))
            os.replace(beside, file)
        except RuntimeError as error:
            raise OSError(f"could not write {file}: {str(error).splitlines()[-1]}; is the disk full?") from error
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path, made_for: str, positions: np.ndarray, settings: IndexSettings) -> "Index | None":
        """The index in a file; None where there is none, or one for something else, or it is not as it was written."""
        if not file.is_file() or not _described(file).is_file():
            return None
        if read_json(_described(file)) != {"made_for": made_for, "sha256": sha256_of(file)}:
            return None
        return cls(require_faiss().read_index(str(file)), positions, settings)


def compared(query_QD: Tensor, position_QC: np.ndarray, k: int, rows: Callable[[np.ndarray], np.ndarray]) -> Neighbours:
    """The k nearest of each query's candidates, compared in fp32; of equal ones that of the lower position.

    Args:
        query_QD: Unit vectors.
        position_QC: Of the candidates, ascending.
        k: How many; −1 and −∞ where there are fewer candidates.
        rows: The stored vectors (C, D) at positions (C,).
    """
    positions, row_QC = np.unique(position_QC, return_inverse=True)
    vectors = torch.from_numpy(rows(np.maximum(positions, 0)))[torch.from_numpy(row_QC.reshape(position_QC.shape))]
    cosine_QC = torch.einsum("qd,qcd->qc", query_QD.float(), vectors)
    cosine_QC[torch.from_numpy(position_QC < 0)] = -torch.inf
    column_QK = highest(cosine_QC, k)
    return Neighbours(np.take_along_axis(position_QC, column_QK.numpy(), 1), cosine_QC.gather(1, column_QK).numpy())


def built_once(
    file: Path,
    kind: Kind,
    chunks: Callable[[], Iterable[Chunk]],
    positions: np.ndarray,
    width: int,
    settings: IndexSettings,
    *,
    made_by: Any,
) -> Index:
    """The index in a file, built there by the first process that asks while others wait; see `Index.build`.

    Args:
        file: Where it lies.
        kind, chunks, positions, width, settings: As for `Index.build`.
        made_by: What the vectors were made by, in JSON values: an index over others is built anew.
    """
    made_for = digest_of(made_by, kind, dataclasses.asdict(settings))
    with locked(file.with_name(f".{file.name}.lock")):
        index = Index.load(file, made_for, positions, settings)
        if index is None:
            index = Index.build(kind, chunks, positions, width, settings)
            index.save(file, made_for)
    return index


def require_faiss() -> Any:
    """The library, with as many threads as torch has.

    Raises:
        ValueError: It is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # SWIG's types name no module
            import faiss
    except ImportError as error:
        raise ValueError(f"an index needs FAISS ({error}): pip install -e '.[mine]', or take index=exact") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _sample(chunks: Iterable[Chunk], every: int) -> np.ndarray:
    """Each `every`-th vector."""
    taken, first = [], 0
    for chunk in chunks:
        taken.append(np.array(chunk.vectors[first::every], np.float32))
        first = (first - len(chunk.vectors)) % every
    return np.concatenate(taken)


def _described(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")
