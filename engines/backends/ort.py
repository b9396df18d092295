"""ONNX Runtime: optimise each graph once, pack its weights once for the whole family, map them into every session.

An engine folder holds ``<graph>.onnx`` (optimised, hardware-specific) and one ``weights.bin`` with every distinct
tensor, both as stored and as the processor's matrix kernels want it ("pre-packed"). Sessions memory-map that file, so
any number of ratios and processes share one copy of the weights.

On CUDA the bundle's graphs themselves are opened, which every provider runs; ``docs/cuda.md`` says what is done there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from compexport.errors import BundleError, CompexportError, InputError, describe
from engines.backends.family import known_variants, opened_graphs, opened_variants
from engines.backends.ort_bound import BoundSession
from engines.backends.ort_build import FOLDER, NAME, WEIGHTS, EngineBuilder, engine_key, instruction_set
from engines.backends.ort_captured import Captures, say_refused
from engines.backends.ort_library import first_line, make_shared_arena, require, session_options, unavailable, version
from engines.backends.ort_provider import (
    GRAPHS,
    MEMORY,
    card,
    cuda_options,
    new_session,
    require_on_device,
    require_provider,
)
from engines.backends.ort_session import OrtSession
from engines.backends.ort_values import tensor_specs
from engines.backends.trt_options import PlanOptions
from engines.bundle import Bundle
from engines.manifest import PAST, Graph
from engines.measure import processor, usable_cores
from engines.session import Session

__all__ = [
    "NAME",
    "FOLDER",
    "RUNS_HERE",
    "NOTE",
    "EngineBuilder",
    "builder",
    "engine_key",
    "instruction_set",
    "unavailable",
    "require",
    "version",
    "device_name",
    "require_provider",
    "OrtSession",
    "open_bound",
    "open_file",
    "open_graphs",
    "open_sessions",
    "shortest_text",
    "tensor_specs",
    "usable_cores",
]

RUNS_HERE = True  # what is built can be compared with PyTorch at once
NOTE = ""


def device_name(options: Mapping[str, Any]) -> str:
    """Key of this machine's latency profile: processor and threads, or the card and how it is used.

    DependencyError where there is no card to name.
    """
    provider = options.get("provider", "cpu")
    if MEMORY.get(provider) == "cuda":
        return f"{provider}-{_slug(card(provider))}"
    return f"cpu-{_slug(processor())}-{options.get('threads') or usable_cores()}t"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def builder(options: PlanOptions | None = None) -> ModuleType:
    """This module; InputError for options, which are TensorRT's."""
    if options is not None and options.given():
        raise InputError(describe(options.given()[0], got="the backend ort", expected="trt or trt-rtx"))
    require()
    return sys.modules[__name__]


# --- running -------------------------------------------------------------------------------------------------------


def shortest_text(bundle: Bundle) -> int:
    """As ``engines.session.Backend``: graphs take any length."""
    return 1


def open_sessions(
    bundle: Bundle, variants: Sequence[str] | None = None, *, threads: int | None = None, provider: str = "cpu"
) -> dict[str, Session]:
    """Sessions of the named variants (all by default); of one with exits, a ``Cascade`` of its segments.

    Those of a step engine are opened once for all of its variants, so closing one of these closes all.

    Arguments and errors as ``open_graphs``.
    """
    require_provider(provider)
    names = known_variants(bundle, variants)
    return opened_variants(bundle, names, lambda graph, name: _open_graph(bundle, graph, name, threads, provider))


def open_graphs(
    bundle: Bundle, graphs: Sequence[str], *, threads: int | None = None, provider: str = "cpu"
) -> dict[str, OrtSession]:
    """Sessions of the named graphs.

    They share one mapping of the weights. Each has ``threads`` threads (by default as many as the cores this process
    may use), which rest between runs.
    ``provider`` "cuda" runs the portable graphs on the CUDA provider and refuses to fall back to the processor;
    "cuda-graphs" also captures runs that come again as CUDA graphs, where ONNX Runtime lets it.
    Raises BundleError for an engine of another ONNX Runtime version or processor, or one that cannot be opened.
    """
    require_provider(provider)
    return opened_graphs(graphs, lambda graph, name: _open_graph(bundle, graph, name, threads, provider))


def _open_graph(bundle: Bundle, graph: str, name: str, threads: int | None, provider: str) -> OrtSession:
    """The session of a graph, which calls itself ``name`` in messages."""
    facts = bundle.manifest.graphs[graph]
    if MEMORY[provider] == "cpu":
        return OrtSession(name, facts, open_file(_engine_file(bundle, graph), threads=threads))
    return open_bound(name, facts, _graph_file(bundle, facts), threads=threads, provider=provider)


def open_bound(
    name: str, facts: Graph, path: Path, *, threads: int | None = None, provider: str, memory: str | None = None
) -> BoundSession:
    """The session of a graph's file with bound inputs and outputs; ``memory``: where instead of where ``provider`` is.

    A past grows with every token, so that no run would come again: such a graph is never captured.
    """
    place = memory or MEMORY[provider]
    wanted = provider == GRAPHS and not any(spec.name.startswith(f"{PAST}.") for spec in facts.inputs)
    inner = _capturing_session(name, path, threads, place) if wanted else None
    if inner is None:
        return BoundSession(name, facts, _plain_session(name, path, threads, place), place)
    captures = Captures(name, inner, place, lambda: _plain_session(name, path, threads, place))
    return BoundSession(name, facts, inner, place, captures)


def _capturing_session(name: str, path: Path, threads: int | None, memory: str) -> Any | None:
    """A session with CUDA graphs, or None, saying why, where ONNX Runtime refuses.

    It takes a graph without control flow whose nodes are all on the device but for arithmetic of shapes, and copies
    nothing between device and processor (microsoft/onnxruntime#16491), which is a check of its own that nothing else is
    computed on the processor.
    """
    options = session_options(threads)
    options.log_severity_level = 4  # it logs as an error what is said below
    try:
        inner = _opened(path, options, memory, cuda_options(graphs=True) if memory == "cuda" else {})
    except BundleError as error:
        if "graph capture" not in str(error):
            raise
        say_refused(name, error)
        return None
    elsewhere = [info.name for info in inner.get_input_memory_infos() if info.name.lower() != memory]
    if elsewhere:  # it would be copied there when it is bound, and no replay would copy it again
        say_refused(name, CompexportError(f"{len(elsewhere)} of its inputs are read in the memory {elsewhere[0]}"))
        return None
    return inner


def _plain_session(name: str, path: Path, threads: int | None, memory: str) -> Any:
    inner = _opened(path, session_options(threads), memory)
    if memory == "cuda":
        require_on_device(name, inner)
    return inner


def open_file(path: Path, *, threads: int | None = None, provider: str = "cpu", optimised: bool = True) -> Any:
    """A bare ``onnxruntime.InferenceSession`` over a file; ``optimised``: the file is an engine, not a graph."""
    import onnxruntime

    options = session_options(threads)
    if MEMORY[provider] == "cuda":
        return _opened(path, options, "cuda", cuda_options(graphs=provider == GRAPHS))
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    make_shared_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return _opened(path, options, "cpu")


def _opened(path: Path, options: Any, memory: str, provider_options: Mapping[str, str] | None = None) -> Any:
    try:
        return new_session(str(path), options, memory, provider_options)
    except CompexportError:
        raise
    except Exception as error:
        raise BundleError(describe(f"{path}: ONNX Runtime cannot open it", got=first_line(error))) from error


def _graph_file(bundle: Bundle, graph: Graph) -> Path:
    weights = f"{graph.path.rsplit('/', 1)[0]}/{WEIGHTS}"
    if weights in bundle.manifest.files:
        bundle.file(weights)
    return bundle.file(graph.path)


def _engine_file(bundle: Bundle, graph: str) -> Path:
    engines = [e for e in bundle.manifest.engines.values() if e.graph == graph and e.backend == NAME]
    if not engines:
        raise BundleError(describe(f"{bundle.path}: no {NAME} engine of {graph}", hint=_REBUILD))
    wanted = (version(), instruction_set())
    for engine in engines:
        if (engine.backend_version, engine.device) == wanted:
            for file in engine.files:
                bundle.file(file)
            return bundle.file(engine.path)
    engine = engines[0]
    got = f"ONNX Runtime {engine.backend_version} on {engine.device}"
    expected = f"{wanted[0]} on {wanted[1]}"
    raise BundleError(describe(f"{bundle.path}: the engine of {graph}", got=got, expected=expected, hint=_REBUILD))


_REBUILD = "build it on this machine with `compexport build`"
