"""``compexport inspect --target``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest

from exporter.targets import rtx
from tests.compexport.conftest import Done
from tests.exporter.targets.broken import one

Cli = Callable[..., Done]


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_bundle_is_expected_to_parse(cli: Cli, bundle: Path, target: str) -> None:
    done = cli("inspect", "--target", target, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert document["ok"] and document["target"] == target
    assert [graph["variants"] for graph in document["graphs"]] == [[f"variator-r{r}-fp32"] for r in (1, 2, 4)]
    for graph in document["graphs"]:
        assert graph["expected"] == "to parse" and graph["findings"] == []
        assert graph["sizes"]["batch"] == ["input_ids[0]", "attention_mask[0]", "token_type_ids[0]"]
        assert (graph["parsed"] is None) == bool(rtx.unavailable())
        if graph["parsed"]:
            assert graph["parsed"]["ok"] and graph["parsed"]["outputs"] == {"logits": [-1, 2]}


def test_people_read_what_was_checked_and_what_not(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "unavailable", lambda: "tensorrt_rtx is not installed")
    done = cli("inspect", "--target", "tensorrt")
    assert done.code == 0 and "\x1b" not in done.out
    for text in ("checked for tensorrt", "to parse", "tensorrt_rtx is not installed", "no known rule is broken"):
        assert text in done.out
    assert "one size in every profile, batch: input_ids[0], attention_mask[0], token_type_ids[0]" in done.out


def test_file_that_is_expected_to_be_refused(cli: Cli, tmp_path: Path) -> None:
    made = onnx.parser.parse_model(one("a = Cast<to = 5>(x) y = Cast<to = 1>(a)"))
    made.graph.node[0].metadata_props.add(key="namespace", value=": pkg.Model/head: pkg.Head/to: aten.to")
    onnx.save(made, tmp_path / "odd.onnx")
    done = cli("inspect", "odd.onnx", "--target", "tensorrt")
    assert done.code == 1
    assert "to be not parsed" in done.out and "head (Head)" in done.out
    assert "cast: got a cast to int16, expected a type that is supported (seen with TensorRT-RTX" in done.out
    document = cli("inspect", "odd.onnx", "--target", "tensorrt", "--json").document
    (finding,) = document["graphs"][0]["findings"]
    assert not document["ok"] and document["graphs"][0]["graph"] == "odd"
    assert (finding["rule"], finding["operator"], finding["module"]) == ("cast", "Cast", "head (Head)")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--target cuda", "unknown target: got cuda, expected tensorrt or tensorrt-rtx"),
        (
            "m.onnx",
            "inspect: got m.onnx, expected the folder of a bundle; an ONNX file is checked with --target tensorrt",
        ),
        ("m.onnx --target tensorrt", "m.onnx: cannot be read as an ONNX model"),
        ("nothing --target tensorrt", "nothing"),
    ],
)
def test_one_line_for_what_cannot_be_checked(cli: Cli, tmp_path: Path, arguments: str, line: str) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    done = cli("inspect", *arguments.split())
    assert done.code == 2 and line in done.error


def test_target_may_stand_in_the_file(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "compexport.toml").write_text('[inspect]\ntarget = "tensorrt"\n', encoding="utf-8")
    assert cli("inspect", "--json").document["target"] == "tensorrt"
