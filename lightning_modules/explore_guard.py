"""What the search page's server answers: the page's own requests, from a browser that knows it by its own name, no address.

Gradio's server has more doors than a search page needs, among them some that fetch an address which a request names.
"""

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 2**20  # bytes of what is asked; uploads have a limit of their own; our choice
API = "/gradio_api/"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
CALLS = ("queue/join", "queue/data", "upload", "upload_progress", "info", "startup-events", "app_id", "cancel", "reset")


class Guard:
    """Answers 403 to whatever the page does not ask for.

    Args:
        app: What answers the rest.
        folders: Whose files may be asked for and named.
    """

    def __init__(self, app: App, folders: list[str]) -> None:
        self.app, self.folders = app, [Path(folder).resolve() for folder in folders]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no socket
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        if not self._is_known(path):
            await _refuse(send, "not part of this page")
        elif path.startswith(f"{API}queue/join"):
            body = await _read(receive)
            if body is None or not self._names_own_files(body):
                await _refuse(send, "only files that were dropped here are read")
            else:
                await self.app(scope, _again(body, receive), send)
        else:
            await self.app(scope, receive, send)

    def _is_known(self, path: str) -> bool:
        if path in PAGES or path.startswith(("/assets/", "/static/", "/svelte/")):
            return True
        call = path.removeprefix(API)
        if call == path:
            return False
        if call.startswith("file="):
            return self._is_own(unquote(call.removeprefix("file=")))
        return call.rstrip("/") in CALLS or call.startswith("heartbeat/")

    def _is_own(self, name: str) -> bool:
        return any(Path(name).resolve().is_relative_to(folder) for folder in self.folders)

    def _names_own_files(self, body: bytes) -> bool:
        try:
            return all(self._is_own(str(named)) for named in _paths(json.loads(body)))
        except (ValueError, RecursionError):
            return False


async def _refuse(send: Send, why: str) -> None:
    head = {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
    await send(head)
    await send({"type": "http.response.body", "body": why.encode()})


def _paths(value: Any) -> Iterator[Any]:
    """Whatever is called a path, at any depth."""
    if isinstance(value, dict):
        yield from (own for name, own in value.items() if name == "path")
        for own in value.values():
            yield from _paths(own)
    elif isinstance(value, list):
        for own in value:
            yield from _paths(own)


async def _read(receive: Receive) -> bytes | None:
    """A request's body; None where it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """What hands over a body that was read, and then what follows."""
    left = [body]

    async def receive_again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return receive_again
