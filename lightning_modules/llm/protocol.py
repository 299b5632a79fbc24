"""What an OpenAI-compatible server is sent for a request, and what its replies say: JSON to and fro, nothing of the network.

Source: OpenAI's API reference (chat completions, and completions with `echo`); `video_url` and likelihoods of a prompt as in
vLLM (vllm/entrypoints/openai/completion/serving.py).
"""

import base64
from typing import Any

from datamodules.curation.prompts import Message
from datamodules.record import parse_json
from datamodules.sample import Part
from lightning_modules.llm.interface import Answer, Request

MIME = {
    **{"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"},
    **{"mp4": "video/mp4", "webm": "video/webm"},
}
MEDIA_TOKENS = 1000  # of an image, a page, a sound or a film, as long as the server has not counted; our choice


class MalformedError(Exception):
    """A reply that is not of the protocol."""


class UntakenError(Exception):
    """A request that this protocol cannot carry."""


def chat_body(request: Request, model: str, *, constrain: bool) -> dict[str, Any]:
    """What is posted to `chat/completions`.

    Raises:
        UntakenError: A part is in a format that the protocol does not have.
    """
    sampling = request.sampling
    body: dict[str, Any] = {"model": model, "messages": [_turn(message) for message in request.messages], "seed": request.seed}
    body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    if constrain and request.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": dict(request.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def echo_body(request: Request, model: str, max_tokens: int) -> dict[str, Any]:
    """What is posted to `completions` for the likelihood of a continuation.

    Raises:
        UntakenError: The messages hold media, which a text to be continued cannot.
    """
    if any(isinstance(part.data, bytes) for message in request.messages for part in message.parts):
        raise UntakenError("media before a continuation, which this backend does not take")
    prompt = f"{request.prefix}{request.continuation}"
    return {"model": model, "prompt": prompt, "echo": True, "max_tokens": max_tokens, "logprobs": 1, "temperature": 0}


def estimated_tokens(request: Request) -> int:
    """About how many tokens a server reads: a quarter of the text's bytes, and `MEDIA_TOKENS` for each piece of media."""
    parts = [part.data for message in request.messages for part in message.parts] + [request.continuation or ""]
    return sum(_text_tokens(data) if isinstance(data, str) else MEDIA_TOKENS for data in parts)


def read_chat(content: bytes, request: Request, model: str) -> Answer:
    """The answer in a reply to `chat_body`; without `usage` its tokens are estimated.

    Raises:
        MalformedError: It is no chat completion.
    """
    reply, choice = _reply(content)
    message = _is(choice.get("message"), dict, "choices[0].message")
    text, why = message.get("content"), choice.get("finish_reason")
    usage = _usage(reply, request, text, model)
    if why == "length":
        return Answer(**usage, error="cut off")
    if why == "content_filter" or (not text and message.get("refusal")):
        return Answer(**usage, error="refused")
    if why in ("abort", "error"):
        raise MalformedError(f"the server gave up with finish_reason {why!r}")
    return Answer(_is(text, str, "choices[0].message.content"), **usage)


def read_echo(content: bytes, request: Request, model: str, max_tokens: int) -> Answer:
    """The continuation's log-likelihood in a reply to `echo_body`.

    A token counts when its text reaches beyond the prefix: one that straddles the boundary is scored whole. Where a token's
    text lies is found from the end of the prompt backwards, as vLLM's `text_offset` counts the characters of a first token
    `<s>` that the text does not have.

    Raises:
        MalformedError: It is no completion that echoes the prompt.
        ValueError: The server gives no likelihoods of a prompt.
    """
    reply, choice = _reply(content)
    prompt = f"{request.prefix}{request.continuation}"
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not isinstance(values, list):
        raise ValueError("it sends no tokens with their logprobs")
    text = _is(choice.get("text"), str, "choices[0].text")
    if text != prompt and not (max_tokens and text.startswith(prompt)):
        raise MalformedError("the text that comes back does not begin with the prompt")
    if len(tokens) != len(values) or not all(isinstance(token, str) for token in tokens):
        raise MalformedError("logprobs are not a value for each token")
    usage = _usage(reply, request, text[len(prompt) :], model)
    if max_tokens:  # what was written after the prompt is no part of it
        counted = _counts(reply)[0]
        tokens = tokens[: len(tokens) - max_tokens if counted is None else counted]
    first = _first_scored(tokens, prompt, len(request.prefix))
    scored = values[first : len(tokens)]
    if scored and first == 0 and scored[0] is None:
        return Answer(**usage, error="a continuation with nothing before it")
    if None in scored:
        raise ValueError("a token of the prompt has no logprob")
    if not all(isinstance(value, int | float) for value in scored):
        raise MalformedError("a logprob is no number")
    return Answer(log_likelihood=float(sum(scored)), num_scored=len(scored), **usage)


def _first_scored(tokens: list[str], text: str, begin: int) -> int:
    """Number of the first token whose text reaches beyond character `begin`.

    White space before a token may be missing from it, and a token that holds a part of a character, which servers show as
    U+FFFD, stands for as many characters as it shows; an empty one goes with the token after it.
    """
    first, end, unplaced = len(tokens), len(text), 0
    while first and (end > begin or not tokens[first - 1]):
        token = tokens[first - 1]
        start = text.rfind(token, 0, end)
        between = text[start + len(token) : end]
        if start >= 0 and (len(between) <= unplaced or between.isspace()):
            if token and start + len(token) <= begin:
                return first
            end, unplaced = start, 0
        elif "\ufffd" in token:
            unplaced += len(token)
        else:
            raise MalformedError(f"the token {token!r:.50} is not in the text where it should be")
        first -= 1
    if end > begin + unplaced:
        raise MalformedError("the tokens are fewer than the text")
    return first


def _turn(message: Message) -> dict[str, Any]:
    """A message with plain text as it is, and anything with media as a list of parts."""
    if all(isinstance(part.data, str) for part in message.parts):
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [_content(part) for part in message.parts]}


def _content(part: Part) -> dict[str, Any]:
    if isinstance(part.data, str):
        return {"type": "text", "text": part.data}
    extension, data = part.format.lower(), base64.b64encode(part.data).decode("ascii")
    if part.kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": extension}}
    if extension == "pdf":
        raise UntakenError("a PDF page, which this backend does not take")
    mime = MIME.get(extension, "")
    kind = "video" if part.kind == "video" else "image"
    if not mime.startswith(kind):
        raise UntakenError(f"{part.kind} of format {extension!r}, which this backend does not take")
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{data}"}}


def _reply(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A reply and its first choice."""
    try:
        reply = _is(parse_json(content), dict, "the reply")
    except ValueError as error:
        raise MalformedError(f"no JSON: {error}") from error
    choices = _is(reply.get("choices"), list, "choices")
    return reply, _is(choices[0] if choices else None, dict, "choices[0]")


def _usage(reply: dict[str, Any], request: Request, text: Any, model: str) -> dict[str, Any]:
    """Arguments of an `Answer`: tokens and model."""
    num_read, num_written = _counts(reply)
    named = reply.get("model")
    return {
        "input_tokens": estimated_tokens(request) if num_read is None else num_read,
        "output_tokens": _text_tokens(text if isinstance(text, str) else "") if num_written is None else num_written,
        "model": named if isinstance(named, str) and named else model,
    }


def _counts(reply: dict[str, Any]) -> list[int | None]:
    """Tokens read and written as the server has counted them."""
    usage = reply.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return [count if type(count) is int and count >= 0 else None for count in counts]


def _text_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def _is(value: Any, wanted: type, name: str) -> Any:
    if not isinstance(value, wanted):
        raise MalformedError(f"{name} is {type(value).__name__}, not {wanted.__name__}")
    return value
