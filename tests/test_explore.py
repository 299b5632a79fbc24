"""Promises of the search page: it finds the nearest of every modality, asks nothing of other machines, escapes everything."""

import asyncio
import base64
import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pages import CHROMIUM
from pages import Page as Source
from PIL import Image
from samples import picture_bytes, sound_bytes
from stores import HOSTILE, of_world

from lightning_modules.embeddings import Embeddings
from lightning_modules.explore import Desk, Page, explore, sigterm_interrupts
from lightning_modules.explore_guard import MAX_BODY, Guard
from lightning_modules.explore_page import EVERY, MAX_SERVED, ONE, THUMBNAIL, kind_of
from lightning_modules.search import encoder_of

ROOT = Path(__file__).parent.parent
PATIENCE = 120_000  # ms: of a busy machine


@pytest.fixture(scope="module")
def stored(tmp_path_factory, world, processor) -> Embeddings:
    return of_world(tmp_path_factory.mktemp("explored"), world, processor)


@pytest.fixture(scope="module")
def page(stored, tmp_path_factory) -> Page:
    return Page(encoder_of(stored, None, "cpu"), stored, tmp_path_factory.mktemp("served"), "search result", 3)


def shown(html: str) -> dict[str, list[tuple[int, int, float]]]:
    """Of each section the rows, ranks and cosines of its cards."""
    found = {}
    for name, section in re.findall(r'<section data-modality="(.*?)">(.*?)</section>', html, flags=re.DOTALL):
        cards = re.findall(r'data-row="(\d+)">.*?<b>(\d+)</b>.*?class="cos">(-?[\d.]+)<', section, flags=re.DOTALL)
        found[name] = [(int(row), int(rank), float(cosine)) for row, rank, cosine in cards]
    return found


def label(page: Page, kind: str) -> str:
    return next(label for label, shown in page.shown.items() if shown == kind)


def test_a_text_finds_the_nearest_of_every_modality(page, stored):
    vector, said = page.asked("a red circle", None)
    lists = shown(page.answered(vector, 16, EVERY, 3))
    assert list(lists) == ["text", "code", "image", "page", "audio", "video", "mixed"]
    cosines = stored.vectors() @ np.array(vector, np.float32)
    for kind, cards in lists.items():
        own = [row for row in np.argsort(-cosines, kind="stable").tolist() if stored.modalities[row] == kind]
        assert [row for row, _, _ in cards] == own[:3]
        assert [rank for _, rank, _ in cards] == [1, 2, 3]
        assert [cosine for _, _, cosine in cards] == pytest.approx(cosines[own[:3]].tolist(), abs=6e-4)
    assert "a red circle" in said


def test_one_list_and_one_modality_are_other_cuts_of_the_same(page, stored):
    vector, _ = page.asked("a red circle", None)
    order = np.argsort(-(stored.vectors() @ np.array(vector, np.float32)), kind="stable").tolist()
    assert [row for row, *_ in shown(page.answered(vector, 16, ONE, 9))["nearest"]] == order[:9]
    assert [row for row, *_ in shown(page.answered(vector, 16, label(page, "audio"), 50))["audio"]] == [
        row for row in order if stored.modalities[row] == "audio"
    ]
    assert label(page, "audio") == "audio (6)"


@pytest.mark.parametrize("kind", ["image", "page", "audio", "video"])
def test_a_medium_finds_itself(page, stored, kind):
    row = stored.modalities.index(kind) + 2
    vector, said = page.asked("", stored.described(row)["path"], is_page=kind == "page")
    assert shown(page.answered(vector, 16, EVERY, 3))[kind][0] == (row, 1, 1.0)
    assert {"image": "<img", "page": "<img", "audio": "<audio", "video": "<video"}[kind] in said


def test_a_document_shows_its_first_page(page, stored, tmp_path):
    (tmp_path / "a.pdf").write_bytes(picture_bytes("PDF", width=300, height=200))
    vector, said = page.asked("", str(tmp_path / "a.pdf"))
    assert vector is not None
    with Image.open(io.BytesIO(base64.b64decode(said.partition("base64,")[2].partition('"')[0]))) as picture:
        assert picture.size == (THUMBNAIL, THUMBNAIL * 2 // 3)


def test_a_text_before_a_medium_is_one_query(page, stored):
    path = stored.described(stored.modalities.index("image"))["path"]
    vector, said = page.asked("with a red circle", path)
    wanted = page.encoder.embed([["with a red circle", Path(path)]], task="search result")[0]
    np.testing.assert_allclose(vector, wanted, rtol=0, atol=1e-6)
    assert "with a red circle" in said
    assert "<img" in said


def test_another_prefix_gives_other_scores_and_says_what_is_new(page, stored):
    vector, _ = page.asked("a red circle", None)
    assert page.prefixes == [4, 8, 16]
    html = page.answered(vector, 4, ONE, 15)
    narrow, whole = shown(html)["nearest"], shown(page.answered(vector, 16, ONE, 15))["nearest"]
    assert [cosine for *_, cosine in narrow] != [cosine for *_, cosine in whole]
    new = {row for row, *_ in narrow} - {row for row, *_ in whole}
    assert html.count('class="new"') == len(new) > 0
    assert f"{15 - len(new)} of these 15 also at 16 dimensions" in html


def test_a_cut_store_offers_the_prefixes_that_it_has(stored, page, tmp_path):
    from lightning_modules.embeddings import write_embeddings
    from lightning_modules.parts import Described

    vectors = stored.vectors(None, 8)[:3]
    write_embeddings(
        tmp_path / "cut", [Described(str(n), "text", "x") for n in range(3)], vectors, encoder=stored.about["encoder"]
    )
    cut = Page(page.encoder, Embeddings(tmp_path / "cut"), tmp_path, None, 3)
    assert (cut.prefixes, list(cut.shown.values())) == ([4, 8], ["text"])
    vector, _ = cut.asked("a red circle", None)
    assert len(shown(cut.answered(vector, 8, "text (3)", 3))["text"]) == 3


def test_what_comes_from_anywhere_is_only_text(page, stored):
    vector, said = page.asked(HOSTILE, None)
    html = said + page.answered(vector, 16, label(page, "text"), 50)
    source = Source(html)
    assert "script" not in source.tags
    assert not {name for name in source.attributes if name.startswith("on")}
    assert HOSTILE in source.text
    assert "<b>bold</b>" in source.text
    assert all(address.startswith(("data:image/jpeg;base64,", "/gradio_api/file=")) for _, address in source.addresses)


def test_what_cannot_be_used_is_told_in_a_sentence(page, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "long.wav").write_bytes(sound_bytes(seconds=181, rate=1000))
    (tmp_path / "<i>.png").write_bytes(b"")
    for text, file, message in (
        ("", tmp_path / "bad.png", "does not decode"),
        ("", tmp_path / "long.wav", "this audio lasts 181.0 s; allowed: at most 180.0 s"),
        ("", tmp_path / "none.png", "cannot be read"),
        ("a" * 20_001, None, "the text has 20,001 letters; allowed: at most 20,000"),
    ):
        vector, said = page.asked(text, file and str(file))
        assert vector is None
        assert message in said
        assert 'role="alert"' in said
        assert not {"Traceback", "0x"} & set(re.findall(r"Traceback|0x", said))
    assert page.answered(None, 16, EVERY, 3) == ""
    assert "appear here" in page.asked("  ", None)[1]


def test_a_medium_that_is_gone_is_named_on_its_card_alone(page, stored, monkeypatch):
    row = stored.modalities.index("audio")
    monkeypatch.setattr(stored, "medium", lambda row: (_ for _ in ()).throw(ValueError("the medium is no longer <there>")))
    vector, _ = page.asked("", stored.described(row)["path"])
    html = page.answered(vector, 16, label(page, "audio"), 2)
    assert html.count("cannot be shown: the medium is no longer &lt;there&gt;") == 2
    assert len(shown(html)["audio"]) == 2
    with pytest.raises(ValueError, match="'svg' are not shown"):
        kind_of("svg")


def test_copies_that_are_served_stay_few(page, stored):
    folder = page.results.folder
    for number in range(MAX_SERVED + 5):
        (folder / f"old-{number}.wav").write_bytes(b"")
        os.utime(folder / f"old-{number}.wav", (number, number))
    vector, _ = page.asked("a", None)
    html = page.answered(vector, 16, label(page, "audio"), 3)
    left = {file.name for file in folder.iterdir()}
    assert len(left) == MAX_SERVED
    assert {Path(address).name for tag, address in Source(html).addresses if tag == "audio"} <= left


def answer_of(guard: Guard, path: str, body: bytes = b"") -> int:
    """The status that a guarded server answers with."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path}, receive, send))
    return sent[0]["status"]


def test_no_socket_is_opened():
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError

    asyncio.run(Guard(never, [])({"type": "websocket", "path": "/"}, never, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_only_the_pages_own_requests_are_answered(tmp_path):
    seen = []

    async def app(scope, receive, send) -> None:
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200})

    guard = Guard(app, [str(tmp_path / "uploads")])
    file = str(tmp_path / "uploads" / "a" / "b.png")
    for path in ("/", "/assets/index.js", "/gradio_api/upload", "/gradio_api/heartbeat/x", f"/gradio_api/file={file}"):
        assert answer_of(guard, path) == 200
    for path in (
        "/gradio_api/file=http://example.com/a.png",
        "/gradio_api/file=https%3A//example.com/a.png",
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={tmp_path}/uploads/../secret",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://example.com",
        "/gradio_api/run/ask",
        "/gradio_api/call/ask",
        "/gradio_api/vibe-edit",
        "/monitoring",
        "/elsewhere",
    ):
        assert answer_of(guard, path) == 403, path
    joins: list[tuple[Any, int]] = [
        ({"data": ["see http://example.com", None, 16]}, 200),
        ({"data": ["", {"path": file, "url": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}]}, 200),
        ({"data": ["", {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}]}, 403),
        ({"data": [{"deep": [{"path": "/etc/passwd"}]}]}, 403),
        ({"data": ["a" * MAX_BODY]}, 403),
    ]
    for body, status in joins:
        assert answer_of(guard, "/gradio_api/queue/join", json.dumps(body).encode()) == status, body
    assert answer_of(guard, "/gradio_api/queue/join", b"no json") == 403
    assert seen[-1] == json.dumps(joins[1][0]).encode()


def test_work_is_done_in_the_main_thread_until_a_signal_comes():
    desk, answers = Desk(), []

    def ask() -> None:
        answers.append(desk.ask(threading.current_thread))
        with contextlib.suppress(ZeroDivisionError):
            desk.ask(lambda: 1 // 0)
        answers.append(desk.ask(lambda: "still there"))
        os.kill(os.getpid(), signal.SIGTERM)

    before, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=ask)
    thread.start()
    with sigterm_interrupts():
        desk.serve()
    thread.join(10)
    assert answers == [threading.main_thread(), "still there"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_does_not_fit_is_refused_before_anything_is_loaded(stored, tmp_path, monkeypatch):
    cases: list[tuple[dict[str, Any], str]] = [({"k": 0}, "k is 0"), ({"k": 51}, "allowed: 1 to 50")]
    for given, message in [*cases, ({"max_upload_megabytes": 0}, "max_upload_megabytes 0")]:
        with pytest.raises(ValueError, match=message):
            explore(str(stored.folder), **given)
    with pytest.raises(ValueError, match=r"no embeddings.*embeddings\.json is missing"):
        explore(str(tmp_path))
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ValueError, match=r"the page needs gradio .*pip install -e '\.\[explore\]'"):
        explore(str(stored.folder))


class Served(NamedTuple):
    """A page that runs in a process of its own."""

    process: subprocess.Popen
    port: int
    temporary: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def served(stored, tmp_path_factory) -> Iterator[Served]:
    if importlib.util.find_spec("gradio") is None:  # importing it leaves event loops open
        pytest.skip("gradio is not installed: pip install -e '.[explore]'")
    temporary, port = tmp_path_factory.mktemp("tmp"), free_port()
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "train.py",
        "conf=explore",
        f"embeddings={stored.folder}",
        f"port={port}",
        "max_upload_megabytes=1",
    ]
    log = temporary / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen([*command, "k=3", "device=cpu"], cwd=ROOT, env=environment, stdout=out, stderr=out)
    until = time.monotonic() + PATIENCE / 1000
    while "Ctrl-C ends it" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    yield Served(process, port, temporary)
    process.kill()
    process.wait()


class Visit(NamedTuple):
    """A page in the browser, the requests that it made, and what it said to the console."""

    page: Any
    requests: list[str]
    errors: list[str]

    def search(self, text: str) -> None:
        self.page.fill("textarea", text)
        self.page.press("textarea", "Enter")

    def until(self, script: str) -> None:
        """Wait for what a script says."""
        self.page.wait_for_function(script, timeout=PATIENCE)


@pytest.fixture
def visit(served) -> Iterator[Visit]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine to open the page with")
    only_here = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", only_here])
        page, requests, errors = browser.new_page(viewport={"width": 1400, "height": 900}), [], []
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{served.port}")
        page.wait_for_selector("textarea")
        yield Visit(page, requests, errors)
        browser.close()


def test_the_page_in_a_browser(visit, served, stored, tmp_path):
    page, about = visit.page, "document.querySelectorAll('.hits section').length"
    visit.search(f"{HOSTILE} a red circle")
    visit.until(f"() => {about} === 7")
    assert page.locator(".hits audio").count() == 3
    visit.until("() => [...document.querySelectorAll('.hits audio, .hits video')].every(player => player.readyState > 0)")
    assert page.locator(".hits img").count() >= 6
    assert HOSTILE in page.locator(".hits .asked").inner_text()
    page.screenshot(path=tmp_path / "text.png", full_page=True)

    before = page.locator(".hits .cos").all_inner_texts()
    page.get_by_label("4", exact=True).check()
    visit.until(f"() => document.querySelector('.hits').innerText.includes('also at 16 dimensions') && {about} === 7")
    assert page.locator(".hits .cos").all_inner_texts() != before
    page.get_by_label("video (6)").check()
    visit.until(f"() => {about} === 1")
    assert page.locator(".hits section").get_attribute("data-modality") == "video"

    row = stored.modalities.index("image") + 1
    page.get_by_label("every modality").check()
    page.fill("textarea", "")
    page.set_input_files("input[type=file]", stored.described(row)["path"])
    visit.until("() => document.querySelector('.hits .asked img') !== null")
    first = page.locator("section[data-modality=image] .card").first
    assert (first.get_attribute("data-row"), first.locator(".cos").inner_text()) == (str(row), "1.000")

    page.reload()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(2**20 + 1))
    page.set_input_files("input[type=file]", large)
    page.get_by_text("exceed the maximum allowed size of 1.0 Mb").wait_for()
    page.reload()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.set_input_files("input[type=file]", tmp_path / "bad.png")
    page.locator(".hits [role=alert]").get_by_text("does not decode").wait_for()

    assert page.title() == "Explore"
    assert visit.errors == []
    assert [url for url in visit.requests if not url.startswith((f"http://127.0.0.1:{served.port}/", "data:", "blob:"))] == []


def fetched(port: int, path: str, **headers: str) -> int:
    """The status of an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def test_the_server_hands_out_nothing_else(served, stored):
    assert fetched(served.port, "/") == 200
    assert fetched(served.port, "/", Host="elsewhere.example") == 400  # a name of somebody else's that leads here
    media = stored.described(stored.modalities.index("image"))["path"]
    for path in (media, "/etc/passwd", "http://127.0.0.1:1/a", str(ROOT / "train.py")):
        assert fetched(served.port, f"/gradio_api/file={path}") == 403


def test_a_port_that_is_taken_is_refused_in_a_sentence(stored):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} cannot be listened on .*Give port=<another>"):
            explore(str(stored.folder), port=port)


def test_sigterm_ends_the_page_cleanly_and_leaves_no_upload(served):
    assert list(served.temporary.glob("explore-*"))
    served.process.terminate()
    assert served.process.wait(30) == 0
    printed = (served.temporary / "log.txt").read_text()
    assert "stopped; what was uploaded is deleted" in printed
    assert "Traceback" not in printed
    assert [path.name for path in served.temporary.iterdir()] == ["log.txt"]
