"""Our code against the real Python bindings of TensorRT 11, over a core that does nothing (``null_core``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import null_core

pytestmark = [pytest.mark.trt, pytest.mark.skipif(bool(null_core.missing()), reason=null_core.missing() or "there")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``null_core_run`` prints."""
    libraries = null_core.make(tmp_path_factory.mktemp("null-core"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.null_core_run", str(tmp_path_factory.mktemp("run"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_the_bindings_are_those_that_were_meant(found: dict[str, Any]) -> None:
    assert found["version"] == null_core.version() and int(found["version"].split(".")[0]) == 11


def test_the_bindings_want_what_the_core_has() -> None:
    assert null_core.symbols(null_core._bindings()) == [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    ]


def test_every_name_that_we_use_is_there(found: dict[str, Any]) -> None:
    # Cards are named to TensorRT-RTX only, and it makes CUDA graphs itself.
    assert found["unknown"] == ["trt.ComputeCapability", "trt.CudaGraphStrategy"]


def test_the_double_of_the_library_has_what_the_library_has(found: dict[str, Any]) -> None:
    assert found["differs"] == ["CudaGraphStrategy.DISABLED", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"]


def test_building_goes_through(found: dict[str, Any]) -> None:
    version, inputs, plugins = found["built"]
    assert (version, plugins) == (found["version"], [])
    assert inputs[0][0] == "a" and inputs[0][2] == [1, 1]
    assert (found["plan"], found["cache"]) == ("PLAN", "CACHE")


def test_refitting_and_running_go_through(found: dict[str, Any]) -> None:
    assert found["ran"] == {"out": [1, 1]}
    assert found["launched"] == 1
    assert found["left"] == 0


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (
            "outside",
            "InputError: g: shapes outside the plan: got a [3, 4], expected a [1, 1] to [2, 4]; build",
        ),
        ("failing", "CompexportError: g: the engine failed"),
        ("closed", "CompexportError: g: the engine is closed; load the bundle again"),
        ("no plan", "BuildError: no reason given"),
        ("bad profile", "BuildError: profile 0: no reason given"),
        ("no weights", "BundleError: g: its weights cannot be put into the plan: got w1"),
        ("no engine", "cannot open it"),
    ],
)
def test_what_fails_says_so(found: dict[str, Any], what: str, line: str) -> None:
    assert line in found[what] and "\n" not in found[what]
