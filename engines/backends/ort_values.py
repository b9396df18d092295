"""Tensors of ONNX Runtime, ``OrtValue``s, in this process's memory or a device's, from arrays and back.

NumPy has no bfloat16, and ``OrtValue.numpy`` refuses it: it goes in as the bits of its elements and comes out as
float32, which holds every one of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from compexport.errors import InputError, describe
from engines.backends.bfloat16 import bits_of, floats_of
from engines.manifest import TensorSpec
from engines.session import Array, Held

# How a manifest, ONNX (``TensorProto.DataType``) and ONNX Runtime call the types that graphs read and give.
_KINDS = {
    "float32": (1, "tensor(float)"),
    "uint8": (2, "tensor(uint8)"),
    "int8": (3, "tensor(int8)"),
    "int32": (6, "tensor(int32)"),
    "int64": (7, "tensor(int64)"),
    "bool": (9, "tensor(bool)"),
    "float16": (10, "tensor(float16)"),
    "bfloat16": (16, "tensor(bfloat16)"),
}
_NUMBERS = {name: number for name, (number, _) in _KINDS.items()}
_NAMES = {text: name for name, (_, text) in _KINDS.items()}
BFLOAT16 = _NUMBERS["bfloat16"]


def element_type(dtype: str) -> int:
    """ONNX's number of a type; InputError for one that no graph of ours has."""
    if dtype not in _NUMBERS:
        raise InputError(describe("element type", got=dtype, expected=f"one of {', '.join(_NUMBERS)}"))
    return _NUMBERS[dtype]


def tensor_specs(values: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs of a bare session as manifest entries."""
    return [TensorSpec(name=v.name, dtype=_NAMES[v.type], shape=list(v.shape)) for v in values]


def empty_value(shape: Sequence[int], number: int, memory: str) -> Held:
    """Room for a tensor of ONNX's element type ``number`` in ``memory``, "cpu" or "cuda"; what is in it is anything."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), number, memory, 0)


def stored(array: Array, number: int) -> Array:
    """An array as ONNX Runtime takes it for a tensor of ONNX's type ``number``: contiguous, bfloat16 as its bits."""
    return bits_of(array) if number == BFLOAT16 else np.ascontiguousarray(array)


def value_of(array: Array, number: int) -> Held:
    """A ``stored`` array as a tensor of this process's memory, which they share."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)


def copied(value: Held, memory: str) -> Held:
    """A tensor of its own with the same content, in ``memory``, where ``value`` lies too."""
    copy = empty_value(value.shape(), value.element_type(), memory)
    copy.update_inplace(value)
    return copy


def array_of(value: Held) -> Array:
    """An array of a tensor; of one in this process's memory, a view. One of bfloat16 must lie there."""
    if value.element_type() != BFLOAT16:
        array: Array = value.numpy()
        return array
    shape = value.shape()
    room = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
    return floats_of(np.array(room, np.uint16)).reshape(shape)
