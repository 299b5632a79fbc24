"""Speed, memory and error of the contrastive loss against what people use today, alternating in one process.

    python experiments/bench/loss.py [--rows 4096] [--width 768] [--prefixes 128,256,512,768] [--json FILE]

On a CPU: one thread, fp32, against the loss per prefix in autograd, torch.compile of that, and sentence-transformers'
Matryoshka loss over its cached ranking loss, called as it calls itself (pip install -e '.[eval]'). On a GPU: bf16, against the
loss per prefix in eager autocast, torch.compile of it and Inf-CL once per prefix (pip install inf-cl), with the measured matmul
peak beside it. Inputs are fresh random vectors with duplicate content ids in every repeat. A run takes a few minutes.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from kernels.contrastive import contrastive_loss

TEMPERATURE = 0.05
ST_MINI_BATCHES = (32, 128, 512, 2048)  # 32 is its default


class Inputs(NamedTuple):
    """One repeat: vectors with gradient, and the ids that make some of them equal."""

    query: Tensor
    passage: Tensor
    query_id: Tensor
    passage_id: Tensor

    @classmethod
    def fresh(cls, rows: int, width: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Inputs":
        """A passage is its query plus noise; about one content id in twenty is shared by two rows."""
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(rows, width, generator=generator)
        passage = query + 2.0 * torch.randn(rows, width, generator=generator)
        ids = [torch.randint(0, 10 * rows, (rows,), generator=generator).to(device) for _ in range(2)]
        return cls(*(x.to(device, dtype).requires_grad_() for x in (query, passage)), *ids)


def naive(inputs: Inputs, prefixes: tuple[int, ...]) -> Tensor:
    """One masked cross entropy per prefix, differentiated by autograd."""
    query, passage, query_id, passage_id = inputs
    equal = (query_id[:, None] == query_id) | (passage_id[:, None] == passage_id)
    equal = equal.fill_diagonal_(False)
    own = torch.arange(len(query), device=query.device)
    loss = query.new_zeros((), dtype=torch.float32)
    for prefix in prefixes:
        logits = F.normalize(query[:, :prefix], dim=-1) @ F.normalize(passage[:, :prefix], dim=-1).T / TEMPERATURE
        loss = loss + F.cross_entropy(logits.float().masked_fill(equal, -1e30), own)
    return loss


def ours(inputs: Inputs, prefixes: tuple[int, ...]) -> Tensor:
    query, passage, query_id, passage_id = inputs
    return contrastive_loss(
        query, passage, prefixes=prefixes, temperature=TEMPERATURE, query_id=query_id, passage_id=passage_id
    ).loss


def sentence_transformers_loss(inputs: Inputs, prefixes: tuple[int, ...], mini_batch: int) -> Tensor:
    """What its cached loss does with the embeddings of a step; it has no mask, and calls backward by itself."""
    from sentence_transformers.sentence_transformer import losses  # pyright: ignore[reportMissingImports] (optional)

    class Model(torch.nn.Sequential):
        """What the losses ask of a model before they see its embeddings."""

        def get_embedding_dimension(self) -> int:
            return prefixes[-1]

    model: Any = Model(torch.nn.Identity())
    cached = losses.CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch)
    loss: Any = losses.MatryoshkaLoss(model, cached, matryoshka_dims=list(prefixes))
    parts = [list(x.detach().split(mini_batch)) for x in inputs[:2]]
    parts = [[x.requires_grad_() for x in side] for side in parts]
    return loss.loss.calculate_loss(parts, with_backward=True)


def inf_cl_loss(inputs: Inputs, prefixes: tuple[int, ...]) -> Tensor:
    """The published fused InfoNCE, once per prefix; it has no mask."""
    from inf_cl import cal_flash_loss  # pyright: ignore[reportMissingImports] (optional)

    scale = torch.tensor(1 / TEMPERATURE, device=inputs.query.device)
    units = [[F.normalize(x[:, :prefix].float(), dim=-1) for x in inputs[:2]] for prefix in prefixes]
    return torch.stack([cal_flash_loss(query, passage, scale=scale) for query, passage in units]).sum()


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a call held beyond what the process held before, as Linux counts it."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must not hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def step(loss: Callable[[Inputs, tuple[int, ...]], Tensor], inputs: Inputs, prefixes: tuple[int, ...]) -> None:
    """Forward and backward."""
    total = loss(inputs, prefixes)
    if total.requires_grad:
        total.backward()


def loss_and_gradients(inputs: Inputs, dtype: torch.dtype, impl: Any, **arguments: Any) -> tuple[Tensor, ...]:
    """Losses per prefix and the gradients of queries and passages, in fp64."""
    query, passage = (x.detach().to(dtype).requires_grad_() for x in inputs[:2])
    out = contrastive_loss(query, passage, query_id=inputs.query_id, passage_id=inputs.passage_id, impl=impl, **arguments)
    return out.per_prefix.double(), *(x.double() for x in torch.autograd.grad(out.loss, (query, passage)))


def relative_errors(truth: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the losses per prefix, and of the worse gradient."""
    of_losses, *of_gradients = (((a - b).norm() / a.norm()).item() for a, b in zip(truth, found, strict=True))
    return of_losses, max(of_gradients)


def on_cpu(arguments: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    prefixes, rows, width = arguments.prefixes, arguments.rows, arguments.width
    compiled = torch.compile(naive, dynamic=False)
    contestants: dict[str, Callable] = {
        "ours": ours,
        "one cross entropy per prefix": naive,
        "torch.compile of it": compiled,
    }
    try:
        import sentence_transformers  # pyright: ignore[reportMissingImports] (optional)

        for size in ST_MINI_BATCHES:
            name = f"sentence-transformers {sentence_transformers.__version__}, mini-batch {size}"
            contestants[name] = lambda inputs, prefixes, size=size: sentence_transformers_loss(inputs, prefixes, size)
    except ImportError:
        print("sentence-transformers is not installed (pip install -e '.[eval]'): left out", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(arguments.repeats + 1):
        for name, loss in contestants.items():
            inputs = Inputs.fresh(rows, width, seed=repeat)
            start = time.perf_counter()
            step(loss, inputs, prefixes)
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    inputs = Inputs.fresh(rows, width, seed=0)
    memory = {name: peak_bytes(lambda loss=loss: step(loss, inputs, prefixes)) for name, loss in contestants.items()}
    table = [
        {
            "loss": name,
            "seconds": statistics.median(taken),
            "spread": (max(taken) - min(taken)) / statistics.median(taken),
            "times_ours": statistics.median(taken) / statistics.median(seconds["ours"]),
            "peak_mib": memory[name] / 2**20,
            "memory_times_ours": memory[name] / memory["ours"],
        }
        for name, taken in seconds.items()
    ]
    print(f"\n{'loss, forward and backward':<46} {'seconds':>8} {'spread':>7} {'/ ours':>7} {'peak MiB':>9} {'/ ours':>7}")
    for row in table:
        print(
            f"{row['loss']:<46} {row['seconds']:>8.3f} {row['spread']:>6.0%} {row['times_ours']:>7.2f} {row['peak_mib']:>9.0f} "
            f"{row['memory_times_ours']:>7.2f}"
        )
    work = 6 * rows * rows * width
    rate = work / statistics.median(seconds["ours"]) / 1e9
    peak = work / 1e9 / statistics.median(_seconds_of_products(rows, width) for _ in range(3))
    print(f"ours: {rate:.0f} GFLOP/s of the {peak:.0f} that three plain products of this size reach ({rate / peak:.0%})")

    by_count = _seconds_by_count(rows, width, arguments.repeats)
    print("prefixes      " + "  ".join(f"{count}: {taken:.3f} s" for count, taken in by_count.items()))
    print(f"8 prefixes take {by_count[8] / by_count[1]:.2f} times as long as 1")
    inputs, accuracy = Inputs.fresh(min(rows, 2048), width, seed=99), {}
    for temperature in (0.5, 0.05, 0.01):
        setting = {"prefixes": prefixes, "temperature": temperature}
        truth = loss_and_gradients(inputs, torch.float64, "reference", **setting)
        accuracy[temperature] = relative_errors(truth, loss_and_gradients(inputs, torch.float32, "chunked", **setting))
    for temperature, (of_loss, of_gradient) in accuracy.items():
        print(f"τ = {temperature}: relative error of the loss {of_loss:.1e}, of gradients {of_gradient:.1e} (fp64 reference)")
    return {
        "table": table,
        "gflops": rate,
        "share_of_products": rate / peak,
        "seconds_by_number_of_prefixes": by_count,
        "relative_errors": {str(temperature): pair for temperature, pair in accuracy.items()},
    }


def _seconds_of_products(rows: int, width: int) -> float:
    """The three products that a loss cannot do without: scores and two gradients."""
    x, y, scores = torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, rows)
    start = time.perf_counter()
    torch.mm(x, y.T, out=scores)
    torch.mm(scores, y)
    torch.mm(scores.T, x)
    return time.perf_counter() - start


def _seconds_by_count(rows: int, width: int, repeats: int) -> dict[int, float]:
    """Medians for 1, 2, 4 and 8 prefixes, each half of the next, alternating."""
    seconds: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
    for repeat in range(repeats):
        for count, taken in seconds.items():
            inputs = Inputs.fresh(rows, width, seed=repeat)
            prefixes = tuple(width >> (count - 1 - k) for k in range(count))
            start = time.perf_counter()
            step(ours, inputs, prefixes)
            taken.append(time.perf_counter() - start)
    return {count: statistics.median(taken) for count, taken in seconds.items()}


def on_gpu(arguments: argparse.Namespace) -> dict:
    """Correctness first, then timing with alternating contestants, a CUDA graph of a small batch, and the largest batch."""
    table: list[dict] = []
    for width, prefixes in ((3072, (768, 1536, 3072)), (768, (128, 256, 512, 768))):
        _check_on_gpu(width, prefixes)
        for rows in (1024, 8192, 32768):
            table += _time_on_gpu(rows, width, prefixes, arguments.repeats)
        print(f"D = {width}: 1,024 rows inside a CUDA graph take {_microseconds_in_graph(1024, width, prefixes):.0f} µs")
        print(f"D = {width}: largest batch that fits {_largest_batch(width, prefixes)} rows")
    return {"table": table}


def _check_on_gpu(width: int, prefixes: tuple[int, ...]) -> None:
    """The fused loss against the fp64 reference on the same half-precision inputs, in one chunk of rows and in several."""
    from kernels import fused

    generator = torch.Generator().manual_seed(0)
    cases: list[dict[str, Any]] = [{}, {"negatives": "all"}, {"negatives": "own", "hardness": 5.0}]
    for dtype in (torch.bfloat16, torch.float16):
        for temperature, workspace_bytes, case in itertools.product((0.05, 0.01), (1, 2**30), cases):
            inputs = Inputs.fresh(1000, width, 5, "cuda", dtype)
            if case:
                row = torch.randint(0, 1000, (1500,), generator=generator).cuda()
                negative = (inputs.passage.detach()[row] + torch.randn(1500, width, generator=generator).cuda()).to(dtype)
                case = case | {"negative": negative, "negative_row": row, "negative_id": inputs.passage_id[row.flip(0)]}
            setting = {"prefixes": prefixes, "temperature": temperature}
            upcast = {name: x.double() if name == "negative" else x for name, x in case.items()}
            truth = loss_and_gradients(inputs, torch.float64, "reference", **setting, **upcast)
            fused.contrastive_fused.__defaults__ = (workspace_bytes,)
            first, second = (loss_and_gradients(inputs, dtype, "triton", **setting, **case) for _ in range(2))
            fused.contrastive_fused.__defaults__ = (fused.WORKSPACE_BYTES,)
            of_losses, of_gradients = relative_errors(truth, first)
            names = " ".join(f"{name}={case[name]}" for name in ("negatives", "hardness") if name in case)
            print(f"D = {width}, {dtype}, τ = {temperature} {names}: losses {of_losses:.1e}, gradients {of_gradients:.1e}")
            assert of_losses < 1e-5 or (truth[0] - first[0]).abs().max() < 1e-6, "the losses are wrong"
            assert of_gradients < 4e-3, "the gradients are wrong"
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"


def _autocast(inputs: Inputs, prefixes: tuple[int, ...]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return naive(inputs, prefixes)


def _time_on_gpu(rows: int, width: int, prefixes: tuple[int, ...], repeats: int) -> list[dict]:
    """A row for each contestant that can run; one that cannot says why and stays out."""
    contestants: dict[str, Callable] = {
        "ours": ours,
        "one cross entropy per prefix, bf16 autocast": _autocast,
        "torch.compile of it": torch.compile(_autocast, dynamic=False),
        "Inf-CL once per prefix": inf_cl_loss,
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, float] = {}
    for repeat in range(repeats + 3):  # the first three warm up
        for name, loss in list(contestants.items()):
            inputs = Inputs.fresh(rows, width, repeat, "cuda", torch.bfloat16)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            try:
                taken = _milliseconds(lambda loss=loss, inputs=inputs: step(loss, inputs, prefixes))
            except Exception as error:  # whatever stops another's loss must not stop the table
                print(f"{name} at {rows} rows: {type(error).__name__}: {error}", file=sys.stderr)
                del contestants[name]
                continue
            memory[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
            if repeat >= 3:
                milliseconds[name].append(taken)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / min(_milliseconds(lambda: torch.mm(x, x)) for _ in range(10)) / 1e9  # TFLOP/s
    table = []
    for name in contestants:
        median = statistics.median(milliseconds[name])
        share = 6 * rows * rows * width / median / 1e9 / peak
        print(
            f"{rows:>6} × {width:<5} {name:<44} {median:>8.2f} ms {share:>5.0%} of {peak:.0f} TFLOP/s {memory[name]:>7.0f} MiB"
        )
        table.append(
            {"rows": rows, "width": width, "loss": name, "ms": median, "share_of_peak": share, "peak_mib": memory[name]}
        )
    return table


def _milliseconds(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def _microseconds_in_graph(rows: int, width: int, prefixes: tuple[int, ...]) -> float:
    """Median of replays of forward and backward, after the warm-up that capture asks for."""
    inputs = Inputs.fresh(rows, width, 0, "cuda", torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(ours, inputs, prefixes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ours, inputs, prefixes)
    return 1000 * statistics.median(_milliseconds(graph.replay) for _ in range(50))


def _largest_batch(width: int, prefixes: tuple[int, ...]) -> int:
    """Doubles the rows from 65,536 until a step no longer fits."""
    rows, fits = 65536, 0
    while rows <= 2**20:
        try:
            step(ours, Inputs.fresh(rows, width, 0, "cuda", torch.bfloat16), prefixes)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            break
        rows, fits = 2 * rows, rows
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="queries, and passages (CPU)")
    parser.add_argument("--width", type=int, default=768, help="of the vectors (CPU)")
    parser.add_argument("--prefixes", type=lambda text: tuple(map(int, text.split(","))), default=(128, 256, 512, 768))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    about = {
        "hardware": torch.cuda.get_device_name() if has_gpu else _processor(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }
    print(", ".join(about.values()) + ("" if has_gpu else "; the Triton kernels: not run on a GPU yet"))
    figures = on_gpu(arguments) if has_gpu else on_cpu(arguments)
    if arguments.json:
        setting = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({**about, **setting, **figures}, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
