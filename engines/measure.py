"""The stopwatch: things timed in turn in one run, and a record of where.

Absolute times on a shared machine are noise, ratios of things timed A B A B … are not: whatever else the machine did
meanwhile met all of them alike.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

_RECORDED = ("onnxruntime", "onnxruntime-gpu", "numpy", "torch", "transformers", "onnx")


@dataclass(frozen=True)
class Timing:
    """Latency of one call, ms."""

    p50_ms: float
    p99_ms: float
    runs: int


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    min_runs: int = 20,
    min_seconds: float = 1.0,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Call each in turn until all have ``min_runs`` runs and ``min_seconds`` have passed; warm-up is not counted."""
    clocks = {name: partial(_wall_ms, call) for name, call in callables.items()}
    times = in_turn(clocks, min_runs=min_runs, min_seconds=min_seconds, warmup=warmup)
    return {
        name: Timing(float(np.median(taken)), float(np.percentile(taken, 99)), len(taken))
        for name, taken in times.items()
    }


def in_turn(
    clocks: Mapping[str, Callable[[], float]], *, min_runs: int, min_seconds: float, warmup: int
) -> dict[str, list[float]]:
    """As ``interleave``, of things that say themselves how many ms they took: all of these, by name."""
    for _ in range(warmup):
        for clock in clocks.values():
            clock()
    times: dict[str, list[float]] = {name: [] for name in clocks}
    started = perf_counter()
    runs = 0
    while runs < min_runs or perf_counter() - started < min_seconds:
        for name, clock in clocks.items():
            times[name].append(clock())
        runs += 1
    return times


def _wall_ms(call: Callable[[], object]) -> float:
    before = perf_counter()
    call()
    return (perf_counter() - before) * 1e3


def environment() -> dict[str, Any]:
    """Processor, cores this process may use, operating system, versions: what a time depends on besides the code."""
    versions = {}
    for name in _RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's marketing name, the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
