"""Joining graphs: what is repeated is wired in sequence, stored once and computed once; misfits are refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.chain import Chain

WEIGHT = np.array([[2.0, 1.0], [0.0, 3.0]], np.float32)


def graph(weight: np.ndarray = WEIGHT, name: str = "weight", opset: int = 20) -> onnx.ModelProto:
    """y = x @ weight + sum(mask): what depends on the mask alone is the same in every copy."""
    nodes = [
        helper.make_node("MatMul", ["x", name], ["product"], "product"),
        helper.make_node("ReduceSum", ["mask"], ["sum"], "sum", keepdims=0),
        helper.make_node("Add", ["product", "sum"], ["y"], "add"),
    ]
    pairs = [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["batch", 2]) for one in ("x", "mask", "y")]
    stored = [numpy_helper.from_array(weight, name)]
    made = helper.make_graph(nodes, "one", pairs[:2], pairs[2:], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto, **feed: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, feed)
    return outputs


def chained(*graphs: onnx.ModelProto) -> onnx.ModelProto:
    chain = Chain()
    x = ""
    for number, one in enumerate(graphs):
        x = chain.add(one, f"{number}/", {"x": x} if x else {})["y"]
    return chain.model({"last": x})


def test_one_after_the_other() -> None:
    x, mask = np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 4.0]], np.float32)
    model = chained(graph(), graph(), graph())
    expected = ((x @ WEIGHT + 7) @ WEIGHT + 7) @ WEIGHT + 7
    np.testing.assert_array_equal(run(model, x=x, mask=mask)[0], expected)
    assert [value.name for value in model.graph.input] == ["x", "mask"]
    assert [value.name for value in model.graph.output] == ["last"]


def test_equal_tensors_are_stored_once_and_equal_nodes_run_once() -> None:
    model = chained(graph(), graph(name="other_name"), graph())
    assert len(model.graph.initializer) == 1
    assert [node.op_type for node in model.graph.node].count("ReduceSum") == 1
    assert [node.op_type for node in model.graph.node].count("MatMul") == 3


def test_other_tensors_of_the_same_name_are_kept_apart() -> None:
    x, mask = np.eye(2, dtype=np.float32), np.zeros((1, 2), np.float32)
    model = chained(graph(), graph(WEIGHT + 1), graph(WEIGHT + 2))
    np.testing.assert_array_equal(run(model, x=x, mask=mask)[0], WEIGHT @ (WEIGHT + 1) @ (WEIGHT + 2))
    assert len({tensor.name for tensor in model.graph.initializer}) == 3


def test_only_what_outputs_need_is_in_the_model() -> None:
    chain = Chain()
    first = chain.add(graph(), "0/")["y"]
    chain.add(graph(WEIGHT + 1), "1/", {"x": first})
    model = chain.model({"y": first})
    assert len(model.graph.node) == 3 and len(model.graph.initializer) == 1
    assert [value.name for value in model.graph.input] == ["x", "mask"]


def test_a_constant_can_stand_for_an_input() -> None:
    chain = Chain()
    mask = chain.constant(np.full((1, 2), 4, np.float32), "mask")
    assert chain.constant(np.full((1, 2), 4, np.float32), "again") == mask
    model = chain.model({"y": chain.add(graph(), "0/", {"mask": mask})["y"]})
    x = np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(run(model, x=x)[0], WEIGHT + 8)


def test_the_newest_opset_of_the_parts() -> None:
    assert chained(graph(opset=19), graph(opset=20)).opset_import[0].version == 20


def test_graphs_inside_nodes_and_one_tensor_as_two_outputs_are_refused() -> None:
    whole = graph()
    whole.graph.node[0].attribute.append(helper.make_attribute("body", graph().graph))
    with pytest.raises(ValueError, match="MatMul product holds a graph"):
        Chain().add(whole)
    chain = Chain()
    y = chain.add(graph())["y"]
    with pytest.raises(ValueError, match="one tensor under two names"):
        chain.model({"a": y, "b": y})
