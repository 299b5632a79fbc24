"""No file of the project unpickles, evaluates text, runs a shell or unpacks an archive: a scan over the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for place in ("train.py", "datamodules", "kernels", "lightning_modules", "experiments", "tests")
    for path in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
]
EXCEPTIONS = {  # (file, what the scan says) -> why it has to be there
    ("lightning_modules/export.py", "trust_remote_code"): "loads the module file that it has just written, to compare vectors",
    ("tests/test_export.py", "trust_remote_code"): "loads an export as a person would",
    ("tests/test_hostile_media.py", "import of pickle"): "writes hostile pickles that nothing may run",
    ("tests/test_hostile_media.py", "os.system"): "what such a pickle would run",
}

UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
NEVER = {
    *(f"builtins.{name}" for name in BUILTINS),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("asyncio.subprocess.create_subprocess_shell", "shutil.unpack_archive"),
}
ENCODINGS = {"utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32"}


class Scan(ast.NodeVisitor):
    """What is banned in one file, each as `line: what`."""

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        self.found: list[tuple[int, str]] = []
        self.names = {name: f"builtins.{name}" for name in BUILTINS}  # what a name of the file stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.names |= {
                    a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
                }
            elif isinstance(node, ast.ImportFrom):
                self.names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.FunctionDef) and node in tree.body:
                self.names.pop(node.name, None)
        imported = {name.split(".")[0] for name in self.names.values()}
        self.reads_archives, self.reads_shards = bool(imported & {"tarfile", "zipfile"}), "webdataset" in imported
        self.visit(tree)

    def say(self, node: ast.AST, what: str) -> None:
        self.found.append((getattr(node, "lineno", 0), what))

    def dotted(self, node: ast.AST) -> str:
        """`np.load` as numpy.load; what is no name at its head begins with `?`."""
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        return self.names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    def imports(self, node: ast.AST, module: str) -> None:
        if module.split(".")[0] in UNPICKLING:
            self.say(node, f"import of {module}")
        self.named(node, module)

    def named(self, node: ast.AST, name: str) -> None:
        last = name.split(".")[-1]
        if name in NEVER:
            self.say(node, name)
        if self.reads_shards and (last in ("xdecode", "gopen") or last.startswith("cached_")):
            self.say(node, f"webdataset's {last}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.imports(node, f"{node.module}.{alias.name}")
        if (node.module or "").startswith("webdataset.gopen"):
            self.say(node, "webdataset's gopen")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.named(node, self.dotted(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.named(node, self.dotted(node))
        if not isinstance(node.value, ast.Name):
            self.visit(node.value)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not is_constant(value, False):
                self.say(node, "trust_remote_code")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func)
        method = name.split(".")[-1] if isinstance(node.func, ast.Attribute) else ""
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
            self.say(node, "torch.load without weights_only=True")
        if name == "numpy.load" and (len(node.args) > 2 or not is_constant(keywords.get("allow_pickle"), False, absent=True)):
            self.say(node, "numpy.load with allow_pickle")
        if name.startswith("subprocess.") and not is_constant(keywords.get("shell"), False, absent=True):
            self.say(node, "subprocess with a shell")
        if not is_constant(keywords.get("trust_remote_code"), False, absent=True):
            self.say(node, "trust_remote_code")
        if name == "importlib.import_module" and str(first).split(".")[0] in UNPICKLING:
            self.say(node, f"import of {first}")
        if method == "extractall" or (method == "extract" and self.reads_archives):
            self.say(node, f"an archive's {method}")
        if method == "decode" and self.reads_shards and str(first).lower() not in ENCODINGS:
            self.say(node, "decode without a text encoding, where webdataset is imported")
        self.generic_visit(node)


def is_constant(node: ast.expr | None, value: bool, *, absent: bool = False) -> bool:
    return absent if node is None else isinstance(node, ast.Constant) and node.value is value


def judge(found: dict[str, list[tuple[int, str]]], exceptions: dict[tuple[str, str], str]) -> list[str]:
    """Findings that no exception names, and exceptions that nothing needs any more."""
    keys = {(file, what) for file, lines in found.items() for _, what in lines}
    new = [f"{file}:{line}: {what}" for file, lines in found.items() for line, what in lines if (file, what) not in exceptions]
    return new + [f"{file}: no {what} any more, take it off the list" for file, what in sorted(exceptions.keys() - keys)]


def test_the_project_runs_no_code_from_data():
    assert len(FILES) > 50
    found = {str(path.relative_to(ROOT)): Scan(path.read_text()).found for path in FILES}
    assert judge(found, EXCEPTIONS) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import of pickle"),
        ("import os, dill as d", "import of dill"),
        ("from pickle import loads", "import of pickle.loads"),
        ("def f():\n    from joblib import load", "import of joblib.load"),
        ("import cloudpickle.cloudpickle", "import of cloudpickle.cloudpickle"),
        ("import marshal", "import of marshal"),
        ("import shelve", "import of shelve"),
        ("import importlib\nimportlib.import_module('cPickle')", "import of cPickle"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("from torch import load\nload(f, weights_only=safe)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, **options)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load with allow_pickle"),
        ("import numpy as np\nnp.load(f, None, True)", "numpy.load with allow_pickle"),
        ("from numpy import load\nload(f, allow_pickle=given)", "numpy.load with allow_pickle"),
        ("import yaml\nyaml.load(f, Loader=yaml.SafeLoader)", "yaml.load"),
        ("import yaml\nyaml.unsafe_load(f)", "yaml.unsafe_load"),
        ("from yaml import full_load", "yaml.full_load"),
        ("eval('1')", "builtins.eval"),
        ("list(map(eval, texts))", "builtins.eval"),
        ("exec(text)", "builtins.exec"),
        ("compile(text, 'a', 'exec')", "builtins.compile"),
        ("import builtins\nbuiltins.exec(text)", "builtins.exec"),
        ("__import__(name)", "builtins.__import__"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import popen as p", "os.popen"),
        ("import os\nrun = os.system", "os.system"),
        ("import subprocess\nsubprocess.run(a, shell=True)", "subprocess with a shell"),
        ("from subprocess import Popen\nPopen(a, shell=1)", "subprocess with a shell"),
        ("import subprocess\nsubprocess.getoutput(a)", "subprocess.getoutput"),
        ("import asyncio\nasyncio.create_subprocess_shell(a)", "asyncio.create_subprocess_shell"),
        ("import tarfile\ntarfile.open(f).extractall(d)", "an archive's extractall"),
        ("import tarfile\nwith tarfile.open(f) as t:\n    t.extract(m)", "an archive's extract"),
        ("from zipfile import ZipFile\nZipFile(f).extractall()", "an archive's extractall"),
        ("import shutil\nshutil.unpack_archive(f)", "shutil.unpack_archive"),
        ("model.from_pretrained(n, trust_remote_code=True)", "trust_remote_code"),
        ("model.from_pretrained(n, **{'trust_remote_code': given})", "trust_remote_code"),
        (
            "import webdataset as wds\nd = wds.WebDataset(u).decode()",
            "decode without a text encoding, where webdataset is imported",
        ),
        ("import webdataset as wds\nd.decode('pil')", "decode without a text encoding, where webdataset is imported"),
        (
            "from webdataset import WebDataset\nd.decode(handler)",
            "decode without a text encoding, where webdataset is imported",
        ),
        ("import webdataset as wds\nd.xdecode(png='pil')", "webdataset's xdecode"),
        ("import webdataset as wds\nwds.gopen('pipe:ls')", "webdataset's gopen"),
        ("from webdataset.gopen import gopen", "webdataset's gopen"),
        ("from webdataset.tariterators import cached_tarfile_to_samples", "webdataset's cached_tarfile_to_samples"),
    ],
)
def test_the_scan_finds(source, what):
    assert what in [said for _, said in Scan(source).found]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)\ntorch.compile(f)\nmodel.eval()",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import re, json, yaml\nre.compile('a')\njson.load(f)\nyaml.safe_load(f)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)\nsubprocess.run(['ls'])",
        "from webdataset.writer import TarWriter\ndata.decode('utf-8')",
        "frames = container.decode(stream)\nbase64.b64encode(data).decode()",
        "model.from_pretrained(n, trust_remote_code=False)",
        "def compile(source):\n    return source\ncompile(a)",
    ],
)
def test_the_scan_leaves_alone(source):
    assert Scan(source).found == []


def test_an_exception_names_a_file_and_dies_with_its_cause():
    found = {"a.py": [(3, "os.system")], "b.py": []}
    assert judge(found, {}) == ["a.py:3: os.system"]
    assert judge(found, {("a.py", "os.system"): "why"}) == []
    stale = judge(found, {("a.py", "os.system"): "why", ("b.py", "os.system"): "why"})
    assert stale == ["b.py: no os.system any more, take it off the list"]
    assert all((ROOT / file).is_file() and reason for (file, _), reason in EXCEPTIONS.items())
