"""`conf=generate`: an LLM writes what records lack: queries for passages, reviews, edits of code, captions of pictures.

Source: FRet (Gecko, arXiv 2403.20327), SWIM-IR (arXiv 2311.05800), Gemini Embedding (arXiv 2503.07891). What is shown and what
becomes of the answers is said by the prompt's file, see `datamodules.curation.prompts` and `.synthesis`.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from datamodules.curation.prompts import UnusableAnswerError, Value, read_prompt
from datamodules.curation.synthesis import check_makes, draw, examples_of, needed_of, values_of
from datamodules.job import Aside, Job, array_task, made_from
from datamodules.sample import BadExampleError, Example, Item, key_of
from datamodules.shards import Split
from lightning_modules.configuration import CONF
from lightning_modules.llm.answers import Answers, Budget
from lightning_modules.llm.asking import ask
from lightning_modules.llm.interface import LLM, Sampling


def generate(
    prompt: str,
    llm: LLM,
    out: str,
    *,
    source: str | None = None,
    num_records: int | None = None,
    column: Literal["query", "target"] = "target",
    splits: dict[str, str] | None = None,
    samples: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    attempts: int = 3,
    seed: int = 0,
    budget: Budget = Budget(),  # noqa: B008 (frozen)
    answers: str | None = None,
    block_size: int = 1000,
    array_index: int | None = None,
    array_size: int | None = None,
) -> None:
    """Have an LLM answer a prompt about every record of a split, and write a split of what that makes.

    Answers that are no JSON, do not fit the prompt's schema or fail its checks are asked for anew with another seed, then the
    record is set aside with its cause. Killed at any time, the command goes on when it is given again; answers are kept as they
    come and asked once. Records with no content, and those with the content of an earlier one of their block, are set aside.

    Args:
        prompt: A name below conf/prompts, or the path of a file ending in `.yaml`.
        llm: Who answers.
        out: Folder of the split that is written; what was begun there with other settings is not gone on with.
        source: Folder of the split whose records are shown; None asks `num_records` times without one.
        num_records: The first so many records; None all. Without a source, how often is asked.
        column: What `{passage}` is, and what a prompt's `source` puts into examples.
        splits: Name of a prompt's field to the folder of a split that it is drawn from: persons, products, films.
        samples: How often each record is shown, with other draws and seeds.
        sampling: How answers are drawn.
        attempts: How often an answer of no use is asked for, the first time included.
        seed: Of draws and answers.
        budget: What the answers may cost, for each task of an array.
        answers: Folder where answers are kept; None is `<out>/answers`. Another job of the same block size may take them
            up there after this one; what they cost counts in its budget too.
        block_size: Records of a block: held in memory, written as one shard, shared out to the tasks of an array.
        array_index: Which task this is, from 0; None takes Slurm's, or does all.
        array_size: Of how many.

    Raises:
        ValueError: The prompt or the source does not fit, the folder is of another making, or the budget is spent.
        OSError: The LLM cannot be reached, or the disk is full.
    """
    console = Console()
    shown = read_prompt(prompt_file(prompt))
    records = None if source is None else Split(source)
    drawn = {name: Split(folder) for name, folder in (splits or {}).items()}
    if records is None and num_records is None:
        raise ValueError("give source, the split whose records are shown, or num_records, how often to ask without one")
    total = num_records or 0 if records is None else min(len(records), num_records or len(records))
    if min(total, samples, attempts) < 1:
        raise ValueError(f"num_records is {num_records}, samples {samples}, attempts {attempts}; each must be at least 1")
    known = {"number"} if records is None else _names(records, range(min(total, block_size)), column)
    check_makes(shown, known | drawn.keys())
    needed = needed_of(shown, drawn)
    made_by = {
        "stage": "generate",
        "prompt": shown.name,
        "prompt_sha256": shown.sha256,
        "llm": llm.name,
        **({} if records is None else made_from(str(source), records)),
        "splits": {name: split.digest for name, split in drawn.items()},
        "column": column,
        "samples": samples,
        "sampling": asdict(sampling),
        "attempts": attempts,
        "seed": seed,
    }
    job = Job(out, made_by, total, block_size, array_task(array_index, array_size))
    kept = Answers(Path(answers or job.out / "answers"), llm, budget, job.own_blocks)
    for block in job.blocks(console):
        counts, aside, asked = Counter[str](), list[Aside](), list[tuple[str, dict[str, Value], dict[str, Any]]]()
        for key, values in _records(records, job.positions(block), column, needed, counts, aside):
            for sample in range(samples):
                own = f"{key}-{sample}" if samples > 1 else key
                more, told = draw(shown, drawn, seed, own)
                asked.append((own, values | more, {"draws": told} if told else {}))
        with kept.of_block(block) as log:
            values = [values for _, values, _ in asked]
            found = ask(shown, values, [key for key, *_ in asked], log, sampling=sampling, seed=seed, attempts=attempts)
        examples: list[Example] = []
        made = {"by": "generate", "prompt": f"{shown.name}@{shown.sha256[:16]}", "llm": llm.name, "seed": seed}
        for (key, values, told), answer in zip(asked, found, strict=True):
            try:
                if isinstance(answer, UnusableAnswerError):
                    raise answer
                origin = {"by": "source", "split": source, "key": str(values.get("key", ""))}
                examples += examples_of(shown, key, values, answer, made | told, origin)
                counts["answers used"] += 1
            except UnusableAnswerError as error:
                aside.append(Aside(key, error.cause, str(error)))
        counts["examples"] += len(examples)
        job.write(block, examples, counts, aside)
    job.finish(console)
    console.print(f"{kept.spending} by {llm.name}", soft_wrap=True)


def prompt_file(name: str) -> Path:
    """The file of a prompt that is named, or whose path is given."""
    return Path(name) if name.endswith(".yaml") else CONF / "prompts" / f"{name}.yaml"


def _names(split: Split, positions: range, column: str) -> set[str]:
    """What any of some records has that a prompt can name."""
    names: set[str] = set()
    for position in positions:
        with suppress(BadExampleError, UnusableAnswerError):
            names |= values_of(split.read(position), column).keys()
    if not names:
        raise ValueError(f"none of the first {len(positions)} records of {split.folder} has a {column} with any content")
    return names


def _records(
    split: Split | None, positions: range, column: str, needed: set[str], counts: Counter[str], aside: list[Aside]
) -> Iterator[tuple[str, dict[str, Value]]]:
    """Key and values of records that can be shown, each content once."""
    seen: set[int] = set()
    for position in positions:
        counts["records"] += 1
        if split is None:
            yield f"{position:09d}", {"number": position}
            continue
        key = key_of(split.key(position))
        try:
            values = values_of(split.read(position), column, needed)
        except (BadExampleError, UnusableAnswerError) as error:
            aside.append(Aside(key, error.cause, str(error)))
            continue
        passage = values["passage"]
        assert isinstance(passage, Item)
        if passage.content_id in seen:
            aside.append(Aside(key, "duplicate passage"))
            continue
        seen.add(passage.content_id)
        yield key, values
