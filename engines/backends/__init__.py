"""Runtimes that execute a bundle's graphs, imported on demand, all with the same functions.

To run: ``NAME``, ``unavailable() -> str`` (empty when it can be used), ``require()``, ``version()``,
``device_name(options)``, ``shortest_text(bundle)``, ``open_sessions(...)``, ``open_graphs(...)``. To build:
``builder(options)``, which has ``NAME``, ``FOLDER``, ``RUNS_HERE``, ``NOTE`` (what a user should know of what is built,
if anything), ``version()``, ``engine_key(graph_key)``, ``EngineBuilder(root, folder, longest, previous)``.
"""

from __future__ import annotations

import importlib
from typing import Any

from compexport.errors import InputError, describe

# Name to module, or to "module:object" where one module serves several libraries.
BACKENDS = {"ort": "engines.backends.ort", "trt": "engines.backends.trt:TRT", "trt-rtx": "engines.backends.trt:RTX"}
# (backend, precision) that cannot be, and why not.
_LACKING = {
    ("ort", "bf16"): "ONNX Runtime's CPU provider multiplies no bf16; build it with --backend trt-rtx, or with"
    " --backend trt --recipe, and run its graphs with --provider cuda"
}


def available() -> dict[str, str]:
    """Every backend by name, with the reason why it cannot be used here, or an empty text."""
    return {name: str(_backend(name).unavailable()) for name in BACKENDS}


def load(name: str) -> Any:
    """A backend to run engines with; InputError lists the choices, DependencyError says what to install."""
    backend = _backend(name)
    backend.require()
    return backend


def builder(name: str, options: Any = None, precision: str = "fp32") -> Any:
    """What builds a backend's engines, with ``options`` of its own (``PlanOptions`` for TensorRT); errors as ``load``.

    Where TensorRT's own library is missing, this is what writes recipes instead. InputError for a ``precision`` that
    the backend does not compute in.
    """
    backend = _backend(name)
    if hint := lacking(name, precision):
        raise InputError(
            describe(f"--backend {name} with --precision", got=precision, expected="fp32 or fp16", hint=hint)
        )
    return backend.builder(options)


def lacking(name: str, precision: str) -> str:
    """Why the backend builds no engines of this precision, or an empty text."""
    return _LACKING.get((name, precision), "")


def build_command(name: str, precision: str) -> str:
    """The command that adds the backend's engines to a bundle of this precision; untold, fp32 would replace it."""
    return f"compexport build --backend {name}" + ("" if precision == "fp32" else f" --precision {precision}")


def _backend(name: str) -> Any:
    if name not in BACKENDS:
        raise InputError(describe("unknown backend", got=repr(name), expected=f"one of {', '.join(BACKENDS)}"))
    module, _, attribute = BACKENDS[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
