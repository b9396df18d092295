"""From the template to the graph of one ratio: what holds before and after each pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter import ops, passes
from exporter.backbone import Backbone
from tests.exporter.conftest import random_plugins
from tests.models import LAYERS

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors(backbone: Callable[..., Backbone]) -> Tensors:
    """Plugins of ratio 5, under the names they have in a graph."""
    stored = random_plugins(backbone(), 5).state_dict()
    return {f"variator.plugins.{name}": tensor.numpy() for name, tensor in stored.items()}


def stored(model: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}


def custom(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == ops.DOMAIN]


def test_template_holds_one_pair_of_operators_a_layer(template: onnx.ModelProto) -> None:
    assert Counter(node.op_type for node in custom(template)) == {"MaskedTokenMerge": LAYERS, "TokenSplit": LAYERS}


def test_plugin_initializers_are_the_plugins(template: onnx.ModelProto, tensors: Tensors) -> None:
    assert passes.plugin_initializers(template) == set(tensors)


def test_bind_ratio(template: onnx.ModelProto, tensors: Tensors) -> None:
    before = template.SerializeToString(deterministic=True)
    model = passes.bind_ratio(template, 5, tensors)
    assert template.SerializeToString(deterministic=True) == before, "the template was changed"
    onnx.checker.check_model(model, full_check=True)
    for node in custom(model):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"ratio": 5, "plugin_namespace": b"compexport", "plugin_version": b"1"}
    assert sorted(function.name for function in model.functions) == ["MaskedTokenMerge", "TokenSplit"]
    for tensor in model.graph.initializer:
        if tensor.name in tensors:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), tensors[tensor.name])
    assert set(tensors) <= set(stored(model))


def test_without_merging(template: onnx.ModelProto, tensors: Tensors) -> None:
    before = template.SerializeToString(deterministic=True)
    model = passes.without_merging(template)
    assert template.SerializeToString(deterministic=True) == before, "the template was changed"
    onnx.checker.check_model(model, full_check=True)
    assert custom(model) == [] and not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not set(tensors) & set(stored(model))
    produced = {name for node in model.graph.node for name in node.output}
    known = produced | set(stored(model)) | {value.name for value in model.graph.input} | {""}
    assert {name for node in model.graph.node for name in node.input} <= known
    # The mask has served the operators as well, but attention still needs it.
    assert [value.name for value in model.graph.input] == [value.name for value in template.graph.input]


def test_every_ratio_has_the_same_backbone(template: onnx.ModelProto, tensors: Tensors) -> None:
    """Same names, same bytes: that is what lets a family share one weights file."""
    backbone = stored(passes.without_merging(template))
    bound = stored(passes.bind_ratio(template, 5, tensors))
    assert len(backbone) > 10
    assert {name: data for name, data in bound.items() if name not in tensors} == backbone


def test_no_initializer_without_a_reader(template: onnx.ModelProto, tensors: Tensors) -> None:
    for model in (passes.without_merging(template), passes.bind_ratio(template, 5, tensors)):
        read = {name for node in model.graph.node for name in node.input}
        assert set(stored(model)) <= read


def test_bind_ratio_requires_every_tensor(template: onnx.ModelProto, tensors: Tensors) -> None:
    some = dict(list(tensors.items())[:-1])
    with pytest.raises(Exception, match="w_out"):
        passes.bind_ratio(template, 5, some)


# --- look-ups and norms --------------------------------------------------------------------------------------------

SMALL = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (int64[N] ids, float[N, 2] x) =>
        (float[2, 2] fixed, float[N, 2] looked, float[N, 2] y, float[N, 2] z, float[N, 2] r)
    <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[3, 2] other = {1, 2, 3, 4, 5, 6}, int64[2] rows = {2, 0}>
    {
        fixed = Gather <axis: int = 0> (table, rows)
        looked = Gather <axis: int = 0> (other, ids)
        s = Sqrt (x)
        q = Reciprocal (s)
        y = Mul (x, q)
        z = Mul (q, looked)
        d = Div (x, x)
        r = Reciprocal (d)
    }
"""


def test_constant_lookups_become_their_rows() -> None:
    model = passes.with_constant_lookups(onnx.parser.parse_model(SMALL))
    onnx.checker.check_model(model, full_check=True)
    assert [node.output[0] for node in model.graph.node if node.op_type == "Gather"] == ["looked"]
    rows = next(tensor for tensor in model.graph.initializer if tensor.name == "fixed")
    assert numpy_helper.to_array(rows).tolist() == [[5, 6], [1, 2]]


def test_reciprocals_of_roots_become_divisions() -> None:
    from onnx.reference import ReferenceEvaluator

    before = onnx.parser.parse_model(SMALL)
    feeds = {"ids": np.array([1, 2]), "x": np.array([[4, 9], [16, 1]], np.float32)}
    expected = ReferenceEvaluator(before).run(None, feeds)
    model = passes.with_divisions(onnx.parser.parse_model(SMALL))
    onnx.checker.check_model(model, full_check=True)
    # What is no reciprocal of a root stays.
    assert Counter(node.op_type for node in model.graph.node) == {"Gather": 2, "Sqrt": 1, "Div": 3, "Reciprocal": 1}
    for want, got in zip(expected, ReferenceEvaluator(model).run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_engine_fuses_the_norms_of_t5(built: Callable[..., Path]) -> None:
    graph = onnx.load(built("tiny-t5") / "engines" / "ort-cpu" / "r4.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    assert found["SimplifiedLayerNormalization"] == 2 * LAYERS + 1
    assert not found["Reciprocal"] and not found["Sqrt"]


def test_the_passes_leave_bert_alone(template: onnx.ModelProto) -> None:
    before = template.SerializeToString(deterministic=True)
    copy = onnx.ModelProto.FromString(before)
    after = passes.with_divisions(passes.with_constant_lookups(copy))
    assert after.SerializeToString(deterministic=True) == before


# --- parts of a trace with exits ------------------------------------------------------------------------------------


def exits_template() -> onnx.ModelProto:
    """state.1 = table[ids], state.2 = state.1 * w reshaped by the ids' sizes + mask; an end after each."""
    nodes = [
        helper.make_node("Shape", ["ids"], ["sizes"]),
        helper.make_node("Gather", ["table", "ids"], ["state.1"]),
        helper.make_node("ReduceMax", ["state.1"], ["end.1"], keepdims=0),
        helper.make_node("Concat", ["sizes", "one"], ["target"], axis=0),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=1),
        helper.make_node("Reshape", ["mask", "target"], ["bias"]),
        helper.make_node("Mul", ["state.1", "w"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["state.2"]),
        helper.make_node("ReduceMax", ["state.2"], ["end.2"], keepdims=0),
    ]
    axes = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in ("ids", "attention_mask")]
    outputs = [
        helper.make_tensor_value_info(f"state.{i}", TensorProto.FLOAT, ["batch", "sequence", 3]) for i in (1, 2)
    ] + [helper.make_tensor_value_info(f"end.{i}", TensorProto.FLOAT, []) for i in (1, 2)]
    weights = [
        numpy_helper.from_array(np.arange(15, dtype=np.float32).reshape(5, 3), "table"),
        numpy_helper.from_array(np.float32([2, 3, 4]), "w"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    graph = helper.make_graph(nodes, "exits", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_a_part_holds_what_its_outputs_need() -> None:
    template = exits_template()
    before = template.SerializeToString()
    made = passes.part(template, {"end": "end.1", "state": "state.1"})
    onnx.checker.check_model(made)
    assert [node.op_type for node in made.graph.node] == ["Gather", "ReduceMax"]
    assert names(made.graph.input) == ["ids", "attention_mask"] and names(made.graph.output) == ["end", "state"]
    assert names(made.graph.initializer) == ["table"]
    assert template.SerializeToString() == before


def test_a_later_part_takes_rows_of_its_state_and_mask() -> None:
    made = passes.part_from(exits_template(), "state.1", {"state": "state.2"})
    onnx.checker.check_model(made)
    assert names(made.graph.input) == ["previous", "attention_mask", "rows"]
    assert names(made.graph.initializer) == ["w", "one"]
    assert [axis.dim_param for axis in made.graph.input[2].type.tensor_type.shape.dim] == ["kept"]
    assert made.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "kept"
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    state = np.random.default_rng(0).random((3, 4, 3), dtype=np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    rows = np.array([2, 0])
    (got,) = session.run(None, {"previous": state, "attention_mask": mask, "rows": rows})
    np.testing.assert_array_equal(got, state[rows] * np.float32([2, 3, 4]) + mask[rows][:, :, None].astype(np.float32))


# --- pieces of encoders and decoders --------------------------------------------------------------------------------


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


def test_reshapes_keep_their_first_axes_without_computing_them() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 20]>
        split (float[b, s, 6] x) => (float[b, s, 2, 3] y, float[6, t] z)
        <int64[1] two = {2}, int64[1] three = {3}, int64[1] six = {6}, int64[1] rest = {-1}>
        {
            batch = Shape<start = 0, end = 1>(x)
            length = Shape<start = 1, end = 2>(x)
            shape = Concat<axis = 0>(batch, length, two, three)
            y = Reshape<allowzero = 1>(x, shape)
            other = Concat<axis = 0>(six, rest)
            z = Reshape(x, other)
        }
    """)
    x = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    before = run(model, x=x)
    after = passes.with_kept_axes(model)
    assert [node.op_type for node in after.graph.node] == ["Reshape", "Concat", "Reshape"]
    onnx.checker.check_model(after, full_check=True)
    for expected, got in zip(before, run(after, x=x), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_biases_of_zeros_are_left_out() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 20]>
        product (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] none = {0, 0}, float[2] some = {0, 1}>
        { h = Gemm<transB = 1>(x, w, none)
          y = Gemm<transB = 1>(h, w, some) }
    """)
    x = np.eye(2, dtype=np.float32)
    before = run(model, x=x)
    passes.without_zero_bias(model)
    assert [list(node.input) for node in model.graph.node] == [["x", "w"], ["h", "w", "some"]]
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "some"]
    np.testing.assert_array_equal(run(model, x=x), before)


def test_names_of_tensors_and_axes() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 20]>
        sum (float[a] x) => (float[a] y)
        <float[1] first = {1}, float[1] second = {1}>
        { h = Add(x, first)
          y = Add(h, second) }
    """)
    passes.with_axis(passes.with_names(model, {"first": "one", "second": "one"}), ["y"], 0, "length")
    assert [tensor.name for tensor in model.graph.initializer] == ["one"]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "length"
    np.testing.assert_array_equal(run(model, x=np.zeros(2, np.float32))[0], [2, 2])
