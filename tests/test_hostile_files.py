"""Promises to whoever is handed a file that is no medium: it is read, or refused in a sentence; no code runs, nothing explodes.

JSON records, the tables of an index, a run's checkpoints and encoders' folders, all made here by a fresh process that forks
for each, so that growth is exact. Tars are tested in test_tar.py and test_changed_splits.py, media in test_hostile_media.py.
"""

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import TEXTS, TINY_TEXT, TINY_VIT, pairs

from datamodules.processors.composed import ComposedProcessor
from datamodules.processors.processor import ProcessorConfig
from datamodules.processors.tokenizer import train_tokenizer
from datamodules.record import from_record
from datamodules.shards import Split, write_split
from lightning_modules.checkpoints import MAGIC, VerifiedCheckpointIO
from lightning_modules.encoder.backbone import BackboneConfig
from lightning_modules.encoder.checkpoint import load_encoder, save_encoder
from lightning_modules.encoder.embedder import Embedder, EncoderConfig
from lightning_modules.encoder.towers import TowerConfig

MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 5.0, 512 * 2**20, 5000
READ = "is read"
MARKER = Path("/tmp/polyphony-hostile-file-ran-code")


class Evil:
    """Unpickled, it leaves a mark."""

    def __reduce__(self):
        return Path.touch, (MARKER,)


@dataclass(frozen=True)
class Case:
    """A hostile file: `make` writes it into a folder that holds what is usual, `read` is given the folder."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    expected: str


def record(data: bytes | str, expected: str) -> Case:
    """A sample's JSON."""
    data = data if isinstance(data, bytes) else data.encode()

    def read(folder: Path) -> object:
        return from_record("k", {"json": (folder / "k.json").read_bytes(), "query.0.png": b"png"})

    return Case(lambda folder: (folder / "k.json").write_bytes(data), read, expected)


def fields(expected: str, **values: Any) -> Case:
    """A record whole but for some fields."""
    return record(json.dumps({"query": {"parts": [{"kind": "text", "text": "a"}]}, **values}), expected)


def part(expected: str, **values: Any) -> Case:
    return fields(expected, query={"parts": [values]})


WRONG = "is of type .*, which it must not be"
RECORDS = {
    "nested lists": record("[" * 10**5, "nested too deeply"),
    "nested objects": record('{"a":' * 10**5, "nested too deeply"),
    "nested in meta": record('{"query": {}, "meta": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}", "nested too deeply"),
    "more than 16 MiB": record(b'{"query": "' + b"a" * 2**24 + b'"}', "a JSON file of 16777229 bytes is larger than"),
    "16 MiB of objects": record(b"[" + b'{"":0},' * (2**24 // 7 - 1) + b"1]", "the record is of type list"),
    "NaN": record('{"score": NaN}', "holds NaN, which is no number"),
    "infinity": record('{"score": -Infinity}', "holds -Infinity, which is no number"),
    "an integer of 10^5 digits": record('{"score": ' + "9" * 10**5 + "}", "digits"),
    "1e999": record('{"query": {"parts": [{"kind": "text", "text": "a"}]}, "score": 1e999}', "no number"),
    "a surrogate": part("surrogate|UTF-8", kind="text", text="\ud800"),
    "a score of 4000 digits": fields("score", score=10**4000),
    "a field of 10 MB": fields("unknown field", **{"a" * 10**7: 1}),
    "a file of 10 MB": part("has no file", kind="image", file="a" * 10**7),
    "UTF-16": record("{}".encode("utf-16"), "utf-8"),
    "a byte order mark": record(b"\xef\xbb\xbf{}", "Expecting value"),
    "Latin-1": record(b'{"label": "\xfc"}', "utf-8"),
    "a surrogate in UTF-8": record(b'{"label": "\xed\xa0\x80"}', "utf-8"),
    "nothing": record("", "Expecting value"),
    "two values": record("{} {}", "Extra data"),
    "a control character": record('{"label": "\x00"}', "Invalid control character"),
    "a pickle": record(b"\x80\x04cposix\nsystem\n(S'true'\ntR.", "utf-8"),
    "a key twice": record('{"query": 1, "query": {"parts": [{"kind": "text", "text": "a"}]}}', READ),
    "a list": record("[]", WRONG),
    "a number": record("1e5", WRONG),
    "null": record("null", WRONG),
    "no query and no target": record("{}", "neither a query nor a target"),
    "an unknown field": fields("unknown field 'smell'", smell=1),
    "a query of text": fields(WRONG, query="a"),
    "parts of objects": fields(WRONG, query={"parts": {}}),
    "no parts": fields("at least one part", query={"parts": []}),
    "a part of text": fields(WRONG, query={"parts": ["a"]}),
    "a title of numbers": fields(WRONG, query={"parts": [{"kind": "text", "text": "a"}], "title": 5}),
    "a target of truth": fields(WRONG, target=True),
    "negatives of objects": fields(WRONG, negatives={"a": 1}),
    "a negative of text": fields(WRONG, negatives=["a"]),
    "a label of numbers": fields(WRONG, label=5),
    "a score of text": fields(WRONG, score="1.0"),
    "a score of truth": fields(WRONG, score=True),
    "relevant of lists": fields(WRONG, relevant=["a"]),
    "a grade of text": fields("a grade in `relevant`", relevant={"a": "b"}),
    "a grade of truth": fields("a grade in `relevant`", relevant={"a": True}),
    "meta of lists": fields(WRONG, meta=[]),
    "text of numbers": part(WRONG, kind="text", text=5),
    "text of nothing": part(WRONG, kind="text"),
    "a kind of lists": part(WRONG, kind=["text"], text="a"),
    "a kind of objects": part(WRONG, kind={}, file="query.0.png"),
    "an unknown kind": part("unknown kind of content 'smell'", kind="smell", file="query.0.png"),
    "a file of numbers": part(WRONG, kind="image", file=0),
    "a file outside": part("has no file '../../etc/passwd'", kind="image", file="../../etc/passwd"),
    "a file at the root": part("has no file '/etc/passwd'", kind="image", file="/etc/passwd"),
    "a file that is a command": part("has no file 'pipe:ls'", kind="image", file="pipe:ls"),
}


def table(name: str, data: bytes | Callable[[np.ndarray], np.ndarray], expected: str) -> Case:
    """A table of an index, with the manifest's size and hash made right: someone else may have written both."""

    def make(folder: Path) -> None:
        path = folder / "split" / name
        new = data if isinstance(data, bytes) else saved(data(np.load(path, allow_pickle=False)))
        path.write_bytes(new)
        manifest = json.loads((folder / "split" / "manifest.json").read_text())
        manifest["tables"][name] = {"bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
        (folder / "split" / "manifest.json").write_text(json.dumps(manifest))

    def read(folder: Path) -> object:
        split = Split(folder / "split")
        return [split.read(position) for position in range(len(split))]

    return Case(make, read, expected)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_value(column: str, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(table: np.ndarray) -> np.ndarray:
        table[column][2] = value
        return table

    return change


def npy(header: str, data: bytes = b"") -> bytes:
    """A table whose header is any text."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


def shaped(shape: str, descr: str = "[('key', 'S4')]", order: bool = False) -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}", bytes(400))


UNREADABLE, OTHER = "the tables of .* cannot be read", "have other columns than this version reads"
EXAMPLES, MEMBERS = "examples.npy", "members.npy"
TABLES = {
    "objects": table(EXAMPLES, lambda t: np.array([Evil()] * len(t), object), UNREADABLE),
    "objects in a field": table(MEMBERS, lambda t: np.array([(1, Evil())], [("a", "i4"), ("b", "O")]), UNREADABLE),
    "a pickle for a table": table(EXAMPLES, b"\x80\x04cposix\nsystem\n(S'true'\ntR.", UNREADABLE),
    "an empty table": table(EXAMPLES, b"", UNREADABLE),
    "text for a table": table(MEMBERS, b"field,offset,size\n", UNREADABLE),
    "version 9": table(EXAMPLES, b"\x93NUMPY\x09\0" + bytes(100), UNREADABLE),
    "a header of 4 GiB": table(EXAMPLES, b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + b"{", UNREADABLE),
    "a header of 60 kB": table(EXAMPLES, npy(" " * 60_000 + "{}"), UNREADABLE),
    "a header of lists": table(EXAMPLES, npy("[" * 90 + "]" * 90), UNREADABLE),
    "a header of sums": table(EXAMPLES, npy("1+" * 2000 + "1"), UNREADABLE),
    "a header that calls": table(EXAMPLES, npy("{'descr': open('/etc/passwd')}"), UNREADABLE),
    "2^60 rows": table(EXAMPLES, shaped(f"({2**60},)"), UNREADABLE),
    "a number of rows of 3000 digits": table(EXAMPLES, shaped(f"({'9' * 3000},)"), UNREADABLE),
    "a header of minus signs": table(EXAMPLES, npy("-" * 9000 + "1"), UNREADABLE),
    "a header of parentheses": table(EXAMPLES, npy("(" * 150), UNREADABLE),
    "a header without end": table(EXAMPLES, npy("{'descr':'''"), UNREADABLE),
    "a zip for a table": table(EXAMPLES, b"PK\x03\x04" + bytes(100), UNREADABLE),
    "one row alone": table(EXAMPLES, lambda t: t[0:1].reshape(()), OTHER),
    "one member alone": table(MEMBERS, lambda t: t[0:1].reshape(()), OTHER),
    "no columns": table(EXAMPLES, lambda t: np.zeros(len(t), []), OTHER),
    "rows on their side": table(EXAMPLES, lambda t: t[:, None], "index|tables"),
    "members in a table": table(MEMBERS, lambda t: t[None], "index|tables"),
    "a member of 2^60 bytes": table(MEMBERS, with_value("size", 2**60), "index|damaged"),
    "a member of 2^35 bytes": table(MEMBERS, with_value("size", 2**35), "index|damaged"),
    "a member of -1 bytes": table(MEMBERS, with_value("size", -1), "index|damaged"),
    "a member before the file": table(MEMBERS, with_value("offset", -1), "index|damaged"),
    "a field that is none": table(MEMBERS, with_value("field", 9), "index|damaged"),
    "a key that is no text": table(EXAMPLES, with_value("key", b"\xff"), "index|damaged"),
    "-5 rows": table(EXAMPLES, shaped("(-5,)"), UNREADABLE),
    "0 rows": table(EXAMPLES, shaped("(0,)"), f"{UNREADABLE}|{OTHER}|do not add up"),
    "rows of lists": table(EXAMPLES, shaped("([1], 2)"), UNREADABLE),
    "rows of 10^11 bytes": table(EXAMPLES, shaped("(5,)", "'S99999999999'"), UNREADABLE),
    "a type that is none": table(EXAMPLES, shaped("(5,)", "[1, 2]"), UNREADABLE),
    "other columns": table(EXAMPLES, shaped("(5,)"), OTHER),
    "floats": table(MEMBERS, lambda t: np.zeros(len(t)), OTHER),
    "big-endian": table(MEMBERS, lambda t: t.astype(t.dtype.newbyteorder(">")), OTHER),
    "keys of numbers": table(EXAMPLES, lambda t: np.zeros(len(t), [("key", "<i8"), *t.dtype.descr[1:]]), OTHER),
    "a table within a table": table(EXAMPLES, lambda t: t[None], "do not add up|other columns"),
    "a row missing": table(EXAMPLES, lambda t: t[:-1], "do not add up|other columns"),
    "columns in Fortran's order": table(EXAMPLES, lambda t: np.asfortranarray(np.stack([t, t])), "do not add up|other columns"),
    "members missing": table(MEMBERS, lambda t: t[:5], "has no file|is damaged"),
    "members reversed": table(MEMBERS, lambda t: t[::-1].copy(), "is damaged"),
}


def checkpoint(data: bytes | Callable[[], bytes], expected: str, *, trailer: bool = True) -> Case:
    """A run's checkpoint, with a trailer whose hash is right."""

    def make(folder: Path) -> None:
        content = data if isinstance(data, bytes) else data()
        (folder / "c.ckpt").write_bytes(content + (MAGIC + hashlib.sha256(content).digest() if trailer else b""))

    return Case(make, lambda folder: VerifiedCheckpointIO().load_checkpoint(folder / "c.ckpt", weights_only=False), expected)


def torch_saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zipped(edit: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint of torch whose files are changed, by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_saved({"w": torch.zeros(10)}))) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return out.getvalue()


def of_opcodes(opcodes: bytes) -> Callable[[], bytes]:
    """A checkpoint of such pickle."""
    return lambda: zipped(lambda name, data: b"\x80\x02" + opcodes if name.endswith("data.pkl") else data)


def old_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R."
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def bomb(end: str) -> Callable[[], bytes]:
    """A GiB of zeros, deflated to a MiB, for one of a checkpoint's files."""
    return lambda: zipped(lambda name, data: bytes(2**30) if name.endswith(end) else data, zipfile.ZIP_DEFLATED)


NOT_READ = "c.ckpt cannot be read"
CHECKPOINTS = {
    "code": checkpoint(lambda: torch_saved({"x": Evil()}), NOT_READ),
    "code in the old format": checkpoint(lambda: torch_saved(Evil(), _use_new_zipfile_serialization=False), NOT_READ),
    "a whole model": checkpoint(lambda: torch_saved(torch.nn.Linear(1, 1)), NOT_READ),
    "the tar format": checkpoint(old_tar, NOT_READ),
    "a shell": checkpoint(of_opcodes(b"cposix\nsystem\nX\x04\0\0\0true\x85R."), NOT_READ),
    "an attribute of an attribute": checkpoint(of_opcodes(b"ctorch\nserialization.os.system\n."), NOT_READ),
    "an extension code": checkpoint(of_opcodes(b"\x82\x01."), NOT_READ),
    "10^5 marks": checkpoint(of_opcodes(b"(" * 10**5 + b"."), NOT_READ),
    "a length of 2^31": checkpoint(of_opcodes(b"X\xff\xff\xff\x7fa."), NOT_READ),
    "no pickle in the zip": checkpoint(lambda: zipped(lambda name, data: b""), NOT_READ),
    "a zip of other files": checkpoint(b"PK\x05\x06" + bytes(18), NOT_READ),
    "a zip bomb of weights": checkpoint(bomb("data/0"), NOT_READ),
    "a zip bomb of pickle": checkpoint(bomb("data.pkl"), NOT_READ),
    "2 GiB of one call": checkpoint(of_opcodes(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."), NOT_READ),
    "a number": checkpoint(of_opcodes(b"K\x01."), NOT_READ),
    "noise": checkpoint(bytes(range(256)) * 4, NOT_READ),
    "nothing but a trailer": checkpoint(b"", NOT_READ),
    "text": checkpoint(b"hello", NOT_READ),
    "an empty file": checkpoint(b"", "it is too short", trailer=False),
    "no trailer": checkpoint(lambda: torch_saved({"x": Evil()}), "it has no trailer", trailer=False),
    "a trailer of zeros": checkpoint(MAGIC + bytes(32), "are not those that were written", trailer=False),
}


def encoder(expected: str, edit: Callable[[dict[str, Any]], object] | None = None, **files: bytes | str) -> Case:
    """An encoder's folder with `encoder.json` edited, or files replaced: bytes are content, text is where a link leads."""
    names = {"described": "encoder.json", "weights": "model.safetensors", "processor": "processor.json"}
    names |= {"tokenizer": "tokenizer.json", "tokenizer_config": "tokenizer_config.json"}

    def make(folder: Path) -> None:
        described = json.loads((folder / "encoder" / "encoder.json").read_text())
        for name, content in files.items():
            path = folder / "encoder" / names[name]
            path.unlink()
            if isinstance(content, str):
                path.symlink_to(content)
            else:
                path.write_bytes(content)
                described["sha256"] = hashlib.sha256(content).hexdigest() if name == "weights" else described["sha256"]
        if edit is not None:
            edit(described)
        if "described" not in files:
            (folder / "encoder" / "encoder.json").write_text(json.dumps(described))

    return Case(make, lambda folder: load_encoder(folder / "encoder"), expected)


def tower(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda described: described["config"]["backbone"]["towers"]["picture"].update(values)


def text_model(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda described: described["config"]["backbone"].update(text=values)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


OWN_CODE = f"from pathlib import Path\nPath({str(MARKER)!r}).touch()\n"


def own_code(folder: Path) -> None:
    """An encoder whose text model is a folder with code, which transformers offers to run: standard input says yes."""
    (folder / "model").mkdir()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "evil.py").write_text(
        OWN_CODE + "from transformers import PretrainedConfig\nclass Evil(PretrainedConfig): ..."
    )
    edit = {"text": None, "pretrained": str(folder / "model")}
    encoder(".", lambda described: described["config"]["backbone"].update(edit)).make(folder)


def own_tokenizer(folder: Path) -> None:
    path = folder / "encoder" / "tokenizer_config.json"
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "encoder" / "evil.py").write_text(OWN_CODE + "class Evil: ...")


EVIL_WEIGHTS = {"embed_dim": 24, "depth": 1, "num_heads": 2, "checkpoint_path": "/tmp/polyphony-hostile.pth"}
DAMAGED, CHANGED = "encoder.json is damaged", "model.safetensors is missing or was changed"
NO_PROCESSOR = "the processor in .*encoder cannot be read"
ENCODERS = {
    "nothing hostile": encoder(READ),
    "encoder.json empty": encoder(DAMAGED, described=b""),
    "encoder.json in UTF-16": encoder(DAMAGED, described="{}".encode("utf-16")),
    "encoder.json with a mark": encoder(DAMAGED, described=b"\xef\xbb\xbf{}"),
    "encoder.json of nothing": encoder("encoder.json is damaged", described=b"{}"),
    "encoder.json of NaN": encoder("encoder.json is damaged", described=b'{"format": NaN}'),
    "encoder.json of 20 MB": encoder("encoder.json is damaged", described=b" " * 20_000_000 + b"{}"),
    "encoder.json a device": encoder("encoder.json is missing", described="/dev/zero"),
    "weights a device": encoder(CHANGED, weights="/dev/zero"),
    "weights elsewhere": encoder(CHANGED, weights="/etc/passwd"),
    "other weights": encoder(
        "is of another shape", weights=safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    ),
    "2^62 times nothing": encoder(
        "is of another shape", weights=safetensors({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}})
    ),
    "weights with code": encoder("tower arguments hold checkpoint_path", tower(arguments=EVIL_WEIGHTS)),
    "an unknown tower": encoder("timm cannot build the tower", tower(model="os.system")),
    "an unknown text model": encoder("backbone.text is", text_model(model_type="evil")),
    "a text model of lists": encoder("backbone.text is", text_model(model_type=[1])),
    "a text model of its own code": encoder("has no auto_map", text_model(model_type="qwen3", auto_map={"AutoModel": "e.E"})),
}

ENCODERS |= {
    "encoder.json nested": encoder(DAMAGED, described=b"[" * 10**5),
    "encoder.json a list": encoder("encoder.json", described=b"[]"),
    "encoder.json null": encoder("encoder.json", described=b"null"),
    "no config": encoder("encoder.json", lambda d: d.pop("config")),
    "no hash": encoder("encoder.json", lambda d: d.pop("sha256")),
    "a config of lists": encoder("encoder.json", lambda d: d.update(config=[])),
    "unknown values": encoder("encoder.json", lambda d: d["config"]["backbone"].update(smell=1)),
    "prefixes of text": encoder(DAMAGED, lambda d: d["config"].update(prefixes="abc")),
    "a width of text": encoder("embedding|encoder.json", lambda d: d["config"].update(embedding_dim="abc")),
    "a tower of numbers": encoder(DAMAGED, tower(model=5)),
    "a view of 10^6 rows": encoder("tower|view|shape", tower(height=10**6)),
    "a tower of the hub": encoder("tower", tower(model="hf_hub:evil/x")),
    "a width of 10^8": encoder("shape", lambda d: d["config"].update(embedding_dim=10**8, prefixes=[10**8])),
    "20 million words": encoder("shape", text_model(**{**TINY_TEXT, "vocab_size": 20_000_000})),
    "3000 layers": encoder("shape", text_model(**{**TINY_TEXT, "num_hidden_layers": 3000})),
    "a pretrained model of its own code": Case(own_code, lambda f: load_encoder(f / "encoder"), "."),
    "a tokenizer of its own code": Case(own_tokenizer, lambda f: load_encoder(f / "encoder"), "tokenizer|custom code"),
    "processor.json nested": encoder(NO_PROCESSOR, processor=b"[" * 10**5),
    "processor.json a list": encoder(NO_PROCESSOR, processor=b"[]"),
    "processor.json null": encoder(NO_PROCESSOR, processor=b"null"),
    "processor.json empty": encoder(NO_PROCESSOR, processor=b""),
    "processor.json of nothing": encoder(NO_PROCESSOR, processor=b"{}"),
    "processor.json unknown": encoder(NO_PROCESSOR, processor=b'{"smell": 1, "decode": {}, "page_grid": [1, 1]}'),
    "processor.json a device": encoder(NO_PROCESSOR, processor="/dev/zero"),
    "tokenizer.json nested": encoder(NO_PROCESSOR, tokenizer=b"[" * 10**5),
    "tokenizer.json nested objects": encoder(NO_PROCESSOR, tokenizer=b'{"a":' * 10**5),
    "tokenizer.json a list": encoder(NO_PROCESSOR, tokenizer=b"[]"),
    "tokenizer.json empty": encoder(NO_PROCESSOR, tokenizer=b""),
    "tokenizer.json of nothing": encoder(NO_PROCESSOR, tokenizer=b"{}"),
    "tokenizer_config.json nested": encoder(NO_PROCESSOR, tokenizer_config=b'{"a":' * 10**5),
    "tokenizer_config.json a list": encoder(NO_PROCESSOR, tokenizer_config=b"[]"),
    "weights empty": encoder("model.safetensors", weights=b""),
    "a header of 2^60 bytes": encoder("model.safetensors", weights=safetensors(b"{}", length=2**60)),
    "a header of 90 MB": encoder("model.safetensors", weights=safetensors(b'{"a":"' + b" " * 90_000_000)),
    "a nested header": encoder("model.safetensors", weights=safetensors(b"[" * 10**5)),
    "2^80 weights": encoder(
        "model.safetensors",
        weights=safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)),
    ),
    "weights of pickle": encoder("model.safetensors", weights=b"\x80\x04cposix\nsystem\n(S'true'\ntR."),
}

CASES = {
    **{f"JSON: {name}": case for name, case in RECORDS.items()},
    **{f"npy: {name}": case for name, case in TABLES.items()},
    **{f"checkpoint: {name}": case for name, case in CHECKPOINTS.items()},
    **{f"encoder: {name}": case for name, case in ENCODERS.items()},
}


def usual(folder: Path) -> None:
    """What a case finds in its folder: a split, an encoder."""
    write_split(folder / "split", pairs(5))
    picture = TowerConfig(arguments=dict(TINY_VIT), stem="conv")
    backbone = BackboneConfig(text=dict(TINY_TEXT), towers={"picture": picture}, routes={"image": "picture"})
    processor = ComposedProcessor(ProcessorConfig(vocab_size=300), train_tokenizer(TEXTS, 300))
    save_encoder(folder / "encoder", Embedder(EncoderConfig(backbone, 16, (4, 16))), processor, provenance={})


def report_all(folder: Path) -> None:
    """What the fresh process does: each case in a fork of its own, whose standard input says yes to any question."""
    torch.set_num_threads(1)
    usual(folder / "usual")
    torch.save({"state_dict": {"x": Evil()}}, EVIL_WEIGHTS["checkpoint_path"])
    outcomes = {}
    for number, (name, case) in enumerate(CASES.items()):
        own = folder / str(number)
        shutil.copytree(folder / "usual", own)
        case.make(own)
        (folder / "yes").write_text("y\n" * 100)
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(30)
            os.dup2(os.open(folder / "yes", os.O_RDONLY), 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.write(writer, json.dumps(report(case, own)).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            outcome = json.loads(pipe.read() or b'{"result": "crash", "seconds": 99, "bytes": 0}')
        os.waitpid(child, 0)
        outcomes[name] = outcome | {"code": MARKER.exists()}
        MARKER.unlink(missing_ok=True)
        shutil.rmtree(own)
    Path(str(EVIL_WEIGHTS["checkpoint_path"])).unlink()
    print(json.dumps(outcomes))


def report(case: Case, folder: Path) -> dict[str, Any]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        case.read(folder)
        result = READ
    except (ValueError, OSError) as error:
        result = str(error)
    except BaseException as error:
        result = f"raises {type(error).__name__}: {error}"
    seconds = time.process_time() - began  # other processes do not count; what sleeps meets the alarm
    num_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"result": result[:20_000], "seconds": seconds, "bytes": num_bytes}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    MARKER.unlink(missing_ok=True)
    path = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_read_or_refused_in_a_sentence(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[name]
    assert re.search(CASES[name].expected, outcome["result"])
    assert not outcome["result"].startswith("raises")
    assert not outcome["code"]
    assert len(outcome["result"]) < MAX_MESSAGE
    assert outcome["seconds"] < MAX_SECONDS
    assert outcome["bytes"] < MAX_BYTES


if __name__ == "__main__":
    report_all(Path(sys.argv[1]))
