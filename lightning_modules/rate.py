"""`conf=rate`: an LLM judges examples, or the candidates that were mined for them; those below a threshold are set aside.

Source: the auto-rater of Gemini Embedding (arXiv 2503.07891, section 4.2); graded relevance and query likelihood of Gecko
(arXiv 2403.20327, section 3.2).
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from datamodules.curation.candidates import candidates_of, require_corpus
from datamodules.curation.prompts import Prompt, UnusableAnswerError, Value, read_prompt
from datamodules.curation.synthesis import values_of
from datamodules.job import Aside, Job, array_task, made_from
from datamodules.sample import BadExampleError, Example, key_of
from datamodules.shards import Split
from lightning_modules.generate import prompt_file
from lightning_modules.llm.answers import Answers, BlockAnswers, Budget
from lightning_modules.llm.asking import ask
from lightning_modules.llm.interface import LLM, Sampling


@dataclass(frozen=True)
class RaterSpec:
    """One judgement.

    Args:
        prompt: A name below conf/prompts, or the path of a file ending in `.yaml`.
        of: `example` shows an example's query and target; `candidates` its query with each of its candidates.
        field: Which field of the answer is the rating; None takes `score`, or what a likelihood or a grade gives.
        at_least: Examples rated lower are set aside; None keeps all.
    """

    prompt: str
    of: Literal["example", "candidates"] = "example"
    field: str | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.of == "candidates" and self.at_least is not None:
            raise ValueError("at_least is for ratings of examples; conf=assemble chooses among candidates")


def rate(
    source: str,
    raters: dict[str, RaterSpec],
    llm: LLM,
    out: str,
    *,
    corpus: str | None = None,
    num_records: int | None = None,
    sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008 (frozen)
    attempts: int = 3,
    seed: int = 0,
    budget: Budget = Budget(),  # noqa: B008 (frozen)
    answers: str | None = None,
    block_size: int = 1000,
    array_index: int | None = None,
    array_size: int | None = None,
) -> None:
    """Write a split once more with an LLM's ratings in `meta`, without the examples that are rated too low.

    `meta["ratings"]` holds for each rater of examples its value, the other fields of the answer (a reason), prompt and LLM;
    candidates hold their values under the rater's name. An example that gets no rating, or whose own target gets none among its
    candidates, is set aside with its cause; other candidates without one are left out and counted. Killed at any time, the
    command goes on when it is given again.

    Args:
        source: Folder of the split.
        raters: Name of a rating to what is asked; asked in order, and only of what those before have kept.
        llm: Who answers.
        out: Folder of the split that is written; what was begun there with other settings is not gone on with.
        corpus: Folder of the split that candidates were mined from; needed to rate candidates.
        num_records: The first so many; None all.
        sampling: How answers are drawn; likelihoods and grades are computed, not drawn.
        attempts: How often an answer of no use is asked for, the first time included.
        seed: Of answers.
        budget: What the answers may cost, for each task of an array.
        answers: Folder where answers are kept; None is `<out>/answers`.
        block_size: Records of a block: held in memory, written as one shard, shared out to the tasks of an array.
        array_index: Which task this is, from 0; None takes Slurm's, or does all.
        array_size: Of how many.

    Raises:
        ValueError: There is no rater, a prompt or the source does not fit, or the budget is spent.
        OSError: The LLM cannot be reached, or the disk is full.
    """
    console = Console()
    prompts = {name: read_prompt(prompt_file(spec.prompt)) for name, spec in raters.items()}
    records = Split(source)
    for name, spec in raters.items():
        _check(name, spec, prompts[name], corpus)
    if not raters or attempts < 1 or (num_records is not None and num_records < 1):
        raise ValueError(
            "give raters, as {quality: {prompt: quality, at_least: 3}}, and attempts and num_records of at least 1"
        )
    passages = None if corpus is None else Split(corpus)
    require_corpus(records, passages)
    made_by = {
        "stage": "rate",
        "raters": {name: {**asdict(spec), "prompt_sha256": prompts[name].sha256} for name, spec in raters.items()},
        "llm": llm.name,
        **made_from(source, records),
        **({} if passages is None else {"corpus": corpus, "corpus_digest": passages.digest}),
        "sampling": asdict(sampling),
        "attempts": attempts,
        "seed": seed,
    }
    job = Job(out, made_by, min(len(records), num_records or len(records)), block_size, array_task(array_index, array_size))
    kept = Answers(Path(answers or job.out / "answers"), llm, budget, job.own_blocks)
    for block in job.blocks(console):
        counts, aside, examples = Counter[str](), list[Aside](), list[Example]()
        for position in job.positions(block):
            counts["records"] += 1
            try:
                example = records.read(position)
                examples.append(dataclasses.replace(example, key=key_of(example.key)))
            except BadExampleError as error:
                aside.append(Aside(key_of(records.key(position)), error.cause, str(error)))
        with kept.of_block(block) as log:
            for name, spec in raters.items():
                rater = Rater(name, spec, prompts[name], log, sampling, seed, attempts)
                if spec.of == "example":
                    examples = rater.examples(examples, aside)
                else:
                    examples = rater.candidates(examples, passages, counts, aside)
        counts["examples"] += len(examples)
        job.write(block, examples, counts, aside)
    job.finish(console)
    console.print(f"{kept.spending} by {llm.name}", soft_wrap=True)


@dataclass(frozen=True)
class Rater:
    """One judgement of a block's examples."""

    name: str
    spec: RaterSpec
    prompt: Prompt
    answers: BlockAnswers
    sampling: Sampling
    seed: int
    attempts: int

    def examples(self, examples: list[Example], aside: list[Aside]) -> list[Example]:
        """Those that are rated high enough, with their rating; the others go aside."""
        shown, values = [], []
        for example in examples:
            try:
                column = "query" if example.target is None else "target"  # what has a label has no passage
                values.append(values_of(example, column, self.prompt.fields))
                shown.append(example)
            except UnusableAnswerError as error:
                aside.append(Aside(example.key, error.cause, str(error)))
        kept = []
        for example, found in zip(shown, self._ask(values, [example.key for example in shown]), strict=True):
            if isinstance(found, UnusableAnswerError):
                aside.append(Aside(example.key, f"{self.name}: {found.cause}", str(found)))
                continue
            value, more = found
            if self.spec.at_least is not None and value < self.spec.at_least:
                aside.append(Aside(example.key, f"{self.name} below {self.spec.at_least:g}", f"{value:g}: {more}"))
                continue
            asked = {"prompt": f"{self.prompt.name}@{self.prompt.sha256[:16]}", "llm": self.answers.llm_name, "seed": self.seed}
            before = (example.meta or {}).get("ratings")
            ratings = {**(before if isinstance(before, dict) else {}), self.name: {**more, "value": value, **asked}}
            kept.append(dataclasses.replace(example, meta={**(example.meta or {}), "ratings": ratings}))
        return kept

    def candidates(
        self, examples: list[Example], corpus: Split | None, counts: Counter[str], aside: list[Aside]
    ) -> list[Example]:
        """Those whose own target could be rated, their candidates with a rating each; the others go aside."""
        assert corpus is not None
        values, keys, mined, unusable = list[Mapping[str, Value] | None](), list[str](), [], list[UnusableAnswerError]()
        for example in examples:
            mined.append(candidates_of(example))
            for candidate in mined[-1]:
                position = candidate.get("position")
                read = example if position is None else corpus.read(position)
                if position is not None and key_of(read.key) != key_of(candidate["key"]):
                    raise ValueError(
                        f"candidate {candidate['key']!r} of {example.key!r} is not at its place in {corpus.folder}"
                    )
                keys.append(f"{example.key} {candidate['key']}")
                try:
                    values.append({**values_of(read, "target"), "query": values_of(example, "query")["passage"]})
                except UnusableAnswerError as error:
                    values.append(None)
                    unusable.append(error)
        shown = [(own, key) for own, key in zip(values, keys, strict=True) if own is not None]
        asked, without = iter(self._ask([own for own, _ in shown], [key for _, key in shown])), iter(unusable)
        found = (next(without if own is None else asked) for own in values)
        rated = []
        for example, candidates in zip(examples, mined, strict=True):
            own, lost = [], None
            for candidate in candidates:
                rating = next(found)
                if not isinstance(rating, UnusableAnswerError):
                    own.append({**candidate, self.name: rating[0]})
                    counts[f"candidates rated by {self.name}"] += 1
                    continue
                counts[f"candidates without {self.name}: {rating.cause}"] += 1
                if candidate.get("is_target"):  # nothing can be compared with it
                    lost = Aside(example.key, f"{self.name}: {rating.cause}", f"its target: {rating}")
            if lost is not None:
                aside.append(lost)
                continue
            rated.append(dataclasses.replace(example, meta={**(example.meta or {}), "candidates": own}))
        return rated

    def _ask(self, values: list[Any], keys: list[str]) -> list[tuple[float, dict[str, Any]] | UnusableAnswerError]:
        """Of each its rating and what else the answer says, or why there is none."""
        name = field_of(self.spec, self.prompt)
        asked = ask(self.prompt, values, keys, self.answers, sampling=self.sampling, seed=self.seed, attempts=self.attempts)
        return [found if isinstance(found, UnusableAnswerError) else _rating(found, name) for found in asked]


def _rating(found: dict[str, Any], name: str) -> tuple[float, dict[str, Any]] | UnusableAnswerError:
    """The rating and the other fields of an answer."""
    try:
        value = float(found[name])
    except OverflowError:
        return UnusableAnswerError(f"{name} has {len(str(found[name]))} digits", f"{name} is no number that can be used")
    return value, {other: more for other, more in found.items() if other != name}


def field_of(spec: RaterSpec, prompt: Prompt) -> str:
    """The field of an answer that is the rating."""
    own = "log_likelihood" if prompt.continuation is not None else "grade" if prompt.grades is not None else "score"
    return spec.field or own


def _check(name: str, spec: RaterSpec, prompt: Prompt, corpus: str | None) -> None:
    """Raises ValueError for a rater that cannot work."""
    field = field_of(spec, prompt)
    if prompt.answer is None and spec.field is not None:
        raise ValueError(f"rater {name!r}: field is {spec.field!r}, but the prompt {prompt.name} has no answer with fields")
    if prompt.answer is not None and prompt.answer.get(field, {}).get("type") not in ("integer", "number"):
        raise ValueError(f"rater {name!r}: the prompt {prompt.name} has no number {field!r} in its answer; name it in `field`")
    if name in ("position", "key", "cosine", "is_target"):
        raise ValueError(f"a rater cannot be called {name!r}, which candidates have already")
    if spec.of == "candidates" and corpus is None:
        raise ValueError(f"rater {name!r} is of candidates; give corpus, the split that they were mined from")
