"""The meaning of the loss: the equations of Gemini Embedding 2 (arXiv 2605.27295, eq. 2) as plain torch, any dtype and device.

Letters: B rows of this rank, N passages of all ranks, M hard negatives, D embedding width, K prefixes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_per_prefix(
    query_BD: Tensor,
    passage_ND: Tensor,
    *,
    prefixes: tuple[int, ...],
    temperature: float | Tensor,
    other_BN: Tensor,
    negative_MD: Tensor | None,
    seen_BM: Tensor | None,
    own_BM: Tensor | None,
    offset: int,
    hardness: float,
) -> Tensor:
    """Mean loss over the rows for every prefix, by writing the scores down.

    With s the cosine of vectors cut to the prefix, own passage p_i and everything else that row i sees:

        loss_i = log(1 + Σ_others w e^{(s(q_i, other) − s(q_i, p_i)) / τ})

    The own passage stays out of the sum, so a nearly solved row keeps all its digits.

    Args:
        query_BD: Queries (B, D).
        passage_ND: Positives of all ranks (N, D); row i's own is column offset + i.
        prefixes: Widths, each at most D.
        temperature: τ.
        other_BN: Which passages row i sees beside its own (B, N), bool; the mask of the equations.
        negative_MD: Hard negatives (M, D) or None.
        seen_BM: Which hard negatives row i sees (B, M), bool.
        own_BM: Which hard negatives belong to row i (B, M), bool; only these are weighted by hardness.
        offset: Column of row 0's own passage.
        hardness: α of EmbeddingGemma (arXiv 2509.20354): w = exp(α · sg(cosine)), not divided by τ.

    Returns:
        Losses (K,), dtype of the inputs.
    """
    unseen = torch.finfo(query_BD.dtype).min / 4  # finite: a row that sees nothing keeps a gradient of zero, not NaN
    losses = []
    for width in prefixes:
        query = F.normalize(query_BD[:, :width], dim=-1)
        passage = F.normalize(passage_ND[:, :width], dim=-1)
        own_B = (query * passage[offset : offset + len(query)]).sum(-1)
        logit_BX = ((query @ passage.T) / temperature).masked_fill(~other_BN, unseen)
        if negative_MD is not None:
            assert seen_BM is not None
            assert own_BM is not None
            cosine_BM = query @ F.normalize(negative_MD[:, :width], dim=-1).T
            weight_BM = hardness * cosine_BM.detach() * own_BM
            negative_BM = (cosine_BM / temperature + weight_BM).masked_fill(~seen_BM, unseen)
            logit_BX = torch.cat([logit_BX, negative_BM], dim=1)
        excess_B = torch.logsumexp(logit_BX - (own_B / temperature)[:, None], dim=1)
        losses.append(F.softplus(excess_B, threshold=40.0).mean())
    return torch.stack(losses)


def spread_out_per_prefix(x_BD: Tensor, *, prefixes: tuple[int, ...], other_BB: Tensor) -> Tensor:
    """Mean squared cosine between different rows for every prefix (EmbeddingGemma's L_S for one side).

    Args:
        x_BD: Vectors (B, D).
        prefixes: Widths, each at most D.
        other_BB: Which pairs count (B, B), bool: never the diagonal, never rows of equal content.

    Returns:
        Losses (K,): the sum over counted pairs divided by B (B − 1).
    """
    num_pairs = len(x_BD) * (len(x_BD) - 1)
    losses = []
    for width in prefixes:
        x = F.normalize(x_BD[:, :width], dim=-1)
        losses.append(((x @ x.T).square() * other_BB).sum() / num_pairs)
    return torch.stack(losses)
