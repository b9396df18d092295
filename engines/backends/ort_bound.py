"""A session whose inputs and outputs are bound: in a device's memory, where the graph reads and writes them.

The same code runs over this process's memory ("cpu"), which is how it is tested where there is no card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, describe
from engines.backends.ort_captured import Captures
from engines.backends.ort_library import first_line
from engines.backends.ort_rows import rows_taken
from engines.backends.ort_run import run_bound
from engines.backends.ort_session import OrtSession
from engines.backends.ort_values import array_of, element_type, stored, value_of
from engines.manifest import Graph
from engines.session import Array, Held


class BoundSession(OrtSession):
    """On a device. What is held are OrtValues there, never written again, so several may share one."""

    def __init__(self, name: str, graph: Graph, inner: Any, memory: str, captures: Captures | None = None) -> None:
        """``memory``: where ``inner`` computes. ``captures``: of the same session, if its runs are captured."""
        # Those with captures may go on in another session, and then nothing keeps this one.
        super().__init__(name, graph, inner if captures is None else captures)
        self._memory = memory
        self._captures = captures
        self._types = {spec.name: element_type(spec.dtype) for spec in graph.inputs}

    @property
    def captured(self) -> int:
        """How many CUDA graphs it has."""
        return 0 if self._captures is None else self._captures.captured

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        found, _ = self.run_held(feeds, {}, names, ())
        return [found[name] for name in names]

    def run_held(
        self, feeds: Mapping[str, Array], held: Mapping[str, Held], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Held]]:
        """As ``engines.session.HoldingSession``; each output is copied once, those to hold not at all."""
        inner = self._open()
        try:
            arrays = {name: stored(array, self._types[name]) for name, array in feeds.items()}
            given = {name: value_of(array, self._types[name]) for name, array in arrays.items()} | dict(held)
            if self._captures is not None:
                return self._captures.run(given, {**arrays, **held}, outputs, hold)
            values = run_bound(inner, given, outputs, hold, self._memory)
        except CompexportError:
            raise
        except Exception as error:  # of a type for each status of ONNX Runtime; a device that is full is one of them
            raise CompexportError(describe(f"{self.name}: ONNX Runtime failed", got=first_line(error))) from error
        return {name: array_of(values[name]) for name in outputs}, {name: values[name] for name in hold}

    def take_rows(self, held: Held, rows: npt.NDArray[np.int64]) -> Held:
        """As ``engines.session.GatheringSession``, on the device; all rows as they are need no copy."""
        if np.array_equal(rows, np.arange(held.shape()[0])):
            return held
        return rows_taken(held, rows, self._memory)

    def close(self) -> None:
        super().close()
        if self._captures is not None:
            self._captures.close()
