"""Bytes to content, bounded: what a part declares is checked before it is decoded, and what cannot be decoded raises.

Text and code pass as they are. Images become uint8 (H, W, 3), pages a list of such, video a `Film`,
audio float32 (samples,) mono at 16 kHz. A refusal's `cause` is "does not decode" where the bytes are bad; any other
("unknown format", "too long", "too slow", ..) means that the part may be whole but is not of a kind or size that is read.
"""

import dataclasses
import re
import warnings
from contextlib import AbstractContextManager, nullcontext

from PIL import Image

from datamodules.media.audio import decode_audio
from datamodules.media.image import decode_image
from datamodules.media.limits import DecodeLimits, time_limit
from datamodules.media.page import decode_page
from datamodules.media.video import decode_video
from datamodules.sample import TEXT_KINDS, BadExampleError, Example, Item, Part

DECODERS = {"image": decode_image, "page": decode_page, "audio": decode_audio, "video": decode_video}


def decode_example(example: Example, limits: DecodeLimits) -> Example:
    """The example with the content of every part filled in.

    Raises:
        BadExampleError: A part is not used, or all together take too long.
    """
    with _limited([*(item for item in (example.query, example.target) if item is not None), *example.negatives], limits):
        return dataclasses.replace(
            example,
            query=None if example.query is None else _decoded(example.query, limits),
            target=None if example.target is None else _decoded(example.target, limits),
            negatives=tuple(_decoded(negative, limits) for negative in example.negatives),
        )


def decode_item(item: Item, limits: DecodeLimits) -> Item:
    """The item with the content of every part filled in.

    Raises:
        BadExampleError: A part is not used, or all together take too long.
    """
    with _limited([item], limits):
        return _decoded(item, limits)


def _limited(items: list[Item], limits: DecodeLimits) -> AbstractContextManager[None]:
    """The time limit, where there is anything to decode: setting an alarm takes longer than a text does."""
    return nullcontext() if all(item.is_text for item in items) else time_limit(limits.max_seconds)


def _decoded(item: Item, limits: DecodeLimits) -> Item:
    return dataclasses.replace(item, parts=tuple(decode_part(part, limits) for part in item.parts))


def decode_part(part: Part, limits: DecodeLimits) -> Part:
    """The part with `content` filled in.

    Raises:
        BadExampleError: The format is not one of ours, a limit is exceeded, or the bytes do not decode; its `cause` says which.
    """
    if part.kind in TEXT_KINDS:
        return Part(part.kind, part.data, part.format, part.data)
    assert isinstance(part.data, bytes)
    try:
        with warnings.catch_warnings(action="ignore"):  # a file is used or refused, and either way says nothing on the screen
            content = DECODERS[part.kind](part.data, part.format, limits)
    except BadExampleError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, met before ours
        raise BadExampleError(str(error), "too many pixels") from error
    except Exception as error:  # the media libraries raise types of their own; all mean that the bytes are bad
        reason = re.sub(r" <\S+ object at 0x\w+>", "", " ".join(str(error).split())) or type(error).__name__
        raise BadExampleError(f"this {part.kind} ({part.format}, {len(part.data)} bytes) does not decode: {reason}") from error
    return dataclasses.replace(part, content=content)
