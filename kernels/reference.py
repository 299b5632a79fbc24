"""The meaning of the losses: the equations as plain torch, any dtype and device; what the other implementations are held to.

Source: Gemini Embedding 2 (arXiv 2605.27295) eq. 2 for the mask and the own positive, EmbeddingGemma (arXiv 2509.20354) for the
hardness weight and the spread-out term. Letters as in `kernels.problem`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.problem import NEGLIGIBLE, Problem


def contrastive_per_prefix(problem: Problem) -> Tensor:
    """Mean loss over the rows for every prefix (K,), with gradient, by writing the scores down.

    With s the cosine of vectors cut to the prefix, own passage p_i and everything else that row i sees:

        loss_i = log(1 + Σ_others w e^{(s(q_i, other) − s(q_i, p_i)) / τ}),  w = e^{α sg(s)} for own hard negatives, else 1

    With a margin, others are only those with s(q_i, other) ≤ s(q_i, p_i) + margin. The own passage stays out of the sum, so a
    nearly solved row keeps all its digits.
    """
    num_rows, temperature = len(problem.query_BD), problem.temperature
    unseen = torch.finfo(problem.query_BD.dtype).min / 4  # finite: a row that sees nothing has a gradient of zero, not NaN
    other_BN = other_passages(
        num_rows, len(problem.passage_ND), problem.query_id_N, problem.passage_id_N, problem.offset, problem.query_BD.device
    )
    query_BD, passage_ND = (x[:, : problem.prefixes[-1]] for x in (problem.query_BD, problem.passage_ND))
    losses = []
    for width in problem.prefixes:
        query, passage = unit(query_BD, width), unit(passage_ND, width)
        own_B = (query * passage[problem.own_columns]).sum(-1)
        cosine_BX, seen_BX = query @ passage.T, other_BN
        logit_BX = cosine_BX / temperature
        if problem.negative_MD is not None:
            seen_BM, own_BM = seen_negatives(problem)
            cosine_BM = query @ unit(problem.negative_MD[:, : problem.prefixes[-1]], width).T
            weight_BM = problem.hardness * cosine_BM.detach() * own_BM
            cosine_BX, seen_BX = torch.cat([cosine_BX, cosine_BM], dim=1), torch.cat([other_BN, seen_BM], dim=1)
            logit_BX = torch.cat([logit_BX, cosine_BM / temperature + weight_BM], dim=1)
        if problem.margin is not None:
            seen_BX = seen_BX & ~(cosine_BX > own_B[:, None] + problem.margin)
        logit_BX = logit_BX.masked_fill(~seen_BX, unseen)
        excess_B = torch.logsumexp(logit_BX - (own_B / temperature)[:, None], dim=1)
        losses.append(F.softplus(excess_B, threshold=40.0).mean())
    return torch.stack(losses)


def unit(x_RD: Tensor, width: int) -> Tensor:
    """Rows cut to `width`, of length 1; zeros, also where the cut is negligible beside its row, and these get no gradient."""
    norm_R1 = torch.linalg.vector_norm(x_RD[:, :width], dim=-1, keepdim=True)
    negligible_R1 = NEGLIGIBLE * torch.linalg.vector_norm(x_RD.detach(), dim=-1, keepdim=True)
    return x_RD[:, :width] / torch.where(norm_R1 <= negligible_R1, torch.inf, norm_R1)


def other_passages(
    num_rows: int, num_passages: int, query_id: Tensor | None, passage_id: Tensor | None, offset: int, device: torch.device
) -> Tensor:
    """mask(i, j) of the equations (B, N), bool: passage j counts against row i unless query or passage are equal in content."""
    column_N = torch.arange(num_passages, device=device)
    row_B = column_N[offset : offset + num_rows]
    other_BN = row_B[:, None] != column_N
    for ids in (query_id, passage_id):
        if ids is not None:
            other_BN &= ids[row_B][:, None] != ids
    return other_BN


def seen_negatives(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which hard negatives a row sees, and which of them are its own: two (B, M) bool."""
    assert problem.negative_row_M is not None
    row_B = torch.arange(len(problem.query_BD), device=problem.negative_row_M.device)
    own_BM = row_B[:, None] == problem.negative_row_M
    seen_BM = torch.ones_like(own_BM) if problem.see_all else own_BM
    if problem.negative_id_M is not None and problem.passage_id_N is not None:
        seen_BM = seen_BM & (problem.passage_id_N[row_B + problem.offset][:, None] != problem.negative_id_M)
    return seen_BM, own_BM


def spread_out_per_prefix(x_BD: Tensor, *, prefixes: tuple[int, ...], ids_B: Tensor | None) -> Tensor:
    """Mean squared cosine between rows of different content for every prefix (K,): their sum divided by B (B − 1)."""
    num_pairs = len(x_BD) * (len(x_BD) - 1)
    ids_B = torch.arange(len(x_BD), device=x_BD.device) if ids_B is None else ids_B
    other_BB = ids_B[:, None] != ids_B
    units = [unit(x_BD[:, : prefixes[-1]], width) for width in prefixes]
    return torch.stack([((x @ x.T).square() * other_BB).sum() / num_pairs for x in units])
