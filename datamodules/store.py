"""Files by name, from a local folder or a remote store, the remote ones through a bounded cache named by content hash.

A local folder is read in place. A remote file is downloaded once per machine, hashed while it is written beside its place, and
named `<sha256><suffix>` in the cache only when size and hash are those of its manifest: what has a name there is whole. fsspec
moves the bytes; credentials come from where its implementations look for them (~/.aws, GOOGLE_APPLICATION_CREDENTIALS,
HF_TOKEN, ~/.netrc, FSSPEC_S3_ANON=true, ..), never from a URL. Names, sizes and hashes come from manifests, which anyone may
have written: they can lead nowhere but below the root and into the cache.
"""

import errno
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import fsspec

from datamodules.cache import CACHED, Cache

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PACKAGES = {"gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}  # by protocol
RETRY_PAUSES = (1.0, 4.0, 15.0)  # seconds before the second, third and last try: our choice
CONNECT_SECONDS, SILENCE_SECONDS = 30, 60  # what an HTTP server may take to answer, and between two bytes: our choice
CHUNK_BYTES, RANGE_BYTES = 2**20, 2**25  # held at a time, and asked of s3 and gs in one request: our choice


class Store:
    """A folder of files, local or remote. Safe to pickle and to fork: each process makes its own connections.

    Args:
        root: A path, or a URL of file, gs, hf, http, https or s3.
        cache: Where remote files are fetched to; None is enough for a local folder and for what is not cached.

    Raises:
        ValueError: The root is none of these or holds credentials or a query, or its protocol's package is missing.
    """

    def __init__(self, root: str | Path, *, cache: Cache | None = None) -> None:
        self.protocol, self.root = _taken_apart(str(root))
        self.is_local = not self.protocol
        self.cache = cache
        if self.protocol and find_spec(PACKAGES[self.protocol]) is None:
            package = PACKAGES[self.protocol]
            raise ValueError(f"{self.protocol}:// needs the package {package}, which is missing: pip install {package}")

    def __str__(self) -> str:
        return self.root

    def __truediv__(self, name: str) -> "Store":
        """The folder of that name below this one."""
        return Store(self._place(name), cache=self.cache)

    def fetch(self, name: str, *, sha256: str, size: int) -> Path:
        """Where a file lies on this machine, after a download if need be; a local one is compared in size only.

        Raises:
            ValueError: The name is refused, the file is not the one that was indexed, or the cache is missing or too small.
            FileNotFoundError: There is no such file.
            OSError: Access was refused, the store failed several times in a row, or the disk is full.
        """
        place = self._place(name)
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256) or type(size) is not int or size < 0:
            raise ValueError(f"{place}: its manifest is damaged, {sha256!r} is no SHA-256 or {size!r} no size")
        if self.is_local:
            if (found := os.stat(place).st_size) != size:
                raise ValueError(f"{place} was changed after it was indexed: expected {size} bytes, got {found}")
            return Path(place)
        if self.cache is None:
            raise ValueError(f"{place} is remote; give the store a cache to download it to")
        suffix = Path(name).suffix
        cached = sha256 + suffix if CACHED.fullmatch(sha256 + suffix) else sha256
        return self.cache.get(cached, size, lambda file: self._download(place, file, sha256, size))

    def read_bytes(self, name: str, max_bytes: int) -> bytes:
        """A small file's content, read anew each time.

        Raises:
            ValueError: It has more than `max_bytes`.
        """
        place, file = self._place(name), io.BytesIO()
        if self.is_local:
            with open(place, "rb") as local:
                num_bytes = file.write(local.read(max_bytes + 1))
        else:
            num_bytes, _ = _persistently(lambda: self._copy(place, file, max_bytes))
        if num_bytes > max_bytes:
            raise ValueError(f"{place} has more than the {max_bytes} bytes that are read of such a file")
        return file.getvalue()[:num_bytes]

    def copy(self, name: str, file: Any) -> None:
        """Write a remote file, whose hash nobody knows yet, into a file that is open."""
        place = self._place(name)
        num_bytes, stated = _persistently(lambda: self._copy(place, file, 2**62))[0], self.size(name)
        if num_bytes != stated:
            raise OSError(f"{place} has {stated} bytes, but {num_bytes} came")
        file.flush()

    def exists(self, name: str) -> bool:
        place = self._place(name)
        with suppress(FileNotFoundError):
            return os.path.exists(place) if self.is_local else bool(self._info(place))
        return False

    def size(self, name: str) -> int:
        """A file's bytes, as the store states them.

        Raises:
            ValueError: It does not state them, as some HTTP servers do not.
        """
        place = self._place(name)
        num_bytes = os.stat(place).st_size if self.is_local else self._info(place)["size"]
        if num_bytes is None:
            raise ValueError(f"the server of {place} does not say how many bytes it has; fetch it to a local folder first")
        return num_bytes

    def names(self) -> list[str]:
        """What lies directly in this folder, sorted; over HTTP what the server's page of it links to."""
        if self.is_local:
            return sorted(os.listdir(self.root))

        def ask() -> list[str]:
            with _told_plainly(self.root):
                return self._remote.ls(f"{self.root}/", detail=False)

        links = (path.rstrip("/").rpartition("/") for path in _persistently(ask))
        names = {name for folder, _, name in links if self.root.endswith(folder)}
        if self.protocol.startswith("http"):
            names = {unquote(name) for name in names}
        return sorted(filter(_leads_below, names))  # without the page's links to other orders of itself

    def _info(self, place: str) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            with _told_plainly(place):
                if self.protocol.startswith("http") and not self._remote.exists(place, strict=True):
                    raise FileNotFoundError(place)  # asked first, as info() calls every failure a missing file
                return self._remote.info(place)

        return _persistently(ask)

    @property
    def _remote(self) -> Any:
        return _filesystem(self.protocol, os.getpid())

    def _place(self, name: str) -> str:
        if not _leads_below(name):
            raise ValueError(f"{name!r} cannot name a file below {self.root}: plain parts joined by / are allowed")
        return f"{self.root.rstrip('/')}/{name}"

    def _download(self, place: str, file: BinaryIO, sha256: str, size: int) -> None:
        def copy() -> str:
            num_bytes, digest = _persistently(lambda: self._copy(place, file, size))
            return f"more than {size} bytes" if num_bytes > size else f"{num_bytes} bytes of SHA-256 {digest}"

        expected = f"{size} bytes of SHA-256 {sha256}"
        if copy() == expected or (found := copy()) == expected:  # the second time as the first may have been damaged on its way
            return
        raise ValueError(f"{place} was changed after it was indexed: expected {expected}, got {found}")

    def _copy(self, place: str, file: BinaryIO, max_bytes: int) -> tuple[int, str]:
        """Bytes and SHA-256 of what was read; reading stops, and nothing more is written, as soon as it exceeds `max_bytes`."""
        file.seek(0)
        digest, num_bytes = hashlib.sha256(), 0
        for chunk in self._chunks(place):
            num_bytes += len(chunk)
            digest.update(chunk)
            if num_bytes > max_bytes:
                break
            file.write(chunk)
        return num_bytes, digest.hexdigest()

    def _chunks(self, place: str) -> Iterator[bytes]:
        options = {"block_size": RANGE_BYTES, "cache_type": "readahead"}
        if self.protocol not in {"gs", "s3"}:  # the others stream; any size spares http a request that asks for it
            options = {"block_size": 0, "size": 1}
        with _told_plainly(place), self._remote.open(place, "rb", **options) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _taken_apart(root: str) -> tuple[str, str]:
    """Protocol, empty for a local folder, and root without a slash at its end."""
    url = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):(//([^/]*))?(.*)", root)
    protocol, _, host, path = url.groups() if url else ("", None, None, root)
    allowed = sorted({"file", *PACKAGES})
    if not root.isprintable() or root != root.strip() or not root or re.search(r"[|`]|::", root):
        refusal = "is empty or holds what no folder needs: control characters, space at an end, | ` or ::"
    elif protocol and (protocol not in allowed or host is None):
        refusal = f"is no path and no URL of {', '.join(allowed)} with // (a pathlib.Path loses a slash; give a string)"
    elif protocol and re.search(r"[ ?#]", root):
        refusal = "is a URL with a space, a query or a fragment, which are not supported"
    elif protocol == "file" and (host or not path):
        refusal = "names a machine where file:///folder names a folder"
    elif protocol in PACKAGES and not re.fullmatch(r"[A-Za-z0-9._-]+(:[0-9]+)?", host or ""):
        refusal = "needs a plain host or bucket, without user and password: credentials come from the environment"
    else:
        return protocol.removeprefix("file"), (path if protocol in {"", "file"} else root).rstrip("/") or "/"
    raise ValueError(f"the root {_without_secrets(root)!r} {refusal}")


def _leads_below(name: Any) -> bool:
    """Whether a name can only mean a file below its root on every store: no .., no query, nothing that a server unquotes."""
    plain = isinstance(name, str) and name.isprintable() and not re.search(r"[\\?#%|`]|::|://", name)
    return plain and not {"", ".", ".."} & set(name.split("/"))


def _without_secrets(text: str) -> str:
    """A message without user, password, query and fragment of the URLs in it: signed URLs carry their key there."""
    return re.sub(r"[?#][^\s'\"<>)]*", "", re.sub(r"//[^\s'\"<>]*@", "//", text))


@cache
def _filesystem(protocol: str, process: int) -> Any:
    """One per process, kept for good: a forked child that dropped its parent's would close connections that both share."""
    options: dict[str, Any] = {}
    if protocol.startswith("http"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )  # its default ends at 5 min
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)


@contextmanager
def _told_plainly(place: str) -> Iterator[None]:
    """Turns what a library raises into a missing file, a refusal or a failure that may pass; unchained, to hide secrets."""
    try:
        yield
    except Exception as error:
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError) or status == 404:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", place) from None
        refused = isinstance(error, PermissionError) or status in (401, 403)
        cause = " ".join(_without_secrets(f"{type(error).__name__}: {error}").split())
        raise (PermissionError if refused else ConnectionError)(f"{place} could not be read: {cause}") from None


def _persistently(action: Callable[[], Result]) -> Result:
    for pause in RETRY_PAUSES:
        try:
            return action()
        except ConnectionError as error:
            logger.warning("%s; trying again in %g s", error, pause)
            time.sleep(pause)
    return action()
