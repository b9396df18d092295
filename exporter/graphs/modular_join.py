"""Pieces of a modular model joined for one tiling of a stack: what stands before the tiles, the tiles, what follows."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from engines.manifest import HIDDEN, PAST, PRESENT, PREVIOUS
from exporter.chain import Chain
from exporter.graphs.modular_trace import (
    BIAS,
    IDS,
    LAST_STATE,
    LOGITS,
    PAIR,
    PAST_PAIR,
    SOURCE_BIAS,
    SOURCE_MASK,
    SOURCE_PAIR,
    Pieces,
    cache_names,
)
from exporter.methods.assembly import Tiling, spans
from exporter.passes import renamed_value
from exporter.plans.modular import Part
from exporter.trace import BATCH, SOURCE, TARGET


def joined(pieces: Pieces, part: Part, tiling: Tiling) -> onnx.ModelProto:
    """The graph of an encoder, of a decoder's first step or of its cached one."""
    if part == "encoder":
        return _encoder(pieces, tiling)
    return _first(pieces, tiling) if part == "first" else _cached(pieces, tiling)


def _encoder(pieces: Pieces, tiling: Tiling) -> onnx.ModelProto:
    chain = Chain()
    made = chain.add(pieces.enter("encoder"), "enter/")
    for index, (start, size) in enumerate(spans(tiling)):
        wires = {PREVIOUS: made[HIDDEN], BIAS: made[BIAS]}
        made |= chain.add(pieces.tile("encoder", start, size), f"tile.{index}/", wires)
    return chain.model({LAST_STATE: chain.add(pieces.close("encoder"), "close/", {PREVIOUS: made[HIDDEN]})[LAST_STATE]})


def _first(pieces: Pieces, tiling: Tiling) -> onnx.ModelProto:
    chain = Chain()
    mask, ids = (
        chain.input(helper.make_tensor_value_info(name, TensorProto.INT64, [BATCH, axis]))
        for name, axis in ((SOURCE_MASK, SOURCE), (IDS, TARGET))
    )
    entered = chain.add(pieces.enter("first"), "enter/", {SOURCE_MASK: mask, IDS: ids})
    state = entered[HIDDEN]
    present: dict[str, str] = {}
    for index, (start, size) in enumerate(spans(tiling)):
        wires = {PREVIOUS: state, BIAS: entered[BIAS], SOURCE_BIAS: entered[SOURCE_BIAS]}
        made = chain.add(pieces.tile("first", start, size), f"tile.{index}/", wires)
        state = made[HIDDEN]
        names = cache_names(PRESENT, len(tiling))[4 * index : 4 * index + 4]
        present |= dict(zip(names, (made[name] for name in (*PAIR, *SOURCE_PAIR)), strict=True))
    return _closed(chain, pieces, state, present)


def _cached(pieces: Pieces, tiling: Tiling) -> onnx.ModelProto:
    chain = Chain()
    mask, ids = (
        chain.input(helper.make_tensor_value_info(name, TensorProto.INT64, [BATCH, axis]))
        for name, axis in ((SOURCE_MASK, SOURCE), (IDS, TARGET))
    )
    pasts = cache_names(PAST, len(tiling))
    entered: dict[str, str] = {}
    state = ""
    present: dict[str, str] = {}
    for index, (start, size) in enumerate(spans(tiling)):
        piece = pieces.tile("cached", start, size)
        inputs = {value.name: value for value in piece.graph.input}
        own = pasts[4 * index : 4 * index + 4]
        wires = {
            name: chain.input(renamed_value(inputs[name], past))
            for name, past in zip((*PAST_PAIR, *SOURCE_PAIR), own, strict=True)
        }
        if not entered:
            begun = {SOURCE_MASK: mask, IDS: ids, PAST_PAIR[0]: wires[PAST_PAIR[0]]}
            entered = chain.add(pieces.enter("cached"), "enter/", begun)
            state = entered[HIDDEN]
        wires |= {PREVIOUS: state, BIAS: entered[BIAS], SOURCE_BIAS: entered[SOURCE_BIAS]}
        made = chain.add(piece, f"tile.{index}/", wires)
        state = made[HIDDEN]
        names = cache_names(PRESENT, len(tiling), source=False)[2 * index : 2 * index + 2]
        present |= dict(zip(names, (made[name] for name in PAIR), strict=True))
    return _closed(chain, pieces, state, present)


def _closed(chain: Chain, pieces: Pieces, state: str, present: Mapping[str, str]) -> onnx.ModelProto:
    logits = chain.add(pieces.close("decoder"), "close/", {PREVIOUS: state})[LOGITS]
    return chain.model({LOGITS: logits, **present})
