"""What tests on a GPU need besides the device, each with the reason why a test skips without it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

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
