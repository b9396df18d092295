"""Lanes: a stream with the memory that its work uses, lent to one thread at a time.

As many threads run at once as there are lanes; a new one is made when all are lent, up to a bound, and then threads
take turns. Whatever runs on a lane may use the lane's scratch memory, because it runs one after the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from weakref import WeakKeyDictionary

from compexport.errors import CompexportError, describe
from engines.backends.cuda_memory import CudaMemory, DeviceLost
from engines.backends.cuda_pool import Block, Moment, Pool, Staging

MOST_LANES = 8


class Tenant(Protocol):
    """What an open engine has on a lane."""

    def scratch_moved(self) -> None:
        """The lane's scratch memory is no more where it was; the lane is idle."""

    def close(self) -> None:
        """Give all back; the lane is idle."""


class Lane:
    """Used by the thread that has it; what it computes is whole after ``wait``."""

    def __init__(self, memory: CudaMemory, on_short: Callable[[], None]) -> None:
        self.memory = memory
        self.stream = memory.stream()
        self.pool = Pool(memory, self.stream, on_short)
        self.staging = Staging(memory, self.wait)
        self.tenants: WeakKeyDictionary[object, Tenant] = WeakKeyDictionary()
        self._scratch: Block | None = None
        self._events: deque[int] = deque()
        self._made: list[int] = []

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size of the memory that a run uses while it runs, at least so large."""
        if self._scratch is None or self._scratch.place.size < size:
            self._drop_scratch()  # so that where memory is short, the old one makes room
            self._scratch = self.pool.take(size)
        return self._scratch.address, self._scratch.place.size

    def moment(self) -> Moment:
        """Where the lane's work ends now."""
        if not self._events:
            self._made.append(self.memory.event())
            self._events.append(self._made[-1])
        moment = Moment(self._events.popleft(), self._events)
        self.memory.record(moment.event, self.stream)
        return moment

    def after(self, moment: Moment) -> None:
        """What the lane is given from now on runs after that moment of another one."""
        self.memory.wait_for(self.stream, moment.event)

    def wait(self) -> None:
        """Return when all work is done."""
        self.memory.wait(self.stream)
        self.staging.settle()

    def trim(self) -> None:
        """Give CUDA back what the lane keeps for later runs, scratch memory too."""
        self._drop_scratch()
        self.pool.trim()

    def evict(self, key: object) -> None:
        """Give back what the engine ``key`` has here."""
        tenant = self.tenants.pop(key, None)
        if tenant is not None:
            try:
                self.wait()
            finally:
                tenant.close()

    def close(self) -> None:
        """Give all back; all lanes are idle."""
        self._scratch = None
        self.staging.close()
        self.pool.close()
        for event in self._made:
            self.memory.end_event(event)
        self.memory.end_stream(self.stream)

    def _drop_scratch(self) -> None:
        if self._scratch is not None:
            self.wait()
            self._scratch = None
            for tenant in list(self.tenants.values()):
                tenant.scratch_moved()


class Lanes:
    """The lanes of a device, for all engines that are open: each ``join``s, and the last to ``leave`` closes them."""

    def __init__(self, memory: CudaMemory, most: int = MOST_LANES) -> None:
        self.is_open = True
        self._memory, self._most = memory, most
        self._changed = threading.Condition()
        self._lanes: list[Lane] = []
        self._idle: list[Lane] = []  # the longest unused first
        self._last: dict[Lane, int] = {}  # the thread that had it last
        self._making = 0
        self._members = 0

    def join(self) -> None:
        """Another engine uses the lanes."""
        with self._changed:
            if not self.is_open:
                raise _closed()
            self._members += 1

    def leave(self) -> None:
        """An engine that had joined, and has nothing on any lane, does not any more."""
        with self._changed:
            self._members -= 1
            if self._members or not self.is_open:
                return
            self.is_open = False
        with suppress(DeviceLost):
            for lane in self._lanes:
                lane.wait()
            for lane in self._lanes:
                lane.close()

    @contextmanager
    def lent(self) -> Iterator[Lane]:
        """A lane for this thread, if possible the one that it had last; waits for one when all are lent."""
        lane = self._taken()
        try:
            yield lane
        finally:
            self._give_back(lane)

    def evict(self, key: object) -> None:
        """Give back what the engine ``key`` has on any lane, after the runs that are under way."""
        for lane in self._known():
            with self._changed:
                self._changed.wait_for(lambda lane=lane: lane in self._idle)  # type: ignore[misc]
                self._idle.remove(lane)
            try:
                with suppress(DeviceLost):
                    lane.evict(key)
            finally:
                self._give_back(lane)

    def trim(self) -> None:
        """Give CUDA back what lanes that nobody has keep for later."""
        with self._changed:
            idle, self._idle = self._idle, []
        try:
            for lane in idle:
                lane.trim()
        finally:
            for lane in idle:
                self._give_back(lane)

    def _taken(self) -> Lane:
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._idle or len(self._lanes) + self._making < self._most)
            if self._idle:
                had = (lane for lane in reversed(self._idle) if self._last.get(lane) == thread)
                lane = next(had, self._idle[0])
                self._idle.remove(lane)
                self._last[lane] = thread
                return lane
            self._making += 1
        try:
            lane = Lane(self._memory, self.trim)
        except BaseException:
            with self._changed:
                self._making -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            self._making -= 1
            if self.is_open:
                self._lanes.append(lane)
                self._last[lane] = thread
                return lane
        lane.close()
        raise _closed()

    def _give_back(self, lane: Lane) -> None:
        with self._changed:
            self._idle.append(lane)
            self._changed.notify_all()

    def _known(self) -> list[Lane]:
        with self._changed:
            return list(self._lanes)


def _closed() -> CompexportError:
    return CompexportError(describe("the engines are closed", hint="load the bundle again"))
