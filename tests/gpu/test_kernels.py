"""The merge kernels on the device: launched by Triton, and as TensorRT does, from the PTX that a plan stores."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from engines.backends.cuda import Device
from engines.plugins import ptx
from engines.plugins.ptx import KernelShape
from exporter import ops
from tests.engines.test_plugin_kernels import NAMES, TOLERANCE

pytestmark = pytest.mark.usefixtures("triton")
# B, S, k, H, r, beyond the interpreter's: BERT's sizes at every published ratio, and a length that none divides.
LARGE = [(8, 128, 2, 768, 64), (4, 383, 4, 768, 64), (2, 512, 8, 768, 64), (3, 130, 4, 1024, 128)]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_kernel_is_the_eager_operator(op: ops.Op, kind: str) -> None:
    from tests.engines.kernel_child import MANY, SIZES, compared

    dtype = getattr(torch, kind)
    spacing = torch.finfo(dtype).eps
    for sizes in (*SIZES, *LARGE, *(MANY if kind == "float32" else ())):
        row = compared(op, dtype, sizes, "cuda")
        assert row["same"], row
        scale = max(1.0, row["largest"])
        assert row["worst"] <= TOLERANCE[kind] * scale, row
        assert row["worst"] <= row["eager_worst"] + 4 * spacing * scale, row


def test_masked_kernel_ignores_what_the_mask_hides() -> None:
    from tests.engines.kernel_child import hidden_tokens

    assert hidden_tokens("cuda") == {"unchanged": True, "zero": True}


def launched(op: ops.Op, code: ptx.Compiled, inputs: list[torch.Tensor], ratio: int) -> torch.Tensor:
    """Load the PTX into PyTorch's context and launch it through the driver, with the arguments that TensorRT passes."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

    def call(function: Any, *arguments: Any) -> Any:
        status, *found = function(*arguments)
        assert status == driver.CUresult.CUDA_SUCCESS, (function.__name__, status)
        return found[0] if found else None

    x = inputs[op.inputs.index("x")]
    batch, length, hidden = x.shape
    groups = -(-length // ratio)
    out = torch.full((batch, length if op is ops.TOKEN_SPLIT else groups, hidden), float("nan"), dtype=x.dtype).cuda()
    module = call(driver.cuModuleLoadData, code.ptx.encode() + b"\0")
    function = call(driver.cuModuleGetFunction, module, code.name.encode())
    pointers, sizes = [tensor.data_ptr() for tensor in inputs], [length, groups, batch * groups]
    values = (*pointers, *sizes, out.data_ptr())
    kinds = (*[ctypes.c_void_p] * len(pointers), *[ctypes.c_int] * len(sizes), ctypes.c_void_p)
    assert len(values) == code.parameters
    programs = -(-batch * groups // ptx.ROWS)
    stream = torch.cuda.current_stream().cuda_stream
    launch = (programs, 1, 1, code.threads, 1, 1, code.shared_bytes, stream, (values, kinds), 0)
    call(driver.cuLaunchKernel, function, *launch)
    torch.cuda.synchronize()
    call(driver.cuModuleUnload, module)
    return out


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_stored_kernel_is_the_eager_operator(op: ops.Op, kind: str, device: Device) -> None:
    """For this device, and as a hardware-compatible plan stores it, for every later one."""
    from tests.engines.kernel_child import inputs_of

    sizes = (5, 131, 4, 96, 24)
    inputs = inputs_of(op, sizes, getattr(torch, kind), "cuda")
    exact = op.reference(*(tensor.double() for tensor in inputs), sizes[2])
    for capability in {ptx.capability_for(device.capability), ptx.PORTABLE}:
        code = ptx.compiled(NAMES[op.name], kind, KernelShape(4, 96, 24), capability)
        worst = (launched(op, code, inputs, 4).double() - exact).abs().max().item()
        assert worst <= TOLERANCE[kind] * max(1.0, exact.abs().max().item()), capability


def test_offsets_beyond_32_bits() -> None:
    """The end of a tensor of more than 2^31 elements."""
    from tests.engines.kernel_child import run

    batch, length, ratio, hidden = 5600, 512, 4, 768
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("less than 8 GiB of the device's memory are free")
    x = torch.zeros(batch, length, hidden, dtype=torch.float16, device="cuda")
    assert x.numel() > 1 << 31
    weight = torch.randn(ratio, ratio * hidden, device="cuda").half() * hidden**-0.5
    bias = torch.zeros(ratio, dtype=torch.float16, device="cuda")
    x[-1] = torch.randn(length, hidden, device="cuda").half()
    merged = run(ops.TOKEN_MERGE, [x, weight, bias], (batch, length, ratio, hidden, 0))
    expected = ops.TOKEN_MERGE.reference(x[-1:], weight, bias, ratio)
    assert not merged[0].any()
    torch.testing.assert_close(merged[-1:], expected, atol=1e-2, rtol=1e-2)
