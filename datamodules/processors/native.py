"""Items to the inputs of a model that takes media itself, made by its own transformers processor.

That processor makes the places and values of each medium by itself, and the tokenizer the tokens of the text around them: a
text that spells a placeholder stays text, and a medium comes out the same whatever lies beside it. Names and shapes of the
values are those of the model's arguments (`pixel_values`, `image_grid_thw`, ..); the first dimension is what an item has of
them.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.media.audio import SAMPLE_RATE
from datamodules.media.video import Film
from datamodules.processors.inputs import cat_padded
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.sample import MEDIA_KINDS

TEXT, PICTURE = -1, -2  # places of a dual model's parts
MARKERS = (("{}_start_token", "{}_end_token"), ("{}_bos_token", "{}_eos_token"))  # what Qwen's processors call theirs
VISION_MARKERS = ("<|vision_start|>", "<|vision_end|>")  # those of Qwen2.5-VL, whose processor does not name them
NOT_VIEWS = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # the backbone makes what it needs of them
LONGEST_SOUND = 30.0  # seconds that Gemma 4's extractor takes without saying so; others name their `chunk_length`
SHORTEST_SOUND = 0.1  # seconds; some families make no token of less than 40 ms
COUNTED = {"image": np.zeros((256, 256, 3), np.uint8), "audio": np.zeros(2 * SAMPLE_RATE, np.float32)}
COUNTED["video"] = Film(np.zeros((4, 256, 256, 3), np.uint8), 4.0)  # what tokens are counted of, for the order of lengths


class NativeProcessor(Processor):
    """Pages are images one after another, a film carries the times of its frames, a long sound is cut into spans that fit.

    Args:
        config: `max_text_tokens`, `too_long` and `decode` count; sizes of views are the native processor's own.
        native: A transformers processor.

    Raises:
        ValueError: Its tokenizer lacks one of its placeholders.
    """

    def __init__(self, config: ProcessorConfig, native: Any) -> None:
        super().__init__(config, native.tokenizer)
        self.native = native
        self.first_ids, self.last_ids = begin_and_end(native.tokenizer)
        found = {medium: getattr(native, f"{medium}_token", None) for medium in COUNTED}
        self.placeholders = {medium: token for medium, token in found.items() if token is not None}
        missing = sorted(set(self.placeholders.values()) - self.tokenizer.get_vocab().keys())
        if missing:
            raise ValueError(
                f"the tokenizer of {config.native} lacks {', '.join(missing)}, by which its processor marks media; "
                "take tokenizer and processor from the same checkpoint"
            )

    @property
    def kinds(self) -> list[str]:
        """The kinds of media that it takes."""
        return [kind for kind in MEDIA_KINDS if _medium_of(kind) in self.placeholders]

    def medium(self, kind: str, content: Any) -> tuple[list[int], dict[str, Tensor]]:
        """The places and values of a medium.

        Raises:
            ValueError: The native processor does not take such media, or not this one.
        """
        if kind not in self.kinds:
            raise ValueError(f"this encoder takes no {kind}; it takes text, code and {', '.join(self.kinds) or 'nothing else'}")
        ids: list[int] = []
        views: dict[str, list[Tensor]] = {}
        for piece in self._pieces(kind, content):
            places, values = self._made(_medium_of(kind), piece)
            ids += places
            for name, tensor in values.items():
                views.setdefault(name, []).append(tensor)
        return ids, {name: cat_padded(tensors) for name, tensors in views.items()}

    def _pieces(self, kind: str, content: Any) -> list[Any]:
        """What the native processor is given one after another: pages, spans of a sound, or the medium itself."""
        if kind == "page":
            return list(content)
        if kind != "audio":
            return [content]
        longest = getattr(self.native.feature_extractor, "chunk_length", None) or LONGEST_SOUND
        span = round(longest * SAMPLE_RATE)
        spans = [content[first : first + span] for first in range(0, max(1, len(content)), span)]
        return [np.pad(piece, (0, self._whole(len(piece)) - len(piece))) for piece in spans]

    def _whole(self, num_samples: int) -> int:
        """Samples of a sound with the silence behind it.

        Qwen3-Omni's audio tower lets the padding behind a last part of a second into it: without silence up to the second, a
        longer sound beside this one would change its vector.
        """
        unit = SAMPLE_RATE if "Qwen3Omni" in type(self.native).__name__ else 1
        return -(-max(num_samples, round(SHORTEST_SOUND * SAMPLE_RATE)) // unit) * unit

    def _made(self, medium: str, content: Any) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids and values of what one placeholder stands for."""
        arguments: dict[str, Any] = {"images": [content]}
        if medium == "audio":
            arguments = {"audio": [content], "audio_kwargs": {"sampling_rate": SAMPLE_RATE}}
        if medium == "video":
            arguments = self._film(content)
        begin, end = self._markers("audio" if medium == "audio" else "vision")
        text = [begin + self.placeholders[medium] + end]
        try:
            made = dict(self.native(text=text, add_special_tokens=False, return_tensors="pt", **arguments))
        except Exception as error:  # whatever a family's processor makes of sizes that it does not like
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the processor of {self.config.native} cannot take this {medium}: {reason}") from error
        return made.pop("input_ids")[0].tolist(), {name: made[name] for name in made if name not in NOT_VIEWS}

    def _film(self, film: Film) -> dict[str, Any]:
        """A film as native processors take it, with its frames' times; a single frame where they join pairs comes twice."""
        frames, sizes = film.frames, dict(getattr(self.native.video_processor, "size", None) or {})
        if len(frames) < getattr(self.native.video_processor, "temporal_patch_size", 1):
            frames = np.repeat(frames, 2, axis=0)
        number = len(frames)  # each is the middle of its span: the odd ones of twice as many
        times = {"total_num_frames": 2 * number, "fps": 2 * number / film.seconds, "duration": film.seconds}
        times["frames_indices"] = list(range(1, 2 * number, 2))
        options = {"do_sample_frames": False} | ({"size": sizes} if sizes else {})  # Qwen's Omni would take other sizes
        return {"videos": [frames], "video_metadata": [times], "videos_kwargs": options}

    def _markers(self, sense: str) -> tuple[str, str]:
        """What stands before and behind a placeholder, where the native processor does not put it there itself."""
        for names in MARKERS:
            begin, end = (getattr(self.native, name.format(sense), None) for name in names)
            if begin is not None and end is not None:
                return begin, end
        known = self.tokenizer.get_vocab()
        return VISION_MARKERS if sense == "vision" and all(marker in known for marker in VISION_MARKERS) else ("", "")

    @cached_property
    def _rates(self) -> dict[str, float]:
        """Tokens of a picture, of a frame and of a second of sound."""
        taken = {medium: len(self._made(medium, COUNTED[medium])[0]) for medium in self.placeholders}
        return {medium: taken.get(medium, 0) / number for medium, number in (("image", 1), ("video", 4), ("audio", 2))}

    def num_tokens(self, extents: np.ndarray) -> np.ndarray:
        """Lengths (P,) that items of some extents (P,) `EXTENT` will have as sequences, about."""
        decode, rates = self.config.decode, self._rates
        frames = np.minimum(np.ceil(extents["video"] * decode.frames_per_second), decode.max_frames)
        media = extents["pictures"] * rates["image"] + frames * rates["video"] + extents["audio"] * rates["audio"]
        return self.num_text_tokens(extents) + media

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.native.save_pretrained(folder)


class DualProcessor(Processor):
    """Of a model with a tower for text and one for pictures (SigLIP): each part of an item is one place with its own row.

    A text is padded to the length that the text tower was trained with; of a film, each frame is a picture.
    """

    def __init__(self, config: ProcessorConfig, native: Any) -> None:
        super().__init__(config, native.tokenizer)
        self.native = native
        self.begin, self.end = begin_and_end(native.tokenizer)
        self.first_ids, self.last_ids = [], []
        self.length = native.tokenizer.model_max_length
        if self.length > 10**6:  # transformers' way to say that nobody knows
            raise ValueError(f"the tokenizer of {config.native} has no model_max_length, the length its text tower takes")
        if config.max_text_tokens + len(self.begin + self.end) > self.length:
            raise ValueError(
                f"data.processor.max_text_tokens is {config.max_text_tokens}; the text tower of {config.native} takes "
                f"{self.length - len(self.begin + self.end)}"
            )

    def text(self, ids: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        row = [*self.begin, *ids, *self.end]
        padding = self.tokenizer.pad_token_id
        assert isinstance(padding, int)
        return [TEXT], {"input_ids": torch.tensor([row + [padding] * (self.length - len(row))])}

    def medium(self, kind: str, content: Any) -> tuple[list[int], dict[str, Tensor]]:
        if kind == "audio":
            raise ValueError("this encoder takes no audio; it takes text, code, image, page, video")
        pictures = {"image": lambda: [content], "page": lambda: list(content), "video": lambda: list(content.frames)}[kind]()
        made = self.native.image_processor(images=pictures, return_tensors="pt")
        return [PICTURE] * len(pictures), dict(made)

    def num_tokens(self, extents: np.ndarray) -> np.ndarray:
        """Places (P,): one for the text and one for each picture."""
        decode = self.config.decode
        frames = np.minimum(np.ceil(extents["video"] * decode.frames_per_second), decode.max_frames)
        return (extents["text"] > 0) + extents["pictures"] + frames

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.native.save_pretrained(folder)


def begin_and_end(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and behind a text; where that is nothing, its end of a text goes behind."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(first for first in range(len(whole)) if whole[first : first + len(bare)] == bare)
    first, last = whole[:start], whole[start + len(bare) :]
    return (first, last) if first or last else ([], [tokenizer.eos_token_id])


def _medium_of(kind: str) -> str:
    return "image" if kind == "page" else kind
