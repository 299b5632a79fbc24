"""Measures of embeddings, by torchmetrics, and what chance would give: the exact expectation over random orders.

Letters: Q queries, C candidates.
"""

import math

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.regression import spearman_corrcoef
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

RECALL_DEPTHS = (1, 5, 10)
DEPTH = 10


def retrieval(score_QC: Tensor, relevant_QC: Tensor) -> dict[str, float]:
    """R@1/5/10 (share of queries with a relevant candidate among the first k), MRR@10 and nDCG@10.

    Of candidates with equal scores the relevant come last, so that an encoder that tells nothing apart scores nothing.

    Args:
        score_QC: Similarities (Q, C).
        relevant_QC: Which candidates are relevant (Q, C), bool; at least one in each row.
    """
    irrelevant_first_QC = relevant_QC.int().argsort(dim=1, stable=True)
    by_score_QC = score_QC.gather(1, irrelevant_first_QC).argsort(dim=1, descending=True, stable=True)
    rank_QC = irrelevant_first_QC.gather(1, by_score_QC).argsort(dim=1)
    # The first ten and all relevant ones decide every measure, so the rest need not be handed over. Ranks stand for scores:
    # torchmetrics 1.9 orders ties as it likes and takes scores of 0 or less for irrelevant in the reciprocal rank.
    row, column = (relevant_QC | (rank_QC < DEPTH)).nonzero(as_tuple=True)
    preds = (score_QC.shape[1] - rank_QC)[row, column].double()
    arguments = {"preds": preds, "target": relevant_QC[row, column], "indexes": row}
    measures = {f"recall@{k}": RetrievalHitRate(top_k=k) for k in RECALL_DEPTHS}
    measures |= {f"mrr@{DEPTH}": RetrievalMRR(top_k=DEPTH), f"ndcg@{DEPTH}": RetrievalNormalizedDCG(top_k=DEPTH)}
    return {name: measure(**arguments).item() for name, measure in measures.items()}


def retrieval_chance(relevant_QC: Tensor) -> dict[str, float]:
    """What a random order of the candidates gives on average."""
    num_candidates = relevant_QC.shape[1]
    by_query = [_chance(int(num_relevant), num_candidates) for num_relevant in relevant_QC.sum(1)]
    return {name: float(np.mean([values[name] for values in by_query])) for name in by_query[0]}


def _chance(num_relevant: int, num_candidates: int) -> dict[str, float]:
    depth = min(DEPTH, num_candidates)
    miss = [1.0]  # probability that none of the first k is relevant
    for k in range(depth):
        miss.append(miss[-1] * max(0, num_candidates - num_relevant - k) / (num_candidates - k))
    discounts = [1 / math.log2(rank + 2) for rank in range(depth)]
    gain = num_relevant / num_candidates * sum(discounts)
    return {
        **{f"recall@{k}": 1 - miss[min(k, depth)] for k in RECALL_DEPTHS},
        f"mrr@{DEPTH}": sum((miss[k] - miss[k + 1]) / (k + 1) for k in range(depth)),
        f"ndcg@{DEPTH}": gain / sum(discounts[:num_relevant]),
    }


def similarity(cosine_Q: Tensor, gold_Q: Tensor) -> dict[str, float]:
    """Spearman correlation of cosines with gold scores; chance is 0."""
    return {"spearman": spearman_corrcoef(cosine_Q.double(), gold_Q.double()).item()}


def classification(
    embedding_QD: Tensor, class_Q: Tensor, *, train_ND: Tensor, train_class_N: Tensor, label_CD: Tensor
) -> dict[str, float]:
    """Accuracy of a linear probe (logistic regression on the training embeddings) and of the nearest label text; chance is 1/C.

    Args:
        embedding_QD: Unit vectors of the judged items.
        class_Q: Their classes, numbers below C.
        train_ND: Unit vectors that the probe is fitted on.
        train_class_N: Their classes.
        label_CD: Unit vectors of the labels' texts.
    """
    # Unit vectors have coordinates of size 1/sqrt(D); without this factor the default regularisation would flatten the probe.
    scale = train_ND.shape[1] ** 0.5
    probe = LogisticRegression(max_iter=1000).fit((train_ND * scale).numpy(), train_class_N.numpy())
    accuracy = {
        "accuracy_probe": torch.from_numpy(probe.predict((embedding_QD * scale).numpy())),
        "accuracy_zero_shot": (embedding_QD @ label_CD.T).argmax(1),
    }
    measure = MulticlassAccuracy(len(label_CD), average="micro")
    return {name: measure(predicted, class_Q).item() for name, predicted in accuracy.items()}
