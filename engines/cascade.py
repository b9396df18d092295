"""Early exit in batches: run a segment, let the rows that are sure leave, go on with the rest.

``hidden`` stays in the backend's memory between segments: what comes out are logits and statistics, and what goes in
again are the numbers of the rows that stay. Letters: B batch, K rows still inside, S sequence, C classes, E exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from compexport.errors import InputError, describe
from engines.answers import not_finite
from engines.exit_rule import TO_THE_END, Array, ExitRule
from engines.manifest import HIDDEN, PREVIOUS, ROWS
from engines.session import Held, HoldingSession, Session

MASK, LOGITS = "attention_mask", "logits"
CONFIDENT, LAST, OUT_OF_TIME = "confident", "last", "out of time"


@dataclass(frozen=True, slots=True)
class Deadline:
    """Until when a run must be over, and what each of its segments takes.

    ``at_s`` is a time of ``clock`` (seconds); ``needs_ms(segment, rows)`` the time to expect of a segment, from 0.
    """

    at_s: float
    needs_ms: Callable[[int, int], float]
    clock: Callable[[], float] = perf_counter

    def allows(self, segment: int, rows: int) -> bool:
        """Whether a segment that starts now with so many rows would end in time."""
        return self.clock() * 1000.0 + self.needs_ms(segment, rows) <= self.at_s * 1000.0


@dataclass(frozen=True, slots=True)
class ExitRun:
    """How a batch went. ``logits`` [B, C] of the exit where each row left, ``exit_layer`` [B] that exit's layer.

    ``why`` [B]: "confident", "last" (the last exit) or "out of time". ``segments``: (rows, ms) of each that ran.
    """

    logits: Array
    exit_layer: npt.NDArray[np.int64]
    why: list[str]
    segments: list[tuple[int, float]]


class Cascade(Session):
    """The segments of one variant with exits, open. ``run`` goes to the end, ``run_exits`` lets rows leave."""

    def __init__(self, name: str, exits: Sequence[int], segments: Sequence[HoldingSession]) -> None:
        """``exits``: the layer, from 1, at which each of ``segments`` ends."""
        if not exits or len(exits) != len(segments):
            raise InputError(describe(f"{name}: segments", got=len(segments), expected=f"one for each of {exits}"))
        super().__init__(name, segments[0].inputs, segments[-1].outputs)
        self.exits = tuple(exits)
        self._segments = tuple(segments)

    def run_exits(self, feeds: Mapping[str, Array], rule: ExitRule, deadline: Deadline | None = None) -> ExitRun:
        """Run ``feeds`` (of ``segment-0``) until every row has left by ``rule``, at the last exit, or for lack of time.

        The first segment always runs; before each further one the clock is read, and if the segment would be late, the
        newest exit answers for every row still inside. Raises InputError for feeds or a rule that do not fit,
        CompexportError for logits that are not finite.
        """
        self._check(feeds)
        rule = rule.checked(len(self.exits))
        left = np.arange(len(feeds[MASK]))
        run = _Run(self, feeds)
        needed = tuple(dict.fromkeys((LOGITS, *rule.needs())))
        exit_layer = np.zeros(len(left), np.int64)
        why = np.full(len(left), LAST, dtype=object)
        logits: Array | None = None
        for number, layer in enumerate(self.exits):
            if number and deadline is not None and not deadline.allows(number, len(left)):
                why[left] = OUT_OF_TIME
                break
            outputs = run.next(needed)
            self._require_finite(outputs, layer, left)
            if logits is None:
                logits = np.empty((len(left), *outputs[LOGITS].shape[1:]), outputs[LOGITS].dtype)
            logits[left] = outputs[LOGITS]
            exit_layer[left] = layer
            if number == len(self.exits) - 1:
                break
            sure = rule.leaves(number, outputs)
            why[left[sure]] = CONFIDENT
            left = run.keep(left, ~sure)
            if not len(left):
                break
        assert logits is not None
        return ExitRun(logits, exit_layer, why.tolist(), run.segments)

    def segment_calls(self, feeds: Mapping[str, Array]) -> list[Callable[[], object]]:
        """One call per segment that runs it alone on all rows of ``feeds``, for example to time it.

        What goes into a later segment is computed once, here.
        """
        self._check(feeds)
        run = _Run(self, feeds)
        calls: list[Callable[[], object]] = []
        for _ in self._segments:
            calls.append(run.again((LOGITS, *TO_THE_END.needs())))
            run.next((LOGITS,))
        return calls

    def every_exit(self) -> EveryExit:
        """A session of what every exit says of every row; it lives as long as this cascade."""
        return EveryExit(self)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        run = _Run(self, feeds)
        for _ in self._segments[:-1]:
            run.next(())
        outputs = run.next(names)
        return [outputs[name] for name in names]

    def _require_finite(self, outputs: Mapping[str, Array], layer: int, left: npt.NDArray[np.int64]) -> None:
        for name, values in outputs.items():
            finite = np.isfinite(values)
            if not finite.all():
                bad = left[~finite.reshape(len(left), -1).all(axis=1)]
                what = f"{self.name}: {name} of exit {layer} hold"
                raise not_finite(what, got=f"row {', '.join(map(str, bad[:5]))}")


class EveryExit(Session):
    """All exits of a cascade at once, [B, E, ...] by output, one segment after the other. Closing it closes nothing."""

    def __init__(self, cascade: Cascade) -> None:
        super().__init__(cascade.name, cascade.inputs, cascade.outputs)
        self._cascade = cascade

    def close(self) -> None:
        """The segments are the cascade's."""

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        run = _Run(self._cascade, feeds)
        found = [run.next(names) for _ in self._cascade.exits]
        return [np.stack([outputs[name] for outputs in found], axis=1) for name in names]


class _Run:
    """One batch on its way through the segments: where ``hidden`` is, and which of its rows go on."""

    def __init__(self, cascade: Cascade, feeds: Mapping[str, Array]) -> None:
        self._cascade = cascade
        self._feeds = dict(feeds)
        self._held: dict[str, Held] = {}
        self._rows = np.arange(len(feeds[MASK]))
        self.segments: list[tuple[int, float]] = []

    def next(self, outputs: Sequence[str]) -> dict[str, Array]:
        """Run the next segment on the rows that are kept; ``outputs`` by name, each [K, ...]."""
        segment, hold = self._next_segment()
        started = perf_counter()
        found, held = segment.run_held(self._feeds, self._held, outputs, hold)
        self.segments.append((len(self._rows), (perf_counter() - started) * 1000.0))
        # The rows of ``hidden`` are now the kept ones, so the mask's must be too.
        mask = self._feeds[MASK][self._rows]
        self._rows = np.arange(len(mask))
        self._held = {PREVIOUS: held[HIDDEN]} if held else {}
        self._feeds = {MASK: mask, ROWS: self._rows}
        return found

    def again(self, outputs: Sequence[str]) -> Callable[[], object]:
        """A call that runs the next segment as often as one likes; this run does not move on."""
        segment, hold = self._next_segment()
        feeds, held = self._feeds, self._held
        return lambda: segment.run_held(feeds, held, outputs, hold)

    def keep(self, left: npt.NDArray[np.int64], staying: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Go on with the rows where ``staying`` [K] is true; ``left`` [K] without the others."""
        self._rows = np.flatnonzero(staying)
        self._feeds[ROWS] = self._rows
        return left[self._rows]

    def _next_segment(self) -> tuple[HoldingSession, Sequence[str]]:
        number, segments = len(self.segments), self._cascade._segments
        return segments[number], () if number == len(segments) - 1 else (HIDDEN,)
