"""COST-EFF's plan: per ratio one graph for each segment between exits, one with all exits, and prefixes on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compexport.errors import InputError, describe
from engines.manifest import ALL_EXITS, ENCODER, prefix_role, segment_role
from exporter.plans.plan import Plan, PlannedGraph

if TYPE_CHECKING:
    from exporter.graphs.family import Family

HIGHWAY = "bert.encoder.highway."  # what the names of exits' tensors begin with
DEFAULT_SEGMENTS = 4
PLAIN = "backbone"  # the graph of the backbone beside a ratio 1 that is another model


@dataclass(frozen=True)
class PlannedPart(PlannedGraph):
    """Layers ``first`` to ``last`` - 1, counted from 0, and the exit after them; of "all-exits", every exit.

    "encoder" is the plain backbone: all layers, and of the exit its logits alone.
    """

    kind: Literal["segment", "prefix", "all-exits", "encoder"]
    first: int
    last: int


@dataclass(frozen=True)
class CosteffPlan(Plan):
    """Slender models with exits; ratio 1 is the backbone, with exits where the checkpoint has some for it.

    Where ratio 1 was trained together with its exits it is another model than the backbone, which is then a variant of
    its own: what all others are compared with.

    ``exits``: the layers, counted from 1, at which segments end, of the ratios that are not to have the default.
    ``prefixes``: also one graph from the ids to each exit.
    """

    exits: Mapping[float, tuple[int, ...]] = field(default_factory=dict)
    prefixes: bool = False

    method: ClassVar[str] = "costeff"
    tensors: ClassVar[str] = "slender model"

    def exits_of(self, ratio: float) -> tuple[int, ...] | None:
        """Where the segments of ``ratio`` end, the last layer included; None for a backbone without exits."""
        if ratio == 1 and not self.trained(1):
            return None
        return self.exits.get(ratio) or default_exits(self.depth)

    def graphs(self) -> list[PlannedGraph]:
        parts = [part for ratio in self.ratios for part in self._parts(ratio)]
        if not self.keeps_backbone:
            return [*parts]
        return [PlannedPart(PLAIN, 1, ENCODER, "the backbone", "encoder", 0, self.depth), *parts]

    @cached_property
    def keeps_backbone(self) -> bool:
        """Whether the backbone is a variant of its own, as the checkpoint's ratio 1 answers by other tensors."""
        if self.checkpoint is None or not self.trained(1):
            return False
        return not all(name.startswith(HIGHWAY) for name in self.checkpoint.names(1))

    def roles(self, ratio: float) -> dict[str, str]:
        return {part.role: part.name for part in self._parts(ratio)}

    def variants(self) -> dict[str, dict[str, str]]:
        plain = {f"{PLAIN}-{self.precision}": {ENCODER: PLAIN}} if self.keeps_backbone else {}
        return {**plain, **super().variants()}

    def facts(self, graph: PlannedGraph) -> dict[str, object]:
        assert isinstance(graph, PlannedPart)
        return {
            "method": self.method,
            "ratio": graph.ratio,
            "tensors": None if graph.kind == "encoder" else self.tensors_sha256(graph.ratio),
            "part": [graph.kind, graph.first, graph.last],
        }

    def load(self) -> Family[Any]:
        from exporter.graphs.costeff import CosteffFamily

        return CosteffFamily.load(self)

    def _parts(self, ratio: float) -> list[PlannedPart]:
        name, label, depth = f"{self.method}-r{ratio}", f"ratio {ratio}", self.depth
        exits = self.exits_of(ratio)
        if exits is None:
            return [PlannedPart(name, ratio, ENCODER, label, "encoder", 0, depth)]
        parts = [
            PlannedPart(
                f"{name}-s{index}",
                ratio,
                segment_role(index),
                f"{label}, {_layers(first, last)}",
                "segment",
                first,
                last,
            )
            for index, (first, last) in enumerate(zip((0, *exits), exits, strict=False))
        ]
        parts.append(PlannedPart(f"{name}-all", ratio, ALL_EXITS, f"{label}, all exits", "all-exits", 0, depth))
        for last in exits if self.prefixes else ():
            prefix = f"{label}, {_layers(0, last)} alone"
            parts.append(PlannedPart(f"{name}-p{last}", ratio, prefix_role(last), prefix, "prefix", 0, last))
        return parts

    @cached_property
    def depth(self) -> int:
        """The backbone's layers, as ``config.json`` says; InputError as the loader raises it."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            return int(config["n_layers"] if "n_layers" in config else config["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            from exporter.backbone import load_backbone

            return load_backbone(self.folder, self.task).num_layers


def _layers(first: int, last: int) -> str:
    return f"layer {last}" if last - first == 1 else f"layers {first + 1} to {last}"


def default_exits(depth: int) -> tuple[int, ...]:
    """An exit at about every quarter of the depth."""
    return tuple(sorted({math.ceil(depth * part / DEFAULT_SEGMENTS) for part in range(1, DEFAULT_SEGMENTS + 1)}))


def checked_exits(exits: Sequence[float], depth: int) -> tuple[int, ...]:
    """Exit layers counted from 1, in order; the last layer is added where it is missing. InputError otherwise."""
    shown = ",".join(f"{layer:g}" for layer in exits)
    for layer in exits:
        if not math.isfinite(layer) or layer != int(layer):
            raise InputError(describe("--exits are whole layers", got=f"{layer:g}", expected="like 2,4,6, or auto"))
        if layer < 1:
            raise InputError(describe("--exits are layers counted from 1", got=f"{layer:g}", expected=f"1 to {depth}"))
        if layer > depth:
            hint = f"the model has {depth} layers"
            raise InputError(
                describe("--exits beyond the depth", got=f"{layer:g}", expected=f"1 to {depth}", hint=hint)
            )
    found = [int(layer) for layer in exits]
    if not found or found != sorted(set(found)):
        raise InputError(describe("--exits must rise", got=shown or "none", expected="each layer once, like 2,4,6"))
    return tuple(found) if found[-1] == depth else (*found, depth)
