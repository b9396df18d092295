"""One TensorRT plan from one ONNX graph, in a process of its own: ``python -m engines.backends.trt_build``.

A compiler that aborts takes its process along, and what one build leaves behind in the library changes the next one's
bytes; so every plan gets a fresh process. It reads one request, a line of JSON, from its standard input, and writes
events, a line of JSON each, to its standard output. The end of its input cancels the build.

``build`` is the same for TensorRT and TensorRT-RTX: it takes their module as an argument.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.backends.trt_profiles import Profile
from engines.plugins import merge

MIB = 1 << 20
_FIXED = "--fixed-addresses"
_QUERY, _NO_RANDOM_ADDRESSES = 0xFFFFFFFF, 0x0040000  # of personality(2)
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "BOOL": "bool",
}

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Request:
    """What to build. ``targets`` and ``timing_cache`` are for those of the two products that know them.

    ``without_lean``: a version-compatible plan leaves out the small runtime that would execute it. ``plugins``: compute
    capability that kernels of the merge operators are compiled for; None has their bodies compiled instead.
    """

    module: str
    graph: str
    plan: str
    profiles: list[Profile]
    targets: list[str]
    workspace_mib: int | None = None
    level: int | None = None
    strip: bool = False
    version_compatible: bool = False
    without_lean: bool = False
    hardware_compatible: bool = False
    detailed: bool = False
    plugins: int | None = None
    timing_cache: str | None = None


@dataclass(frozen=True)
class Built:
    """What the library says of the network it has compiled; shapes have None where they are dynamic."""

    version: str
    inputs: list[tuple[str, str, list[int | None]]]
    outputs: list[tuple[str, str, list[int | None]]]
    plugins: list[str]
    seconds: float


class BuildError(Exception):
    """The library refuses the graph or its profiles. ``cancelled``: because it was told to stop."""

    def __init__(self, message: str, cancelled: bool = False) -> None:
        super().__init__(message)
        self.cancelled = cancelled


def build(trt: Any, request: Request, report: Report, cancelled: Callable[[], bool]) -> Built:
    """Write the plan to ``request.plan``; raises BuildError, and then writes nothing.

    ``report`` gets the stage and how much of the build is done, 0 to 1; ``cancelled`` is asked at every step of it.
    """
    started = time.perf_counter()
    if request.plugins is not None:
        merge.register(request.plugins)  # before the parser looks for them
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)  # owns the weights: kept until the plan is built
    report("parsing", 0.0)
    if not parser.parse_from_file(request.graph):
        raise BuildError(_parse_errors(parser) or log.first_error() or "no reason given")
    config = builder.create_builder_config()
    _configure(trt, config, request, parser)
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    for number, profile in enumerate(request.profiles):
        if profile.keys() != inputs:
            raise BuildError(f"profile {number} of {', '.join(sorted(profile))}, expected {', '.join(sorted(inputs))}")
        _add_profile(builder, config, profile, number, log)
    cache = _load_timing_cache(config, request.timing_cache, log)
    monitor = _monitor(trt, report, cancelled)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if monitor.stopped:
            raise BuildError("cancelled", cancelled=True)
        raise BuildError(log.first_error() or "no reason given")
    Path(request.plan).write_bytes(memoryview(plan))
    if cache is not None and request.timing_cache is not None:
        Path(request.timing_cache).write_bytes(bytes(cache.serialize()))
    return Built(
        version=str(trt.__version__),
        inputs=[_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        outputs=[_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        plugins=_plugins(network),
        seconds=time.perf_counter() - started,
    )


def _configure(trt: Any, config: Any, request: Request, parser: Any) -> None:
    flags = {
        "STRIP_PLAN": request.strip,
        "REFIT_IDENTICAL": request.strip,
        "VERSION_COMPATIBLE": request.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": request.version_compatible and request.without_lean,
    }
    for name, wanted in flags.items():
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
    if request.version_compatible:
        config.plugins_to_serialize = parser.get_used_vc_plugin_libraries()
    if request.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib * MIB)
    if request.level is not None:
        config.builder_optimization_level = request.level
    if request.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.targets:
        _set_targets(trt, config, request.targets)


def _set_targets(trt: Any, config: Any, targets: list[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None or not config.set_compute_capability(capability, index):
            known = ", ".join(name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
            raise BuildError(f"no compute capability {target}, one of {known}")


def _add_profile(builder: Any, config: Any, profile: Profile, number: int, log: Any) -> None:
    made = builder.create_optimization_profile()
    for name, (low, usual, high) in profile.items():
        made.set_shape(name, tuple(low), tuple(usual), tuple(high))
    if config.add_optimization_profile(made) < 0:
        raise BuildError(f"profile {number}: {log.first_error() or 'no reason given'}")


def _load_timing_cache(config: Any, path: str | None, log: Any) -> Any:
    """Kernels timed for one graph need not be timed again for the next; None where no cache is kept.

    One of another version or device is refused, and then begun anew.
    """
    if path is None:
        return None
    kept = Path(path).read_bytes() if Path(path).is_file() else b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        log.errors.clear()  # it is no reason for what fails later
    return None


def _parse_errors(parser: Any) -> str:
    """The first thing the parser did not take: operator, node, where it stands and why."""
    for error in map(parser.get_error, range(parser.num_errors)):
        calls = " in ".join(error.local_function_stack())
        where = f" in {calls}" if calls else ""
        node = " ".join(filter(None, (error.node_operator() or "the graph", error.node_name())))
        # Of an operator that it does not know, a parser may only say that a condition is false.
        return f"{node}{where}: {_words(error.code().name)}" + (f", {error.desc()}" if error.desc() != "false" else "")
    return ""


def _words(constant: str) -> str:
    return constant.lower().replace("_", " ")


def _tensor(tensor: Any) -> tuple[str, str, list[int | None]]:
    name = tensor.dtype.name
    return tensor.name, _DTYPES.get(name, name.lower()), [None if size < 0 else int(size) for size in tensor.shape]


def _plugins(network: Any) -> list[str]:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sorted({layer.name for layer in layers if layer.type.name.startswith("PLUGIN")})


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong; a library prints much that is none of the user's business."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def first_error(self) -> str:
            return self.errors[0] if self.errors else ""

    return Log()


def _monitor(trt: Any, report: Report, cancelled: Callable[[], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases are nested: the share that is done is that of the outermost, of which an inner one is a step.

        The library's threads may call it at the same time.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self._phases: dict[str, list[int]] = {}
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = [0, max(1, num_steps)]
                self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    self._phases[phase_name][0] = step + 1
                self._tell(phase_name)
                self.stopped = self.stopped or cancelled()
                return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _tell(self, phase_name: str) -> None:
            """Of every step: what is told now and then only, by the clock, moves memory as the clock has it."""
            report(phase_name, self._share())

        def _share(self) -> float:
            share = 0.0
            for done, steps in reversed(self._phases.values()):
                share = min(1.0, (done + share) / steps)
            return share

    return Monitor()


# --- the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Serve the one request of this process; its events are ``stage``, then ``built`` or ``failed``."""
    if _FIXED not in sys.argv:
        _fix_addresses()
    # The library's native code prints; what it prints goes to the standard error.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    request = Request(**json.loads(sys.stdin.readline()))
    if request.targets:  # TensorRT times kernels, so that its plans differ anyway
        _take_turns()
    stop = threading.Event()
    threading.Thread(target=_await_end, args=(stop,), daemon=True).start()
    try:
        trt = importlib.import_module(request.module)
        built = build(trt, request, lambda stage, share: emit(stage=stage, share=share), stop.is_set)
        emit(built=asdict(built))
    except BuildError as error:
        emit(failed=str(error), cancelled=error.cancelled)
    except Exception as error:
        emit(failed=f"{type(error).__name__}: {error}", cancelled=False)
    events.close()
    # The library's objects may not outlive its own exit handlers.
    os._exit(0)


def _fix_addresses() -> None:
    """On Linux, start this process anew with the same memory addresses every time, where that is allowed.

    The compiler puts outputs of a graph that has several in an order that follows from addresses: without this, about
    one plan in ten of such a graph has other bytes than the rest. Lengths of paths and of the environment move
    addresses too: ``trt_process`` keeps them equal.
    """
    if sys.platform != "linux":
        return
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    now = personality(_QUERY)
    if now >= 0 and personality(now | _NO_RANDOM_ADDRESSES) >= 0:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "engines.backends.trt_build", _FIXED])


def _take_turns() -> None:
    """On Linux, keep to one processor: the library's threads then free and take memory in one order, not in a race.

    They compute next to nothing: the thread that compiles has nine tenths of the work.
    """
    if sys.platform == "linux":
        here = ctypes.CDLL(None).sched_getcpu()
        with suppress(OSError):
            os.sched_setaffinity(0, {here})


def _await_end(stop: threading.Event) -> None:
    """Set ``stop`` when whoever asked for the plan is gone or wants it no more."""
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
