"""Memory, streams, events and graphs of the GPU through NVIDIA's cuda-python.

Addresses, streams, events and graphs are whole numbers, sizes are in bytes. Work that is given to a stream runs in the
order in which it was given, and later than the call returns; ``wait`` and events are what makes that order known.
"""

from __future__ import annotations

from typing import Any

from compexport.errors import CompexportError, DependencyError, describe

# What CUDA says when memory is short, and after what nothing of it works any more in this process.
_SHORT = {"cudaErrorMemoryAllocation"}
_LOST = {
    "cudaErrorAssert",
    "cudaErrorContained",
    "cudaErrorContextIsDestroyed",
    "cudaErrorDevicesUnavailable",
    "cudaErrorECCUncorrectable",
    "cudaErrorExternalDevice",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress",
    "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorTensorMemoryLeak",
}


class OutOfMemory(CompexportError):
    """The device, or the host for memory that is not to move, has none left."""


class DeviceLost(CompexportError):
    """The device failed in a way after which every call of this process fails."""


class CudaMemory:
    """The current device's. Every call that fails is a CompexportError of one line."""

    def __init__(self, runtime: Any = None) -> None:
        """``runtime``: in place of ``cuda.bindings.runtime``; DependencyError where that is not installed."""
        self._cuda: Any = _bindings() if runtime is None else runtime

    # --- memory

    def allocate(self, size: int) -> int:
        """The address of so much new memory of the device; OutOfMemory where there is none."""
        return int(self._call(self._cuda.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Give memory of the device back; nothing may use it any more."""
        self._call(self._cuda.cudaFree, address)

    def allocate_pinned(self, size: int) -> int:
        """The address of so much memory of the host that stays where it is, so that copies of it need not wait."""
        return int(self._call(self._cuda.cudaHostAlloc, size, self._cuda.cudaHostAllocDefault))

    def free_pinned(self, address: int) -> None:
        """Give such memory back."""
        self._call(self._cuda.cudaFreeHost, address)

    # --- copies

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from pinned memory to the device."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from the device into pinned memory."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy on the device."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream)

    def _copy(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        if size:
            self._call(self._cuda.cudaMemcpyAsync, target, source, size, kind, stream)

    # --- streams and events

    def stream(self) -> int:
        """A new stream, never the default one, which waits for all others."""
        return int(self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def end_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call(self._cuda.cudaStreamDestroy, stream)

    def wait(self, stream: int) -> None:
        """Return when all work of the stream is done."""
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def event(self) -> int:
        """A new event, which can be recorded as often as one likes."""
        return int(self._call(self._cuda.cudaEventCreateWithFlags, self._cuda.cudaEventDisableTiming))

    def end_event(self, event: int) -> None:
        """Give an event back."""
        self._call(self._cuda.cudaEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """From now on the event is where the stream's work ends at this moment."""
        self._call(self._cuda.cudaEventRecord, event, stream)

    def wait_for(self, stream: int, event: int) -> None:
        """Work that is given to the stream from now on runs after what the event is at this moment."""
        self._call(self._cuda.cudaStreamWaitEvent, stream, event, 0)

    # --- graphs

    def begin_capture(self, stream: int) -> None:
        """From now on what this thread gives to the stream is written down, not run; it may not allocate meanwhile."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """What was written down, as a graph that can be launched."""
        written = self._call(self._cuda.cudaStreamEndCapture, stream)
        try:
            return int(self._call(self._cuda.cudaGraphInstantiate, written, 0))
        finally:
            self._call(self._cuda.cudaGraphDestroy, written)

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph as work of the stream."""
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def end_graph(self, graph: int) -> None:
        """Give a graph back; it may not be under way."""
        self._call(self._cuda.cudaGraphExecDestroy, graph)

    def _call(self, function: Any, *arguments: Any) -> Any:
        status, *results = function(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise _error(function.__name__, status.name, arguments)
        return results[0] if results else None


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        hint = "pip install 'compexport[tensorrt]' or 'compexport[rtx]'"
        raise DependencyError(describe("cuda-python is missing", hint=hint)) from None
    return runtime


def _error(function: str, status: str, arguments: tuple[Any, ...]) -> CompexportError:
    if status in _SHORT:
        place = "pinned memory of the host" if function == "cudaHostAlloc" else "the GPU's memory"
        got = f"{int(arguments[0]) / 2**20:.1f} MiB more asked for" if arguments else status
        hint = "ask for less at once (batch, length, threads), or close other users of the GPU"
        return OutOfMemory(describe(f"{place} is full", got=got, hint=hint))
    if status in _LOST:
        hint = "start the process again; if that does not help, look at the driver's log (dmesg, nvidia-smi)"
        return DeviceLost(describe(f"the GPU is lost: {function} failed", got=status, hint=hint))
    return CompexportError(describe(f"CUDA: {function} failed", got=status))
