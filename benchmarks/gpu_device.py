"""The device that the GPU's benchmark runs on: its clock, ceilings and name. "cpu" stands in where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from benchmarks.gpu_judge import Ceilings
from engines.measure import environment, in_turn

# Names of precisions in PyTorch.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Device:
    """``name``: "cuda" or "cpu"."""

    def __init__(self, name: str) -> None:
        """SystemExit where PyTorch finds no such device. On "cpu" Triton interprets kernels, if it is there."""
        if name == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        import torch

        if name == "cuda" and not torch.cuda.is_available():
            raise SystemExit(
                f"torch {torch.__version__} finds no CUDA device; --device cpu runs everything without one"
            )
        self.name = name
        self.torch: Any = torch

    @property
    def is_cuda(self) -> bool:
        """Whether it is a card."""
        return self.name == "cuda"

    @cached_property
    def card(self) -> str:
        """What it is called."""
        return str(self.torch.cuda.get_device_name()) if self.is_cuda else "cpu"

    def environment(self) -> dict[str, Any]:
        """That of ``engines.measure``, with card, driver, CUDA and the date."""
        found = {**environment(), "date": time.strftime("%Y-%m-%d"), "card": self.card}
        if self.is_cuda:
            found |= {"driver": _driver(), "cuda": self.torch.version.cuda}
            found["memory_gib"] = round(self.torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        return found

    def synchronize(self) -> None:
        """Wait for all that was asked of the device."""
        if self.is_cuda:
            self.torch.cuda.synchronize()

    def wall_ms(self, call: Callable[[], object]) -> float:
        """How long a call takes whoever waits for its result, copies and launches included."""
        self.synchronize()
        before = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - before) * 1e3

    def device_ms(self, call: Callable[[], object]) -> float:
        """How long the device itself is busy with a call, by its own clock where it has one."""
        if not self.is_cuda:
            return self.wall_ms(call)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def repeated(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """All of the calls as one: on a card a CUDA graph, so that nothing waits for Python between two kernels."""
        if not self.is_cuda:
            return lambda: [call() for call in calls]
        side = self.torch.cuda.Stream()
        with self.torch.cuda.stream(side):
            for call in calls:  # compiles, and takes its memory
                call()
        self.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for call in calls:
                call()
        replay: Callable[[], object] = graph.replay
        return replay

    def ceilings(self, precisions: Sequence[str], *, size: int, copied_bytes: int) -> Ceilings:
        """Square products of ``size``, and a copy of ``copied_bytes``, of which as many are read as written."""
        torch = self.torch
        copying = self._best_ms(self.copying(copied_bytes))
        products = {}
        for precision in precisions:
            dtype = getattr(torch, DTYPES[precision])
            left, right = (torch.randn(size, size, device=self.name).to(dtype) for _ in range(2))
            out = torch.empty_like(left)

            def multiply(left: Any = left, right: Any = right, out: Any = out) -> object:
                return torch.matmul(left, right, out=out)

            products[precision] = 2 * size**3 / self._best_ms(multiply) / 1e9
        return Ceilings(products, 2 * copied_bytes / copying / 1e6)

    def copying(self, copied_bytes: int) -> Callable[[], object]:
        """A copy of so many bytes from one place of the device's memory to another."""
        source = self.torch.empty(copied_bytes, dtype=self.torch.uint8, device=self.name)
        return partial(self.torch.empty_like(source).copy_, source)

    def _best_ms(self, call: Callable[[], object]) -> float:
        taken = in_turn({"it": lambda: self.device_ms(call)}, min_runs=10, min_seconds=0.0, warmup=3)["it"]
        return min(taken)


def _driver() -> str:
    """The driver's version, as the kernel module tells it; empty where it does not."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as stream:
            words = stream.readline().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")
