"""What a task and a benchmark are: which shards, which prompts, how often, how many, and when two targets are equal.

The prompt strings are those of Gemini Embedding 2 and EmbeddingGemma (`recipe.md`), written out in `conf/tasks/` as templates
with `{text}` and, for passages, `{title}`. They go around text; media carry none.
"""

import re
from dataclasses import dataclass
from typing import Literal

from datamodules.sample import KINDS

BENCHMARK_NAME = re.compile(rf"[\w.]+/({'|'.join((*KINDS, 'mixed'))})-({'|'.join((*KINDS, 'mixed'))})")


def apply_prompt(template: str | None, text: str, title: str | None = None) -> str:
    """The text inside its prompt; an item without a title is called `none` by templates that name it."""
    return text if template is None else template.replace("{title}", title or "none").replace("{text}", text)


def _check_template(name: str, template: str | None) -> None:
    if template is not None and template.count("{text}") != 1:
        raise ValueError(f"{name} is {template!r}; it must hold {{text}} exactly once (and may hold {{title}})")


@dataclass(frozen=True)
class TaskSpec:
    """A training task: every batch comes from one.

    Args:
        shards: The split's folder below the data root.
        kind: What is learnt. It says when the loss's mask takes two targets for the same thing: in `classification` and
            `clustering` when their labels are equal, in `retrieval` and `similarity` when their content is.
        query_prompt: Template around the query's text, None for none.
        target_prompt: Template around the text of targets and hard negatives, None for none.
        rate: Share of the steps, relative to the other tasks' rates; 0 leaves the task out.
        batch_size: Examples of a batch over all ranks.
        negatives: Hard negatives used of each example (fewer where it has fewer).
    """

    shards: str
    kind: Literal["retrieval", "similarity", "classification", "clustering"] = "retrieval"
    query_prompt: str | None = None
    target_prompt: str | None = None
    rate: float = 1.0
    batch_size: int = 64
    negatives: int = 0

    def __post_init__(self) -> None:
        _check_template("query_prompt", self.query_prompt)
        _check_template("target_prompt", self.target_prompt)
        if self.rate < 0 or self.batch_size < 2 or self.negatives < 0:
            raise ValueError(
                f"task over {self.shards!r}: rate {self.rate}, batch_size {self.batch_size}, negatives {self.negatives}; "
                "allowed: rate >= 0, batch_size >= 2, negatives >= 0"
            )


@dataclass(frozen=True)
class Mixture:
    """The tasks of a configuration, for stages that train nothing, where training has them too.

    Args:
        tasks: Name to task; see `TaskSpec`.
    """

    tasks: dict[str, TaskSpec]


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark: what is embedded, against what, and how it is judged.

    It is named `<set>/<query modality>-<target modality>`.

    Args:
        measure: `retrieval` ranks all targets of the split (equal ones count once) or of `corpus`; `similarity` correlates
            cosines with gold scores; `classification` fits a linear probe on `train` and names classes by their label's text;
            `clustering` finds groups by k-means and compares them with the labels.
        shards: The judged split's folder below the data root.
        corpus: Split whose targets are ranked by `retrieval`; None ranks the targets of `shards`.
        train: Split that the linear probe is fitted on, for `classification`.
        query_prompt: Template around text in the split's queries, None for none; it stays with them under `reverse`.
        target_prompt: Template around text in the split's targets, and around labels, None for none.
        reverse: Targets are judged against queries; `classification` and `clustering` judge the targets.
        metric: The one that stands for the benchmark, such as `ndcg@10`; None is the measure's first. `answers@5kt` asks
            whether one of the strings in a query's `meta["answers"]` stands in the first 5,000 tokens of what it finds.
        group: Benchmarks that a table of languages shows together; None for none.
        language: Of the queries, as that table says it.
    """

    measure: Literal["retrieval", "similarity", "classification", "clustering"]
    shards: str
    corpus: str | None = None
    train: str | None = None
    query_prompt: str | None = None
    target_prompt: str | None = None
    reverse: bool = False
    metric: str | None = None
    group: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        _check_template("query_prompt", self.query_prompt)
        _check_template("target_prompt", self.target_prompt)
        if self.measure == "classification" and self.train is None:
            raise ValueError(
                f"benchmark over {self.shards!r}: classification needs `train`, the split its linear probe is fitted on"
            )
        if self.reverse and self.corpus is not None:
            raise ValueError(f"benchmark over {self.shards!r}: `reverse` cannot be used with `corpus`")


def modalities_of(benchmark: str) -> tuple[str, str]:
    """Query and target modality that a benchmark's name states.

    Raises:
        ValueError: The name is not of the form `<set>/<modality>-<modality>`.
    """
    match = BENCHMARK_NAME.fullmatch(benchmark)
    if match is None:
        raise ValueError(
            f"benchmark {benchmark!r} must be named <set>/<query modality>-<target modality>; "
            f"modalities: {', '.join((*KINDS, 'mixed'))}"
        )
    return match[1], match[2]
