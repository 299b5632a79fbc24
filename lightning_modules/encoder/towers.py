"""Towers: views of a medium to tokens of the backbone's width, through any timm model."""

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What timm.create_model takes beside a model's sizes: files and places to load from, and what the fields of TowerConfig say.
NOT_ARGUMENTS = {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "scriptable"}
NOT_ARGUMENTS |= {"exportable", "no_jit", "in_chans", "num_classes", "embed_layer"}


@dataclass(frozen=True)
class TowerConfig:
    """A timm model that turns views into tokens.

    Args:
        model: Name of the timm model.
        arguments: Passed to timm (`embed_dim`, `depth`, ..).
        stem: `timm` keeps the model's own patch embedding; `conv` replaces a ViT's by a convolutional stem of the same stride.
        in_chans: Channels of a view: 3 for pictures, 1 for spectrograms.
        height: Of a view.
        width: Of a view.
        pretrained: Take timm's weights from its hub.
    """

    model: str = "vit_tiny_patch16_224"
    arguments: dict[str, Any] = field(default_factory=dict)
    stem: Literal["timm", "conv"] = "timm"
    in_chans: int = 3
    height: int = 64
    width: int = 64
    pretrained: bool = False

    def __post_init__(self) -> None:
        if ":" in self.model or "/" in self.model:
            raise ValueError(f"tower model {self.model!r} is no name of timm's own; it would be fetched from elsewhere")
        if taken := sorted(self.arguments.keys() & NOT_ARGUMENTS):
            raise ValueError(f"tower arguments hold {', '.join(taken)}; a tower's arguments are the sizes of its model alone")


class Tower(nn.Module):
    """(V, C, height, width) views to (V, tokens, out_width); the last feature map is averaged down to a square of tokens.

    uint8 views are scaled to [-1, 1], others pass as they are.
    """

    def __init__(self, config: TowerConfig, out_width: int, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.view_shape = (config.in_chans, config.height, config.width)
        arguments = dict(config.arguments)
        if config.model.startswith("vit") or "img_size" in arguments:
            arguments.setdefault("img_size", (config.height, config.width))
        if config.stem == "conv":
            arguments["embed_layer"] = ConvStem
        pretrained = config.pretrained and load_pretrained
        try:
            self.model: Any = timm.create_model(
                config.model, pretrained=pretrained, num_classes=0, in_chans=config.in_chans, **arguments
            )
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"timm cannot build the tower {config.model!r} with {config.arguments}: {error}") from error
        self.project = nn.Linear(self.model.num_features, out_width)
        with torch.no_grad():
            self.map_size = tuple(self.feature_map(torch.zeros(1, config.in_chans, config.height, config.width)).shape[2:])

    def forward(self, views: Tensor, tokens: int) -> Tensor:
        if tuple(views.shape[1:]) != self.view_shape:
            raise ValueError(
                f"a view measures {tuple(views.shape[1:])}, its tower takes {self.view_shape} (channels, height, width); "
                "make the sizes of data.processor and of the tower equal"
            )
        views = views.to(self.project.weight.dtype) / 127.5 - 1.0 if views.dtype == torch.uint8 else views
        pooled = F.adaptive_avg_pool2d(self.feature_map(views), round(tokens**0.5))
        return self.project(pooled.flatten(2).transpose(1, 2))

    def feature_map(self, views: Tensor) -> Tensor:
        """The last features as (V, channels, rows, columns), whatever layout the timm model has."""
        features = self.model.forward_features(views)
        if features.ndim == 3:
            patches = features[:, self.model.num_prefix_tokens :]
            rows, columns = self.model.patch_embed.grid_size
            return patches.transpose(1, 2).unflatten(2, (rows, columns))
        return features if features.shape[1] == self.model.num_features else features.permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """Patch embedding by 3×3 convolutions of stride 2 with GroupNorm and GELU; the interface of timm's `PatchEmbed`.

    Our choice for towers that start from random weights.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        **unused: Any,
    ) -> None:
        super().__init__()
        del unused  # options of timm's own patch embedding that have no meaning here
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        num_halvings = patch_size.bit_length() - 1
        if 2**num_halvings != patch_size or height % patch_size or width % patch_size:
            raise ValueError(
                f"a conv stem needs a patch size that is a power of 2 and divides {height} x {width}; it is {patch_size}"
            )
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        channels = [in_chans, *(max(16, embed_dim >> (num_halvings - 1 - n)) for n in range(num_halvings))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Conv2d(channels[-1], embed_dim, 1)

    def forward(self, views: Tensor) -> Tensor:
        return self.project(self.layers(views)).flatten(2).transpose(1, 2)
