"""What tests on a GPU need besides the device, each with the reason why a test skips without it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from engines import backends
from engines.backends import cuda


@pytest.fixture(scope="session")
def device() -> cuda.Device:
    """The first device."""
    return cuda.require_device("this test")


@pytest.fixture(scope="session")
def torch_device() -> str:
    """PyTorch's name of the device; skips where PyTorch is built for the processor alone."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    return "cuda"


@pytest.fixture(scope="session")
def triton(torch_device: str) -> None:
    """Triton, and PyTorch, which gives it memory."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.fixture(scope="session", params=["trt", "trt-rtx"])
def plan_backend(request: pytest.FixtureRequest, device: cuda.Device) -> Any:
    """A backend of plans whose library is here and compiles for the device."""
    if reason := backends.available()[request.param]:
        pytest.skip(reason)
    if request.param == "trt-rtx" and device.capability in ("sm90", "sm100", "sm103"):
        pytest.skip(f"TensorRT-RTX has nothing for {device.name} ({device.capability})")
    return backends.load(request.param)
