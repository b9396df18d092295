"""The plan for models that share layers: per ratio one unrolled graph, or one for each segment between exits.

With ``step_engine`` also the few graphs from which every ratio can be run in a loop. Letters: N iterations of the
trained model, n steps taken instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compexport.errors import InputError, describe
from engines.manifest import ALL_EXITS, DECODER, EMBED, ENCODER, HEAD, head_role, prefix_role, segment_role, step_role
from exporter.checkpoint import MethodCheckpoint
from exporter.methods.ode_stepping import (
    Form,
    Stepping,
    described_stepping,
    listed_ratios,
    usual_ratios_of,
    warnings_of_checkpoint,
)
from exporter.plans.costeff import default_exits
from exporter.plans.plan import Plan, PlannedGraph
from exporter.sharing import DECODERS, groups_of_folder, model_type_of

if TYPE_CHECKING:
    from exporter.graphs.family import Family

Kind = Literal["whole", "segment", "prefix", "all-exits", "embed", "step", "head", "exit-head"]


@dataclass(frozen=True)
class PlannedSteps(PlannedGraph):
    """Steps ``first`` to ``last`` - 1 of the ratio, counted from 0, and what follows them.

    "step" is one step of shared layer ``group``, of whatever size; "embed" and "head" stand before and after all steps;
    "exit-head" is the head after step ``last`` alone.
    """

    kind: Kind
    first: int = 0
    last: int = 0
    group: int = 0


@dataclass(frozen=True)
class OdePlan(Plan):
    """One set of weights, run in fewer and larger steps; ratio 1 is the model itself.

    ``steppings``: the steps of ratios that are not to have the checkpoint's or, without any, equal ones. ``form``: of
    all other steps, instead of the checkpoint's. ``exits``: steps, counted from 1, at which segments end, for every
    ratio that has exit heads; those beyond a ratio's last step are left out. ``prefixes``: also one graph from the ids
    to each exit. ``step_engine``: also graphs of a single step, and of what stands around the steps.
    """

    steppings: Mapping[float, Stepping] = field(default_factory=dict)
    form: Form | None = None
    exits: tuple[int, ...] | None = None
    prefixes: bool = False
    step_engine: bool = False

    method: ClassVar[str] = "ode"
    tensors: ClassVar[str] = "exit heads"

    def require_trained(self) -> None:
        """Weights serve every ratio, so nothing is missing; InputError for exits where there are no heads for them."""
        if self.exits is None or any(map(self.exits_of, self.ratios)):
            return
        hint = f"train them with `compexport train ode {self.folder} --exit-heads --data D -o OUT`"
        got = "none for these steps" if any(map(self.trained, self.ratios)) else "none"
        raise InputError(describe(f"{self.folder}: --exits needs exit heads", got=got, hint=hint))

    def warnings(self) -> list[str]:
        found = (warnings_of_checkpoint(self.stepping(ratio), self.checkpoint) for ratio in self.ratios)
        return [line for lines in found for line in lines]

    # --- steps

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Iterations of each group of shared layers; InputError as the loader raises it."""
        return groups_of_folder(self.folder, self.task)

    @cached_property
    def _steppings(self) -> dict[float, Stepping]:
        return {ratio: self._stepping(ratio) for ratio in self.ratios}

    def stepping(self, ratio: float) -> Stepping:
        """The steps of one ratio; InputError where they do not fit the model."""
        return self._steppings[ratio]

    def _stepping(self, ratio: float) -> Stepping:
        if ratio in self.steppings:
            return self.steppings[ratio].require_fit(self.groups, f"steps of ratio {ratio:g}")
        return described_stepping(self.checkpoint, self.groups, ratio, self.form)

    @property
    def step_form(self) -> Form:
        """That of the step engine: of the first ratio beside 1, whose steps are the same in either form."""
        forms = {self.stepping(ratio).form for ratio in self.ratios if ratio != 1}
        if len(forms) > 1:
            expected = "one, since all ratios share the graphs: name it with --form"
            raise InputError(describe("forms of a step engine", got=" and ".join(sorted(forms)), expected=expected))
        return next(iter(forms), self.stepping(1).form)

    # --- graphs

    @cached_property
    def generates(self) -> bool:
        """Whether the model continues a text, and its graphs read a past."""
        return model_type_of(self.folder) in DECODERS

    def exits_of(self, ratio: float) -> tuple[int, ...] | None:
        """Where the segments of ``ratio`` end, the last step included; None where no exit heads were trained for it.

        Heads are of the steps that they were trained with, and of no others.
        """
        if not self.trained(ratio):
            return None
        described = described_stepping(self.checkpoint, self.groups, ratio)
        if not self.stepping(ratio).same(described):
            return None
        n = self.stepping(ratio).n
        wanted = default_exits(n) if self.exits is None else self.exits
        kept = (*(step for step in wanted if step < n), n)
        return kept if len(kept) > 1 else None

    def graphs(self) -> list[PlannedGraph]:
        unrolled = [part for ratio in self.ratios for part in self._unrolled(ratio)]
        return [*unrolled, *(self._engine_parts() if self.step_engine else ())]

    def roles(self, ratio: float) -> dict[str, str]:
        return {part.role: part.name for part in self._unrolled(ratio)}

    def variants(self) -> dict[str, dict[str, str]]:
        engines = {}
        if self.step_engine:
            engines = {self.step_variant(ratio): self.step_roles(ratio) for ratio in self.ratios}
        return {**super().variants(), **engines}

    def step_variant(self, ratio: float) -> str:
        """The name of the step engine's variant."""
        return f"{self.method}-r{ratio}-step-{self.precision}"

    def step_roles(self, ratio: float) -> dict[str, str]:
        """Role -> graph name of the step engine's variant."""
        heads = {part.role: part.name for part in self._exit_heads(ratio)}
        return {**{part.role: part.name for part in self._shared_parts()}, **heads}

    def facts(self, graph: PlannedGraph) -> dict[str, object]:
        part = as_steps(graph)
        common: dict[str, object] = {"method": self.method, "part": [part.kind, part.first, part.last, part.group]}
        if part.kind in ("embed", "head"):
            return common
        if part.kind == "step":
            return {**common, "form": self.step_form, "groups": self.groups}
        stepping = self.stepping(part.ratio)
        form = None if stepping.is_full else stepping.form  # the same in either
        tensors = self.tensors_sha256(part.ratio) if part.kind != "whole" and self.trained(part.ratio) else None
        return {**common, "form": form, "steps": stepping.lists(), "tensors": tensors}

    def load(self) -> Family[Any]:
        from exporter.graphs.ode import OdeFamily

        return OdeFamily.load(self)

    def _unrolled(self, ratio: float) -> list[PlannedSteps]:
        name, label, n = f"{self.method}-r{ratio}", f"ratio {ratio}", self.stepping(ratio).n
        exits = self.exits_of(ratio)
        if exits is None:
            role = DECODER if self.generates else ENCODER
            return [PlannedSteps(name, ratio, role, f"{label}, {_steps(0, n)}", "whole", 0, n)]
        spans = enumerate(zip((0, *exits), exits, strict=False))
        parts = [
            PlannedSteps(f"{name}-s{i}", ratio, segment_role(i), f"{label}, {_steps(*span)}", "segment", *span)
            for i, span in spans
        ]
        parts.append(PlannedSteps(f"{name}-all", ratio, ALL_EXITS, f"{label}, all exits", "all-exits", 0, n))
        for last in exits if self.prefixes else ():
            prefix = f"{label}, {_steps(0, last)} alone"
            parts.append(PlannedSteps(f"{name}-p{last}", ratio, prefix_role(last), prefix, "prefix", 0, last))
        return parts

    def _engine_parts(self) -> list[PlannedSteps]:
        """What the step engines of all ratios need, each graph once."""
        if self.generates:
            expected = "an encoder: of a decoder, each step has keys and values of its own"
            raise InputError(describe("--step-engine", got="a model that generates text", expected=expected))
        parts = [*self._shared_parts(), *(part for ratio in self.ratios for part in self._exit_heads(ratio))]
        return list({part.name: part for part in parts}.values())

    def _shared_parts(self) -> list[PlannedSteps]:
        count = len(self.groups)
        name = f"{self.method}-step" if self.step_form == "block" else f"{self.method}-step-{self.step_form}"
        steps = [
            PlannedSteps(
                name if count == 1 else f"{name}-{group}", 1, step_role(group, count), "one step", "step", group=group
            )
            for group in range(count)
        ]
        embed = PlannedSteps(f"{self.method}-embed", 1, EMBED, "the embeddings", "embed")
        return [embed, *steps, PlannedSteps(f"{self.method}-head", 1, HEAD, "the head", "head")]

    def _exit_heads(self, ratio: float) -> Iterator[PlannedSteps]:
        n = self.stepping(ratio).n
        for step in self.exits_of(ratio) or ():
            name = f"{self.method}-r{ratio}-h{step}"
            yield PlannedSteps(name, ratio, head_role(step), f"ratio {ratio}, exit {step} of {n}", "exit-head", 0, step)


def as_steps(graph: PlannedGraph) -> PlannedSteps:
    """``graph`` as what this plan makes."""
    assert isinstance(graph, PlannedSteps)
    return graph


def _steps(first: int, last: int) -> str:
    return f"step {last}" if last - first == 1 else f"steps {first + 1} to {last}"


def usual_ratios(folder: Path, checkpoint: MethodCheckpoint | None) -> list[float]:
    """The ratios to build where none are named: those trained for, or the usual ones that the model's steps allow."""
    return listed_ratios(checkpoint) or usual_ratios_of(groups_of_folder(folder))
