"""TensorRT's Python bindings with NVIDIA's real plugin registry, which the lean runtime has and which needs no GPU.

All else is the core that does nothing (``null_core``): plugins can be registered, looked up and made, not built.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from tests.engines import null_core

REGISTRY = """
void* getPluginRegistry() {
  static void* lean = dlopen("libnvinfer_lean.so.11", RTLD_NOW | RTLD_LOCAL);
  auto found = lean ? reinterpret_cast<void* (*)()>(dlsym(lean, "getPluginRegistry")) : nullptr;
  return found ? found() : nullptr;
}
"""
BUILDER_REGISTRY = """
void* getPluginRegistry();
void* getBuilderPluginRegistry(int32_t) { return getPluginRegistry(); }
"""


def missing() -> str:
    """Why it cannot be used here, or an empty text."""
    for module in ("tensorrt_lean_libs", "triton"):
        if find_spec(module) is None:
            return f"{module} is not installed (make test-trt)"
    return null_core.missing()


def environment(folder: Path) -> dict[str, str]:
    """Compile the libraries into ``folder``; the environment of a process that uses them."""
    given = {**null_core.GIVEN, "getPluginRegistry": REGISTRY, "getBuilderPluginRegistry": BUILDER_REGISTRY}
    libraries = null_core.make(folder, given)
    lean = find_spec("tensorrt_lean_libs")  # found, not imported: that would load the library
    assert lean is not None and lean.origin is not None
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{libraries}:{Path(lean.origin).parent}",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
