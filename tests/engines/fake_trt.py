"""A double of NVIDIA's library at run time: the objects and methods that we call, computing with ONNX Runtime.

Its plans are documents that name an ONNX graph. An execution is work of a stream of ``fake_cuda``: it reads and writes
the addresses that the context was told, and leaves rubbish in its scratch memory. What the library's documentation
forbids is a ``Misuse``: running without an address, with too little scratch memory, on a profile that shapes do not
fit, or replaying what a context recorded before it was changed.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from engines.backends.trt_profiles import Profile
from engines.manifest import TensorSpec
from tests.engines.fake_cuda import FakeCuda, Misuse, Work

DTYPES = {"bfloat16": "uint16"}
SCRATCH_PER_ELEMENT = 32


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def __init__(self) -> None:
        self.is_logger = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


def plan_bytes(graph: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], **facts: Any) -> bytes:
    """A plan. ``facts``: ``profiles``, ``stripped``, ``aliases``."""
    tensors = {
        kind: [spec.model_dump() for spec in specs] for kind, specs in (("inputs", inputs), ("outputs", outputs))
    }
    return json.dumps({"graph": str(graph), **tensors, **facts}).encode()


class RuntimeConfig:
    """Of TensorRT-RTX; TensorRT's knows no graphs."""

    def __init__(self, captures: bool) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        if captures:
            self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._captures = captures

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cuda_graph_strategy" and getattr(self, "_captures", True) is False:
            raise AttributeError(name)
        super().__setattr__(name, value)

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class Context:
    def __init__(self, engine: Engine, profile: int = 0) -> None:
        self.engine = engine
        self.version = 0  # of what it was told
        self.enqueued = -1  # the version that ran last
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self._needed: int | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._told()
        self._profile = profile_index
        self._shapes.clear()
        self.engine.cuda.give(stream_handle, Work(lambda: None))
        return profile_index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None or type(shape) is not tuple:
            raise Misuse("a shape before a profile, or no tuple")
        self._told()
        low, _, high = self.engine.profiles[self._profile][name]
        fits = len(low) == len(shape) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
        if not fits:
            self.engine.log.log(ILogger.Severity.ERROR, f"{name}: {list(shape)} is not within {low} to {high}")
            return False
        self._shapes[name] = shape
        self._needed = None
        return True

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self.engine.inputs if spec.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or self.engine.output_shapes(self._shapes)[name]

    def get_max_output_size(self, name: str) -> int:
        if self._profile is None:
            return -1
        high = {name: tuple(shapes[2]) for name, shapes in self.engine.profiles[self._profile].items()}
        spec = self.engine.spec(name)
        sizes = {a: s for i in self.engine.inputs for a, s in zip(i.shape, high[i.name], strict=True)}
        known = [axis if isinstance(axis, int) else sizes.get(axis, 0) for axis in spec.shape]
        return prod(known) * np.dtype(stored(spec)).itemsize if all(known) else -1

    def update_device_memory_size_for_shapes(self) -> int:
        self._told()
        self.memory = (0, 0)  # its parts lie elsewhere from now on
        self._needed = 256 + SCRATCH_PER_ELEMENT * sum(prod(shape) for shape in self._shapes.values())
        return self._needed

    def set_device_memory(self, memory: int, size: int) -> None:
        self._told()
        if memory % 256 or self._needed is None or size < self._needed:
            raise Misuse("scratch memory that is too small or not aligned")
        self.memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._told()
        self.engine.spec(name)
        self._addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self.engine
        if engine.failing:
            engine.log.log(ILogger.Severity.ERROR, "Error Code 1: Cask (an engine that fails)\nmore")
            return False
        if engine.strategy is ExecutionContextAllocationStrategy.USER_MANAGED and not self.memory[0]:
            raise Misuse("no scratch memory")
        if self.infer_shapes() or self._needed is None:
            raise Misuse("shapes are missing")
        self._give(stream_handle)
        self.enqueued = self.version
        return True

    def _give(self, stream: int) -> None:
        engine, shapes, addresses = self.engine, dict(self._shapes), dict(self._addresses)
        version, scratch = self.version, (self.memory[0], self._needed or 0)
        shapes |= engine.output_shapes(shapes)
        captures = engine.cuda._stream(stream).captured is not None
        if captures and self.enqueued != version:
            raise Misuse("captured before what shapes change was done by a run")
        missing = [name for name in shapes if name not in addresses]
        if missing:
            raise Misuse(f"no address of {missing[0]}")

        def run() -> None:
            engine.execute(shapes, addresses)
            engine.cuda.array(*scratch[:1], (scratch[1],), np.uint8)[:] = 0xC3

        def valid() -> None:
            if engine.is_gone or (captures and self.version != version):
                raise Misuse("a context that is gone, or was changed since it was captured")

        sizes = {n: prod(shapes[n]) * np.dtype(stored(engine.spec(n))).itemsize for n in shapes}
        reads = [(addresses[spec.name], sizes[spec.name]) for spec in engine.inputs]
        writes = [(addresses[spec.name], sizes[spec.name]) for spec in engine.outputs]
        engine.cuda.give(stream, Work(run, reads, [*writes, scratch], valid))

    def _told(self) -> None:
        self.version += 1


class Engine:
    def __init__(self, cuda: FakeCuda, log: Any, plan: Mapping[str, Any], captures: bool) -> None:
        self.cuda, self.log, self.captures = cuda, log, captures
        self.profiles: list[Profile] = plan["profiles"]
        self.inputs = [TensorSpec(**spec) for spec in plan["inputs"]]
        self.outputs = [TensorSpec(**spec) for spec in plan["outputs"]]
        self.aliases: dict[str, str] = plan.get("aliases", {})
        self.is_stripped = bool(plan.get("stripped"))
        self.failing = self.is_gone = False
        self.made: list[Context] = []
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.graph_strategy: CudaGraphStrategy | None = None
        self._graph = plan["graph"]
        self._output_shapes: dict[Any, dict[str, tuple[int, ...]]] = {}

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.captures)

    def create_execution_context(self, runtime_config: RuntimeConfig | None = None) -> Context | None:
        if self.is_stripped:
            raise Misuse("an engine without weights")
        if runtime_config is not None:
            self.strategy = runtime_config.strategy
            self.graph_strategy = getattr(runtime_config, "cuda_graph_strategy", None)
        self.made.append(Context(self))
        return self.made[-1]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def is_shape_inference_io(self, name: str) -> bool:
        return self.spec(name).name != name

    def spec(self, name: str) -> TensorSpec:
        """Of the double alone."""
        return next(spec for spec in (*self.inputs, *self.outputs) if spec.name == name)

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of the double alone: found by running zeros."""
        key = tuple(shapes[spec.name] for spec in self.inputs)
        if key not in self._output_shapes:
            zeros = {spec.name: np.zeros(shapes[spec.name], self._types[spec.name]) for spec in self.inputs}
            found = self._session.run([spec.name for spec in self.outputs], zeros)
            self._output_shapes[key] = {s.name: a.shape for s, a in zip(self.outputs, found, strict=True)}
        return self._output_shapes[key]

    def execute(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Of the double alone: read, compute, write."""
        arrays = {n: self.cuda.array(addresses[n], shapes[n], stored(self.spec(n))) for n in shapes}
        given = {s.name: _widen(arrays[s.name], s).astype(self._types[s.name]) for s in self.inputs}
        found = self._session.run([spec.name for spec in self.outputs], given)
        for spec, array in zip(self.outputs, found, strict=True):
            arrays[spec.name][...] = _narrow(array, spec)

    @cached_property
    def _types(self) -> dict[str, str]:
        """Of the graph's inputs, which is in float32 where it stands in for one in halves."""
        names = {"tensor(float)": "float32"}
        return {one.name: names.get(one.type, one.type[len("tensor(") : -1]) for one in self._session.get_inputs()}

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])


class Library:
    """In place of the module. ``captures``: it is TensorRT-RTX. ``engines``: all that were opened, newest last."""

    ILogger = ILogger
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda: FakeCuda, captures: bool) -> None:
        self.cuda, self.captures = cuda, captures
        self.engines: list[Engine] = []
        self.refused_after: int | None = None  # how many engines it opens at most
        if captures:
            self.CudaGraphStrategy = CudaGraphStrategy

    def Runtime(self, logger: ILogger) -> Any:
        if not logger.is_logger:
            raise TypeError("no logger")

        def deserialize_cuda_engine(serialized_engine: bytes) -> Engine | None:
            try:
                plan = json.loads(serialized_engine if len(self.engines) != self.refused_after else b"")
            except ValueError:
                logger.log(ILogger.Severity.ERROR, "Serialization assertion failed\nmore")
                return None
            self.engines.append(Engine(self.cuda, logger, plan, self.captures))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)

    def Refitter(self, engine: Engine, logger: ILogger) -> Any:
        found: list[str] = []

        def refit() -> bool:
            engine.is_stripped = not found
            return bool(found)

        return SimpleNamespace(found=found, refit_cuda_engine=refit, get_missing_weights=lambda: ["w1"])

    def OnnxParserRefitter(self, refitter: Any, logger: ILogger) -> Any:
        def refit_from_file(model: str) -> bool:
            if Path(model).is_file():
                refitter.found.append(model)
            return bool(refitter.found)

        return SimpleNamespace(refit_from_file=refit_from_file)


def stored(spec: TensorSpec) -> str:
    """As NumPy has what the device has."""
    return DTYPES.get(spec.dtype, spec.dtype)


def _widen(array: Any, spec: TensorSpec) -> Any:
    if spec.dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array


def _narrow(array: Any, spec: TensorSpec) -> Any:
    """Rounded towards zero."""
    if spec.dtype == "bfloat16":
        return (np.ascontiguousarray(array).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return array.astype(spec.dtype)


# --- the double against the real library ---------------------------------------------------------------------------

# What tests ask of the double, and the library does not have.
_OWN = {"spec", "output_shapes", "execute"}
_MADE = {
    "Runtime": {"deserialize_cuda_engine": ["serialized_engine"]},
    "Refitter": {"refit_cuda_engine": [], "get_missing_weights": []},
    "OnnxParserRefitter": {"refit_from_file": ["model"]},
}


def differences(library: Any) -> list[str]:
    """Methods of the double that the real library, ``library``, does not have with these arguments."""
    classes = {"IExecutionContext": Context, "ICudaEngine": Engine, "IRuntimeConfig": RuntimeConfig}
    taken = {name: _methods(kind) for name, kind in classes.items()} | _MADE
    found = [f"{name}.{m}" for name, ms in taken.items() for m, a in ms.items() if not _has(library, name, m, a)]
    for double in (ExecutionContextAllocationStrategy, CudaGraphStrategy):
        real = getattr(library, double.__name__, None)
        found += [f"{double.__name__}.{one.name}" for one in double if not hasattr(real, one.name)]
    return found


def _methods(kind: type) -> dict[str, list[str]]:
    functions = {n: f for n, f in vars(kind).items() if callable(f) and not n.startswith("_") and n not in _OWN}
    return {name: list(inspect.signature(function).parameters)[1:] for name, function in functions.items()}


def _has(library: Any, kind: str, method: str, arguments: list[str]) -> bool:
    """Whether any overload takes these arguments, by the signatures that pybind11 writes."""
    text = getattr(getattr(getattr(library, kind), method, None), "__doc__", None) or ""
    overloads = re.findall(rf"{method}\(self: [^,)]+(.*?)\) ->", text)
    return any(set(arguments) <= set(re.findall(r"(?:^|, )(\w+):", overload)) for overload in overloads)
