"""The part of `portable.py` for a text model over one sequence of tokens of text and, from towers beside it, of media."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.audio_utils import mel_filter_bank

from lightning_modules.encoder.portable import KINDS, RATE, Portable, Views, resized

BEGIN, SOFT, END = range(3)  # roles of places for media, which are negative ids


class ConvStem(nn.Module):
    """A ViT's patch embedding by 3x3 convolutions of stride 2."""

    def __init__(self, img_size: Any, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **unused: Any) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        self.patch_size, self.grid_size = (patch_size, patch_size), (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        channels = [in_chans, *(max(16, embed_dim >> (halvings - 1 - n)) for n in range(halvings))]
        layers = [
            (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU())
            for before, after in itertools.pairwise(channels)
        ]
        self.layers = nn.Sequential(*itertools.chain.from_iterable(layers))
        self.project = nn.Conv2d(channels[-1], embed_dim, 1)

    def forward(self, views: Tensor) -> Tensor:
        return self.project(self.layers(views)).flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """Views (V, C, height, width) to tokens (V, tokens, H): a timm model, whose last map is averaged down to a square."""

    def __init__(self, told: Mapping[str, Any], width: int) -> None:
        super().__init__()
        more = dict(told["arguments"])
        if told["model"].startswith("vit") or "img_size" in more:
            more.setdefault("img_size", (told["height"], told["width"]))
        if told["stem"] == "conv":
            more["embed_layer"] = ConvStem
        self.model: Any = timm.create_model(told["model"], pretrained=False, num_classes=0, in_chans=told["in_chans"], **more)
        self.project = nn.Linear(self.model.num_features, width)

    def forward(self, views: Tensor, tokens: int) -> Tensor:
        scaled = views.to(self.project.weight.dtype)
        features = self.model.forward_features(scaled / 127.5 - 1.0 if views.dtype == torch.uint8 else scaled)
        if features.ndim == 3:
            patches = features[:, self.model.num_prefix_tokens :]
            features = patches.transpose(1, 2).unflatten(2, tuple(self.model.patch_embed.grid_size))
        elif features.shape[1] != self.model.num_features:
            features = features.permute(0, 3, 1, 2)
        return self.project(F.adaptive_avg_pool2d(features, round(tokens**0.5)).flatten(2).transpose(1, 2))


def bidirectional(settings: Any) -> Any:
    """A text model's configuration without the causal mask; Gemma 3's own switch counts the token itself in its window."""
    settings.is_causal, settings.use_cache = False, False
    if getattr(settings, "use_bidirectional_attention", None) is True:
        settings.use_bidirectional_attention = False
        settings.sliding_window -= 1
    return settings


class Composed(nn.Module):
    """A text model over one sequence of text, picture and spectrogram tokens."""

    def __init__(self, settings: Any, fields: Mapping[str, Any], told: Mapping[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self.told, self.routes, self.tokens = told, fields["routes"], fields["tokens"]
        self.kinds = tuple(self.routes)
        more = {"attn_implementation": fields["attention"]} if fields["attention"] else {}
        self.text: Any = AutoModel.from_config(bidirectional(settings), dtype=torch.float32, trust_remote_code=False, **more)
        if getattr(self.text, "pooler", None) is not None:
            self.text.pooler = None
        self.width, self.longest = settings.hidden_size, getattr(settings, "max_position_embeddings", None)
        self.towers = nn.ModuleDict({name: Tower(tower, self.width) for name, tower in fields["towers"].items()})
        self.boundaries = nn.ParameterDict({kind: nn.Parameter(torch.zeros(2, self.width)) for kind in self.routes})
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.first, self.last = [first] if first is not None else [], [last] if last is not None else []
        filters = {"num_frequency_bins": 257, "num_mel_filters": told["num_mels"], "min_frequency": 20.0}
        filters |= {"max_frequency": RATE / 2, "sampling_rate": RATE, "mel_scale": "slaney", "norm": None}
        self.filters = torch.tensor(mel_filter_bank(**filters), dtype=torch.float32).numpy()

    def words(self, ids: list[int]) -> tuple[list[int], Views]:
        return ids, {}

    def medium(self, kind: str, content: Any) -> tuple[list[int], Views]:
        views, size, place = self._views(kind, content), self.told["tokens_per_view"][kind], -1 - 3 * KINDS.index(kind)
        return [place - BEGIN, *[place - SOFT] * (len(views) * size), place - END], {kind: views}

    def _views(self, kind: str, content: Any) -> Tensor:
        size = self.told["view_size"]
        if kind == "audio":
            return self._spectrograms(torch.from_numpy(content))
        if kind == "page":
            rows, columns = self.told["page_grid"]
            pages = np.stack([resized(page, columns * size, rows * size) for page in content])
            pictures = pages.reshape(len(pages), rows, size, columns, size, 3).swapaxes(2, 3).reshape(-1, size, size, 3)
        else:
            pictures = np.stack([resized(one, size, size) for one in (content[0] if kind == "video" else [content])])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def _spectrograms(self, wave: Tensor) -> Tensor:
        span = round(self.told["seconds_per_view"] * RATE)
        number = -(-len(wave) // span)
        spans = F.pad(wave, (0, number * span - len(wave))).view(number, span)
        window, frames = torch.hann_window(512), self.told["num_frames"]
        made: Any = {"hop_length": span // frames, "window": window, "pad_mode": "constant", "return_complex": True}
        power = torch.stft(spans, 512, center=True, **made).abs().square()[:, :, :frames]
        mel = torch.einsum("fm,vft->vmt", torch.from_numpy(self.filters), power)
        return ((mel.clamp(min=1e-6).log10() + 2.0) / 4.0)[:, None]

    def forward(self, ids: Tensor, mask: Tensor, views: Views) -> Tensor:
        states = self.text.get_input_embeddings()(ids.clamp(min=0))
        for kind, found in views.items():
            place = -1 - 3 * KINDS.index(kind)
            tokens = self.towers[self.routes[kind]](found, self.tokens[kind]).flatten(0, 1).to(states.dtype)
            states = states.masked_scatter((ids == place - SOFT)[..., None], tokens)
            for role, boundary in zip((BEGIN, END), self.boundaries[kind], strict=True):
                states = torch.where((ids == place - role)[..., None], boundary.to(states.dtype), states)
        return self.text(inputs_embeds=states, attention_mask=mask).last_hidden_state


class ComposedEncoder(Portable):
    backbone_class = Composed
