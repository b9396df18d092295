"""The custom operators: eager reference, ONNX function body and a loop over single elements say the same.

Everything here is generated from the declarations in ``ops.OPS``; a new operator needs an entry in ``LOOPS`` and the
shapes of its inputs in ``_shapes``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.inliner
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from exporter import ops
from exporter.ops import MASKED_TOKEN_MERGE, OPS, TOKEN_MERGE, TOKEN_SPLIT, Op

Sizes = dict[str, int]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
sizes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "S": st.integers(1, 20),
        "k": st.integers(1, 8),
        "H": st.integers(1, 6),
        "r": st.integers(1, 5),
        "seed": st.integers(0, 2**16),
    }
)


def _shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    groups = -(-s["S"] // s["k"])
    return {
        "x": (s["B"], s["S"], s["H"]),
        "y": (s["B"], groups, s["H"]),
        "mask": (s["B"], s["S"]),
        "weight": (s["k"], s["k"] * s["H"]),
        "bias": (s["k"],),
        "down_w": (s["r"], 2 * s["H"]),
        "down_b": (s["r"],),
        "up_w": (s["H"], s["r"]),
        "up_b": (s["H"],),
    }


def _inputs(op: Op, s: Sizes) -> list[np.ndarray]:
    """Random inputs in the operator's order; the mask is any pattern of 0 and 1."""
    generator = np.random.default_rng(s["seed"])
    shapes = _shapes(s)
    made = [generator.standard_normal(shapes[name]).astype(np.float32) for name in op.inputs]
    return [
        (array > 0).astype(np.float32) if name == "mask" else array for name, array in zip(op.inputs, made, strict=True)
    ]


# --- the arithmetic, element by element ---------------------------------------------------------------------------


def _loop_merge(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, k: int) -> np.ndarray:
    return _loop_masked_merge(x, None, weight, bias, k)


def _loop_masked_merge(
    x: np.ndarray, mask: np.ndarray | None, weight: np.ndarray, bias: np.ndarray, k: int
) -> np.ndarray:
    batch, length, hidden = x.shape
    merged = np.zeros((batch, -(-length // k), hidden))
    for b in range(batch):
        for group in range(merged.shape[1]):
            tokens = np.zeros((k, hidden))
            takes_part = [mask is None] * k
            for slot in range(k):
                t = group * k + slot
                if t < length and (mask is None or mask[b, t] == 1):
                    tokens[slot] = x[b, t]
                    takes_part[slot] = True
            logits = [
                bias[j] + sum(weight[j, i * hidden + h] * tokens[i, h] for i in range(k) for h in range(hidden))
                for j in range(k)
            ]
            used = [j for j in range(k) if takes_part[j]]
            if not used:
                continue
            top = max(logits[j] for j in used)
            shares = {j: np.exp(logits[j] - top) for j in used}
            for j in used:
                merged[b, group] += shares[j] / sum(shares.values()) * tokens[j]
    return merged


def _loop_split(
    y: np.ndarray,
    x: np.ndarray,
    down_w: np.ndarray,
    down_b: np.ndarray,
    up_w: np.ndarray,
    up_b: np.ndarray,
    k: int,
) -> np.ndarray:
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            u = y[b, t // k].astype(np.float64)
            both = np.concatenate([u, x[b, t].astype(np.float64)])
            codes = [np.tanh(float(np.dot(row, both)) + bias) for row, bias in zip(down_w, down_b, strict=True)]
            for h in range(x.shape[2]):
                out[b, t, h] = u[h] + up_b[h] + sum(w * c for w, c in zip(up_w[h], codes, strict=True))
    return out


LOOPS: dict[str, Callable[..., np.ndarray]] = {
    TOKEN_MERGE.name: _loop_merge,
    MASKED_TOKEN_MERGE.name: _loop_masked_merge,
    TOKEN_SPLIT.name: _loop_split,
}

# --- one-node models ----------------------------------------------------------------------------------------------


def _model(op: Op, ratio: int, kind: int = TensorProto.FLOAT, **attributes: str) -> onnx.ModelProto:
    """A model with the operator as its only node, every axis dynamic, the function body with it."""
    node = helper.make_node(op.name, list(op.inputs), [op.output], domain=ops.DOMAIN, ratio=ratio, **attributes)
    ranks = {name: len(shape) for name, shape in _shapes({"B": 1, "S": 1, "k": 1, "H": 1, "r": 1}).items()}
    values = [helper.make_tensor_value_info(n, kind, [f"{n}{i}" for i in range(ranks[n])]) for n in op.inputs]
    result = helper.make_tensor_value_info(op.output, kind, ["B", "N", "H"])
    return helper.make_model(
        helper.make_graph([node], "one", values, [result]),
        functions=[op.function],
        opset_imports=[helper.make_opsetid("", ops.BODY_OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)],
        ir_version=10,
    )


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@cache
def _body(name: str, ratio: int) -> onnxruntime.InferenceSession:
    return _session(_model(_op(name), ratio))


@cache
def _inlined(name: str, ratio: int) -> onnxruntime.InferenceSession:
    model = onnx.inliner.inline_local_functions(_model(_op(name), ratio))
    assert not [node for node in model.graph.node if node.domain == ops.DOMAIN]
    assert not model.functions
    return _session(model)


def _op(name: str) -> Op:
    return next(op for op in OPS if op.name == name)


def _run(session: onnxruntime.InferenceSession, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
    (out,) = session.run(None, dict(zip(op.inputs, inputs, strict=True)))
    return out


def _eager(op: Op, inputs: list[np.ndarray], ratio: int) -> np.ndarray:
    return op(*map(torch.from_numpy, inputs), ratio=ratio).numpy()


# --- tests --------------------------------------------------------------------------------------------------------


@every_op
@settings(max_examples=60, deadline=None)
@given(s=sizes)
def test_reference_body_and_loop_agree(op: Op, s: Sizes) -> None:
    inputs = _inputs(op, s)
    expected = LOOPS[op.name](*inputs, s["k"])
    for got in (
        _eager(op, inputs, s["k"]),
        _run(_body(op.name, s["k"]), op, inputs),
        _run(_inlined(op.name, s["k"]), op, inputs),
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


@every_op
def test_onnx_reference_evaluator_runs_the_body(op: Op) -> None:
    inputs = _inputs(op, {"B": 2, "S": 7, "k": 3, "H": 4, "r": 2, "seed": 1})
    (got,) = ReferenceEvaluator(_model(op, 3)).run(None, dict(zip(op.inputs, inputs, strict=True)))
    np.testing.assert_allclose(got, _eager(op, inputs, 3), atol=1e-5)


@every_op
def test_body_in_half_precision(op: Op) -> None:
    inputs = _inputs(op, {"B": 2, "S": 7, "k": 3, "H": 4, "r": 2, "seed": 2})
    halves = [array.astype(np.float16) for array in inputs]
    got = _run(_session(_model(op, 3, TensorProto.FLOAT16)), op, halves)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, _eager(op, inputs, 3), atol=3e-2)


@pytest.mark.parametrize("op", [TOKEN_MERGE, MASKED_TOKEN_MERGE], ids=lambda op: op.name)
def test_weights_in_fp32_cost_an_fp32_graph_nothing(op: Op, tmp_path: Path) -> None:
    """ONNX Runtime drops the casts that are none."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(_model(op, 3).SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "Softmax" in operators and not operators & {"Cast", "CastLike"}


@pytest.mark.parametrize("length", [1, 4, 6])
def test_group_without_tokens_is_zero_and_not_nan(length: int) -> None:
    s = {"B": 2, "S": length, "k": 4, "H": 3, "r": 1, "seed": 3}
    x, mask, weight, bias = _inputs(MASKED_TOKEN_MERGE, s)
    mask = np.zeros_like(mask)
    mask[0, 0] = 1
    inputs = [x, mask, 30 * weight, bias]
    for got in (_eager(MASKED_TOKEN_MERGE, inputs, 4), _run(_body("MaskedTokenMerge", 4), MASKED_TOKEN_MERGE, inputs)):
        np.testing.assert_array_equal(got[0, 0], x[0, 0])  # a single token is taken as it is
        np.testing.assert_array_equal(got[0, 1:], 0)
        np.testing.assert_array_equal(got[1], 0)


def test_masked_merge_does_not_depend_on_what_the_mask_hides() -> None:
    s = {"B": 2, "S": 10, "k": 4, "H": 3, "r": 1, "seed": 4}
    x, mask, weight, bias = _inputs(MASKED_TOKEN_MERGE, s)
    other = np.where(mask[..., None] == 1, x, 1e3).astype(np.float32)
    before = _eager(MASKED_TOKEN_MERGE, [x, mask, weight, bias], 4)
    np.testing.assert_array_equal(_eager(MASKED_TOKEN_MERGE, [other, mask, weight, bias], 4), before)
    # ... which the official form does.
    official = [_eager(TOKEN_MERGE, [tokens, weight, bias], 4) for tokens in (x, other)]
    assert np.abs(official[0] - official[1]).max() > 1


@every_op
@pytest.mark.parametrize("length", [1, 5, 6, 7])
def test_torch_operator_has_a_true_fake_shape_and_schema(op: Op, length: int) -> None:
    overload = list(ops.translation_table())[OPS.index(op)]
    tensors = [torch.from_numpy(a) for a in _inputs(op, {"B": 2, "S": length, "k": 3, "H": 4, "r": 2, "seed": 5})]
    torch.library.opcheck(overload, (*tensors, 3), test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(overload(*tensors, 3), op(*tensors, ratio=3), rtol=0, atol=0)


@every_op
def test_model_passes_the_full_check_with_plugin_attributes(op: Op) -> None:
    ops.translation_table()  # registers the schemas
    model = _model(op, 3, plugin_namespace=ops.DOMAIN, plugin_version=str(ops.VERSION))
    onnx.checker.check_model(model, full_check=True)
    schema = onnx.defs.get_schema(op.name, ops.VERSION, ops.DOMAIN)
    assert [parameter.name for parameter in schema.inputs] == list(op.inputs)
    assert [parameter.name for parameter in schema.outputs] == [op.output]


@every_op
@pytest.mark.parametrize("spoil", ["no ratio", "unknown attribute", "input missing"])
def test_schema_refuses_a_malformed_node(op: Op, spoil: str) -> None:
    ops.translation_table()
    model = _model(op, 3)
    del model.functions[:]
    node = model.graph.node[0]
    if spoil == "no ratio":
        del node.attribute[:]
    elif spoil == "unknown attribute":
        node.attribute.append(helper.make_attribute("colour", 1))
    else:
        del node.input[-1]
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model, full_check=True)


@every_op
@pytest.mark.parametrize("length", [5, 6])
def test_gradients_of_the_reference(op: Op, length: int) -> None:
    arrays = _inputs(op, {"B": 2, "S": length, "k": 3, "H": 2, "r": 2, "seed": 6})
    tensors = [
        torch.from_numpy(array).double().requires_grad_(name != "mask")
        for name, array in zip(op.inputs, arrays, strict=True)
    ]
    op(*tensors, ratio=3).square().sum().backward()
    for name, tensor in zip(op.inputs, tensors, strict=True):
        if name != "mask":
            assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name
    assert torch.autograd.gradcheck(lambda *values: op(*values, ratio=3), tensors)
