"""`conf=explore`: a page that searches stored embeddings by text, picture, sound, clip or document.

The page is gradio's, its results are those of `explore_page.py`. Queries are answered in the main thread, one after another:
there the decoders' limit of time holds, and there a signal ends the page.
"""

import contextlib
import os
import queue
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console

from datamodules.record import KIND_OF
from datamodules.sample import MEDIA_KINDS
from lightning_modules.embeddings import Embeddings
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.embedding import template_of
from lightning_modules.explore_guard import Guard
from lightning_modules.explore_page import CSS, EVERY, ONE, Results, asked_html, kind_of, trouble
from lightning_modules.search import encoder_of, query_item

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SSR_MODE": "False"}

# Our choice.
KEPT_SECONDS = 3600  # of an upload while the page runs
MOST = 50  # items of a list
MAX_TEXT = 20_000  # letters of a query
EMPTY = '<p class="note">Type a text and press Enter, or drop a file: the nearest items appear here.</p>'


def explore(
    embeddings: str,
    checkpoint: str | None = None,
    *,
    task: str | None = "search result",
    host: str = "127.0.0.1",
    port: int = 7860,
    k: int = 6,
    max_upload_megabytes: float = 32,
    device: str = "auto",
) -> None:
    """Serve a search page over stored embeddings until Ctrl-C or SIGTERM. Asks nothing of any other machine.

    All vectors are compared, at the width that is chosen on the page.

    Args:
        embeddings: Folder that `conf=embed` wrote.
        checkpoint: The encoder that made them; null for where it lay then.
        task: Of the prompt around texts that are typed; null for none.
        host: Address that is listened on; any other than the loopback's lets other machines in, and there is no password.
        port: Its port.
        k: Items of a list when the page opens.
        max_upload_megabytes: Of a file that is dropped.
        device: `cpu`, `cuda`, or `auto` for the best there is.

    Raises:
        ValueError: gradio is missing, the port is taken, or the embeddings are unfinished or another encoder's.
    """
    if not 1 <= k <= MOST or max_upload_megabytes <= 0:
        raise ValueError(f"k is {k}, max_upload_megabytes {max_upload_megabytes:g}; allowed: 1 to {MOST}, above 0")
    console, stored = Console(), Embeddings(embeddings)
    _require_port(host, port)
    with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="explore-") as folder:
        uploads, served = Path(folder) / "uploads", Path(folder) / "served"
        uploads.mkdir()
        served.mkdir()
        require_gradio(uploads)
        encoder = encoder_of(stored, checkpoint, device)
        desk = Desk()
        page = Page(encoder, stored, served, task, k)
        demo = page.blocks(desk)
        try:
            _launch(demo, host, port, [str(uploads), str(served)], max_upload_megabytes)
            console.print(f"{len(stored):,} items at http://{host}:{port}  (Ctrl-C ends it)", soft_wrap=True)
            desk.serve()
        finally:
            demo.close(verbose=False)
    console.print("stopped; what was uploaded is deleted")


class Desk:
    """Answers in the main thread what other threads ask for."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()

    def ask(self, work: Callable[[], Any]) -> Any:
        """What the work returns or raises, once it was its turn."""
        future: Future = Future()
        self._asked.put((future, work))
        return future.result()

    def serve(self) -> None:
        """Work until an interrupt."""
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                try:  # a signal that comes just before a wait without end would be slept through
                    future, work = self._asked.get(timeout=0.5)
                except queue.Empty:
                    continue
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM does meanwhile what Ctrl-C does, so that what has to be tidied up is."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class Page:
    """The page's controls and what they do.

    Args:
        encoder: Makes the queries' vectors.
        embeddings: What is searched.
        served: Folder whose files the server hands out.
        task: Of the prompt around texts.
        k: Items of a list at first.
    """

    def __init__(self, encoder: Embedder, embeddings: Embeddings, served: Path, task: str | None, k: int) -> None:
        assert encoder.processor is not None
        template_of(task)
        self.encoder, self.task, self.k = encoder, task, k
        self.limits = encoder.processor.config.decode
        self.results = Results(embeddings, served, self.limits)
        width = embeddings.width
        self.prefixes = [prefix for prefix in encoder.config.prefixes if prefix < width] + [width]
        self.shown = {f"{kind} ({count:,})": kind for kind, count in self.results.counts.items()}
        if len(self.shown) > 1:
            self.shown = {EVERY: EVERY, ONE: ONE} | self.shown

    def asked(self, text: str | None, file: str | None, is_page: bool = False) -> tuple[list[float] | None, str]:
        """A query's vector and what is said of it: the query itself, or what is wrong with it.

        Args:
            text: None or empty for none.
            file: None for none.
            is_page: Whether a picture is one of a document's page.
        """
        text = (text or "").strip()
        if not text and file is None:
            return None, EMPTY
        try:
            if len(text) > MAX_TEXT:
                raise ValueError(f"the text has {len(text):,} letters; allowed: at most {MAX_TEXT:,}")
            kind = "page" if is_page and file and kind_of(Path(file).suffix[1:].lower()) == "image" else None
            vector = self.encoder.embed([query_item(text, file, kind)], task=self.task)[0]
            return vector.tolist(), asked_html(text, file, self.limits)
        except (OSError, ValueError) as error:
            return None, trouble(str(error).removeprefix("item 0: "))

    def answered(self, vector: list[float] | None, prefix: int, shown: str, k: int) -> str:
        """The nearest of a query as HTML; nothing where there is none."""
        if vector is None:
            return ""
        lists = self.results.found(np.array(vector, np.float32), prefix=prefix, shown=self.shown[shown], k=k)
        return self.results.page(lists, prefix)

    def blocks(self, desk: Desk) -> Any:
        """The page."""
        import gradio as gr

        def ask(text: str, file: str | None, is_page: bool, prefix: int, shown: str, k: int) -> tuple[Any, str]:
            vector, said = desk.ask(lambda: self.asked(text, file, is_page))
            return (vector, said), framed(said, desk.ask(lambda: self.answered(vector, prefix, shown, k)))

        def again(state: tuple[Any, str], prefix: int, shown: str, k: int) -> str:
            return framed(state[1], desk.ask(lambda: self.answered(state[0], prefix, shown, k)))

        embeddings = self.results.embeddings
        formats = [f".{name}" for name, kind in KIND_OF.items() if kind in MEDIA_KINDS]
        with gr.Blocks(title="Explore", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS), fill_width=True) as demo:
            state = gr.State((None, EMPTY))
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    gr.Markdown(f"## {len(embeddings):,} items")
                    text = gr.Textbox(label="Text", placeholder="Enter searches", lines=1, max_lines=5, max_length=MAX_TEXT)
                    file = gr.File(label="Picture, sound, clip or PDF", file_types=formats, type="filepath", height=140)
                    is_page = gr.Checkbox(label="The picture is a document's page", visible="page" in self.results.counts)
                    go = gr.Button("Search", variant="primary")
                    prefix = gr.Radio(self.prefixes, value=self.prefixes[-1], label="Dimensions compared")
                    k = gr.Slider(1, MOST, self.k, step=1, label="Items in a list")
                with gr.Column(scale=5, min_width=480):
                    shown = gr.Radio(list(self.shown), value=next(iter(self.shown)), show_label=False, container=False)
                    out = gr.HTML(framed(EMPTY, ""), elem_id="results")
            given = [prefix, shown, k]
            for event in (text.submit, go.click, file.upload, file.clear, is_page.change):
                event(ask, [text, file, is_page, *given], [state, out], api_visibility="private", show_progress="minimal")
            for event in (prefix.change, shown.change, k.release):
                event(again, [state, *given], out, api_visibility="private", show_progress="minimal")
        return demo


def framed(said: str, answered: str) -> str:
    """What the page shows on its right."""
    return f'<div class="hits">{said}{answered}</div>'


def _launch(demo: Any, host: str, port: int, folders: list[str], megabytes: float) -> None:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    doors = [Middleware(Guard, folders=folders)]  # type: ignore[arg-type]
    if host in LOOPBACK:  # a name of somebody else's that leads here is refused
        doors.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK)))
    fonts = ["system-ui", "sans-serif"]  # those of other themes are fetched
    demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        inbrowser=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        max_file_size=int(megabytes * 2**20),
        allowed_paths=folders,
        app_kwargs={"middleware": doors},
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )


def _require_port(host: str, port: int) -> None:
    """Raises ValueError where an address cannot be listened on, before anything is loaded."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on ({error}); is another page open there? Give port=<another>"
        ) from error


def require_gradio(uploads: Path) -> None:
    """Raises ValueError where the library of the page is not installed; it reads its settings when it is imported first.

    Args:
        uploads: Folder for what is uploaded and all else that it keeps.
    """
    os.environ.update({**SETTINGS, "GRADIO_TEMP_DIR": str(uploads)})
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install -e '.[explore]'") from error
    assert gr
