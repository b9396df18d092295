"""Memory and streams of the GPU through NVIDIA's cuda-python."""

from __future__ import annotations

from typing import Any

from compexport.errors import CompexportError, DependencyError, describe
from engines.session import Array


class CudaMemory:
    """As ``trt_session.DeviceMemory``, of the current device. Every call that fails is a CompexportError."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            hint = "pip install 'compexport[tensorrt]' or 'compexport[rtx]'"
            raise DependencyError(describe("cuda-python is missing", hint=hint)) from None
        self._cuda: Any = runtime

    def stream(self) -> int:
        return int(self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def allocate(self, size: int) -> int:
        return int(self._call(self._cuda.cudaMalloc, size))

    def free(self, address: int) -> None:
        self._call(self._cuda.cudaFree, address)

    def upload(self, address: int, array: Array, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: Array, address: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, stream)

    def wait(self, stream: int) -> None:
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def _call(self, function: Any, *arguments: Any) -> Any:
        status, *results = function(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise CompexportError(describe(f"CUDA: {function.__name__} failed", got=status.name))
        return results[0] if results else None
