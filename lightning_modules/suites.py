"""Benchmarks of mteb (MTEB, MIEB, MAEB, ViDoRe, single tasks) at every prefix: rows for results.json, files in mteb's format.

Source: MTEB (arXiv 2210.07316) and the package `mteb`, which holds the tasks, loads their data and computes their scores.
"""

import copy
import dataclasses
import difflib
import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from datamodules.processors.processor import Processor
from kernels.contrastive import check_prefixes
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.native import media_of
from lightning_modules.suite_encoder import SuiteEncoder, Vectors, picture_kind, undecoded
from lightning_modules.suite_rows import mean_rows, name_of, task_rows, word

HUB_SECONDS = 10.0  # our choice: how long the hub may take to answer at all
PROMPT_SIDES = ("query", "document")


@dataclass(frozen=True)
class SuiteSpec:
    """What of mteb is judged.

    Args:
        tasks: Names of mteb's benchmarks (`MTEB(eng, v2)`) and tasks (`STS12`); in Python, its objects as well.
        prompts: Type of a task (`STS`), a task's name, or a side of retrieval (`query`, `document`), to the template around
            its texts; `-query` and `-document` behind a type or a name say the side. The most special one counts, and null is
            none. Items that hold media carry none.
        languages: ISO 639-3 codes (`deu`) that tasks are limited to; None takes all that a benchmark has.
    """

    tasks: list[Any]
    prompts: dict[str, str | None] = field(default_factory=dict)
    languages: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError('suites.tasks is empty; name benchmarks or tasks of mteb, such as ["MTEB(eng, v2)", STS12]')
        for name, template in self.prompts.items():
            if template is not None and template.count("{text}") != 1:
                raise ValueError(f"suites.prompts.{name} is {template!r}; it must hold {{text}} exactly once")


def judge_suites(
    spec: SuiteSpec,
    encoder: Embedder,
    processor: Processor,
    out: Path,
    *,
    model_name: str,
    revision: str,
    widths: Sequence[int],
    batch_size: int,
    device: str,
) -> list[dict[str, Any]]:
    """Rows of results.json for every task at every prefix, and for the means of benchmarks as mteb's leaderboard has them.

    Results lie in `<out>/mteb` in mteb's format. Those of the same weights, processor, prompts, prefix and revision of the
    data are taken from there, and nothing is embedded for them.

    Args:
        spec: What is judged.
        encoder: Judged in evaluation mode.
        processor: Its own.
        out: Folder of the results.
        model_name: What mteb calls the model.
        revision: SHA-256 of the weights.
        widths: Prefixes.
        batch_size: Items embedded at once.
        device: Where the encoder runs.

    Raises:
        ValueError: mteb is not installed, knows no such task or language, a prompt is for nothing that is known, or a prefix
            does not fit.
    """
    require_mteb()
    check_prefixes(tuple(widths), encoder.config.embedding_dim)
    suites = [_suite(name, spec.languages) for name in spec.tasks]
    tasks: dict[str, Any] = {}
    for task in (task for suite in suites for task in suite.tasks):
        if type(tasks.setdefault(name_of(task), task)) is not type(task):
            raise ValueError(f"two of the tasks are called {task.metadata.name}; give each its own name")
    _check_prompts(spec.prompts, list(tasks.values()))
    judge = _SuiteJudge(spec.prompts, encoder.to(device).eval(), processor, out, model_name, revision, list(widths), batch_size)
    found: dict[str, dict[int, Any]] = {name: judge.known(task) for name, task in tasks.items()}
    with (
        _hub(needed=any(len(known) < len(widths) for known in found.values())),
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as bar,
    ):
        ticket = bar.add_task("mteb", total=len(tasks))
        for name, task in tasks.items():
            bar.update(ticket, description=name)
            made = found[name] | judge.judge(task, [width for width in widths if width not in found[name]])
            found[name] = {width: made[width] for width in widths}
            bar.advance(ticket)
    shared = {"dtype": "float32", "prompts": any(spec.prompts.values())}
    rows = [row for name, task in tasks.items() for row in task_rows(task, found[name])]
    for suite in suites:
        if suite.name is not None:
            rows += mean_rows(suite.name, suite.tasks, found, list(widths))
    return [_ORDER | shared | row | {"bytes": 4 * row["prefix"]} for row in rows]


_ORDER: dict[str, Any] = dict.fromkeys(
    ("benchmark", "metric", "prefix", "dtype", "prompts", "value", "low", "high", "chance", "num_queries", "num_candidates")
)


def require_mteb() -> Any:
    """The library.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import mteb
    except ImportError as error:
        raise ValueError(f"suites need mteb ({error}): pip install -e '.[eval]'") from error
    return mteb


@dataclass(frozen=True)
class _Suite:
    """Tasks that are judged together; a benchmark has a name."""

    name: str | None
    tasks: list[Any]


def _suite(name: Any, languages: list[str] | None) -> _Suite:
    """A benchmark or a task, by its name or itself.

    Raises:
        ValueError: mteb has no such name, or nothing of it is in one of the languages.
    """
    mteb = require_mteb()
    if isinstance(name, mteb.Benchmark):
        called, tasks = name.name, list(name.tasks)
    elif not isinstance(name, str):
        called, tasks = None, [name]
    elif name in {known for benchmark in mteb.get_benchmarks() for known in (benchmark.name, *(benchmark.aliases or ()))}:
        benchmark = mteb.get_benchmark(name)
        called, tasks = benchmark.name, list(benchmark.tasks)
    else:
        task = _task_of(name)
        if task is None:
            near = difflib.get_close_matches(name, [benchmark.name for benchmark in mteb.get_benchmarks()], cutoff=0.0)
            raise ValueError(f"mteb has no benchmark and no task called {name!r}; benchmarks near it: {'; '.join(near)}")
        called, tasks = None, [task]
    if languages is not None:
        tasks = [_limited(task, languages) for task in tasks if set(languages) & set(task.languages)]
        called = None if called is None else "_".join((called, *languages))
        if not tasks:
            raise ValueError(f"nothing of {name} is in {', '.join(languages)}; suites.languages takes codes like deu")
    return _Suite(called, tasks)


def _task_of(name: str) -> Any:
    """mteb's task of that name, or None."""
    try:
        return require_mteb().get_task(name)
    except KeyError:
        return None


def _limited(task: Any, languages: list[str]) -> Any:
    """The task in these languages; mteb's own object, which all benchmarks share, stays as it is."""
    subsets = list(task.hf_subsets)
    return task if task.is_aggregate else copy.copy(task).filter_languages(languages, hf_subsets=subsets)


def _check_prompts(prompts: dict[str, str | None], tasks: list[Any]) -> None:
    """Raises ValueError where a prompt is for nothing that mteb or the tasks to be judged know."""
    from typing import get_args

    from mteb.abstasks.task_metadata import TaskType

    known = {*get_args(TaskType), *PROMPT_SIDES, *(task.metadata.name for task in tasks)}
    unknown = {re.sub(rf"-({'|'.join(PROMPT_SIDES)})$", "", name) for name in prompts} - known
    unknown = {name for name in unknown if _task_of(name) is None}
    if unknown:
        raise ValueError(
            f"suites.prompts has {', '.join(sorted(unknown))}, no task and no type of task; types: "
            f"{', '.join(get_args(TaskType))}"
        )


class _SuiteJudge:
    """Judges tasks one after another; a result is mteb's, or a sentence that says why there is none."""

    def __init__(
        self,
        prompts: dict[str, str | None],
        encoder: Embedder,
        processor: Processor,
        out: Path,
        model_name: str,
        revision: str,
        widths: list[int],
        batch_size: int,
    ) -> None:
        mteb = require_mteb()
        from mteb.models.model_meta import ScoringFunction

        self.batch_size, self.cache = batch_size, mteb.ResultCache(out / "mteb")
        self.vectors, self.media = Vectors(encoder, processor, batch_size), media_of(encoder.backbone, processor)
        made_so = [prompts, dataclasses.asdict(processor.config), dataclasses.asdict(encoder.config)]
        digest = hashlib.blake2b(json.dumps(made_so, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        facts = {
            "revision": f"{revision[:16]}-{digest}",
            "modalities": ["text", *(kind for kind in self.media if kind != "page")],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": any(prompts.values()),
            "framework": ["PyTorch"],
        }
        self.models = {
            width: SuiteEncoder(
                self.vectors,
                width,
                mteb.models.ModelMeta.create_empty(
                    facts | {"name": f"polyphony/{word(model_name)}-{width}d", "embed_dim": width}
                ),
                prompts,
            )
            for width in widths
        }

    def known(self, task: Any) -> dict[int, Any]:
        """Width to what needs no encoder: a result that lies there, or why there can be none."""
        lacking = sorted(_kinds_of(task) - set(self.media))
        if lacking:
            return dict.fromkeys(self.models, f"not supported: the encoder takes no {' and no '.join(lacking)}")
        return {width: result for width in self.models if (result := self._written(task, width)) is not None}

    def _written(self, task: Any, width: int) -> Any:
        """The whole of a task's result as its file says it, or None."""
        result = self._file(task, width)
        if result is None or result.dataset_revision != task.metadata.revision:
            return None
        complete = bool(result.scores) if task.is_aggregate else not result.get_missing_evaluations(task)
        return result.validate_and_filter_scores(task) if complete else None

    def _file(self, task: Any, width: int) -> Any:
        return self.cache.load_task_result(task.metadata.name, self.models[width].mteb_model_meta)

    def judge(self, task: Any, widths: list[int]) -> dict[int, Any]:
        """Width to result, or to why there is none; the encoder sees each item of the task once."""
        if not widths:
            return {}
        if task.is_aggregate:
            return self._judge_parts(task, widths)
        was_loaded = task.data_loaded
        task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)  # as in a new task
        try:
            task.load_data()
            task.dataset = undecoded(task.dataset)
        except ImportError as error:
            return dict.fromkeys(widths, f"error: {_cause(error)}")
        except Exception as error:  # whatever the hub, its client and a task's own code raise
            source = task.metadata.dataset
            place = f"{source.get('path')} (revision {source.get('revision')})"
            return dict.fromkeys(widths, f"no data: mteb wants them from {place} on the hub: {_cause(error)}")
        drawn = task.rng_state, task.np_rng
        found: dict[int, Any] = {}
        try:
            for width in widths:
                task.rng_state, task.np_rng = copy.deepcopy(drawn)  # each prefix is judged on the same sample of the data
                found[width] = self._run(task, width)
        except Exception as error:  # a task is foreign code, and its end is not that of the others
            found |= {width: f"error: {_cause(error)}" for width in widths if width not in found}
        finally:
            self.vectors.drop()
            if not was_loaded:
                task.unload_data()
        return found

    def _judge_parts(self, task: Any, widths: list[int]) -> dict[int, Any]:
        """Of a task that is the mean of others."""
        parts = {part.metadata.name: self.known(part) for part in task.metadata.tasks}
        for part in task.metadata.tasks:
            known = parts[part.metadata.name]
            known |= self.judge(part, [width for width in widths if width not in known])
        found: dict[int, Any] = {}
        for width in widths:
            lost = [f"{name}: {known[width]}" for name, known in parts.items() if isinstance(known[width], str)]
            if lost:
                found[width] = f"error: no number for {len(lost)} of its {len(parts)} tasks, the first is {lost[0]}"
            else:
                try:
                    found[width] = self._run(task, width)  # all of its tasks are in the cache
                except Exception as error:  # as of any task
                    found[width] = f"error: {_cause(error)}"
        return found

    def _run(self, task: Any, width: int) -> Any:
        """Have mteb write a task's result; it is what the file says, six digits, so that it is the same in a further run."""
        written = self._file(task, width)
        stale = written is not None and written.dataset_revision != task.metadata.revision
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)  # mteb's own, of bitext mining
            require_mteb().evaluate(
                self.models[width],
                task,
                cache=self.cache,
                overwrite_strategy="always" if stale else "only-missing",  # mteb would take a whole result of older data
                encode_kwargs={"batch_size": self.batch_size, "show_progress_bar": False},
                show_progress_bar=False,
                co2_tracker=False,
            )
        result = self._written(task, width)
        if result is None:
            raise ValueError(f"mteb wrote no whole result of {task.metadata.name}")
        return result


def _kinds_of(task: Any) -> set[str]:
    """The kinds of media in a task."""
    if task.is_aggregate:
        return set().union(*(_kinds_of(part) for part in task.metadata.tasks))
    return {picture_kind(task.metadata) if kind == "image" else kind for kind in task.metadata.modalities} - {"text"}


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _hub(*, needed: bool) -> Iterator[None]:
    """Where the hub does not answer, have its clients know: each task would try for half a minute. Progress bars are off."""
    from datasets import config
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub import constants

    places = ((constants, "HF_HUB_OFFLINE"), (config, "HF_HUB_OFFLINE"), (config, "HF_DATASETS_OFFLINE"))
    before, had_bars = [getattr(*place) for place in places], not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if needed and not any(before) and not _answers(constants.ENDPOINT):
            Console().print(
                f"{constants.ENDPOINT} does not answer: tasks of mteb whose data are not on this machine are left out",
                soft_wrap=True,
            )
            for place in places:
                setattr(*place, True)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)
        if had_bars:
            enable_progress_bars()


def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=HUB_SECONDS)
    except Exception:  # whatever the HTTP client of the day raises for a host that cannot be reached
        return False
    return True
