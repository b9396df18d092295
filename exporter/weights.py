"""One weights file for many graphs: equal tensors are stored once, whichever graph they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
from onnx import TensorProto

# Tensors below this stay inside the graph: shapes and scalars that a runtime's shape inference wants to see.
INLINE_BYTES = 1024
PAGE = 4096


def stored_places(graphs: Iterable[Path]) -> dict[str, set[tuple[int, int]]]:
    """Name of every tensor that graphs keep in a weights file -> where, (offset, length); their bytes are not read."""
    places: dict[str, set[tuple[int, int]]] = {}
    for path in graphs:
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                places.setdefault(tensor.name, set()).add((int(entries["offset"]), int(entries["length"])))
    return places


class WeightsFile:
    """A growing file of tensors, deduplicated by content; 4096-aligned so that it can be memory-mapped.

    Graphs refer to it by ONNX external data: ``location`` is its file name, so it lies beside them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def move_out(self, model: onnx.ModelProto, but: str | None = None) -> None:
        """Move every initialiser of at least ``INLINE_BYTES`` from ``model`` into this file, in place.

        Those whose names begin with ``but`` stay.
        """
        for tensor in model.graph.initializer:
            stays = but is not None and tensor.name.startswith(but)
            if len(tensor.raw_data) >= INLINE_BYTES and not stays:
                offset, length = self.add(tensor.raw_data)
                self._refer(tensor, offset, length)

    def adopt(self, source: Path, target: Path) -> None:
        """Copy the graph ``source``, whose tensors lie in another weights file beside it, to ``target``."""
        model = onnx.load(str(source), load_external_data=True)
        self.move_out(model)
        target.write_bytes(model.SerializeToString())

    def add(self, data: bytes | memoryview) -> tuple[int, int]:
        """Store ``data`` unless it is there already; its (offset, length)."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._stream.write(bytes(-self._stream.tell() % PAGE))
            self._places[digest] = (self._stream.tell(), len(data))
            self._stream.write(data)
        return self._places[digest]

    def _refer(self, tensor: TensorProto, offset: int, length: int) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))

    def close(self) -> None:
        self._stream.close()

    def flush(self) -> None:
        self._stream.flush()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
