"""Every benchmark at every prefix: results.json, report.html, and what comparing two runs needs.

<out>/results.json    a row for each benchmark, metric, prefix and stored form; see `Judge.results`
<out>/values.npz      the values of each query, see `findings.Findings`; for `conf=compare`
<out>/space.json      the embedding space's health, see `space.health_rows`
<out>/report.html     all of it as a page
<out>/.vectors        while it runs: what is embedded, so that a run that was stopped goes on
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from datamodules.files import replace_file
from datamodules.job import digest_of
from datamodules.tasks import BenchmarkSpec
from lightning_modules.encoder.checkpoint import load_encoder, read_provenance, trainable
from lightning_modules.encoder.embedder import ComputeConfig, device_named, probe
from lightning_modules.encoder.prepacked import prepack
from lightning_modules.findings import Findings
from lightning_modules.judge import Judge
from lightning_modules.objective.gather import this_rank
from lightning_modules.precision import Dtype
from lightning_modules.report import results_table, write_report
from lightning_modules.results import write_values
from lightning_modules.suites import SuiteSpec, judge_suites, require_mteb


def evaluate(
    checkpoint: str,
    out: str,
    *,
    root: str | None = None,
    benchmarks: dict[str, BenchmarkSpec] = {},  # noqa: B006 (never changed)
    prefixes: list[int] | None = None,
    dtypes: list[Dtype] = ["float32"],  # noqa: B006 (never changed)
    without_prompts: bool = False,
    suites: SuiteSpec | None = None,
    runs: list[str] | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
    batch_size: int = 64,
    num_workers: int = 1,
    device: str = "auto",
) -> None:
    """Judge an encoder on every benchmark at every prefix, and write and print what was found.

    Under torchrun all processes share the work. A run that was stopped goes on with the vectors that it had made.

    Args:
        checkpoint: An encoder's folder, or one of sentence-transformers.
        out: Folder for results.json, values.npz, space.json and report.html.
        root: Folder that the benchmarks' shards lie in.
        benchmarks: Name (`<set>/<query modality>-<target modality>`) to what is measured.
        prefixes: Widths to judge; None means those the encoder was trained with.
        dtypes: How candidates are stored: float32, int8, binary, binary_rescored.
        without_prompts: Judge benchmarks that have prompts once more without, at full width.
        suites: Benchmarks and tasks of mteb; their results lie in `<out>/mteb` too, in mteb's format.
        runs: Folders of training runs whose curves the report shows.
        compute: How a batch goes through the encoder: memory and time.
        batch_size: Examples embedded at once.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda`, or `auto` for the best there is.

    Raises:
        ValueError: Nothing to evaluate; benchmarks without root; see `Judge.results`.
    """
    began = time.perf_counter()
    curves = _curves(runs or [])
    if not benchmarks and suites is None:
        raise ValueError("there is no benchmark to evaluate; include benchmarks/world or benchmarks/mteb, or give benchmarks")
    if benchmarks and root is None:
        raise ValueError("root is missing: the folder that the benchmarks' shards lie in")
    if suites is not None:
        require_mteb()
    encoder, processor = load_encoder(checkpoint)
    probe(encoder)
    encoder.use(compute)
    prepack(encoder)
    provenance = read_provenance(checkpoint)
    sizes = [dataclasses.asdict(config) for config in (encoder.config, processor.config)]
    name = digest_of(provenance["sha256"], json.loads(json.dumps(sizes, default=str)))
    with _processes(device_named(device)) as own_device:
        vectors = Path(out) / ".vectors"
        judge = Judge(
            encoder,
            processor,
            Path(root or "."),
            batch_size=batch_size,
            num_workers=num_workers,
            device=own_device,
            store=(vectors, name),
        )
        found = (
            judge.results(benchmarks, prefixes, dtypes=dtypes, without_prompts=without_prompts) if benchmarks else Findings()
        )
        if this_rank() > 0:
            return
    if suites is not None:
        found.rows.extend(
            judge_suites(
                suites,
                encoder,
                processor,
                Path(out),
                model_name=Path(checkpoint).resolve().name,
                revision=provenance["sha256"],
                widths=encoder.config.prefixes if prefixes is None else prefixes,
                batch_size=batch_size,
                device=own_device,
            )
        )
    write_values(Path(out) / "values.npz", found.values)
    replace_file(Path(out) / "space.json", json.dumps(found.space, indent=1))
    replace_file(Path(out) / "results.json", json.dumps(found.rows, indent=1))
    facts = {
        "checkpoint": checkpoint,
        "stage": str(provenance.get("stage", "")),
        "steps": str(provenance.get("steps", "")),
        "parameters": f"{trainable(encoder):,}",
        "weights (SHA-256)": provenance["sha256"][:16],
        "evaluated in": f"{time.perf_counter() - began:.0f} s",
    }
    write_report(
        Path(out) / "report.html",
        title=f"Polyphony: {checkpoint}",
        rows=found.rows,
        curves=curves,
        neighbours=found.neighbours,
        space=found.space,
        facts={name: value for name, value in facts.items() if value},
    )
    if vectors.exists():  # nothing was embedded where no benchmark is supported
        shutil.rmtree(vectors)
    console = Console(width=None if os.isatty(1) else 120)
    console.print(f"results in {Path(out) / 'results.json'}, report in {Path(out) / 'report.html'}")
    console.print(results_table(found.rows))


@contextmanager
def _processes(device: str) -> Iterator[str]:
    """This process among those that torchrun began, if it did; yields its device."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _curves(runs: list[str]) -> dict[str, Path]:
    """The newest metrics.csv of each run."""
    curves = {}
    for run in runs:
        found = sorted(Path(run).glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
        if not found:
            raise ValueError(
                f"no curves in {run}: it has no logs/version_*/metrics.csv; name folders of training runs in `runs`"
            )
        curves[Path(run).name] = found[-1]
    return curves
