"""A session: one engine, opened, that turns named arrays into named arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compexport.errors import InputError, describe
from engines.bundle import Bundle
from engines.manifest import TensorSpec

Array = npt.NDArray[Any]
Held = Any  # an array in the backend's own memory, of whatever type the backend uses


def fed_dtype(dtype: str) -> np.dtype[Any]:
    """The type of arrays for an input of a graph's type: NumPy has no bfloat16, so one takes float32 and rounds it."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


class OpenSession(Protocol):
    """What a runtime needs of a ``Session``."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; thread-safe."""

    def close(self) -> None:
        """Release the engine."""


class Backend(Protocol):
    """What a runtime needs of a module in ``engines.backends``."""

    def device_name(self, options: Mapping[str, Any]) -> str:
        """The key of this machine's profile."""

    def shortest_text(self, bundle: Bundle) -> int:
        """Tokens that a text of this bundle has at least, where necessary by padding."""

    def open_sessions(
        self, bundle: Bundle, variants: Sequence[str] | None, *, threads: int | None, provider: str
    ) -> Mapping[str, OpenSession]:
        """Sessions by variant, sharing memory. BundleError when an engine fits another version or device.

        That of a variant with exits is an ``engines.cascade.Cascade``.
        """

    def open_graphs(
        self, bundle: Bundle, graphs: Sequence[str], *, threads: int | None, provider: str
    ) -> Mapping[str, OpenSession]:
        """Sessions of single graphs; errors as ``open_sessions``."""


class HoldingSession(Protocol):
    """A session whose outputs may stay in the backend's memory, to go into a next run. Thread-safe."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def run_held(
        self, feeds: Mapping[str, Array], held: Mapping[str, Held], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Held]]:
        """Run once on arrays of this process (``feeds``) and of the backend (``held``), unchecked.

        Returns ``outputs`` as arrays, and those of ``hold`` where the backend computed them.
        """

    def close(self) -> None:
        """Release the engine."""


# What a gathering session may have besides, as ``fetch_rows``: rows of what it holds, as an array of this process. Rows
# are those of the last axis: of [B, S, V] there are B * S.
FetchRows = Callable[[Held, npt.NDArray[np.int64]], Array]


class GatheringSession(HoldingSession, Protocol):
    """A holding session that can pick rows of what it holds."""

    def take_rows(self, held: Held, rows: npt.NDArray[np.int64]) -> Held:
        """These rows, in this order, of an array in the backend's memory."""


class Session(ABC):
    """An open engine; a context manager. Feeds are checked here, so that a backend contains only what differs.

    ``run`` may be called from several threads at once.
    """

    def __init__(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.name = name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self._output_names = [spec.name for spec in outputs]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once. ``feeds`` holds one array per input; ``outputs`` limits what is returned (all by default).

        Raises InputError for a missing or unknown name, another dtype, or a shape that does not fit.
        """
        self._check(feeds)
        names = self._output_names if outputs is None else list(outputs)
        unknown = set(names) - set(self._output_names)
        if unknown:
            raise InputError(
                describe(f"{self.name}: no such output", got=", ".join(sorted(unknown)), expected=self._output_names)
            )
        if not names:
            return {}
        return dict(zip(names, self._run(feeds, names), strict=True))

    @abstractmethod
    def close(self) -> None:
        """Release the engine; running it afterwards is an error of the caller."""

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        """The named outputs, in that order; feeds are already checked."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, feeds: Mapping[str, Array]) -> None:
        expected = {spec.name for spec in self.inputs}
        if feeds.keys() != expected:
            raise InputError(describe(f"{self.name}: wrong inputs", got=sorted(feeds), expected=sorted(expected)))
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            array = feeds[spec.name]
            fits = array.ndim == len(spec.shape) and all(
                size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis) and size > 0
                for size, axis in zip(array.shape, spec.shape, strict=True)
            )
            if not fits or array.dtype != fed_dtype(spec.dtype):
                raise InputError(
                    describe(
                        f"{self.name}: input {spec.name}",
                        got=f"{array.dtype}{list(array.shape)}",
                        expected=f"{fed_dtype(spec.dtype)}{spec.shape}, equal axes equal, none empty",
                    )
                )
