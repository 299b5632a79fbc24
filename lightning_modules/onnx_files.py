"""An exported graph as a file, its int8 twin, and the proof that both give an encoder's vectors."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_modules.onnx_graphs import Graph
from lightning_modules.onnx_probes import Feed

OUTPUT = "sentence_embedding"  # `embedding` is what an operator inside is called: a second one makes the file invalid
LEAST_COSINE = 0.95  # mean with fp32 below which an int8 graph is not given away: our choice
MOST_BYTES = 2**31 - 2**26  # of weights in one file: protobuf ends at 2 GiB, the graph itself needs some


def require_onnx() -> None:
    """Raises ValueError where a library is not installed that exports, or checks what was exported."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"an export to ONNX needs onnx, onnxscript and onnxruntime ({error}): pip install -e '.[export]'"
        ) from error


def write_graph(
    graph: Graph, measured: list[Feed], further: list[Feed], file: Path, *, int8: bool, tolerance: float
) -> dict[str, Any]:
    """Write a graph and its int8 twin, and say what they are.

    Raises:
        ValueError: It cannot be exported, or gives other vectors than the encoder.
    """
    opset = save_graph(graph, file)
    session = _session(file)
    apart = [np.abs(_vectors(session, feed) - feed.expected.numpy()).max() for feed in (*measured, *further)]
    error = float(np.max(apart))  # not a number where one of them is none
    if not error <= tolerance:
        raise ValueError(
            f"{file.name} gives other vectors than the encoder: a coordinate differs by {error:.1e}, and {tolerance:.0e} is "
            "allowed; nothing was written"
        )
    inputs = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [graph.axes[name].get(n, size) for n, size in enumerate(tensor.shape)],
        }
        for name, tensor in graph.example.items()
    }
    about = {"file": file.name, "bytes": _bytes(file), "opset": opset, "inputs": inputs, "error": error}
    return about | ({"int8": _quantised(file, measured)} if int8 else {})


def save_graph(graph: Graph, file: Path) -> int:
    """Export a graph into a file, and its weights into another beside it where they are too large for one.

    Returns:
        The version of ONNX' operators.

    Raises:
        ValueError: torch cannot export it.
    """
    import onnx

    dims = {name: torch.export.Dim(name, min=1) for axes in graph.axes.values() for name in axes.values()}
    shapes = {name: {place: dims[axis] for place, axis in axes.items()} for name, axes in graph.axes.items()}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.module.eval(),
                tuple(graph.example.values()),
                dynamo=True,
                input_names=list(graph.example),
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # of whatever step of the exporter
        cause = error.__cause__ or error
        raise ValueError(f"{file.stem} cannot be exported to ONNX: {type(cause).__name__}: {_reason(cause)}") from error
    assert program is not None
    weights = [value.const_value for value in program.model.graph.initializers.values()]
    num_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    program.save(file, external_data=num_bytes > MOST_BYTES)
    model = onnx.load(file, load_external_data=False)
    del model.graph.value_info[:]  # the exporter's are wrong in places, and a quantiser believes them
    for node in model.graph.node:
        del node.metadata_props[:]  # where each came from, paths of this machine among them
    onnx.save(model, file)
    return next(opset.version for opset in model.opset_import if not opset.domain)


def _quantised(file: Path, feeds: list[Feed]) -> dict[str, Any]:
    """Write the int8 twin of a graph and measure it, or say why there is none."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    twin, about = file.with_suffix(".int8.onnx"), {}
    try:
        with _quiet():
            quantize_dynamic(
                file,
                twin,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,  # 7 bits: with 8, sums overflow on CPUs without VNNI, where these cosines would not hold
                use_external_data_format=_data_of(file).is_file(),
            )
        session = _session(twin)
        cosines = np.concatenate([(_vectors(session, feed) * feed.expected.numpy()).sum(1) for feed in feeds])
        if not np.isfinite(cosines).all():
            raise ValueError("its vectors are not finite")
        about = {"bytes": _bytes(twin), "mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}
        if cosines.mean() >= LEAST_COSINE:
            return {"file": twin.name, **about}
        reason = f"its mean cosine with fp32 is {cosines.mean():.3f}, below {LEAST_COSINE}"
    except Exception as error:  # of the quantiser or of ONNX Runtime, which have no common type
        reason = f"it cannot be quantised, or not run then: {_reason(error)}"
    for path in (twin, _data_of(twin)):
        path.unlink(missing_ok=True)
    return about | {"left_out": reason}


def _session(file: Path) -> Any:
    """Raises ValueError where ONNX Runtime cannot load a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised as well
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types have no common one
        raise ValueError(f"ONNX Runtime cannot load {file.name}: {_reason(error)}") from error


def _vectors(session: Any, feed: Feed) -> np.ndarray:
    """What a graph makes of inputs (N, D).

    Raises:
        ValueError: ONNX Runtime cannot run it.
    """
    try:
        return session.run([OUTPUT], {name: tensor.numpy() for name, tensor in feed.inputs.items()})[0]
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in feed.inputs.items())
        raise ValueError(
            f"ONNX Runtime cannot run what was exported on {shapes}: {_reason(error)}; nothing was written"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _data_of(file: Path) -> Path:
    """Where the weights of a graph lie that is too large for one file."""
    return file.with_name(f"{file.name}.data")


def _bytes(file: Path) -> int:
    return sum(path.stat().st_size for path in (file, _data_of(file)) if path.is_file())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporter and quantiser say of every model: that axes share a name, and that they could do more before."""
    nowhere = logging.NullHandler()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name: ", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attribute self\.encoder\.\S+\.rope_deltas", category=UserWarning)
        logging.getLogger().addHandler(nowhere)  # else a warning would give the whole process a handler that prints
        try:
            yield
        finally:
            logging.getLogger().removeHandler(nowhere)
