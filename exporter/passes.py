"""Graph passes after tracing: small edits of an ONNX model, each with what must hold before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engines.manifest import PREVIOUS, ROWS
from exporter import ops

MASK, KEPT = "attention_mask", "kept"
SPLIT = ops.TOKEN_SPLIT.name
MERGES = (ops.TOKEN_MERGE.name, ops.MASKED_TOKEN_MERGE.name)


def bind_ratio(template: onnx.ModelProto, ratio: int, tensors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The graph of one ratio from the traced template.

        MaskedTokenMerge<ratio=2>(x, …) -> MaskedTokenMerge<ratio=k>(x, …), its initialisers replaced by ``tensors``

    Requires a name in ``tensors`` for every initialiser that a custom operator reads. Ensures that the operators'
    function bodies are part of the model.
    """
    unbound = plugin_initializers(template) - tensors.keys()
    if unbound:
        raise ValueError(f"no tensors for {sorted(unbound)}")
    model = _structure(template)
    _take_initializers(model, template, tensors)
    return with_bodies(model, ratio)


def with_bodies(model: onnx.ModelProto, ratio: int) -> onnx.ModelProto:
    """Give every custom operator its ``ratio``, and the model their function bodies.

    In place. Requires that all of them have the same ratio.
    """
    names = set()
    for node in model.graph.node:
        if node.domain == ops.DOMAIN:
            names.add(node.op_type)
            _set_attributes(node, ratio)
    model.functions.extend(ops.functions(sorted(names)))
    return model


def without_merging(template: onnx.ModelProto) -> onnx.ModelProto:
    """The backbone's own graph from the traced template.

        z = Merge(x, …); y = FFN(z); s = TokenSplit(y, x, …); x + s   ->   y = FFN(x); x + y

    Ensures that no custom operator and no tensor of theirs is left.
    """
    model = _structure(template)
    renamed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.domain == ops.DOMAIN and node.op_type in (SPLIT, *MERGES)
    }
    kept = [node for node in model.graph.node if node.domain != ops.DOMAIN]
    for node in kept:
        for index, name in enumerate(node.input):
            while name in renamed:
                name = renamed[name]
            node.input[index] = name
    _replace_nodes(model, kept)
    opsets = [entry for entry in model.opset_import if entry.domain != ops.DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    _take_initializers(model, template, {})
    return model


def with_constant_lookups(template: onnx.ModelProto) -> onnx.ModelProto:
    """Replace look-ups of fixed rows by those rows, so that a table that nothing else reads is left out.

        Gather<axis=0>(table, ids), both stored   ->   rows, stored

    In place. Ensures that no such node is left.
    """
    stored = {tensor.name: tensor for tensor in template.graph.initializer}
    kept = []
    for node in template.graph.node:
        if node.op_type == "Gather" and all(name in stored for name in node.input) and not _attribute(node, "axis"):
            table, ids = (numpy_helper.to_array(stored[name]) for name in node.input)
            template.graph.initializer.append(numpy_helper.from_array(table[ids], node.output[0]))
        else:
            kept.append(node)
    _replace_nodes(template, kept)
    return template


def with_divisions(template: onnx.ModelProto) -> onnx.ModelProto:
    """Write reciprocal square roots as runtimes know them from norms, so that they fuse an RMS norm into one kernel.

        x * Reciprocal(Sqrt(v))   ->   x / Sqrt(v)

    In place. Ensures that no reciprocal is left that only such products read.
    """
    made = {node.output[0]: node for node in template.graph.node}
    for node in template.graph.node:
        if node.op_type != "Mul":
            continue
        for x, r in (tuple(node.input), tuple(node.input)[::-1]):
            root = made.get(made[r].input[0]) if r in made and made[r].op_type == "Reciprocal" else None
            if root is not None and root.op_type == "Sqrt":
                node.op_type = "Div"
                node.input[0], node.input[1] = x, root.output[0]
                break
    used = {name for node in template.graph.node for name in node.input} | {v.name for v in template.graph.output}
    _replace_nodes(
        template, [node for node in template.graph.node if node.op_type != "Reciprocal" or node.output[0] in used]
    )
    return template


def part(template: onnx.ModelProto, outputs: Mapping[str, str]) -> onnx.ModelProto:
    """What is needed for some of the traced outputs, given as new name -> traced name.

    ids -> a -> hidden.1 -> b -> hidden.2, logits.2          {"logits": "logits.1"}
           hidden.1 -> c -> logits.1                   ->    ids -> a -> hidden.1 -> c -> logits
    """
    return _part(template, {name: name for name in _names(template.graph.input)}, outputs)


def part_from(template: onnx.ModelProto, state: str, outputs: Mapping[str, str]) -> onnx.ModelProto:
    """The same from the traced output ``state`` [batch, sequence, …] on, for chosen rows of it and of the mask.

        hidden.1 -> b(attention_mask) -> hidden.2    ->    Gather(previous, rows) -> b(Gather(attention_mask, rows))

    Requires that between ``state`` and ``outputs`` nothing but sizes is read from the traced inputs other than the
    mask. Ensures that the inputs are ``previous``, ``attention_mask`` and ``rows``.
    """
    taken = {state: f"{PREVIOUS}.taken", MASK: f"{MASK}.taken"}
    model = _part(template, taken, outputs)
    sized = set(_names(template.graph.input))
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] in sized:
            node.input[0] = taken[MASK]  # all inputs have the mask's shape
    gathers = [
        helper.make_node("Gather", [source, ROWS], [f"{source}.taken"], f"take_{source}", axis=0)
        for source in (PREVIOUS, MASK)
    ]
    body = list(model.graph.node)
    _replace_nodes(model, [*gathers, *body])
    return _with_rows(model, template, state)


def _part(template: onnx.ModelProto, starts: Mapping[str, str], outputs: Mapping[str, str]) -> onnx.ModelProto:
    """Nodes and initialisers between ``starts`` (traced name -> new name) and ``outputs`` (new name -> traced name)."""
    needed = set(outputs.values())
    kept = []
    for node in reversed(template.graph.node):
        if any(name in needed and name not in starts for name in node.output):
            kept.append(node)
            needed.update(node.input)
    renamed = {**{traced: new for new, traced in outputs.items()}, **starts}
    model = _structure(template)
    _replace_nodes(model, kept[::-1])
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    made = {value.name: value for value in template.graph.output}
    del model.graph.output[:]
    for new, traced in outputs.items():
        model.graph.output.add().CopyFrom(made[traced])
        model.graph.output[-1].name = new
    _take_initializers(model, template, {})
    return model


def _with_rows(model: onnx.ModelProto, template: onnx.ModelProto, state: str) -> onnx.ModelProto:
    """Inputs of a later part in the place of the traced ones; its outputs have one row for each of ``rows``."""
    traced = {value.name: value for value in (*template.graph.input, *template.graph.output)}
    inputs = [
        renamed_value(traced[source], name)
        for source, name in zip((state, MASK, MASK), (PREVIOUS, MASK, ROWS), strict=True)
    ]
    del inputs[2].type.tensor_type.shape.dim[1:]
    for value in (inputs[2], *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = KEPT
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def _names(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def with_inferred_widths(template: onnx.ModelProto) -> onnx.ModelProto:
    """Let reshapes infer their last size, so that the graph serves any width.

        Reshape(x, Concat(batch, sequence, 768))   ->   Reshape(x, Concat(batch, sequence, -1))

    In place; only where the two sizes before are computed, so that the last is the only one left to infer.
    """
    stored = {tensor.name for tensor in template.graph.initializer}
    shapes = {node.input[1] for node in template.graph.node if node.op_type == "Reshape"}
    inferred = numpy_helper.from_array(np.array([-1]), "inferred_width")
    found = False
    for node in template.graph.node:
        if node.op_type == "Concat" and node.output[0] in shapes and len(node.input) == 3:
            *sizes, last = node.input
            if last in stored and not stored.intersection(sizes):
                node.input[2] = inferred.name
                found = True
    if found:
        template.graph.initializer.append(inferred)
    return template


def with_tensors(template: onnx.ModelProto, tensors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy with other values for the named initialisers, of whatever shapes."""
    model = _structure(template)
    _take_initializers(model, template, tensors)
    return model


def with_names(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """Other names for initialisers; two that get the same name become one. In place."""
    kept: dict[str, onnx.TensorProto] = {}
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        kept.setdefault(tensor.name, tensor)
    stored = list(kept.values())
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    return model


def with_axis(model: onnx.ModelProto, outputs: Iterable[str], axis: int, name: str) -> onnx.ModelProto:
    """Name an axis of outputs, which the tracer calls a sum of others. In place."""
    wanted = set(outputs)
    for value in model.graph.output:
        if value.name in wanted:
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return model


def with_kept_axes(template: onnx.ModelProto) -> onnx.ModelProto:
    """Let reshapes keep their first two axes by saying so, and not by computing what they are.

        Reshape(x, Concat(batch, sequence, 12, 64))   ->   Reshape(x, (0, 0, 12, 64))

    In place. Requires that every reshape to two computed sizes and stored ones keeps its first two axes.
    """
    stored = {tensor.name: tensor for tensor in template.graph.initializer}
    made = {node.output[0]: node for node in template.graph.node}
    for node in template.graph.node:
        shape = made.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or shape.op_type != "Concat" or [name in stored for name in shape.input[:3]] != [0, 0, 1]:
            continue
        sizes = [numpy_helper.to_array(stored[name]) for name in shape.input[2:] if name in stored]
        kept = np.concatenate([np.zeros(2, np.int64), *sizes])
        name = f"keeps_{'_'.join(map(str, kept[2:]))}"
        if name not in stored:
            stored[name] = numpy_helper.from_array(kept, name)
            template.graph.initializer.append(stored[name])
        node.input[1] = name
        del node.attribute[:]  # the tracer's allowzero, by which a 0 is a size
    return part(template, {value.name: value.name for value in template.graph.output})


def without_zero_bias(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop biases of products that are stored and all 0.

        Gemm(x, w, 0)   ->   Gemm(x, w)

    In place.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        bias = stored.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) == 3 else None
        if bias is not None and not numpy_helper.to_array(bias).any():
            del node.input[2]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def renamed_value(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """A copy of an input's or output's type and shape under another name."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _attribute(node: onnx.NodeProto, name: str) -> int:
    """An integer attribute; 0, the default of all that are asked for, where it is not given."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def plugin_initializers(template: onnx.ModelProto) -> set[str]:
    """Names of the initialisers that custom operators read: those a ratio brings along."""
    stored = {tensor.name for tensor in template.graph.initializer}
    return {name for node in template.graph.node if node.domain == ops.DOMAIN for name in node.input if name in stored}


def _structure(template: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of everything but the initialisers, which are most of the bytes."""
    graph = template.graph
    copy = onnx.ModelProto()
    copy.ir_version = template.ir_version
    copy.producer_name = "compexport"
    copy.opset_import.extend(template.opset_import)
    copy.graph.name = graph.name
    copy.graph.node.extend(graph.node)
    copy.graph.input.extend(graph.input)
    copy.graph.output.extend(graph.output)
    return copy


def _take_initializers(model: onnx.ModelProto, template: onnx.ModelProto, tensors: Mapping[str, np.ndarray]) -> None:
    """Give ``model`` the initialisers its nodes read, from ``tensors`` first."""
    used = {name for node in model.graph.node for name in node.input}
    for tensor in template.graph.initializer:
        if tensor.name in tensors and tensor.name in used:
            model.graph.initializer.append(numpy_helper.from_array(tensors[tensor.name], tensor.name))
        elif tensor.name in used:
            model.graph.initializer.append(tensor)


def _set_attributes(node: onnx.NodeProto, ratio: int) -> None:
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("ratio", ratio))
    # TensorRT's parser looks for a plugin of this namespace and version first, and uses the function body otherwise.
    node.attribute.append(helper.make_attribute("plugin_namespace", ops.DOMAIN))
    node.attribute.append(helper.make_attribute("plugin_version", str(ops.VERSION)))
