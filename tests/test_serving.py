"""Promises of README's section on serving: its client example speaks OpenAI's embeddings convention and gets our vectors."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import tiny_encoder

from lightning_modules.encoder.embedder import Embedder

ROOT = Path(__file__).parent.parent
EXAMPLE = """
import numpy as np
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
texts = ["task: search result | query: a red circle", "title: none | text: Two objects: a red circle and a star."]
answer = client.embeddings.create(model="polyphony", input=texts, encoding_format="float")
vectors = np.array([one.embedding for one in answer.data])[:, :256]  # a prefix
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
print(vectors[0] @ vectors[1])
"""


class Engine(ThreadingHTTPServer):
    """Answers POST /v1/embeddings with the vectors of an encoder, as an engine does."""

    def __init__(self, encoder: Embedder) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.encoder, self.asked = encoder, []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        engine = self.server
        assert isinstance(engine, Engine)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine.asked.append((self.path, body))
        vectors = engine.encoder.embed(body["input"])
        data = [{"object": "embedding", "index": n, "embedding": vector.tolist()} for n, vector in enumerate(vectors)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        answer = json.dumps({"object": "list", "model": body["model"], "data": data, "usage": usage}).encode()
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)


def test_the_client_example_gets_the_vectors_of_the_encoder(tmp_path, processor):
    pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[dev]'")
    encoder = tiny_encoder(tmp_path / "encoder", processor)
    with Engine(encoder) as engine:
        thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            code = EXAMPLE.replace("127.0.0.1:8000", f"127.0.0.1:{engine.server_address[1]}")
            environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
        finally:
            engine.shutdown()
            thread.join()
    assert done.returncode == 0, done.stderr
    ((path, body),) = engine.asked
    assert (path, body["model"]) == ("/v1/embeddings", "polyphony")
    (query,) = encoder.embed(["a red circle"], task="search result")
    (document,) = encoder.embed(["Two objects: a red circle and a star."], task="document")
    assert float(done.stdout) == pytest.approx(float(np.dot(query, document)), abs=1e-6)


def test_the_readme_shows_that_example():
    readme = (ROOT / "README.md").read_text()
    if "## Serving" not in readme:
        pytest.skip("README.md has no section on serving")
    assert "\n".join(f"    {line}" if line else "" for line in EXAMPLE.strip().split("\n")) in readme
