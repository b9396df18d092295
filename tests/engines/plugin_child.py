"""Run by path in a process of its own: TensorRT's Python bindings over its real plugin registry, without a GPU.

Reads {"sizes": [[B, S, H, k, r], …], "launches": [{…}], "capability"} from one file and writes what the plugins answer
to another. Sizes of tensors are expressions in TensorRT; here each is a number, and the operations compute.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
import tensorrt_bindings.plugin._lib as library
import tensorrt_bindings.plugin._tensor as tensors

from engines.backends.trt_build import Request, build
from engines.plugins import merge

NAMES = [plugin.name for plugin in merge.PLUGINS]
OPERATION = trt.DimensionOperation
COMPUTE = {
    OPERATION.SUM: lambda a, b: a + b,
    OPERATION.SUB: lambda a, b: a - b,
    OPERATION.PROD: lambda a, b: a * b,
    OPERATION.MAX: max,
    OPERATION.MIN: min,
    OPERATION.FLOOR_DIV: lambda a, b: a // b,
    OPERATION.CEIL_DIV: lambda a, b: -(-a // b),
    OPERATION.EQUAL: lambda a, b: int(a == b),
    OPERATION.LESS: lambda a, b: int(a < b),
}
TYPES = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16, "int32": trt.int32}


class Number:
    """A size that is known, in the place of TensorRT's expression."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Numbers:
    """What makes expressions, for numbers."""

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, operation: Any, a: Number, b: Number) -> Number:
        return Number(COMPUTE[operation](a.value, b.value))


class Settings:
    """Whatever is set on it."""


class Argument:
    """An argument of a launch, in the place of TensorRT's own, which takes its own expressions alone."""

    def __init__(self, size: Any) -> None:
        assert isinstance(size, trtp.SymInt32)
        self.value = int(size._expr.value)


class Sizes(dict[int, Any]):
    """The setter of a kernel's size arguments."""

    nbSymExprs = 0


def shapes_of(name: str, B: int, S: int, H: int, k: int, r: int) -> list[tuple[int, ...]]:
    """Of the operator's inputs."""
    x, merged = (B, S, H), (B, -(-S // k), H)
    if name == "TokenSplit":
        return [merged, x, (r, 2 * H), (r,), (H, r), (H,)]
    return [x, *([(B, S)] if name == "MaskedTokenMerge" else []), (k, k * H), (k,)]


def described(shape: tuple[int, ...], kind: Any) -> Any:
    expressions = trtp.ShapeExprs.from_tuple(tuple(trtp.ShapeExpr(Number(size)) for size in shape))
    return trtp.TensorDesc(expressions, kind)


def output_shapes(name: str, sizes: list[list[int]]) -> list[list[int]]:
    """What the registered shape function says of each."""
    function = library.QDP_REGISTRY[f"{merge.NAMESPACE}::{name}"].register_func
    tensors.SymIntExpr._exprBuilder = Numbers()
    results = []
    for B, S, H, k, r in sizes:
        (y,) = function(*(described(shape, trt.float16) for shape in shapes_of(name, B, S, H, k, r)), ratio=k)
        assert y.dtype == trt.float16
        results.append([size.constant_value() for size in y.shape_expr])
    tensors.SymIntExpr._exprBuilder = None
    return results


def created(name: str, ratio: int) -> Any:
    """A plugin made by the registry's creator, from fields as the ONNX parser passes them."""
    creator = trt.get_plugin_registry().get_creator(name, merge.VERSION, merge.NAMESPACE)
    field = trt.PluginField("ratio", np.array([ratio], np.int32), trt.PluginFieldType.INT32)
    fields = trt.PluginFieldCollection([field])
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, merge.NAMESPACE, fields, trt.TensorRTPhase.BUILD, request)


def concrete(shape: tuple[int, ...], kind: Any) -> Any:
    """A tensor as TensorRT describes it when it asks for a kernel; -1 is dynamic."""
    found = trt.DynamicPluginTensorDesc()
    found.desc = trt.PluginTensorDesc()
    found.desc.dims, found.desc.type, found.desc.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
    found.min = found.max = found.opt = trt.Dims([abs(size) for size in shape])
    return found


def launch(order: dict[str, Any]) -> dict[str, Any]:
    """Take a plugin through the calls of a build, up to its kernel."""
    name, (B, S, H, k, r), kind = order["name"], order["sizes"], TYPES[order["kind"]]
    plugin = created(name, k)
    inputs = shapes_of(name, B, S, H, k, r)
    types = plugin.get_output_data_types([kind] * len(inputs), [len(shape) for shape in inputs])
    plugin.input_types = [kind] * len(inputs)
    tensors.SymIntExpr._exprBuilder = Numbers()
    plugin.input_descs = [described(shape, kind) for shape in inputs]
    plugin.output_descs = plugin.register_function(*plugin.input_descs, **plugin.attrs)
    output = tuple(size.constant_value() for size in plugin.output_descs[0].shape_expr)
    tensors.SymIntExpr._exprBuilder = None
    hidden = -1 if order.get("dynamic_hidden") else H
    seen = [(-1, -1, hidden) if len(shape) == 3 else shape for shape in (*inputs, output)]
    descriptions = [concrete(shape, kind) for shape in seen]
    combinations = plugin.get_supported_format_combinations(descriptions, len(inputs))
    plugin.curr_comb = next(iter(plugin.supported_combs))
    plugin.set_tactic(plugin.get_valid_tactics()[0])
    parameters, sizes = Settings(), Sizes()
    plugin.get_launch_params(None, descriptions, len(inputs), parameters, sizes, Numbers())
    kernel, code = plugin.get_kernel([one.desc for one in descriptions[:-1]], [descriptions[-1].desc])
    return {
        "types": [str(one) for one in types],
        "combinations": [[str(one.type), str(one.format)] for one in combinations],
        "output": output,
        "launch": {key: argument.value for key, argument in vars(parameters).items()},
        "sizes": [sizes[index].value for index in range(sizes.nbSymExprs)],
        "kernel": kernel,
        "ptx": code.decode(),
    }


def built(folder: Path) -> dict[str, Any]:
    """What the backend's build does with plugins wanted; the core below TensorRT's bindings builds nothing."""
    registry = trt.get_plugin_registry()
    before = registry.get_creator(NAMES[0], merge.VERSION, merge.NAMESPACE) is not None
    seen: list[bool] = []
    parse = trt.OnnxParser.parse_from_file

    def parsing(*given: Any) -> Any:
        seen.append(all(registry.get_creator(name, merge.VERSION, merge.NAMESPACE) is not None for name in NAMES))
        return parse(*given)

    trt.OnnxParser.parse_from_file = parsing
    trt.Builder.build_serialized_network = lambda *given: b"PLAN"
    profile = {"a": [[1, 1], [1, 1], [1, 1]]}  # what the core calls its one tensor
    request = Request("tensorrt", str(folder / "g.onnx"), str(folder / "g.plan"), [profile], [], plugins=89)
    build(trt, request, lambda stage, share: None, lambda: False)
    return {"before": before, "when parsing": seen, "capability": merge._compute_capability}


def answers(order: dict[str, Any], folder: Path) -> dict[str, Any]:
    through_the_backend = built(folder)
    merge.register(order["capability"])
    merge.register(order["capability"])  # again: harmless
    trt.IDimensionExpr = Number  # what expressions are checked to be
    tensors.SymExprImpl = Argument
    registry = trt.get_plugin_registry()
    creators = [registry.get_creator(name, merge.VERSION, merge.NAMESPACE) for name in NAMES]
    launches = []
    for one in order["launches"]:
        try:
            launches.append(launch(one))
        except Exception as error:
            launches.append({"error": f"{type(error).__name__}: {error}"})
    return {
        "creators": [[one.name, one.plugin_namespace, one.plugin_version] for one in creators],
        "fields": [[[field.name, field.type.name] for field in one.field_names] for one in creators],
        "shapes": {name: output_shapes(name, order["sizes"]) for name in NAMES},
        "launches": launches,
        "built": through_the_backend,
    }


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        order = json.load(file)
    with open(sys.argv[2], "w", encoding="utf-8") as file:  # the library writes to stdout itself
        json.dump(answers(order, Path(sys.argv[2]).parent), file)
    os._exit(0)  # no library that is complete is unloaded here
