"""Which files an ONNX model wants to read besides itself, found without the onnx package.

An ONNX tensor may keep its data in another file, named by a ``location`` relative to the model. A hostile
model could name any file of the machine there, so a bundle is only trusted once every location has been seen.
This walks the protobuf wire format along the few fields that lead to tensors and skips everything else.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

_MAX_DEPTH = 64
# message -> field number -> message, along every way from a model to a tensor's external data (onnx.proto)
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer = mmap.mmap | bytes


def locations(path: Path) -> set[str]:
    """Every external data location of an ONNX file, as written; raises ValueError when it is no ONNX file."""
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return locations_in(data)


def locations_in(data: Buffer) -> set[str]:
    """The same for a model in memory."""
    found: set[str] = set()
    pending = [("model", 0, len(data), 0)]
    while pending:
        message, start, end, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"its graphs are nested more than {_MAX_DEPTH} deep")
        ways = _WAYS[message]
        for field, first, last in _fields(data, start, end):
            if field not in ways:
                continue
            if ways[field] == "entry":
                found |= _location(data, first, last)
            else:
                pending.append((ways[field], first, last, depth + 1))
    return found


def _location(data: Buffer, start: int, end: int) -> set[str]:
    """The value of a key-value entry when its key is "location". Protobuf takes the last of repeated fields."""
    texts = {field: data[first:last] for field, first, last in _fields(data, start, end)}
    if texts.get(1) != b"location":
        return set()
    try:
        return {texts.get(2, b"").decode()}
    except UnicodeDecodeError:
        raise ValueError("an external data location is not UTF-8") from None


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The length-delimited fields of one message as (number, first byte, end); others are skipped."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise ValueError("it is cut or not an ONNX file")
            yield tag >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("it is not an ONNX file")
    if at != end:
        raise ValueError("it is cut or not an ONNX file")


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is cut or not an ONNX file")
