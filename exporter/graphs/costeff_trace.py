"""One trace for all ratios of a COST-EFF family: widths are only in tensors, and a trace's tensors can be replaced.

Letters: B batch, S sequence length, H hidden size, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from engines.manifest import EXIT_OUTPUTS, HIDDEN
from exporter import passes, trace
from exporter.methods.costeff import CosteffModel, exit_statistics
from exporter.methods.slender import SlenderShape
from exporter.precision import FLOATING, PLAIN, Arithmetic, array_of, wide

TEMPLATE_HEADS, TEMPLATE_SIZE = 2, 8  # heads; neurons, rank and words
# What a trace stores of a tensor: itself, the other way round for a product, or the type that all tokens have.
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "whole": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T,
    "first row": lambda tensor: tensor[0],
}


class TracedExits(nn.Module):
    """What is traced: per layer its state [B,S,H], logits [B,C] and statistics [B], then all exits, [B,L,C] and [B,L].

    ``output_names`` in that order: ``hidden.1``, ``logits.1``, …, ``hidden.2``, …, ``logits``, ``entropy``, ….
    """

    def __init__(self, model: CosteffModel) -> None:
        super().__init__()
        self.model = model

    @property
    def output_names(self) -> list[str]:
        layers = range(1, self.model.facts.layers + 1)
        return [*(f"{name}.{layer}" for layer in layers for name in (HIDDEN, *EXIT_OUTPUTS)), *EXIT_OUTPUTS]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        found = self.model(input_ids, attention_mask, token_type_ids)
        outputs: list[Tensor] = []
        for state, logits in zip(found.hidden_states[1:], found.logits, strict=True):
            outputs += [state, *with_statistics(logits)]
        return *outputs, *with_statistics(torch.stack(found.logits, dim=1))


def with_statistics(logits: Tensor) -> tuple[Tensor, ...]:
    """Logits [...,C] in fp32 at least and how sure they are, in the order of ``EXIT_OUTPUTS``."""
    logits = wide(logits)
    return logits, *exit_statistics(logits)


@dataclass(frozen=True)
class Template:
    """A trace of a small random model, and where its tensors are: initialiser -> (name, form) of a tensor."""

    graph: onnx.ModelProto
    places: dict[str, tuple[str, str]]

    def graph_of(self, model: nn.Module) -> onnx.ModelProto:
        """The graph of a model of the same structure, whatever its widths."""
        stored = {name: array_of(tensor) for name, tensor in model.state_dict().items()}
        tensors = {
            place: np.ascontiguousarray(FORMS[form](stored[name])) for place, (name, form) in self.places.items()
        }
        return passes.with_constant_lookups(passes.with_tensors(self.graph, tensors))


def structure(model: CosteffModel) -> tuple[bool, ...]:
    """What makes two models of one host need a trace each."""
    return model.shape.embedding is not None, model.pooler_dense, model.highway_dense, model.mean


def template_of(model: CosteffModel, input_names: Sequence[str], arithmetic: Arithmetic = PLAIN) -> Template:
    """Trace a narrow stand-in for ``model``. Its tensors are random, so each is recognised by its values."""
    module = TracedExits(arithmetic.of(_stand_in(model))).eval()
    graph = trace.onnx_from_module(module, input_names, module.output_names)
    places = located(graph, module.model.state_dict())
    return Template(passes.with_inferred_widths(graph), places)


def located(graph: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Where a trace stores which of ``tensors``, all different: initialiser -> (name, form)."""
    known = {
        _content(made(array_of(tensor))): (name, form)
        for name, tensor in tensors.items()
        for form, made in FORMS.items()
        if form == "whole" or tensor.dim() == 2
    }
    places = {}
    for initializer in graph.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if _content(values) in known:
            places[initializer.name] = known[_content(values)]
        elif values.size > 1 and initializer.data_type in FLOATING:
            raise ValueError(f"{initializer.name} is made from tensors while tracing: it would be the same for all")
    return places


def _stand_in(model: CosteffModel) -> CosteffModel:
    facts = model.facts
    rank = None if model.shape.embedding is None else min(TEMPLATE_SIZE, facts.word_width)
    heads, neurons = min(TEMPLATE_HEADS, facts.heads), min(TEMPLATE_SIZE, facts.neurons)
    small = CosteffModel(
        replace(facts, vocabulary=max(TEMPLATE_SIZE, (facts.position_start or 0) + 1)),
        SlenderShape.uniform(facts.layers, heads, neurons, rank),
        model.num_labels,
        pooler_dense=model.pooler_dense,
        highway_dense=model.highway_dense,
        mean=model.mean,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return small.requires_grad_(False)


def _content(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return values.shape, values.tobytes()
