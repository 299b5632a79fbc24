"""`conf=transcribe`: a split whose speech is written down, by a model or from words that are known: the ASR → text cascade.

What is native in one benchmark is then text in another, and both are judged by the same metric on the same records.
"""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoTokenizer
from transformers import AutomaticSpeechRecognitionPipeline as Pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from datamodules.decode import decode_item
from datamodules.files import sha256_of
from datamodules.job import Aside, Job, array_task, made_from
from datamodules.media.audio import SAMPLE_RATE
from datamodules.media.limits import DecodeLimits
from datamodules.sample import BadExampleError, Example, Item, Part
from datamodules.shards import Split
from lightning_modules.encoder.embedder import device_named

NOTHING_SAID = "."  # our choice: stands for an empty transcript, as an encoder may refuse a text of no token
READ_FILES = {".safetensors", ".json", ".txt", ".model"}  # weights, configurations, tokenizers
Transcriber = Callable[[np.ndarray], str]


def transcribe(
    source: str,
    out: str,
    *,
    model: str | None = None,
    from_meta: str | None = None,
    column: Literal["query", "target"] = "query",
    revision: str | None = None,
    language: str | None = None,
    device: str = "auto",
    block_size: int = 200,
    array_index: int | None = None,
    array_size: int | None = None,
) -> None:
    """Write a split again with text in place of sound; keys, order, judgements and all else stay.

    Every sound of the column becomes a text part; `transcribed_by` of an example's meta says by what. Where nothing was heard
    the text is a full stop, and how often is told: a cascade answers for what its first half misses. Sounds that do not decode
    are set aside with their cause. Killed at any time, the command goes on when it is given again.

    Args:
        source: Folder of the split with the speech.
        out: Folder of the split that is written; what was begun there with other settings is not gone on with.
        model: Folder or hub name of a transformers model of speech recognition (a Whisper, any other sequence-to-sequence or
            CTC model) with safetensors.
        from_meta: Instead of a model, the field of an example's meta that has the words.
        column: Whose sounds are written down.
        revision: Of the hub repository.
        language: That is spoken, for multilingual Whisper models; None lets the model find out.
        device: `cpu`, `cuda`, or `auto` for the best there is.
        block_size: Records of a block: written as one shard, shared out to the tasks of an array.
        array_index: Which task this is, from 0; None takes Slurm's, or does all.
        array_size: Of how many.

    Raises:
        ValueError: Neither or both of model and from_meta are given, the model cannot be read, an example has no sound in the
            column or no words in its meta, or the folder is of another making.
    """
    if (model is None) == (from_meta is None):
        raise ValueError(f"model is {model!r} and from_meta {from_meta!r}; give one of them: who hears, or where the words are")
    console, split = Console(), Split(source)
    name = f"meta:{from_meta}" if model is None else name_of(model, revision)
    made_by = {
        "stage": "transcribe",
        "model": name,
        **made_from(source, split),
        "column": column,
        "language": language,
    }
    job = Job(out, made_by, len(split), block_size, array_task(array_index, array_size))
    todo = job.todo()
    hear = None if model is None or not todo else transcriber(model, revision, language, device)
    for block in job.blocks(console, todo):
        counts, aside = Counter[str](), list[Aside]()
        examples: list[Example] = []
        for position in job.positions(block):
            counts["records"] += 1
            try:
                example = split.read(position)
                item = _with_sound(split, example, column)
                words = [_given(example, from_meta)] if hear is None else _heard(item, hear)
            except BadExampleError as error:
                aside.append(Aside(split.key(position), error.cause, str(error)))
                continue
            counts["sounds"] += len(words)
            counts["empty transcripts"] += words.count("")
            meta = {**(example.meta or {}), "transcribed_by": name}
            examples.append(dataclasses.replace(example, **{column: _written(item, words)}, meta=meta))
        job.write(block, examples, counts, aside)
    manifest = job.finish(console)
    if manifest is not None:
        counts = manifest["about"]["counts"]
        empty = f"{counts['empty transcripts']:,} of {counts['sounds']:,} transcripts are empty and became {NOTHING_SAID!r}"
        console.print(f"written down by {name}; {empty}", soft_wrap=True)


def transcriber(model: str, revision: str | None, language: str | None, device: str) -> Transcriber:
    """What writes down a sound (samples,), float32, mono, 16 kHz; one at a time, as padding would be heard too.

    Raises:
        ValueError: transformers cannot read the model, or it is none of speech recognition.
    """
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # at each call: of two limits on length, one is taken
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model, **hub)
        kind: Any = {
            **dict.fromkeys(MODEL_FOR_CTC_MAPPING_NAMES, AutoModelForCTC),
            **dict.fromkeys(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, AutoModelForSpeechSeq2Seq),
        }.get(config.model_type)
        if kind is None:
            raise ValueError(f"a {config.model_type} does not recognise speech")
        network, report = kind.from_pretrained(model, use_safetensors=True, output_loading_info=True, **hub)
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
            raise ValueError(f"its weights lack {', '.join(missing[:3])}")
        tokenizer = AutoTokenizer.from_pretrained(model, **hub)
        extractor: Any = AutoFeatureExtractor.from_pretrained(model, **hub)
        if extractor.sampling_rate != SAMPLE_RATE:
            raise ValueError(f"it hears {extractor.sampling_rate} Hz, and sounds come at {SAMPLE_RATE}")
        where = torch.device(device_named(device))
        pipeline: Any = Pipeline(network.eval(), tokenizer=tokenizer, feature_extractor=extractor, device=where)
    except Exception as error:  # of the hub, of the files, of the family, of the device
        raise ValueError(
            f"no model of speech recognition can be read from {model!r} ({' '.join(str(error).split())[:300]}); make model a "
            "folder with config.json, safetensors, preprocessor and tokenizer, or its name on the hub"
        ) from error
    options: dict[str, Any] = {} if language is None else {"generate_kwargs": {"language": language, "task": "transcribe"}}
    return lambda sound: pipeline(sound.copy(), **options)["text"].strip()


def name_of(model: str, revision: str | None) -> str:
    """`folder@hash` with a hash over the files that it is read from, or `hub/name@revision`."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    files = sorted(path for path in folder.iterdir() if path.suffix in READ_FILES)
    listed = "".join(f"{sha256_of(path)} {path.name}\n" for path in files)
    return f"{folder.resolve().name}@{hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def _with_sound(split: Split, example: Example, column: str) -> Item:
    item = getattr(example, column)
    if item is None or all(part.kind != "audio" for part in item.parts):
        raise ValueError(
            f"{split.folder}: example {example.key!r} has no sound in its {column}; there is nothing to write down"
        )
    return item


def _given(example: Example, field: str | None) -> str:
    meta = example.meta or {}
    words = meta.get(str(field))
    if not isinstance(words, str):
        raise ValueError(f"example {example.key!r} has no text {field!r} in its meta; its fields: {', '.join(meta) or 'none'}")
    return words.strip()


def _heard(item: Item, hear: Transcriber) -> list[str]:
    decoded = decode_item(item, DecodeLimits())
    return [hear(np.asarray(part.content, np.float32)) for part in decoded.parts if part.kind == "audio"]


def _written(item: Item, words: list[str]) -> Item:
    """The item with its sounds as text, one for all where the words were given."""
    left = iter(words)
    parts: list[Part] = []
    for part in item.parts:
        if part.kind != "audio":
            parts.append(part)
        elif (text := next(left, None)) is not None:
            parts.append(Part("text", text or NOTHING_SAID))
    return Item(tuple(parts), item.title)
