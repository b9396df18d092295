"""A double of ``cuda.bindings.runtime``: the functions that we call, over this process's own memory.

It is stricter than a device. Work that a stream is given is done at the last moment that CUDA allows, in ``wait``, so
that whoever reads too early reads rubbish. What on a device would be undefined is a ``Misuse``: memory used that is
not there, freed while in use, or touched by two streams without an order; a copy that is not all within one
allocation, or whose end on the host may move; allocating, freeing or waiting while a stream is captured.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np

ALIGNMENT = 512
RUBBISH = 0xA5
Range = tuple[int, int]  # address and size
Clock = dict[int, int]  # by stream, how many of its pieces of work are done before


class Misuse(AssertionError):
    """What on a device would be undefined or an error of the program."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


@dataclass
class Work:
    """A piece of work of a stream. ``valid``: raises Misuse where what it was made from is no more as it was."""

    run: Callable[[], None]
    reads: Sequence[Range] = ()
    writes: Sequence[Range] = ()
    valid: Callable[[], None] = lambda: None
    number: int = 0
    graph: int | None = None
    after: tuple[int, int] | None = None  # of another stream, work that has to be done before


@dataclass
class _Access:
    start: int
    end: int
    writes: bool
    stream: int
    number: int


@dataclass
class _Allocation:
    array: Any
    address: int
    size: int
    is_pinned: bool
    accesses: list[_Access] = field(default_factory=list)


@dataclass
class _Stream:
    pending: deque[Work] = field(default_factory=deque)
    clock: Clock = field(default_factory=dict)
    given: int = 0
    done: int = 0
    captured: list[Work] | None = None
    thread: int = 0


class FakeCuda:
    """In place of the module. ``calls`` counts them by name, ``downloaded`` bytes;
    ``limit`` is the device's memory in bytes."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaHostAllocDefault, cudaStreamNonBlocking, cudaEventDisableTiming = 0, 1, 2

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.is_lost = False
        self.uncapturable = False
        self.calls: dict[str, int] = {}
        self.downloaded = 0  # bytes
        self._lock = threading.RLock()
        self._allocations: dict[int, _Allocation] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, tuple[int, int, Clock] | None] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._synced: Clock = {}
        self._ids = iter(range(1000, 1 << 30))

    # --- what tests ask

    @property
    def left(self) -> dict[str, int]:
        """How many of everything are not given back."""
        kinds = {"device": False, "pinned": True}
        counts = {
            kind: sum(a.is_pinned is is_pinned for a in self._allocations.values()) for kind, is_pinned in kinds.items()
        }
        return {**counts, "streams": len(self._streams), "events": len(self._events), "graphs": len(self._graphs)}

    @property
    def in_use(self) -> int:
        """Bytes of the device."""
        return sum(a.size for a in self._allocations.values() if not a.is_pinned)

    # --- what the double of the library asks

    def array(self, address: int, shape: Sequence[int], dtype: Any) -> Any:
        """The memory of the device there, all within one allocation."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        found = self._within(address, size, is_pinned=False)
        start = address - found.address
        return found.array[start : start + size].view(dtype).reshape(shape)

    def give(self, stream: int, work: Work) -> None:
        """Work for a stream; one that is captured writes it down."""
        with self._lock:
            there = self._stream(stream)
            for address, size in (*work.reads, *work.writes):
                self._within(address, size)
            if there.captured is not None:
                if there.thread != threading.get_ident():
                    raise Misuse("another thread gives work to a stream that is captured")
                there.captured.append(work)
                return
            there.given += 1
            there.clock[stream] = there.given
            self._require_order(stream, there, work)
            there.pending.append(replace(work, number=there.given))

    # --- memory

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int | None]:
        return self._counted("cudaMalloc", self._allocate, size, False)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[cudaError_t, int | None]:
        return self._counted("cudaHostAlloc", self._allocate, size, True)

    def cudaFree(self, devPtr: int) -> tuple[cudaError_t]:
        return self._counted("cudaFree", self._free, devPtr, False)[:1]

    def cudaFreeHost(self, ptr: int) -> tuple[cudaError_t]:
        return self._counted("cudaFreeHost", self._free, ptr, True)[:1]

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:
        return self._counted("cudaMemcpyAsync", self._copy, dst, src, count, kind, stream)[:1]

    # --- streams and events

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, int | None]:
        def create() -> int:
            stream = next(self._ids)
            self._streams[stream] = _Stream()
            return stream

        return self._counted("cudaStreamCreateWithFlags", create)

    def cudaStreamDestroy(self, stream: int) -> tuple[cudaError_t]:
        def destroy() -> None:
            if self._stream(stream).pending:
                raise Misuse("a stream ends with work to do")
            del self._streams[stream]

        return self._counted("cudaStreamDestroy", destroy)[:1]

    def cudaStreamSynchronize(self, stream: int) -> tuple[cudaError_t]:
        def wait() -> None:
            self._require_no_capture()
            there = self._stream(stream)
            self._run(stream, there.given)
            for other, number in there.clock.items():
                self._synced[other] = max(self._synced.get(other, 0), number)

        return self._counted("cudaStreamSynchronize", wait)[:1]

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[cudaError_t, int | None]:
        def create() -> int:
            event = next(self._ids)
            self._events[event] = None
            return event

        return self._counted("cudaEventCreateWithFlags", create)

    def cudaEventDestroy(self, event: int) -> tuple[cudaError_t]:
        return self._counted("cudaEventDestroy", lambda: self._events.pop(event))[:1]

    def cudaEventRecord(self, event: int, stream: int) -> tuple[cudaError_t]:
        def record() -> None:
            there = self._stream(stream)
            if event not in self._events or there.captured is not None:
                raise Misuse("an event that is none, or of a stream that is captured")
            self._events[event] = (stream, there.given, dict(there.clock))

        return self._counted("cudaEventRecord", record)[:1]

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[cudaError_t]:
        def wait_for() -> None:
            there = self._stream(stream)
            if event not in self._events or there.captured is not None:
                raise Misuse("an event that is none, or for a stream that is captured")
            recorded = self._events[event]
            if recorded is None:
                return
            other, number, clock = recorded
            for known, count in clock.items():
                there.clock[known] = max(there.clock.get(known, 0), count)
            self.give(stream, Work(lambda: None, after=(other, number)))

        return self._counted("cudaStreamWaitEvent", wait_for)[:1]

    # --- graphs

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
        def begin() -> None:
            there = self._stream(stream)
            if there.captured is not None or mode is not cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
                raise Misuse("a capture within another, or one that stops other threads")
            there.captured, there.thread = [], threading.get_ident()

        return self._counted("cudaStreamBeginCapture", begin)[:1]

    def cudaStreamEndCapture(self, stream: int) -> tuple[cudaError_t, Any]:
        def end() -> Any:
            there = self._stream(stream)
            if there.captured is None or there.thread != threading.get_ident():
                raise Misuse("no capture of this thread")
            work, there.captured = there.captured, None
            if self.uncapturable:
                return cudaError_t.cudaErrorStreamCaptureInvalidated
            written = next(self._ids)
            self._graphs[written] = work
            return written

        return self._counted("cudaStreamEndCapture", end)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[cudaError_t, int | None]:
        def instantiate() -> int:
            made = next(self._ids)
            self._graphs[made] = [replace(work, graph=made) for work in self._graphs[graph]]
            return made

        return self._counted("cudaGraphInstantiate", instantiate)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[cudaError_t]:
        def launch() -> None:
            for work in self._graphs[graphExec]:
                self.give(stream, work)

        return self._counted("cudaGraphLaunch", launch)[:1]

    def cudaGraphDestroy(self, graph: int) -> tuple[cudaError_t]:
        return self._counted("cudaGraphDestroy", lambda: self._graphs.pop(graph))[:1]

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[cudaError_t]:
        def destroy() -> None:
            if any(work.graph == graphExec for there in self._streams.values() for work in there.pending):
                raise Misuse("a graph ends that is under way")
            del self._graphs[graphExec]

        return self._counted("cudaGraphExecDestroy", destroy)[:1]

    # --- within

    def _counted(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            self.calls[name] = self.calls.get(name, 0) + 1
            if self.is_lost:
                return cudaError_t.cudaErrorIllegalAddress, None
            found = function(*arguments)
            if isinstance(found, cudaError_t):
                return found, None
            return cudaError_t.cudaSuccess, found

    def _allocate(self, size: int, is_pinned: bool) -> int | cudaError_t:
        self._require_no_capture()
        if not isinstance(size, int) or size <= 0:
            raise Misuse(f"{size!r} bytes")
        if not is_pinned and self.in_use + size > self.limit:
            return cudaError_t.cudaErrorMemoryAllocation
        raw = np.full(size + ALIGNMENT, RUBBISH, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        address = int(raw.ctypes.data) + start
        self._allocations[address] = _Allocation(raw[start : start + size], address, size, is_pinned)
        return address

    def _free(self, address: int, is_pinned: bool) -> None:
        self._require_no_capture()
        found = self._allocations.get(address)
        if found is None or found.is_pinned is not is_pinned:
            raise Misuse("memory given back that was not handed out")
        for there in self._streams.values():
            for start, size in (r for work in there.pending for r in (*work.reads, *work.writes)):
                if start < address + found.size and address < start + size:
                    raise Misuse("memory given back that work under way uses")
        found.array[:] = RUBBISH
        del self._allocations[address]

    def _copy(self, target: int, source: int, count: int, kind: cudaMemcpyKind, stream: int) -> None:
        pinned_target = kind is cudaMemcpyKind.cudaMemcpyDeviceToHost
        pinned_source = kind is cudaMemcpyKind.cudaMemcpyHostToDevice
        self.downloaded += count if pinned_target else 0

        def run() -> None:
            to, at = self._within(target, count, pinned_target), self._within(source, count, pinned_source)
            to.array[target - to.address :][:count] = at.array[source - at.address :][:count]

        self._within(target, count, pinned_target), self._within(source, count, pinned_source)
        if target < source + count and source < target + count:
            raise Misuse("a copy onto itself")
        self.give(stream, Work(run, [(source, count)], [(target, count)]))

    def _within(self, address: int, size: int, is_pinned: bool | None = None) -> _Allocation:
        for found in self._allocations.values():
            if found.address <= address and address + size <= found.address + found.size:
                if is_pinned is not None and found.is_pinned is not is_pinned:
                    raise Misuse(f"memory of the {'host' if found.is_pinned else 'device'}, wanted the other")
                return found
        raise Misuse(f"{size} bytes at {address:#x} that are in no allocation")

    def _stream(self, stream: int) -> _Stream:
        if stream not in self._streams:
            raise Misuse(f"no stream: {stream!r}")
        return self._streams[stream]

    def _run(self, stream: int, upto: int) -> None:
        """Do the work of a stream up to that number, and before it what it is to come after."""
        there = self._stream(stream)
        while there.pending and there.pending[0].number <= upto:
            work = there.pending[0]
            if work.after is not None and work.after[0] in self._streams:
                self._run(*work.after)
            work.valid()
            for address, size in (*work.reads, *work.writes):
                self._within(address, size)
            work.run()
            there.pending.popleft()
            there.done = work.number

    def _require_no_capture(self) -> None:
        thread = threading.get_ident()
        if any(there.captured is not None and there.thread == thread for there in self._streams.values()):
            raise Misuse("allocating, freeing or waiting during a capture")

    def _require_order(self, stream: int, there: _Stream, work: Work) -> None:
        """Misuse when work of another stream, which may run at the same time, touches the same memory."""
        for writes, (address, size) in _ranges(work):
            found = self._within(address, size)
            found.accesses = [a for a in found.accesses if self._synced.get(a.stream, 0) < a.number]
            for access in found.accesses:
                overlaps = access.start < address + size and address < access.end
                if overlaps and (writes or access.writes) and there.clock.get(access.stream, 0) < access.number:
                    raise Misuse("two streams use the same memory at the same time")
            found.accesses.append(_Access(address, address + size, writes, stream, there.given))


def _ranges(work: Work) -> Iterator[tuple[bool, Range]]:
    yield from ((False, found) for found in work.reads)
    yield from ((True, found) for found in work.writes)


def differences(module: Any) -> list[str]:
    """Functions and names of the double that the real module does not have, or with other arguments."""
    found = []
    for name, value in vars(FakeCuda).items():
        if not name.startswith("cuda"):
            continue
        real = getattr(module, name, None)
        if isinstance(value, type):
            found += [f"{name}.{one.name}" for one in value if not hasattr(real, one.name)]  # type: ignore[var-annotated]
        elif not callable(value):
            found += [] if real is not None and int(real) == value else [name]
        elif real is None or [*inspect.signature(value).parameters][1:] != [*inspect.signature(real).parameters]:
            found.append(name)
    return found
