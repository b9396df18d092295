"""A session of one plan: threads run it at the same time, each on a lane of the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, describe
from engines.backends.cuda_lanes import Lane, Lanes
from engines.backends.trt_engine import Plan
from engines.backends.trt_profiles import Profile
from engines.backends.trt_runner import Runner
from engines.backends.trt_tensors import HeldTensor
from engines.manifest import Graph
from engines.session import Array, Session


class PlanSession(Session):
    """Runs one plan; also an ``engines.session.GatheringSession``, of ``HeldTensor``s."""

    def __init__(
        self, name: str, graph: Graph, plan: Plan, profiles: Sequence[Profile], lanes: Lanes, *, cuda_graphs: bool
    ) -> None:
        """``cuda_graphs``: whether runs that come again are captured. The plan is the session's from now on."""
        super().__init__(name, graph.inputs, graph.outputs)
        self._plan, self._profiles, self._lanes, self._cuda_graphs = plan, list(profiles), lanes, cuda_graphs
        self._is_open, self._closing = True, threading.Lock()
        lanes.join()

    def run_held(
        self, feeds: Mapping[str, Array], held: Mapping[str, HeldTensor], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, HeldTensor]]:
        """As ``engines.session.HoldingSession``; returns before the device is done where there is nothing to return."""
        with self._lane() as lane:
            return self._runner(lane).run(feeds, held, outputs, hold)

    def take_rows(self, held: HeldTensor, rows: npt.NDArray[np.int64]) -> HeldTensor:
        """As ``engines.session.GatheringSession``, on the device; all rows as they are need no copy."""
        if np.array_equal(rows, np.arange(held.shape[0])):
            return held
        self._require_rows(rows, held.shape[0])
        with self._lane() as lane:
            return self._runner(lane).take_rows(held, rows)

    def fetch_rows(self, held: HeldTensor, rows: npt.NDArray[np.int64]) -> Array:
        """As ``engines.session.FetchRows``."""
        self._require_rows(rows, prod(held.shape[:-1]))
        with self._lane() as lane:
            return self._runner(lane).fetch_rows(held, rows)

    def close(self) -> None:
        """Contexts, engine and runtime, in this order; a run that has begun ends as it would."""
        with self._closing:
            if not self._is_open:
                return
            self._is_open = False
        self._lanes.evict(self)
        self._plan.close()
        self._lanes.leave()

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        found, _ = self.run_held(feeds, {}, names, ())
        return [found[name] for name in names]

    def _require_rows(self, rows: npt.NDArray[np.int64], count: int) -> None:
        if len(rows) and not (rows.min() >= 0 and rows.max() < count):
            got = f"{rows.min()} to {rows.max()}"
            raise CompexportError(describe(f"{self.name}: rows of what is held", got=got, expected=f"0 to {count - 1}"))

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        self._require_open()
        with self._lanes.lent() as lane:
            self._require_open()  # it may have been closed while this thread waited
            yield lane

    def _require_open(self) -> None:
        if not self._is_open:
            raise CompexportError(describe(f"{self.name}: the engine is closed", hint="load the bundle again"))

    def _runner(self, lane: Lane) -> Runner:
        runner = lane.tenants.get(self)
        if runner is None:
            runner = Runner(self._plan, self.inputs, self.outputs, self._profiles, lane, self._cuda_graphs)
            lane.tenants[self] = runner
        assert isinstance(runner, Runner)
        return runner
