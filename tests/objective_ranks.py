"""One of several ranks that train a toy encoder with each objective of CASES under DDP: writes what it met (test_ranks.py)."""

import inspect
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kernels.contrastive import contrastive_loss
from lightning_modules.objective.objective import Objective, ObjectiveConfig, ObjectiveLoss

ROWS, STEPS = 8, 3
EVERYTHING = ObjectiveConfig(
    matching=0.7,
    teacher_dim=5,
    learn_temperature=True,
    temperature=0.3,
    hardness=2.0,
    negatives="all",
    directions="both",
    centring=1.0,
    queue=11,
)
CASES = {
    "contrastive": ObjectiveConfig(spread_out=0.0, temperature=0.2),
    "three terms": ObjectiveConfig(matching=1.0, learn_temperature=True, temperature=0.2, hardness=5.0),
    "another width": ObjectiveConfig(matching=1.0, teacher_dim=5, matching_distance="l2"),
    "all negatives": ObjectiveConfig(spread_out=0.0, negatives="all"),
    "both directions": ObjectiveConfig(spread_out=0.0, directions="both", learn_temperature=True, temperature=0.3),
    "centring": ObjectiveConfig(centring=1.0),
    "queue": ObjectiveConfig(queue=11, temperature=0.2),
    "everything": EVERYTHING,
}
if "margin" in inspect.signature(contrastive_loss).parameters:
    CASES["margin"] = ObjectiveConfig(margin=0.1, queue=5, directions="both")


class Toy(nn.Module):
    """A linear encoder and the objective; the loss of a batch."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(10, 8)
        self.objective = Objective(config, prefixes=(4, 8), embedding_dim=8)
        self.double()

    def forward(self, batch: dict[str, Any]) -> ObjectiveLoss:
        vectors = {name: self.encoder(batch.pop(name)) for name in ("query_BD", "target_BD", "negative_MD") if name in batch}
        return self.objective(**vectors, **batch, task="t", progress=0.5)


def batch_of(config: ObjectiveConfig, step: int, rows: range) -> dict[str, Any]:
    """Some rows of a step's batch: contents that repeat, from no to four hard negatives a row, none of the first two rows."""
    random = torch.Generator().manual_seed(step)
    teacher_dim = config.teacher_dim or 8

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def teacher(number: int) -> Tensor:
        gaps = torch.rand(number, generator=random) < 0.4
        return randn(number, teacher_dim).float().masked_fill(gaps[:, None], torch.nan)

    row_M = torch.tensor([row for row in range(2, ROWS) for _ in range(row % 5)])
    whole = {"query_BD": randn(ROWS, 10), "target_BD": randn(ROWS, 10)}
    whole |= {name: torch.randint(0, 9, (ROWS,), generator=random) for name in ("query_id", "target_id")}
    hard = {"negative_MD": randn(len(row_M), 10), "negative_id": torch.randint(0, 9, (len(row_M),), generator=random)}
    if config.matching and step < STEPS - 1:  # no rank has a teacher's vectors in the last step
        whole |= {"query_vector": teacher(ROWS), "target_vector": teacher(ROWS)}
        whole["query_vector"][: ROWS // 2] = torch.nan  # none at all for the first ranks
        hard |= {"negative_vector": teacher(len(row_M))}
    mine = (row_M >= rows.start) & (row_M < rows.stop)
    batch: dict[str, Any] = {name: value[rows.start : rows.stop] for name, value in whole.items()}
    if mine.any():
        batch |= {name: value[mine] for name, value in hard.items()} | {"negative_row": row_M[mine] - rows.start}
    if "query_vector" in batch and batch["query_vector"].isnan().all():
        batch["query_vector"] = None
    return batch


def trained(config: ObjectiveConfig, rank: int, num_ranks: int, wrap: Any = lambda toy: toy) -> list[dict[str, Any]]:
    """Of each step the loss, its parts and the gradients, by one of several ranks with equally many rows."""
    toy = Toy(config)
    wrapped = wrap(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    met = []
    for step in range(STEPS):
        out = wrapped(batch_of(config, step, range(rank * ROWS // num_ranks, (rank + 1) * ROWS // num_ranks)))
        optimizer.zero_grad()
        out.total.backward()
        gradients = {}
        for name, parameter in toy.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()
        optimizer.step()
        met.append({"total": out.total.detach(), "parts": out.parts, "gradients": gradients})
    return met


def refusals(rank: int) -> list[str]:
    """What each of some batches that do not fit together is answered with."""
    answers = []
    for spoil in ("rows", "teacher", "value"):
        config = ObjectiveConfig(matching=1.0, teacher_prefix=True)
        toy = Toy(config)
        batch = batch_of(config, 0, range(4 * (rank % 2), 4 * (rank % 2) + 4 - (spoil == "rows" and rank == 0)))
        if spoil == "teacher":
            batch["target_vector"] = torch.ones(4, 8 + rank)
        if spoil == "value" and rank == 1:
            batch["target_BD"][0, 0] = torch.nan
        try:
            answers.append(str(toy(batch).total.item()))
        except ValueError as error:
            answers.append(str(error))
    return answers


def main(rank: int, num_ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{num_ranks}", rank=rank, world_size=num_ranks)
    met: dict[str, Any] = {name: trained(config, rank, num_ranks, DistributedDataParallel) for name, config in CASES.items()}
    mesh = init_device_mesh("cpu", (num_ranks,))
    met["sharded"] = trained(EVERYTHING, rank, num_ranks, lambda toy: fully_shard(toy, mesh=mesh))
    met["refusals"] = refusals(rank)
    torch.save(met, f"{folder}/rank{rank}of{num_ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive what they use at the interpreter's end, and abort it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
