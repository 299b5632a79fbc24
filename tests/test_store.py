"""Promises of stores and their cache: only what was indexed gets a name, once per machine, within bounds, below the root."""

import copy
import errno
import hashlib
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules import cache as cache_module
from datamodules import store as module
from datamodules.cache import CACHED, Cache
from datamodules.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12, on fork
FORK = multiprocessing.get_context("fork")


def content_of(name: str, size: int = 1000) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (size // 32) + b"." * (size % 32)


class Server(ThreadingHTTPServer):
    """Serves `files` by path; its switches make it fail, lie, stop half-way or send elsewhere."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = {f"/data/{name}.tar": content_of(name) for name in "abcd"}
        self.got: list[str] = []
        self.statuses: list[int] = []  # of the next answers
        self.num_damaged = 0  # so many of the next answers hold another byte
        self.num_cut = 0  # so many of the next answers end half-way
        self.moved: dict[str, str] = {}
        self.half_sent, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def handle_error(self, request, client_address):
        """Clients that hang up or are killed are meant."""

    def fetch(self, store: Store, name: str) -> Path:
        content = content_of(name)
        return store.fetch(f"{name}.tar", sha256=hashlib.sha256(content).hexdigest(), size=len(content))


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.server.got.append(self.path)
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        content = self.server.files.get(self.path)
        status = self.server.statuses.pop(0) if self.server.statuses else 404 if content is None else 200
        if self.path in self.server.moved:
            status = 302
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.moved[self.path])
        if status != 200 or content is None:
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path.endswith("/"):
            self.send_header("Content-Type", "text/html")
        if not self.path.endswith(".live"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            if self.server.num_damaged:
                self.server.num_damaged -= 1
                content = content[:-1] + b"!"
            self.wfile.write(content[: len(content) // 2])
            self.server.half_sent.set()
            self.server.may_go_on.wait(20)
            if self.server.num_cut:
                self.server.num_cut -= 1
            else:
                self.wfile.write(content[len(content) // 2 :])
        return None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "RETRY_PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.may_go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def remote(server, tmp_path) -> Store:
    return Store(f"{server.url}/data", cache=Cache(tmp_path / "cache", 3500))


def cached_in(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if CACHED.fullmatch(path.name):
                found[path.name] = path.stat().st_size
    return found


def cached_name(name: str) -> str:
    return hashlib.sha256(content_of(name)).hexdigest() + ".tar"


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


@pytest.mark.parametrize(
    "root",
    [
        "",
        "pipe:cat /etc/passwd",
        "pipe://cat",
        "ftp://host/data",
        "memory://data",
        "github://o:r@/data",
        "simplecache::s3://bucket/data",
        "zip://a::file:///x.zip",
        "/data::x",
        "cat x |",
        "/data/`id`",
        "/data\n",
        " /data",
        "/da\tta",
        "/da\0ta",
        "s3://bucket/a b",
        "S3://bucket/data",
        "s3:/bucket/data",
        "s3:bucket",
        "s3://",
        "http:///data",
        "http://host:port/data",
        "http://host\\@other/data",
        "file://host/data",
        "file://",
        "file:data",
        "http://host/data?token=1",
        "http://host/data#part",
        "https://user:hunter2@host/data",
        "https://hunter2@host/data",
        "https://user:hunt/er2@host/data",
        "s3://key:hunter2@bucket/data",
    ],
)
def test_a_root_that_is_no_plain_folder_or_url_is_refused(root):
    with pytest.raises(ValueError, match="the root") as caught:
        Store(root)
    assert "hunter2" not in str(caught.value)
    assert "er2" not in str(caught.value)
    assert "token=1" not in str(caught.value)


BAD_NAMES = ["", "/etc/passwd", "../x", "a/../x", "a//b", "a/", ".", "./a", "a\\b", "http://x/y", "a::b", "a\0", "a\nb"]
BAD_NAMES += ["%2e%2e/x", "a?b", "a#b", "a|b", "`id`", "\ud800", "a\u202eb", 7, None]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_could_lead_elsewhere_is_refused(name, tmp_path, server):
    for store in (Store(tmp_path), Store(server.url, cache=Cache(tmp_path / "cache", 10))):
        asked = [store.exists, store.size, store.__truediv__, lambda n, s=store: s.read_bytes(n, 10)]
        for ask in [*asked, lambda n, s=store: s.fetch(n, sha256="0" * 64, size=1)]:
            with pytest.raises(ValueError, match="cannot name a file below"):
                ask(name)
    assert server.got == []


@pytest.mark.parametrize(("sha256", "size"), [("../" + "0" * 61, 1), ("0" * 63, 1), (None, 1), ("A" * 64, 1), ("0" * 64, -1)])
def test_a_manifest_cannot_choose_where_in_the_cache_a_file_goes(sha256, size, remote, server):
    with pytest.raises(ValueError, match="its manifest is damaged"):
        remote.fetch("a.tar", sha256=sha256, size=size)
    assert server.got == []


@pytest.mark.parametrize(
    ("root", "protocol", "below"),
    [
        ("shards", "", "shards/a/b c.tar"),
        ("../shards/", "", "../shards/a/b c.tar"),
        ("/", "", "/a/b c.tar"),
        ("file:///data/set", "", "/data/set/a/b c.tar"),
        ("s3://bucket", "s3", "s3://bucket/a/b c.tar"),
        ("gs://bucket/data/", "gs", "gs://bucket/data/a/b c.tar"),
        ("hf://datasets/owner/name@main/data", "hf", "hf://datasets/owner/name@main/data/a/b c.tar"),
        ("https://host:8443/data", "https", "https://host:8443/data/a/b c.tar"),
    ],
)
def test_roots_are_taken_apart_and_names_go_below(root, protocol, below, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: package)
    store = Store(root)
    assert (store.protocol, store.is_local) == (protocol, protocol == "")
    assert (store / "a")._place("b c.tar") == below


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    for root, package in (("s3://b", "s3fs"), ("gs://b", "gcsfs"), ("https://h", "aiohttp"), ("hf://d", "huggingface_hub")):
        with pytest.raises(ValueError, match=f"pip install {package}"):
            Store(root)


def test_a_local_folder_is_read_in_place(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    store = Store(tmp_path) / "link"
    assert store.fetch("a.tar", sha256="0" * 64, size=7) == tmp_path / "link" / "a.tar"
    assert (store.names(), store.size("a.tar"), store.exists("a.tar"), store.exists("b.tar")) == (["a.tar"], 7, True, False)
    assert store.read_bytes("a.tar", 7) == b"content"
    with pytest.raises(ValueError, match="more than the 6 bytes"):
        store.read_bytes("a.tar", 6)
    with pytest.raises(ValueError, match="expected 8 bytes, got 7"):
        store.fetch("a.tar", sha256="0" * 64, size=8)
    with pytest.raises(FileNotFoundError):
        store.fetch("b.tar", sha256="0" * 64, size=8)


def test_a_remote_file_is_downloaded_once_and_named_by_its_hash(remote, server):
    path = server.fetch(remote, "a")
    assert path.name == cached_name("a")
    assert path.read_bytes() == content_of("a")
    assert server.fetch(remote, "a") == path
    assert server.fetch(copy.deepcopy(remote), "a") == path
    assert server.got == ["/data/a.tar"]


def test_questions_to_a_remote_folder(remote, server):
    server.files["/data/"] = b'<a href="?C=N;O=D">x</a><a href="../">x</a><a href="a%20b.tar">x</a><a href="sub/">x</a>'
    server.files["/data/"] += b'<a href="/data/a.tar">x</a><a href="sub/c.tar">x</a><a href="/other/d.tar">x</a>'
    assert remote.names() == ["a b.tar", "a.tar", "sub"]
    assert (remote.exists("a.tar"), remote.exists("z.tar"), remote.size("a.tar")) == (True, False, 1000)
    assert remote.read_bytes("a.tar", 1000) == content_of("a")
    with pytest.raises(ValueError, match="more than the 999 bytes"):
        remote.read_bytes("a.tar", 999)
    for ask in (remote.size, lambda name: remote.read_bytes(name, 10)):
        with pytest.raises(FileNotFoundError, match=r"no such file.*z\.tar"):
            ask("z.tar")
    server.files["/data/a.live"] = b"as long as it takes"
    assert remote.exists("a.live")
    with pytest.raises(ValueError, match="does not say how many bytes"):
        remote.size("a.live")
    with pytest.raises(ValueError, match="give the store a cache"):
        server.fetch(Store(remote.root), "a")


def test_failures_that_pass_are_waited_out_and_told(remote, server, caplog):
    server.statuses = [500, 503]
    assert server.fetch(remote, "a").read_bytes() == content_of("a")
    server.num_cut = 2
    assert server.fetch(remote, "b").read_bytes() == content_of("b")
    server.num_cut = 1
    assert remote.read_bytes("c.tar", 1000) == content_of("c")
    server.statuses = [500, 500]
    assert remote.size("a.tar") == 1000
    assert len(caplog.messages) == 6 + 1
    assert all("trying again" in message and server.url in message for message in caplog.messages)


def test_a_failure_that_stays_names_the_url_and_the_cause_and_leaves_nothing(remote, server):
    server.statuses = [503] * 4
    with pytest.raises(OSError, match=rf"{server.url}/data/a\.tar could not be read: .*503"):
        server.fetch(remote, "a")
    assert len(server.got) == 4
    server.statuses = [403]
    with pytest.raises(PermissionError, match="403"):
        server.fetch(remote, "a")
    assert len(server.got) == 5
    server.statuses = [500] * 8
    with pytest.raises(OSError, match="500"):
        remote.exists("a.tar")
    assert cached_in(remote.cache.folder) == {}


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (401, PermissionError), (429, ConnectionError)])
def test_errors_that_carry_a_response_are_told_by_its_status(status, kind):
    error = RuntimeError("as huggingface_hub raises it")
    error.response = SimpleNamespace(status_code=status)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(kind, match="hf://datasets/a/b"), module._told_plainly("hf://datasets/a/b"):
        raise error


def test_a_signed_url_stays_out_of_messages_and_tracebacks(remote, server, caplog):
    server.moved["/data/a.tar"] = "/signed/a.tar?X-Amz-Signature=hunter2"
    server.statuses = [200, 500] * 4
    with pytest.raises(OSError, match=r"/signed/a\.tar") as caught:
        server.fetch(remote, "a")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.parametrize(
    "change", [lambda content: b"x" * len(content), lambda content: content + b"x", lambda content: content[:-1]]
)
def test_a_file_that_was_changed_is_asked_for_twice_and_never_gets_a_name(change, remote, server):
    right, wrong = content_of("a"), change(content_of("a"))
    server.files["/data/a.tar"] = wrong
    with pytest.raises(
        ValueError, match=r"a\.tar was changed after it was indexed: expected 1000 bytes of SHA-256 .* got"
    ) as caught:
        server.fetch(remote, "a")
    assert hashlib.sha256(right).hexdigest() in str(caught.value)
    got = "more than 1000 bytes" if len(wrong) > 1000 else f"{len(wrong)} bytes of SHA-256 {hashlib.sha256(wrong).hexdigest()}"
    assert str(caught.value).endswith(f"got {got}")
    assert server.got == ["/data/a.tar"] * 2
    assert cached_in(remote.cache.folder) == {}


def test_a_file_that_was_damaged_on_its_way_is_asked_for_again(remote, server):
    server.num_damaged = 1
    assert server.fetch(remote, "a").read_bytes() == content_of("a")
    assert len(server.got) == 2


def test_no_more_than_the_promised_bytes_are_read(remote, server):
    server.files["/data/a.tar"] = bytes(2**26)
    server.may_go_on.clear()  # whoever reads to the end waits
    with pytest.raises(ValueError, match="expected 1000 bytes"):
        server.fetch(remote, "a")


def test_a_cached_file_of_another_size_is_fetched_again(remote, server):
    server.fetch(remote, "a").write_bytes(b"short")
    assert server.fetch(remote, "a").read_bytes() == content_of("a")
    assert len(server.got) == 2


def test_the_cache_evicts_what_was_not_used_for_longest_and_nothing_else(remote, server):
    folder = remote.cache.folder
    folder.mkdir()
    strangers = ["notes.txt", "0" * 64 + ".tar.backup", "0" * 63, ".x.partial", "0" * 64 + ".tar.partial"]
    for name in strangers:
        (folder / name).write_bytes(bytes(9000))
    for name in "abca":
        server.fetch(remote, name)
        time.sleep(0.02)  # file systems tell times to a few milliseconds
    with (folder / cached_name("b")).open("rb") as held:
        server.fetch(remote, "d")
        assert cached_in(folder) == dict.fromkeys(map(cached_name, "acd"), 1000)
        assert held.read() == content_of("b")
    assert all((folder / name).stat().st_size == 9000 for name in strangers)


def test_a_file_larger_than_the_cache_is_refused_before_anything_is_evicted(remote, server):
    server.fetch(remote, "a")
    with pytest.raises(ValueError, match=r"has 3501 bytes, the cache .* holds 3500; raise its max_bytes"):
        remote.fetch("b.tar", sha256="0" * 64, size=3501)
    assert list(cached_in(remote.cache.folder)) == [cached_name("a")]
    with pytest.raises(ValueError, match="above 0"):
        Cache("cache", 0)


def test_a_full_disk_is_told_before_the_download_and_during_it(remote, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=999))
        with pytest.raises(OSError, match=r"1000 bytes are needed and 999 free; .*cache'") as caught:
            server.fetch(remote, "a")
    assert caught.value.errno == errno.ENOSPC
    assert server.got == []

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            server.fetch(remote, "a")
    assert len(server.got) == 1
    assert cached_in(remote.cache.folder) == {}
    assert server.fetch(remote, "a").exists()


def started(server: Server, store: Store, name: str):
    process = FORK.Process(target=server.fetch, args=(store, name))
    process.start()
    return process


def ended(process) -> int:
    process.join(15)
    return process.exitcode


def test_processes_that_want_the_same_file_download_it_once(remote, server, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "SECONDS_UNTIL_TOLD", 0.1)
    server.may_go_on.clear()
    processes = [started(server, remote, "a") for _ in range(3)]
    wait_for(server.half_sent)
    waiting = threading.Thread(target=server.fetch, args=(remote, "a"))
    waiting.start()
    while not caplog.messages:
        time.sleep(0.01)
    assert list(cached_in(remote.cache.folder)) == [f".{cached_name('a')}.partial"]
    server.may_go_on.set()
    waiting.join(10)
    assert [ended(process) for process in processes] == [0] * 3
    assert server.got == ["/data/a.tar"]
    assert caplog.messages == [f"waiting for another process that downloads {cached_name('a')}"]


def test_processes_that_want_different_files_stay_within_the_bound_together(remote, server):
    remote.cache.max_bytes = 1500
    server.may_go_on.clear()
    processes = [started(server, remote, name) for name in "abc"]
    wait_for(server.half_sent)
    time.sleep(0.3)
    assert len(server.got) == 1  # the others wait for its room
    server.may_go_on.set()
    totals = []
    while any(process.is_alive() for process in processes):
        with remote.cache._locked():  # or a file that is renamed meanwhile counts twice
            totals.append(sum(cached_in(remote.cache.folder).values()))
        time.sleep(0.01)
    assert [ended(process) for process in processes] == [0] * 3
    assert max(totals) <= 1500
    assert len(server.got) == 3


def test_a_killed_download_never_gets_the_name_and_is_cleared_away(remote, server):
    remote.cache.max_bytes = 1500  # what it had reserved must come back
    server.may_go_on.clear()
    for next_name in ("a", "b", "same lock"):
        server.half_sent.clear()
        process = started(server, remote, "a")
        wait_for(server.half_sent)
        process.kill()
        assert ended(process) == -9
        assert list(cached_in(remote.cache.folder)) == [f".{cached_name('a')}.partial"]
        server.may_go_on.set()
        if next_name == "same lock":
            next_name = next(f"n{n}" for n in range(10**4) if cached_name(f"n{n}")[:2] == cached_name("a")[:2])
            server.files[f"/data/{next_name}.tar"] = content_of(next_name)
        path = server.fetch(remote, next_name)
        assert path.read_bytes() == content_of(next_name)
        assert cached_in(remote.cache.folder) == {path.name: 1000}
        path.unlink()
        server.may_go_on.clear()


def test_a_store_works_on_both_sides_of_a_fork(remote, server):
    server.fetch(remote, "a")
    assert ended(started(server, remote, "b")) == 0
    server.fetch(remote, "c")
    server.may_go_on.clear()
    download = threading.Thread(target=server.fetch, args=(remote, "d"))
    server.half_sent.clear()
    download.start()
    wait_for(server.half_sent)
    process = started(server, remote, "d")  # forked in the middle of a download, with its lock
    time.sleep(0.1)
    server.may_go_on.set()
    download.join(10)
    assert ended(process) == 0
    assert server.got == [f"/data/{name}.tar" for name in "abcd"]
