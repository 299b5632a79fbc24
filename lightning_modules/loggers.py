"""A logger that fails is said once and left out; it never ends the run that it only watches."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger

ACTS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


def spared(loggers: list[Logger]) -> list[Logger]:
    """Those that can begin; each will do nothing more once it fails: on a full disk, a folder that is gone, a dead server."""
    return [logger for logger in loggers if _begin(logger)]


def _begin(logger: Logger) -> bool:
    is_lost = False

    def tried(act: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(act)
        def once_more(*arguments: Any, **options: Any) -> None:
            nonlocal is_lost
            try:
                if not is_lost:
                    act(*arguments, **options)
            except Exception as error:
                is_lost = True
                met = error.__cause__ or error  # TensorBoardLogger takes any error for a value that it does not know
                name = type(logger).__name__
                print(
                    f"WARNING: {name} fails ({met}) and is left out from now on; the run goes on", file=sys.stderr, flush=True
                )

        return once_more

    for name in ACTS:
        setattr(logger, name, tried(getattr(logger, name)))
    tried(lambda: getattr(logger, "experiment", None))()  # Lightning asks for it too, and this is what opens files
    return not is_lost
