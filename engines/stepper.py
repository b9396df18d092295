"""The step engine: one small graph, run as often as a variant has steps, each time told how large the step is.

``hidden`` stays in the backend's memory from step to step, and the sessions are the same for all ratios of a bundle.
Letters: B batch, K rows still inside, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compexport.errors import BundleError, describe
from engines.cascade import MASK, Cascade
from engines.manifest import EMBED, HIDDEN, PREVIOUS, ROWS, STEP, STEP_SIZE, TensorSpec, Variant, step_role
from engines.paths import segment_paths
from engines.session import Array, GatheringSession, Held, Session


@dataclass(frozen=True, slots=True)
class Step:
    """One step: the graph of its group, and its size as the graph reads it, float32 [1]."""

    session: GatheringSession
    size: Array


class StepSegment:
    """Some steps and the head after them, as ``engines.session.HoldingSession``; the first segment embeds before.

    A later one takes the ``rows`` of both its inputs first, as segments that are one graph do.
    """

    def __init__(self, embed: GatheringSession | None, steps: Sequence[Step], head: GatheringSession) -> None:
        self._embed, self._steps, self._head = embed, tuple(steps), head
        mask = next(spec for spec in steps[0].session.inputs if spec.name == MASK)
        if embed is None:
            previous = next(spec for spec in steps[0].session.inputs if spec.name == PREVIOUS)
            self.inputs = [previous, mask, TensorSpec(name=ROWS, dtype="int64", shape=["kept"])]
        else:
            # What no word's embedding depends on, the embedding's graph need not read.
            self.inputs = [*embed.inputs, *([] if MASK in _names(embed) else [mask])]
        self.outputs = list(head.outputs)

    def run_held(
        self, feeds: Mapping[str, Array], held: Mapping[str, Held], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Held]]:
        """The head runs only for ``outputs``, and what there is to hold is ``hidden``."""
        hidden, mask = self._begin(feeds, held)
        for step in self._steps:
            given = {MASK: mask, STEP_SIZE: step.size}
            _, kept = step.session.run_held(given, {PREVIOUS: hidden}, (), (HIDDEN,))
            hidden = kept[HIDDEN]
        found: dict[str, Array] = {}
        if outputs:
            given = {MASK: mask} if MASK in _names(self._head) else {}
            found, _ = self._head.run_held(given, {PREVIOUS: hidden}, outputs, ())
        return found, {HIDDEN: hidden} if hold else {}

    def close(self) -> None:
        for session in (self._embed, *(step.session for step in self._steps), self._head):
            if session is not None:
                session.close()

    def _begin(self, feeds: Mapping[str, Array], held: Mapping[str, Held]) -> tuple[Held, Array]:
        """``hidden`` and mask [K, S] before the first step."""
        mask = feeds[MASK]
        if self._embed is not None:
            given = {name: array for name, array in feeds.items() if name in _names(self._embed)}
            return self._embed.run_held(given, {}, (), (HIDDEN,))[1][HIDDEN], mask
        rows, hidden = feeds[ROWS], held[PREVIOUS]
        if np.array_equal(rows, np.arange(len(mask))):
            return hidden, mask
        return self._steps[0].session.take_rows(hidden, rows), mask[rows]


class Stepper(Session):
    """A variant of a step engine, open. Closing it closes the graphs, for the other ratios that share them too."""

    def __init__(self, name: str, segment: StepSegment) -> None:
        super().__init__(name, segment.inputs, segment.outputs)
        self._segment = segment

    def close(self) -> None:
        self._segment.close()

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        outputs, _ = self._segment.run_held(feeds, {}, names, ())
        return [outputs[name] for name in names]


def stepper(name: str, variant: Variant, graphs: Mapping[str, GatheringSession]) -> Session:
    """The session of a variant of a step engine, of one with exits a ``Cascade``.

    ``graphs``: the open session of each graph that a row runs through, by the graph's name; one with exits has no use
    for the head without. Raises BundleError for graphs that cannot follow each other.
    """
    assert variant.steps is not None
    _require_steps(name, variant, graphs)
    roles = [step_role(group, len(variant.steps)) for group, sizes in enumerate(variant.steps) for _ in sizes]
    sizes = [np.array([size], np.float32) for group in variant.steps for size in group]
    steps = [Step(graphs[variant.graphs[role]], size) for role, size in zip(roles, sizes, strict=True)]
    segments, start = [], 0
    for end, path in zip(variant.exits or [len(steps)], segment_paths(variant), strict=True):
        embed = None if start else graphs[variant.graphs[EMBED]]
        segments.append(StepSegment(embed, steps[start:end], graphs[path[-1]]))
        start = end
    if variant.exits is None:
        return Stepper(name, segments[0])
    return Cascade(name, variant.exits, segments)


def _require_steps(name: str, variant: Variant, graphs: Mapping[str, GatheringSession]) -> None:
    """BundleError unless every graph reads and gives what docs/bundle.md, *Steps*, says."""
    for role, graph in variant.graphs.items():
        if graph not in graphs:
            continue
        given, made = _names(graphs[graph]), {spec.name for spec in graphs[graph].outputs}
        is_step = role.startswith(STEP)
        needed = {PREVIOUS, MASK, STEP_SIZE} if is_step else set() if role == EMBED else {PREVIOUS}
        fits = given == needed if is_step else needed <= given
        if not fits or (HIDDEN not in made and (is_step or role == EMBED)):
            got = f"{', '.join(sorted(given))} -> {', '.join(sorted(made))}"
            what = f"{name}: its graph {graph} is no {role} of a step engine"
            raise BundleError(describe(what, got=got, hint="build the bundle again"))


def _names(session: GatheringSession) -> set[str]:
    return {spec.name for spec in session.inputs}
