"""Tasks of mteb's own classes over data that a test brings; importing this imports mteb, which takes seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Audio, Dataset, DatasetDict, Image, Video
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

Records = Sequence[Mapping[str, Any]]
WORDS = {"t": "text", "i": "image", "a": "audio", "v": "video"}


def made(base: type, name: str, type_: str, score: str, data: Any, *, category: str = "t2t", **more: Any) -> Any:
    """A task.

    Args:
        base: mteb's class of it.
        name: Of the task.
        type_: mteb's type of task.
        score: Its main score.
        data: What `load_data` gives; an exception is raised there.
        category: mteb's, such as `t2i`.
        more: `languages` and `revision` of the metadata; attributes of the class.
    """
    languages, revision = more.pop("languages", ["eng-Latn"]), more.pop("revision", "1")
    metadata = TaskMetadata(
        name=name,
        description=name,
        type=type_,  # pyright: ignore[reportArgumentType]
        main_score=score,
        dataset={"path": f"local/{name}", "revision": revision},
        modalities=[WORDS[letter] for letter in dict.fromkeys(category) if letter in WORDS],  # pyright: ignore[reportArgumentType]
        category=category,  # pyright: ignore[reportArgumentType]
        eval_splits=["test"],
        eval_langs=languages,
        license="not specified",
        bibtex_citation="",
    )

    def load_data(self: Any, num_proc: int | None = None, **options: Any) -> None:
        if isinstance(data, Exception):
            raise data
        self.dataset, self.data_loaded = data, True

    return type(name, (base,), {"metadata": metadata, "load_data": load_data, **more})()


def retrieval(name: str, corpus: Records, queries: Records, qrels: Mapping[str, Mapping[str, int]], **more: Any) -> Any:
    """Search, with means of all digits beside mteb's, which have five."""

    def exact(self: Any, scores: Any, *_: Any, **__: Any) -> dict[str, float]:
        wanted = {"exact_ndcg_at_10": "ndcg_cut_10", "exact_hit_rate_at_5": "success_5", "exact_recall_at_10": "recall_10"}
        return {ours: sum(found[theirs] for found in scores.values()) / len(scores) for ours, theirs in wanted.items()}

    split = {"corpus": as_dataset(corpus), "queries": as_dataset(queries), "relevant_docs": dict(qrels), "top_ranked": None}
    more = {"type_": "Retrieval", "task_specific_scores": exact} | more
    return made(AbsTaskRetrieval, name, more.pop("type_"), "ndcg_at_10", {"default": {"test": split}}, **more)


def as_dataset(records: Records) -> Dataset:
    """Media in their files, `{"bytes": .., "path": ..}`, become columns as the hub's are."""
    dataset = Dataset.from_list([dict(record) for record in records])
    for name, feature in {"image": Image(), "audio": Audio(), "video": Video()}.items():
        if name in dataset.features and isinstance(records[0][name], dict) and "bytes" in records[0][name]:
            dataset = dataset.cast_column(name, feature)
    return dataset


def sts(name: str, pairs: Records, **more: Any) -> Any:
    data = DatasetDict({"test": as_dataset(pairs)})
    return made(AbsTaskSTS, name, "STS", "cosine_spearman", data, min_score=0, max_score=5, **more)


def classification(name: str, train: Records, test: Records, **more: Any) -> Any:
    data = DatasetDict({"train": as_dataset(train), "test": as_dataset(test)})
    more = {"type_": "Classification", "category": "t2c"} | more
    return made(AbsTaskClassification, name, more.pop("type_"), "accuracy", data, **more)


def clustering(name: str, records: Records, **more: Any) -> Any:
    data = DatasetDict({"test": as_dataset(records)})
    size = {"max_fraction_of_documents_to_embed": None, "category": "t2c"}
    return made(AbsTaskClustering, name, "Clustering", "v_measure", data, **(size | more))


def bitext(name: str, pairs: Mapping[str, Records], **more: Any) -> Any:
    """Of several subsets, or of one called `default`."""
    data = {subset: DatasetDict({"test": as_dataset(records)}) for subset, records in pairs.items()}
    return made(AbsTaskBitextMining, name, "BitextMining", "f1", data, **more)
