"""Runtimes that execute a bundle's graphs: one module each, imported on demand, all with the same functions.

``device_name(options)``, ``EngineBuilder``, ``engine_key(graph_key)``, ``open_sessions(...)``, ``unavailable() -> str``
(empty when it can be used).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from compexport.errors import InputError, describe

BACKENDS = {"ort": "engines.backends.ort"}


def available() -> dict[str, str]:
    """Every backend by name, with the reason why it cannot be used here, or an empty text."""
    return {name: str(importlib.import_module(module).unavailable()) for name, module in BACKENDS.items()}


def load(name: str) -> ModuleType:
    """The module of a backend; InputError lists the choices, DependencyError says what to install."""
    if name not in BACKENDS:
        raise InputError(describe("unknown backend", got=repr(name), expected=f"one of {', '.join(BACKENDS)}"))
    module = importlib.import_module(BACKENDS[name])
    module.require()
    return module
