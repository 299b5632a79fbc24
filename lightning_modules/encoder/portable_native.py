"""The part of `portable.py` for models that take media themselves: their own processor makes places and values."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from lightning_modules.encoder.portable import KINDS, RATE, Portable, Views, joined

TEXT, PICTURE = -1, -2  # places of a model with a tower for text and one for pictures
TYPES = {"image": 1, "video": 2, "audio": 3}  # of places, from which Qwen's positions follow
MARKERS = (("{}_start_token", "{}_end_token"), ("{}_bos_token", "{}_eos_token"))
VISION = ("<|vision_start|>", "<|vision_end|>")  # markers that Qwen2.5-VL's processor does not name
NOT_VIEWS = ("attention_mask", "token_type_ids", "mm_token_type_ids")


def begin_and_end(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and behind a text; where that is nothing, its end of a text goes behind."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(first for first in range(len(whole)) if whole[first : first + len(bare)] == bare)
    first, last = whole[:start], whole[start + len(bare) :]
    return (first, last) if first or last else ([], [tokenizer.eos_token_id])


class Native(nn.Module):
    """One model over one sequence of text tokens and places for media."""

    def __init__(self, settings: Any, fields: Mapping[str, Any], limits: Mapping[str, Any], processor: Any) -> None:
        super().__init__()
        self.processor, self.family = processor, settings.model_type
        text = settings.get_text_config()
        text.is_causal = False
        if getattr(text, "use_bidirectional_attention", None) == "vision":
            text.use_bidirectional_attention = None
        more = {"attn_implementation": fields["attention"]} if fields["attention"] else {}
        self.model: Any = AutoModel.from_config(settings, dtype=torch.float32, trust_remote_code=False, **more)
        self.takes_types = "mm_token_type_ids" in inspect.signature(self.model.forward).parameters and "qwen" in self.family
        self.width = getattr(text, "embedding_dim", None) or text.hidden_size
        self.longest = getattr(text, "max_position_embeddings", None)
        self.first, self.last = begin_and_end(processor.tokenizer)
        marks = {medium: getattr(processor, f"{medium}_token", None) for medium in TYPES}
        self.marks = {medium: mark for medium, mark in marks.items() if mark is not None}
        self.kinds = tuple(kind for kind in KINDS if ("image" if kind == "page" else kind) in self.marks)
        ids = {medium: [getattr(settings, f"{medium}_token_{end}", None) for end in ("id", "index")] for medium in TYPES}
        self.places = {medium: one if one is not None else other for medium, (one, other) in ids.items()}

    def words(self, ids: list[int]) -> tuple[list[int], Views]:
        return ids, {}

    def medium(self, kind: str, content: Any) -> tuple[list[int], Views]:
        made = [self._made("image" if kind == "page" else kind, piece) for piece in self._pieces(kind, content)]
        names = made[0][1]
        return [i for ids, _ in made for i in ids], {name: joined([views[name] for _, views in made]) for name in names}

    def _pieces(self, kind: str, content: Any) -> list[Any]:
        """Pages, spans of a sound that the extractor takes, or the medium itself."""
        if kind != "audio":
            return list(content) if kind == "page" else [content]
        span = round((getattr(self.processor.feature_extractor, "chunk_length", None) or 30.0) * RATE)
        unit = RATE if "Qwen3Omni" in type(self.processor).__name__ else 1  # whose tower lets padding into the last second
        spans = [content[first : first + span] for first in range(0, max(1, len(content)), span)]
        return [np.pad(one, (0, -(-max(len(one), RATE // 10) // unit) * unit - len(one))) for one in spans]

    def _made(self, medium: str, content: Any) -> tuple[list[int], Views]:
        """Token ids and values of what one placeholder stands for."""
        arguments: dict[str, Any] = {"images": [content]}
        if medium == "audio":
            arguments = {"audio": [content], "audio_kwargs": {"sampling_rate": RATE}}
        if medium == "video":
            arguments = self._film(*content)
        begin, end = self._markers("audio" if medium == "audio" else "vision")
        text = [begin + self.marks[medium] + end]
        try:
            made = dict(self.processor(text=text, add_special_tokens=False, return_tensors="pt", **arguments))
        except Exception as error:
            raise ValueError(f"the model's processor cannot take this {medium}: {error}") from error
        return made.pop("input_ids")[0].tolist(), {name: made[name] for name in made if name not in NOT_VIEWS}

    def _film(self, frames: np.ndarray, seconds: float) -> dict[str, Any]:
        """With its frames' times; a single frame where the model joins pairs comes twice."""
        sizes = dict(getattr(self.processor.video_processor, "size", None) or {})
        if len(frames) < getattr(self.processor.video_processor, "temporal_patch_size", 1):
            frames = np.repeat(frames, 2, axis=0)
        number = len(frames)  # each is the middle of its span: the odd ones of twice as many
        times = {"total_num_frames": 2 * number, "fps": 2 * number / seconds, "duration": seconds}
        times["frames_indices"] = list(range(1, 2 * number, 2))
        options = {"do_sample_frames": False} | ({"size": sizes} if sizes else {})
        return {"videos": [frames], "video_metadata": [times], "videos_kwargs": options}

    def _markers(self, sense: str) -> tuple[str, str]:
        for names in MARKERS:
            begin, end = (getattr(self.processor, name.format(sense), None) for name in names)
            if begin is not None and end is not None:
                return begin, end
        known = self.processor.tokenizer.get_vocab()
        return VISION if sense == "vision" and all(marker in known for marker in VISION) else ("", "")

    def forward(self, ids: Tensor, mask: Tensor, views: Views) -> Tensor:
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **views}
        if self.family != "embedding_gemma2":
            batch["use_cache"] = False
        if self.takes_types and views:
            found = [TYPES[medium] * (ids == place) for medium, place in self.places.items() if place is not None]
            batch["mm_token_type_ids"] = sum(found)
        return self.model(**batch).last_hidden_state


class Dual(nn.Module):
    """One vector for each part of an input, by the text or the vision tower of a SigLIP."""

    def __init__(self, settings: Any, fields: Mapping[str, Any], limits: Mapping[str, Any], processor: Any) -> None:
        super().__init__()
        self.processor, self.longest, self.kinds = processor, None, ("image", "page", "video")
        self.model: Any = AutoModel.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        self.width = settings.text_config.projection_size or settings.text_config.hidden_size
        self.begin, self.end = begin_and_end(processor.tokenizer)
        self.first, self.last = [], []

    def words(self, ids: list[int]) -> tuple[list[int], Views]:
        row = [*self.begin, *ids, *self.end]
        tokenizer = self.processor.tokenizer
        return [TEXT], {"words": torch.tensor([row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row))])}

    def medium(self, kind: str, content: Any) -> tuple[list[int], Views]:
        pictures = {"image": [content], "page": content, "video": list(content[0])}[kind]
        return [PICTURE] * len(pictures), dict(self.processor.image_processor(images=pictures, return_tensors="pt"))

    def forward(self, ids: Tensor, mask: Tensor, views: Views) -> Tensor:
        states = torch.zeros(*ids.shape, self.width, device=ids.device)
        pictures = {name: found for name, found in views.items() if name != "words"}
        if "words" in views:
            found = self.model.get_text_features(views["words"]).pooler_output
            states[ids == TEXT] = F.normalize(found.float(), dim=-1)
        if pictures:
            found = self.model.get_image_features(**pictures).pooler_output
            states[ids == PICTURE] = F.normalize(found.float(), dim=-1)
        return states


class NativeEncoder(Portable):
    backbone_class = Native


class DualEncoder(Portable):
    backbone_class = Dual
