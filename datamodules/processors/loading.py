"""The processor that a configuration asks for, and the one that lies in an encoder's folder."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from datamodules.media.limits import DecodeLimits
from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.native import DualProcessor, NativeProcessor
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.processors.sentence_transformers import is_sentence_transformers, processor_of
from datamodules.record import read_json


def new_processor(config: ProcessorConfig, tokenizer: str | Path | None) -> Processor:
    """A processor as configured; a composed one with the tokenizer of that folder or hub name.

    Raises:
        ValueError: transformers cannot load what is named.
    """
    named = config.native or str(tokenizer)
    loader = AutoTokenizer if config.native is None else AutoProcessor
    try:
        found: Any = loader.from_pretrained(named, revision=config.revision, trust_remote_code=False)
    except Exception as error:  # the tokenizer's libraries raise types of their own
        raise ValueError(f"no processor can be loaded from {named}: {' '.join(str(error).split())[:300]}") from error
    return ComposedProcessor(config, found) if config.native is None else _native(config, found)


def load_processor(folder: str | Path) -> Processor:
    """The processor of an encoder's folder, ours or sentence-transformers'.

    Raises:
        ValueError: There is none, it is damaged, or it cannot be represented.
    """
    folder = Path(folder)
    if is_sentence_transformers(folder):
        return processor_of(folder)
    try:
        values = read_json(folder / "processor.json")
        values["decode"] = DecodeLimits(**values["decode"])
        values["page_grid"] = tuple(values["page_grid"])
        config = ProcessorConfig(**values)
        if config.native is not None:
            return _native(config, AutoProcessor.from_pretrained(folder, trust_remote_code=False))
        return ComposedProcessor(config, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # the tokenizer's libraries raise types of their own
        raise ValueError(f"the processor in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _native(config: ProcessorConfig, found: Any) -> Processor:
    if not hasattr(found, "tokenizer"):
        raise ValueError(f"{config.native} has a {type(found).__name__} and no processor of media")
    return NativeProcessor(config, found) if hasattr(found, "image_token") else DualProcessor(config, found)
