"""A server that speaks OpenAI's protocol and answers by a script, well or badly, for tests of whatever asks an LLM.

    with ScriptedServer(lambda body, number: "yes") as server:
        llm = Server("a-model", server.base_url)

GET /v1/models names `MODELS`; POST /v1/chat/completions and /v1/completions ask the script, and `Reply()` is a good answer to
both: a chat's text, or `echo` of the prompt with likelihoods. Where the environment names a proxy, NO_PROXY must name
127.0.0.1.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

MODELS = ("a-model", "another-model")


@dataclass(frozen=True)
class Reply:
    """What goes back; the first fields make a proper completion, the others spoil it.

    Args:
        text: The answer of a chat.
        finish_reason: `length` for one that is cut off.
        model: Which says that it answers; None is the one that was asked.
        status: HTTP status.
        body: Stands in place of a completion: JSON, or bytes as they are.
        headers: Further ones, such as Retry-After.
        delay: Seconds before anything is sent.
        cut: Half of the body is sent, then the connection closed.
        closed: The connection is closed without a byte.
    """

    text: str = "ok"
    finish_reason: str = "stop"
    model: str | None = None
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0
    cut: bool = False
    closed: bool = False


@dataclass(frozen=True)
class Recorded:
    """A request as it came in; names of headers are in small letters, `time` is in monotonic seconds."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    time: float


Script = Callable[[dict[str, Any], int], Reply | str]


class ScriptedServer:
    """Runs while its `with` block does, at `base_url`, a free port of 127.0.0.1.

    Args:
        script: Takes a POST's body and its number, in the order of coming in, from 0; returns a `Reply`, or the text of one. It
            is called from several threads.
    """

    def __init__(self, script: Script = lambda body, number: Reply()) -> None:
        self.script = script
        self.requests: list[Recorded] = []  # every POST
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.connections: set[socket.socket] = set()
        self.server = _Listener(("127.0.0.1", 0), _Handler)
        self.server.owner = self
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Dies as a killed server would: open connections are lost, new ones refused."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.server.shutdown()
        self.thread.join()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)
        self.server.server_close()  # waits for the threads of all connections


def chat(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """A chat completion; tokens are counted as words, of text only."""
    contents = [message["content"] for message in body["messages"]]
    texts = [c if isinstance(c, str) else " ".join(part.get("text", "") for part in c) for c in contents]
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": reply.model or body["model"],
        "choices": [
            {"index": 0, "finish_reason": reply.finish_reason, "message": {"role": "assistant", "content": reply.text}}
        ],
        "usage": _usage(sum(len(text.split()) for text in texts), len(reply.text.split())),
    }


def echo(body: Mapping[str, Any], tokens: list[str] | None = None) -> dict[str, Any]:
    """A completion that echoes the prompt, as vLLM does: null for the first token, which nothing precedes.

    Args:
        body: The request; more than 0 of `max_tokens` write one token " end" after the prompt.
        tokens: Of the prompt; by default its words, each with the white space before it. A token's log-likelihood is minus half
            the number of its characters.
    """
    tokens = re.findall(r"\s*\S+|\s+", body["prompt"]) if tokens is None else tokens
    written = [" end"] if body["max_tokens"] else []
    shown = [*tokens, *written]
    offsets = [sum(map(len, shown[:number])) for number in range(len(shown))]
    logprobs = [None if number == 0 else -0.5 * len(token) for number, token in enumerate(shown)]
    return {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "text": body["prompt"] + "".join(written),
                "logprobs": {"tokens": shown, "token_logprobs": logprobs, "text_offset": offsets, "top_logprobs": None},
            }
        ],
        "usage": _usage(len(tokens), len(written)),
    }


def _usage(num_read: int, num_written: int) -> dict[str, int]:
    return {"prompt_tokens": num_read, "completion_tokens": num_written, "total_tokens": num_read + num_written}


class _Listener(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    owner: ScriptedServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none of the server's concern."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # header and body leave together

    @property
    def owner(self) -> ScriptedServer:
        return cast(_Listener, self.server).owner

    def setup(self) -> None:
        super().setup()
        with self.owner.lock:
            self.owner.connections.add(self.connection)
            if self.owner.stopped.is_set():
                self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        with self.owner.lock:
            self.owner.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in MODELS]
        known = self.path == "/v1/models"
        self.reply(Reply(status=200 if known else 404, body={"object": "list", "data": models} if known else {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.owner.lock:
            number = len(self.owner.requests)
            self.owner.requests.append(Recorded(self.path, body, headers, time.monotonic()))
        makers = {"/v1/chat/completions": chat, "/v1/completions": lambda body, reply: echo(body)}
        reply = self.owner.script(body, number)
        reply = Reply(text=reply) if isinstance(reply, str) else reply
        if self.path not in makers:
            reply = Reply(status=404, body={"error": {"message": f"there is no {self.path}"}})
        self.reply(reply, makers[self.path](body, reply) if reply.body is None else reply.body)

    def reply(self, reply: Reply, body: Any = None) -> None:
        body = reply.body if body is None else body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.owner.stopped.wait(reply.delay) or reply.closed:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if reply.cut else data)
        self.close_connection = self.close_connection or reply.cut
