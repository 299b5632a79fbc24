"""What a step holds in memory against the size of its batch: whole, in parts (GradCache), and in parts with layer checkpoints.

    python experiments/bench/memory.py [--tokens 1024] [--batch-sizes 64,256,1024] [--out FILE]

A step embeds random texts of 4 to 60 tokens with a BERT of 6 layers, 384 wide, and takes loss and gradients over the prefixes
96/192/384; each in a process of its own. Memory is the peak beyond what was held before, gradients of the weights included
(they were made once before); the batch's own inputs are not. One thread: the allocator keeps a heap for each. Large blocks go
back to the system as soon as they are freed (MALLOC_MMAP_THRESHOLD_): what is measured is what a step holds, not what glibc
keeps of what it held.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from loss import peak_bytes
from stream import CONSOLE, numbers, show

from datamodules.processors.inputs import Inputs
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig
from lightning_modules.objective.objective import Objective, ObjectiveConfig

BERT = {
    "model_type": "bert",
    "vocab_size": 8000,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
PREFIXES = (96, 192, 384)
AS_HELD = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
WAYS = ("whole", "in parts", "in parts, layers checkpointed")


def texts(number: int, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 61, (number,), generator=random)
    return Inputs(torch.randint(2, BERT["vocab_size"], (int(lengths.sum()),), generator=random), lengths)


def measure(way: str, batch_size: int, tokens: int) -> dict[str, float]:
    """MiB and seconds of a step; the first one, of a small batch, makes the gradients' memory."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = Embedder(EncoderConfig(BackboneConfig(text=BERT), PREFIXES[-1], PREFIXES)).train()
    encoder.use(ComputeConfig(max_tokens=None if way == "whole" else tokens, checkpoint_layers="layers" in way))
    objective = Objective(ObjectiveConfig(), prefixes=PREFIXES, embedding_dim=PREFIXES[-1])

    def step(inputs: Inputs) -> None:
        query, target = encoder(inputs).chunk(2)
        ids = torch.arange(len(query))
        objective(query, target, query_id=ids, target_id=ids).total.backward()

    step(texts(8, seed=1))
    inputs, start = texts(2 * batch_size, seed=0), time.perf_counter()
    return {"MiB": peak_bytes(lambda: step(inputs)) / 2**20, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="model.compute.max_tokens of the parts")
    parser.add_argument("--batch-sizes", type=numbers, default=[64, 256, 1024], help="pairs")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "PAIRS"), help="measure one of them here and print it as JSON")
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.tokens)))
        return
    rows = []
    for batch_size in arguments.batch_sizes:
        for way in WAYS:
            with CONSOLE.status(f"{batch_size} pairs, {way}"):
                command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--one", way, str(batch_size)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | AS_HELD)
            rows.append({"pairs": batch_size, "way": way, **json.loads(done.stdout.splitlines()[-1])})
    show(f"peak memory of a step, at most {arguments.tokens} tokens in a part", rows)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"torch": torch.__version__, "tokens": arguments.tokens, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
