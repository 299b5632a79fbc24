"""An LLM behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp or a company's.

Requests go out from an event loop in a thread of its own, so that what is under way can be dropped at any moment.
"""

import asyncio
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_modules.llm.interface import LLM, MALFORMED, Answer, Request
from lightning_modules.llm.protocol import (
    MalformedError,
    UntakenError,
    chat_body,
    echo_body,
    estimated_tokens,
    read_chat,
    read_echo,
)

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

TOO_LONG = re.compile(r"context|too long|maximum.*length|max_tokens(?!.*(not supported|at least))", re.IGNORECASE | re.DOTALL)
REFUSED = "refused by the server"
MALFORMED_RETRIES = 3
FIRST_PAUSE = 0.5  # seconds before a malformed answer is asked for again; doubles each time, as the client's own
MOST_SPOILED = 20  # malformed or refused one after another, before the server or what it is sent is taken to be wrong
MOST_CONNECT_SECONDS = 10.0
NO_KEY = "no-key-is-set"  # servers of one's own mostly want none
ADVICE = "answers so far are kept, run the command again to go on"


class Server(LLM):
    """A model behind a server that speaks OpenAI's protocol.

    Its key, where it wants one, is the environment variable OPENAI_API_KEY. What cannot succeed later either becomes an answer
    with an `error`: "cut off", "refused", "longer than the context", "malformed answer" (asked for four times), "refused by the
    server: .." (HTTP 400, 413 or 422), or a part that the protocol does not take, such as a PDF page. Too many requests, errors
    of the server, timeouts and lost connections are tried again, with pauses that double or that the server names. Where a
    server does not count tokens, those of an answer are estimated, since budgets depend on them: a quarter of a text's bytes,
    1000 for each piece of media.

    Args:
        model: Its name at the server.
        base_url: Where the server is, such as http://127.0.0.1:8000/v1.
        concurrency: Most requests under way at once, and most taken before they can be sent.
        requests_per_minute: Most of them, evenly spread; None leaves it to the server.
        tokens_per_minute: Most tokens, read and written together, estimated before a request and corrected after it; None
            leaves it to the server.
        timeout: Seconds without a sign of the server before a request is tried again.
        max_retries: How often that happens before the run stops.
        constrain: Holds answers to their request's schema, where the server can.

    Raises:
        ValueError: An argument is out of its range, or the URL holds what it must not.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        concurrency: int = 16,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        timeout: float = 120,
        max_retries: int = 6,
        constrain: bool = False,
    ) -> None:
        _check_url(base_url)
        limits = [limit for limit in (requests_per_minute, tokens_per_minute) if limit is not None]
        if not model or min([concurrency, *limits]) < 1 or not 0 < timeout < float("inf") or max_retries < 0:
            raise ValueError(
                f"{model=}, {concurrency=}, {requests_per_minute=}, {tokens_per_minute=}, {timeout=}, {max_retries=}; "
                "allowed: a name, counts >= 1, timeout > 0, max_retries >= 0"
            )
        self.model, self.base_url, self.constrain = model, base_url, constrain
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self._echo_tokens: int | None = None  # the fewest that the server writes after an echo, once it is known

    @property
    def name(self) -> str:
        """The model, and whether its answers are held to a schema; where it runs does not matter."""
        return f"{self.model} constrained" if self.constrain else self.model

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers as they come, each with its request's number.

        Raises:
            ValueError: The server does not know the model or the key, or gives no likelihoods of a prompt.
            OSError: It does not answer, or 20 answers in a row are malformed or refused.
        """
        numbered = enumerate(requests)
        pending: dict[Future[Answer], int] = {}
        pace, num_spoiled = _Pace(self.requests_per_minute, self.tokens_per_minute), 0
        client = self._client()
        with _event_loop(client) as loop:
            while True:
                for number, request in islice(numbered, self.concurrency - len(pending)):
                    answer = self._answer(request, client, pace)
                    pending[asyncio.run_coroutine_threadsafe(answer, loop)] = number
                if not pending:
                    return
                failed = None
                for future in sorted(wait(pending, return_when=FIRST_COMPLETED).done, key=pending.__getitem__):
                    number = pending.pop(future)
                    if (error := future.exception()) is not None:
                        failed = failed or error
                        continue
                    answer = future.result()
                    yield number, answer
                    num_spoiled = num_spoiled + 1 if (answer.error or "").startswith((MALFORMED, REFUSED)) else 0
                    if num_spoiled == MOST_SPOILED:
                        raise OSError(
                            f"{num_spoiled} answers of {self.model!r} at {self.base_url} in a row had to be given up, the last "
                            f"as: {answer.error}; {ADVICE}"
                        )
                if failed is not None:
                    raise failed

    async def _answer(self, request: Request, client: "openai.AsyncOpenAI", pace: "_Pace") -> Answer:
        """The answer to one request, after as many attempts as it takes.

        Raises:
            ValueError: No request can succeed.
            OSError: The server does not answer.
        """
        import openai

        ask = self._chat if request.continuation is None else self._likelihood
        num_tokens = estimated_tokens(request) + (request.sampling.max_tokens if request.continuation is None else 0)
        attempt = 0
        while True:
            await pace.turn(num_tokens)
            try:
                answer = await ask(request, client)
                pace.correct(answer.input_tokens + answer.output_tokens - num_tokens)
                return answer
            except UntakenError as error:
                return Answer(model=self.model, error=str(error))
            except UnicodeEncodeError:
                return Answer(model=self.model, error="text that UTF-8 does not have")
            except openai.APIStatusError as error:
                said = _shown(_said(error), client)
                if error.status_code not in (400, 413, 422):
                    raise await self._stop(error.status_code, said, client) from None
                return Answer(
                    model=self.model, error="longer than the context" if TOO_LONG.search(said) else f"{REFUSED}: {said}"
                )
            except openai.APIConnectionError as error:
                met = _shown(str(error.__cause__) or type(error.__cause__).__name__, client)
                if "message body" not in met:
                    why = f"nothing in {self.timeout:g} s" if isinstance(error, openai.APITimeoutError) else met
                    raise OSError(f"the server at {self.base_url} does not answer ({why}); {ADVICE}") from None
                attempt = MALFORMED_RETRIES  # an answer that breaks off has been asked for again by the client
            except MalformedError as error:
                met = _shown(str(error), client)
            logger.warning("%s of %r at %s: %s", MALFORMED, self.model, self.base_url, met)
            if attempt == MALFORMED_RETRIES:
                num_read = (attempt + 1) * estimated_tokens(request)  # each attempt may have been paid for
                return Answer(model=self.model, input_tokens=num_read, error=MALFORMED)
            await asyncio.sleep(FIRST_PAUSE * 2**attempt)
            attempt += 1

    async def _chat(self, request: Request, client: "openai.AsyncOpenAI") -> Answer:
        body = chat_body(request, self.model, constrain=self.constrain)
        reply = await client.chat.completions.with_raw_response.create(**body)
        return read_chat(reply.content, request, self.model)

    async def _likelihood(self, request: Request, client: "openai.AsyncOpenAI") -> Answer:
        """Asks for no token after the echo, and for one where a server refuses none."""
        import openai

        max_tokens = self._echo_tokens or 0
        post: Callable[..., Awaitable[Any]] = client.completions.with_raw_response.create
        try:
            reply = await post(**echo_body(request, self.model, max_tokens))
        except openai.BadRequestError:
            if self._echo_tokens is not None:
                raise
            max_tokens = 1
            reply = await post(**echo_body(request, self.model, max_tokens))
        self._echo_tokens = max_tokens
        try:
            return read_echo(reply.content, request, self.model, max_tokens)
        except ValueError as error:
            raise ValueError(
                f"the server at {self.base_url} gives no likelihoods of a prompt ({error}); start one that does, as "
                f"`vllm serve {self.model}`, or run the model in this process"
            ) from None

    async def _stop(self, status: int, said: str, client: "openai.AsyncOpenAI") -> Exception:
        """What ends a run, for a status that is no answer."""
        met = f"HTTP {status}: {said}"
        if status in (401, 403):
            return ValueError(f"the server at {self.base_url} does not let OPENAI_API_KEY use {self.model!r} ({met})")
        if status == 404:
            models = ", ".join(await _models(client))
            has = f"; it has {models}" if models else ""
            return ValueError(f"the server at {self.base_url} has no {self.model!r}, or not at this address ({met}){has}")
        return OSError(f"the server at {self.base_url} does not answer ({met}); {ADVICE}")

    def _client(self) -> "openai.AsyncOpenAI":
        """What has reached nothing yet."""
        try:
            import openai
        except ImportError:
            raise ValueError("an LLM behind a server needs the openai client: pip install -e '.[llm]'") from None
        key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds characters that no key has; set it again, or unset it")
        for library in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):  # they tell of every request
            logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger(library).level))
        timeout = openai.Timeout(self.timeout, connect=min(self.timeout, MOST_CONNECT_SECONDS))
        return openai.AsyncOpenAI(api_key=key, base_url=self.base_url, timeout=timeout, max_retries=self.max_retries)


class _Pace:
    """Spreads requests and tokens evenly over time; None of a limit is no limit."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.next_request = self.next_token = 0.0  # when what was let through is paid for
        self.queue = asyncio.Lock()

    async def turn(self, num_tokens: int) -> None:
        """Returns when a request of so many tokens may go out."""
        async with self.queue:
            while (pause := max(self.next_request, self.next_token) - time.monotonic()) > 0:
                await asyncio.sleep(min(pause, 1))  # a correction may come meanwhile
            now = time.monotonic()
            self.next_request = now + self.seconds_per_request
            self.next_token = max(now, self.next_token) + num_tokens * self.seconds_per_token

    def correct(self, num_tokens: int) -> None:
        """So many tokens more than estimated, or fewer."""
        self.next_token += num_tokens * self.seconds_per_token


@contextmanager
def _event_loop(client: "openai.AsyncOpenAI") -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own; when the block ends, what is under way there is dropped and the client closed."""
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def live() -> None:
        end = asyncio.Event()
        begun.set_result((asyncio.get_running_loop(), end))
        await end.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="llm-server", daemon=True)
    thread.start()
    loop, end = begun.result()
    try:
        yield loop
    finally:
        if not sys.is_finalizing() and threading.current_thread() is not thread:  # then nobody can wait for it
            loop.call_soon_threadsafe(end.set)
            thread.join()


async def _models(client: "openai.AsyncOpenAI") -> list[str]:
    """Names of a server's models, none where it does not say."""
    import openai

    try:
        return [model.id for model in (await client.with_options(max_retries=0).models.list()).data][:20]
    except (openai.OpenAIError, ValueError, TypeError, AttributeError):
        return []


def _said(error: "openai.APIStatusError") -> str:
    """The message in a server's error."""
    body = error.body
    message = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return str(message or "no message")


def _shown(text: str, client: "openai.AsyncOpenAI") -> str:
    """On one short line, without the key."""
    return " ".join(text.replace(client.api_key, "***").split())[:200]


def _check_url(base_url: str) -> None:
    try:
        url = urlsplit(base_url)
        fits = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        fits = False
    if not fits or "@" in base_url or "?" in base_url or "#" in base_url:  # it is not repeated: it may hold a secret
        raise ValueError(
            "base_url must be an address such as http://127.0.0.1:8000/v1, without user, password, query or fragment; a key "
            "belongs into the environment variable OPENAI_API_KEY"
        )
