"""The encoder: backbone, pooling, projection; a prefix of its vector is a vector itself (MRL)."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.processors.inputs import Inputs
from datamodules.processors.passes import PASS_COST, packs_of, passes_of, split_into
from datamodules.processors.processor import Processor
from kernels.contrastive import check_prefixes
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.native import build_backbone
from lightning_modules.encoder.pooling import PoolingName, pool, pooling_of
from lightning_modules.sharded import is_sharded, largest_of_ranks, whole


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder's shape.

    Args:
        backbone: A text model with towers, or a model that takes media itself.
        embedding_dim: Width D of the vector.
        prefixes: Widths that are useful by themselves, increasing; the last is D.
        hidden_dim: None projects by one linear map (Gemini Embedding); a number goes up to it and down again, without a
            nonlinearity (EmbeddingGemma: 768 → 3072 → 768).
        pooling: What an item's vector is of its token states: their `mean` (both papers), the `last` or the `first` of them,
            their mean weighted by position (`weighted_mean`), or learnt `attention` over them.
        projection: False leaves the projection out: the vector is what pooling gives, of the backbone's width.
    """

    backbone: BackboneConfig
    embedding_dim: int
    prefixes: tuple[int, ...]
    hidden_dim: int | None = None
    pooling: PoolingName = "mean"
    projection: bool = True

    def __post_init__(self) -> None:
        check_prefixes(self.prefixes, self.embedding_dim)
        if self.hidden_dim is not None and not self.projection:
            raise ValueError(f"hidden_dim is {self.hidden_dim} without a projection; make it null, or projection true")
        if self.prefixes[-1] != self.embedding_dim:
            raise ValueError(f"the last prefix is {self.prefixes[-1]}; it must be the embedding's width {self.embedding_dim}")


@dataclass(frozen=True)
class ComputeConfig:
    """How a batch goes through the encoder. None of it changes a vector or a gradient; time and memory are what it changes.

    Where dropout is on, other parts draw other numbers, as other batches would.

    Args:
        layout: `packed`: items lie end to end, without padding. `padded`: in passes of like length. `auto`: packed where the
            text model attends by SDPA and is not compiled.
        max_tokens: Most tokens whose activations are in memory, padding included. What is more goes through in parts, all but
            the last of them once more in the backward pass, with the same random numbers (GradCache, arXiv 2101.06983). None
            sets no limit.
        pass_cost: What a further padded pass costs, in tokens; see `passes_of`.
        checkpoint_layers: Keep only the inputs of the layers of text model and towers, and run them again in the backward pass.
        compile: Compile the text model (padded layout).
    """

    layout: Literal["auto", "packed", "padded"] = "auto"
    max_tokens: int | None = None
    pass_cost: int = PASS_COST
    checkpoint_layers: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"compute.max_tokens is {self.max_tokens}; it must be at least 1, or null for no limit")
        if self.compile and self.layout == "packed":
            raise ValueError("compute.compile needs compute.layout=padded: packs are of a new shape at every step")


class Part(NamedTuple):
    """Items that go through the encoder together.

    Args:
        rows: Which of the batch, sorted by length (P,).
        places: Their tokens, padding included.
        again: Whether their activations are dropped and made again in the backward pass.
    """

    rows: np.ndarray
    places: int
    again: bool


class Embedder(nn.Module):
    """Inputs to embeddings (N, D), not normalised; see `cut`.

    Args:
        config: What to build.
        load_pretrained: False leaves out pretrained weights, for weights that follow from a checkpoint.
    """

    def __init__(self, config: EncoderConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        self.processor: Processor | None = None  # that of `from_checkpoint`
        self.backbone: Any = build_backbone(config.backbone, load_pretrained=load_pretrained)
        self.padding = 0.0  # share of what went through last
        self.use(ComputeConfig())
        width, hidden = self.backbone.width, config.hidden_dim
        self.pooling = pooling_of(config.pooling, width)
        if not config.projection:
            if config.embedding_dim != width:
                raise ValueError(
                    f"embedding_dim is {config.embedding_dim}, the backbone's width {width}; "
                    "without a projection they must be equal"
                )
            self.projection = nn.Identity()
        elif hidden is None:
            self.projection = nn.Sequential(nn.Linear(width, config.embedding_dim, bias=False))
        else:
            self.projection = nn.Sequential(
                nn.Linear(width, hidden, bias=False), nn.Linear(hidden, config.embedding_dim, bias=False)
            )

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str = "auto") -> "Embedder":
        """The encoder of a folder (ours or of sentence-transformers) with its processor, ready to `embed`.

        Args:
            path: The folder.
            device: `cpu`, `cuda`, or `auto` for the best there is.
        """
        from lightning_modules.encoder.embedding import load_embedder

        return load_embedder(path, device)

    def embed(
        self,
        items: Iterable[Any],
        prefix: int | None = None,
        task: str | None = None,
        *,
        batch_tokens: int = 16384,
        batch_size: int = 256,
        progress: bool = False,
    ) -> np.ndarray:
        """Unit vectors (N, prefix) float32 of items, in their order.

        Args:
            items: Texts, paths, bytes, arrays, pictures, lists of them; see `datamodules.items.item_of`.
            prefix: Width; None for all of it.
            task: Of texts: `search result`, `classification`, .. or `document`; None for no prompt. See `encoder.embedding`.
            batch_tokens: Most tokens of a batch, about.
            batch_size: Most items of a batch.
            progress: Whether a bar is shown.

        Raises:
            ValueError: The prefix or task is none of this encoder's, or an item cannot be used: names its number.
        """
        from lightning_modules.encoder.embedding import embed_things

        return embed_things(self, items, prefix, task, batch_tokens, batch_size, progress)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at random in training: dropout of units, of attention or of whole layers."""
        chances = [value for name, value in leaves(self.backbone.settings) if "drop" in str(name)]
        chances += [getattr(module, name, 0.0) for module in self.modules() for name in ("p", "drop_prob")]
        return any(isinstance(chance, float) and chance > 0 for chance in chances)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def use(self, compute: ComputeConfig) -> None:
        """Let batches go through so from now on.

        Raises:
            ValueError: They are to be packed, which the text model's attention cannot be.
        """
        if compute.layout == "packed" and not self.backbone.packs:
            raise ValueError(
                f"the model attends by {self.backbone.attention!r}, which cannot be packed; set compute.layout=auto"
            )
        self.compute = compute
        self.packed = compute.layout == "packed" or (compute.layout == "auto" and self.backbone.packs and not compute.compile)
        if compute.checkpoint_layers:
            self.backbone.checkpoint_layers()
        if compute.compile:
            self.backbone.compile_text()

    def parts(self, lengths: np.ndarray) -> list[Part]:
        """How items of these lengths (N,) go through: the last parts stay in memory, as many as the limit allows."""
        most = self.compute.max_tokens
        cut = packs_of(lengths, most) if self.packed else passes_of(lengths, self.compute.pass_cost, most)
        if is_sharded(self):  # ranks ask each other for the weights of every layer in every part
            cut = split_into(cut, largest_of_ranks(len(cut), self.device))
        places = [int(lengths[rows].sum() if self.packed else lengths[rows].max() * len(rows)) for rows in cut]
        left = np.cumsum(places[::-1])[::-1]  # in this part and all after it
        num_again = 0 if most is None else int((left[:-1] > most).sum())
        if is_sharded(self):
            num_again = largest_of_ranks(num_again, self.device)
        return [Part(*part, number < num_again) for number, part in enumerate(zip(cut, places, strict=True))]

    def forward(self, inputs: Inputs) -> Tensor:
        """Embeddings (N, D) in fp32, whatever parts the items go through in.

        Equal items go through once, unless something is drawn at random for each, or ranks that share weights, who need as
        many parts as the others, could be left with too few.
        """
        which = np.arange(len(inputs))
        if not is_sharded(self) and not (self.training and self.draws):
            inputs, which = inputs.distinct()
        parts, vectors = self.parts(inputs.lengths.numpy()), []
        self.padding = 1.0 - int(inputs.lengths.sum()) / sum(part.places for part in parts)
        for rows, _, again in parts:
            part = inputs.rows(rows)
            if again and torch.is_grad_enabled():  # the tensor argument tells which device's random numbers to replay
                vectors.append(checkpoint(self._embed, part.token_ids, part, use_reentrant=False))
            else:
                vectors.append(self._embed(part.token_ids, part))
        places = torch.from_numpy(np.concatenate([part.rows for part in parts]).argsort()[which])
        return torch.cat(vectors)[places.to(inputs.token_ids.device)]

    def _embed(self, token_ids: Tensor, inputs: Inputs) -> Tensor:
        """Embeddings of items that go through together."""
        del token_ids
        states_TH = self.backbone(inputs, packed=self.packed)
        return self.projection(pool(states_TH, inputs.lengths, self.pooling)).float()


def device_named(name: str) -> str:
    """A device; for `auto` the best there is."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration and of those within it."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield name, value


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
    device = encoder.device
    random, size = torch.Generator().manual_seed(0), encoder.backbone.vocab_size
    ids = torch.randint(2, size, (12,), generator=random)
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % size

    def inputs(*items: Tensor) -> Inputs:
        return encoder.backbone.text_inputs(list(items)).to(device)

    one, other = (encoder.backbone(inputs(item), packed=encoder.packed)[0] for item in (ids, changed))
    moved = (one - other).abs().max().item()
    if not moved > 1e-6:
        raise ValueError(
            f"the backbone is still causal: changing the last token moved the first token's state by {moved:.1e}; "
            "choose a text model that `is_causal = False` makes bidirectional, or another attention implementation"
        )

    def pooled(*items: Tensor, packed: bool) -> Tensor:
        given = inputs(*items)
        return pool(encoder.backbone(given, packed=packed), given.lengths, encoder.pooling)

    items = (ids[:7], ids[5:], changed, ids[:3])  # neighbours of equal length, and of others
    alone = torch.cat([pooled(item, packed=False) for item in items])
    beside = pooled(*items, packed=encoder.packed)
    leak = (F.normalize(alone, dim=-1) - F.normalize(beside, dim=-1)).abs().max().item()
    is_exact = one.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if not leak < (1e-4 if is_exact else 2e-2):
        raise ValueError(
            f"padding or a batch neighbour moves a vector by {leak:.1e}; this backbone does not respect its attention mask"
            + (", or cannot be packed: set model.compute.layout=padded" if encoder.packed else "")
        )
    encoder.train(training)


def require_cached_is_plain(encoder: Embedder, inputs: Inputs) -> None:
    """Compare the gradients of items in parts, run again where the limit demands it, with those of all of them at once.

    Raises:
        ValueError: They differ: something in the encoder sees its neighbours, or draws what cannot be replayed.
    """
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    compute, training = encoder.compute, encoder.training
    encoder.eval()  # other parts draw other random numbers
    gradients = []
    for most in (None, compute.max_tokens):
        encoder.use(dataclasses.replace(compute, max_tokens=most))
        vectors = encoder(inputs)
        weight = torch.linspace(-1, 1, vectors.numel(), device=vectors.device).view_as(vectors)
        gradients.append(_gradient(encoder, parameters, (F.normalize(vectors, dim=-1) * weight).sum()))
    encoder.use(compute)
    encoder.train(training)
    plain, cached = gradients
    difference = ((cached - plain).norm() / plain.norm()).item()
    is_exact = not torch.is_autocast_enabled(inputs.token_ids.device.type)
    if not difference < (1e-4 if is_exact else 5e-2):
        raise ValueError(
            f"gradients of a batch in parts differ from those of a whole one by {difference:.1e} of their length; "
            "this encoder cannot be trained with model.compute.max_tokens"
        )
    print(f"gradients in parts are those of a whole batch to {difference:.1e}")


def _gradient(encoder: Embedder, parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """All parameters' gradients in a row, none of which is left behind."""
    if not is_sharded(encoder):
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    else:  # FSDP2 puts gradients where they belong in a backward pass alone
        loss.backward()
        found = [None if parameter.grad is None else whole(parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
    return torch.cat([gradient.flatten().float() for gradient in found if gradient is not None])
