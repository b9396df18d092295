"""A plan, opened: deserialised, given its weights where it was stripped of them, executed on a stream of its own.

What is known of the plan was checked before (``trt.Backend.checked_plan``), so the library is asked for nothing that
could crash it. One context per session, used by one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compexport.errors import BundleError, CompexportError, InputError, describe
from engines.backends.trt_plan import PlanRecord
from engines.backends.trt_profiles import Profile
from engines.manifest import Graph
from engines.session import Array, Session


class DeviceMemory(Protocol):
    """Memory and order of work on a GPU; addresses and streams are whole numbers. Sizes in bytes."""

    def stream(self) -> int:
        """A stream of its own, never the default one."""

    def allocate(self, size: int) -> int:
        """The address of so much new memory."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array to the device."""

    def download(self, array: Array, address: int, stream: int) -> None:
        """Copy from the device into a contiguous array, which is whole after ``wait``."""

    def wait(self, stream: int) -> None:
        """Return when all work of the stream is done."""


class Plan:
    """An engine of the library with its runtime. ``graph`` is the ONNX file that a stripped plan is refitted from."""

    def __init__(self, trt: Any, name: str, path: Path, graph: Path, record: PlanRecord) -> None:
        """Raises BundleError when the library refuses the plan or the weights."""
        self.name = name
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime: Any = trt.Runtime(self._log)
        if record.options["version_compatible"]:
            # Such a plan brings its own small runtime, which is code: the bundle's hashes were checked.
            self._runtime.engine_host_code_allowed = True
        self.engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise BundleError(describe(f"{path}: {record.product} {record.version} cannot open it"))
        if record.options["strip"]:
            self._refit(trt, graph)

    def _refit(self, trt: Any, graph: Path) -> None:
        refitter = trt.Refitter(self.engine, self._log)
        parsed = trt.OnnxParserRefitter(refitter, self._log)
        if not parsed.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:3])
            raise BundleError(describe(f"{self.name}: its weights cannot be put into the plan", got=missing or None))

    def close(self) -> None:
        """The engine first, then what made it."""
        self.engine = None
        self._runtime = None


class PlanSession(Session):
    """Runs one plan. Buffers on the device grow to the largest request and stay."""

    def __init__(self, name: str, graph: Graph, plan: Plan, profiles: Sequence[Profile], memory: DeviceMemory) -> None:
        super().__init__(name, graph.inputs, graph.outputs)
        self._plan, self._profiles, self._memory = plan, list(profiles), memory
        self._context: Any = plan.engine.create_execution_context()
        if self._context is None:
            raise CompexportError(describe(f"{name}: no context for the engine", hint="is there memory on the device?"))
        self._stream = memory.stream()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        with self._lock:
            if self._context is None:
                raise CompexportError(describe(f"{self.name}: the engine is closed", hint="load the bundle again"))
            self._context.set_optimization_profile_async(self._profile_of(feeds), self._stream)
            given = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
            for name, array in given.items():
                self._context.set_input_shape(name, tuple(array.shape))
                self._memory.upload(self._place(name, array.nbytes), array, self._stream)
            outputs = self._outputs()
            if not self._context.execute_async_v3(self._stream):
                raise CompexportError(describe(f"{self.name}: the engine failed", got="no reason; see its log above"))
            for name in names:
                self._memory.download(outputs[name], self._buffers[name][0], self._stream)
            self._memory.wait(self._stream)
            return [outputs[name] for name in names]

    def _outputs(self) -> dict[str, Array]:
        """Empty arrays of the outputs' shapes, with a place on the device for each."""
        if unknown := self._context.infer_shapes():
            raise CompexportError(describe(f"{self.name}: shapes that do not follow from the inputs", got=unknown))
        arrays = {}
        for spec in self.outputs:
            arrays[spec.name] = np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            self._place(spec.name, arrays[spec.name].nbytes)
        return arrays

    def _profile_of(self, feeds: Mapping[str, Array]) -> int:
        for number, profile in enumerate(self._profiles):
            if all(_within(feeds[name].shape, *shapes) for name, shapes in profile.items()):
                return number
        got = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        expected = " or ".join(
            ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in profile.items())
            for profile in self._profiles
        )
        hint = "build the plan for these shapes with --batch and --length"
        raise InputError(describe(f"{self.name}: shapes outside the plan", got=got, expected=expected, hint=hint))

    def _place(self, name: str, size: int) -> int:
        """An address for a tensor, which the context is told; one for no elements is an address too."""
        address, there = self._buffers.get(name, (0, 0))
        if there < max(size, 1):
            if address:
                self._memory.wait(self._stream)
                self._memory.free(address)
            address, there = self._memory.allocate(max(size, 1)), max(size, 1)
            self._buffers[name] = address, there
        self._context.set_tensor_address(name, address)
        return address

    def close(self) -> None:
        """Context, engine and runtime, in this order; a run that has begun ends as it would."""
        with self._lock:
            if self._context is None:
                return
            self._context = None
            self._plan.close()
            for address, _ in self._buffers.values():
                self._memory.free(address)
            self._buffers.clear()


def _within(shape: Sequence[int], low: Sequence[int], usual: Sequence[int], high: Sequence[int]) -> bool:
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )
