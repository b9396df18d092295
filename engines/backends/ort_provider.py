"""The providers of ONNX Runtime that we use, and that a session computes on the one that was asked for.

ONNX Runtime would rather compute elsewhere than not at all, in four ways, seen in 1.31 (its Python package, and its
binaries on a machine without a GPU). Each is refused here:

- ``onnxruntime-gpu`` lists the CUDA provider where there is neither a card nor CUDA. So the driver is asked first.
- A provider whose libraries cannot be loaded is left out of a session, with a line on stderr. So its libraries are
  loaded before, and the session is asked for its providers after.
- ``InferenceSession`` makes itself again on the processor when a provider fails at its making or in a run, and prints
  so. ``enable_fallback=0`` makes it raise instead.
- Nodes that the provider has no kernel for are put on the processor. ``session.disable_cpu_ep_fallback`` would refuse
  them, but it refuses every node that is there (microsoft/onnxruntime#16016), also the arithmetic of shapes, which ONNX
  Runtime puts there on purpose, because shapes lie there (#4940). So we ask where each node is
  (``session.record_ep_graph_assignment_info``, #26781) and refuse what is no arithmetic of shapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compexport.errors import CompexportError, DependencyError, InputError, describe
from engines.backends import cuda
from engines.backends.ort_library import first_line, require

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What users call a provider, and where it computes. "cuda-graphs": on CUDA, repeating runs captured as CUDA graphs.
MEMORY = {"cpu": "cpu", "cuda": "cuda", "cuda-graphs": "cuda"}
PROVIDERS = {"cpu": CPU, "cuda": CUDA}  # by memory
GRAPHS = "cuda-graphs"
_GPU_EXTRA = "install compexport[gpu] instead of compexport[cpu]"

# What arithmetic of shapes is made of. All of these have CUDA kernels for the types that models compute in, so those on
# the processor have their inputs there.
SHAPE_OPS = frozenset(
    (
        *("Shape", "Size", "Constant", "ConstantOfShape", "Range", "Identity", "Cast", "Gather", "GatherElements"),
        *("Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Tile", "Where", "Equal", "Less"),
        *("LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "Add", "Sub", "Mul", "Div", "Mod", "Neg"),
        *("Abs", "Min", "Max", "Floor", "Ceil", "ReduceProd", "ReduceMin", "ReduceMax", "ReduceSum"),
    )
)


def require_provider(provider: str) -> None:
    """InputError for an unknown provider, DependencyError when ONNX Runtime or this machine lacks it."""
    require()
    import onnxruntime

    if provider not in MEMORY:
        raise InputError(describe("unknown provider", got=repr(provider), expected=f"one of {', '.join(MEMORY)}"))
    name = PROVIDERS[MEMORY[provider]]
    if name not in onnxruntime.get_available_providers():
        raise DependencyError(describe(f"this ONNX Runtime has no {name}", hint=_GPU_EXTRA))
    if MEMORY[provider] == "cuda":
        cuda.require_device(f"--provider {provider}")


def card(provider: str) -> str:
    """The name of the card that sessions of a provider on CUDA use, the first; errors as ``require_provider``."""
    require_provider(provider)
    return cuda.devices()[0].name


@cache
def require_libraries() -> None:
    """Load what the CUDA provider needs, also out of NVIDIA's packages; DependencyError names what is missing."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, needed or not
        onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        hint = f"pip install 'onnxruntime-gpu[cuda,cudnn]', or install CUDA {onnxruntime.cuda_version} and cuDNN 9"
        raise DependencyError(
            describe("ONNX Runtime's CUDA provider cannot be loaded", got=first_line(error), hint=hint)
        ) from error


def cuda_options(*, graphs: bool) -> dict[str, str]:
    """Options of the CUDA provider; ``graphs``: with CUDA graphs.

    An arena that grows by what is asked for, not by powers of two, because a family has many of them; and fp32 that is
    fp32, not TF32: who wants less builds with --precision fp16.
    """
    return {
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "enable_cuda_graph": "1" if graphs else "0",
    }


def new_session(
    model: str | bytes, options: Any, memory: str, provider_options: Mapping[str, str] | None = None
) -> Any:
    """An ``onnxruntime.InferenceSession`` of a file or a model's bytes, on the provider of ``memory`` or not at all.

    DependencyError when the provider does not come with it; what else ONNX Runtime raises passes.
    """
    import onnxruntime

    if memory == "cuda":
        require_libraries()
    provider = PROVIDERS[memory]
    extra = dict(
        provider_options if provider_options is not None else cuda_options(graphs=False) if memory == "cuda" else {}
    )
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1" if memory == "cuda" else "0")
    session = onnxruntime.InferenceSession(model, options, providers=[(provider, extra)], enable_fallback=0)
    if provider not in session.get_providers():
        got = ", ".join(session.get_providers())
        raise DependencyError(describe(f"the session has no {provider}", got=got, hint="stderr says what kept it out"))
    return session


def require_on_device(name: str, session: Any) -> None:
    """CompexportError when a session was given nodes on the processor that are no arithmetic of shapes.

    ``session`` was made with ``session.record_ep_graph_assignment_info``; without, it says nothing of its nodes.
    """
    nodes = [
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == CPU
        for node in part.get_nodes()
    ]
    if computing := sorted(set(nodes) - SHAPE_OPS):
        what = f"{name}: ONNX Runtime has no CUDA kernel for a part of it and would compute that on the processor"
        hint = "run it with --provider cpu"
        raise CompexportError(describe(what, got=", ".join(computing), expected="arithmetic of shapes only", hint=hint))
