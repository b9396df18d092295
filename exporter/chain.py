"""Joining traced graphs end to end: what is traced once may stand in the result any number of times, its weights once.

Traced as a whole, a shared layer would be copied for every use: the exporter folds a transpose of each of its matrices
per use. Here the layer is traced alone, and its nodes are repeated over one set of initialisers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import numpy_helper


class Chain:
    """A graph that grows by traced graphs. Equal tensors are stored once, and what is computed equally is so once."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._results: dict[bytes, Iterable[str]] = {}
        self._stored: dict[bytes, onnx.TensorProto] = {}
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._made: dict[str, onnx.ValueInfoProto] = {}
        self._opsets: dict[str, int] = {}
        self._ir_version = 0

    def input(self, value: onnx.ValueInfoProto) -> str:
        """An input of the whole, and its name. They stand in the order in which they are first named."""
        return self._inputs.setdefault(value.name, value).name

    def constant(self, array: np.ndarray, name: str) -> str:
        """A stored tensor; its name here, another one where an equal tensor is stored already."""
        return self._store(numpy_helper.from_array(array, name))

    def add(self, graph: onnx.ModelProto, prefix: str = "", wires: Mapping[str, str] | None = None) -> dict[str, str]:
        """Append ``graph``; the names that its outputs have here.

            add(a, "0/", {"x": "in"}); add(a, "1/", {"x": "0/y"})    ->    in -> a -> 0/y -> a -> 1/y

        ``wires``: its input -> a tensor that is here; inputs that are not in it become inputs of the whole, one for all
        that have the name. Requires another ``prefix`` each time, and nodes without graphs inside.
        """
        wires = wires or {}
        for value in graph.graph.input:
            if value.name not in wires:
                self.input(value)
        names = {"": "", **{value.name: wires.get(value.name, value.name) for value in graph.graph.input}}
        names |= {tensor.name: self._store(tensor) for tensor in graph.graph.initializer}
        for node in graph.graph.node:
            self._append(node, prefix, names)
        for entry in graph.opset_import:
            self._opsets[entry.domain] = max(entry.version, self._opsets.get(entry.domain, 0))
        self._ir_version = max(self._ir_version, graph.ir_version)
        self._made |= {names[value.name]: value for value in graph.graph.output}
        return {value.name: names[value.name] for value in graph.graph.output}

    def made(self, name: str) -> onnx.ValueInfoProto:
        """Type and shape of a tensor here, which must be an output of something added."""
        return self._made[name]

    def model(self, outputs: Mapping[str, str]) -> onnx.ModelProto:
        """What ``outputs`` (name -> name here, of an output of something added) need; all inputs stay."""
        renamed = {here: name for name, here in outputs.items()}
        if len(renamed) != len(outputs):
            raise ValueError(f"one tensor under two names: {dict(outputs)}")
        model = onnx.ModelProto(ir_version=self._ir_version, producer_name="compexport")
        for domain, version in sorted(self._opsets.items()):
            model.opset_import.add(domain=domain, version=version)
        model.graph.name = "main_graph"
        model.graph.node.extend(_needed(self._nodes, renamed))
        for node in model.graph.node:
            _rename(node, renamed)
        used = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(tensor for tensor in self._stored.values() if tensor.name in used)
        model.graph.input.extend(self._inputs.values())
        for name, here in outputs.items():
            model.graph.output.add().CopyFrom(self._made[here])
            model.graph.output[-1].name = name
        return model

    def _append(self, node: onnx.NodeProto, prefix: str, names: dict[str, str]) -> None:
        """Add one node, unless the same was computed before; ``names`` (there -> here) grows by its outputs."""
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ValueError(f"{node.op_type} {node.name} holds a graph")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names[name] for name in node.input]
        key = onnx.NodeProto(op_type=copy.op_type, domain=copy.domain, input=copy.input, attribute=copy.attribute)
        content = key.SerializeToString(deterministic=True)
        if content in self._results:
            names.update(zip(node.output, self._results[content], strict=True))
            return
        copy.name = f"{prefix}{node.name}"
        copy.output[:] = [f"{prefix}{name}" if name else "" for name in node.output]
        names.update(zip(node.output, copy.output, strict=True))
        self._results[content] = list(copy.output)
        self._nodes.append(copy)

    def _store(self, tensor: onnx.TensorProto) -> str:
        """The name of a tensor of this content, which is stored unless it is there."""
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.ClearField("name")
        content = copy.SerializeToString(deterministic=True)
        if content not in self._stored:
            taken = {one.name for one in self._stored.values()}
            number = sum(name == tensor.name or name.startswith(f"{tensor.name}~") for name in taken)
            copy.name = f"{tensor.name}~{number}" if number else tensor.name
            self._stored[content] = copy
        return self._stored[content].name


def _needed(nodes: list[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


def _rename(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    for names in (node.input, node.output):
        for index, name in enumerate(names):
            names[index] = renamed.get(name, name)
