"""On which device, in which precision and with which attention a fit computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe

Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


def training_device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def uses_bf16(precision: Precision) -> bool:
    """Whether products are computed in bf16; ``auto``: where the processor multiplies it natively.

    Raises InputError for bf16 on a GPU that lacks it.
    """
    if precision == "fp32":
        return False
    if torch.cuda.is_available():
        native = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        if precision == "bf16" and not native:
            name = torch.cuda.get_device_name()
            raise InputError(describe("precision", got="bf16", expected=f"fp32, as {name} has no bf16"))
        return native
    # Emulated bf16 is slower than fp32, but a CPU without it computes the same numbers.
    return precision == "bf16" or "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0]
    except OSError:
        return ""


def autocast(precision: Precision) -> Any:
    """The context in which a precision holds, for what runs outside of the trainer."""
    return torch.autocast(training_device().type, torch.bfloat16) if uses_bf16(precision) else nullcontext()


@contextmanager
def moved(model: nn.Module) -> Iterator[torch.device]:
    """``model`` on the device that trains, and back on the CPU afterwards."""
    device = training_device()
    model.to(device)
    try:
        yield device
    finally:
        model.to("cpu")


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Plain MatMul and Softmax on CPU: the backward pass of its fused attention takes longer than all else together."""
    before = model.config._attn_implementation
    if torch.cuda.is_available() or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
