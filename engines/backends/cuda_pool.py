"""Memory that is asked of CUDA once and then handed round: a request of a size met before allocates nothing.

``Pool`` is of one stream: what is given back may be handed out again at once, because whoever gets it works after
whoever had it. ``Staging`` is pinned memory of the host, through which all arrays go in and out.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.backends.cuda_memory import CudaMemory, OutOfMemory

Bytes = npt.NDArray[np.uint8]

_LEAST = 512  # bytes; also what CUDA aligns to, at least
_STAGED_MOST, _STAGED_PIECES = 1 << 26, 256  # bytes and pieces of pinned memory under way


def size_class(size: int) -> int:
    """The next larger of four sizes per power of two: what grows a little, as a past does, finds what it had."""
    if size <= _LEAST:
        return _LEAST
    step = 1 << max((size - 1).bit_length() - 3, 9)
    return -(-size // step) * step


class Moment:
    """A point in a stream's work. Its event goes back, to be recorded again, when nothing refers to it any more."""

    __slots__ = ("_home", "event")

    def __init__(self, event: int, home: deque[int]) -> None:
        self.event, self._home = event, home

    def __del__(self) -> None:
        self._home.append(self.event)


@dataclass(slots=True)
class Place:
    """Memory of the device. ``users``: the newest work of each other stream with it, which has to be waited for."""

    address: int
    size: int
    users: dict[int, Moment] = field(default_factory=dict)


class Block:
    """A place in use; it goes back to its pool when nothing refers to it any more.

    That can be in any thread and at any moment, so all that happens then is an entry in a queue.
    """

    __slots__ = ("place", "pool")

    def __init__(self, place: Place, pool: Pool) -> None:
        self.place, self.pool = place, pool

    @property
    def address(self) -> int:
        """Where it is."""
        return self.place.address

    def __del__(self) -> None:
        self.pool.returned.append(self.place)


class Pool:
    """Memory of the device for one stream. Only the thread that works on the stream may take from it."""

    def __init__(self, memory: CudaMemory, stream: int, on_short: Callable[[], None]) -> None:
        """``on_short``: asks all others for what they do not use, before CUDA is asked for memory a second time."""
        self.returned: deque[Place] = deque()
        self.is_open = True
        self._memory, self._stream, self._on_short = memory, stream, on_short
        self._free: defaultdict[int, list[Place]] = defaultdict(list)
        self._all: dict[int, Place] = {}

    @property
    def size_bytes(self) -> int:
        """All that it has of the device, in use or not."""
        return sum(place.size for place in self._all.values())

    def take(self, size: int) -> Block:
        """At least so much memory; OutOfMemory where there is none."""
        self._collect()
        size = size_class(size)
        if self._free[size]:
            place = self._free[size].pop()
            for moment in place.users.values():
                self._memory.wait_for(self._stream, moment.event)
            place.users.clear()
        else:
            place = self._allocated(size)
        return Block(place, self)

    def take_up_to(self, wanted: int, size: int) -> Block:
        """As much as wanted where there is so much, but at least ``size``; OutOfMemory where there is not even that."""
        if wanted > size:
            with suppress(OutOfMemory):
                return self.take(wanted)
        return self.take(size)

    def trim(self) -> None:
        """Give CUDA back what is not in use."""
        self._collect()
        idle = [place for places in self._free.values() for place in places]
        self._free.clear()
        for moment in (moment for place in idle for moment in place.users.values()):
            self._memory.wait_for(self._stream, moment.event)
        if idle:
            self._memory.wait(self._stream)
        for place in idle:
            del self._all[place.address]
            self._memory.free(place.address)

    def close(self) -> None:
        """Give all back, in use or not; the stream is idle."""
        self.is_open = False
        for address in list(self._all):
            del self._all[address]
            self._memory.free(address)
        self._free.clear()

    def _allocated(self, size: int) -> Place:
        try:
            address = self._memory.allocate(size)
        except OutOfMemory:
            self.trim()
            self._on_short()
            address = self._memory.allocate(size)
        self._all[address] = place = Place(address, size)
        return place

    def _collect(self) -> None:
        while self.returned:
            place = self.returned.popleft()
            self._free[place.size].append(place)


@dataclass(frozen=True, slots=True)
class Pinned:
    """Pinned memory of the host: where it is, and its bytes."""

    address: int
    bytes: Bytes


class Staging:
    """Pinned memory of one stream's copies; what was handed out is used again once the stream has been waited for."""

    def __init__(self, memory: CudaMemory, wait: Callable[[], None]) -> None:
        """``wait``: until the stream is idle, and then calls ``settle``."""
        self._memory, self._wait = memory, wait
        self._free: defaultdict[int, list[Pinned]] = defaultdict(list)
        self._used: list[Pinned] = []
        self._used_bytes = 0

    def room(self, size: int) -> Pinned:
        """At least so much, until the stream is waited for."""
        size = size_class(size)
        if self._used and (self._used_bytes + size > _STAGED_MOST or len(self._used) == _STAGED_PIECES):
            self._wait()
        there = self._free[size]
        pinned = there.pop() if there else self._allocated(size)
        self._used.append(pinned)
        self._used_bytes += size
        return pinned

    def put(self, array: npt.NDArray[Any]) -> int:
        """The address of a copy of an array, in C's order."""
        pinned = self.room(array.nbytes)
        if array.size:
            view = pinned.bytes[: array.nbytes].view(array.dtype).reshape(array.shape)
            np.copyto(view, array)
        return pinned.address

    def settle(self) -> None:
        """Nothing under way reads or writes what was handed out."""
        for pinned in self._used:
            self._free[len(pinned.bytes)].append(pinned)
        self._used.clear()
        self._used_bytes = 0

    def close(self) -> None:
        """Give all back; nothing is under way."""
        self.settle()
        self._trim()

    def _trim(self) -> None:
        for pinned in (pinned for there in self._free.values() for pinned in there):
            self._memory.free_pinned(pinned.address)
        self._free.clear()

    def _allocated(self, size: int) -> Pinned:
        try:
            address = self._memory.allocate_pinned(size)
        except OutOfMemory:
            self._trim()
            address = self._memory.allocate_pinned(size)
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address)))
