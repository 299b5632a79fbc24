"""Files that are whole or absent: written beside their place, flushed, renamed into it."""

import hashlib
import os
import shutil
from pathlib import Path


def replace_folder(folder: Path, beside: Path) -> None:
    """Put a whole folder in the place of a former one, which is removed only once the new one has its name."""
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    if folder.exists():
        folder.rename(former)
    try:
        beside.rename(folder)
    except OSError:
        if former.exists():
            former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there; a former one stays until the new one is whole.

    Raises:
        OSError: The disk is full or the place not writable; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
