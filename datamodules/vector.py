"""A vector as the bytes of a `.npy` file, as `numpy.save` writes it, and back; nothing else is read, and nothing is unpickled.

Source: NumPy's format version 1.0 (numpy.lib.format).
"""

import io
import re

import numpy as np

MAX_DIMENSIONS = 2**16  # our choice
DESCRIPTION = rb"\{'descr': '<(f2|f4)', 'fortran_order': False, 'shape': \((0|[1-9]\d{0,5}),\), \} *\n"
HEADER = re.compile(rb"\x93NUMPY\x01\x00(..)(" + DESCRIPTION + rb")", re.DOTALL)


def to_npy(vector: np.ndarray) -> bytes:
    """The file's bytes.

    Args:
        vector: (T,) float16 or float32, finite.

    Raises:
        ValueError: It is anything else, or longer than is read.
    """
    if vector.dtype not in (np.float16, np.float32) or vector.ndim != 1:
        raise ValueError(f"a vector is {vector.dtype} of shape {vector.shape}; it must be float16 or float32 of one dimension")
    file = io.BytesIO()
    np.save(file, vector.astype(vector.dtype.newbyteorder("<")), allow_pickle=False)
    from_npy(file.getvalue())
    return file.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """The vector (T,), float16 or float32, bit for bit.

    Raises:
        ValueError: The file is no such vector, its length is not what its header says, or a value is NaN or infinite.
    """
    header = HEADER.match(data)
    if header is None or int.from_bytes(header[1], "little") != len(header[2]):
        raise ValueError("a vector's file is no .npy of one dimension in little-endian float16 or float32")
    dtype, num_dimensions = np.dtype(f"<{header[3].decode()}"), int(header[4])
    if not 0 < num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"a vector has {num_dimensions} dimensions; allowed are 1 to {MAX_DIMENSIONS}")
    if len(data) - header.end() != num_dimensions * dtype.itemsize:
        raise ValueError(f"a vector's file has {len(data) - header.end()} bytes for {num_dimensions} dimensions of {dtype}")
    vector = np.frombuffer(data, dtype, offset=header.end())
    if not np.isfinite(vector).all():
        raise ValueError("a vector holds NaN or infinity")
    return vector
