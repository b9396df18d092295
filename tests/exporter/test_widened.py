"""A half graph with all its types widened computes what it says, without the rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.manifest import TensorSpec
from exporter.graphs.widened import HALF, WidenedSession, rounded_feed, widened_feed

KINDS = {name: kind for kind, name in HALF.items()}
LARGE = 40  # rows of a matrix that is handed over beside the graph


def half_graph(kind: int) -> onnx.ModelProto:
    """y = float(half(x) W + 1/3), with W stored, 1/3 a node, and what is half as it is beside y."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = (np.arange(LARGE * 16).reshape(LARGE, 16) % 7 - 3).astype(dtype)
    third = numpy_helper.from_array(np.array(1 / 3).astype(dtype))
    nodes = [
        helper.make_node("Constant", [], ["third"], value=third),
        helper.make_node("Cast", ["x"], ["narrow"], to=kind),
        helper.make_node("MatMul", ["narrow", "weight"], ["product"]),
        helper.make_node("Add", ["product", "third"], ["sum"]),
        helper.make_node("Add", ["sum", "state"], ["hidden"]),
        helper.make_node("Cast", ["hidden"], ["y"], to=TensorProto.FLOAT),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", LARGE]),
        helper.make_tensor_value_info("state", kind, ["batch", 16]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16]),
        helper.make_tensor_value_info("hidden", kind, ["batch", 16]),
    ]
    graph = helper.make_graph(nodes, "half", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("name", KINDS)
def test_a_widened_graph(name: str, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    onnx.save(half_graph(KINDS[name]), path)
    session = WidenedSession(path)
    assert [(spec.name, spec.dtype) for spec in (*session.inputs, *session.outputs)] == [
        ("x", "float32"),
        ("state", name),
        ("y", "float32"),
        ("hidden", name),
    ]
    x = np.random.default_rng(0).normal(size=(3, LARGE)).astype(np.float32)
    state = np.full((3, 16), 0.1, np.float32)
    feed = rounded_feed({"x": x, "state": state}, session.inputs)
    assert feed["x"] is x and feed["state"].dtype.itemsize == 2
    wide = widened_feed(feed)
    assert wide["state"].dtype == np.float32 and 0 < abs(wide["state"][0, 0] - 0.1) < 1e-3
    y, hidden = session.run(wide)
    dtype = helper.tensor_dtype_to_np_dtype(KINDS[name])
    weight = (np.arange(LARGE * 16).reshape(LARGE, 16) % 7 - 3).astype(np.float32)
    # x is not rounded, and 1/3 is, as whatever the graph stores.
    wanted = x @ weight + np.array(1 / 3).astype(dtype).astype(np.float32) + wide["state"]
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    np.testing.assert_array_equal(y, hidden)


def test_ids_and_sizes_keep_their_types() -> None:
    specs = [TensorSpec(name="ids", dtype="int64", shape=[1]), TensorSpec(name="dt", dtype="float32", shape=[1])]
    feed = {"ids": np.array([2**40]), "dt": np.array([4 / 3], np.float32)}
    kept = widened_feed(rounded_feed(feed, specs))
    assert all(kept[name].dtype == array.dtype and (kept[name] == array).all() for name, array in feed.items())
