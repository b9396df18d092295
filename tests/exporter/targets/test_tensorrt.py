"""Every rule finds the smallest graph that breaks it, and TensorRT-RTX, where installed, does what the rule says."""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.parser
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from exporter import ops
from exporter.targets.places import opened
from exporter.targets.rules import NOT_BUILT, NOT_PARSED, SEEN, TO_KNOW, Finding, findings
from exporter.targets.tensorrt import BOTH, NOT_IMPORTED, RULES, TENSORRT_RTX, tied_sizes
from exporter.trace import onnx_from_module
from tests.exporter.targets.broken import BROKEN, TAKEN, Broken, model, one

by_name = {rule.name: rule for rule in RULES}
every_break = pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.rule}: {broken.got}")
trt = pytest.mark.trt
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: make test-trt"
)


def _found(text: str) -> list[Finding]:
    return findings(RULES, opened(onnx.parser.parse_model(text)))


# Graphs that keep all rules: what is near a break and fine.
FINE = {
    "computed axes of Unsqueeze": one("a = Constant<value_ints = [1]>() b = Add(a, a) y = Unsqueeze(x, b)"),
    "cast axes of a reduction": one("a = Constant<value_floats = [1.0]>() b = Cast<to = 7>(a) y = ReduceSum(x, b)"),
    "constant axis of CumSum": one("d = Constant<value_int = 1>() y = CumSum(x, d)"),
    "TopK at the limit": model(
        "g (float[1,9000] x) => (float[1,3840] y) { k = Constant<value_ints = [3840]>() y, i = TopK(x, k) }"
    ),
    "depth from a fixed size": model(
        "g (int64[4] x, float[2] v) => (float[4,4] y) { s = Shape(x) z = Constant<value_int = 0>() "
        "d = Gather(s, z) y = OneHot(x, d, v) }"
    ),
    "uint8 as input": model("g (uint8[4,8] x) => (float[4,8] y) { y = Cast<to = 1>(x) }"),
    "a function in its own words": model(
        "g (float[4,8] x) => (float[4,8] y) { y = compexport.F(x) }\n---\nF (a) => (c) { b = Neg(a) c = Relu(b) }"
    ),
    "symmetric quantization": model(
        "g (float[4,8] x) => (float[4,8] y) <float s = {0.1}, int8 z = {0}> "
        "{ a = QuantizeLinear(x, s, z) y = DequantizeLinear(a, s, z) }"
    ),
    "equal branches": model(
        "g (bool c, float[2,4] x) => (float[2,4] y) { y = If(c) <then_branch = t () => (float[2,4] a) { a = Relu(x) }, "
        "else_branch = f () => (float[2,4] b) { b = Neg(x) }> }"
    ),
}

# Two inputs that nothing but the name of a size connects.
TIED = model("g (float[N] x, float[N] z) => (float[N] y, float[N] w) { y = Relu(x) w = Relu(z) }")
PROFILES = {
    "equal sizes": {"x": ((1,), (2,), (4,)), "z": ((1,), (2,), (4,))},
    "unequal sizes": {"x": ((1,), (2,), (4,)), "z": ((1,), (3,), (4,))},
}


@every_break
def test_rule_finds_its_smallest_break(broken: Broken) -> None:
    found = [finding for finding in _found(broken.text) if finding.rule == broken.rule]
    assert found and broken.got in found[0].got
    assert found[0].outcome == by_name[broken.rule].outcome
    assert found[0].products == by_name[broken.rule].products


@pytest.mark.parametrize("name", FINE)
def test_no_rule_speaks_where_all_is_well(name: str) -> None:
    assert _found(FINE[name]) == []


def test_every_rule_has_a_break() -> None:
    assert {rule.name for rule in RULES} == {broken.rule for broken in BROKEN}
    assert len(by_name) == len(RULES)


def test_our_operators_keep_all_rules() -> None:
    for op in ops.OPS:
        inputs = ", ".join(f"float[{', '.join(f'{name}{axis}' for axis in range(2))}] {name}" for name in op.inputs)
        inputs = inputs.replace("float[x0, x1]", "float[x0, x1, x2]").replace("float[y0, y1]", "float[x0, y1, x2]")
        text = model(
            f"g ({inputs}) => (float[A,B,C] out) {{ out = compexport.{op.name}<ratio = 3>({', '.join(op.inputs)}) }}"
        )
        made = onnx.parser.parse_model(text)
        made.functions.append(op.function)
        assert findings(RULES, opened(made)) == [], op.name


def test_sizes_of_one_name_are_listed() -> None:
    text = model("g (int64[B,N] ids, int64[B,N] mask, float[B,4] z) => (int64[B,N] y) { y = Add(ids, mask) }")
    assert tied_sizes(opened(onnx.parser.parse_model(text))) == {
        "B": ["ids[0]", "mask[0]", "z[0]"],
        "N": ["ids[1]", "mask[1]"],
    }


# --- where a break stands ---------------------------------------------------------------------------------------------


def _with_namespace(made: onnx.ModelProto, namespace: str) -> onnx.ModelProto:
    for node in made.graph.node:
        node.metadata_props.add(key="namespace", value=namespace)
    return made


def test_module_at_fault_is_named_through_functions_and_branches() -> None:
    text = model(
        """
        g (float[4,8] x, bool c) => (float[4,4000] y) { y = compexport.Outer(x, c) }
        ---
        Outer (a, c) => (b) { b = If(c) <
          then_branch = t () => (float[4,4000] p) { p = compexport.Inner(a) },
          else_branch = f () => (float[4,4000] q) { q = compexport.Inner(a) }> }
        ---
        Inner (a) => (b) { k = Constant<value_ints = [4000]>() b, i = TopK(a, k) }
        """
    )
    namespace = ": pkg.Model/encoder.layer.3: transformers.models.bert.modeling_bert.BertLayer/outer: aten.outer"
    made = _with_namespace(onnx.parser.parse_model(text), namespace)
    found = findings(RULES, opened(made))
    assert [finding.rule for finding in found] == ["topk", "topk"]
    assert {finding.module for finding in found} == {"encoder.layer.3 (BertLayer)"}
    assert {finding.function for finding in found} == {"Outer > Inner"}


@pytest.mark.parametrize(
    ("namespace", "name", "module"),
    [
        (": pkg.Model/add: aten.add.Tensor", "n", "Model"),
        ("_empty_nn_module_stack_from_metadata_hook: _empty_nn_module_stack_from_metadata_hook/s: aten.s", "n", ""),
        ("", "/encoder/layer.0/attention/MatMul", "encoder.layer.0.attention"),
        ("", "node_add_3", ""),
    ],
)
def test_module_as_tracers_write_it(namespace: str, name: str, module: str) -> None:
    made = _with_namespace(onnx.parser.parse_model(one("a = Cast<to = 5>(x) y = Cast<to = 1>(a)")), namespace)
    made.graph.node[0].name = name
    (finding,) = findings(RULES, opened(made))
    assert finding.module == module and finding.node == name and finding.operator == "Cast"


class Bits(nn.Module):
    """Keeps the lowest bit, with an operator that the parser does not have."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.bitwise_and(ids, 1)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Bits()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            input_ids = layer(input_ids)
        return input_ids.float()


def test_module_at_fault_of_a_traced_model() -> None:
    traced = onnx_from_module(Outer(), ["input_ids"], ["bits"])
    (finding,) = findings(RULES, opened(traced))
    assert (finding.rule, finding.operator, finding.module) == ("not-imported", "BitwiseAnd", "layers.1 (Bits)")


def test_a_stored_value_is_read_from_its_file(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(model("g (float[1,9000] x) => (float[1,M] y) { y, i = TopK(x, k) }"))
    made.graph.initializer.append(numpy_helper.from_array(np.array([4000]), "k"))
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert [finding.rule for finding in findings(RULES, opened(stored, tmp_path))] == ["topk"]
    assert findings(RULES, opened(stored)) == []


# --- TensorRT-RTX itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """What TensorRT-RTX did with each graph, all in one process."""
    texts: dict[Any, Broken] = dict(enumerate(BROKEN))
    texts |= {name: Broken("", text, "", TAKEN) for name, text in FINE.items()}
    texts |= {name: Broken("", TIED, "", "", profile=profile) for name, profile in PROFILES.items()}
    cases = [
        {
            "model": base64.b64encode(onnx.parser.parse_model(case.text).SerializeToString()).decode(),
            "profile": case.profile,
            "values": case.values,
        }
        for case in texts.values()
    ]
    path = tmp_path_factory.mktemp("rtx") / "cases.json"
    path.write_text(json.dumps(cases), encoding="utf-8")
    script = Path(__file__).with_name("rtx_build.py")
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", script, path], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(texts, json.loads(done.stdout), strict=True))


@trt
@needs_rtx
@every_break
def test_tensorrt_rtx_does_what_the_rule_says(broken: Broken, outcomes: dict[Any, dict[str, Any]]) -> None:
    got = outcomes[BROKEN.index(broken)]
    assert got["outcome"] == broken.rtx, got["errors"]
    assert broken.says in " ".join(got["errors"])
    assert not broken.layers or tuple(got["layers"]) == broken.layers


@trt
@needs_rtx
@pytest.mark.parametrize("name", FINE)
def test_tensorrt_rtx_builds_what_keeps_the_rules(name: str, outcomes: dict[Any, dict[str, Any]]) -> None:
    assert outcomes[name]["outcome"] == TAKEN, outcomes[name]["errors"]


@trt
@needs_rtx
def test_tensorrt_rtx_wants_tied_sizes_equal(outcomes: dict[Any, dict[str, Any]]) -> None:
    assert tied_sizes(opened(onnx.parser.parse_model(TIED))) == {"N": ["x[0]", "z[0]"]}
    assert outcomes["equal sizes"]["outcome"] == TAKEN
    assert outcomes["unequal sizes"]["outcome"] == NOT_BUILT
    assert "Dimensions with name N must be equal" in " ".join(outcomes["unequal sizes"]["errors"])


def test_what_a_rule_claims_to_have_seen_is_what_the_tests_show() -> None:
    for broken in BROKEN:
        rule = by_name[broken.rule]
        if rule.evidence == SEEN and rule.outcome in (NOT_PARSED, NOT_BUILT):
            assert TENSORRT_RTX in rule.products
            assert broken.rtx == rule.outcome, broken.rule
        elif rule.evidence == SEEN and rule.outcome != TO_KNOW:
            assert broken.rtx == TAKEN and broken.layers, broken.rule
        assert set(rule.products) <= set(BOTH)


@trt
@needs_rtx
def test_operators_without_importer_are_those_the_parser_names() -> None:
    script = """
import json, sys, onnx.defs, tensorrt_rtx as trt
log = trt.Logger(trt.Logger.INTERNAL_ERROR)
parser = trt.OnnxParser(trt.Builder(log).create_network(0), log)
names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "" and not schema.deprecated}
print(json.dumps(sorted(name for name in names if not parser.supports_operator(name))), flush=True)
import os; os._exit(0)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=100)
    assert json.loads(done.stdout.splitlines()[-1]) == sorted(NOT_IMPORTED)
