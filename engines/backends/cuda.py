"""Which CUDA devices this machine has, asked of the driver itself: no CUDA library needs to be installed.

NVIDIA's runtimes may crash where there is no device, so this is asked before any object of theirs is made.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from compexport.errors import DependencyError, describe

_MAJOR, _MINOR = 75, 76  # attributes of a device in the driver's interface: its compute capability


@dataclass(frozen=True)
class Device:
    """A CUDA device. ``capability`` is its compute capability as compilers write it: "sm89"."""

    index: int
    name: str
    capability: str


def devices() -> list[Device]:
    """The devices that this process may use, in CUDA's order; none where there is no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_device(driver, index) for index in range(count.value)]


def require_device(purpose: str) -> Device:
    """The first device; DependencyError, one line, where there is none."""
    found = devices()
    if not found:
        hint = "run it on a machine with an NVIDIA GPU and its driver"
        raise DependencyError(describe(f"{purpose} needs a CUDA device", got="none", hint=hint))
    return found[0]


def _device(driver: ctypes.CDLL, index: int) -> Device:
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    capability = [_attribute(driver, number, handle) for number in (_MAJOR, _MINOR)]
    return Device(index, name.value.decode(errors="replace"), "sm{}{}".format(*capability))


def _attribute(driver: ctypes.CDLL, number: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
    return value.value
