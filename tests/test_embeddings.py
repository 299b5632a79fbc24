"""Promises of stored embeddings: what is read is what was stored, in every form and layout; nothing half-made is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import picture_bytes

from lightning_modules.embeddings import Embeddings, write_embeddings
from lightning_modules.forms import FORMS, numbers_of
from lightning_modules.parts import LAYOUTS, Described, files_of, read_vectors
from lightning_modules.precision import Dtype, stored

WIDTH = 20


@pytest.fixture
def unit() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(11, WIDTH)).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(vectors)).numpy()


@pytest.fixture
def items(tmp_path) -> list[Described]:
    (tmp_path / "a.PNG").write_bytes(picture_bytes())
    texts = [Described(f"text {n}", "text", f"größer\u2028\n{n}" * n, position=n) for n in range(10)]
    return [*texts, Described("a.PNG", "image", None, str(tmp_path / "a.PNG"), 12)]


def write(folder: Path, items: list[Described], unit: np.ndarray, **more: Any) -> Embeddings:
    write_embeddings(folder, items, unit, encoder={"path": "runs/x", "sha256": "12"}, block_size=4, **more)
    return Embeddings(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMS)
def test_what_is_read_is_what_was_stored(items, unit, tmp_path, dtype, layout):
    found = write(tmp_path / "out", items, unit, dtype=dtype, layout=layout, task="document")
    assert (len(found), found.width, found.dtype) == (11, WIDTH, dtype)
    assert (found.ids, found.modalities) == ([item.id for item in items], [item.modality for item in items])
    for row, item in enumerate(items):
        assert found.described(row) == {"id": item.id, "modality": item.modality, "text": item.text, "path": item.path}
    raw = read_vectors(tmp_path / "out", 0, layout)
    assert raw.shape == (4, numbers_of(WIDTH, dtype))
    half = unit.astype(np.float16).astype(np.float32)
    judged = half if dtype == "float16" else stored(torch.from_numpy(unit), precision_of(dtype)).numpy()
    expected = judged / np.linalg.norm(judged, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors(), expected, rtol=0, atol=1e-6)  # of rounding in fp32
    rows = np.array([10, 0, 3, 3, 7])
    short = expected[rows, :8] / np.linalg.norm(expected[rows, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors(rows, prefix=8), short, rtol=0, atol=1e-6)
    if dtype == "float32":
        assert (found.vectors() == unit).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_form_takes_its_own_bytes(tmp_path, layout):
    vectors = np.random.default_rng(0).normal(size=(1000, 256)).astype(np.float32)
    texts = [Described(str(n), "text") for n in range(1000)]
    for dtype, num_bytes in (("float32", 1024), ("float16", 512), ("int8", 256), ("binary", 32)):
        write_embeddings(tmp_path / dtype, texts, vectors, encoder={}, dtype=dtype, layout=layout)
        file = tmp_path / dtype / files_of(0, layout)["vectors"]
        assert 1000 * num_bytes < file.stat().st_size < 1000 * num_bytes * 1.1 + 20_000  # ids, levels and a dictionary


def precision_of(dtype: str) -> Dtype:
    return "int8" if dtype == "int8" else "binary" if dtype == "binary" else "float32"


def test_media_are_read_from_where_they_lie(items, unit, tmp_path):
    found = write(tmp_path / "out", items, unit)
    assert found.medium(0) is None
    assert found.medium(10) == (picture_bytes(), "png")
    (tmp_path / "a.PNG").unlink()
    with pytest.raises(ValueError, match=r"the medium of 'a.PNG' is no longer at .*a\.PNG"):
        found.medium(10)


def test_what_is_not_whole_is_not_read(items, unit, tmp_path):
    with pytest.raises(ValueError, match="holds no embeddings"):
        Embeddings(tmp_path)
    out = tmp_path / "out"
    write(out, items, unit)
    about = json.loads((out / "embeddings.json").read_text())
    (out / "part-000001.parquet").rename(out / "x")
    with pytest.raises(ValueError, match=r"part-000001.parquet is missing or of another size"):
        Embeddings(out)
    (out / "x").rename(out / "part-000001.parquet")
    for wrong in ({"format": "other"}, {"dtype": "int4"}, {"num_items": 3}, {"prefix": "8"}, {"blocks": [{}]}):
        (out / "embeddings.json").write_text(json.dumps(about | wrong))
        with pytest.raises(ValueError, match=r"embeddings.json cannot be used .* embed again"):
            Embeddings(out)
    (out / "embeddings.json").unlink()
    with pytest.raises(ValueError, match="not finished: run conf=embed again"):
        Embeddings(out)
    with pytest.raises(ValueError, match="there is no item 11"):
        write(out, items, unit).described(11)
    with pytest.raises(ValueError, match="prefix 21 is wider"):
        Embeddings(out).vectors(prefix=21)
