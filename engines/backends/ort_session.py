"""A session of one graph in ONNX Runtime, as fast as its CPU provider lets it be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, describe
from engines.backends.ort_rows import rows_taken
from engines.backends.ort_values import BFLOAT16, array_of
from engines.manifest import Graph
from engines.session import Array, Held, Session


class OrtSession(Session):
    """On the processor. Also an ``engines.session.GatheringSession``; what is held are OrtValues."""

    def __init__(self, name: str, graph: Graph, inner: Any) -> None:
        """``inner``: an ``onnxruntime.InferenceSession``, from now on this session's."""
        super().__init__(name, graph.inputs, graph.outputs)
        self._inner = inner

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        outputs: Sequence[Array] = self._open().run(names, feeds)
        return outputs

    def run_held(
        self, feeds: Mapping[str, Array], held: Mapping[str, Held], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Held]]:
        """As ``engines.session.HoldingSession``: one call, where a binding takes one for every tensor, at each step."""
        import onnxruntime

        inner = self._open()
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        values = {name: value(np.ascontiguousarray(array)) for name, array in feeds.items()}
        found = inner.run_with_ort_values([*outputs, *hold], {**values, **held})
        here = {name: array_of(one) for name, one in zip(outputs, found, strict=False)}
        return here, dict(zip(hold, found[len(outputs) :], strict=True))

    def take_rows(self, held: Held, rows: npt.NDArray[np.int64]) -> Held:
        """As ``engines.session.GatheringSession``."""
        import onnxruntime

        if held.element_type() == BFLOAT16:
            return rows_taken(held, rows, "cpu")
        return onnxruntime.OrtValue.ortvalue_from_numpy(held.numpy()[rows])

    def close(self) -> None:
        """A run that is in the engine ends as it would; the next one, a cascade's next segment too, is refused."""
        self._inner = None

    def _open(self) -> Any:
        inner = self._inner
        if inner is None:
            raise CompexportError(describe(f"{self.name}: the engine is closed", hint="load the bundle again"))
        return inner
