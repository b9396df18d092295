"""Run by path in a process of its own, TRITON_INTERPRET=1: the merge kernels, interpreted, against the eager operators.

Triton decides when it is imported whether functions are interpreted or compiled, so this is no part of another process;
tests on a GPU import it, and launch what is compiled.
Writes [{"op", "kind", "sizes", "worst", "eager_worst", "largest", "same"}] and what hidden tokens change to a file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from engines.plugins import kernels, ptx
from engines.plugins.merge import PLUGINS
from exporter import ops

KINDS = (torch.float32, torch.float16, torch.bfloat16)
# B, S, k, H, r: one token, S below k, S divided and not, k not a power of two, H and r smaller and larger than a tile.
SIZES = [(1, 1, 1, 5, 1), (2, 3, 4, 8, 2), (2, 7, 3, 20, 5), (3, 16, 4, 40, 17), (1, 37, 2, 16, 16), (2, 20, 5, 12, 3)]
SIZES += [(20, 9, 2, 8, 1), (1, 16, 16, 72, 20), (1, 34, 17, 130, 33)]
# Every remainder of S by k, in few numbers.
MANY = [(2, S, k, 3, 2) for k in (1, 2, 3, 5, 8) for S in sorted({1, k, k + 1, 2 * k, 3 * k - 1, 3 * k + 2})]
KERNELS = {plugin.name: plugin.kernel for plugin in PLUGINS}


def teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers and multiplies those; the matrix units multiply the numbers."""
    real = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return real(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def inputs_of(op: ops.Op, sizes: tuple[int, ...], kind: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Random inputs around 1; the mask leaves the first row without any token."""
    B, S, k, H, r = sizes
    draw = torch.Generator().manual_seed(B * S + H)
    merged = {"x": (B, S, H), "y": (B, -(-S // k), H), "weight": (k, k * H), "bias": (k,)}
    shapes = {**merged, "down_w": (r, 2 * H), "down_b": (r,), "up_w": (H, r), "up_b": (H,)}
    scales = {"weight": H**-0.5, "down_w": H**-0.5, "up_w": r**-0.5}
    made = []
    for name in op.inputs:
        if name == "mask":
            mask = (torch.rand(B, S, generator=draw) > 0.4).to(kind)
            mask[0] = 0
            made.append(mask)
        else:
            made.append((torch.randn(shapes[name], generator=draw) * scales.get(name, 1.0)).to(kind))
    return [tensor.to(device) for tensor in made]


def run(op: ops.Op, inputs: list[torch.Tensor], sizes: tuple[int, ...]) -> torch.Tensor:
    B, S, k, H, r = sizes
    groups = -(-S // k)
    kind = str(inputs[0].dtype).removeprefix("torch.")
    constants = ptx.constants(KERNELS[op.name], kind, ptx.KernelShape(k, H, r))
    out = torch.full_like(inputs[0][:, :1], float("nan")).repeat(1, S if op is ops.TOKEN_SPLIT else groups, 1)
    programs = -(-B * groups // ptx.ROWS)
    getattr(kernels, KERNELS[op.name])[(programs,)](*inputs, S, groups, B * groups, out, **constants)
    return out


def compared(op: ops.Op, kind: torch.dtype, sizes: tuple[int, ...], device: str = "cpu") -> dict[str, Any]:
    inputs = inputs_of(op, sizes, kind, device)
    got, eager = run(op, inputs, sizes), op.reference(*inputs, sizes[2])
    exact = op.reference(*(tensor.double() for tensor in inputs), sizes[2])
    return {
        "op": op.name,
        "kind": str(kind).removeprefix("torch."),
        "sizes": sizes,
        "worst": (got.double() - exact).abs().max().item(),
        "eager_worst": (eager.double() - exact).abs().max().item(),
        "largest": exact.abs().max().item(),
        "same": got.dtype == eager.dtype and got.shape == eager.shape,
    }


def hidden_tokens(device: str = "cpu") -> dict[str, bool]:
    """What a masked merge makes of infinite values that the mask hides, and of groups without tokens."""
    sizes = (2, 10, 4, 16, 1)
    x, mask, weight, bias = inputs_of(ops.MASKED_TOKEN_MERGE, sizes, torch.float16, device)
    infinite = x.masked_fill(mask[..., None] < 0.5, float("inf"))
    before, after = (run(ops.MASKED_TOKEN_MERGE, [tokens, mask, weight, bias], sizes) for tokens in (x, infinite))
    return {"unchanged": torch.equal(before, after), "zero": not before[0].any().item()}


if __name__ == "__main__":
    teach_bfloat16()
    rows = [compared(op, kind, sizes) for op in ops.OPS for kind in KINDS for sizes in SIZES]
    rows += [compared(op, torch.float32, sizes) for op in ops.OPS for sizes in MANY]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"rows": rows, "hidden": hidden_tokens()}, file)
