"""An encoder as a sentence-transformers folder: of stock modules where these give its vectors, else with a module file of ours.

stock     text model, pooling, Dense layers, Normalize; no code, loads anywhere
portable  an encoder's folder of ours, `polyphony.py` that reads it without this project, Normalize; trust_remote_code=True
"""

import ast
import copy
import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.native import DualProcessor
from datamodules.processors.processor import Processor
from datamodules.sample import Item, Part
from lightning_modules.encoder.checkpoint import save_encoder
from lightning_modules.encoder.composed import ComposedBackbone
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.native import media_of
from lightning_modules.encoder.sentence_transformers import POOLINGS
from lightning_modules.model_card import place

MODULE = "polyphony"  # the module file's name
HERE = Path(__file__).parent / "encoder"
NAMES = {ours: theirs for theirs, ours in POOLINGS.items()}
TOLERANCE = 1e-4  # of a token's state, both of unit length, in fp32; as in encoder/sentence_transformers.py
MOST_TOKENS = 2048  # of a text that is compared: our choice
TEXTS = ("a", "the cat sat on 12 mats", "  Two  spaces,\ta tab\nand a line \n", "Ünïcödé ｆｕｌｌ 日本語 🙂 e\u0301 \u200b x")
TEXTS += ("def f(x):\n    return x**2 + 1234567.89", "https://example.org/?a=b&c=d#e")


class Stock(NamedTuple):
    """What a stock folder is written from: the text model as transformers has it, and a tokenizer that adds what ours adds."""

    text: Any
    tokenizer: PreTrainedTokenizerFast


def stock_of(encoder: Embedder, processor: Processor) -> Stock | str:
    """The parts of a stock folder, or why stock modules would give other vectors."""
    backbone = encoder.backbone
    if not isinstance(backbone, ComposedBackbone) or not isinstance(processor, ComposedProcessor):
        return "the model takes media by its own processor"
    if kinds := media_of(backbone, processor):
        return f"it takes {', '.join(kinds)} through towers"
    if encoder.config.pooling not in NAMES:
        return f"there is no stock pooling by {encoder.config.pooling}"
    text, tokenizer, texts = _text_of(backbone), _tokenizer_of(processor), texts_of(processor)
    with tempfile.TemporaryDirectory() as beside:  # transformers makes another tokenizer of the same file for some families
        text.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        read: Any = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
    for words in texts:
        expected, found = _ids(processor, words), read(words, truncation=True)["input_ids"]
        if expected != found:
            return f"its tokenizer as transformers reads it makes {_few(found)} of {words[:30]!r}, not {_few(expected)}"
    off = _difference(encoder, processor, text, read, texts)
    if not off < TOLERANCE:
        return f"{type(text).__name__} as transformers reads it has other token states, by {off:.1e}"
    return Stock(text, tokenizer)


def texts_of(processor: Processor) -> list[str]:
    """Texts of many lengths, to the limit and beyond, with special tokens spelled in them."""
    longest = processor.config.max_text_tokens
    special = " ".join(map(str, processor.tokenizer.all_special_tokens[:4]))
    texts = [*TEXTS, special, f"between {special} words", "word " * (min(longest, MOST_TOKENS) // 2)]
    texts += [" ".join(map(str, range(longest + 9)))] if longest <= MOST_TOKENS else []
    texts += [""] if processor.first_ids or processor.last_ids else []
    if processor.config.too_long == "truncate":
        return texts
    return [text for text, ids in zip(texts, processor.tokens(texts), strict=True) if len(ids) <= longest]


def _few(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:9]))}{', ..' if len(ids) > 9 else ''}]"


def _text_of(backbone: ComposedBackbone) -> Any:
    """A text model of transformers' own attention with the same weights and configuration (`is_causal` is false in it)."""
    config = backbone.text.config
    plain = AutoModel.from_config(type(config).from_dict(config.to_dict()), dtype=torch.float32, trust_remote_code=False)
    weights = dict(backbone.text.state_dict())
    for name, weight in plain.state_dict().items():
        if name.startswith("pooler."):  # BERT's, which nothing reads; without it transformers would warn and draw one
            weights[name] = torch.zeros_like(weight)
    plain.load_state_dict(weights, assign=True)  # shared: a model may be large
    return plain.eval()


def _tokenizer_of(processor: Processor) -> PreTrainedTokenizerFast:
    """The tokenizer with our begin and end, our limit, and special tokens that are text where a text spells them."""
    own: Any = processor.tokenizer
    backend = copy.deepcopy(own.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    names = {own.convert_ids_to_tokens(i): i for i in (*processor.first_ids, *processor.last_ids)}
    template = [*(own.convert_ids_to_tokens(i) for i in processor.first_ids), "$A"]
    template += [own.convert_ids_to_tokens(i) for i in processor.last_ids]
    if backend.encode("a").ids != [
        *processor.first_ids,
        *backend.encode("a", add_special_tokens=False).ids,
        *processor.last_ids,
    ]:
        backend.post_processor = TemplateProcessing(single=template, pair=[*template, "$B"], special_tokens=list(names.items()))
    settings = dict(own.special_tokens_map)
    settings.setdefault("pad_token", own.eos_token or own.sep_token or own.convert_ids_to_tokens(0))
    longest = processor.config.max_text_tokens + len(processor.first_ids) + len(processor.last_ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=longest,
        padding_side="right",
        truncation_side="right",
        model_input_names=list(own.model_input_names),
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **settings,
    )
    return tokenizer


@torch.no_grad()
def _difference(encoder: Embedder, processor: Processor, text: Any, tokenizer: Any, texts: list[str]) -> float:
    """By how much token states differ, of texts alone and padded; one reaches beyond every window."""
    window = max(getattr(text.config, name, None) or 0 for name in ("sliding_window", "local_attention"))
    texts = [*texts, " ".join(map(str, range(min(processor.config.max_text_tokens, 32 + 2 * window))))]
    inputs = processor([_item(one) for one in texts])
    ours = encoder.backbone(inputs, packed=encoder.packed).split(inputs.lengths.tolist())
    off = 0.0
    for start in range(0, len(texts), 4):
        batch = tokenizer(texts[start : start + 4], padding=True, truncation=True, return_tensors="pt")
        padded = text(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        for row, ids, expected in zip(padded, batch["input_ids"], ours[start : start + 4], strict=True):
            alone = text(input_ids=ids[None, : len(expected)]).last_hidden_state[0]
            for states in (row[: len(expected)], alone):
                off = max(off, (F.normalize(states, dim=-1) - F.normalize(expected, dim=-1)).abs().max().item())
    return off


def _item(words: str) -> Item:
    return Item((Part("text", words, content=words),))


def _ids(processor: Processor, words: str) -> list[int]:
    return processor([_item(words)]).token_ids.tolist()


def write_stock(folder: Path, stock: Stock, encoder: Embedder, prompts: Mapping[str, str], truncate_dim: int | None) -> None:
    """A folder of stock modules, as sentence-transformers writes them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        stock.text.save_pretrained(beside)
        stock.tokenizer.save_pretrained(beside)
        modules: list[nn.Module] = [Transformer(beside, max_seq_length=stock.tokenizer.model_max_length)]
        name: Any = NAMES[encoder.config.pooling]
        modules.append(Pooling(encoder.backbone.width, name))
        for layer in encoder.projection if isinstance(encoder.projection, nn.Sequential) else ():
            assert isinstance(layer, nn.Linear)
            sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": False}
            modules.append(Dense(**sizes, activation_function=nn.Identity(), init_weight=layer.weight.detach().clone()))
        model = SentenceTransformer(modules=[*modules, Normalize()], device="cpu", local_files_only=True)
        model.save_pretrained(str(folder), create_model_card=False)
    is_decoder = any(getattr(module, "is_causal", False) for module in stock.text.modules())
    _describe(folder, prompts, truncate_dim, {"transformers"} if is_decoder else set())


def write_portable(
    folder: Path,
    encoder: Embedder,
    processor: Processor,
    provenance: Mapping[str, Any],
    prompts: Mapping[str, str],
    truncate_dim: int | None,
) -> None:
    """An encoder's folder of ours with the module file that sentence-transformers reads it by."""
    composed = isinstance(encoder.backbone, ComposedBackbone)
    name = "composed" if composed else "native"
    kind = "Composed" if composed else "Dual" if isinstance(processor, DualProcessor) else "Native"
    save_encoder(folder, encoder, processor, provenance=provenance)
    _forget_places(folder)
    (folder / f"{MODULE}.py").write_text(module_file(name), encoding="utf-8")
    (folder / "1_Normalize").mkdir()
    (folder / "1_Normalize" / "config.json").write_text("{}")
    stock = "sentence_transformers.base.modules.normalize.Normalize"
    types = ((f"{MODULE}.{kind}Encoder", ""), (stock, "1_Normalize"))
    modules = [{"idx": n, "name": str(n), "path": path, "type": type_} for n, (type_, path) in enumerate(types)]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    _describe(
        folder, prompts, truncate_dim, {"transformers", *(("timm",) if composed and encoder.config.backbone.towers else ())}
    )


def module_file(name: str) -> str:
    """The source of the module file: `portable.py` and the part for a kind of backbone, which imports it here, as one."""
    part = (HERE / f"portable_{name}.py").read_text(encoding="utf-8")
    first, *nodes = ast.parse(part).body  # its docstring
    left_out = [
        first,
        *(n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("lightning_modules")),
    ]
    lines = part.splitlines(keepends=True)
    for node in left_out:
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return (HERE / "portable.py").read_text(encoding="utf-8") + "\n\n" + "".join(lines).strip() + "\n"


def _forget_places(folder: Path) -> None:
    """Take out where on this machine a model, a processor or a tokenizer once lay."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(one) for name, one in value.items() if name != "_name_or_path"}
        return value

    for name in ("encoder.json", "processor.json"):
        told = without(json.loads((folder / name).read_text()))
        told |= {key: place(told[key]) for key in ("native", "tokenizer") if isinstance(told.get(key), str)}
        (folder / name).write_text(json.dumps(told, indent=1))


def _describe(folder: Path, prompts: Mapping[str, str], truncate_dim: int | None, needs: set[str]) -> None:
    """config_sentence_transformers.json; what is needed is at least of the version that the folder was checked with."""
    file = folder / "config_sentence_transformers.json"
    told: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"model_type": "SentenceTransformer"}
    versions = {name: importlib.metadata.version(name) for name in ("sentence-transformers", "transformers", "torch", "timm")}
    names = {"sentence-transformers": "sentence_transformers", "transformers": "transformers", "torch": "pytorch"}
    told |= {"__version__": {theirs: versions[name] for name, theirs in names.items()}}
    told |= {
        "prompts": dict(prompts),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "truncate_dim": truncate_dim,
    }
    reasons = {"transformers": "older ones may lay a causal mask over it", "timm": "older ones may build other towers"}
    told["requirements"] = {name: {"specifier": f">={versions[name]}", "reason": reasons[name]} for name in sorted(needs)}
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False))


def as_float32(encoder: Embedder) -> Embedder:
    """The encoder in fp32 and with the attention that transformers chooses, also in what it says of itself."""
    encoder.backbone.config = dataclasses.replace(encoder.backbone.config, dtype="float32", attention=None)
    return encoder.float().cpu().eval()
