"""A bounded folder of the remote files that were used last, for all processes of a machine."""

import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

POLL_SECONDS, SECONDS_UNTIL_TOLD = 0.05, 10.0  # of a process that waits for another one: our choice
CACHED = re.compile(r"(\.)?[0-9a-f]{64}(\.[A-Za-z0-9]{1,8})?(?(1)\.partial)")  # group 1: not finished


class Cache:
    """A folder with the remote files that were used last, for any number of processes and stores on one machine.

    A file that a process holds open stays readable when another evicts it; its space comes back when it is closed. Who opens
    a path late may find it evicted and fetches again, so let the cache hold what all ranks and workers of the machine read at
    a time. Locks are flocks, which vanish with their process. What is not named as this class names files is left alone.

    Args:
        folder: Where the files lie, on a local disk; made when first needed, for its owner only.
        max_bytes: What its files may hold, downloads that are under way included.

    Raises:
        ValueError: `max_bytes` is not above 0.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"a cache of {max_bytes} bytes holds nothing; give max_bytes above 0")
        self.folder = Path(folder)
        self.max_bytes = max_bytes

    def get(self, name: str, size: int, download: Callable[[BinaryIO], None]) -> Path:
        """The file of that name; `download` writes and verifies it unless it is there or another process is at it."""
        assert CACHED.fullmatch(name)
        if size > self.max_bytes:
            raise ValueError(f"{name} has {size} bytes, the cache {self.folder} holds {self.max_bytes}; raise its max_bytes")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path, unfinished = self.folder / name, self.folder / f".{name}.partial"
        if _touched(path, size):
            return path
        with self._locked(name[:2], f"another process that downloads {name}"):
            if _touched(path, size):
                return path
            for left in self._named(f".{name[:2]}*.partial"):
                left.unlink()  # its process is gone, or its lock could not be ours
            try:
                with unfinished.open("wb") as file:
                    _wait_until(lambda: self._reserve(file, size), f"room in {self.folder}, full of unfinished downloads")
                    download(file)
                    file.flush()
                    os.fsync(file.fileno())
                with self._locked():
                    unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        return path

    @contextmanager
    def _locked(self, part: str = "all", waiting_for: str = "") -> Iterator[None]:
        """The sole right to download files whose name begins with `part`, or to count, name and evict files."""
        with (self.folder / f".lock-{part}").open("ab") as lock:
            _wait_until(lambda: _try_lock(lock), waiting_for or f"the lock of {self.folder}")
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing would leave it with a process that was forked meanwhile

    def _reserve(self, file: BinaryIO, size: int) -> bool:
        """Give a file its size, evicting those not used for longest; False if other downloads leave no room for it yet."""
        with self._locked():
            num_bytes = size + sum(self._num_bytes_unfinished(path) for path in self._named(".*.partial"))
            if num_bytes > self.max_bytes:
                return False
            finished = [(path.stat().st_mtime_ns, path, path.stat().st_size) for path in self._named("[!.]*")]
            for _, path, num_bytes_finished in sorted(finished, reverse=True):  # the last used first
                num_bytes += num_bytes_finished
                if num_bytes > self.max_bytes:
                    path.unlink()
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{size} bytes are needed and {free} free; free some or move it", f"{self.folder}")
            file.truncate(size)
            return True

    def _num_bytes_unfinished(self, path: Path) -> int:
        """What a download has reserved; it is removed if its process is gone, for which its lock being free stands."""
        with (self.folder / f".lock-{path.name[1:3]}").open("ab") as lock, suppress(FileNotFoundError):  # removed just now
            if not _try_lock(lock):
                return path.stat().st_size
            path.unlink()
        return 0

    def _named(self, pattern: str) -> list[Path]:
        return [path for path in self.folder.glob(pattern) if CACHED.fullmatch(path.name)]


def _wait_until(ready: Callable[[], bool], what: str) -> None:
    started, told = time.monotonic(), False
    while not ready():
        if not told and time.monotonic() - started > SECONDS_UNTIL_TOLD:
            logger.warning("waiting for %s", what)
            told = True
        time.sleep(POLL_SECONDS)


def _try_lock(file: BinaryIO) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _touched(path: Path, size: int) -> bool:
    """Whether a file of that size lies there, which counts as a use of it."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return path.stat().st_size == size
    return False
