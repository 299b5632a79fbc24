"""Promises of the push: a dry run shows what would go and sends nothing, what must not go is refused, an upload is a commit."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from datamodules.files import sha256_of
from lightning_modules.push import push, refusals

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    """What an export looks like."""
    place = tmp_path / "exported"
    (place / "1_Pooling").mkdir(parents=True)
    (place / "README.md").write_text("---\ntags: []\n---\n# Ünïcödé\n")
    for name in ("modules.json", "config.json", "1_Pooling/config.json"):
        (place / name).write_text("{}")
    save_file({"a": np.zeros(3, np.float32)}, place / "model.safetensors")
    return place


def test_a_dry_run_shows_every_file_and_sends_nothing(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("lightning_modules.push._upload", lambda *_: pytest.fail("something was sent"))
    push(str(folder), "somebody/encoder")
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    for path in folder.rglob("*.*"):
        assert rows[str(path.relative_to(folder))] == [f"{path.stat().st_size:,}", sha256_of(path)[:16]]
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert f"5 files, {total:,} bytes, to somebody/encoder (private where it is made anew)" in printed
    assert "nothing was sent; dry_run=false uploads them" in printed
    assert "hf_secret" not in printed


def pickled(path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, path)


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def written(data: bytes) -> Any:
    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return write


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("pytorch_model.bin", pickled, "pytorch_model.bin is none of .json"),
        ("model.ckpt", written(b"x"), "model.ckpt is none of"),
        ("weights.safetensors", pickled, "weights.safetensors is no safetensors file"),
        ("tokenizer.model", written(b"\x80\x04K\x01."), "tokenizer.model holds a pickle or an archive"),
        ("vocab.txt", pickled, "vocab.txt holds a pickle or an archive"),
        ("more.json", written(b"{"), "more.json is no json"),
        ("more.txt", written(b"\xff\xfe\xff"), "more.txt is no txt"),
        ("other.json", link, "other.json is a link, which may lead anywhere"),
        ("__pycache__/a.py", written(b""), "__pycache__ lies in a cache"),
        (".env", written(b"HF_TOKEN=x"), ".env is hidden"),
        (".cache/a.json", written(b"{}"), ".cache lies in a cache"),
        ("key.pem", written(b"x"), "key.pem is none of"),
    ],
)
def test_what_must_not_go_is_refused_by_name(name, make, message, folder, monkeypatch):
    make(folder / name)
    assert any(found.startswith(message) for found in refusals(folder))
    monkeypatch.setattr("lightning_modules.push._upload", lambda *_: pytest.fail("something was sent"))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="is not uploaded: "):
            push(str(folder), "somebody/encoder", dry_run=dry_run)


def test_a_pipe_is_no_file_to_publish(folder):
    os.mkfifo(folder / "pipe.json")
    assert refusals(folder) == ["pipe.json is no plain file"]


@pytest.mark.parametrize("repo", ["encoder", "a/b/c", "../b", "a/..", "a b/c", "https://x/y", ""])
def test_a_name_that_is_none_is_refused(repo, folder):
    with pytest.raises(ValueError, match="it must be owner/name"):
        push(str(folder), repo)


def test_a_folder_that_is_no_export_is_refused(folder, tmp_path):
    (folder / "modules.json").unlink()
    for place in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is no folder that conf=export wrote"):
            push(str(place), "somebody/encoder")


def test_without_a_token_or_a_network_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="uploading needs a token with write access in the environment: HF_TOKEN"):
        push(str(folder), "somebody/encoder", dry_run=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ValueError, match="cannot be reached") as error:  # HF_HUB_OFFLINE, as in all tests
        push(str(folder), "somebody/encoder", dry_run=False)
    assert "hf_secret" not in str(error.value)


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload of small files needs."""

    seen: list[tuple[str, str | None, bytes]] = []  # noqa: RUF012
    denies = False

    def do_GET(self) -> None:
        self._answer(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        own = f"http://{self.headers['Host']}/somebody/encoder"
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.denies:
            self._answer(403, {"error": "no rights"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            told = {"success": True, "commitOid": "ab" * 20, "commitUrl": f"{own}/commit/" + "ab" * 20}
            self._answer(200, {**told, "hookOutput": "", "pullRequestUrl": None})
        else:
            self._answer(200, {"url": own, "name": "somebody/encoder", "warnings": [], "errors": []})

    def _answer(self, status: int, told: dict[str, Any]) -> None:
        data = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(Hub, "seen", [])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pushed(hub: str, folder: Path, **more: str) -> subprocess.CompletedProcess:
    """conf=push in a process of its own, whose hub is here."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", **more}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "train.py", "conf=push", f"folder={folder}", "repo=somebody/encoder", "dry_run=false"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_an_upload_is_one_commit_of_all_files_to_a_private_repository(folder, hub):
    done = pushed(hub, folder)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub}/somebody/encoder/commit/abab" in done.stdout
    made = next(json.loads(body) for path, _, body in Hub.seen if path.endswith("/repos/create"))
    assert made["name"] == "encoder"
    assert made.get("visibility") == "private" or made.get("private") is True  # of newer and older huggingface_hub
    assert {token for _, token, _ in Hub.seen} == {"Bearer hf_secret"}
    commits = [body for path, _, body in Hub.seen if "/commit/" in path]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    assert sent == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_the_hub_refuses_is_told_in_one_sentence(folder, hub, monkeypatch):
    monkeypatch.setattr(Hub, "denies", True)
    done = pushed(hub, folder)
    assert done.returncode == 1
    assert f"error: the hub {hub} refuses somebody/encoder: " in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
