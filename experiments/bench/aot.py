"""Compiles every kernel configuration of the loss for sm_80 and sm_90 without a GPU, and reads what came out.

    python experiments/bench/aot.py [--json FILE]

Prints registers, bytes of stack (spills), shared memory, tensor-core instructions and atomics; fails where a limit is broken.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from kernels import fused, tiles

MAX_STACK_BYTES = 64
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
ARCHITECTURES = (80, 90)
DTYPES = ("bf16", "fp16")  # of vectors; fp32 runs the same code without tensor cores
TILE = {"BLOCK_M": tiles.BLOCK_M, "BLOCK_K": tiles.BLOCK_K}
SAME_EVERYWHERE = {"BLOCK_M", "BLOCK_K", "GROUP"}
VECTORS = {"x", "y", "query", "column", "passage", "original_query"}
OPERANDS = {("pull_rows", "column"), ("pull_columns", "query")}  # multiplied with W, which is bf16 beside fp16 vectors too
POINTERS = {"weight": "*bf16", "edges": "*i32", "tile_prefix": "*i32", "query_id": "*i64", "passage_id": "*i64"}
POINTERS |= {"negative_row": "*i64", "negative_id": "*i64"}
GIVEN_BY_FLAG = {"HAS_QUERY_ID": "query_id", "HAS_PASSAGE_ID": "passage_id", "SEE_ALL": "negative_row"}
GIVEN_BY_FLAG |= {"HAS_NEGATIVE_ID": "negative_id", "HAS_MARGIN": "limit"}
INTEGERS = {"num_rows", "width", "num_prefixes", "first_y", "first_row", "chunk_rows", "num_passages", "num_columns", "offset"}
INTEGERS |= {"num_tiles", "rows_padded", "columns_padded"}
MULTIPLES_OF_16 = {"width", "rows_padded", "columns_padded"}


COLUMNS = ("registers", "stack", "shared", "tensor_core", "atomics", "instructions")
HEADER = f"{'kernel':<13} {'vectors':<8} {'constants':<79} {'sm':>3} {' '.join(COLUMNS)}"


class Configuration(NamedTuple):
    """One way in which a kernel is launched: dtypes of vectors and gradients, constants, whether it multiplies matrices."""

    kernel: str
    vectors: str
    constants: dict
    num_warps: int
    has_products: bool
    gradient: str = ""


def configurations() -> Iterator[Configuration]:
    warps = fused.LAUNCH["num_warps"]
    for vectors in DTYPES:
        for has_y in (True, False):
            yield Configuration("prologue", vectors, {"HAS_Y": has_y, "BLOCK_R": 16, "BLOCK_C": tiles.BLOCK_K}, 4, False)
        for ids, see_all, margin in itertools.product((True, False), repeat=3):
            flags = {"HAS_QUERY_ID": ids, "HAS_PASSAGE_ID": ids, "SEE_ALL": see_all, "HAS_NEGATIVE_ID": ids and see_all}
            flags["HAS_MARGIN"] = margin
            yield Configuration("scores", vectors, {**flags, **TILE, "BLOCK_N": tiles.BLOCK_N, "GROUP": 8}, warps, True)
        for block_n in (tiles.BLOCK_N, tiles.BLOCK_K):
            for gradient in ("bf16", "fp32") if vectors == "bf16" else ("fp32",):
                yield Configuration("pull_rows", vectors, {**TILE, "BLOCK_N": block_n}, warps, True, gradient)
            for first, last in itertools.product((True, False), (True, False)):
                flags = {"FIRST": first, "LAST": last}
                gradient = "bf16" if vectors == "bf16" else "fp32"
                yield Configuration("pull_columns", vectors, {**flags, **TILE, "BLOCK_N": block_n}, warps, True, gradient)
    for has_own in (True, False):
        yield Configuration("close", "bf16", {"HAS_OWN": has_own, "BLOCK_R": 32}, 1, False)
    yield Configuration("weigh", "bf16", {"BLOCK_M": tiles.BLOCK_M, "HALF": tiles.HALF_N}, warps, False)


def build(configuration: Configuration, architecture: int) -> dict[str, int]:
    """Registers, stack, shared memory and instructions of one compiled kernel."""
    kernel = getattr(tiles, configuration.kernel)
    constants = dict(configuration.constants)
    constants |= {name: None for flag, name in GIVEN_BY_FLAG.items() if constants.get(flag) is False}
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif (configuration.kernel, name) in OPERANDS:
            signature[name] = "*bf16"
        elif name in VECTORS:
            signature[name] = f"*{configuration.vectors}"
        elif name == "gradient":
            signature[name] = f"*{configuration.gradient}"
        else:
            signature[name] = POINTERS.get(name, "*fp32")
        if signature[name].startswith("*") or name in MULTIPLES_OF_16:
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, divisible)
    options = fused.LAUNCH | {"num_warps": configuration.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.M)
    return {
        "registers": _number("REG", usage),
        "stack": _number("STACK", usage) + _number("LOCAL", usage),
        "shared": compiled.metadata.shared,
        "tensor_core": sum(op in ("HGMMA", "HMMA") for op in opcodes),
        "atomics": sum(op in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG") for op in opcodes),
        "instructions": len(opcodes),
    }


def _number(field: str, usage: str) -> int:
    return int(re.findall(rf"{field}:(\d+)", usage)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the kernels for sm_80 and sm_90")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    rows, broken = [], []
    tasks = list(itertools.product(configurations(), ARCHITECTURES))
    print(HEADER)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (configuration, architecture), found in zip(tasks, pool.map(build, *zip(*tasks, strict=True)), strict=True):
            constants = {
                name: value for name, value in configuration.constants.items() if name not in SAME_EVERYWHERE and value
            }
            shown = " ".join(name if value is True else f"{name}={value}" for name, value in constants.items())
            name = f"{configuration.kernel:<13} {configuration.vectors:<8} {shown:<79} {architecture:>3}"
            print(name, *(f"{found[column]:>{len(column)}}" for column in COLUMNS))
            rows.append({**configuration._asdict(), "architecture": architecture, **found})
            fits = (
                found["stack"] <= MAX_STACK_BYTES and found["shared"] <= MAX_SHARED_BYTES[architecture] and not found["atomics"]
            )
            if not fits or configuration.has_products != (found["tensor_core"] > 0):
                broken.append(" ".join(name.split()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(broken)} beyond a limit", *broken, sep="\n  ")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
