"""Kernels as PTX text with what a launch needs to know; compiling takes Triton, but no GPU."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compexport.errors import CompexportError, DependencyError, InputError, describe

# Compute capability -> the oldest version of the PTX language that has it (as major * 10 + minor), for old drivers.
CAPABILITIES = {80: 80, 86: 80, 89: 80, 90: 86, 100: 86, 120: 87}
PORTABLE = 80  # PTX of this compute capability is translated for every later one,
_OWN_ALONE = 90  # that from this one on, as Triton writes it (sm_90a), only for the device itself
KINDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SIZES = ("length", "groups", "total")  # 32-bit arguments between the inputs and the output
ROWS = 16  # groups of one program
WARPS = 4
WARP_THREADS = 32
SHARED_BYTES = 48 * 1024  # what a launch may use without asking the driver for more
WIDEST, MOST_MERGED = 128, 32  # of an adapter, and of tokens in a group, that tiles hold
_TILE_BYTES = 256  # of a row of a tile
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
_STAGES = (3, 2, 1)  # loads under way at once; each costs shared memory


@dataclass(frozen=True)
class KernelShape:
    """What a kernel is compiled for. ``width``: that of the adapter, of TokenSplit alone."""

    ratio: int
    hidden: int
    width: int = 0


@dataclass(frozen=True)
class Compiled:
    """A kernel for one device. ``parameters``: how many it takes: inputs, sizes, output."""

    name: str
    ptx: str
    shared_bytes: int
    threads: int
    parameters: int


def capability_for(device: str) -> int:
    """The newest capability whose kernels a device such as "sm89" can run; InputError where there is none."""
    number = int(device.removeprefix("sm"))
    able = [known for known in CAPABILITIES if known == number or (known < number and known < _OWN_ALONE)]
    if not able:
        raise InputError(describe("merge kernels", got=device, expected=f"sm{PORTABLE} or newer"))
    return max(able)


def require_compiler() -> None:
    """DependencyError when Triton, which compiles the kernels, is not installed."""
    if find_spec("triton") is None:
        hint = "pip install 'compexport[tensorrt]' on Linux installs it"
        raise DependencyError(describe("--plugins: the package triton is missing", hint=hint))


def compiler() -> str:
    """What compiles the kernels, and from which source: whatever a plan with plugins depends on."""
    here = Path(__file__).parent
    sources = b"".join((here / name).read_bytes() for name in ("kernels.py", "merge.py", "ptx.py"))
    return f"triton {metadata.version('triton')} {hashlib.sha256(sources).hexdigest()}"


def constants(operator: str, kind: str, shape: KernelShape) -> dict[str, int]:
    """What a kernel of one shape and element type is compiled with."""
    columns = min(_power(shape.hidden), _TILE_BYTES // (4 if kind == "float32" else 2))
    known = {"RATIO": shape.ratio, "HIDDEN": shape.hidden, "ROWS": ROWS, "COLUMNS": columns}
    if operator == "token_split":
        return {**known, "WIDTH": shape.width, "CODES": _power(shape.width)}
    return {**known, "SLOTS": _power(shape.ratio)}


def _power(size: int) -> int:
    """The power of two, at least 16, that holds ``size``."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def compiled(operator: str, kind: str, shape: KernelShape, capability: int) -> Compiled:
    """Compile ``token_merge``, ``masked_token_merge`` or ``token_split`` for a compute capability such as 89.

    Raises InputError for a capability or type that there is no kernel for, CompexportError when the result could not
    be launched as TensorRT does.
    """
    if capability not in CAPABILITIES:
        choices = ", ".join(f"sm{known}" for known in CAPABILITIES)
        raise InputError(describe("merge kernels", got=f"sm{capability}", expected=f"one of {choices}"))
    if kind not in KINDS:
        raise InputError(describe("merge kernels", got=kind, expected=f"one of {', '.join(KINDS)}"))
    if shape.ratio > MOST_MERGED or shape.width > WIDEST:
        most = f"ratios to {MOST_MERGED} and adapters to {WIDEST}"
        raise InputError(describe("merge kernels", got=f"ratio {shape.ratio}, width {shape.width}", expected=most))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from engines.plugins import kernels

    function = getattr(kernels, operator)
    known = constants(operator, kind, shape)
    source = ASTSource(fn=function, **_types(function.arg_names, KINDS[kind], known))
    target = GPUTarget("cuda", capability, WARP_THREADS)
    parameters = len(function.arg_names) - len(known)
    for stages in _STAGES:
        options = {**_OPTIONS, "ptx_version": CAPABILITIES[capability], "num_stages": stages}
        made = compile_kernel(source, target=target, options=options)
        if made.metadata.shared <= SHARED_BYTES:
            return _launchable(made, parameters)
    got, most = f"{made.metadata.shared} bytes of shared memory", f"at most {SHARED_BYTES}"
    raise InputError(describe(f"merge kernel {operator} for {shape}", got=got, expected=most))


def _types(arguments: list[str], kind: str, known: Mapping[str, int]) -> dict[str, Any]:
    """Tensors are aligned to 16 bytes at least, which lets the compiler read several elements at once."""
    signature, attributes = {}, {}
    for index, name in enumerate(arguments):
        if name in known:
            signature[name] = "constexpr"
        elif name in SIZES:
            signature[name] = "i32"
        else:
            signature[name] = f"*{kind}"
            attributes[(index,)] = [["tt.divisibility", 16]]
    return {"signature": signature, "constexprs": dict(known), "attrs": attributes}


def _launchable(made: Any, parameters: int) -> Compiled:
    """TensorRT passes inputs, sizes and output; Triton appends pointers to scratch memory, which nothing may use."""
    about = made.metadata
    if about.global_scratch_size or about.profile_scratch_size:
        raise CompexportError(describe(f"kernel {about.name}", got="one with scratch memory", expected="none"))
    ptx = without_last_parameters(made.asm["ptx"], parameters)
    return Compiled(about.name, ptx, about.shared, about.num_warps * WARP_THREADS, parameters)


def without_last_parameters(ptx: str, kept: int) -> str:
    """Drop the parameters of a kernel's entry after the first ``kept``; CompexportError when one of them is read.

    .entry merge(.param .u64 a, .param .u32 n, .param .u64 scratch)   ->   .entry merge(.param .u64 a, .param .u32 n)
    """
    entry = re.search(r"(\.entry\s+\w+\s*\()(.*?)(\))", ptx, re.DOTALL)
    if entry is None:
        raise CompexportError(describe("PTX of a kernel", got="no entry", expected="one"))
    listed = [parameter.strip() for parameter in entry[2].split(",")]
    body = ptx[entry.end() :]
    for parameter in listed[kept:]:
        name = parameter.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise CompexportError(
                describe("PTX of a kernel", got=f"one that reads {name}", expected="one that does not")
            )
    if len(listed) < kept:
        raise CompexportError(describe("PTX of a kernel", got=f"{len(listed)} parameters", expected=f"{kept} at least"))
    parameters = ",\n\t".join(listed[:kept])
    return f"{ptx[: entry.start(2)]}\n\t{parameters}\n{ptx[entry.start(3) :]}"
