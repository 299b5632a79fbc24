"""The encoder: backbone, mean pooling, projection; a prefix of its vector is a vector itself (MRL)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.processors.composed import Inputs
from kernels.contrastive import check_prefixes
from lightning_modules.encoder.composed import ComposedBackbone, ComposedConfig


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder's shape.

    Args:
        backbone: Text model and towers.
        embedding_dim: Width D of the vector.
        prefixes: Widths that are useful by themselves, increasing; the last is D.
        hidden_dim: None projects by one linear map (Gemini Embedding); a number goes up to it and down again, without a
            nonlinearity (EmbeddingGemma: 768 → 3072 → 768).
    """

    backbone: ComposedConfig
    embedding_dim: int
    prefixes: tuple[int, ...]
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        check_prefixes(self.prefixes, self.embedding_dim)
        if self.prefixes[-1] != self.embedding_dim:
            raise ValueError(f"the last prefix is {self.prefixes[-1]}; it must be the embedding's width {self.embedding_dim}")


class Embedder(nn.Module):
    """Inputs to embeddings (N, D), not normalised; see `cut`.

    Args:
        config: What to build.
        load_pretrained: False leaves out pretrained weights, for weights that follow from a checkpoint.
    """

    def __init__(self, config: EncoderConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        self.backbone = ComposedBackbone(config.backbone, load_pretrained=load_pretrained)
        width, hidden = self.backbone.width, config.hidden_dim
        if hidden is None:
            self.projection = nn.Sequential(nn.Linear(width, config.embedding_dim, bias=False))
        else:
            self.projection = nn.Sequential(
                nn.Linear(width, hidden, bias=False), nn.Linear(hidden, config.embedding_dim, bias=False)
            )

    def forward(self, inputs: Inputs) -> Tensor:
        if len(inputs.passes) > 1:
            places = torch.cat([rows for rows, _ in inputs.passes]).argsort()
            return torch.cat([self(part) for part in inputs.in_passes()])[places]
        states_NLH = self.backbone(inputs)
        return self.projection(mean_pool(states_NLH, inputs.attention_mask)).float()


def mean_pool(states_NLH: Tensor, mask_NL: Tensor) -> Tensor:
    """Mean over all attended tokens (N, H)."""
    weight_NL1 = mask_NL[..., None].to(states_NLH.dtype)
    return (states_NLH * weight_NL1).sum(1) / weight_NL1.sum(1)


def cut(embedding_ND: Tensor, prefix: int) -> Tensor:
    """The first `prefix` dimensions, renormalised (N, prefix).

    Raises:
        ValueError: The prefix is wider than the embedding.
    """
    check_prefixes((prefix,), embedding_ND.shape[1])
    return F.normalize(embedding_ND[:, :prefix], dim=-1)


@torch.no_grad()
def probe(encoder: Embedder) -> None:
    """Prove on random tokens what every embedding relies on.

    Changing the last token must change the first token's state (the causal mask is gone in every layer that could hide it);
    padding and batch neighbours must not change a vector.

    Raises:
        ValueError: One of them does not hold for this backbone and attention implementation.
    """
    training = encoder.training
    encoder.eval()
    device = next(encoder.parameters()).device
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(2, encoder.backbone.vocab_size, (2, 12), generator=random).to(device)
    ids[1, :-1] = ids[0, :-1]
    ids[1, -1] = (ids[0, -1] + 1) % encoder.backbone.vocab_size
    whole = Inputs(ids, torch.ones_like(ids))
    states = encoder.backbone(whole)
    moved = (states[0, 0] - states[1, 0]).abs().max().item()
    if not moved > 1e-6:
        raise ValueError(
            f"the backbone is still causal: changing the last token moved the first token's state by {moved:.1e}; "
            "choose a text model that `is_causal = False` makes bidirectional, or another attention implementation"
        )
    alone = encoder(Inputs(ids[:1, :7], torch.ones_like(ids[:1, :7])))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    beside = encoder(Inputs(ids, mask))[:1]
    leak = (F.normalize(alone, dim=-1) - F.normalize(beside, dim=-1)).abs().max().item()
    if not leak < (1e-4 if alone.dtype == torch.float32 and not torch.is_autocast_enabled(device.type) else 2e-2):
        raise ValueError(
            f"padding or a batch neighbour moves a vector by {leak:.1e}; this backbone does not respect its attention mask"
        )
    encoder.train(training)
