"""An LLM of transformers in this process: answers drawn in padded batches, and log-likelihoods of continuations.

Letters: B rows of a batch, L tokens, T tokens written, V entries of the vocabulary.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.curation.prompts import Message
from datamodules.files import sha256_of
from datamodules.sample import MEDIA_KINDS
from lightning_modules.encoder.embedder import device_named
from lightning_modules.llm.interface import LLM, Answer, Request, Sampling

READ_FILES = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # weights, configurations, tokenizers, chat templates
LABELS = {"system": "", "user": "User: ", "assistant": "Assistant: "}


class _Loaded(NamedTuple):
    """A model ready to run; `context` is None where its positions know no end."""

    model: Any
    tokenizer: Any
    eos: Tensor
    context: int | None


@dataclass(frozen=True)
class _Asked:
    """A request in tokens; `continuation` is empty where an answer is to be written."""

    number: int
    request: Request
    prompt: list[int]
    continuation: list[int]

    @property
    def places(self) -> int:
        """Tokens it may come to."""
        return len(self.prompt) + (len(self.continuation) or self.request.sampling.max_tokens)


class Local(LLM):
    """A causal language model of transformers that runs here and reads texts.

    A conversation goes through the tokenizer's chat template; where that knows no system role, the system's text stands before
    the first user's. A tokenizer without a template gets the texts with blank lines between them, the user's after `User: `,
    the assistant's after `Assistant: `, and `Assistant:` at the end. Text that spells a special token is read as text. Of the
    model's generation_config only its end tokens are used: `Sampling` says how answers are drawn. A schema is not enforced.

    A continuation is tokenised by itself, so tokens do not reach over its beginning, and no end token is scored. `Answer`
    counts the end token among those written.

    Args:
        model: Folder or hub name of a causal language model with safetensors and a tokenizer.
        revision: Of the hub repository; a commit keeps answers of other weights apart, a branch does not.
        dtype: Of the weights and the cache; probabilities are computed in float32 or better.
        device: Where it runs; auto takes a GPU if there is one.
        max_batch_tokens: Most places of a batch: rows times the longest prompt and what may be written after it. One request
            that has more goes alone.
        max_ahead: Requests taken ahead of their answers, to put those of like length together.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
        max_batch_tokens: int = 8192,
        max_ahead: int = 64,
    ) -> None:
        if max_batch_tokens < 1 or max_ahead < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens} and max_ahead {max_ahead}; both must be at least 1")
        self.model, self.revision, self.dtype, self.device = model, revision, dtype, device
        self.max_batch_tokens, self.max_ahead = max_batch_tokens, max_ahead

    @property
    def name(self) -> str:
        """`folder@hash/dtype` with a hash over the files that it is read from, or `hub/name@revision/dtype`."""
        return self._name

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers of some requests at a time, those of a batch together.

        Raises:
            ValueError: The model cannot be read, a batch does not fit into memory, a message holds media, or a continuation has
                no tokens or nothing before it.
        """
        numbered = enumerate(requests)
        while stretch := list(islice(numbered, self.max_ahead)):
            asked = [self._asked(number, request) for number, request in stretch]
            longest = self._loaded.context
            for one in asked:
                if longest is not None and one.places > longest:
                    yield one.number, Answer(model=self.name, error="longer than the context")
            fitting = [one for one in asked if longest is None or one.places <= longest]
            for batch in _batches(fitting, self.max_batch_tokens):
                yield from zip([one.number for one in batch], self._answered(batch), strict=True)

    def _answered(self, batch: Sequence[_Asked]) -> list[Answer]:
        try:
            return self._scored(batch) if batch[0].continuation else self._written(batch)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self.model} has no memory for {len(batch)} requests of up to {max(one.places for one in batch)} tokens "
                f"on {device_named(self.device)}; lower max_batch_tokens, which is {self.max_batch_tokens}"
            ) from error

    @torch.inference_mode()
    def _written(self, batch: Sequence[_Asked]) -> list[Answer]:
        """Draws a token of each row at a time until all have ended or have `max_tokens`; rows that have ended go on unseen."""
        model, tokenizer, eos, _ = self._loaded
        sampling = batch[0].request.sampling
        ids_BL, mask_BL = _left_padded([one.prompt for one in batch], eos.device)
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        uniform_BT = torch.stack([_uniform(one.request) for one in batch]).to(eos.device)
        goes_on_B = torch.ones(len(batch), dtype=torch.bool, device=eos.device)
        cache, steps = None, []
        for step in range(sampling.max_tokens):
            read = {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": positions_BL}
            output = model(**read, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            drawn_B = drawn(output.logits[:, -1].float(), sampling, uniform_BT[:, step])
            steps.append(drawn_B)
            goes_on_B = goes_on_B & ~torch.isin(drawn_B, eos)
            if not goes_on_B.any():
                break
            ids_BL, mask_BL = drawn_B[:, None], torch.cat([mask_BL, mask_BL.new_ones(len(batch), 1)], 1)
            positions_BL = positions_BL[:, -1:] + 1
        ends, written = set(eos.tolist()), torch.stack(steps, 1).tolist()
        return [self._answer(one, row, ends, tokenizer) for one, row in zip(batch, written, strict=True)]

    def _answer(self, one: _Asked, written: list[int], ends: set[int], tokenizer: Any) -> Answer:
        end = next((place for place, token in enumerate(written) if token in ends), None)
        counts: dict[str, Any] = {"input_tokens": len(one.prompt), "model": self.name}
        if end is None:
            return Answer(output_tokens=len(written), error="cut off", **counts)
        text = tokenizer.decode(written[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, output_tokens=end + 1, **counts)

    @torch.inference_mode()
    def _scored(self, batch: Sequence[_Asked]) -> list[Answer]:
        """Sums each continuation's log-probabilities, one row in float32 at a time."""
        eos = self._loaded.eos
        rows = [one.prompt + one.continuation for one in batch]
        ids_BL, mask_BL = _left_padded(rows, eos.device)
        read = {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": (mask_BL.cumsum(1) - 1).clamp(min=0)}
        longest = max(len(one.continuation) for one in batch)
        logits_BLV = self._loaded.model(**read, use_cache=False, logits_to_keep=longest + 1).logits
        answers = []
        for one, row, logits_LV in zip(batch, rows, logits_BLV, strict=True):
            count = len(one.continuation)
            log_p_LV = logits_LV[-count - 1 : -1].float().log_softmax(-1)  # the place before a token tells it
            scored_L = log_p_LV.gather(1, torch.tensor(one.continuation, device=eos.device)[:, None])
            total = scored_L.double().sum().item()
            answers.append(Answer("", total, count, input_tokens=len(row), model=self.name))
        return answers

    def _asked(self, number: int, request: Request) -> _Asked:
        media = [part.kind for message in request.messages for part in message.parts if part.kind in MEDIA_KINDS]
        if media:
            raise ValueError(
                f"request {number} holds content of kind {media[0]}, and {self.model} reads only texts here; "
                "ask a model behind lightning_modules.llm.server.Server, which takes media"
            )
        tokenizer = self._loaded.tokenizer
        if request.continuation is None:
            return _Asked(number, request, _chat(tokenizer, request), [])
        prompt = _with_ends(tokenizer, request.prefix)
        continuation = _ids(tokenizer, request.continuation, split_special_tokens=True)
        if not prompt or not continuation:
            empty = "prefix, and the tokenizer begins no text by itself" if not prompt else "continuation"
            raise ValueError(f"request {number} has no likelihood: it has an empty {empty}")
        return _Asked(number, request, prompt, continuation)

    @cached_property
    def _name(self) -> str:
        folder = Path(self.model)
        if not folder.is_dir():
            return f"{self.model}{f'@{self.revision}' if self.revision else ''}/{self.dtype}"
        files = sorted(path for path in folder.iterdir() if path.suffix in READ_FILES)
        listed = "".join(f"{sha256_of(path)} {path.name}\n" for path in files)
        return f"{folder.resolve().name}@{hashlib.sha256(listed.encode()).hexdigest()[:16]}/{self.dtype}"

    @cached_property
    def _loaded(self) -> _Loaded:
        """The model and its tokenizer.

        Raises:
            ValueError: transformers cannot read them, there is no tokenizer, or it and the weights do not belong together.
        """
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.model, revision=self.revision, trust_remote_code=False)
            read: Any = AutoModelForCausalLM.from_pretrained(
                self.model,
                revision=self.revision,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, report = read
            if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
                raise ValueError(f"its weights lack {', '.join(missing[:3])}, so it is no causal language model")
            num_known, num_tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
            if num_tokens <= len(tokenizer.added_tokens_decoder):  # what transformers makes of a folder without one
                raise ValueError("it has no tokenizer")
            if num_tokens > num_known:
                raise ValueError(f"its tokenizer has {num_tokens} entries, of which the model knows {num_known}")
            model = model.to(device_named(self.device)).eval()
        except Exception as error:  # of the hub, of the files, of the family, of the device
            raise ValueError(
                f"no LLM can be read from {self.model!r} ({' '.join(str(error).split())[:300]}); make model a folder with "
                "config.json, safetensors and a tokenizer, or its name on the hub"
            ) from error
        known = model.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
        eos = torch.tensor(sorted(ends), dtype=torch.long, device=model.device)
        return _Loaded(model, tokenizer, eos, getattr(model.config.get_text_config(), "max_position_embeddings", None))


def drawn(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Tokens (B,) drawn by inverting the distribution function, so that a row needs one number and no other row.

    Args:
        logits_BV: float32.
        sampling: Its temperature and top_p; 0 takes the most probable.
        uniform_B: float64 in [0, 1).

    Source: top_p is nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751), equation 2.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = (logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)) / sampling.temperature
    p_BV = scaled_BV.softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(descending=True, stable=True)
        is_outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        p_BV = p_BV.scatter(1, order_BV, sorted_BV.masked_fill(is_outside_BV, 0))
    below_BV = p_BV.cumsum(-1)  # in the vocabulary's order, which rounding cannot change
    return (below_BV <= uniform_B[:, None] * below_BV[:, -1:]).sum(-1)


def _uniform(request: Request) -> Tensor:
    """Numbers (T,), float64 in [0, 1), that depend on the request alone; its key holds its seed."""
    generator = torch.Generator().manual_seed(int(request.key[:16], 16))
    return torch.rand(request.sampling.max_tokens, dtype=torch.float64, generator=generator)


def _batches(asked: Sequence[_Asked], max_tokens: int) -> Iterator[list[_Asked]]:
    """Requests that are run together: of one way to draw, or continuations; the longest first."""
    groups: dict[Sampling | None, list[_Asked]] = {}
    for one in sorted(asked, key=lambda one: -one.places):
        groups.setdefault(None if one.continuation else one.request.sampling, []).append(one)
    for group in groups.values():
        while group:
            num_rows = max(1, max_tokens // group[0].places)
            yield group[:num_rows]
            group = group[num_rows:]


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), int64, and the mask of what is a token; what is none is hidden, so its id is 0 for any model."""
    longest = max(map(len, rows))
    padded = [([0] * (longest - len(row)) + list(row), [0] * (longest - len(row)) + [1] * len(row)) for row in rows]
    ids, mask = zip(*padded, strict=True)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    return tokenizer(text, **{"add_special_tokens": False, **options}).input_ids


def _with_ends(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens after what the tokenizer begins a text with; an end token behind it would leave nothing to go on from."""
    ids = _ids(tokenizer, text, add_special_tokens=True, split_special_tokens=True)
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _chat(tokenizer: Any, request: Request) -> list[int]:
    """A conversation's tokens. Those that its texts spell are hidden from the template and tokenised as text afterwards.

    Raises:
        ValueError: The chat template refuses the conversation.
    """
    messages = request.messages
    if tokenizer.chat_template is None:
        turns = [f"{LABELS[message.role]}{message.text}" for message in messages]
        return _with_ends(tokenizer, "\n\n".join([*turns, "Assistant:"]))
    special = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)[::-1]
    spelled, mark = re.compile("|".join(map(re.escape, special)) or "(?!)"), request.key  # no text holds its own hash

    def hidden(text: str) -> str:
        return spelled.sub(lambda match: f"{mark}:{special.index(match[0])}:", text)

    turns = _turns(messages, _knows_system(tokenizer))
    try:
        rendered = _rendered(tokenizer, [(role, hidden(text)) for role, text in turns])
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the chat template refuses a conversation of {[role for role, _ in turns]}: {reason}") from error
    ids: list[int] = []
    for number, piece in enumerate(re.split(f"{mark}:(\\d+):", rendered)):  # what the template made and tokens take turns
        ids += _ids(tokenizer, special[int(piece)], split_special_tokens=True) if number % 2 else _ids(tokenizer, piece)
    return ids


def _turns(messages: Sequence[Message], knows_system: bool) -> list[tuple[str, str]]:
    """Role and text of each turn, the system's before the first user's where the template has no role for it."""
    turns = [(message.role, message.text) for message in messages]
    if knows_system:
        return turns
    system = [text for role, text in turns if role == "system"]
    rest = [(role, text) for role, text in turns if role != "system"]
    first = next((place for place, (role, _) in enumerate(rest) if role == "user"), None)
    if first is not None:
        rest[first] = ("user", "\n\n".join([*system, rest[first][1]]))
    return rest


def _knows_system(tokenizer: Any) -> bool:
    """Whether the chat template shows a system's text; some raise, others leave it out."""
    try:
        return "@system@" in _rendered(tokenizer, [("system", "@system@"), ("user", "?")])
    except Exception:  # a template raises what it likes
        return False


def _rendered(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
