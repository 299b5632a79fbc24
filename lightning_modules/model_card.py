"""The model card of an exported encoder: how to use it, and of what made it all that its provenance says, and no more."""

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from datamodules.processors.processor import Processor
from lightning_modules.encoder.checkpoint import read_provenance
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.native import media_of
from lightning_modules.results import prefixes_of, read_results, scores_of

LICENSE, LANGUAGE = re.compile(r"[a-z0-9][a-z0-9.-]*"), re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
TOLD = ("stage", "steps", "parameters", "seed", "method", "tasks", "parents", "sha256", "path", "prompts", "similarity")
USES = {
    "image": ("a picture", 'Image.open("cat.png")'),
    "page": ("a page, or several", '{"page": [Image.open("page.png")]}'),
    "audio": ("a sound", '{"array": np.zeros(16000, np.float32), "sampling_rate": 16000}'),
    "video": (
        "a film's frames",
        '{"array": np.zeros((8, 64, 64, 3), np.uint8), "video_metadata": {"fps": 2.0}}',
    ),
}


class Card(NamedTuple):
    """What a card tells of.

    Args:
        name: Of the folder.
        encoder: What was exported.
        processor: Its own.
        provenance: What made it.
        prompts: Name to what stands before a text.
        truncate_dim: Width that vectors are cut to unless told otherwise.
        reason: Why there is a module file; None where there is none.
        check: Number of probes, least cosine, largest difference.
        extra: What else was written, by its folder's name, with what was measured.
    """

    name: str
    encoder: Embedder
    processor: Processor
    provenance: Mapping[str, Any]
    prompts: Mapping[str, str]
    truncate_dim: int | None
    reason: str | None
    check: Any
    extra: Mapping[str, Any]


def model_card(card: Card, license: str | None, languages: Sequence[str], results: str | None) -> str:
    """README.md of an exported folder.

    Raises:
        ValueError: A licence or language is no such code, or there are no results.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(f"license is {license!r}; give its name on the hub, as apache-2.0, mit, cc-by-4.0 or other")
    if wrong := [language for language in languages if not LANGUAGE.fullmatch(language)]:
        raise ValueError(f"languages hold {wrong[0]!r}; give codes as en, de or zh")
    front: dict[str, Any] = {"tags": ["sentence-transformers", "feature-extraction", "sentence-similarity"]}
    front |= {"library_name": "sentence-transformers", "pipeline_tag": "feature-extraction"}
    front |= {"license": license} if license else {}
    front |= {"language": list(languages)} if languages else {}
    sections = [
        f"# {card.name}",
        _what(card),
        "## Use",
        _use(card),
        "## What made it",
        _made(card),
        "### Lineage",
        "\n".join(lineage(card.provenance)),
        "## Scores",
        _scores(results),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(card, license)),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def shown(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as it may be published: of a place on this machine the last two names alone."""

    def short(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: short(key, one) for key, one in value.items()}
        if isinstance(value, list):
            return [short(name, one) for one in value]
        return place(value) if name == "path" and isinstance(value, str) else value

    return {name: short(name, value) for name, value in provenance.items() if name != "sha256"}


def place(path: str) -> str:
    """A relative path as it is; of another the last two names."""
    pure = PurePath(path)
    return str(PurePath(*pure.parts[-2:])) if pure.is_absolute() or ".." in pure.parts else path


def lineage(provenance: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """The encoders that it came from, each with its weights' SHA-256, as far as their folders still hold them."""
    if not depth:
        yield f"- this encoder: {_stage(provenance)}, weights {provenance['sha256'][:16]}"
    for parent in provenance.get("parents") or []:
        share = f", share {parent['weight']:.3f}" if "weight" in parent else ""
        head = f"{'  ' * (depth + 1)}- `{place(parent['path'])}`, weights {parent['sha256'][:16]}{share}"
        try:
            found = read_provenance(parent["path"])
        except (ValueError, OSError):
            yield f"{head}; its folder is not there any more"
            continue
        if found["sha256"] != parent["sha256"]:
            yield f"{head}; its folder holds other weights now"
            continue
        yield f"{head}: {_stage(found)}"
        if depth < 20:
            yield from lineage(found, depth + 1)


def _stage(provenance: Mapping[str, Any]) -> str:
    """Stage, steps and tasks in one line, as far as they are recorded."""
    told = [str(provenance.get("stage") or "a stage that is not recorded")]
    told += [f"{provenance['steps']:,} steps"] if isinstance(provenance.get("steps"), int) else []
    told += [f"on {', '.join(provenance['tasks'])}"] if provenance.get("tasks") else []
    return ", ".join(told)


def _what(card: Card) -> str:
    config, kinds = card.encoder.config, media_of(card.encoder.backbone, card.processor)
    takes = ", ".join(["text", *kinds]) + (" and interleaved lists of them" if kinds else "")
    widths = ", ".join(map(str, config.prefixes))
    parts = [f"An embedding model that takes {takes} and gives vectors of {config.embedding_dim} dimensions."]
    if len(config.prefixes) > 1:
        parts.append(f"The first {widths.rpartition(', ')[0]} dimensions of one are vectors themselves once renormalised.")
    family = card.encoder.backbone.settings.get("model_type", "transformers")
    number = sum(parameter.numel() for parameter in card.encoder.parameters())
    parts.append(f"The backbone is a `{family}` without a causal mask; {number:,} parameters, fp32; pooling: {config.pooling}.")
    parts.append("Exported by Polyphony.")
    return " ".join(parts)


def _use(card: Card) -> str:
    kinds = media_of(card.encoder.backbone, card.processor)
    trust = ", trust_remote_code=True" if card.reason else ""
    lines = ["from sentence_transformers import SentenceTransformer", "", f'model = SentenceTransformer("{card.name}"{trust})']
    lines += ['query = model.encode_query("which planet is known as the red planet")']
    lines += ['documents = model.encode_document(["Mars looks red.", "Bread is baked."])']
    lines += ["print(model.similarity(query, documents))"]
    if len(card.encoder.config.prefixes) > 1:
        least = card.encoder.config.prefixes[0]
        lines += [f'short = model.encode(["Mars looks red."], truncate_dim={least}, normalize_embeddings=True)']
    text = "```python\n" + "\n".join(lines) + "\n```"
    if card.reason:
        text += (
            "\n\n`trust_remote_code=True` runs `polyphony.py` of this folder, which reads the weights (safetensors) and opens "
            f"no other file and no address. It is there because {card.reason}."
        )
    if kinds:
        imports = "import numpy as np\nfrom PIL import Image\n\n"
        rows = [f"    {USES[kind][1]},  # {USES[kind][0]}" for kind in kinds]
        one = USES[kinds[0]][1]
        rows += [f'    ["the same as one input:", {one}, "and words behind it"],']
        text += f"\n\n```python\n{imports}inputs = [\n" + "\n".join(rows) + "\n]\nvectors = model.encode(inputs)\n```"
    if card.prompts:
        rows = [f"- `{name}`: `{prompt}`" for name, prompt in card.prompts.items()]
        text += "\n\nWhat stands before a text, by `prompt_name`; media carry none:\n\n" + "\n".join(rows)
    else:
        text += "\n\nIt has no prompts."
    return text


def _made(card: Card) -> str:
    provenance, rows = card.provenance, []
    stage = provenance.get("stage") or "not recorded"
    came = "none here: it came as a folder of sentence-transformers, which does not say what trained it"
    rows.append(f"Stage: {came if stage == 'sentence-transformers' else stage}.")
    if isinstance(provenance.get("steps"), int):
        rows.append(f"Steps: {provenance['steps']:,}.")
    if isinstance(provenance.get("parameters"), int):
        rows.append(f"Trained parameters: {provenance['parameters']:,}.")
    if "seed" in provenance:
        rows.append(f"Seed: {provenance['seed']}.")
    if "method" in provenance:
        rows.append(f"Average of its parents: {provenance['method']}.")
    if tasks := provenance.get("tasks"):
        rows.append(f"Data: the tasks {', '.join(tasks)}.")
    else:
        rows.append("Data: its own record names none" + ("; see its parents." if provenance.get("parents") else "."))
    if more := {name: value for name, value in shown(provenance).items() if name not in TOLD}:
        rows.append(f"Further: `{json.dumps(more, ensure_ascii=False)}`.")
    return "\n".join(f"- {row}" for row in rows)


def _scores(results: str | None) -> str:
    if results is None:
        return "None are given here."
    folder = Path(results)
    scores = [s for s in scores_of(read_results(folder if folder.is_dir() else folder.parent)) if s.is_headline and s.is_plain]
    prefixes = prefixes_of(scores)
    head = ["benchmark", "metric", *(f"{prefix} dimensions" for prefix in prefixes)]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for score in scores:
        numbers = [f"{score.numbers[p].value:.3f}" if p in score.numbers else "" for p in prefixes]
        rows.append(f"| {' | '.join([score.benchmark, score.metric, *numbers])} |")
    return "By Polyphony's own evaluation, prompts as there:\n\n" + "\n".join(rows)


def _limits(card: Card, license: str | None) -> Iterator[str]:
    config, check = card.processor.config, card.check
    yield f"Texts are cut after {config.max_text_tokens} tokens." + (
        " Polyphony itself refuses longer ones." if config.too_long == "refuse" and not card.reason else ""
    )
    yield "A text that spells a special token (such as an end of sequence) is text." + (
        ""
        if card.reason
        else " Programs that read `tokenizer.json` alone, without `tokenizer_config.json`, take it for the token."
    )
    yield (
        f"The folder was loaded and compared with the encoder on {check.num_probes} probes at every prefix: least cosine "
        f"{check.cosine:.7f}, largest difference of a coordinate {check.difference:.1e}."
    )
    yield "`truncate_dim` cuts after normalising: give `normalize_embeddings=True` with it, or compare by cosine." + (
        f" Here it is {card.truncate_dim} unless told otherwise." if card.truncate_dim else ""
    )
    yield (
        "Whether its training tasks put these prompts before their texts is not recorded."
        if card.prompts
        else ("Whether its training tasks put prompts before their texts is not recorded.")
    )
    if "audio" in media_of(card.encoder.backbone, card.processor):
        yield "Sound is mono at 16 kHz; other rates are resampled, channels averaged."
    if "video" in media_of(card.encoder.backbone, card.processor):
        yield (
            f"Of a film {config.decode.frames_per_second:g} frames a second are looked at, at most {config.decode.max_frames}; "
            "frames given without `fps` count as taken so. Larger frames than "
            f"{config.decode.max_frame_pixels:,} pixels are made smaller by Pillow here, by FFmpeg in Polyphony."
        )
    for name, told in card.extra.items():
        graphs = told.get("graphs", {}).values()
        off = ", ".join(f"`{graph['file']}` (off by at most {graph['error']:.1e})" for graph in graphs)
        yield f"`{name}/` holds the same encoder as {off or 'graphs'}; see the README there."
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("sentence-transformers", "transformers"))
    yield f"Written and checked with {versions}; older ones may not read it."
    if license is None:
        yield "No licence was given for it."
