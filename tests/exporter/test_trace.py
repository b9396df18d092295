"""The one trace: what it looks like from outside, and that one serves all ratios."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import exporter
from exporter import family, trace
from tests.traces import Traces


def graphs(bundle: Path) -> list[Path]:
    return sorted(bundle.glob("graphs/*.onnx"))


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_no_path_of_this_machine_is_in_any_file(built: Callable[..., Path]) -> None:
    bundle = built("tiny-bert")
    secrets = {
        str(Path(exporter.__file__).parents[1]),
        sys.prefix,
        str(Path.home()),
        tempfile.gettempdir(),
        "site-packages",
        '.py", line',
        "pkg.torch.onnx.stack_trace",
        os.uname().nodename,
    } - {"/", "/root"}
    for path in (*graphs(bundle), *bundle.glob("engines/*/*.onnx"), bundle / "manifest.json"):
        data = path.read_bytes()
        found = [secret for secret in secrets if len(secret) > 2 and secret.encode() in data]
        assert found == [], path.name


def test_axes_and_opset(built: Callable[..., Path]) -> None:
    for path in graphs(built("tiny-bert")):
        model = onnx.load(path, load_external_data=False)
        assert {e.domain: e.version for e in model.opset_import}[""] == trace.OPSET == 20
        inputs = {value.name: axes(value) for value in model.graph.input}
        assert inputs == {key: ["batch", "sequence"] for key in ("input_ids", "attention_mask", "token_type_ids")}
        outputs = {value.name: axes(value) for value in model.graph.output}
        assert outputs["last_hidden_state"] == ["batch", "sequence", 32]
        assert outputs["sentence_embedding"] == ["batch", 32]
        assert {value.type.tensor_type.elem_type for value in model.graph.input} == {onnx.TensorProto.INT64}
        assert len(model.graph.value_info) == 0


@pytest.mark.parametrize("ratio", [2, 4])
def test_every_graph_refers_to_the_same_bytes_of_the_backbone(built: Callable[..., Path], ratio: int) -> None:
    def places(name: str) -> dict[str, tuple[tuple[str, str], ...]]:
        model = onnx.load(built("tiny-bert") / "graphs" / name, load_external_data=False)
        return {
            t.name: tuple(sorted((e.key, e.value) for e in t.external_data)) or (("raw", t.raw_data.hex()),)
            for t in model.graph.initializer
        }

    backbone, bound = places("r1.onnx"), places(f"r{ratio}.onnx")
    assert {name: place for name, place in bound.items() if "variator.plugins." not in name} == backbone
    assert sum(place[0][0] == "length" for place in backbone.values()) > 10


def test_one_trace_serves_all_ratios(tiny: Callable[..., Path], traces: Traces, tmp_path: Path) -> None:
    family.build(tiny("tiny-bert"), [2, 3, 4, 8], tmp_path / "bundle", untrained=True)
    assert len(traces.calls) == 1
