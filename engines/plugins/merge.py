"""``TokenMerge``, ``MaskedTokenMerge`` and ``TokenSplit`` as plugins of TensorRT whose kernels are stored in the plan.

A plan that uses them needs neither Python nor this package. TensorRT alone: TensorRT-RTX has no plugins, and ends the
process that registers some. A node with ``plugin_namespace`` becomes the plugin where it is registered, and its
function body where it is not. Letters: B batch, S length, H hidden size, k ratio, m = ceil(S / k) groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from compexport.errors import CompexportError, describe
from engines.backends import cuda
from engines.plugins.ptx import PORTABLE, ROWS, KernelShape, capability_for, compiled

NAMESPACE, VERSION = "compexport", "1"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Plugin:
    """One operator: its name in ONNX, its kernel, its inputs in their order."""

    name: str
    kernel: str
    tensors: tuple[str, ...]


PLUGINS = (
    Plugin("TokenMerge", "token_merge", ("x", "weight", "bias")),
    Plugin("MaskedTokenMerge", "masked_token_merge", ("x", "mask", "weight", "bias")),
    Plugin("TokenSplit", "token_split", ("y", "x", "down_w", "down_b", "up_w", "up_b")),
)

_compute_capability = PORTABLE


def register(capability: int | None = None) -> None:
    """Make the plugins known to TensorRT in this process; once is enough, again changes the capability only.

    ``capability``: compute capability of the device to build for, as 89; by default that of this machine's first one.
    80 gives kernels for every later device too, as hardware-compatible plans want. Raises DependencyError when there
    is no device to ask.
    """
    global _compute_capability
    if capability is None:
        capability = capability_for(cuda.require_device("registering plugins for this machine").capability)
    import tensorrt
    import tensorrt.plugin

    _compute_capability = capability
    registry = tensorrt.get_plugin_registry()
    for plugin in PLUGINS:
        if registry.get_creator(plugin.name, VERSION, NAMESPACE) is None:
            _define(plugin, tensorrt.plugin)


def _define(plugin: Plugin, trtp: Any) -> None:
    """Declare a plugin to ``tensorrt.plugin``, which registers it; that reads types from the functions' signatures."""
    tensors = dict.fromkeys(plugin.tensors, trtp.TensorDesc)
    outputs = {"outputs": tuple[trtp.TensorDesc]}
    launch = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    name = f"{NAMESPACE}::{plugin.name}"

    def shapes(*inputs: Any, ratio: int) -> tuple[Any]:
        return (_output(plugin, inputs, ratio, trtp),)

    def types(*inputs: Any) -> list[Any]:
        """All tensors of one type, in the order in which they lie in memory."""
        return [trtp.AutoTuneCombination(", ".join(["FP32|FP16|BF16"] * (len(tensors) + 1)), "LINEAR", [1])]

    def kernel(*arguments: Any) -> tuple[str, str, Any, Any]:
        *inputs, ratio, _, _ = arguments
        return _launch(plugin, dict(zip(plugin.tensors, inputs, strict=True)), ratio, trtp)

    trtp.register(name)(_signed(shapes, {**tensors, "ratio": int}, tuple[trtp.TensorDesc]))
    trtp.autotune(name)(_signed(types, {**tensors, **outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(_signed(kernel, {**tensors, "ratio": int, **outputs, "tactic": int}, launch))


def _signed(function: Function, parameters: Mapping[str, Any], result: Any) -> Function:
    """Give a function of any arguments the signature that TensorRT is to read."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    vars(function)["__signature__"] = inspect.Signature(listed, return_annotation=result)
    return function


def _output(plugin: Plugin, inputs: tuple[Any, ...], ratio: int, trtp: Any) -> Any:
    """x [B,S,H] -> y [B,m,H], or of TokenSplit [B,S,H]."""
    made = inputs[plugin.tensors.index("x")].like()
    if plugin.name != "TokenSplit":
        made.shape_expr[1] = trtp.cdiv(made.shape_expr[1], ratio)
    return made


def _launch(plugin: Plugin, inputs: Mapping[str, Any], ratio: int, trtp: Any) -> tuple[str, str, Any, Any]:
    """The kernel's name, its PTX, how many programs to start, and its size arguments."""
    x = inputs["x"]
    width = _known_size(inputs["down_w"], 0) if "down_w" in inputs else 0
    shape = KernelShape(ratio, _known_size(x, 2), width)
    code = compiled(plugin.kernel, _kind(x), shape, _compute_capability)
    length = x.shape_expr[1]
    groups = trtp.cdiv(length, ratio)
    total = x.shape_expr[0] * groups
    parameters = trtp.KernelLaunchParams(
        grid_x=trtp.cdiv(total, ROWS), block_x=code.threads, shared_mem=code.shared_bytes
    )
    sizes = trtp.SymIntExprs(3)
    for index, size in enumerate((length, groups, total)):
        sizes[index] = trtp.SymInt32(size)
    return code.name, code.ptx, parameters, sizes


def _known_size(tensor: Any, axis: int) -> int:
    """A size that must be known when the plan is made, as those of weights are; CompexportError when it is not."""
    size = int(tensor.shape[axis])
    if size < 1:
        raise CompexportError(describe("merge plugin", got="a dynamic hidden size", expected="one known when building"))
    return size


def _kind(x: Any) -> str:
    """The name of a tensor's type as ``engines.plugins.ptx`` knows it."""
    import tensorrt

    kinds = {tensorrt.float32: "float32", tensorrt.float16: "float16", tensorrt.bfloat16: "bfloat16"}
    return kinds.get(x.dtype, str(x.dtype))
