"""A plan, opened by its library, and contexts to execute it in.

What is known of the plan was checked before (``trt.Backend.checked_plan``), so the library is asked for nothing that
could crash it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compexport.errors import BundleError, CompexportError, describe
from engines.backends.trt_plan import PlanRecord
from engines.backends.trt_product import Product

Shapes = Mapping[str, tuple[int, ...]]


class Plan:
    """An engine of the library with its runtime. ``aliases``: outputs that lie where an input does, by that input."""

    def __init__(
        self, trt: Any, product: Product, name: str, path: Path, graph: Path, record: PlanRecord, cuda_graphs: bool
    ) -> None:
        """``graph``: the ONNX file that a stripped plan gets its weights from. ``cuda_graphs``: whether the library may
        make CUDA graphs of its own, where the product does.

        Raises BundleError when the library refuses the plan or the weights.
        """
        self.name = name
        self._trt, self._lock = trt, threading.Lock()
        self._log = _logger(trt)
        self._runtime: Any = trt.Runtime(self._log)
        if record.options["version_compatible"]:
            # Such a plan brings its own small runtime, which is code: the bundle's hashes were checked.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            what = f"{path}: {record.product} {record.version} cannot open it"
            raise BundleError(describe(what, got=self._log.last_error()))
        if record.options["strip"]:
            self._refit(graph)
        self._require_device_tensors(record)
        self._config = self._context_config(product, cuda_graphs)
        self.aliases = self._aliases(record)

    def context(self, profile: int, stream: int) -> Context:
        """A new context, for one thread at a time; CompexportError when there is no memory for it."""
        with self._lock:
            if self._engine is None:
                raise CompexportError(describe(f"{self.name}: the engine is closed", hint="load the bundle again"))
            made = self._engine.create_execution_context(runtime_config=self._config)
        if made is None or not made.set_optimization_profile_async(profile, stream):
            hint = "is there memory on the device?"
            got = self._log.last_error()
            raise CompexportError(describe(f"{self.name}: no context for the engine", got=got, hint=hint))
        return Context(self.name, made, self._log)

    def close(self) -> None:
        """The engine first, then what made it; its contexts are gone."""
        with self._lock:
            self._config = None
            self._engine = None
            self._runtime = None

    def _refit(self, graph: Path) -> None:
        refitter = self._trt.Refitter(self._engine, self._log)
        parsed = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parsed.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:3])
            raise BundleError(describe(f"{self.name}: its weights cannot be put into the plan", got=missing or None))

    def _context_config(self, product: Product, cuda_graphs: bool) -> Any:
        """Contexts without scratch memory of their own: all that run after each other share one place."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if product.captures:
            strategies = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategies.DISABLED
        return config

    def _aliases(self, record: PlanRecord) -> dict[str, str]:
        found = {spec.name: self._engine.get_aliased_input_tensor(spec.name) for spec in record.outputs}
        return {output: given for output, given in found.items() if given}

    def _require_device_tensors(self, record: PlanRecord) -> None:
        """BundleError for a tensor that the library reads on the host: no graph of ours has one."""
        for spec in (*record.inputs, *record.outputs):
            if self._engine.is_shape_inference_io(spec.name):
                raise BundleError(describe(f"{self.name}: shapes depend on the values of {spec.name}"))


class Context:
    """An execution context of one profile, which is told only what it has not been told already."""

    def __init__(self, name: str, inner: Any, log: Any) -> None:
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.scratch_bytes = 0
        self._name, self._inner, self._log = name, inner, log
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def shape(self, inputs: Shapes, outputs: Sequence[str]) -> None:
        """From now on inputs have these shapes: sets ``outputs``, shapes by name, and ``scratch_bytes``."""
        changed = {name: shape for name, shape in inputs.items() if self._shapes.get(name) != shape}
        if not changed:
            return
        self._shapes = {}  # where one is refused, all are told again, and nothing that was inferred before is believed
        for name, shape in changed.items():
            if not self._inner.set_input_shape(name, shape):
                raise self._error(f"{name} {list(shape)} is refused")
        if unknown := self._inner.infer_shapes():
            raise self._error("shapes that do not follow from the inputs", got=", ".join(unknown))
        self.outputs = {name: tuple(self._inner.get_tensor_shape(name)) for name in outputs}
        if unknown := [name for name, shape in self.outputs.items() if min(shape, default=0) < 0]:
            raise self._error("shapes that depend on values", got=", ".join(unknown))
        self.scratch_bytes = int(self._inner.update_device_memory_size_for_shapes())
        self._scratch = (0, 0)  # its parts lie elsewhere now, so it is told anew
        self._shapes = dict(inputs)

    def largest_output(self, name: str) -> int:
        """Bytes of an output of the profile's largest shapes, or -1 where that is not known."""
        return int(self._inner.get_max_output_size(name))

    def place(self, addresses: Mapping[str, int], scratch: tuple[int, int]) -> None:
        """Where tensors lie, and scratch memory (address and size) that nothing else uses during the run."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._inner.set_tensor_address(name, address):
                    raise self._error(f"the address of {name} is refused")
                self._addresses[name] = address
        if scratch != self._scratch:
            self._inner.set_device_memory(*scratch)
            self._scratch = scratch

    def enqueue(self, stream: int) -> None:
        """Run, as work of the stream."""
        if not self._inner.execute_async_v3(stream):
            raise self._error("the engine failed", got="no reason")

    def _error(self, what: str, got: str | None = None) -> CompexportError:
        return CompexportError(describe(f"{self._name}: {what}", got=self._log.last_error() or got))


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong, for messages of ours; of one thread at a time what that thread did."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors = threading.local()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self._errors.last = message

        def last_error(self) -> str | None:
            """The first line of the newest error of this thread, once."""
            last = getattr(self._errors, "last", None)
            self._errors.last = None
            return last.strip().splitlines()[0] if last and last.strip() else None

    return Log()
