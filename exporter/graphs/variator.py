"""Variator's graphs: all ratios bound from one trace, the backbone's own graph among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import numpy as np
import onnx
import torch

from compexport.errors import InputError, describe
from engines.manifest import Cost, Variant
from exporter import parity, passes, trace
from exporter.backbone import Backbone, load_backbone
from exporter.graphs.family import REPORTED_LENGTH, Family, Run
from exporter.graphs.stock import stock_outputs
from exporter.methods import variator
from exporter.methods.span import SpanPlugins
from exporter.methods.variator import Plugins, VariatorModel, VariatorPlugins, plugins_from_tensors
from exporter.plans import Plan, PlannedGraph
from exporter.precision import Arithmetic, array_of, computing
from exporter.weights import WeightsFile

TEMPLATE_RATIO, TEMPLATE_WIDTH = 2, 4
PLUGINS = "variator.plugins."


class VariatorFamily(Family[Backbone]):
    """A backbone and the plugins of every ratio of a plan."""

    def __init__(self, plan: Plan, backbone: Backbone, plugins: Mapping[float, Plugins]) -> None:
        super().__init__(plan, backbone)
        self.plugins = plugins
        self._models: dict[Arithmetic, VariatorModel] = {}

    @classmethod
    def load(cls, plan: Plan) -> VariatorFamily:
        """Load the backbone and its plugins, random ones where the plan allows; InputError as their loaders raise."""
        backbone = load_backbone(plan.folder, plan.task)
        return cls(plan, backbone, {r: _loaded_plugins(plan, backbone, int(r)) for r in plan.ratios if r != 1})

    def model(self, graph: PlannedGraph, weights: WeightsFile) -> onnx.ModelProto:
        # Once for all ratios; the second time there is nothing left to move.
        weights.move_out(self._masked_template, but=PLUGINS)
        if graph.ratio == 1:
            return passes.without_merging(self._masked_template)
        own = self._plugins(graph.ratio, computing(self.plan.precision))
        assert own is not None
        if isinstance(own, SpanPlugins):
            return passes.with_bodies(self._traced(own), own.ratio)
        tensors = {f"{PLUGINS}{name}": array_of(tensor) for name, tensor in own.state_dict().items()}
        # "official" plugins pad the whole input to their ratio, outside the operators: they need a trace each.
        template = self._masked_template if own.pad == "masked" else self._template(own.ratio, own.pad)
        return passes.bind_ratio(template, own.ratio, tensors)

    @cached_property
    def _masked_template(self) -> onnx.ModelProto:
        return self._template(TEMPLATE_RATIO, "masked")

    def _template(self, ratio: int, pad: variator.PadMode) -> onnx.ModelProto:
        """A trace with throw-away plugins. Their values are random and thus all different, so that no initialiser of
        theirs is taken for an equal one of the backbone."""
        backbone = self.backbone
        plugins = VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, TEMPLATE_WIDTH, pad)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in plugins.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return self._traced(computing(self.plan.precision).of(plugins))

    def _traced(self, plugins: Plugins) -> onnx.ModelProto:
        model = self._model(computing(self.plan.precision))
        model.variator.attach(plugins.eval())
        names = variator.output_names(self.backbone)
        template = trace.onnx_from_module(model, self.backbone.input_names, names)
        model.variator.detach()
        return passes.with_divisions(passes.with_constant_lookups(template))

    def cost(self, graph: PlannedGraph) -> Cost:
        return variator.cost(self.backbone, self.plugins.get(graph.ratio))

    def feeds(self, graph: PlannedGraph) -> list[parity.Arrays]:
        return self.id_feeds(int(graph.ratio))

    def by_pytorch(self, graph: PlannedGraph, arithmetic: Arithmetic) -> Run:
        """For ratio 1 the Hugging Face model itself where that may run, otherwise the backbone with its plugins."""

        @cache
        def made() -> tuple[VariatorModel, Plugins | None]:
            return self._model(arithmetic), self._plugins(graph.ratio, arithmetic)

        def run(feed: parity.Arrays) -> list[np.ndarray]:
            return _eager(*made(), feed, stock=graph.ratio == 1 and arithmetic.is_stock)

        return run

    def _model(self, arithmetic: Arithmetic) -> VariatorModel:
        """The backbone in this arithmetic, one copy for all ratios; those in float64 are rare and large."""
        if arithmetic in self._models:
            return self._models[arithmetic]
        model = arithmetic.of(self.backbone.model, self.backbone.host.shrink)
        made = VariatorModel(dataclasses.replace(self.backbone, model=model)).eval()
        return made if arithmetic.dtype == torch.float64 else self._models.setdefault(arithmetic, made)

    def _plugins(self, ratio: float, arithmetic: Arithmetic) -> Plugins | None:
        plugins = self.plugins.get(ratio)
        if isinstance(plugins, VariatorPlugins) and self.backbone.host.shrink is not None:
            return arithmetic.of(plugins, VariatorPlugins.shrink)
        return None if plugins is None else arithmetic.of(plugins)

    def max_length(self) -> int:
        """The model's limit; "official" plugins pad to their ratio and must not step over it."""
        limit = self.backbone.max_length
        padded = [limit // p.ratio * p.ratio for p in self.plugins.values() if p.pad == "official"]
        return max(1, min([limit, *padded]))

    def variant(self, ratio: float) -> Variant:
        plugins = self.plugins.get(ratio)
        extra = plugins.params if plugins else 0
        full = variator.cost(self.backbone, None).macs(REPORTED_LENGTH)
        return Variant(
            method=self.plan.method,
            ratio=ratio,
            precision=self.plan.precision,
            graphs=self.plan.roles(ratio),
            params=self.backbone.params + extra,
            extra_params=extra,
            flops_ratio=full / variator.cost(self.backbone, plugins).macs(REPORTED_LENGTH),
            untrained=ratio != 1 and not self.plan.trained(ratio),
            settings=_settings(plugins),
        )


def _settings(plugins: Plugins | None) -> dict[str, Any]:
    if plugins is None:
        return {}
    if isinstance(plugins, SpanPlugins):
        return {"pad": plugins.pad, "rank": plugins.rank, "k": plugins.ratio, "span": plugins.first + 1}
    return {"pad": plugins.pad, "width": plugins.width, "k": plugins.ratio}


def _loaded_plugins(plan: Plan, backbone: Backbone, ratio: int) -> Plugins:
    checkpoint = plan.checkpoint
    if checkpoint is not None and plan.trained(ratio):
        pad: variator.PadMode = "official" if checkpoint.pad == "official" else "masked"
        plugins = plugins_from_tensors(checkpoint.load(ratio), backbone, pad, f"{checkpoint.folder}, ratio {ratio}")
        if plugins.ratio != ratio:
            raise InputError(
                describe(f"{checkpoint.folder}: plugins of ratio {ratio}", got=f"tensors of ratio {plugins.ratio}")
            )
        return plugins
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed + ratio)
        return VariatorPlugins(
            backbone.hidden_size, backbone.num_layers, ratio, variator.default_width(backbone, ratio)
        ).eval()


def _eager(model: VariatorModel, plugins: Plugins | None, feed: parity.Arrays, *, stock: bool) -> list[np.ndarray]:
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    with torch.inference_mode():
        if stock:
            return [t.numpy() for t in stock_outputs(model.backbone, tensors)]
        if plugins is not None:
            model.variator.attach(plugins)
        outputs = [t.numpy() for t in model(**tensors)]
        model.variator.detach()
        return outputs
