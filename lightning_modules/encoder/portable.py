"""A Polyphony encoder as the first module of a sentence-transformers model, in this one file beside its weights.

Text, pictures, pages, sounds, films and interleaved lists of them become one vector each, as in Polyphony itself. What it says
there in datamodules/processors and lightning_modules/encoder is said here once more, as nothing of it can be imported where an
exported folder is used; every export compares the vectors. A string is always text: no file is opened, nothing is fetched.

Letters: N inputs, L tokens of the longest, V views, H backbone width, D embedding width.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

RATE = 16_000  # samples of sound a second
KINDS = ("image", "page", "audio", "video")
Views = dict[str, Tensor]


def parts_of(value: Any) -> list[tuple[str, Any]]:
    """An input as (kind, content) in order: a string, a picture, an array, a mapping, a message, or a list of any of them."""
    if isinstance(value, str):
        return [("text", value)]
    if isinstance(value, Image.Image):
        return [("image", value)]
    if isinstance(value, list | tuple):
        return [part for one in value for part in parts_of(one)]
    if isinstance(value, Mapping):
        if "array" in value:
            return [("audio" if "sampling_rate" in value else "video", value)]
        if "content" in value:  # of a chat
            return parts_of(value["content"])
        if "type" in value:  # a piece of a chat's content
            value = {value["type"]: value.get(value["type"])}
        return [part for kind, one in value.items() for part in _named(kind, one)]
    dimensions = getattr(value, "ndim", 0)
    if dimensions not in (1, 2, 3, 4):
        raise ValueError(f"no input: {type(value).__name__}; give text, pictures, arrays of sound or frames, or lists of them")
    return [(("audio", "audio", "image", "video")[dimensions - 1], value)]


def _named(kind: str, value: Any) -> list[tuple[str, Any]]:
    if kind not in ("text", *KINDS):
        raise ValueError(f"an input has a {kind!r}; it may have text, {', '.join(KINDS)}")
    if kind == "page":
        return [(kind, list(value) if isinstance(value, list | tuple) else [value])]
    is_one = kind == "video" and isinstance(value, list | tuple) and all(len(np.shape(frame)) in (2, 3) for frame in value)
    values = list(value) if isinstance(value, list | tuple) and not is_one else [value]
    if kind == "text" and not all(isinstance(one, str) for one in values):
        raise ValueError("a text of an input is no string")
    return [(kind, one) for one in values]


def picture(value: Any) -> np.ndarray:
    """uint8 (H, W, 3), upright as EXIF says; transparency is laid on white, 16 bits are cut to 8."""
    if isinstance(value, Image.Image):
        value = ImageOps.exif_transpose(value)
        if value.mode.startswith("I"):
            value = Image.fromarray((np.asarray(value) >> 8).astype(np.uint8))
        if value.mode in ("RGBA", "LA", "PA") or "transparency" in value.info:
            rgba = value.convert("RGBA")
            value = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        value = np.array(value.convert("RGB"))
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture is {pixels.dtype} {pixels.shape}; give a PIL image, or uint8 (height, width, 3)")
    return pixels


def sound(value: Any) -> np.ndarray:
    """float32 (samples,) at 16 kHz of (samples,) or (channels, samples), in [-1, 1] or whole numbers; alone at 16 kHz."""
    rate = RATE
    if isinstance(value, Mapping):
        value, rate = value["array"], int(value.get("sampling_rate") or RATE)
    wave = np.asarray(value)
    if wave.ndim not in (1, 2) or wave.size == 0 or (wave.ndim == 2 and len(wave) > 16) or wave.dtype.kind not in "if":
        raise ValueError(f"a sound is {wave.dtype} {wave.shape}; give numbers (samples,) or (channels, samples)")
    if wave.dtype.kind == "i":
        wave = wave / 2.0 ** (8 * wave.dtype.itemsize - 1)
    wave = wave.astype(np.float32).mean(0) if wave.ndim == 2 else wave.astype(np.float32)
    if rate != RATE:
        from scipy.signal import resample_poly

        divisor = math.gcd(rate, RATE)
        wave = resample_poly(wave, RATE // divisor, rate // divisor)
    return np.ascontiguousarray(wave, dtype=np.float32)


def film(value: Any, limits: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Frames uint8 (T, H, W, 3) in the middles of T equal spans, and seconds; frames that nothing is said of are one a span."""
    told: Any = {}
    if isinstance(value, Mapping):
        value, told = value["array"], value.get("video_metadata") or {}
    rate = told.get("fps") or limits["frames_per_second"]
    if len(value) == 0:
        raise ValueError("a film has no frame")
    seconds = len(value) / rate
    number = min(limits["max_frames"], max(1, round(seconds * limits["frames_per_second"])))
    wanted = [(n + 0.5) * seconds / number for n in range(number)]
    frames = [picture(value[min(len(value) - 1, int(time * rate + 1e-6))]) for time in wanted]
    height, width = frames[0].shape[:2]
    shrink = min(1.0, math.sqrt(limits["max_frame_pixels"] / (width * height)))
    return np.stack([resized(frame, max(1, int(width * shrink)), max(1, int(height * shrink))) for frame in frames]), seconds


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))


def joined(views: Sequence[Tensor]) -> Tensor:
    """Views one after another, with zeros behind the shorter ones."""
    longest = [max(sizes) for sizes in zip(*(view.shape[1:] for view in views), strict=True)]
    whole = views[0].new_zeros(sum(map(len, views)), *longest)
    for place, view in zip(np.cumsum([0, *map(len, views)]), views, strict=False):
        whole[(slice(place, place + len(view)), *map(slice, view.shape[1:]))] = view
    return whole


class AttentionPooling(nn.Module):
    """Attention of one learnt query over an input's tokens, in four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        key, value = (of(states).float().unflatten(-1, (4, -1)) for of in (self.key, self.value))
        query = self.query.float().unflatten(0, (4, -1))
        scores = (key * query).sum(-1) / query.shape[1] ** 0.5
        weights = scores.masked_fill(mask[..., None] == 0, -torch.inf).softmax(1)
        return (weights[..., None] * value).sum(1).flatten(1)


def pooled(name: str, states: Tensor, mask: Tensor) -> Tensor:
    """Token states (N, L, H) that begin at the left to vectors (N, H), in fp32."""
    lengths = mask.sum(1)
    if name in ("first", "last"):
        places = lengths - 1 if name == "last" else torch.zeros_like(lengths)
        return states[torch.arange(len(states), device=states.device), places].float()
    weights = mask.float() * (torch.arange(1, mask.shape[1] + 1, device=mask.device) if name == "weighted_mean" else 1.0)
    return (states.float() * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)


class Portable(InputModule):
    """What encoders of all backbones share.

    Args:
        told: encoder.json.
        limits: processor.json.
        reader: The tokenizer, or the processor of a model that takes media itself.
    """

    config_file_name = "encoder.json"
    backbone_class: Any

    def __init__(self, told: dict[str, Any], limits: dict[str, Any], reader: Any) -> None:
        super().__init__()
        self.told, self.limits, self.reader = told, limits, reader
        self.tokenizer: Any = getattr(reader, "tokenizer", reader)
        config = told["config"]
        text = dict(config["backbone"]["text"])
        settings = AutoConfig.for_model(text.pop("model_type"), **text)
        self.backbone: Any = self.backbone_class(settings, config["backbone"], limits, reader)
        width, hidden, out = self.backbone.width, config.get("hidden_dim"), config["embedding_dim"]
        self.pooling_name: str = config.get("pooling", "mean")
        if self.pooling_name == "attention":
            self.pooling = AttentionPooling(width)
        widths = [width] if not config.get("projection", True) else [width, *([hidden] if hidden else []), out]
        self.projection = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))

    @property
    def modalities(self) -> list[Any]:
        """With `message` every combination arrives as it is; pages are taken too, for which there is no name."""
        kinds = [kind for kind in ("image", "audio", "video") if kind in self.backbone.kinds]
        return ["text", *kinds, "message"] if kinds else ["text"]

    def get_embedding_dimension(self) -> int:
        return self.told["config"]["embedding_dim"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **unused: Any) -> dict[str, Any]:
        """Token ids and mask (N, L), and the views of all inputs by name.

        Args:
            inputs: See `parts_of`.
            prompt: Put before inputs of text alone.

        Raises:
            ValueError: An input is of no kind that this encoder takes; a TypeError would be swallowed.
        """
        views: dict[str, list[Tensor]] = {}
        rows = [torch.tensor(self._sequence(parts_of(value), prompt or "", views)) for value in inputs]
        if not all(map(len, rows)):
            raise ValueError("an input came to no token: its text is empty")
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        if self.backbone.longest is not None and ids.shape[1] > self.backbone.longest:
            raise ValueError(f"an input comes to {ids.shape[1]} tokens, the model takes {self.backbone.longest}")
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, **{f"views/{name}": joined(found) for name, found in views.items()}}

    def _sequence(self, parts: list[tuple[str, Any]], prompt: str, views: dict[str, list[Tensor]]) -> list[int]:
        """Token ids and places of one input; its views are appended."""
        if not parts:
            raise ValueError("an input has no part")
        if prompt and all(kind == "text" for kind, _ in parts):
            parts = [("text", prompt + "\n".join(text for _, text in parts))]
        ids, room = list(self.backbone.first), self.limits["max_text_tokens"]
        for kind, content in parts:
            if kind == "text":
                found = self._ids(content)
                if len(found) > room and self.limits["too_long"] == "refuse":
                    raise ValueError(f"an input has more than {self.limits['max_text_tokens']} text tokens")
                places, made = self.backbone.words(found[:room])
                room -= min(room, len(found))
            elif kind in self.backbone.kinds:
                places, made = self.backbone.medium(kind, self._content(kind, content))
            else:
                raise ValueError(
                    f"this encoder takes no {kind}; it takes text, {', '.join(self.backbone.kinds) or 'nothing else'}"
                )
            ids += places
            for name, tensor in made.items():
                views.setdefault(name, []).append(tensor)
        return ids + self.backbone.last

    def _ids(self, text: str) -> list[int]:
        """Of a text; one that spells a special token is text."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def _content(self, kind: str, content: Any) -> Any:
        """What Polyphony's decoding makes of a file."""
        if kind == "page":
            return [picture(page) for page in content]
        if kind == "video":
            return film(content, self.limits["decode"])
        return sound(content) if kind == "audio" else picture(content)

    def forward(self, features: dict[str, Any], **unused: Any) -> dict[str, Any]:
        """Adds the token states (N, L, H) and the vectors (N, D)."""
        views = {name.removeprefix("views/"): found for name, found in features.items() if name.startswith("views/")}
        mask = features["attention_mask"]
        states = self.backbone(features["input_ids"], mask, views)
        learnt = self.pooling_name == "attention"
        vectors = self.pooling(states, mask) if learnt else pooled(self.pooling_name, states, mask)
        vectors = self.projection(vectors.to(next(self.parameters()).dtype)).float()
        return {**features, "token_embeddings": states, "sentence_embedding": vectors}

    def save(self, output_path: str, *args: Any, **unused: Any) -> None:
        """The folder once more; sentence-transformers copies this file."""
        folder = Path(output_path)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, folder / "model.safetensors")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        (folder / "encoder.json").write_text(json.dumps({**self.told, "sha256": digest}, indent=1))
        (folder / "processor.json").write_text(json.dumps(self.limits, indent=1))
        for one in {id(one): one for one in (self.tokenizer, self.reader)}.values():
            one.save_pretrained(folder)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", *args: Any, **more: Any) -> "Portable":
        places = {name: more[name] for name in ("token", "cache_folder", "revision", "local_files_only") if name in more}
        folder = Path(cls.load_dir_path(model_name_or_path, subfolder, **places) or model_name_or_path)
        told, limits = (json.loads((folder / f"{name}.json").read_text()) for name in ("encoder", "processor"))
        reader = (AutoTokenizer if limits["native"] is None else AutoProcessor).from_pretrained(folder, trust_remote_code=False)
        module = cls(told, limits, reader)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return module
