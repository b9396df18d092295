"""The real Python bindings of TensorRT 11 over a core that does nothing, on a machine without GPU and library.

The bindings ask for three libraries of NVIDIA's, and for a handful of C functions in them. Here these are compiled from
a few lines of C++: every function gives the same object, every method of that object succeeds and gives it again. So
every call is resolved by the bindings' real type checks, while nothing is built and nothing is executed: this shows
that names, arguments and their types are those of this version, and nothing else.

    python -m tests.engines.null_core FOLDER     writes the libraries there and prints that folder
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from engines.backends import trt_build, trt_engine

BINDINGS = "tensorrt-cu13-bindings"

# The object lies at an address whose lower half reads 1, which is what numbers and truth values are; its table of
# methods at one whose first bytes are "a" and the end of a text. Of structures returned by value, sizes are [1, 1].
CORE = """
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <typeinfo>
namespace {
struct Tag { virtual ~Tag() = default; };
constexpr uintptr_t page = 0x7e0000000000, object = page + 1, table = page + 0x10061;
void* const self = reinterpret_cast<void*>(object);
void* method(void* first, void* second) {
  if (first != self && second == self) {
    int64_t const sizes[3] = {2, 1, 1};
    std::memcpy(first, sizes, sizeof sizes);
    return first;
  }
  return self;
}
void put(uintptr_t at, void const* value) { std::memcpy(reinterpret_cast<void*>(at), &value, sizeof value); }
bool made() {
  void* want = reinterpret_cast<void*>(page);
  int const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
  if (mmap(want, 0x20000, PROT_READ | PROT_WRITE, flags, -1, 0) != want) return false;
  put(table - 16, nullptr);
  put(table - 8, &typeid(Tag));
  for (int slot = 0; slot < 1024; ++slot) put(table + 8 * slot, reinterpret_cast<void const*>(&method));
  put(object, reinterpret_cast<void const*>(table));
  put(object + 8, self);
  return true;
}
bool const ready = made();
void* core() { return ready ? self : nullptr; }
}
extern "C" {
"""
GIVEN = {
    "initLibNvInferPlugins": "bool initLibNvInferPlugins(void*, char const*) { return true; }",
    "getNvOnnxParserVersion": "int getNvOnnxParserVersion() { return 0; }",
}


def missing() -> str:
    """Why the core cannot be made here, or an empty text."""
    if sys.platform != "linux":
        return "needs Linux"
    tools = [tool for tool in ("g++", "nm", "readelf") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}"
    if find_spec("tensorrt_bindings") is None or find_spec("tensorrt") is None:
        return "the bindings of TensorRT are not installed (make test-trt)"
    return ""


def make(folder: Path, given: Mapping[str, str] = GIVEN) -> Path:
    """Compile the libraries into ``folder``, which then belongs on LD_LIBRARY_PATH.

    ``given``: functions that do not give the object, by name.
    """
    bindings = _bindings()
    libraries = re.findall(r"NEEDED.*\[(libnv[^]]*)\]", _output("readelf", "-d", str(bindings)))
    source = folder / "core.cpp"
    functions = [given.get(name, f"void* {name}() {{ return core(); }}") for name in symbols(bindings)]
    source.write_text("\n".join([CORE, *functions, "}\n"]))
    empty = folder / "empty.cpp"
    empty.write_text("int compexport_null_core = 1;\n")
    for library in libraries:
        chosen = source if library.startswith("libnvinfer.so") else empty
        options = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{library}"]
        subprocess.run(["g++", *options, str(chosen), "-o", str(folder / library), "-ldl"], check=True)
    return folder


def symbols(bindings: Path) -> list[str]:
    """The C functions that the bindings want from NVIDIA's libraries: undefined, and of nobody else."""
    lines = _output("nm", "-D", "--undefined-only", str(bindings)).splitlines()
    names = [line.split()[-1] for line in lines if line.split()[:1] == ["U"]]
    return sorted(name for name in names if "@" not in name and not re.match(r"_?Py|dl(open|sym|close|error)$", name))


def version() -> str:
    """The bindings' version."""
    return metadata.version(BINDINGS)


def unknown_names(library: object) -> list[str]:
    """Names that our code takes from the library and that it does not have."""
    unknown = set()
    for path in (Path(trt_build.__file__), Path(trt_engine.__file__)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (chain := ast.unparse(node).removeprefix("self._")).startswith(
                "trt."
            ):
                try:
                    functools.reduce(getattr, chain.split(".")[1:], library)
                except AttributeError:
                    unknown.add(chain)
    return sorted(unknown)


def _bindings() -> Path:
    spec = find_spec("tensorrt_bindings")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("tensorrt*.so"))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
