"""What is traced of a model that shares layers, each piece once: the graphs of all ratios are joined from these.

Letters: B batch, S sequence length, P past, T = P + S, H hidden size, a heads of w, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import onnx
import torch
from torch import Tensor, nn

from engines.manifest import EXIT_OUTPUTS, HIDDEN, PREVIOUS, STEP_SIZE
from exporter import trace
from exporter.graphs.costeff_trace import Template, located, with_statistics
from exporter.methods.ode import Form, StepCache, SteppedModel, output_names
from exporter.methods.ode_exits import ExitHead
from exporter.trace import BATCH, PAST, SEQUENCE, TOTAL, TracedInput

MASK = "attention_mask"
PAST_KEY, PAST_VALUE = "past_key", "past_value"
KEY: Final = "key"
VALUE: Final = "value"


class Pieces:
    """The pieces of one model, traced at first need; ``store`` may move their tensors out of them, in place."""

    def __init__(self, model: SteppedModel, store: Callable[[onnx.ModelProto], object]) -> None:
        self._model = model
        self._store = store
        self._facts = model.facts
        self._dtype = next(model.parameters()).dtype  # an embedding's, so not that of norms
        self._piece = cache(self._stored)
        self._exit_template = cache(self._traced_exit)

    def embed(self) -> onnx.ModelProto:
        """The tokenizer's inputs, of a decoder ids and positions -> ``hidden`` [B,S,H]."""
        return self._piece("embed")

    def step(self, group: int, form: Form) -> onnx.ModelProto:
        """``previous`` [B,S,H], mask [B,T], ``dt`` [1] -> ``hidden`` [B,S,H].

        Of a decoder also ``past_key`` and ``past_value`` [B,a,P,w] -> ``key`` and ``value`` [B,a,T,w].
        """
        return self._piece("step", group, form)

    def layer(self, group: int) -> onnx.ModelProto:
        """The same without ``dt``, which is 1: the trained layer itself."""
        return self._piece("layer", group)

    def head(self) -> onnx.ModelProto:
        """``previous``, of an encoder the mask [B,S] -> the task's outputs."""
        return self._piece("head")

    def last_exit(self) -> onnx.ModelProto:
        """``previous``, mask [B,S] -> what the model itself answers, and how sure it is."""
        return self._piece("last-exit")

    def exit(self, head: ExitHead) -> onnx.ModelProto:
        """The same of a head after another step."""
        graph = self._exit_template(head.classifier.out_features).graph_of(head)
        self._store(graph)
        return graph

    def _stored(self, kind: str, group: int = 0, form: Form = "block") -> onnx.ModelProto:
        graph = self._traced(kind, group, form)
        self._store(graph)
        return graph

    def _traced(self, kind: str, group: int, form: Form) -> onnx.ModelProto:
        model, caches = self._model, self._facts.causal
        state = TracedInput(PREVIOUS, self._dtype, (BATCH, SEQUENCE, self._facts.hidden))
        if kind == "embed":
            names = ("input_ids", "position_ids") if caches else model.backbone.input_names
            embed = _PlacedEmbed if caches else _Embed
            return trace.onnx_from_module(embed(model).eval(), names, [HIDDEN])
        if kind == "head":
            inputs = [state] if caches else [state, *trace.ids(MASK)]
            return trace.onnx_from_inputs(_Head(model).eval(), inputs, output_names(model.backbone))
        if kind == "last-exit":
            return trace.onnx_from_inputs(_LastExit(model).eval(), [state, *trace.ids(MASK)], EXIT_OUTPUTS)
        inputs = [state, *trace.ids(MASK)]
        if caches:
            pairs = (BATCH, self._facts.heads, PAST, self._facts.head_width)
            inputs = [state, TracedInput(MASK, torch.long, (BATCH, TOTAL))]
            inputs += [TracedInput(name, self._dtype, pairs) for name in (PAST_KEY, PAST_VALUE)]
        if kind == "step":
            inputs.append(TracedInput(STEP_SIZE, torch.float32, (1,)))
        module = (_CachedStep if caches else _Step)(model, group, form)
        outputs = [HIDDEN, KEY, VALUE] if caches else [HIDDEN]
        return with_total(trace.onnx_from_inputs(module.eval(), inputs, outputs), outputs[1:])

    def _traced_exit(self, classes: int) -> Template:
        """A trace of random tensors, which are all different, and where they are in it."""
        head = ExitHead(self._facts.hidden, classes).requires_grad_(False).eval()
        state = TracedInput(PREVIOUS, self._dtype, (BATCH, SEQUENCE, self._facts.hidden))
        generator = torch.Generator().manual_seed(0)
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        head.to(self._dtype)
        graph = trace.onnx_from_inputs(_Exit(head), [state, *trace.ids(MASK)], EXIT_OUTPUTS)
        return Template(graph, located(graph, head.state_dict()))


def with_total(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Name the third axis of outputs, which the tracer calls a sum of two others. In place."""
    for value in model.graph.output:
        if value.name in names:
            value.type.tensor_type.shape.dim[2].dim_param = TOTAL
    return model


class _Embed(nn.Module):
    def __init__(self, model: SteppedModel) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.encoder.embed(input_ids, token_type_ids)


class _PlacedEmbed(_Embed):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.encoder.embed(input_ids, None, position_ids)


class _Step(nn.Module):
    """One step; without ``dt``, of size 1."""

    def __init__(self, model: SteppedModel, group: int, form: Form) -> None:
        super().__init__()
        self.encoder, self.group, self.form = model.encoder, group, form

    def forward(self, previous: Tensor, attention_mask: Tensor, dt: Tensor | None = None) -> Tensor:
        bias = self.encoder.attention_bias(attention_mask, previous)
        return self.encoder.step(previous, bias, self.group, 1.0 if dt is None else dt, self.form)


class _CachedStep(_Step):
    def forward(  # type: ignore[override]
        self, previous: Tensor, attention_mask: Tensor, past_key: Tensor, past_value: Tensor, dt: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.encoder.attention_bias(attention_mask, previous)
        cache = StepCache((past_key, past_value))
        h = self.encoder.step(previous, bias, self.group, 1.0 if dt is None else dt, self.form, cache)
        assert cache.pair is not None
        return h, *cache.pair


class _Head(nn.Module):
    def __init__(self, model: SteppedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, previous: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        # A decoder's head reads each state alone, and no mask.
        return self.model.head(previous, previous if attention_mask is None else attention_mask)


class _LastExit(_Head):
    def forward(self, previous: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return with_statistics(self.model.head(previous, attention_mask)[0])


class _Exit(nn.Module):
    def __init__(self, head: ExitHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, previous: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return with_statistics(self.head(previous, attention_mask))
