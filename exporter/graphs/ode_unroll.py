"""Unrolled graphs: the pieces of a model joined for one list of steps, n times the same layer over one set of weights.

Letters: B batch, S sequence length, T tokens seen so far and now, H hidden size, C classes, n steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from engines.manifest import EXIT_OUTPUTS, HIDDEN, PAST, PRESENT, PREVIOUS, STEP_SIZE, cache_name
from exporter.chain import Chain
from exporter.graphs.ode_trace import KEY, MASK, PAST_KEY, PAST_VALUE, VALUE, Pieces
from exporter.methods.ode_stepping import Stepping
from exporter.passes import renamed_value
from exporter.trace import BATCH, SEQUENCE, TOTAL


def unrolled(pieces: Pieces, stepping: Stepping) -> onnx.ModelProto:
    """The tokenizer's inputs -> the task's outputs.

    embed -> step -> step -> … -> head; a step of size 1 is the layer alone.
    """
    chain = Chain()
    h = chain.add(pieces.embed(), "embed/")[HIDDEN]
    for number, (group, dt) in enumerate(stepping, start=1):
        h = _step(chain, pieces, stepping, number, group, dt, {PREVIOUS: h})[HIDDEN]
    return chain.model(chain.add(pieces.head(), "head/", {PREVIOUS: h}))


def unrolled_decoder(pieces: Pieces, stepping: Stepping) -> onnx.ModelProto:
    """Ids and positions [B,S], mask [B,T] and a past of every step -> logits [B,S,V], and what is past then."""
    chain = Chain()
    for name, axes in (("input_ids", (BATCH, SEQUENCE)), (MASK, (BATCH, TOTAL)), ("position_ids", (BATCH, SEQUENCE))):
        chain.input(helper.make_tensor_value_info(name, TensorProto.INT64, axes))
    h = chain.add(pieces.embed(), "embed/")[HIDDEN]
    present: dict[str, str] = {}
    for index, (group, dt) in enumerate(stepping):
        piece = _piece(pieces, stepping, group, dt)
        inputs = {value.name: value for value in piece.graph.input}
        wires = {
            PAST_KEY: chain.input(renamed_value(inputs[PAST_KEY], cache_name(PAST, index, KEY))),
            PAST_VALUE: chain.input(renamed_value(inputs[PAST_VALUE], cache_name(PAST, index, VALUE))),
        }
        made = _step(chain, pieces, stepping, index + 1, group, dt, {PREVIOUS: h, **wires})
        h = made[HIDDEN]
        present |= {cache_name(PRESENT, index, KEY): made[KEY], cache_name(PRESENT, index, VALUE): made[VALUE]}
    return chain.model({**chain.add(pieces.head(), "head/", {PREVIOUS: h}), **present})


def unrolled_with_exits(pieces: Pieces, stepping: Stepping, exits: Mapping[int, onnx.ModelProto]) -> onnx.ModelProto:
    """All that parts are cut from: per step s, from 1, ``hidden.s``, ``logits.s`` and how sure that is; then all exits.

    ``exits``: a graph from ``previous`` and the mask to the outputs of an exit, after every step.
    """
    chain = Chain()
    h = chain.add(pieces.embed(), "embed/")[HIDDEN]
    outputs: dict[str, str] = {}
    for number, (group, dt) in enumerate(stepping, start=1):
        h = _step(chain, pieces, stepping, number, group, dt, {PREVIOUS: h})[HIDDEN]
        outputs[f"{HIDDEN}.{number}"] = h
        answered = chain.add(exits[number], f"exit.{number}/", {PREVIOUS: h})
        outputs |= {f"{name}.{number}": answered[name] for name in EXIT_OUTPUTS}
    for name in EXIT_OUTPUTS:
        columns = [outputs[f"{name}.{number}"] for number in range(1, stepping.n + 1)]
        outputs[name] = _stacked(chain, name, columns)
    return chain.model(outputs)


def _piece(pieces: Pieces, stepping: Stepping, group: int, dt: float) -> onnx.ModelProto:
    return pieces.layer(group) if dt == 1 else pieces.step(group, stepping.form)


def _step(
    chain: Chain, pieces: Pieces, stepping: Stepping, number: int, group: int, dt: float, wires: Mapping[str, str]
) -> dict[str, str]:
    sized = {} if dt == 1 else {STEP_SIZE: chain.constant(np.array([dt], np.float32), f"{STEP_SIZE}.{number}")}
    return chain.add(_piece(pieces, stepping, group, dt), f"step.{number}/", {**wires, **sized})


def _stacked(chain: Chain, name: str, columns: Sequence[str]) -> str:
    """The exits' ``name``, [B,C] or [B] each, as one tensor [B,n,C] or [B,n]."""
    traced = chain.made(columns[0])
    axis = chain.constant(np.array([1]), "exits_axis")
    value = renamed_value(traced, name)
    dims = list(value.type.tensor_type.shape.dim)
    shape = [dims[0].dim_param, len(columns), *(dim.dim_value for dim in dims[1:])]
    inputs = [renamed_value(traced, f"{name}.{number}") for number in range(len(columns))]
    single = [f"{name}.{number}.column" for number in range(len(columns))]
    nodes = [
        helper.make_node("Unsqueeze", [source.name, "axis"], [target], f"unsqueeze_{target}")
        for source, target in zip(inputs, single, strict=True)
    ]
    nodes.append(helper.make_node("Concat", single, [name], f"stack_{name}", axis=1))
    axes = helper.make_tensor_value_info("axis", TensorProto.INT64, [1])
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "stack", [*inputs, axes], [output])
    wires = {"axis": axis, **dict(zip([one.name for one in inputs], columns, strict=True))}
    return chain.add(helper.make_model(graph, opset_imports=[], ir_version=1), "exits/", wires)[name]
