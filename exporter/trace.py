"""The one call of ``torch.onnx.export``.

A family is traced once: the custom operators are opaque while tracing, so the graph of one ratio is the graph of every
ratio but for an attribute and the plugins' tensors (``exporter.passes`` binds those).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import nn

from exporter import ops
from exporter.precision import wide_sums

# From opset 20 Gelu is one operator, which runtimes run faster than its five-node expansion.
OPSET = 20
BATCH, SEQUENCE = "batch", "sequence"
PAST, TOTAL = "past", "total"
# Of models that read one text and write another, as Hugging Face's optimum names them.
SOURCE, TARGET, TARGET_PAST = "encoder_sequence", "decoder_sequence", "past_decoder_sequence"
TARGET_TOTAL = f"{TARGET_PAST} + {TARGET}"
# Sizes to trace with, neither 0, 1 nor equal: the tracer would take any of those for a constant.
SIZES = {BATCH: 3, SEQUENCE: 24, PAST: 7, TOTAL: 24 + 7, SOURCE: 11, TARGET: 5, TARGET_PAST: 13, TARGET_TOTAL: 5 + 13}


@dataclass(frozen=True)
class TracedInput:
    """One input of a trace. ``axes``: name of each dynamic axis; equal names are one size, the others are constants."""

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]

    def example(self) -> torch.Tensor:
        return torch.ones([SIZES[axis] if isinstance(axis, str) else axis for axis in self.axes], dtype=self.dtype)

    @property
    def dynamic(self) -> dict[int, str]:
        return {index: axis for index, axis in enumerate(self.axes) if isinstance(axis, str)}


def ids(*names: str) -> list[TracedInput]:
    """Inputs int64 [batch, sequence]."""
    return [TracedInput(name, torch.long, (BATCH, SEQUENCE)) for name in names]


def onnx_from_module(module: nn.Module, input_names: Sequence[str], output_names: Sequence[str]) -> onnx.ModelProto:
    """Trace ``module`` over int64 inputs [batch, sequence], both dynamic; weights stay inside the model."""
    return onnx_from_inputs(module, ids(*input_names), output_names)


def onnx_from_inputs(module: nn.Module, inputs: Sequence[TracedInput], output_names: Sequence[str]) -> onnx.ModelProto:
    """Trace ``module`` over any ``inputs``; weights stay inside the model. Sizes of outputs that the tracer computes
    from several axes get a name of its choice."""
    with torch.no_grad(), quiet_export(), wide_sums(module):
        program = torch.onnx.export(
            module,
            tuple(one.example() for one in inputs),
            dynamo=True,
            custom_translation_table=ops.translation_table(),
            dynamic_shapes={one.name: one.dynamic for one in inputs},
            input_names=[one.name for one in inputs],
            output_names=list(output_names),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return _without_traces(program.model_proto)


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what only describes the tracing run: source paths, shapes of the example's ratio."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "namespace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    return model


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """The exporter logs and warns about itself; none of it is something a user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
