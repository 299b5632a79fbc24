"""Imports run one way: kernels ← lightning_modules → datamodules; kernels/__init__.py stays a docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": {"kernels"},
    "datamodules": {"datamodules"},
    "lightning_modules": {"kernels", "datamodules", "lightning_modules"},
}


def imports_of(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    ]


def test_imports_run_one_way():
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            for name in imports_of(path):
                assert name.split(".")[0] not in (ALLOWED.keys() | {"train"}) - allowed, f"{path} imports {name}"


def test_kernels_init_is_only_a_docstring():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


def test_the_top_level_holds_what_the_design_says():
    files, folders = (
        "pyproject.toml train.py README.md LICENSE Makefile constraints.txt",
        "lightning_modules datamodules kernels",
    )
    made = {"runs", "shards", "polyphony.egg-info"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))} - made
    assert found == set(f"{files} {folders} conf tests experiments".split())
