"""The graphs of models that share layers: unrolled for each ratio, cut at exits, or one step for a caller's own loop.

Letters: B batch, S sequence length, P past, T = P + S, H hidden size, C classes, n steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from compexport.errors import InputError, describe
from engines.manifest import (
    ALL_EXITS,
    EXIT_OUTPUTS,
    HIDDEN,
    PREVIOUS,
    ROWS,
    STEP_SIZE,
    Cost,
    Generation,
    Variant,
)
from exporter import parity, passes
from exporter.backbone import Backbone, load_backbone
from exporter.graphs.costeff_trace import with_statistics
from exporter.graphs.family import REPORTED_LENGTH, Family, Run
from exporter.graphs.ode_decoding import decoder_feeds, decoder_outputs, real_outputs, stock_decoder_outputs
from exporter.graphs.ode_trace import MASK, Pieces
from exporter.graphs.ode_unroll import step_matrices, unrolled, unrolled_decoder, unrolled_with_exits
from exporter.graphs.stock import stock_outputs
from exporter.methods.ode import SteppedModel, cost, embedding_cost, facts_of, head_cost, steps_cost, together
from exporter.methods.ode_checkpoint import load_exits
from exporter.methods.ode_exits import ExitHeads
from exporter.methods.ode_stepping import Stepping
from exporter.plans import PlannedGraph
from exporter.plans.ode import OdePlan, PlannedSteps, as_steps
from exporter.precision import PLAIN, Arithmetic, computing, tensor_of, wide
from exporter.weights import WeightsFile

PROBED_LENGTH = 2  # feeds have lengths around it, and 128
# Rows that a later segment takes from a batch of three, in turn; the last feed is the one that engines are checked on.
_TAKEN: tuple[tuple[int, ...], ...] = ((1,), (0, 1, 2), (2, 0))
_PROBED_SIZES = (1.0, 1.5, 0.5, 2.0)  # what a graph of one step of any size is checked with, in turn


@dataclasses.dataclass(frozen=True)
class Eager:
    """What graphs must compute, by PyTorch: the model in steps, and the exit heads of each ratio."""

    model: SteppedModel
    heads: Mapping[float, ExitHeads]

    def by(self, arithmetic: Arithmetic) -> Eager:
        """The same in another arithmetic, by copies unless it is this one."""
        if arithmetic == PLAIN:
            return self
        backbone = self.model.backbone
        inner = arithmetic.of(backbone.model, backbone.host.shrink)
        model = SteppedModel(dataclasses.replace(backbone, model=inner)).eval()
        return Eager(model, {ratio: arithmetic.of(heads) for ratio, heads in self.heads.items()})

    def exit_logits(self, ratio: float, step: int, last: int, h: Tensor, mask: Tensor) -> Tensor:
        """The prediction [B,C] after ``step`` of ``last`` steps, from 1, of which h [B,S,H] is the result."""
        return self.model.head(h, mask)[0] if step == last else self.heads[ratio].after(step)(h, mask)


class OdeFamily(Family[Backbone]):
    """One model, and the steps of every ratio of a plan."""

    def __init__(self, plan: OdePlan, backbone: Backbone, heads: Mapping[float, ExitHeads]) -> None:
        super().__init__(plan, backbone)
        self.steps = plan
        self.eager = Eager(SteppedModel(backbone).eval(), heads)
        self._eagers: dict[Arithmetic, Eager] = {}
        self._pieces: Pieces | None = None
        self._whole: tuple[float, onnx.ModelProto] | None = None
        self._states: dict[Stepping, list[tuple[parity.Arrays, tuple[Tensor, ...]]]] = {}

    @classmethod
    def load(cls, plan: OdePlan) -> OdeFamily:
        """Load the model and the exit heads there are; InputError as their loaders raise."""
        backbone = load_backbone(plan.folder, plan.task)
        trained = {ratio for ratio in plan.ratios if plan.exits_of(ratio)}
        if trained and backbone.task != "sequence-classification":
            what = f"{plan.folder}: exits classify whole texts"
            got = f"a model for {backbone.task}"
            raise InputError(describe(what, got=got, expected="sequence-classification"))
        facts, classes = facts_of(backbone), len(backbone.labels)
        heads = {ratio: load_exits(plan.checkpoint, facts, classes, ratio) for ratio in trained}
        return cls(plan, backbone, {ratio: found for ratio, found in heads.items() if found is not None})

    # --- graphs

    def model(self, graph: PlannedGraph, weights: WeightsFile) -> onnx.ModelProto:
        part = as_steps(graph)
        if self._pieces is None:
            self._pieces = Pieces(self._traced.model, weights.move_out)
        if part.kind in ("embed", "step", "head"):
            return self._piece(part, self._pieces)
        if part.kind == "exit-head":
            return self._exit(part.ratio, part.last, self._pieces)
        stepping = self.steps.stepping(part.ratio)
        if part.kind == "whole":
            join = unrolled_decoder if self.steps.generates else unrolled
            return self._with_one_copy(join(self._pieces, stepping))
        return self._cut(part, self._with_exits(part.ratio, self._pieces))

    @property
    def _traced(self) -> Eager:
        return self._eager(computing(self.plan.precision))

    def _piece(self, part: PlannedSteps, pieces: Pieces) -> onnx.ModelProto:
        if part.kind == "step":
            return pieces.step(part.group, self.steps.step_form)
        return pieces.embed() if part.kind == "embed" else pieces.head()

    def _exit(self, ratio: float, step: int, pieces: Pieces) -> onnx.ModelProto:
        last = self.steps.stepping(ratio).n
        return pieces.last_exit() if step == last else pieces.exit(self._traced.heads[ratio].after(step))

    def _with_exits(self, ratio: float, pieces: Pieces) -> onnx.ModelProto:
        """The graph that a ratio's parts are cut from; they are made one after the other, so only the last is kept."""
        if self._whole is None or self._whole[0] != ratio:
            stepping = self.steps.stepping(ratio)
            exits = {step: self._exit(ratio, step, pieces) for step in range(1, stepping.n + 1)}
            self._whole = ratio, self._with_one_copy(unrolled_with_exits(pieces, stepping, exits))
        return self._whole[1]

    def _cut(self, part: PlannedSteps, whole: onnx.ModelProto) -> onnx.ModelProto:
        if part.kind == ALL_EXITS:
            return passes.part(whole, {name: name for name in EXIT_OUTPUTS})
        goes_on = part.kind == "segment" and part.last < self.steps.stepping(part.ratio).n
        names = (HIDDEN, *EXIT_OUTPUTS) if goes_on else EXIT_OUTPUTS
        outputs = {name: f"{name}.{part.last}" for name in names}
        if part.first == 0:
            return passes.part(whole, outputs)
        return passes.part_from(whole, f"{HIDDEN}.{part.first}", outputs)

    def _with_one_copy(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """``model``; ValueError if its steps multiply by more matrices than the shared layers have."""
        encoder = self.eager.model.encoder
        layers = encoder.host.layers(encoder.base)
        own = {id(p) for layer in layers for p in layer.parameters() if p.dim() == 2}
        found = step_matrices(model)
        if len(found) > len(own):
            raise ValueError(f"the steps multiply by {len(found)} matrices, but the layers have {len(own)}")
        return model

    # --- parity

    def feeds(self, graph: PlannedGraph) -> list[parity.Arrays]:
        part = as_steps(graph)
        if self.steps.generates:
            return decoder_feeds(self.eager.model, self.steps.stepping(part.ratio), self.max_length())
        if part.kind not in ("step", "head", "exit-head") and part.first == 0:
            return self.id_feeds(PROBED_LENGTH)
        feeds = []
        for number, (ids, states) in enumerate(self._states_of(self.steps.stepping(part.ratio))):
            at = {"head": -1, "step": 0, "exit-head": part.last}.get(part.kind, part.first)
            feed = {PREVIOUS: states[at].numpy(), MASK: ids[MASK]}
            if part.kind == "step":
                feed[STEP_SIZE] = np.array([_PROBED_SIZES[number % len(_PROBED_SIZES)]], np.float32)
            elif part.kind == "segment":
                feed[ROWS] = np.array((0,) if len(ids[MASK]) == 1 else _TAKEN[(number // 2) % len(_TAKEN)])
            feeds.append(feed)
        return feeds

    def _states_of(self, stepping: Stepping) -> list[tuple[parity.Arrays, tuple[Tensor, ...]]]:
        """Ids, and what every step makes of them: valid inputs of what is in the middle."""
        if stepping not in self._states:
            run = self.eager.model.encoder
            with torch.inference_mode():
                self._states = {
                    stepping: [
                        (ids, run(**_tensors(ids), stepping=stepping, keep_states=True).hidden_states)
                        for ids in self.id_feeds(PROBED_LENGTH)
                    ]
                }
        return self._states[stepping]

    def by_pytorch(self, graph: PlannedGraph, arithmetic: Arithmetic) -> Run:
        """For ratio 1 the Hugging Face model itself where that may run, otherwise the same modules in steps."""
        part = as_steps(graph)
        if arithmetic == PLAIN and part.kind == "whole" and self.steps.stepping(part.ratio).is_full:
            stock = stock_decoder_outputs if self.steps.generates else stock_outputs
            return lambda feed: _arrays(stock(self.backbone, _tensors(feed)))
        eager = cache(lambda: self._eager(arithmetic))
        return lambda feed: self._run(part, eager(), _tensors(feed, arithmetic.dtype))

    def read(self, graph: PlannedGraph, feed: parity.Arrays, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """Padding before a text sees nothing, of which in half precision anything may come."""
        return real_outputs(feed, outputs) if self.steps.generates else outputs

    def _eager(self, arithmetic: Arithmetic) -> Eager:
        """The model in this arithmetic, one copy for all graphs; those in float64 are rare and large."""
        if arithmetic in self._eagers:
            return self._eagers[arithmetic]
        made = self.eager.by(arithmetic)
        return made if arithmetic.dtype == torch.float64 else self._eagers.setdefault(arithmetic, made)

    def _run(self, part: PlannedSteps, eager: Eager, tensors: Mapping[str, Tensor]) -> list[np.ndarray]:
        with torch.inference_mode():
            if part.kind == "whole" and self.steps.generates:
                return _arrays(decoder_outputs(eager.model, self.steps.stepping(part.ratio), tensors))
            return _arrays(self._outputs(part, eager, tensors))

    def _outputs(self, part: PlannedSteps, eager: Eager, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """One graph of an encoder by PyTorch, its outputs in their order."""
        model, mask = eager.model, inputs[MASK]
        if PREVIOUS not in inputs:
            h = model.encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
        elif ROWS in inputs:
            h, mask = inputs[PREVIOUS][inputs[ROWS]], mask[inputs[ROWS]]
        else:
            h = inputs[PREVIOUS]
        bias = model.encoder.attention_bias(mask, h)
        if part.kind in ("embed", "head"):
            return (h,) if part.kind == "embed" else model.head(h, mask)
        if part.kind == "step":
            return (model.encoder.step(h, bias, part.group, inputs[STEP_SIZE], self.steps.step_form),)
        stepping = self.steps.stepping(part.ratio)
        if part.kind == "exit-head":
            return with_statistics(eager.exit_logits(part.ratio, part.last, stepping.n, h, mask))
        states = []
        for group, dt in list(stepping)[part.first : part.last]:
            h = model.encoder.step(h, bias, group, dt, stepping.form)
            states.append(h)
        if part.kind == "whole":
            return model.head(h, mask)
        logits = [
            eager.exit_logits(part.ratio, step, stepping.n, state, mask)
            for step, state in enumerate(states, start=part.first + 1)
        ]
        if part.kind == ALL_EXITS:
            return with_statistics(torch.stack(logits, dim=1))
        goes_on = part.kind == "segment" and part.last < stepping.n
        return *((h,) if goes_on else ()), *with_statistics(logits[-1])

    # --- records for the manifest

    def cost(self, graph: PlannedGraph) -> Cost:
        part, facts = as_steps(graph), self.eager.model.facts
        if part.kind == "embed":
            return embedding_cost(self.backbone)
        if part.kind == "head":
            return head_cost(self.backbone)
        if part.kind == "step":
            return steps_cost(facts, 1)
        last = self.steps.stepping(part.ratio).n
        exits = range(1, last + 1) if part.kind == ALL_EXITS else (part.last,)
        heads = [self._exit_cost(step, last) for step in exits]
        if part.kind == "exit-head":
            return together(*heads)
        before = [embedding_cost(self.backbone)] if part.first == 0 else []
        return together(*before, steps_cost(facts, part.last - part.first), *heads)

    def _exit_cost(self, step: int, last: int) -> Cost:
        if step == last:
            return head_cost(self.backbone)
        hidden = self.backbone.hidden_size
        return Cost(fixed=hidden * (2 * hidden + len(self.backbone.labels)))

    def variants(self) -> dict[str, Variant]:
        made = super().variants()
        if self.steps.step_engine:
            made |= {self.steps.step_variant(ratio): self._step_variant(ratio) for ratio in self.steps.ratios}
        return made

    def variant(self, ratio: float) -> Variant:
        stepping, exits = self.steps.stepping(ratio), self.steps.exits_of(ratio)
        extra = sum(p.numel() for p in self.eager.heads[ratio].parameters()) if exits else 0
        full, taken = (cost(self.backbone, one).macs(REPORTED_LENGTH) for one in (self.steps.stepping(1), stepping))
        return Variant(
            method=self.plan.method,
            ratio=ratio,
            precision=self.plan.precision,
            graphs=self.plan.roles(ratio),
            params=self.backbone.params + extra,
            extra_params=extra,
            flops_ratio=full / taken,
            exits=list(exits) if exits else None,
            steps=stepping.lists(),
            settings={
                "form": stepping.form,
                "steps": stepping.lists(),
                "n": stepping.n,
                "full_steps": self.eager.model.facts.iterations,
            },
        )

    def _step_variant(self, ratio: float) -> Variant:
        """The step engine's: the same steps, in the form that its graphs have."""
        unrolled_one = self.variant(ratio)
        settings = {**unrolled_one.settings, "form": self.steps.step_form}
        return unrolled_one.model_copy(update={"graphs": self.steps.step_roles(ratio), "settings": settings})

    def generation(self) -> Generation | None:
        if not self.steps.generates:
            return None
        config, positions = self.backbone.config, self.eager.model.facts.positions
        ends = self._known_ids(config.eos_token_id)
        return Generation(
            eos_ids=ends,
            bos_id=next(iter(self._known_ids(config.bos_token_id)), None),
            pad_id=next(iter([*self._known_ids(config.pad_token_id), *ends]), 0),
            max_positions=positions,
        )

    def _known_ids(self, given: Any) -> list[int]:
        """One id, several or none, without those that the vocabulary has not (a configuration's defaults may be)."""
        ids = given if isinstance(given, list | tuple) else [given]
        return [int(one) for one in ids if one is not None and 0 <= one < self.eager.model.facts.vocabulary]


def _tensors(feed: parity.Arrays, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of a feed; the size of a step is never half."""
    sizes = torch.promote_types(dtype, torch.float32)
    return {name: tensor_of(array, sizes if name == STEP_SIZE else dtype) for name, array in feed.items()}


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [wide(tensor).numpy() for tensor in tensors]
