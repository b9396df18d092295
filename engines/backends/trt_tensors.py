"""Tensors of plans on the device, and as arrays of this process, which has no bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from engines.backends.bfloat16 import bits_of, floats_of
from engines.backends.cuda_lanes import Lane
from engines.backends.cuda_pool import Block, Moment
from engines.session import Array

_BYTES = {"bfloat16": 2}


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor on the device. ``ready``: the moment from which it is whole for other lanes; None: it is."""

    shape: tuple[int, ...]
    dtype: str
    block: Block
    lane: Lane
    ready: Moment | None

    @property
    def size_bytes(self) -> int:
        """Of its elements."""
        return prod(self.shape) * item_bytes(self.dtype)


def item_bytes(dtype: str) -> int:
    """Of one element; NumPy has no bfloat16."""
    return _BYTES.get(dtype) or np.dtype(dtype).itemsize


def runs_of(rows: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Rows that follow each other, as copies: (place of the first in the result, its number, how many)."""
    if not len(rows):
        return []
    starts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist()]
    ends = [*starts[1:], len(rows)]
    return [(start, int(rows[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def stored(array: Array, dtype: str) -> Array:
    """As the device has it; float16 comes out as float32, and may go in again."""
    return bits_of(array) if dtype == "bfloat16" else array.astype(dtype, copy=False)


def as_array(stored: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An array of its own from bytes; halves become float32."""
    if dtype == "bfloat16":
        return floats_of(stored.view(np.uint16)).reshape(shape)
    array = stored.view(dtype).reshape(shape)
    return array.astype(np.float32) if dtype == "float16" else array.copy()
