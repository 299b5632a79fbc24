"""The data factory's stages: records a second and peak memory over more and more short records, and backends beside each other.

    python experiments/bench/factory.py [--records 10000,100000,1000000] [--backends 256] [--out FILE]

Each stage runs in a process of its own, over records of one sentence, with an LLM that answers at once: what is measured is
what the stages do around an LLM. Peak memory is what a process held at most, imports included and mapped files apart; the row
of 1,000 records says how much imports are. `mine` gets vectors by a text model of one narrow layer and searches exactly.
`--backends` asks a small random model in this process (2 layers, 128 wide), and a local server that takes 0.1 s for each, for
as many answers, and says what a second brings.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from stream import CONSOLE, numbers, show  # puts the project on the path too

from datamodules.assemble import assemble
from datamodules.curation.prompts import Message
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.sample import Example, Part, text_item
from datamodules.shards import write_split
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import save_encoder
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig
from lightning_modules.generate import generate
from lightning_modules.llm.interface import LLM, Answer, Request, Sampling
from lightning_modules.mine import mine
from lightning_modules.rate import RaterSpec, rate

TEXT = {
    "model_type": "qwen3",
    "vocab_size": 400,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
NARROW = {**TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
SMALL = {**TEXT, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
WORDS = ["oak", "ash", "elm", "fir", "yew", "bay", "box", "fig", "sea", "sky"]


class Instant(LLM):
    """Answers at once what a query for a passage, or a rating of one, looks like."""

    @property
    def name(self) -> str:
        return "instant"

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        for number, request in enumerate(requests):
            said = (
                {"query": f"who asks {request.seed}"} if request.messages[-1].text[:2] == "P:" else {"score": request.seed % 5}
            )
            yield number, Answer(json.dumps(said), input_tokens=20, output_tokens=8, model="instant")


def sentences(num_records: int) -> Iterator[Example]:
    """Records of one sentence, all different."""
    for n in range(num_records):
        words = " ".join(WORDS[(n // 10**place + place) % 10] for place in range(8))
        yield Example(f"r{n}", target=text_item(f"record {n}: {words}"))


def prompts(root: Path) -> tuple[str, str]:
    """Two files of prompts: to generate, to rate."""
    asked = 'user: "P: {passage}"\nanswer: {query: {type: string}}\nmakes: {examples: [{query: "{query}", target: source}]}'
    (root / "ask.yaml").write_text(asked)
    (root / "rate.yaml").write_text('user: "Q: {query}"\nanswer: {score: {type: integer}}')
    return str(root / "ask.yaml"), str(root / "rate.yaml")


def stages(root: Path, num_records: int) -> dict[str, Callable[[], object]]:
    """What each does, in order."""
    ask, judge = prompts(root)
    at = {name: str(root / name) for name in ("passages", "generated", "rated", "mined", "assembled")}
    return {
        "write": lambda: write_split(at["passages"], sentences(num_records)),
        "generate": lambda: generate(ask, Instant(), at["generated"], source=at["passages"]),
        "rate": lambda: rate(at["generated"], {"quality": RaterSpec(judge, at_least=0)}, Instant(), at["rated"]),
        "assemble": lambda: assemble(at["rated"], at["assembled"]),
    }


def own_mib() -> float:
    """MiB that the process holds, without the pages of mapped files, which the kernel takes back when it needs them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measured(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds and peak MiB of a call in a process of its own."""

    def child(pipe: Any) -> None:
        ended, peaks = threading.Event(), [0.0]

        def watch() -> None:
            while not ended.wait(0.02):
                peaks.append(max(peaks.pop(), own_mib()))

        watching = threading.Thread(target=watch)
        watching.start()
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        ended.set()
        watching.join()
        pipe.send((seconds, peaks[0]))

    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("a stage failed")
    return receiver.recv()


def scale(sizes: list[int]) -> list[dict[str, Any]]:
    """A row for each stage and number of records."""
    rows = []
    for num_records in sizes:
        root = Path(tempfile.mkdtemp(prefix="factory-"))
        for name, run in stages(root, num_records).items():
            seconds, peak = measured(run)
            rows.append({"stage": name, "records": num_records, "records/s": num_records / seconds, "peak MiB": peak})
            CONSOLE.print(rows[-1])
        shutil.rmtree(root)
    return rows


def mining(num_records: int, most_queries: int | None) -> dict[str, Any]:
    """A row for the neighbours of as many queries, or fewer, in so many targets."""
    root = Path(tempfile.mkdtemp(prefix="factory-"))
    write_split(root / "pairs", (Example(e.key, text_item(f"q {e.key}"), e.target) for e in sentences(num_records)))
    tokenizer = train_tokenizer([str(e.target and e.target.parts[0].data) for e in sentences(1000)], 400)
    encoder = Embedder(EncoderConfig(BackboneConfig(text=dict(NARROW)), embedding_dim=32, prefixes=(32,)))
    save_encoder(root / "encoder", encoder, ComposedProcessor(ProcessorConfig(vocab_size=400), tokenizer), provenance={})
    num_queries = num_records if most_queries is None else min(num_records, most_queries)
    asking = str(root / "asking")
    write_split(asking, (Example(e.key, text_item(f"q {e.key}"), e.target) for e in sentences(num_queries)))
    where, out = str(root / "pairs"), str(root / "mined")
    compute = ComputeConfig(max_tokens=16384)
    seconds, peak = measured(
        lambda: mine(str(root / "encoder"), asking, where, out, compute=compute, num_workers=0, device="cpu")
    )
    shutil.rmtree(root)
    return {"stage": "mine", "records": num_records, "queries": num_queries, "seconds": seconds, "peak MiB": peak}


def backends(num_answers: int) -> list[dict[str, Any]]:
    """A row for each backend: answers and tokens a second."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from llm_server import Reply, ScriptedServer

    from lightning_modules.llm.local import Local
    from lightning_modules.llm.server import Server

    root = Path(tempfile.mkdtemp(prefix="factory-"))
    texts = [str(example.target and example.target.parts[0].data) for example in sentences(num_answers)]
    AutoModelForCausalLM.from_config(Qwen3Config(**{k: v for k, v in SMALL.items() if k != "model_type"})).save_pretrained(root)
    train_tokenizer(texts[:1000], 400).save_pretrained(root)

    def row(name: str, llm: LLM, **more: Any) -> dict[str, Any]:
        requests = [Request((Message("user", (Part("text", text),)),), Sampling(max_tokens=32), **more) for text in texts]
        list(llm.answers(requests[:2]))
        began = time.perf_counter()
        found = [answer for _, answer in llm.answers(requests)]
        seconds, tokens = time.perf_counter() - began, sum(answer.input_tokens + answer.output_tokens for answer in found)
        return {"backend": name, "answers/s": len(found) / seconds, "tokens/s": tokens / seconds}

    rows = [
        row(f"in this process, {what}, {size:,} tokens a batch", Local(str(root), max_batch_tokens=size, device="cpu"), **more)
        for what, more in (("32 tokens written", {}), ("likelihood", {"continuation": "who asks"}))
        for size in (256, 4096)
    ]
    with ScriptedServer(lambda body, number: Reply(delay=0.1)) as server:
        rows += [row(f"server, {n} at once", Server("a-model", server.base_url, concurrency=n)) for n in (1, 16, 64)]
    shutil.rmtree(root)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", default="1000,10000,100000,1000000", help="how many; none leaves this out")
    parser.add_argument("--mined", default="1000,10000", help="how many for mine; none leaves this out")
    parser.add_argument("--queries", type=int, help="most that mine asks; as many as records where it is not given")
    parser.add_argument("--backends", type=int, default=256, help="answers of each backend; 0 leaves this out")
    parser.add_argument("--out", help="write the figures here as well")
    wanted = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    if wanted.records or wanted.mined:
        found["stages"] = scale(numbers(wanted.records)) + [mining(n, wanted.queries) for n in numbers(wanted.mined)]
        show("stages, with an LLM that answers at once", found["stages"])
    if wanted.backends:
        found["backends"] = backends(wanted.backends)
        show("backends", found["backends"])
    if wanted.out:
        Path(wanted.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
