"""In which precision and with which attention the fit computes, as suits the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from calib.settings import FitSettings
from exporter.backbone import Backbone


@contextmanager
def plain_attention(backbone: Backbone) -> Iterator[None]:
    """Plain MatMul and Softmax on CPU: the backward pass of its fused attention takes longer than all else together."""
    before = backbone.model.config._attn_implementation
    if torch.cuda.is_available() or before == "eager":
        yield
        return
    backbone.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(before)


def uses_bf16(settings: FitSettings) -> bool:
    if settings.bf16 is not None:
        return settings.bf16
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    # Emulated bf16 is slower than fp32.
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0]
    except OSError:
        return ""


def autocast(settings: FitSettings) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if uses_bf16(settings) else nullcontext()
