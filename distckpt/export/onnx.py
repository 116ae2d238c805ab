"""ONNX by torch's exporter of programs: named axes of any length, weights inside the file or beside it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch

from distckpt.errors import IncompatibleState, optional
from distckpt.export.feeds import Batches, Inputs
from distckpt.export.programs import own_names
from distckpt.export.runners import Plain, Run, Signature

EMBED_BELOW: Final = 1 << 30
"""Bytes of weights that still go into the file itself; protobuf ends at 2 GiB."""


def write_onnx(
    plain: Plain,
    signature: Signature,
    batches: Batches,
    shapes: Mapping[str, Mapping[int, Any]],
    path: str | os.PathLike[str],
    *,
    external: bool,
    stamp: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Write a model; with ``external`` its weights lie beside it, in ``<name>.data``, found by that name alone.

    ``shapes``: the axes that ``record_program`` found. Returns the weights of the graph by the model's names, before torch's
    optimizer folds some into others. Raises ``IncompatibleState`` for what cannot be expressed.
    """
    for library in ("onnx", "onnxscript"):
        optional(library, "export")
    example = signature.cast(batches.trace)
    args = () if signature.keywords else tuple(example.values())
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of libraries that are not installed and not needed
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                plain, args, kwargs=example if signature.keywords else None, dynamo=True, verbose=False,
                input_names=list(signature.inputs), output_names=list(signature.outputs),
                dynamic_shapes={name: dict(axes) for name, axes in shapes.items()}, optimize=False,
            )  # fmt: skip
            assert program is not None
            weights = {name: _tensor(value) for name, value in program.model.graph.initializers.items()}
            program.optimize()
    except torch.onnx.errors.OnnxExporterError as cause:
        raise IncompatibleState(f"ONNX: {' '.join(str(cause).split())[:400]}") from cause
    finally:
        quiet.setLevel(level)
    program.model.metadata_props.update(stamp)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with folders of the machine it was trained on
    program.save(os.fspath(path), external_data=external)
    return own_names(weights)


def _tensor(value: Any) -> torch.Tensor:
    """Return an initializer's tensor; torch's own where it is one, for NumPy lacks some dtypes."""
    raw = getattr(value.const_value, "raw", None)
    return raw.detach() if isinstance(raw, torch.Tensor) else torch.from_numpy(value.const_value.numpy().copy())


def open_onnx(path: str | os.PathLike[str], signature: Signature) -> Run:
    """Load a file into onnxruntime on the CPU. Raises ``IncompatibleState`` where the runtime lacks an operator."""
    runtime = optional("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as cause:
        raise IncompatibleState(
            f"{os.fspath(path)}: onnxruntime cannot run it: {' '.join(str(cause).split())[:300]}; another dtype may do"
        ) from cause
    known = {port.name for port in session.get_inputs()}

    def run(inputs: Inputs) -> dict[str, torch.Tensor]:
        given = {name: value for name, value in signature.cast(inputs).items() if name in known}
        found = session.run(list(signature.outputs), {name: value.cpu().numpy() for name, value in given.items()})
        return {name: torch.from_numpy(value) for name, value in zip(signature.outputs, found, strict=True)}

    return run


def onnx_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check a file and return what is in it: ``doubles`` and ``random`` by name, axes of one size, ...

    Raises ``IncompatibleState`` for a file that ONNX's own checker refuses.
    """
    onnx = optional("onnx", "export")
    try:
        onnx.checker.check_model(os.fspath(path))
        model = onnx.load(os.fspath(path))
    except Exception as cause:
        raise IncompatibleState(
            f"{os.fspath(path)}: the checker refuses it: {' '.join(str(cause).split())[:300]}"
        ) from cause
    graph, double = model.graph, onnx.TensorProto.DOUBLE
    ports = [*graph.input, *graph.output, *graph.value_info]
    doubles = [t.name for t in graph.initializer if t.data_type == double and tuple(t.dims) not in ((), (1,))]
    doubles += [port.name for port in ports if port.type.tensor_type.elem_type == double]
    random = [node.op_type for node in graph.node if node.op_type.startswith(("Random", "Dropout", "Bernoulli"))]
    fixed = [
        f"{port.name} axis 0 is always {port.type.tensor_type.shape.dim[0].dim_value}"
        for port in graph.input
        if port.type.tensor_type.shape.dim and not port.type.tensor_type.shape.dim[0].dim_param
    ]
    return {
        "doubles": doubles,
        "random": random,
        "fixed": fixed,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
    }
