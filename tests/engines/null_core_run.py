"""Build, refit, open and run a plan with TensorRT's real bindings over ``null_core``; prints what happened as JSON.

The core answers everything with "it worked", so a few results are put in their place: a plan's bytes, an end of a list.
Every call has gone through the bindings' own checks before.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from compexport.errors import CompexportError
from engines.backends.cuda_lanes import Lanes
from engines.backends.cuda_memory import CudaMemory
from engines.backends.trt_build import BuildError, Request, build
from engines.backends.trt_engine import Plan
from engines.backends.trt_options import PlanOptions
from engines.backends.trt_plan import PlanRecord
from engines.backends.trt_product import TENSORRT
from engines.backends.trt_session import PlanSession
from engines.manifest import Cost, Graph, Parity, TensorSpec
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_trt import differences
from tests.engines.null_core import unknown_names

# The core calls its one tensor "a".
INPUT = TensorSpec(name="a", dtype="int64", shape=["batch", "sequence"])
OUTPUT = TensorSpec(name="out", dtype="float32", shape=["batch", 1])
PROFILE = {"a": [[1, 1], [1, 1], [2, 4]]}


def steer(kind: Any, name: str, result: Any) -> None:
    """Call the bound method, with all its checks, and give ``result`` in place of what the core answers."""
    real = getattr(kind, name)
    setattr(kind, name, lambda *given, **named: (real(*given, **named), result)[1])


def refused(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (BuildError, CompexportError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def request(folder: Path, **options: Any) -> Request:
    asked = {"workspace_mib": 64, "level": 3, **options}
    return Request("tensorrt", str(folder / "g.onnx"), str(folder / "g.plan"), [PROFILE], [], **asked)


def record(**options: Any) -> PlanRecord:
    return PlanRecord(
        product="trt",
        graph="g",
        graph_key="k",
        profiles=[PROFILE],
        inputs=[INPUT],
        outputs=[OUTPUT],
        options={**PlanOptions().document(), **options},
        version=trt.__version__,
        platform="linux-x86_64",
        targets=["sm89"],
        plugins=[],
        size_bytes=4,
        sha256="0" * 64,
        build_seconds=1.0,
    )


def opened(folder: Path, **options: Any) -> Plan:
    return Plan(trt, TENSORRT, "g", folder / "g.plan", folder / "g.onnx", record(**options), True)


def run(folder: Path, facts: Graph) -> dict[str, Any]:
    """Run a plan as often as it takes to capture and to replay it, over a double of CUDA."""
    found: dict[str, Any] = {}
    steer(trt.ICudaEngine, "is_shape_inference_io", False)
    steer(trt.ICudaEngine, "get_aliased_input_tensor", None)
    steer(trt.IExecutionContext, "infer_shapes", [])
    steer(trt.IExecutionContext, "update_device_memory_size_for_shapes", 4096)
    cuda = FakeCuda()
    session = PlanSession(
        "g",
        facts,
        opened(folder, strip=True, version_compatible=True),
        [PROFILE],
        Lanes(CudaMemory(cuda)),
        cuda_graphs=True,
    )
    ones = np.ones((1, 1), np.int64)
    for _ in range(3):
        found["ran"] = {name: list(array.shape) for name, array in session.run({"a": ones}).items()}
    found["launched"] = cuda.calls.get("cudaGraphLaunch")
    found["outside"] = refused(lambda: session.run({"a": np.ones((3, 4), np.int64)}))
    steer(trt.IExecutionContext, "execute_async_v3", False)
    found["failing"] = refused(lambda: session.run({"a": np.ones((2, 4), np.int64)}))
    session.close()
    found["closed"] = refused(lambda: session.run({"a": ones}))
    found["left"] = sum(cuda.left.values())
    return found


def main(folder: Path) -> dict[str, Any]:
    (folder / "g.onnx").write_bytes(b"the core reads nothing")
    found: dict[str, Any] = {"version": trt.__version__, "unknown": unknown_names(trt), "differs": differences(trt)}
    real_build = trt.Builder.build_serialized_network
    steer(trt.Builder, "build_serialized_network", b"PLAN")
    steer(trt.ITimingCache, "serialize", b"CACHE")
    trt.OnnxParser.get_used_vc_plugin_libraries = lambda parser: []  # the core has no list to give
    stages: list[str] = []
    everything = request(
        folder,
        strip=True,
        version_compatible=True,
        without_lean=True,
        hardware_compatible=True,
        detailed=True,
        timing_cache=str(folder / "timing.cache"),
    )
    for asked in (request(folder), everything, everything):  # the last one finds the cache of the one before
        built = build(trt, asked, lambda stage, share: stages.append(stage), lambda: False)
        found["built"] = [built.version, [list(tensor) for tensor in built.inputs], built.plugins]
    found["plan"] = (folder / "g.plan").read_text()
    found["cache"] = (folder / "timing.cache").read_text()

    facts = Graph(
        path="g.onnx",
        opset=20,
        inputs=[INPUT],
        outputs=[OUTPUT],
        cost=Cost(),
        parity=Parity(max_abs=0, tolerance=1, shapes=[]),
        key="k",
    )
    found |= run(folder, facts)

    # What the library says when it cannot.
    trt.Builder.build_serialized_network = lambda *given: (real_build(*given), None)[1]
    found["no plan"] = refused(lambda: build(trt, request(folder), lambda stage, share: None, lambda: False))
    steer(trt.IBuilderConfig, "add_optimization_profile", -1)
    found["bad profile"] = refused(lambda: build(trt, request(folder), lambda stage, share: None, lambda: False))
    steer(trt.OnnxParserRefitter, "refit_from_file", False)
    trt.Refitter.get_missing_weights = lambda refitter: ["w1"]
    found["no weights"] = refused(lambda: opened(folder, strip=True) and None)
    steer(trt.Runtime, "deserialize_cuda_engine", None)
    found["no engine"] = refused(lambda: opened(folder) and None)
    return found


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # the core's objects cannot be destroyed
