"""Sessions of ONNX Runtime's CUDA provider over the null CUDA; test_ort_null.py reads what they print."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from compexport.errors import CompexportError
from engines.backends import ort, ort_library, ort_provider
from engines.backends.ort_rows import rows_taken
from engines.backends.ort_values import array_of, element_type, empty_value, stored, value_of
from engines.bundle import Bundle
from engines.manifest import TensorSpec
from tests.engines import exits, steps

# Both packages are installed here, and PYTHONPATH says which one is meant.
ort_library.unavailable = lambda: ""
warnings: list[str] = []


class Heard(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warnings.append(record.getMessage())


def main(folder: Path, built: Path) -> dict[str, Any]:
    logging.getLogger("engines").addHandler(Heard())
    cuda = ctypes.CDLL("libcudart.so.13")
    cuda.null_calls.restype = ctypes.c_long
    found: dict[str, Any] = {"device": ort.device_name({"provider": "cuda-graphs"})}
    found["engines"] = [engines(folder, cuda, provider) for provider in ("cuda", "cuda-graphs")]
    found["accepted"] = accepted(built)
    found["options"] = options(folder)
    found["values"] = [moved(dtype) for dtype in ("float32", "float16", "bfloat16", "int64")]
    found["refused"] = [refused(folder, provider) for provider in ("cuda", "cuda-graphs")]
    found["branching"] = branching(folder)
    found["failing"] = failing(folder, cuda)
    return found


def engines(folder: Path, cuda: Any, provider: str) -> dict[str, Any]:
    """Cascades and step engines, three runs of the same shapes."""
    bundles = [exits.make_bundle(folder / f"exits-{provider}")]
    bundles += [steps.make_bundle(folder / f"steps-{provider}-{one}", with_exits=one) for one in (False, True)]
    before = {name: cuda.null_calls(name.encode()) for name in ("launch", "cudaStreamBeginCapture", "cudaGraphLaunch")}
    shapes, captured = {}, 0
    for number, bundle in enumerate(bundles):
        with opening() as opened:
            sessions = ort.open_sessions(bundle, threads=1, provider=provider)
        for name, session in sessions.items():
            for _ in range(3):
                outputs = session.run(exits.feeds(4))
            shapes[f"{number} {name}"] = {output: list(array.shape) for output, array in outputs.items()}
        captured += sum(session.captured for session in opened)
        for session in sessions.values():
            session.close()
    calls = {name: cuda.null_calls(name.encode()) - count for name, count in before.items()}
    return {"shapes": shapes, "captured": captured, "calls": calls}


def accepted(built: Path) -> dict[str, bool]:
    """Whether each graph of a bundle may be captured."""
    bundle = Bundle.open(built)
    opened = ort.open_graphs(bundle, list(bundle.manifest.graphs), threads=1, provider="cuda-graphs")
    return {graph: session._captures is not None for graph, session in opened.items()}


@contextmanager
def opening() -> Iterator[list[Any]]:
    """The sessions that are opened meanwhile, also those inside of others."""
    opened: list[Any] = []
    as_ever = ort._open_graph

    def open_graph(*given: Any) -> Any:
        opened.append(as_ever(*given))
        return opened[-1]

    ort._open_graph = open_graph
    yield opened
    ort._open_graph = as_ever


def options(folder: Path) -> dict[str, str]:
    """What the provider says of the options it was given."""
    session = ort.open_file(saved(folder, "add", helper.make_node("Add", ["x", "x"], ["y"])), provider="cuda-graphs")
    given = session.get_provider_options()["CUDAExecutionProvider"]
    return {name: given[name] for name in ort_provider.cuda_options(graphs=True)}


def moved(dtype: str) -> dict[str, Any]:
    """A tensor goes to the device and back; rows of it stay there."""
    number = element_type(dtype)
    array = np.arange(12).reshape(3, 4).astype("float32" if dtype == "bfloat16" else dtype)
    there = empty_value((3, 4), number, "cuda")
    there.update_inplace(stored(array, number))
    again = empty_value((3, 4), number, "cuda")
    again.update_inplace(there)
    back = rows_of(again, "cpu") if dtype == "bfloat16" else array_of(again)
    rows = rows_of(value_of(stored(array, number), number), "cuda")
    same = None if dtype == "bfloat16" else bool(np.array_equal(back, array))  # its way back is a kernel
    return {"dtype": dtype, "same": same, "rows": [rows.device_name(), rows.shape(), rows.data_type()]}


def rows_of(held: Any, into: str) -> Any:
    return rows_taken(held, np.array([2, 0]), "cuda", into)


def refused(folder: Path, provider: str) -> str:
    """A graph with a node that CUDA has no kernel for."""
    path = saved(folder, "tan", helper.make_node("Tan", ["x"], ["y"]))
    try:
        ort.open_bound("tan", entry(), path, threads=1, provider=provider)
    except CompexportError as error:
        return str(error)
    return ""


def branching(folder: Path) -> dict[str, Any]:
    """A graph with control flow runs without graphs, and says so."""
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(op, ["x", "x"], ["y"])], name, [], [y])
        for name, op in (("then", "Add"), ("else", "Mul"))
    }
    total = helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0)
    zero = helper.make_node("Constant", [], ["zero"], value_float=0.0)
    nodes = [total, zero, helper.make_node("Greater", ["total", "zero"], ["more"])]
    path = saved(folder, "branching", *nodes, helper.make_node("If", ["more"], ["y"], **branches))
    warnings.clear()
    session = ort.open_bound("branching", entry(), path, threads=1, provider="cuda-graphs")
    return {"captures": session._captures is not None, "said": list(warnings)}


def failing(folder: Path, cuda: Any) -> dict[str, Any]:
    """A capture that CUDA refuses."""
    path = saved(folder, "add", helper.make_node("Add", ["x", "x"], ["y"]))
    session = ort.open_bound("adding", entry(), path, threads=1, provider="cuda-graphs")
    warnings.clear()
    cuda.null_refuse(1)
    shapes = [list(session.run({"x": np.ones((2, 3), np.float32)})["y"].shape) for _ in range(4)]
    cuda.null_refuse(0)
    return {"shapes": shapes, "captured": session.captured, "said": list(warnings)}


def entry() -> Any:
    spec = {name: TensorSpec(name=name, dtype="float32", shape=["a", "b"]) for name in "xy"}
    return SimpleNamespace(inputs=[spec["x"]], outputs=[spec["y"]])


def saved(folder: Path, name: str, *nodes: onnx.NodeProto) -> Path:
    x, y = (helper.make_tensor_value_info(one, TensorProto.FLOAT, ["a", "b"]) for one in "xy")
    graph = helper.make_graph(list(nodes), name, [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
