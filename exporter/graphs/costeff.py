"""COST-EFF's graphs: one with every state and exit as an output, cut into segments, prefixes and all exits.

Letters: B batch, S sequence length, H hidden size, L layers, C classes, K kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from engines.manifest import ALL_EXITS, EXIT_OUTPUTS, HIDDEN, PREVIOUS, ROWS, Cost, Variant
from exporter import parity, passes
from exporter.backbone import Backbone, load_backbone
from exporter.graphs.costeff_trace import Template, structure, template_of, with_statistics
from exporter.graphs.family import REPORTED_LENGTH, Family, Run
from exporter.methods.costeff import CosteffModel, cost
from exporter.methods.costeff_checkpoint import load_model, stored_tensors, untrained_model
from exporter.plans import Plan, PlannedGraph
from exporter.plans.costeff import HIGHWAY, CosteffPlan, PlannedPart
from exporter.precision import Arithmetic, computing, tensor_of, wide
from exporter.weights import WeightsFile

PROBED_LENGTH = 2  # feeds have lengths around it, and 128
# Rows that a later segment takes from a batch of three, in turn; the last feed is the one that engines are checked on.
_TAKEN: tuple[tuple[int, ...], ...] = ((1,), (0, 1, 2), (2, 0))


class CosteffFamily(Family[Backbone]):
    """A backbone and the slender models of every ratio of a plan."""

    def __init__(self, plan: CosteffPlan, backbone: Backbone, models: Mapping[float, CosteffModel]) -> None:
        super().__init__(plan, backbone)
        self.exits = {ratio: plan.exits_of(ratio) for ratio in plan.ratios}
        self.models = models
        self._plain = untrained_model(backbone, 1, plan.seed) if plan.keeps_backbone else models[1]
        self._own = {ratio: stored_tensors(model, backbone) for ratio, model in models.items()}
        self._arithmetic = computing(plan.precision)
        self._templates: dict[tuple[bool, ...], Template] = {}
        self._traced: tuple[CosteffModel, onnx.ModelProto] | None = None
        self._states: tuple[float, list[tuple[parity.Arrays, list[Tensor]]]] | None = None

    @classmethod
    def load(cls, plan: CosteffPlan) -> CosteffFamily:
        """Load the backbone and its models, random ones where the plan allows; InputError as their loaders raise."""
        backbone = load_backbone(plan.folder, plan.task)
        return cls(plan, backbone, {ratio: _model(plan, backbone, ratio) for ratio in plan.ratios})

    # --- graphs

    def model(self, graph: PlannedGraph, weights: WeightsFile) -> onnx.ModelProto:
        part = _part(graph)
        template = self._whole(self._model_of(part))
        weights.move_out(template)  # once for all parts of a ratio
        if part.kind == "encoder":
            return passes.part(template, {"logits": f"logits.{part.last}"})
        if part.kind == ALL_EXITS:
            return passes.part(template, {name: name for name in EXIT_OUTPUTS})
        outputs = {name: f"{name}.{part.last}" for name in self._output_names(part)}
        if part.first == 0:
            return passes.part(template, outputs)
        return passes.part_from(template, f"{HIDDEN}.{part.first}", outputs)

    def _output_names(self, part: PlannedPart) -> tuple[str, ...]:
        ends = part.kind != "segment" or part.last == self.backbone.num_layers
        return EXIT_OUTPUTS if ends else (HIDDEN, *EXIT_OUTPUTS)

    def _model_of(self, part: PlannedPart) -> CosteffModel:
        return self._plain if part.kind == "encoder" else self.models[part.ratio]

    def _whole(self, model: CosteffModel) -> onnx.ModelProto:
        """The graph that a model's parts are cut from. They are made one after the other, so only the last is kept."""
        if self._traced is None or self._traced[0] is not model:
            kind = structure(model)
            if kind not in self._templates:
                self._templates[kind] = template_of(model, self.backbone.input_names, self._arithmetic)
            self._traced = model, self._templates[kind].graph_of(self._arithmetic.of(model))
        return self._traced[1]

    # --- parity

    def feeds(self, graph: PlannedGraph) -> list[parity.Arrays]:
        part = _part(graph)
        if part.first == 0:
            return self.id_feeds(PROBED_LENGTH)
        feeds = []
        for number, (ids, states) in enumerate(self._states_of(part.ratio)):
            mask = ids["attention_mask"]
            rows = (0,) if len(mask) == 1 else _TAKEN[(number // 2) % len(_TAKEN)]
            previous = states[part.first].numpy()
            feeds.append({PREVIOUS: previous, "attention_mask": mask, ROWS: np.array(rows)})
        return feeds

    def _states_of(self, ratio: float) -> list[tuple[parity.Arrays, list[Tensor]]]:
        """Ids, and what every layer makes of them: the valid inputs of later segments."""
        if self._states is None or self._states[0] != ratio:
            model = self.models[ratio]
            with torch.inference_mode():
                made = [(ids, model(**_tensors(ids)).hidden_states) for ids in self.id_feeds(PROBED_LENGTH)]
            self._states = ratio, made
        return self._states[1]

    def by_pytorch(self, graph: PlannedGraph, arithmetic: Arithmetic) -> Run:
        part = _part(graph)

        @cache
        def made() -> tuple[CosteffModel, nn.Module | None]:
            host = arithmetic.of(self.backbone.model) if arithmetic.is_stock and self._is_backbone(part) else None
            return arithmetic.of(self._model_of(part)), host

        return lambda feed: _eager(part, *made(), feed, arithmetic)

    def _is_backbone(self, part: PlannedPart) -> bool:
        """Whether the last exit is the backbone's own answer, not one of tensors trained for it."""
        return part.kind == "encoder" or all(name.startswith(HIGHWAY) for name in self._own[part.ratio])

    # --- records for the manifest

    def cost(self, graph: PlannedGraph) -> Cost:
        part = _part(graph)
        exits = range(1, part.last + 1) if part.kind == ALL_EXITS else (part.last,)
        return cost(self._model_of(part), part.first, part.last, exits)

    def variants(self) -> dict[str, Variant]:
        made = super().variants()
        return {name: made.get(name) or self._backbone_variant(roles) for name, roles in self.plan.variants().items()}

    def _backbone_variant(self, roles: dict[str, str]) -> Variant:
        return Variant(
            method=self.plan.method,
            ratio=1,
            precision=self.plan.precision,
            graphs=roles,
            params=self.backbone.params,
            extra_params=0,
            flops_ratio=1.0,
        )

    def variant(self, ratio: float) -> Variant:
        model, exits = self.models[ratio], self.exits[ratio]
        depth = self.backbone.num_layers
        extra = self._own[ratio] if exits else {}
        heads = {"pooler_dense": model.pooler_dense, "highway_dense": model.highway_dense, "mean": model.mean}
        full = cost(self._plain, exits=(depth,)).macs(REPORTED_LENGTH)
        return Variant(
            method=self.plan.method,
            ratio=ratio,
            precision=self.plan.precision,
            graphs=self.plan.roles(ratio),
            params=model.params if exits else self.backbone.params,
            extra_params=sum(tensor.numel() for tensor in extra.values()),
            flops_ratio=full / cost(model, exits=exits or (depth,)).macs(REPORTED_LENGTH),
            untrained=ratio != 1 and not self.plan.trained(ratio),
            exits=list(exits) if exits else None,
            settings={**model.shape.document(), **heads} if exits else {},
        )


def _model(plan: Plan, backbone: Backbone, ratio: float) -> CosteffModel:
    if plan.checkpoint is not None and plan.trained(ratio):
        return load_model(plan.checkpoint, backbone, ratio)
    return untrained_model(backbone, ratio, plan.seed)


def _part(graph: PlannedGraph) -> PlannedPart:
    assert isinstance(graph, PlannedPart)
    return graph


def _tensors(feed: parity.Arrays, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor_of(array, dtype) for name, array in feed.items()}


def _eager(
    part: PlannedPart, model: CosteffModel, host: nn.Module | None, feed: parity.Arrays, arithmetic: Arithmetic
) -> list[np.ndarray]:
    """One part by PyTorch; where there is a ``host``, the Hugging Face model, the final logits are its."""
    tensors = _tensors(feed, arithmetic.dtype)
    with torch.inference_mode():
        whole = (part.first, part.last) == (0, model.facts.layers)
        final = host(**tensors).logits if host is not None and whole else None
        outputs = _outputs(part, model, tensors, final)
    return [wide(tensor).numpy() for tensor in outputs if tensor is not None]


def _outputs(
    part: PlannedPart, model: CosteffModel, inputs: Mapping[str, Tensor], final: Tensor | None
) -> Sequence[Tensor]:
    """The part's outputs in their order; ``final`` stands for the last exit's logits."""
    mask = inputs["attention_mask"]
    if part.first == 0:
        h = model.embed(inputs["input_ids"], inputs.get("token_type_ids"))
    else:
        h, mask = inputs[PREVIOUS][inputs[ROWS]], mask[inputs[ROWS]]
    logits = []
    for layer in range(part.first + 1, part.last + 1):
        h = model.run_layers(h, mask, layer - 1, layer)
        last = layer == model.facts.layers
        logits.append(final if last and final is not None else model.exit_logits(h, mask, layer))
    if part.kind == "encoder":
        return logits[-1:]
    if part.kind == ALL_EXITS:
        return with_statistics(torch.stack(logits, dim=1))
    states = (h,) if part.kind == "segment" and part.last < model.facts.layers else ()
    return *states, *with_statistics(logits[-1])
