"""CUDA's libraries without a card, made for one library that wants them: ``null_cuda.c``, compiled.

So ONNX Runtime's real CUDA provider loads, divides graphs between itself and the processor, copies, captures and
launches, all but computes. What it would compute is not in any output.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
LIBRARIES = ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcuda.so.1")
CUDNN = "libcudnn.so.9"  # asked for by name while it runs
_THEIRS = re.compile(r"(cu[A-Z]|cuda|__cuda|cublas|curand|cudnn[A-Z])\w*")


def null_libraries(wanting: Path, folder: Path) -> None:
    """Write the libraries that the library ``wanting`` needs into ``folder``."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(wanting)], check=True, capture_output=True, text=True)
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    names |= {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", wanting.read_bytes())}
    there = set(re.findall(r"^\S.*?\b(\w+)\([^;]*\{", SOURCE.read_text(), re.MULTILINE))
    missing = sorted(name for name in names - there if _THEIRS.fullmatch(name))
    source = folder / "all.c"
    source.write_text(SOURCE.read_text() + "".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    for name in (*LIBRARIES, CUDNN):
        versions = folder / "versions"
        versions.write_text(f"{name} {{ global: *; }};")
        shared = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
        subprocess.run(["gcc", *shared, str(source), "-o", str(folder / name)], check=True)
