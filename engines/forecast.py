"""How long a batch takes in a cascade, from the times of its segments and from how many rows leave where.

For every operating point, exit depths of a batch are drawn from the point's histogram (with a fixed seed); a draw says
how many rows each segment gets, and the profile how long that takes. Letters: B batch, D draws, E exits, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.points import Point, engine_of, segment_name
from engines.profile import MAX_REMEMBERED_SHAPES, Prediction, Profile

DRAWS = 512
SEED = 0
_AT_P99 = -(-99 * (DRAWS - 1) // 100)  # where the 99th percentile of sorted draws stands, rounded up

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rung:
    """What a cascade can still promise when it is cut short: the answer of the exit at ``layer`` by ``p99_ms``.

    ``share`` is that exit's part of the full depth, ``value`` the metric when every row has left by then.
    """

    layer: int
    share: float
    p99_ms: float
    value: float | None


@dataclass(frozen=True, slots=True)
class _Times:
    """[E] milliseconds by which a batch is through each exit."""

    p50_ms: Floats
    p99_ms: Floats
    extrapolated: bool

    def __add__(self, other: _Times) -> _Times:
        extrapolated = self.extrapolated or other.extrapolated
        return _Times(self.p50_ms + other.p50_ms, self.p99_ms + other.p99_ms, extrapolated)


class Forecast:
    """Predictions for the cascades of a family on one device; those whose segments were not measured have none."""

    def __init__(self, profile: Profile, points: Mapping[str, Point], layers: Mapping[str, Sequence[int]]) -> None:
        """``points``: variants with exits and operating points, by name. ``layers``: the exits of each variant."""
        self._profile = profile
        self._layers = layers
        measured = set(profile.variants)
        self._points = {
            name: point
            for name, point in points.items()
            if {segment_name(point.variant, number) for number in range(len(point.histogram))} <= measured
        }
        self._names: dict[str, list[str]] = {}
        for name, point in self._points.items():
            self._names.setdefault(point.variant, []).append(name)
        self._entering: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        self._remembered: dict[tuple[int, int], dict[str, _Times]] = {}
        entering([1.0], 1)  # loads numpy's generators, which would otherwise cost the first request milliseconds

    def knows(self, variant: str) -> bool:
        """Whether the segments of a variant were measured."""
        return variant in self._points

    def segment_ms(self, variant: str, number: int, rows: int, length: int) -> Prediction:
        """The time of one segment with so many rows."""
        return self._profile.predict(segment_name(variant, number), rows, length)

    def first_and_whole_ms(self, variant: str, batch: int, length: int) -> tuple[float, float]:
        """p99 of a variant's first segment and of all its segments."""
        p99_ms = self._times(batch, length)[variant].p99_ms
        return float(p99_ms[0]), float(p99_ms[-1])

    def predict_chunks(
        self, shapes: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, Prediction], dict[str, tuple[Rung, ...]]]:
        """Running several (batch, length) chunks after each other: predictions, and what each can be cut to.

        The prediction of a variant that goes to the end is the profile's own, so only its rungs are here.
        """
        totals: dict[str, _Times] = {}
        for shape in shapes:
            for name, times in self._times(*shape).items():
                totals[name] = totals[name] + times if name in totals else times
        predictions = {
            name: Prediction(float(t.p50_ms[-1]), float(max(t.p50_ms[-1], t.p99_ms[-1])), t.extrapolated)
            for name, t in totals.items()
            if name != engine_of(name)
        }
        return predictions, {name: self._rungs(name, times) for name, times in totals.items()}

    def _rungs(self, name: str, times: _Times) -> tuple[Rung, ...]:
        point = self._points[name]
        layers = self._layers[point.variant]
        values = point.cut_values
        return tuple(
            Rung(layer, layer / layers[-1], float(times.p99_ms[number]), None if values is None else values[number])
            for number, layer in enumerate(layers[:-1])
        )

    def _times(self, batch: int, length: int) -> Mapping[str, _Times]:
        known = self._remembered.get((batch, length))
        if known is None:
            full, rest = divmod(batch, self._profile.largest_batch)
            sizes = [self._profile.largest_batch] * full + ([rest] if rest else [])
            beyond = not self._profile.batches[0] <= batch <= self._profile.largest_batch
            parts = [self._times_of_run(size, length, beyond) for size in sizes]
            known = parts[0]
            for part in parts[1:]:
                known = {name: known[name] + times for name, times in part.items()}
            if len(self._remembered) >= MAX_REMEMBERED_SHAPES:
                self._remembered.clear()
            self._remembered[batch, length] = known
        return known

    def _times_of_run(self, batch: int, length: int, beyond: bool) -> dict[str, _Times]:
        found: dict[str, _Times] = {}
        for variant, names in self._names.items():
            entering = self._rows_entering(variant, batch)
            segments = np.arange(entering.shape[-1])
            medians, tails = (np.cumsum(ms[segments, entering], axis=2) for ms in self._by_rows(variant, batch, length))
            p50, p99 = np.median(medians, axis=1), np.partition(tails, _AT_P99, axis=1)[:, _AT_P99]
            extrapolated = beyond or self.segment_ms(variant, 0, batch, length).extrapolated
            found |= {name: _Times(p50[i], p99[i], extrapolated) for i, name in enumerate(names)}
        return found

    def _by_rows(self, variant: str, batch: int, length: int) -> tuple[Floats, Floats]:
        """p50 and p99 [E, B + 1] of every segment by the number of its rows; nothing to do for none."""
        exits = len(self._points[variant].histogram)
        batches = list(self._profile.batches)
        rows = np.arange(1, batch + 1)
        tables = np.zeros((2, exits, batch + 1))
        for number in range(exits):
            measured = [self.segment_ms(variant, number, size, length) for size in batches]
            tables[0, number, 1:] = np.interp(rows, batches, [one.p50_ms for one in measured])
            tables[1, number, 1:] = np.interp(rows, batches, [one.p99_ms for one in measured])
        return tables[0], tables[1]

    def _rows_entering(self, variant: str, batch: int) -> npt.NDArray[np.int64]:
        """[points, D, E] rows that each segment gets, drawn once per batch size."""
        known = self._entering.get((variant, batch))
        if known is None:
            histograms = [self._points[name].histogram for name in self._names[variant]]
            known = np.stack([entering(histogram, batch) for histogram in histograms])
            self._entering[variant, batch] = known
        return known


def entering(histogram: Sequence[float], batch: int) -> npt.NDArray[np.int64]:
    """[D, E] draws of how many of ``batch`` rows each segment gets, when rows leave as ``histogram`` [E] says."""
    shares: Any = np.asarray(histogram, dtype=np.float64)
    leaving = np.random.default_rng(SEED).multinomial(batch, shares / shares.sum(), size=DRAWS)
    left_before = np.cumsum(leaving, axis=1) - leaving
    return np.asarray(batch - left_before, dtype=np.int64)
