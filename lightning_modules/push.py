"""`conf=push`: an exported folder to a model hub, after a dry run that says what would go there and refuses what must not."""

import json
import os
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from datamodules.files import sha256_of

SUFFIXES = (".json", ".safetensors", ".md", ".txt", ".py", ".jinja", ".model", ".onnx", ".data", ".yaml")  # nothing else
TEXTS = (".json", ".md", ".txt", ".py", ".jinja", ".yaml")
CACHES = ("__pycache__", ".git", ".cache", ".ipynb_checkpoints")
PICKLES = (b"\x80", b"PK\x03\x04", b"(dp", b"(lp", b"ccopy_reg")  # how those of every protocol, and torch's archives, begin
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_JSON_BYTES = 100 * 2**20  # of a file that is read whole to see whether it is what its name says: our choice


def push(folder: str, repo: str, *, dry_run: bool = True, private: bool = True) -> None:
    """Show what of an exported folder would be uploaded; with `dry_run=false` upload it.

    Args:
        folder: That conf=export wrote.
        repo: `owner/name` on the hub.
        dry_run: Only show it; nothing is sent.
        private: Whether a repository that is made anew can be seen by nobody else.

    Raises:
        ValueError: The folder holds something that must not be published, the name is none, there is no token, or the hub
            cannot be reached or refuses.
    """
    place, console = Path(folder), Console()
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ValueError(f"repo is {repo!r}; it must be owner/name of letters, digits, dots, dashes and underscores")
    if not (place / "README.md").is_file() or not (place / "modules.json").is_file():
        raise ValueError(f"{folder} is no folder that conf=export wrote: it lacks README.md or modules.json")
    refused = refusals(place)
    files = [] if refused else sorted(path for path in place.rglob("*") if path.is_file())
    table = Table("file", "bytes", "SHA-256", box=None)
    for path in files:
        table.add_row(str(path.relative_to(place)), f"{path.stat().st_size:,}", sha256_of(path)[:16])
    if refused:
        raise ValueError(f"{folder} is not uploaded: {'; '.join(refused)}")
    console.print(table)
    total = sum(path.stat().st_size for path in files)
    kind = "private" if private else "public"
    console.print(f"{len(files)} files, {total:,} bytes, to {repo} ({kind} where it is made anew)", soft_wrap=True)
    if dry_run:
        console.print("nothing was sent; dry_run=false uploads them", soft_wrap=True)
        return
    address = _upload(place, repo, [str(path.relative_to(place)) for path in files], private)
    console.print(f"uploaded: {address}", soft_wrap=True)


def refusals(folder: Path) -> list[str]:
    """What of a folder must not be published, each with its reason; none where all is well."""
    found = []
    for path in sorted(folder.rglob("*")):
        name, inside = path.relative_to(folder), path.relative_to(folder).parts
        if path.is_symlink():
            found.append(f"{name} is a link, which may lead anywhere")
        elif any(part in CACHES for part in inside):
            found.append(f"{name} lies in a cache")
        elif any(part.startswith(".") for part in inside):
            found.append(f"{name} is hidden")
        elif path.is_dir():
            continue
        elif not path.is_file():
            found.append(f"{name} is no plain file")
        elif path.suffix not in SUFFIXES:
            found.append(f"{name} is none of {', '.join(SUFFIXES)}")
        elif why := _not_what_it_says(path):
            found.append(f"{name} {why}")
    return found


def _not_what_it_says(path: Path) -> str | None:
    """Why a file's content does not fit its name."""
    with path.open("rb") as file:
        begin = file.read(16)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):
                return None
        except SafetensorError as error:
            return f"is no safetensors file ({error})"
    if begin.startswith(PICKLES):
        return "holds a pickle or an archive"
    if path.suffix in TEXTS:
        if path.stat().st_size > MAX_JSON_BYTES:
            return f"is larger than {MAX_JSON_BYTES} bytes"
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                json.loads(text)
        except ValueError as error:
            return f"is no {path.suffix[1:]} ({str(error)[:80]})"
    return None


def _upload(folder: Path, repo: str, files: list[str], private: bool) -> str:
    """Make the repository where it is not there and put these files into it in one commit; gives the commit's address."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ValueError("uploading needs a token with write access in the environment: HF_TOKEN=hf_...")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        told = api.upload_folder(
            folder_path=folder, repo_id=repo, repo_type="model", allow_patterns=files, commit_message="Upload an encoder"
        )
    except HfHubHTTPError as error:
        raise ValueError(f"the hub {api.endpoint} refuses {repo}: {' '.join(str(error).split())[:300]}") from error
    except (OfflineModeIsEnabled, httpx.TransportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the hub {api.endpoint} cannot be reached ({reason}); is there a network? HF_HUB_OFFLINE unset?"
        ) from error
    return str(told)
