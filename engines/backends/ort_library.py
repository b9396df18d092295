"""ONNX Runtime itself: which of its packages is installed, and how a session of it is set up."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

from compexport.errors import DependencyError, describe
from engines.measure import usable_cores


def unavailable() -> str:
    """Why ONNX Runtime cannot be used, or an empty text."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version_of(name)]
    if not installed:
        return describe("onnxruntime is missing", hint="pip install 'compexport[cpu]' or 'compexport[gpu]'")
    if len(installed) == 2:
        return describe(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            hint="pip uninstall both, then install one of them",
        )
    return ""


def require() -> None:
    """DependencyError when ONNX Runtime cannot be used."""
    reason = unavailable()
    if reason:
        raise DependencyError(reason)


def version() -> str:
    """The installed ONNX Runtime's version."""
    return _version_of("onnxruntime") or _version_of("onnxruntime-gpu")


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def session_options(threads: int | None) -> Any:
    """Options of a session that computes with ``threads`` threads (None: all usable cores), which rest between runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    # Without this, a session's threads spin on after a run and take cores from the family's next member. A pool shared
    # by all sessions would do as well, but then no other user of ONNX Runtime in the process could have its own.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


@cache
def make_shared_arena() -> None:
    """One arena, for as long as the process lives, in which all our sessions compute.

    Otherwise each would keep one of its own, as large as its largest run needed. Other users of ONNX Runtime in the
    process are left alone, unless they ask for a shared arena too.
    """
    import onnxruntime

    arena = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg({}))


def first_line(error: BaseException) -> str:
    """What an error says, without what follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
