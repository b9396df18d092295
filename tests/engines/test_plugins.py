"""The merge plugins in TensorRT's real registry: what the eager operators say, the plugins say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compexport.errors import DependencyError, InputError
from engines.backends import cuda
from engines.backends.trt_product import TENSORRT_RTX
from engines.plugins import merge, ptx
from exporter import ops, passes
from tests.engines import lean_registry

needs_registry = pytest.mark.skipif(bool(lean_registry.missing()), reason=lean_registry.missing() or "there")
TENSORS = {plugin.name: len(plugin.tensors) for plugin in merge.PLUGINS}
KINDS = ("float32", "float16", "bfloat16")
LAUNCHES = [
    {"name": name, "sizes": [2, 197, 64, 3, 5], "kind": kind}
    for name in TENSORS
    for kind in (KINDS if name == "MaskedTokenMerge" else ("float16",))
]
REFUSED = [
    ({"name": "TokenMerge", "sizes": [2, 8, 16, 2, 1], "kind": "int32"}, "merge kernels: got DataType.INT32"),
    (
        {"name": "TokenMerge", "sizes": [2, 8, 16, 2, 1], "kind": "float16", "dynamic_hidden": True},
        "dynamic hidden size",
    ),
]


def _sizes() -> list[list[int]]:
    """Thousands of [B, S, H, k, r], every remainder of S by k among them."""
    generator = np.random.default_rng(0)
    drawn = generator.integers([1, 1, 1, 1, 1], [65, 2049, 1025, 33, 65], (2000, 5)).tolist()
    return [*drawn, *([2, s, 8, k, 3] for k in range(1, 17) for s in range(1, 65))]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("registry")
    order = {"sizes": _sizes(), "launches": [*LAUNCHES, *(one for one, _ in REFUSED)], "capability": 80}
    path = folder / "order.json"
    path.write_text(json.dumps(order), encoding="utf-8")
    child = Path(__file__).with_name("plugin_child.py")
    command = [sys.executable, "-W", "ignore", child, path, folder / "answers.json"]
    environment = lean_registry.environment(folder)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return answer


def _fake_shape(op: ops.Op, B: int, S: int, k: int, H: int, r: int) -> list[int]:
    """The eager operator's output shape, from its fake kernel: no arithmetic."""
    groups = -(-S // k)
    shapes = {"x": (B, S, H), "y": (B, groups, H)}
    tensors = [torch.empty(shapes.get(name, (1,)), device="meta") for name in op.inputs]
    return list(op.fake(*tensors, k).shape)


@pytest.mark.trt
@needs_registry
def test_registry_has_the_plugins_the_nodes_ask_for(answers: dict[str, Any]) -> None:
    assert answers["creators"] == [[name, ops.DOMAIN, str(ops.VERSION)] for name in TENSORS]
    assert [[name for name, _ in fields] for fields in answers["fields"]] == [["ratio"]] * 3


@pytest.mark.trt
@needs_registry
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_shapes_are_those_of_the_eager_operator(op: ops.Op, answers: dict[str, Any]) -> None:
    got = answers["shapes"][op.name]
    sizes = _sizes()
    assert len(got) == len(sizes) > 3000
    for (B, S, H, k, r), shape in zip(sizes, got, strict=True):
        assert shape == _fake_shape(op, B, S, k, H, r), (B, S, H, k, r)


@pytest.mark.trt
@needs_registry
@pytest.mark.parametrize("order", LAUNCHES, ids=lambda order: f"{order['name']} {order['kind']}")
def test_launch_covers_every_group(order: dict[str, Any], answers: dict[str, Any]) -> None:
    got = answers["launches"][LAUNCHES.index(order)]
    assert "error" not in got, got
    batch, length, _, ratio, _ = order["sizes"]
    groups = -(-length // ratio)
    assert got["sizes"] == [length, groups, batch * groups]
    launch = got["launch"]
    assert (launch["grid_x"] - 1) * 16 < batch * groups <= launch["grid_x"] * 16
    assert (launch["grid_y"], launch["grid_z"], launch["block_x"], launch["block_y"]) == (1, 1, 128, 1)
    assert 0 <= launch["shared_mem"] <= 48 * 1024


@pytest.mark.trt
@needs_registry
@pytest.mark.parametrize("order", LAUNCHES, ids=lambda order: f"{order['name']} {order['kind']}")
def test_kernel_takes_what_tensorrt_passes(order: dict[str, Any], answers: dict[str, Any]) -> None:
    """Pointers of the inputs, the three sizes, the pointer of the output, in this order, and nothing else."""
    got = answers["launches"][LAUNCHES.index(order)]
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", got["ptx"], re.DOTALL)
    assert entry is not None and entry[1] == got["kernel"]
    kinds = re.findall(r"\.param \.(u64|u32|b64|b32)", entry[2])
    wide = ["64" in kind for kind in kinds]
    assert wide == [True] * TENSORS[order["name"]] + [False] * 3 + [True]


@pytest.mark.trt
@needs_registry
def test_all_tensors_have_one_type_and_lie_in_order(answers: dict[str, Any]) -> None:
    for order in LAUNCHES:
        got = answers["launches"][LAUNCHES.index(order)]
        tensors = TENSORS[order["name"]] + 1
        offered = [got["combinations"][at : at + tensors] for at in range(0, len(got["combinations"]), tensors)]
        assert {types[0][0] for types in offered} == {"DataType.FLOAT", "DataType.HALF", "DataType.BF16"}
        assert all(one == [types[0][0], "TensorFormat.LINEAR"] for types in offered for one in types)


@pytest.mark.trt
@needs_registry
def test_a_build_with_plugins_registers_them_before_it_parses(answers: dict[str, Any]) -> None:
    assert answers["built"] == {"before": False, "when parsing": [True], "capability": 89}


@pytest.mark.trt
@needs_registry
@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_no_kernel_can_do_is_refused(index: int, answers: dict[str, Any]) -> None:
    assert REFUSED[index][1] in answers["launches"][len(LAUNCHES) + index]["error"]


def test_plugins_are_those_of_the_operators() -> None:
    assert {op.name: len(op.inputs) for op in ops.OPS} == TENSORS
    assert (merge.NAMESPACE, merge.VERSION) == (ops.DOMAIN, str(ops.VERSION))  # noqa: SIM300


def test_registering_for_this_machine_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", list)
    with pytest.raises(DependencyError, match="registering plugins for this machine needs a CUDA device"):
        merge.register()


@pytest.mark.parametrize(
    ("device", "known"), [("sm80", 80), ("sm87", 86), ("sm89", 89), ("sm90", 90), ("sm103", 89), ("sm121", 89)]
)
def test_kernels_that_a_device_can_run(device: str, known: int) -> None:
    """PTX as Triton writes it from sm90 on (``sm_90a``) is for that device alone; before, for every later one."""
    assert ptx.capability_for(device) == known


def test_devices_before_ampere_have_no_kernels() -> None:
    with pytest.raises(InputError, match="merge kernels: got sm75, expected sm80 or newer"):
        ptx.capability_for("sm75")


# --- from the ONNX parser ---------------------------------------------------------------------------------------------

# TensorRT-RTX has the same parser and a plugin registry, but ends the process when a plugin is really made: the creator
# says what it was given, and ends it first.
PARSING = """
import os, sys
import numpy as np, tensorrt_rtx as trt

class Creator(trt.IPluginCreatorV3One):
    def __init__(self, name):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = name, "compexport", "1"
        fields = [trt.PluginField("ratio", np.array([]), trt.PluginFieldType.INT64)]
        self.field_names = trt.PluginFieldCollection(fields)

    def create_plugin(self, name, fields, phase):
        print("PLUGIN", self.name, [(f.name, f.type.name, f.data.tolist()) for f in fields], flush=True)
        os._exit(0)

if sys.argv[2] == "registered":
    creators = [Creator(name) for name in ("TokenMerge", "MaskedTokenMerge", "TokenSplit")]
    for creator in creators:
        trt.get_plugin_registry().register_creator(creator, "compexport")
log = trt.Logger(trt.Logger.INTERNAL_ERROR)
network = trt.Builder(log).create_network(0)
print("BODY" if trt.OnnxParser(network, log).parse_from_file(sys.argv[1]) else "REFUSED", flush=True)
os._exit(0)
"""


def _bound(op: ops.Op, ratio: int) -> onnx.ModelProto:
    """The operator alone, as graphs of a bundle have it."""
    x, groups = ["B", "S", 16], ["B", "M", 16]
    shapes = {"x": x, "y": groups, "mask": ["B", "S"], "weight": [ratio, ratio * 16], "bias": [ratio]}
    shapes |= {"down_w": [4, 32], "down_b": [4], "up_w": [16, 4], "up_b": [16]}
    value = onnx.helper.make_tensor_value_info
    inputs = [value(name, onnx.TensorProto.FLOAT, shapes[name]) for name in op.inputs]
    result = value("result", onnx.TensorProto.FLOAT, x if op is ops.TOKEN_SPLIT else groups)
    node = onnx.helper.make_node(op.name, list(op.inputs), ["result"], "node", domain=ops.DOMAIN)
    opsets = [onnx.helper.make_opsetid("", ops.BODY_OPSET), onnx.helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    graph = onnx.helper.make_graph([node], "one", inputs, [result])
    return passes.with_bodies(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), ratio)


@pytest.mark.trt
@pytest.mark.skipif(not TENSORRT_RTX.version(), reason="tensorrt_rtx is not installed (make test-trt)")
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_parser_hands_the_ratio_to_the_plugin_and_uses_the_body_without_one(op: ops.Op, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    onnx.save(_bound(op, 3), path)
    said = {}
    for state in ("registered", "absent"):
        command = [sys.executable, "-W", "ignore", "-c", PARSING, path, state]
        said[state] = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout.splitlines()[-1]
    assert said == {"registered": f"PLUGIN {op.name} [('ratio', 'INT32', [3])]", "absent": "BODY"}
