"""ONNX Runtime's real CUDA provider where there is no card: what it refuses, and what it does over a null CUDA.

``make test-trt`` puts its package beside the environment, because it overwrites the one for the processor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from engines.backends import cuda
from tests.engines.null_cuda import null_libraries

ROOT = Path(__file__).resolve().parents[2]
WHEEL = Path(os.environ.get("COMPEXPORT_ORT_GPU", Path(sys.prefix) / "onnxruntime-gpu"))
PROVIDER = WHEEL / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(not PROVIDER.exists(), reason="no onnxruntime-gpu beside the environment (make test-trt)"),
]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("nm")), reason="no gcc and nm to make a null CUDA with"
)
CARD = pytest.mark.skipif(bool(cuda.devices()), reason="a CUDA device is here")


def run(arguments: list[str], folder: Path, libraries: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with the package for GPUs in front of the environment's."""
    environment = {**os.environ, "PYTHONPATH": f"{WHEEL}{os.pathsep}{ROOT}", "PYTHONWARNINGS": "ignore"}
    environment |= {"LD_LIBRARY_PATH": str(libraries)} if libraries else {}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True)


@CARD
@pytest.mark.parametrize(
    ("device", "message"),
    [
        (False, "--provider cuda needs a CUDA device: got none; run it on a machine with an NVIDIA GPU and its driver"),
        (True, "ONNX Runtime's CUDA provider cannot be loaded: got libcu"),
    ],
)
def test_without_a_card_or_its_libraries_nothing_runs(tmp_path: Path, device: bool, message: str) -> None:
    """Asked as a user would; the package lists the provider either way, and would go on with the processor."""
    script = [
        "import onnxruntime, pathlib",
        "from engines.backends import cuda, ort, ort_library",
        "ort_library.unavailable = lambda: ''",
        "assert 'CUDAExecutionProvider' in onnxruntime.get_available_providers()",
        "cuda.devices = lambda: [cuda.Device(0, 'A Card', 'sm90')]" if device else "",
        "ort.require_provider('cuda')",
        "ort.open_file(pathlib.Path('no.onnx'), provider='cuda')",
    ]
    done = run(["-c", "\n".join(script)], tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"compexport.errors.DependencyError: {message}"), done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def found(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What ``null_cuda_run`` says."""
    from exporter import family

    built = tmp_path_factory.mktemp("variator") / "bundle"
    family.build(tiny("tiny-bert", "sequence-classification"), (1, 2), built, untrained=True, precision="fp16")
    libraries, folder = tmp_path_factory.mktemp("null"), tmp_path_factory.mktemp("bundles")
    null_libraries(PROVIDER, libraries)
    done = run(["-m", "tests.engines.null_cuda_run", str(folder), str(built)], folder, libraries)
    assert done.returncode == 0, done.stderr
    result: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@needs_compiler
def test_the_profile_names_the_card_and_how_it_is_used(found: Mapping[str, Any]) -> None:
    assert found["device"] == "cuda-graphs-null-card"


@needs_compiler
def test_the_provider_has_the_options_that_we_give_it(found: Mapping[str, Any]) -> None:
    expected = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0", "enable_cuda_graph": "1"}
    assert found["options"] == expected


@needs_compiler
def test_graphs_of_the_exporter_are_computed_on_the_card_and_may_be_captured(found: Mapping[str, Any]) -> None:
    """ONNX Runtime allows it only where nothing but arithmetic of shapes is on the processor."""
    assert found["accepted"] == {"r1": True, "r2": True}


@needs_compiler
def test_every_session_captures_its_shapes_once(found: Mapping[str, Any]) -> None:
    plain, graphs = found["engines"]
    assert plain["shapes"] == graphs["shapes"] and len(plain["shapes"]) == 6
    assert plain["captured"] == plain["calls"]["cudaStreamBeginCapture"] == plain["calls"]["cudaGraphLaunch"] == 0
    calls = graphs["calls"]
    assert calls["cudaStreamBeginCapture"] == graphs["captured"] > 0, "a capture each, and none again"
    assert calls["cudaGraphLaunch"] > graphs["captured"], "the runs after it launch what was captured"


@needs_compiler
def test_tensors_of_every_type_go_to_the_device_and_back(found: Mapping[str, Any]) -> None:
    kinds = {
        "float32": "tensor(float)",
        "float16": "tensor(float16)",
        "bfloat16": "tensor(bfloat16)",
        "int64": "tensor(int64)",
    }
    assert {one["dtype"]: one["rows"] for one in found["values"]} == {
        dtype: ["cuda", [2, 4], kind] for dtype, kind in kinds.items()
    }
    assert all(one["same"] is not False for one in found["values"])


@needs_compiler
def test_what_the_processor_would_compute_is_refused(found: Mapping[str, Any]) -> None:
    expected = "would compute that on the processor: got Tan, expected arithmetic of shapes only; run it with --pro"
    assert all(expected in message for message in found["refused"]), found["refused"]


@needs_compiler
def test_what_cannot_be_captured_runs_without_and_says_so(found: Mapping[str, Any]) -> None:
    (said,) = found["branching"]["said"]
    assert not found["branching"]["captures"]
    assert said.startswith("branching: runs without CUDA graphs; got as the model has control flow nodes")
    assert found["failing"] == {
        "shapes": [[2, 3]] * 4,
        "captured": 0,
        "said": ["adding: runs without CUDA graphs; got CUDA failure 900: null"],
    }
