"""The document of a check, and the parser that may die in its own process."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest

from compexport.errors import InputError
from exporter.targets import rtx
from exporter.targets.check import Candidate, check
from exporter.targets.places import Scope, open_model, opened
from exporter.targets.tensorrt import TENSORRT, TENSORRT_RTX
from tests.exporter.targets.broken import BROKEN, model, one

TEXTS = {broken.rule: broken.text for broken in BROKEN}


def saved(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "unavailable", lambda: "not here")


@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize(
    ("rule", "product", "expected"),
    [
        ("cast", TENSORRT, "to be not parsed"),
        ("topk", TENSORRT, "to be not built"),
        ("name-of-an-operator", TENSORRT, "to be built, with another meaning"),
        ("plugin-operator", TENSORRT, "to parse"),
        ("plugin-operator", TENSORRT_RTX, "to be not parsed"),
        ("opset", TENSORRT, "to be not parsed"),
        ("opset", TENSORRT_RTX, "to parse"),
        ("branch-sizes", TENSORRT, "to parse"),
    ],
)
def test_expectation_of_each_product(tmp_path: Path, rule: str, product: str, expected: str) -> None:
    document = check([Candidate("one", saved(tmp_path, TEXTS[rule]), ("a",))], product)
    (graph,) = document["graphs"]
    assert (graph["expected"], graph["ok"], document["ok"]) == (
        expected,
        expected == "to parse",
        expected == "to parse",
    )
    assert document["parser"] is None and document["parser_missing"] == "not here"
    assert graph["graph"] == "one" and graph["variants"] == ["a"] and graph["parsed"] is None
    assert all(product in finding["products"] for finding in graph["findings"])


@pytest.mark.usefixtures("no_parser")
def test_the_earliest_of_several_failures_is_expected(tmp_path: Path) -> None:
    """Not built comes before built with another meaning."""
    nodes = "k = Constant<value_ints = [3841]>() y, i = TopK(x, k) z = com.microsoft.Relu(y)"
    path = saved(tmp_path, model(f"g (float[1,9000] x) => (float[1,K] z) {{ {nodes} }}"))
    (graph,) = check([Candidate("one", path)], TENSORRT)["graphs"]
    assert {finding["outcome"] for finding in graph["findings"]} == {"not built", "built, with another meaning"}
    assert graph["expected"] == "to be not built"


def test_a_fixed_value_is_found_at_the_end_of_any_chain() -> None:
    """Of paths that part and meet again, too, whose number doubles with each step."""
    steps = "\n".join(f"c{n + 1} = Add(c{n}, c{n})" for n in range(1500))
    text = one(f"c0 = Constant<value_ints = [1]>()\n{steps}\nu = Add(x, c1500)\ny = Abs(u)")
    scope = Scope(onnx.parser.parse_model(text).graph)
    assert scope.is_fixed("c1500") and not scope.is_fixed("y")


def refusing(path: Path) -> rtx.Parsed:
    return rtx.Parsed(False, "1.7", (rtx.Refusal("no"),), {})


@pytest.mark.parametrize(
    ("rule", "ok"),
    [("plugin-operator", True), ("branch-sizes", False)],
    ids=["a rule of TensorRT-RTX alone says why", "no rule says why"],
)
def test_refusal_that_no_rule_explains_is_not_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, ok: bool
) -> None:
    monkeypatch.setattr(rtx, "unavailable", lambda: "")
    monkeypatch.setattr(rtx, "parse", refusing)
    document = check([Candidate("one", saved(tmp_path, TEXTS[rule]))], TENSORRT)
    assert document["ok"] is ok and document["parser"] == "1.7"
    assert document["graphs"][0]["parsed"]["errors"][0]["says"] == "no"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import os; os.abort()", "died of SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 5)", "died of signal 39"),
        ("import sys; sys.exit('no such library')", "died of an error, exit code 1: no such library"),
        ("import time; time.sleep(60)", "stopped after 2 s"),
    ],
)
def test_parser_that_dies_or_hangs_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    child = tmp_path / "child.py"
    child.write_text(script, encoding="utf-8")
    monkeypatch.setattr(rtx, "CHILD", child)
    parsed = rtx.parse(tmp_path / "model.onnx", timeout_s=2 if "sleep" in script else 60)
    assert not parsed.ok and says in parsed.errors[0].says


@pytest.mark.trt
@pytest.mark.skipif(bool(rtx.unavailable()), reason=rtx.unavailable())
def test_real_parser(tmp_path: Path) -> None:
    text = model("g (float[B,4,8] x) => (float[B,4,1] y) { y = ReduceMax<keepdims = 1>(x, a) }")
    made = onnx.parser.parse_model(text)
    made.graph.initializer.append(onnx.helper.make_tensor("a", onnx.TensorProto.INT64, [1], [2]))
    onnx.save(made, tmp_path / "fine.onnx")
    parsed = rtx.parse(tmp_path / "fine.onnx")
    assert parsed.ok and parsed.outputs == {"y": [-1, 4, 1]} and parsed.version and not parsed.errors
    refused = rtx.parse(saved(tmp_path, TEXTS["call"]))
    assert not refused.ok and refused.errors[0].operator == "F"


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a"], ids=["empty", "text", "no graph"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="m.onnx: (not an|cannot be read as an) ONNX model"):
        open_model(path)


def test_function_that_calls_itself() -> None:
    text = model("g (float[4] x) => (float[4] y) { y = compexport.F(x) }\n---\nF (a) => (b) { b = compexport.F(a) }")
    with pytest.raises(InputError, match="function F: got one that calls itself"):
        opened(onnx.parser.parse_model(text))


def test_model_beyond_shape_inference_is_still_checked() -> None:
    made = onnx.parser.parse_model(one("a = Cast<to = 5>(x) y = Cast<to = 1>(a)", opset=20))
    made.opset_import[0].version = 999
    assert [place.node.op_type for place in opened(made).places] == ["Cast", "Cast"]
