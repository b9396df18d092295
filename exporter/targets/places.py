"""A graph with its functions written out, and for every node where it stands and which PyTorch module it comes from."""

from __future__ import annotations

import copy
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.inliner
import onnx.shape_inference
from onnx import numpy_helper

from compexport.errors import InputError, describe

FIXED = ("Identity", "Cast", "CastLike")  # pass a stored value on unchanged
_NAMESPACE, _FUNCTION = "namespace", "function"  # keys of a node's metadata; the first is the tracer's
_READ_AT_MOST = 1 << 20  # bytes of a stored value that a rule may want to look at
_MAX_DEPTH = 32

Size = int | str | None
Function = tuple[str, str]  # domain, name


class Scope:
    """What the names of one graph stand for; a graph inside a node also sees those around it."""

    def __init__(self, graph: onnx.GraphProto, outer: Scope | None = None, folder: Path | None = None) -> None:
        self.graph = graph
        self.folder: Path | None = outer.folder if outer else folder
        self.stored: ChainMap[str, onnx.TensorProto] = outer.stored.new_child() if outer else ChainMap()
        self.makers: ChainMap[str, onnx.NodeProto] = outer.makers.new_child() if outer else ChainMap()
        self.types: ChainMap[str, onnx.TypeProto] = outer.types.new_child() if outer else ChainMap()
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
        for node in graph.node:
            self.makers.update(dict.fromkeys(filter(None, node.output), node))
        for value in (*graph.value_info, *graph.input, *graph.output):
            self.types[value.name] = value.type

    def kind(self, name: str) -> int:
        """The element type of a value, ``TensorProto.UNDEFINED`` when it is not known."""
        if name in self.stored:
            return int(self.stored[name].data_type)
        return int(self.types[name].tensor_type.elem_type) if name in self.types else onnx.TensorProto.UNDEFINED

    def shape(self, name: str) -> tuple[Size, ...] | None:
        """The sizes of a value: numbers, names, None where nothing is known; None when not even the rank is."""
        if name in self.stored:
            return tuple(self.stored[name].dims)
        if name not in self.types or not self.types[name].tensor_type.HasField("shape"):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
            for dim in self.types[name].tensor_type.shape.dim
        )

    def value(self, name: str) -> np.ndarray | None:
        """A stored value, seen through what passes it on; None when it is computed, or large."""
        tensor = self.stored.get(name)
        if tensor is None:
            maker = self.makers.get(name)
            if maker is None:
                return None
            if maker.op_type in FIXED:
                return self.value(maker.input[0])
            return constant(maker)
        if math.prod(tensor.dims) * 8 > _READ_AT_MOST:
            return None
        return self._loaded(tensor)

    def _loaded(self, tensor: onnx.TensorProto) -> np.ndarray | None:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        if self.folder is None:
            return None
        loaded = copy.deepcopy(tensor)
        try:
            onnx.external_data_helper.load_external_data_for_tensor(loaded, str(self.folder))
        except (OSError, ValueError, onnx.checker.ValidationError):
            return None
        return numpy_helper.to_array(loaded)

    def is_stored(self, name: str) -> bool:
        """Whether a value is stored, or passed on from where it is."""
        maker = self.makers.get(name)
        if maker is not None and maker.op_type in FIXED:
            return self.is_stored(maker.input[0])
        return name in self.stored or (maker is not None and maker.op_type == "Constant")

    def is_fixed(self, name: str) -> bool:
        """Whether a value is the same for all inputs: computed from what is stored and from sizes that are numbers."""
        seen, left = set[str](), [name]
        while left:
            name = left.pop()
            if name in seen or name in self.stored:
                continue
            seen.add(name)
            maker = self.makers.get(name)
            if maker is None or maker.op_type.startswith("Random"):
                return False
            if maker.op_type not in ("Shape", "Size"):
                left += filter(None, maker.input)
            elif (shape := self.shape(maker.input[0])) is None or not all(isinstance(size, int) for size in shape):
                return False
        return True


@dataclass(frozen=True)
class Place:
    """One node. ``module``: path and class of its PyTorch module; ``function``: the ONNX functions it stands in."""

    node: onnx.NodeProto
    scope: Scope
    module: str = ""
    function: str = ""

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        return next((one for one in self.node.attribute if one.name == name), None)

    def number(self, name: str, default: float) -> float:
        """A numeric attribute."""
        found = self.attribute(name)
        return default if found is None else found.i if found.type == onnx.AttributeProto.INT else found.f

    def input(self, index: int) -> str:
        """The name of an input, empty when it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""


@dataclass(frozen=True)
class Opened:
    """``written``: the model as it is in the file; ``places``: its nodes with all functions written out."""

    written: onnx.ModelProto
    calls: list[Place]
    places: list[Place]

    @property
    def opset(self) -> int:
        """The version of the standard operators that the file asks for."""
        return next((entry.version for entry in self.written.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @property
    def functions(self) -> dict[Function, onnx.FunctionProto]:
        return {(function.domain, function.name): function for function in self.written.functions}


def open_model(path: Path) -> Opened:
    """Read an ONNX file, large tensors left on disk; raises InputError when it is none."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exception types differ between its implementations
        message = describe(f"{path}: cannot be read as an ONNX model", got=str(error)[:200] or type(error).__name__)
        raise InputError(message) from error
    if not model.HasField("graph"):
        raise InputError(describe(f"{path}: not an ONNX model", expected="a file with a graph"))
    return opened(model, path.parent)


def opened(model: onnx.ModelProto, folder: Path | None = None) -> Opened:
    """The same for a model in memory; ``folder`` is where its external data lies."""
    calls = list(_places(model.graph, Scope(model.graph, folder=folder)))
    plain = _with_shapes(_plain(model, {(call.node.domain, call.node.op_type) for call in calls}))
    return Opened(model, calls, list(_places(plain.graph, Scope(plain.graph, folder=folder))))


def constant(node: onnx.NodeProto) -> np.ndarray | None:
    """The value of a Constant node; None for any other node."""
    if node.op_type != "Constant" or not node.attribute:
        return None
    value = onnx.helper.get_attribute_value(node.attribute[0])
    if node.attribute[0].name == "value":
        return numpy_helper.to_array(value)
    return np.array(value) if node.attribute[0].name.startswith(("value_int", "value_float")) else None


def _places(graph: onnx.GraphProto, scope: Scope, around: str = "") -> Iterator[Place]:
    for node in graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        module = _module(notes.get(_NAMESPACE, ""), node.name) or around
        yield Place(node, scope, module, notes.get(_FUNCTION, ""))
        for inner in _graphs(node):
            yield from _places(inner, Scope(inner, scope), module)


def _module(namespace: str, name: str) -> str:
    """``": pkg.Model/encoder.layer.0: pkg.Layer/add_1: aten.add.Tensor"`` -> ``encoder.layer.0 (Layer)``.

    Older exporters write modules into the node's name: ``/encoder/layer.0/Add`` -> ``encoder.layer.0``.
    """
    *modules, _ = [entry.partition(": ") for entry in namespace.split("/")]
    known = [(path, kind) for path, _, kind in modules if "." in kind]
    if known:
        path, kind = known[-1]
        short = kind.rpartition(".")[2]
        return f"{path} ({short})" if path else short
    return ".".join(name.split("/")[1:-1]) if name.startswith("/") else ""


# --- functions written out ------------------------------------------------------------------------------------------


def _plain(model: onnx.ModelProto, called: set[Function]) -> onnx.ModelProto:
    """The model without functions; each node of a body says which call it comes from.

    The inliner keeps a body's metadata but not the call's, so every call first gets a body of its own.
    """
    functions = {(function.domain, function.name): function for function in model.functions}
    if not functions.keys() & called:
        return model
    single = onnx.ModelProto()
    single.CopyFrom(model)
    bodies: list[onnx.FunctionProto] = []
    _give_own_bodies(single.graph.node, functions, bodies)
    del single.functions[:]
    single.functions.extend(bodies)
    return onnx.inliner.inline_local_functions(single)


def _give_own_bodies(
    nodes: Sequence[onnx.NodeProto],
    functions: Mapping[Function, onnx.FunctionProto],
    bodies: list[onnx.FunctionProto],
    path: tuple[str, ...] = (),
) -> None:
    """Point every call among ``nodes`` at a copy of its function, added to ``bodies``, whose nodes are marked."""
    for call in _nodes(nodes):
        function = functions.get((call.domain, call.op_type))
        if function is None:
            continue
        if len(path) > _MAX_DEPTH:
            raise InputError(
                describe(f"function {call.op_type}", got="one that calls itself", expected="none that does")
            )
        namespace = next((entry.value for entry in call.metadata_props if entry.key == _NAMESPACE), "")
        inside = (*path, function.name)
        body = onnx.FunctionProto()
        body.CopyFrom(function)
        body.name = call.op_type = f"{function.name}.{len(bodies)}"
        bodies.append(body)
        for node in _nodes(body.node):
            del node.metadata_props[:]
            node.metadata_props.add(key=_NAMESPACE, value=namespace)
            node.metadata_props.add(key=_FUNCTION, value=" > ".join(inside))
        _give_own_bodies(body.node, functions, bodies, inside)


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All of them, with those of the graphs inside them."""
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _nodes(graph.node)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shapes where they can be inferred; a rule that needs one that cannot says nothing."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # inference refuses models that a compiler may well take; the rules speak about the compiler
        return model
