"""What a recipe's stage was made of and what it left, as hashes: a record beside its results, and the lineage of them all.

<folder>/stage.json   state, key (configuration and inputs), what lies there, attempts with their cost, code revision
<out>/lineage.json    every stage that is done: configuration, data, parents, encoders
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.files import replace_file, sha256_of
from datamodules.job import digest_of
from datamodules.record import read_json

RECORD = "stage.json"
# Each says what lies beside it.
MARKS = ("encoder.json", "manifest.json", "results.json", "embeddings.json", "modules.json", "onnx.json")


def identity(path: Path) -> str | None:
    """A hash of what lies at a path, None where nothing does.

    A file's is of its bytes. A folder's is of the encoders, splits, results and exports below it, each known by the file that
    describes it and the sizes of weights beside that; where there is none, of the names, sizes and times of all files.
    """
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return None
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != RECORD and not _is_hidden(file, path)]
    marks = [
        (str(file.relative_to(path)), sha256_of(file) if file.name in MARKS else file.stat().st_size)
        for file in files
        if file.name in MARKS or file.suffix == ".safetensors"
    ]
    if marks:
        return digest_of(marks)
    return digest_of([(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def inputs_of(config: Any) -> dict[str, str]:
    """Every path that a configuration names and something lies at, with its identity."""
    named = {value for value in texts_of(config) if os.sep in value and len(value) < 4096 and Path(value).exists()}
    return {name: str(identity(Path(name))) for name in sorted(named)}


def texts_of(value: Any) -> Iterator[str]:
    """Every text among JSON values."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)
    elif isinstance(value, str):
        yield value


def encoders_below(folder: Path) -> dict[str, str]:
    """Places of encoders in a folder to the SHA-256 of their weights."""
    return {str(file.parent.relative_to(folder)): read_json(file)["sha256"] for file in sorted(folder.rglob("encoder.json"))}


def revision() -> str | None:
    """The code's commit, `+` behind it where files differ from that; None outside of git."""
    root = Path(__file__).parent.parent
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        commit, changed = (
            subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")


def read_record(folder: Path) -> dict[str, Any]:
    """What is known of a stage; empty before it began.

    Raises:
        ValueError: It cannot be read.
    """
    file = folder / RECORD
    return read_json(file) if file.is_file() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    replace_file(folder / RECORD, json.dumps(record, indent=1))


def write_lineage(out: Path, folders: dict[str, Path]) -> None:
    """Write the lineage of what is done.

    Args:
        out: The recipe's folder.
        folders: Of its stages' runs, by name, parents before what is made of them.
    """
    fields = ("key", "config", "inputs", "parents", "revision", "encoders", "seconds", "devices", "ended")
    records = {name: read_record(folder) for name, folder in folders.items()}
    done = {
        name: {field: record[field] for field in fields} for name, record in records.items() if record.get("state") == "done"
    }
    replace_file(out / "lineage.json", json.dumps(done, indent=1))
