"""The two libraries that make and execute TensorRT plans, and where they differ."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from compexport.errors import DependencyError, describe


@dataclass(frozen=True)
class Product:
    """One of the two libraries, and where they differ.

    ``targets``: the compute capabilities that plans are made for, each named by the user; none where plans are for
    the device that compiles them, which is then needed. ``keeps_timings``: kernels are timed while compiling.
    ``captures``: the library makes CUDA graphs itself.
    """

    name: Literal["trt", "trt-rtx"]
    title: str
    module: str
    distributions: tuple[str, ...]
    extra: str
    minimum: tuple[int, int]
    targets: tuple[str, ...] = ()
    keeps_timings: bool = False
    without_lean: bool = False
    captures: bool = False

    @property
    def needs_device(self) -> bool:
        """Whether compiling takes a GPU."""
        return not self.targets

    def version(self) -> str:
        """The installed version, or an empty text."""
        for distribution in self.distributions:
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return ""

    def unavailable(self) -> str:
        """Why the library cannot be used, or an empty text; whether there is a device is not asked."""
        install = f"pip install 'compexport[{self.extra}]'"
        if not find_spec(self.module):
            return describe(f"{self.module} is missing", hint=install)
        version = self.version()
        if version and _numbers(version) < self.minimum:
            return describe(f"{self.title} is too old", got=version, expected=f">= {self.oldest}", hint=install)
        return ""

    def require(self) -> None:
        """DependencyError when the library cannot be used."""
        if reason := self.unavailable():
            raise DependencyError(reason)

    @property
    def oldest(self) -> str:
        """The oldest version that will do."""
        return "{}.{}".format(*self.minimum)


TENSORRT = Product(
    "trt",
    "TensorRT",
    "tensorrt",
    ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt",
    minimum=(11, 2),
    keeps_timings=True,
)
TENSORRT_RTX = Product(
    "trt-rtx",
    "TensorRT-RTX",
    "tensorrt_rtx",
    ("tensorrt-rtx",),
    "rtx",
    minimum=(1, 7),
    targets=("sm86", "sm89", "sm120"),
    without_lean=True,
    captures=True,
)


def this_platform() -> str:
    """What a plan is bound to besides the GPU: operating system and processor."""
    return f"{platform.system()}-{platform.machine()}".lower()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
