"""What scale.py takes for granted, counted: bytes on the wire, weights and gradients alive, FLOPs of an encoder.

python experiments/008_scale/counted.py [--out FILE]

Two gloo processes train a step of a tiny encoder; every collective, and every matrix of a weight's shape, is seen as it is
dispatched. Nothing is timed. Letters: B pairs of a rank, W = 2 ranks, D the embedding's width.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from datamodules.processors.inputs import Inputs  # noqa: E402
from lightning_modules.encoder.backbone import BackboneConfig  # noqa: E402
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig  # noqa: E402
from lightning_modules.objective.objective import Objective, ObjectiveConfig  # noqa: E402
from lightning_modules.sharded import shard  # noqa: E402

RANKS, PAIRS, LENGTH, WIDTH = 2, 8, 11, 48  # no activation has the shape of a weight
TEXT = {"model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
COLLECTIVES = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced", "allreduce_": "all-reduced"}


def tiny(**text: Any) -> Embedder:
    """An encoder of random weights."""
    torch.manual_seed(0)
    return Embedder(EncoderConfig(BackboneConfig(text=TEXT | text), WIDTH, (16, WIDTH))).train()


def texts(number: int, length: int = LENGTH) -> Inputs:
    return Inputs(torch.randint(2, TEXT["vocab_size"], (number * length,)), torch.full((number,), length))


class Counting(TorchDispatchMode):
    """Bytes of collectives by phase and kind, and the most bytes alive at once of what has the shape of a layer's weight."""

    def __init__(self, encoder: Embedder) -> None:
        super().__init__()
        self.layers: list[Any] = encoder.backbone.layers
        self.phase = ""
        shapes = {tuple(p.shape) for layer in self.layers for p in layer.parameters() if p.ndim == 2}
        self.weights = shapes | {shape[::-1] for shape in shapes}
        self.bytes: dict[str, int] = {}
        self.alive: dict[str, int] = {"cast": 0, "gradient": 0}
        self.most: dict[str, int] = {"whole": 0, "cast": 0, "gradient": 0}
        self.seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in COLLECTIVES:
            key = f"{self.phase}, {COLLECTIVES[name]}"
            leaves = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.bytes[key] = self.bytes.get(key, 0) + max(x.nbytes for x in leaves)
        out = func(*args, **(kwargs or {}))
        if name in ("mm", "add", "add_", "_to_copy"):
            whole = sum(p.nbytes for layer in self.layers for p in layer.parameters() if not isinstance(p, DTensor))
            self.most["whole"] = max(self.most["whole"], whole)
            kind = "cast" if name == "_to_copy" else "gradient"
            if tuple(out.shape) in self.weights and (kind == "gradient" or out.dtype == torch.bfloat16):
                self.watch(kind, out.untyped_storage())
        return out

    def watch(self, kind: str, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_: Any) -> None:
            self.alive[kind] -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.alive[kind] += size
        self.most[kind] = max(self.most[kind], self.alive[kind])


class Traffic(Counting):
    """Bytes that operators read and write of tensors as large as all ranks' vectors of one side, and the most alive at once."""

    def __init__(self, size: int) -> None:
        super().__init__(tiny())
        self.size, self.moved = size, 0
        self.alive, self.most = {"vectors": 0}, {"vectors": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), out))
        own = {x.untyped_storage()._cdata for x in read}
        is_view = any(x.untyped_storage()._cdata in own for x in written) and not func.overloadpacket.__name__.endswith("_")
        if not is_view and "polyphony" not in func.namespace and "c10d" not in func.namespace:
            self.moved += sum(x.nbytes for x in (*read, *written) if x.nbytes >= self.size)
        for x in written:
            if x.untyped_storage().nbytes() >= self.size:
                self.watch("vectors", x.untyped_storage())
        return out


def objective_of(rank: int, *, pairs: int = 64, width: int = 512) -> dict[str, float]:
    """Passes over all ranks' vectors of one side beside the loss's own kernel, and how many such tensors are alive at once."""
    torch.manual_seed(rank)
    size = RANKS * pairs * width * 4
    query, target = (torch.randn(pairs, width, requires_grad=True) for _ in range(2))
    objective = Objective(ObjectiveConfig(spread_out=0.0), prefixes=(128, 256, width), embedding_dim=width)
    ids = torch.arange(pairs) + pairs * rank
    with Traffic(size) as traffic:
        objective(query, target, query_id=ids, target_id=ids + 1000).total.backward()
    return {"passes": traffic.moved / size, "alive": traffic.most["vectors"] / size}


def step(parts: int, *, checkpointed: bool, mixed: bool, rank: int, policy: bool = False) -> dict[str, Any]:
    """What a step with FSDP2 moves and keeps.

    Args:
        parts: That the batch goes through in.
        checkpointed: Whether layers keep their inputs alone.
        mixed: Whether autocast is on.
        rank: This process.
        policy: Whether FSDP2 itself casts to bf16, before it gathers: what `lightning_modules.sharded` does not do.
    """
    encoder = tiny()
    layers = sum(p.numel() for layer in encoder.backbone.layers for p in layer.parameters())
    rest = sum(p.numel() for p in encoder.parameters()) - layers
    counting = Counting(encoder)
    mesh = init_device_mesh("cpu", (RANKS,))
    if policy:
        for module in (*encoder.backbone.layers, encoder):
            fully_shard(
                module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            )
    else:
        shard(encoder, encoder.backbone.layers, mesh)
    max_tokens = -(-2 * PAIRS // parts) * LENGTH if parts > 1 else None
    encoder.use(ComputeConfig(max_tokens=max_tokens, checkpoint_layers=checkpointed))
    objective = Objective(ObjectiveConfig(spread_out=0.0), prefixes=(16, WIDTH), embedding_dim=WIDTH)
    ids = torch.arange(PAIRS) + PAIRS * rank
    with counting:
        counting.phase = "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            query, target = encoder(texts(2 * PAIRS)).split(PAIRS)
            counting.phase = "objective"
            loss = objective(query, target, query_id=ids, target_id=ids + 1000).total
        counting.phase = "backward"
        loss.backward()
    precision = "bf16 by FSDP2" if policy else "bf16-mixed" if mixed else "fp32"
    return {
        "parts": parts, "checkpointed": checkpointed, "precision": precision, "layers": layers, "rest": rest,
        "bytes": counting.bytes, "most": counting.most, "vectors": 2 * RANKS * PAIRS * WIDTH * 4,
    }  # fmt: skip


def flops() -> dict[str, Any]:
    """FLOPs of a forward and a backward pass, and the law: 6 per weight of a matrix and token, and attention's."""
    length, number = 64, 4
    encoder = tiny(hidden_size=128, intermediate_size=384, head_dim=32)
    matrices = sum(p.numel() for n, p in encoder.named_parameters() if p.ndim == 2 and "embed" not in n)
    inputs = texts(number, length)
    with FlopCounterMode(display=False) as counter:
        encoder(inputs).sum().backward()
    projection = encoder.config.embedding_dim * encoder.backbone.width
    by_weight = 6 * (matrices - projection) * length * number + 6 * projection * number  # of an item, not of a token
    attention = 14 * 4 * 32 * TEXT["num_hidden_layers"] * length * length * number  # scores are made again going backward
    return {"counted": counter.get_total_flops(), "weights": by_weight, "attention": attention}


def rank_main(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    cases = [(parts, False, False, False) for parts in (1, 4)]
    cases += [(parts, checkpointed, True, False) for checkpointed in (False, True) for parts in (1, 2, 4)]
    cases += [(parts, False, True, True) for parts in (1, 4)]
    rows = [step(p, checkpointed=c, mixed=m, policy=f, rank=rank) for p, c, m, f in cases]
    vectors = objective_of(rank)
    if rank == 0:
        print(json.dumps({"steps": rows, "objective": vectors, "flops": flops()}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive what they use at the interpreter's end, and abort it


def counted() -> dict[str, Any]:
    """What two processes met."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--address", f"file://{folder}/meeting", "--rank"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        others = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, **pipes) for rank in range(RANKS)]
        found = [process.communicate(timeout=300) for process in others]
    for process, (_, errors) in zip(others, found, strict=True):
        if process.returncode:
            raise RuntimeError(errors)
    return json.loads(found[0][0].splitlines()[-1])


def table(rows: Iterable[dict[str, Any]]) -> None:
    """Bytes a parameter of the layers, those of the rest taken away."""
    named = ["parts", "layers checkpointed", "precision", "gathered forward", "gathered backward", "reduced"]
    named += ["whole weights alive", "bf16 casts alive", "gradients alive"]
    print("|", " | ".join(named), "|\n|" + "---|" * len(named))
    for row in rows:
        layers, moved, most = row["layers"], row["bytes"], row["most"]
        gathered = row["rest"] * (2 if "FSDP2" in row["precision"] else 4)
        cells = [row["parts"], "yes" if row["checkpointed"] else "no", row["precision"]]
        cells += [(moved["forward, gathered"] - gathered) / layers, moved.get("backward, gathered", 0) / layers]
        cells += [(moved["backward, reduced"] - 4 * row["rest"] - row["vectors"]) / layers]
        cells = [*cells, *(most[kind] / layers for kind in ("whole", "cast", "gradient"))]
        cells = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells]
        print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank is not None:
        return rank_main(arguments.rank, arguments.address)
    found = counted()
    table(found["steps"])
    vectors = found["steps"][0]["vectors"]
    print(f"\nvectors: {found['steps'][0]['bytes']}, 2 W B D 4 = {vectors}")
    print(f"objective: {found['objective']}")
    print(f"FLOPs: {found['flops']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
