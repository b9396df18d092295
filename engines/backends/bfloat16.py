"""bfloat16, which NumPy does not have: the upper half of a float32, as whole numbers of two bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.session import Array


def bits_of(array: Array) -> npt.NDArray[np.uint16]:
    """An array as bfloat16, two bytes an element: rounded to the nearest, ties to even, if it is not of it already."""
    if array.dtype.name == "bfloat16":  # of a package that teaches NumPy the type
        return np.ascontiguousarray(array).view(np.uint16)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def floats_of(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """float32 of such an array, which holds every one of them."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
