"""Embedding matching: the student's vectors are drawn to a teacher's stored ones (EmbeddingGemma, arXiv 2509.20354).

L_D is the sum, over queries, targets and hard negatives, of the mean distance between the student's full vector and the
teacher's of the same item. Letters: R rows of a column, D the student's width, T the teacher's.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.problem import HALF
from lightning_modules.objective.gather import num_ranks


class Matching(nn.Module):
    """Mean distances to a teacher's vectors.

    Args:
        embedding_dim: Width D of the student's vectors.
        distance: `cosine`: 1 − cosine. `l2`: squared length of the difference, of the vectors as they are. Our choice: the
            paper publishes none.
        teacher_dim: Width T of a teacher that a linear map from the student is learnt for. None, or T = D, learns none.
        teacher_prefix: Whether a prefix of the teacher's vectors is a vector itself: the wider of the two is cut.
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        distance: Literal["cosine", "l2"] = "cosine",
        teacher_dim: int | None = None,
        teacher_prefix: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.distance, self.teacher_prefix = embedding_dim, distance, teacher_prefix
        self.map = None
        if teacher_dim is not None and teacher_dim != embedding_dim:
            self.map = nn.Linear(embedding_dim, teacher_dim, bias=False)

    def forward(
        self, columns: Mapping[str, tuple[Tensor, Tensor | None]], num_taught: Mapping[str, int], teacher_dim: int
    ) -> dict[str, Tensor]:
        """Each column's mean distance over the rows of all ranks that a teacher has a vector for; 0 where there are none.

        On one of W ranks it is W times the rank's own share of that mean: the mean over the ranks is the mean over all rows.
        The map is used even if for nothing, since DDP waits for every parameter's gradient.

        Args:
            columns: Name to the student's vectors (R, D) and the teacher's (R, T), whose rows are NaN where it has none.
            num_taught: Name to the rows of all ranks that it has a vector for.
            teacher_dim: T on all ranks; 0 where none has a vector.

        Raises:
            ValueError: The student cannot be compared with a teacher of this width.
        """
        if teacher_dim:
            self._check(teacher_dim)
        means = {}
        for name, (student_RD, teacher_RT) in columns.items():
            with torch.autocast(student_RD.device.type, enabled=False):
                student_RD = student_RD.float() if student_RD.dtype in HALF else student_RD
                if teacher_RT is None:
                    teacher_RT = student_RD.new_full((len(student_RD), teacher_dim or self._default_width), torch.nan)
                distance_R = self._distance(student_RD, teacher_RT.to(student_RD.dtype))
            means[name] = distance_R.sum() * (num_ranks() / max(1, num_taught[name]))
        return means

    @property
    def _default_width(self) -> int:
        return self.embedding_dim if self.map is None else self.map.out_features

    def _check(self, teacher_dim: int) -> None:
        if self.map is not None and teacher_dim != self.map.out_features:
            raise ValueError(
                f"the batch's teacher vectors have width {teacher_dim}; objective.teacher_dim is {self.map.out_features}"
            )
        if self.map is None and not self.teacher_prefix and teacher_dim != self.embedding_dim:
            raise ValueError(
                f"the batch's teacher vectors have width {teacher_dim}, the embedding has {self.embedding_dim}; set "
                "objective.teacher_prefix=true if a prefix of the teacher's vector is a vector itself, else "
                f"objective.teacher_dim={teacher_dim}, which learns a linear map to it"
            )

    def _distance(self, student_RD: Tensor, teacher_RT: Tensor) -> Tensor:
        """Of every row (R,); 0 where the teacher has no vector."""
        is_taught_R = taught(teacher_RT)
        teacher_RT = torch.where(is_taught_R[:, None], teacher_RT, 0.0)  # a NaN would reach the gradient through any mask
        if self.map is not None:
            student_RD = self.map(student_RD)
        width = min(student_RD.shape[1], teacher_RT.shape[1])
        student_RC, teacher_RC = student_RD[:, :width], teacher_RT[:, :width]
        if self.distance == "cosine":
            distance_R = 1.0 - (F.normalize(student_RC, dim=1) * F.normalize(teacher_RC, dim=1)).sum(1)
        else:
            distance_R = (student_RC - teacher_RC).square().sum(1)
        return distance_R * is_taught_R


def taught(teacher_RT: Tensor) -> Tensor:
    """Which rows a teacher has a vector for (R,), bool."""
    return ~teacher_RT.isnan().any(1)
