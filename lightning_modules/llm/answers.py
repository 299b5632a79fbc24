"""Answers kept as they come: nothing that was paid for is asked again, whatever ends the process.

`<folder>/000123.jsonl` holds a line for each answer to a request of block 123, in the order in which they came: the hash of LLM
and request, and the answer. A line that a kill cut off is taken away. `<folder>/answered-by-*` holds which model the LLM said
had answered first; another one is refused. A file is worked on by one process at a time.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from datamodules.record import parse_json
from lightning_modules.llm.interface import LLM, MALFORMED, Answer, Request

SYNC_SECONDS = 1.0  # answers of so long may be lost with the machine; with the process none are: our choice
MILLION = 1_000_000


@dataclass(frozen=True)
class Budget:
    """What the answers of a task may cost, those of its earlier runs in the same folder among them.

    It is not exceeded, as far as answers say what they cost: requests that a server failed or lost, and that were sent again,
    are not known to have cost anything.

    Args:
        max_tokens: Tokens read and written; None sets no bound.
        max_cost: In the currency of the prices; None sets no bound.
        input_price: Of a million tokens read.
        output_price: Of a million tokens written.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        if min(self.max_tokens or 0, self.max_cost or 0, self.input_price, self.output_price) < 0:
            raise ValueError(f"{self}; nothing of it may be negative")
        if self.max_cost is not None and not self.input_price + self.output_price:
            raise ValueError("budget.max_cost needs the prices of a million tokens: budget.input_price and output_price")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input_price + output_tokens * self.output_price) / MILLION


class BudgetSpentError(ValueError):
    """The next request could exceed the budget."""


class Spending:
    """What has been spent of a budget, and what requests under way may still take of it."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.input_tokens = self.output_tokens = self.num_answers = 0
        self._reserved_input = self._reserved_output = 0
        self._lock = threading.Lock()

    def reserve(self, request: Request) -> bool:
        """Set aside the most that a request can take: a token for each byte of it, and all that it may write."""
        read, written = _most_tokens(request)
        with self._lock:
            all_read = self.input_tokens + self._reserved_input + read
            all_written = self.output_tokens + self._reserved_output + written
            budget = self.budget
            if budget.max_tokens is not None and all_read + all_written > budget.max_tokens:
                return False
            if budget.max_cost is not None and budget.cost(all_read, all_written) > budget.max_cost:
                return False
            self._reserved_input += read
            self._reserved_output += written
            return True

    def settle(self, request: Request) -> None:
        """What was set aside for a request is free again."""
        read, written = _most_tokens(request)
        with self._lock:
            self._reserved_input -= read
            self._reserved_output -= written

    def add(self, answer: Answer) -> None:
        with self._lock:
            self.num_answers += 1
            self.input_tokens += answer.input_tokens
            self.output_tokens += answer.output_tokens

    def __str__(self) -> str:
        tokens = f"{self.num_answers:,} answers of {self.input_tokens:,} tokens read and {self.output_tokens:,} written"
        prices = self.budget.input_price + self.budget.output_price
        return tokens + f", {self.budget.cost(self.input_tokens, self.output_tokens):,.2f} paid" * bool(prices)


class Answers:
    """An LLM's answers to the requests of a job.

    Args:
        folder: Where they are kept; jobs of the same block size may share one, one after another.
        llm: Who is asked for those that are missing.
        budget: What they may cost.
        own_blocks: Blocks whose earlier answers count as spent.
    """

    def __init__(self, folder: Path, llm: LLM, budget: Budget, own_blocks: Iterable[int]) -> None:
        self.folder, self.llm, self.spending = folder, llm, Spending(budget)
        folder.mkdir(parents=True, exist_ok=True)
        self._answered_by = folder / f"answered-by-{hashlib.sha256(llm.name.encode()).hexdigest()[:16]}"
        for block in own_blocks:
            with suppress(FileNotFoundError), self._file(block).open("rb") as file:
                for _, answer in _lines(file):
                    self.spending.add(answer)

    @contextmanager
    def of_block(self, block: int) -> Iterator["BlockAnswers"]:
        """The answers of a block, as long as no other process has them.

        Raises:
            ValueError: One has.
        """
        with self._file(block).open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is at work on {self._file(block)}; let it end, or stop it") from None
            try:
                yield BlockAnswers(self, file)
            finally:
                os.fsync(file.fileno())

    def check_model(self, answer: Answer) -> None:
        """Raises ValueError when another model answers than the one that answered first."""
        if not answer.model:  # no model was reached
            return
        if not self._answered_by.exists():
            beside = self._answered_by.with_name(f".{self._answered_by.name}.{os.getpid()}")
            beside.write_text(answer.model)
            with suppress(FileExistsError):
                os.link(beside, self._answered_by)  # whole, and of the first who comes
            beside.unlink()
        first = self._answered_by.read_text()
        if first != answer.model:
            raise ValueError(
                f"{self.llm.name} answers as {answer.model!r} now, but its answers in {self.folder} are of {first!r}; "
                "they are not mixed: let the first answer again, or begin another out with other answers"
            )

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:06d}.jsonl"


class BlockAnswers:
    """Answers of one block: those that are kept, and the LLM's to what was not asked yet."""

    def __init__(self, answers: Answers, file: IO[bytes]) -> None:
        self._answers, self._file, self._synced = answers, file, time.monotonic()
        file.seek(0)
        self._known = {key: answer for key, answer in _lines(file) if answer.error != MALFORMED}
        file.truncate(_end_of_last_line(file))

    @property
    def llm_name(self) -> str:
        return self._answers.llm.name

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests; equal requests are asked once.

        Raises:
            BudgetSpentError: There are requests left that the budget may not cover.
            ValueError: Another model answered than before.
            OSError: The LLM cannot be reached, or the disk is full.
        """
        keys = [self._key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        order, spending, fresh = list(missing), self._answers.spending, {}

        def affordable() -> Iterator[Request]:
            for key in order:
                if not spending.reserve(missing[key]):
                    return
                yield missing[key]

        for number, answer in self._answers.llm.answers(affordable()):
            spending.settle(missing[order[number]])
            spending.add(answer)
            if answer.log_likelihood is not None and not math.isfinite(answer.log_likelihood):
                answer = dataclasses.replace(answer, log_likelihood=None, error="no finite likelihood")
            self._answers.check_model(answer)
            if answer.error is None or answer.input_tokens + answer.output_tokens:
                self._keep(order[number], answer)
            fresh[order[number]] = answer
        found = fresh | self._known
        if not all(key in found for key in order):
            raise BudgetSpentError(
                f"the budget does not cover another request: {spending}; what was answered is kept in {self._answers.folder}. "
                "Raise budget.max_tokens or budget.max_cost and run the command again"
            )
        return [found[key] for key in keys]

    def _key(self, request: Request) -> str:
        return hashlib.sha256(f"{self._answers.llm.name}\n{request.key}".encode()).hexdigest()

    def _keep(self, key: str, answer: Answer) -> None:
        line = json.dumps({"key": key, **dataclasses.asdict(answer)}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        if answer.error != MALFORMED:  # which is kept for its costs alone
            self._known[key] = answer
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _lines(file: IO[bytes]) -> Iterator[tuple[str, Answer]]:
    """Keys and answers; the last line may be torn, any other may not.

    Raises:
        ValueError: A line is damaged.
    """
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        try:
            values = parse_json(line)
            yield values.pop("key"), Answer(**values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{file.name}, line {number} is damaged ({error!r}); take the line out, it is asked again"
            ) from error


def _end_of_last_line(file: IO[bytes]) -> int:
    """Where the last whole line ends."""
    size = file.seek(0, os.SEEK_END)
    while size:
        first = max(0, size - 2**16)
        file.seek(first)
        end = file.read(size - first).rfind(b"\n")
        if end >= 0:
            return first + end + 1
        size = first
    return 0


def _most_tokens(request: Request) -> tuple[int, int]:
    """The most tokens that a request can read and write.

    A text has no more tokens than bytes; media are taken for as many as they have bytes, and at least 4,096; roles and what a
    template puts around them are 64 a part.
    """
    parts = [part.data for message in request.messages for part in message.parts]
    size = sum(64 + (len(data.encode()) if isinstance(data, str) else max(4096, len(data))) for data in parts)
    if request.continuation is not None:
        return size + len(request.continuation.encode()), 1
    return size, request.sampling.max_tokens
