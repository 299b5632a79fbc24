"""The input side of a sentence-transformers folder: which modules it has, and its tokenizer as a processor of ours.

    modules.json                            modules in order, each with its type and folder
    sentence_bert_config.json, tokenizer*   beside the text model: the longest input, the tokenizer
    config_sentence_transformers.json       prompts

Nothing of the folder is run; what would make other inputs than ours is refused.
"""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import ProcessorConfig
from datamodules.record import read_json
from datamodules.sample import Item, Part

MODULES = "modules.json"
SETTINGS: dict[str, Any] = {  # what those of a text model may say, where it matters
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
HEEDED = {"max_seq_length", "do_lower_case", "unpad_inputs"}  # the last is how it computes, not what


class Module(NamedTuple):
    """A module of a folder: its class's name, where it lies, and its settings."""

    name: str
    folder: Path
    settings: dict[str, Any]


def is_sentence_transformers(folder: Path) -> bool:
    """Whether a folder is theirs alone: what conf=export writes with a module file is an encoder's folder of ours as well."""
    return (folder / MODULES).is_file() and not (folder / "encoder.json").is_file()


def modules_of(folder: Path) -> list[Module]:
    """The modules of a sentence-transformers folder, in order.

    Raises:
        ValueError: The list is damaged, a module is not of sentence-transformers itself or lies elsewhere.
    """
    try:
        listed = [(str(module["type"]), str(module["path"])) for module in read_json(folder / MODULES)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MODULES} is damaged ({error}); use another copy of the model") from error
    modules = []
    for kind, path in listed:
        place = folder / path
        if not kind.startswith("sentence_transformers."):
            refuse(folder, f"a module of type {kind!r}, which is code of its own")
        if not place.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / MODULES} names {path!r}, which lies outside the folder; use another copy of the model")
        name = kind.rpartition(".")[2]
        files = place.glob("sentence_*_config.json") if name == "Transformer" else place.glob("config.json")
        modules.append(Module(name, place, read_settings(next(iter(sorted(files)), place / "config.json"))))
    return modules


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is no file.

    Raises:
        ValueError: It holds anything else.
    """
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged (it holds no mapping); use another copy of the model")
    return settings


def text_module(folder: Path) -> Module:
    """The text model, its first module.

    Raises:
        ValueError: The first module is another, or makes inputs in another way than ours.
    """
    first, *_ = modules_of(folder) or [Module("nothing", folder, {})]
    if first.name != "Transformer":
        refuse(folder, f"{first.name} as its first module")
    for name, value in first.settings.items():
        if isinstance(value, dict) and name == "modality_config":
            value = {"text": value.get("text")}  # other kinds of input are not asked for
        if name not in HEEDED and value and value != SETTINGS.get(name):
            refuse(folder, f"the setting {name} of its text model, {str(value)[:99]}")
    return first


def refuse(folder: Path, what: str) -> NoReturn:
    """Say that a folder holds what has no place in an encoder of ours."""
    raise ValueError(
        f"{folder} has {what}; of sentence-transformers' folders those can be taken that have a text model with its tokenizer, "
        "one of the poolings mean, cls, lasttoken and weightedmean, at most two Dense layers without bias and activation, and "
        "Normalize"
    )


def processor_of(folder: Path) -> ComposedProcessor:
    """The processor of a sentence-transformers folder.

    Raises:
        ValueError: It is damaged, or cannot be represented.
    """
    text = text_module(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(text.folder, trust_remote_code=False)
        model = read_settings(text.folder / "config.json")
    except Exception as error:  # the tokenizer's libraries raise types of their own
        raise ValueError(f"the tokenizer in {text.folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    special = tokenizer.num_special_tokens_to_add()
    longest = _longest(text.settings, model, tokenizer)
    if longest <= special:
        refuse(folder, f"room for {longest} tokens, of which its tokenizer adds {special}")
    processor = ComposedProcessor(ProcessorConfig(max_text_tokens=longest - special), tokenizer)
    if text.settings.get("do_lower_case") and _ids(processor, "CAT") != _ids(processor, "cat"):
        refuse(folder, "do_lower_case beside a tokenizer that keeps capitals")
    if tokenizer.truncation_side != "right":
        refuse(folder, "a tokenizer that cuts long texts at their beginning")
    for words in ("cat", "the cat sat on 12 mats"):
        theirs = tokenizer(words)["input_ids"]
        if theirs != _ids(processor, words):
            refuse(folder, f"a tokenizer that makes {theirs} of {words!r}, where ours makes {_ids(processor, words)}")
    return processor


def _longest(settings: dict[str, Any], model: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens of an input, begin and end included, as sentence-transformers 6 finds it."""
    if settings.get("max_seq_length") is not None:
        return int(settings["max_seq_length"])
    positions = model.get("max_position_embeddings", -1)
    return min(tokenizer.model_max_length, *([positions] if positions != -1 else []), 2**31)


def _ids(processor: ComposedProcessor, words: str) -> list[int]:
    return processor([Item((Part("text", words, content=words),))]).token_ids.tolist()
