"""A sentence-transformers folder as an encoder of ours, which gives the same vectors: as a start, a teacher, or to be judged.

Text model, pooling and Dense layers become backbone, pooling and projection; Normalize is what `cut` does anyway. transformers
itself says what the token states are, before an encoder is given away. Weights are read from safetensors alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModel

from datamodules.files import sha256_of
from datamodules.processors.loading import load_processor
from datamodules.processors.processor import Processor
from datamodules.processors.sentence_transformers import (
    Module,
    modules_of,
    read_settings,
    refuse,
    text_module,
)
from datamodules.sample import Item, Part
from lightning_modules.encoder.backbone import BackboneConfig, text_fields
from lightning_modules.encoder.embedder import Embedder, EncoderConfig
from lightning_modules.encoder.pooling import PoolingName

POOLINGS: dict[str, PoolingName] = {"mean": "mean", "cls": "first", "lasttoken": "last", "weightedmean": "weighted_mean"}
FLAGS = {  # before version 6 each pooling had a setting of its own
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TOLERANCE = 1e-4  # of a token's state, both of unit length, in fp32


def load_sentence_transformers(folder: str | Path) -> tuple[Embedder, Processor]:
    """The encoder and its processor. Its only prefix is the whole vector, as the folder does not say which others are trained.

    Raises:
        ValueError: A module or a setting has no place here, a weight is missing, or the token states are not transformers'.
    """
    folder = Path(folder)
    text, rest = text_module(folder), modules_of(folder)[1:]
    _require_known(folder, rest)
    processor, plain = load_processor(folder), _text_model(text.folder)
    weights = {f"projection.{n}.weight": _dense_weight(folder, m) for n, m in enumerate(m for m in rest if m.name == "Dense")}
    widths = [plain.config.hidden_size, *(weight.shape[0] for weight in weights.values())]
    config = EncoderConfig(
        BackboneConfig(text=text_fields(plain.config)),
        embedding_dim=widths[-1],
        prefixes=(widths[-1],),
        hidden_dim=widths[1] if len(widths) == 3 else None,
        pooling=_pooling(folder, rest[0]),
        projection=len(widths) > 1,
    )
    encoder = Embedder(config, load_pretrained=False).eval()
    weights |= {f"backbone.text.{name}": weight for name, weight in plain.state_dict().items()}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} are not those of its modules: {' '.join(str(error).split())[:300]}"
        ) from error
    _require_same_states(folder, encoder, processor, plain)
    if prompts := provenance_of(folder)["prompts"]:
        print(f"{folder} was trained with prompts, which tasks and benchmarks must give: {json.dumps(prompts)}")
    return encoder.train(), processor


def provenance_of(folder: str | Path) -> dict[str, Any]:
    """Where a folder lies, the prompts that it was trained with, and the SHA-256 of its weights (of all files' if several)."""
    folder = Path(folder)
    told = read_settings(folder / "config_sentence_transformers.json")
    digests = {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*.safetensors"))}
    together = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return {
        "stage": "sentence-transformers",
        "path": str(folder),
        "prompts": {name: prompt for name, prompt in (told.get("prompts") or {}).items() if prompt},
        "similarity": told.get("similarity_fn_name"),
        "sha256": next(iter(digests.values())) if len(digests) == 1 else hashlib.sha256(together.encode()).hexdigest(),
    }


def _text_model(folder: Path) -> Any:
    """The text model as transformers makes it, in fp32, without the pooler of BERT's families."""
    try:
        model, info = AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a family or a file that transformers cannot read
        raise ValueError(
            f"transformers cannot load the text model in {folder}: {' '.join(str(error).split())[:300]}"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise ValueError(f"the text model in {folder} lacks {len(missing)} weights, among them {', '.join(missing[:3])}")
    if not hasattr(model.config, "hidden_size") or model.config.is_encoder_decoder:
        refuse(folder, f"a {type(model).__name__}, which is no encoder of text alone")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval()


def _require_known(folder: Path, modules: list[Module]) -> None:
    """Refuse what lies behind the text model unless it is a pooling, at most two Dense layers, and perhaps Normalize."""
    names = [module.name for module in modules]
    expected = ["Pooling", *["Dense"] * min(2, names.count("Dense"))]
    if names not in (expected, [*expected, "Normalize"]):
        refuse(folder, f"the modules {', '.join(names) or 'none'} behind its text model")
    for module in modules:
        for place in ("module_input_name", "module_output_name"):
            if (module.settings.get(place) or "sentence_embedding") != "sentence_embedding":
                refuse(folder, f"a {module.name} of {module.settings[place]}")


def _pooling(folder: Path, module: Module) -> PoolingName:
    settings = module.settings
    named = settings.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if settings.get(flag)] or "mean"
    modes = [named] if isinstance(named, str) else named
    if len(modes) != 1 or modes[0] not in POOLINGS:
        refuse(folder, f"the pooling {' and '.join(map(str, modes))}")
    if not settings.get("include_prompt", True):
        refuse(folder, "a pooling that leaves its prompts out (include_prompt)")
    return POOLINGS[modes[0]]


def _dense_weight(folder: Path, module: Module) -> Tensor:
    """The matrix (out, in) of a Dense layer that is nothing but a matrix."""
    told = {"bias": True, "activation_function": "Tanh", "use_residual": False, **module.settings}  # its own defaults
    activation = str(told["activation_function"]).rpartition(".")[2]
    if told["bias"] or told["use_residual"] or activation != "Identity":
        more = f"bias {told['bias']}, activation {activation}, residual {told['use_residual']}"
        refuse(folder, f"the Dense layer {module.folder.name} with {more}")
    try:
        with safe_open(module.folder / "model.safetensors", framework="pt") as file:
            return file.get_tensor("linear.weight").float()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of the Dense layer {module.folder} cannot be read from safetensors ({error})") from error


@torch.no_grad()
def _require_same_states(folder: Path, encoder: Embedder, processor: Processor, plain: Any) -> None:
    """Refuse a text model that sees other tokens here than in transformers: a causal one, or one with other positions."""
    config = plain.config
    window = max(getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention"))
    words = [" ".join(map(str, range(length))) for length in (3, 32 + 2 * window)]
    inputs = processor([Item((Part("text", text, content=text),)) for text in words])
    states = encoder.backbone(inputs, packed=encoder.packed).split(inputs.lengths.tolist())
    ids = inputs.token_ids.split(inputs.lengths.tolist())
    expected = [plain(input_ids=row[None]).last_hidden_state[0] for row in ids]
    off = max(
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max().item() for a, b in zip(states, expected, strict=True)
    )
    if not off < TOLERANCE:
        refuse(folder, f"a {type(plain).__name__} whose token states are others without a causal mask (by {off:.1e})")
