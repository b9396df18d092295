"""The merge kernels of ``engines.plugins`` on the device: time, bytes moved, share of what a copy moves.

Letters: B batch, S length, H hidden size, k ratio, r width of the adapter, m = ceil(S / k) groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu_device import DTYPES, Device
from benchmarks.gpu_judge import Ceilings, Row, percentiles
from engines.measure import in_turn
from engines.plugins import ptx

# Kernel, and how many times it reads and writes x [B,S,H] and y [B,m,H].
KERNELS = {"token_merge": (1, 1), "masked_token_merge": (1, 1), "token_split": (2, 1)}
WIDTH = 64
_ROTATED_BYTES = 1 << 28  # what a round of launches touches, beyond any card's L2
_MOST_LAUNCHES = 32


@dataclass(frozen=True)
class KernelCell:
    """One kernel at one size."""

    kernel: str
    ratio: int
    batch: int
    length: int
    hidden: int
    precision: str

    @property
    def key(self) -> str:
        """Its name in the work folder."""
        sizes = f"k{self.ratio} {self.batch}x{self.length}x{self.hidden}"
        return f"kernels {self.kernel} {self.precision} {sizes}"

    def moved_bytes(self) -> int:
        """The fewest bytes that can be read and written: every tensor once, weights included."""
        item = 4 if self.precision == "fp32" else 2
        tokens, groups = self.batch * self.length, self.batch * -(-self.length // self.ratio)
        of_x, of_y = KERNELS[self.kernel]
        moved = (of_x * tokens + of_y * groups) * self.hidden
        if self.kernel == "token_split":
            return item * (moved + 3 * WIDTH * self.hidden + WIDTH + self.hidden)
        mask = tokens if self.kernel == "masked_token_merge" else 0
        return item * (moved + mask + self.ratio * self.ratio * self.hidden + self.ratio)


def unavailable() -> str:
    """Why kernels cannot be timed, or an empty text."""
    return "" if find_spec("triton") else "triton is not installed"


def cells(quick: bool, precisions: list[str]) -> Iterator[KernelCell]:
    """What is measured, the judged ones first."""
    sizes = [(2, 24, 64)] if quick else [(32, 128, 768), (128, 128, 768), (128, 512, 768), (1, 128, 768)]
    for precision in precisions:
        for batch, length, hidden in sizes:
            for ratio in (2, 4, 8):
                for kernel in KERNELS:
                    yield KernelCell(kernel, ratio, batch, length, hidden, precision)


def measured(cell: KernelCell, device: Device, ceilings: Ceilings, runs: int) -> Row:
    """Kernel, eager operator and a copy of as many bytes, in turn; ms are of one launch."""
    from exporter import ops

    moved = cell.moved_bytes()
    launches = 1 if not device.is_cuda else max(2, min(_MOST_LAUNCHES, -(-_ROTATED_BYTES // moved)))
    sets = [_tensors(cell, device) for _ in range(launches)]
    operator = next(op for op in ops.OPS if op.torch_name.endswith(f"::{cell.kernel}"))
    groups = {
        "kernel": [partial(_launch, cell, inputs, out) for inputs, out in sets],
        "eager": [partial(operator.reference, *inputs, cell.ratio) for inputs, _ in sets],
        "copy": [device.copying(moved // 2) for _ in sets],  # reads and writes as many bytes together
    }
    clocks = {name: partial(device.device_ms, device.repeated(calls)) for name, calls in groups.items()}
    taken = in_turn(clocks, min_runs=runs, min_seconds=0.0, warmup=3)
    times = {name: percentiles([ms / launches for ms in found]) for name, found in taken.items()}
    p50 = times["kernel"]["p50_ms"]
    return {
        **vars(cell),
        "part": "kernels",
        "tokens": cell.batch * cell.length,
        "moved_bytes": moved,
        "launches": launches,
        **times["kernel"],
        "eager_p50_ms": times["eager"]["p50_ms"],
        "copy_p50_ms": times["copy"]["p50_ms"],
        "gb_s": round(moved / p50 / 1e6, 1),
        "share_of_copy": round(times["copy"]["p50_ms"] / p50, 3),
        "share_of_ceiling": round(moved / p50 / 1e6 / ceilings.copy_gb_s, 3),
    }


def _tensors(cell: KernelCell, device: Device) -> tuple[list[Any], Any]:
    """Inputs in the operator's order, and room for the result."""
    torch = device.torch
    k, H, r = cell.ratio, cell.hidden, WIDTH
    m = -(-cell.length // k)
    dtype = getattr(torch, DTYPES[cell.precision])

    def drawn(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(*shape, device=device.name) * scale).to(dtype)

    x, y = drawn(cell.batch, cell.length, H), drawn(cell.batch, m, H)
    if cell.kernel == "token_split":
        down, up = drawn(r, 2 * H, scale=H**-0.5), drawn(H, r, scale=r**-0.5)
        return [y, x, down, drawn(r), up, drawn(H)], torch.empty_like(x)
    mask = [torch.ones(cell.batch, cell.length, dtype=dtype, device=device.name)]
    masks = mask if cell.kernel == "masked_token_merge" else []
    return [x, *masks, drawn(k, k * H, scale=H**-0.5), drawn(k)], torch.empty_like(y)


def _launch(cell: KernelCell, inputs: list[Any], out: Any) -> None:
    """As TensorRT does: a program for so many groups, tiles as ``ptx`` chooses them."""
    from engines.plugins import kernels

    groups = -(-cell.length // cell.ratio)
    total = cell.batch * groups
    shape = ptx.KernelShape(cell.ratio, cell.hidden, WIDTH)
    known = ptx.constants(cell.kernel, DTYPES[cell.precision], shape)
    kernel: Any = getattr(kernels, cell.kernel)
    kernel[(-(-total // ptx.ROWS),)](*inputs, cell.length, groups, total, out, **known)
