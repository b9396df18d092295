"""A graph of half precision with all its types widened to fp32, in memory: does it compute what it was traced from?

Rounding hides faults of a graph, and ONNX Runtime multiplies no bf16 on a processor at all. Widened, with the same
rounded weights, a graph must equal PyTorch as closely as an fp32 one. Only ever a check: nothing of it is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.manifest import TensorSpec

HALF = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
_MOVED_BYTES = 1024  # larger tensors are handed over beside the graph, which may not exceed 2 GiB


class WidenedSession:
    """The graph at ``path``, widened, in ONNX Runtime. ``inputs`` and ``outputs`` are those of the graph itself."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        from engines.backends import ort

        model = onnx.load(str(path))
        kinds = _half_values(model)
        tensors = widen(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in tensors.values()]
        options.add_external_initializers(list(tensors), values)
        inner = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._inner = inner
        self.inputs, self.outputs = (
            [spec.model_copy(update={"dtype": kinds.get(spec.name, spec.dtype)}) for spec in ort.tensor_specs(values)]
            for values in (inner.get_inputs(), inner.get_outputs())
        )

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Its outputs in their order, of arrays that are fp32 where the graph's are half."""
        outputs: list[np.ndarray] = self._inner.run(None, feed)
        return outputs


def rounded_feed(feed: dict[str, np.ndarray], inputs: Iterable[TensorSpec]) -> dict[str, np.ndarray]:
    """``feed`` in the types of ``inputs``."""
    kinds = {spec.name: spec.dtype for spec in inputs}
    return {name: array.astype(_dtype(kinds[name]), copy=False) for name, array in feed.items()}


def widened_feed(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``feed`` with fp32 for half."""
    halves = tuple(map(_dtype, HALF.values()))
    return {name: array.astype(np.float32) if array.dtype in halves else array for name, array in feed.items()}


def widen(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Make every half type of ``model`` fp32, in place; the larger tensors, by name, which are no longer in it."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            _widen_attribute(node, attribute)
    moved = {}
    for tensor in model.graph.initializer:
        array = _wide_array(tensor)
        if array.nbytes < _MOVED_BYTES:
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            continue
        moved[tensor.name] = array
        tensor.ClearField("raw_data")
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, entry in (("location", "beside"), ("offset", "0"), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=entry)
    return moved


def _widen_attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    if attribute.HasField("g") or attribute.graphs:
        raise ValueError(f"{node.op_type} {node.name} holds a graph")
    if attribute.HasField("t") and attribute.t.data_type in HALF:
        attribute.t.CopyFrom(numpy_helper.from_array(_wide_array(attribute.t), attribute.t.name))
    if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALF:
        attribute.i = TensorProto.FLOAT


def _wide_array(tensor: onnx.TensorProto) -> np.ndarray:
    array = numpy_helper.to_array(tensor)
    return array.astype(np.float32) if tensor.data_type in HALF else array


def _half_values(model: onnx.ModelProto) -> dict[str, str]:
    values = (*model.graph.input, *model.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return {name: HALF[kind] for name, kind in kinds.items() if kind in HALF}


def _dtype(name: str) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16) if name == "bfloat16" else np.dtype(name)
