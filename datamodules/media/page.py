"""Pages: a PDF is drawn in a forked child, where time and memory have bounds that C code cannot pass.

A PDF of 600 bytes can keep PDFium busy for ever, another one fill the memory.
"""

import faulthandler
import json
import math
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pypdfium2

from datamodules.media.image import decode_image
from datamodules.media.limits import DecodeLimits, check_pixels, require
from datamodules.sample import BadExampleError

MAX_PDF_SECONDS = 4.0
MAX_PDF_BYTES = 384 * 2**20  # of memory, besides what the process has


def decode_page(data: bytes, format: str, limits: DecodeLimits) -> list[np.ndarray]:
    """A PDF or a page image to a list of uint8 (H, W, 3)."""
    if format != "pdf":
        return [decode_image(data, format, limits)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _draw_and_exit(data, limits, writer)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            head = json.loads(pipe.readline() or "{}")
            pages = [np.empty((*shape, 3), dtype=np.uint8) for shape in head.get("shapes", [])]
            whole = all(pipe.readinto(page.data) == page.nbytes for page in pages)
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if "refused" in head:
        raise BadExampleError(*head["refused"])
    require(status != -signal.SIGALRM, f"drawing this PDF takes longer than {MAX_PDF_SECONDS:g} s", "too slow")
    require(
        bool(pages) and whole, f"drawing this PDF fails ({status}) or takes over {MAX_PDF_BYTES >> 20} MiB", "does not decode"
    )
    return pages


def _draw_and_exit(data: bytes, limits: DecodeLimits, writer: int) -> NoReturn:
    """Write one line of JSON, the shapes of a PDF's pages or why there are none, then the pixels."""
    try:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # PDFium's last words when memory ends
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, min(limits.max_seconds, MAX_PDF_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with suppress(ValueError):  # where the limit is lower already
            resource.setrlimit(resource.RLIMIT_AS, (held + MAX_PDF_BYTES, held + MAX_PDF_BYTES))
        pages = []
        try:
            pages = _draw(data, limits)
            head = {"shapes": [page.shape[:2] for page in pages]}
        except Exception as error:
            cause = getattr(error, "cause", "does not decode")
            head = {"refused": [str(error) if cause != "does not decode" else f"this PDF does not decode: {error!r}", cause]}
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(head).encode() + b"\n")
            for page in pages:
                pipe.write(page.data)
    finally:
        os._exit(0)


def _draw(data: bytes, limits: DecodeLimits) -> list[np.ndarray]:
    document = pypdfium2.PdfDocument(data)
    num_pages = len(document)
    require(num_pages > 0, "this PDF has no page", "no page")
    require(
        num_pages <= limits.max_pages, f"this PDF has {num_pages} pages; allowed: 1 to {limits.max_pages}", "too many pages"
    )
    sizes = [document.get_page_size(i) for i in range(num_pages)]
    require(all(0 < side < math.inf for size in sizes for side in size), f"this PDF's pages measure {sizes}", "no pixel")
    scales: list[Any] = [limits.page_height / height for _, height in sizes]
    widths = [math.ceil(width * scale) for (width, _), scale in zip(sizes, scales, strict=True)]
    check_pixels(sum(widths), limits.page_height, limits)
    pages = []
    for page, scale in zip(document, scales, strict=True):
        pages.append(np.ascontiguousarray(page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3]))
        page.close()
    return pages
