"""Rows of a tensor, picked where it lies: a model of one Gather, run by ONNX Runtime on the same device.

So nothing that is held goes through this process, and ONNX Runtime knows which of its runs come first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.backends.ort_library import session_options
from engines.backends.ort_provider import new_session
from engines.backends.ort_values import value_of
from engines.session import Held

_IR_VERSION, _OPSET, _INT64 = 8, 13, 7
_VARINT, _BYTES = 0, 2  # kinds of fields in protobuf's encoding


def rows_taken(held: Held, rows: npt.NDArray[np.int64], memory: str, into: str | None = None) -> Held:
    """These rows, in this order, of a tensor in ``memory`` ("cpu" or "cuda"), there too or in the memory ``into``."""
    session = _gatherer(held.element_type(), memory)
    binding = session.io_binding()
    binding.bind_ortvalue_input("held", held)
    binding.bind_ortvalue_input("rows", value_of(rows, _INT64))
    binding.bind_output("taken", into or memory)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0]


@cache
def _gatherer(number: int, memory: str) -> Any:
    """The session for elements of ONNX's type ``number``, for as long as the process lives. Threads may share it."""
    import onnxruntime

    options = session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return new_session(gather_model(number), options, memory)


def gather_model(number: int) -> bytes:
    """An ONNX model: ``taken = Gather(held, rows)`` along the first axis, for any shape, of element type ``number``."""
    names = _text(1, "held") + _text(1, "rows") + _text(2, "taken")
    node = names + _text(4, "Gather")
    graph = _field(1, node) + _text(2, "rows") + _field(11, _info("held", number)) + _field(11, _info("rows", _INT64))
    graph += _field(12, _info("taken", number))
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, _number(2, _OPSET))


def _info(name: str, number: int) -> bytes:
    """A ValueInfoProto of a tensor, its shape left open."""
    return _text(1, name) + _field(2, _field(1, _number(1, number)))


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())


def _field(field: int, content: bytes) -> bytes:
    """A field of protobuf's encoding. None of ours is longer than what one byte counts, but the graph."""
    size = len(content)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([field << 3 | _BYTES]) + length + content


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3 | _VARINT, value])
