"""TensorRT's Python bindings over NVIDIA's lean runtime, which has the real plugin registry and needs no GPU.

The bindings want three libraries that only a full installation has. Their few C functions are defined here: the
registry is passed on to the lean library, all others give nothing, so nothing can be built or executed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_SOURCE = r"""
#include <dlfcn.h>
#include <cstdint>
extern "C" {
void* getPluginRegistry() {
  void* lean = dlopen("libnvinfer_lean.so.11", RTLD_NOW | RTLD_LOCAL);
  auto found = lean ? reinterpret_cast<void* (*)()>(dlsym(lean, "getPluginRegistry")) : nullptr;
  return found ? found() : nullptr;
}
void* getBuilderPluginRegistry(int32_t) { return getPluginRegistry(); }
void* createInferBuilder_INTERNAL() { return nullptr; }
void* createInferRefitter_INTERNAL() { return nullptr; }
void* createInferRuntime_INTERNAL() { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
void* createNvOnnxParser_INTERNAL() { return nullptr; }
bool initLibNvInferPlugins(void*, char const*) { return true; }
int getNvOnnxParserVersion() { return 0; }
}
"""


def unavailable() -> str:
    """Why it cannot be used here, empty when it can."""
    for module in ("tensorrt", "tensorrt_bindings", "tensorrt_lean_libs", "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: make test-trt"
    if sys.platform != "linux" or shutil.which("g++") is None or shutil.which("nm") is None:
        return "needs Linux, g++ and nm"
    return ""


def _folder(module: str) -> Path:
    """A package's folder, found without importing it: that would load the libraries."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def wanted(library: Path) -> tuple[list[str], set[str]]:
    """NVIDIA's libraries that the bindings load, and the functions that they take from them."""
    headers = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    strong = re.findall(r"^\s+U (\S+)$", names, re.MULTILINE)
    system = re.compile(r"_?Py|dl(open|sym|close|error)$")
    functions = {name for name in strong if "@" not in name and not system.match(name)}
    return re.findall(r"NEEDED.*\[(libnv[^]]*)\]", headers), functions


def environment(folder: Path) -> dict[str, str]:
    """Compile the libraries into ``folder``; the environment of a process that uses them."""
    libraries, functions = wanted(_folder("tensorrt_bindings") / "tensorrt.so")
    missing = {name for name in functions if f" {name}(" not in _SOURCE}
    assert not missing, f"these bindings want more than is defined here: {missing}"
    source = folder / "registry.cpp"
    source.write_text(_SOURCE, encoding="utf-8")
    for library in libraries:
        flags = ["-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        subprocess.run(["g++", *flags, source, "-o", folder / library, "-ldl"], check=True, timeout=120)
    paths = [str(folder), str(_folder("tensorrt_lean_libs"))]
    root = str(Path(__file__).resolve().parents[2])
    triton_cache = str(folder / "triton")
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), "PYTHONPATH": root, "TRITON_CACHE_DIR": triton_cache}
