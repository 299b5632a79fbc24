"""A DataLoader over a data set that yields whole batches, whose processes neither hang nor outlive the run."""

import atexit
import ctypes
import functools
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def loader_of(dataset: Any, num_workers: int, *, start_method: str = "fork", max_wait_seconds: float = 900.0) -> "BatchLoader":
    """A loader whose `num_workers` processes each make whole batches; 0 makes them here."""
    workers = {}
    if num_workers:
        workers = {"multiprocessing_context": start_method, "prefetch_factor": 4, "timeout": max_wait_seconds}
    return BatchLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(_begin, os.getpid()),
        **workers,
    )


class BatchLoader(DataLoader[Any]):
    """A DataLoader that says in one sentence when a process of its own hangs or dies.

    Raises:
        ValueError: (while iterating) a process made no batch in time or was killed.
    """

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                raise ValueError(
                    f"a process that reads data hangs or died: {str(error).splitlines()[0].rstrip('.')}. "
                    "An example may be to blame (conf=verify finds it), or memory (take fewer data.num_workers)"
                ) from error
            yield batch


def kill_workers() -> None:
    """End the processes that this one began, which hear no SIGTERM; those left at the program's end would be waited for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an accident
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(kill_workers)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that comes about (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_with(process: int) -> None:
    """Wait for a process to end, and end this one then."""
    try:
        select.select([os.pidfd_open(process)], [], [])
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _begin(trainer: int, worker: int) -> None:
    """A worker's first act. A stop is the training process's to hear: the batch in hand is still wanted."""
    del worker
    die_with_parent()
    if os.getppid() != trainer:  # a fork server's child, whose parent goes on
        threading.Thread(target=_die_with, args=(trainer,), daemon=True).start()
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)
    torch.set_num_threads(1)
