"""Unit vectors in the forms that are stored: float32, float16, one signed byte or one bit a dimension; and back.

The values of `int8` and `binary` are those that `lightning_modules.precision` judges. Shapes: N vectors, D width.
"""

from typing import Literal, get_args

import numpy as np

from lightning_modules.precision import LARGEST

Form = Literal["float32", "float16", "int8", "binary"]
FORMS: tuple[Form, ...] = get_args(Form)
DTYPES: dict[Form, type] = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}
TINY = np.finfo(np.float32).tiny


def numbers_of(width: int, form: Form) -> int:
    """Numbers that a vector of some width is stored as."""
    return -(-width // 8) if form == "binary" else width


def encoded(unit_ND: np.ndarray, form: Form) -> np.ndarray:
    """What is stored of unit vectors: (N, D), for binary (N, D / 8) with the first dimension in the most significant bit.

    An int8 vector is scaled so that its own largest coordinate is 127; a bit is 1 where the coordinate is at least 0.
    """
    if form == "binary":
        return np.packbits(unit_ND >= 0, axis=1)
    if form == "int8":
        scale_N1 = np.maximum(np.abs(unit_ND).max(axis=1, keepdims=True), TINY) / np.float32(LARGEST)
        return np.rint(unit_ND / scale_N1).astype(np.int8)
    return unit_ND.astype(DTYPES[form])


def decoded(stored: np.ndarray, form: Form, width: int, prefix: int) -> np.ndarray:
    """Unit vectors (N, prefix) float32 of what is stored of vectors of some width; float32 in full width as it was."""
    if form == "float32" and prefix == width:
        return np.array(stored, np.float32)
    if form == "binary":
        signs = np.unpackbits(np.ascontiguousarray(stored), axis=1, count=width)[:, :prefix].astype(np.float32) * 2 - 1
        return signs / np.sqrt(np.float32(prefix))
    return unit(stored[:, :prefix].astype(np.float32))


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """The vectors at length 1; zeros stay."""
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), TINY)
