"""The Gemini-scale run on paper: a billion pairs, batches of 16k to 64k, 740 M and 8 B parameters, 64 to 512 H100 or H200.

python experiments/008_scale/scale.py

Arithmetic alone, of what the code does as it is, in Markdown; the laws and every assumption are in laws.py.
"""

import math

from laws import (
    BATCHES,
    BF16_PEAK,
    DAY,
    EVERY_MINUTES,
    EXAMPLE_ROW,
    EXAMPLES_PER_SHARD,
    FAILURES,
    FEISTEL,
    FP32_PEAK,
    FP32_SHARE,
    GIB,
    GPUS,
    HASH,
    IMAGE,
    KEY,
    KINDS,
    LARGE,
    MEMBER_ROW,
    MEMORY,
    METADATA,
    NUM_PAIRS,
    PAGE,
    RESTART,
    SHARD_ENTRY,
    SMALL,
    TEXT,
    USABLE,
    VECTORS_ALIVE,
    WIDTH,
    Layout,
    Model,
    best,
    checkpoint,
    memory,
    spread_out,
    step_of,
)


def first(values: list[int], is_reached: list[bool]) -> str:
    """The first value at which something is reached."""
    return next((f"{value:,}" for value, reached in zip(values, is_reached, strict=True) if reached), f"above {values[-1]:,}")


def table(title: str, rows: list[dict[str, object]]) -> None:
    """Markdown; numbers of three digits."""
    print(f"\n**{title}**\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(shown, row.values()))} |")


def shown(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def told(layout: Layout) -> str:
    how = ("FSDP2, mended" if layout.mended else "FSDP2") if layout.sharded else "DDP"
    return f"{how}, {layout.parts} part{'s' * (layout.parts > 1)}{', layers checkpointed' * layout.checkpointed}"


def work() -> None:
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        row = {"pair": kind.name, "tokens": kind.tokens, "patches": kind.patches, "kB stored": kind.stored / 1e3}
        flops = {f"GFLOP, {model.name}": kind.flops(model) / 1e9 for model in (SMALL, LARGE)}
        rows.append({**row, **flops, "pairs/s a core": kind.a_core})
    table("What a pair is", rows)
    shapes = [(m.name, m.text.parameters / 1e6, m.rest / 1e6, m.parameters / 1e6) for m in (SMALL, LARGE)]
    table("Parameters, M", [dict(zip(("model", "L, layers", "R, the rest", "all"), shape, strict=True)) for shape in shapes])


def step_row(model: Model, gpus: int, batch: int, gpu: str, *, mended: bool = False) -> dict[str, object]:
    """A step of text pairs as a row of a table."""
    found = best(model, TEXT, gpus, batch, gpu, mended=mended)
    assert found is not None
    layout, step = found
    useful = TEXT.flops(model) * batch / gpus / step.total / BF16_PEAK
    used = sum(memory(model, TEXT, gpus, batch, layout).values()) / GIB
    row: dict[str, object] = {"GPUs": gpus, "batch": batch, "layout": told(layout), "GiB": used}
    row |= {f"GB {name}": size / 1e9 for name, size in step.bytes.items()}
    row |= {"ms encoder": 1e3 * step.seconds["encoder"], "wire beside it": 1e3 * step.beside}
    row |= {
        "waiting": 1e3 * step.seconds["weights and gradients"],
        "objective": 1e3 * (step.total * step.share("vectors on the wire", "passes over all vectors", "loss")),
    }
    row |= {"steps/s": 1 / step.total, "pairs/s": batch / step.total, "MFU, %": 100 * useful}
    return row | {"days": NUM_PAIRS / batch * step.total / DAY}


def steps() -> None:
    for model in (SMALL, LARGE):
        rows = [step_row(model, gpus, batch, "H100") for gpus in GPUS for batch in BATCHES]
        table(f"{model.name}, text pairs, H100: a step, and the days of a billion pairs", rows)
    for gpu, mended in (("H200", False), ("H100", True), ("H200", True)):
        rows = [step_row(LARGE, gpus, BATCHES[-1], gpu, mended=mended) for gpus in GPUS]
        table(f"{LARGE.name}, text pairs, {gpu}{', FSDP2 as it could be' if mended else ''}", rows)


def memories() -> None:
    rows: list[dict[str, object]] = []
    for model, gpus, gpu in (
        (SMALL, 64, "H100"),
        (SMALL, 512, "H100"),
        (LARGE, 64, "H100"),
        (LARGE, 64, "H200"),
        (LARGE, 512, "H200"),
    ):
        found = best(model, TEXT, gpus, BATCHES[-1], gpu)
        assert found is not None
        parts = {name: size / GIB for name, size in memory(model, TEXT, gpus, BATCHES[-1], found[0]).items()}
        rows.append(
            {"model": model.name, "GPUs": f"{gpus} {gpu}", "layout": told(found[0]), **parts, "all": sum(parts.values())}
        )
    table("GiB of one GPU, batches of 65,536 text pairs", rows)


def kinds(gpus: int = 256, batch: int = 32_768) -> None:
    rows: list[dict[str, object]] = []
    for model in (SMALL, LARGE):
        for kind in KINDS:
            found = best(model, kind, gpus, batch, "H200")
            if found is None:
                rows.append({"model": model.name, "pair": kind.name, "layout": "does not fit"})
                continue
            layout, step = found
            rate = batch / step.total
            data = {"GB/s in all": rate * kind.stored / 1e9, "reads/s in all": rate * kind.members}
            cores = {"cores a GPU": rate / gpus / kind.a_core, "TB of a billion": NUM_PAIRS * kind.stored / 1e12}
            time = {"s a step": step.total, "pairs/s": rate, "days": NUM_PAIRS / rate / DAY}
            rows.append({"model": model.name, "pair": kind.name, "layout": told(layout), **time, **data, **cores})
    table(f"Kinds of pairs, {gpus} H200, batch {batch:,}; a billion of each", rows)


def indexes() -> None:
    rows: list[dict[str, object]] = []
    for kind in (TEXT, IMAGE):
        for per_shard in (EXAMPLES_PER_SHARD, 100 * EXAMPLES_PER_SHARD):
            size, shards = NUM_PAIRS * (EXAMPLE_ROW + KEY + kind.members * MEMBER_ROW), NUM_PAIRS // per_shard
            rows.append(
                {
                    "pairs": kind.name,
                    "examples a shard": per_shard,
                    "shards": shards,
                    "tables, GB": size / 1e9,
                    "hashing them when a rank opens, s": size / HASH,
                    "manifest, MB (at most 268)": shards * SHARD_ENTRY / 1e6,
                    "stat calls of 512 ranks, min": 2 * shards * max(GPUS) / METADATA / 60,
                    "TB fetched by 64 nodes in the windowed order": 64 * NUM_PAIRS * kind.stored / 1e12,
                }
            )
    table("The index of a billion pairs", rows)
    ids: list[dict[str, object]] = [
        {
            "batch": batch,
            "ms a step and rank": 1e3 * FEISTEL * batch,
            "MB read for lengths, table not cached": batch * PAGE / 1e6,
        }
        for batch in BATCHES
    ]
    table("Ids of a step: every rank makes those of the whole batch (nothing is stored; a stored order would take 8 GB)", ids)


def checkpoints() -> None:
    rows: list[dict[str, object]] = []
    for model in (SMALL, LARGE):
        for gpus in (1, 64, 512):
            sharded = gpus > 1
            size, write, resume, node = checkpoint(model, gpus, sharded=sharded)
            row = {"model": model.name, "GPUs": gpus, "written by": "all ranks" if sharded else "one", "GB": size / 1e9}
            node = node if sharded else size
            between, lost = 1 / (gpus * FAILURES), EVERY_MINUTES * 30 + RESTART + resume
            row |= {"s to write": write, "s to go on": resume, "GB of a node's memory for that": node / 1e9}
            row |= {"days between failures": between / DAY, "min lost to one": lost / 60}
            rows.append({**row, "% of the run": 100 * (write / (EVERY_MINUTES * 60) + lost / between)})
    table("Checkpoints every 30 minutes, and failures", rows)


def stops() -> None:
    """Where a design choice passes 5 and 20 % of a step, GPUs doubled at 65,536 text pairs, or the batch at 512."""
    many, batches, batch = [8 * 2**n for n in range(11)], [2**n for n in range(12, 23)], BATCHES[-1]
    ddp, fsdp = Layout(False, 1, False), Layout(True, 1, False)
    rows: list[dict[str, object]] = []

    def row(choice: str, what: str, values: list[int], shares: list[float]) -> None:
        at = [first(values, [share >= limit for share in shares]) for limit in (0.05, 0.20)]
        rows.append({"choice": choice, "counted in": what, "5 % at": at[0], "20 % at": at[1]})

    for model in (SMALL, LARGE):
        layout = ddp if model is SMALL else fsdp
        by_gpus = [step_of(model, TEXT, gpus, batch, layout) for gpus in many]
        by_batch = [step_of(model, TEXT, 512, size, layout) for size in batches]
        row(f"all vectors to all ranks, {model.name}", "GPUs", many, [step.share("vectors on the wire") for step in by_gpus])
        row(
            f"passes over all vectors on every rank, {model.name}",
            "GPUs",
            many,
            [s.share("passes over all vectors") for s in by_gpus],
        )
        row(f"own rows by all columns in fp32, {model.name}", "batch", batches, [step.share("loss") for step in by_batch])
        extra = [spread_out(batch) / (spread_out(batch) + step.total) for step in by_gpus]
        row(f"spread-out term on every rank, {model.name}", "GPUs", many, extra)
        flat = [step_of(model, TEXT, gpus, batch, fsdp).share("weights and gradients") for gpus in many]
        row(f"FSDP2 over all ranks, one part, {model.name}", "GPUs", many, flat)
        all_rows = [6 * size**2 * WIDTH / (FP32_SHARE * FP32_PEAK) for size in batches]
        shares = [seconds / (seconds + step.total) for seconds, step in zip(all_rows, by_batch, strict=True)]
        row(f"`negatives: all`, every rank makes all rows, {model.name}", "batch", batches, shares)
        ids = [FEISTEL * batch / step.total for step in by_gpus]
        row(f"ids of the whole batch, one worker, {model.name}", "GPUs", many, ids)
    table("Where a choice passes a share of a step (layers not checkpointed, memory set aside)", rows)
    limits: list[dict[str, object]] = []
    for gpu, size in MEMORY.items():
        room = USABLE * size
        limits.append(
            {
                "GPU": gpu,
                "FSDP2, parts: parameters in layers, B": (room - 8 * LARGE.rest - VECTORS_ALIVE * batch * WIDTH * 4) / 8 / 1e9,
                "FSDP2, one part, B": (room - 8 * LARGE.rest - VECTORS_ALIVE * batch * WIDTH * 4) / 2 / 1e9,
                "DDP, B in all": room / 22 / 1e9,
                "vectors: a fifth of memory at a batch of": int(0.2 * size / (VECTORS_ALIVE * WIDTH * 4)),
            }
        )
    table("What fits whatever the number of GPUs, activations set aside", limits)


def main() -> None:
    for show in (work, steps, memories, kinds, indexes, checkpoints, stops):
        show()


if __name__ == "__main__":
    main()
