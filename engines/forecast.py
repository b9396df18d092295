"""How long a batch takes in a cascade, from the times of its segments and from how many rows leave where.

For every operating point, exit depths of a batch are drawn from the point's histogram (with a fixed seed); a draw says
how many rows each segment gets, and the profile how long that takes. All draws are made ahead, for a grid of batch
sizes and the measured lengths; a request only interpolates. Letters: B batch, D draws, E exits, S sequence, N names, P
points of one variant, L measured lengths.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.points import Point, segment_name
from engines.profile import MAX_REMEMBERED_SHAPES, Prediction, Profile

DRAWS = 256
SEED = 0
# Where the quantiles of sorted draws stand, the 99th percentile rounded up.
_QUANTILES = ((DRAWS - 1) // 2, -(-99 * (DRAWS - 1) // 100))

# Batch sizes of the grid: each up to the first number, then in steps of the second, and every measured one.
_EACH_UP_TO, _STEP = 8, 1.125

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


class Forecast:
    """Predictions for the cascades of a family on one device; those whose segments were not measured have none.

    No point, and no exit of one, is predicted to take longer than its variant was measured to take to the end.
    """

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
        self._places = {name: place for place, name in enumerate(self._points)}
        self._sizes = _sizes(profile.batches)
        self._times = self._grid()
        self._remembered: dict[tuple[int, int], Floats] = {}

    def knows(self, variant: str) -> bool:
        """Whether the segments of a variant were measured."""
        return variant in self._points

    def segment_ms(self, variant: str, number: int, rows: int, length: int) -> Prediction:
        """The time of one segment with so many rows."""
        return self._profile.predict(segment_name(variant, number), rows, length)

    def first_and_whole_ms(self, variant: str, batch: int, length: int) -> tuple[float, float]:
        """p99 of a variant's first segment and of all its segments."""
        p99_ms = self._of_shape(batch, length)[1, self._places[variant]]
        return float(p99_ms[0]), float(p99_ms[-1])

    def predict_chunks(
        self, shapes: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, Prediction], dict[str, tuple[Rung, ...]]]:
        """Running several (batch, length) chunks after each other: predictions, and what each can be cut to.

        The prediction of a variant that goes to the end is the profile's own, so only its rungs are here.
        """
        if not self._points:
            return {}, {}
        p50, p99 = np.sum([self._of_shape(*shape) for shape in shapes], axis=0).tolist()
        extrapolated = any(map(self._extrapolates, shapes))
        predictions = {
            name: Prediction(p50[place][-1], p99[place][-1], extrapolated)
            for name, place in self._places.items()
            if name != self._points[name].variant
        }
        return predictions, {name: self._rungs(name, p99[place]) for name, place in self._places.items()}

    def _rungs(self, name: str, p99_ms: Sequence[float]) -> tuple[Rung, ...]:
        point = self._points[name]
        layers = self._layers[point.variant]
        values: Sequence[float | None] = point.cut_values or [None] * len(layers)
        return tuple(
            [Rung(layer, layer / layers[-1], p99_ms[i], values[i]) for i, layer in enumerate(layers[:-1])],
        )

    def _extrapolates(self, shape: tuple[int, int]) -> bool:
        return any(
            not axis[0] <= value <= axis[-1]
            for axis, value in zip((self._profile.batches, self._profile.lengths), shape, strict=True)
        )

    # one shape, from the grid

    def _of_shape(self, batch: int, length: int) -> Floats:
        """p50 and p99 [2, N, E] by which a batch is through each exit; of a large one, of all its runs."""
        known = self._remembered.get((batch, length))
        if known is None:
            full, rest = divmod(batch, self._profile.largest_batch)
            known = self._of_run(rest, length) if rest else np.zeros(self._times.shape[2:])
            if full:
                known = known + full * self._of_run(self._profile.largest_batch, length)
            if len(self._remembered) >= MAX_REMEMBERED_SHAPES:
                self._remembered.clear()
            self._remembered[batch, length] = known
        return known

    def _of_run(self, batch: int, length: int) -> Floats:
        right, share = _between(self._sizes, batch)
        by_length = _mixed(self._times[right - 1], self._times[right], share)
        lengths = self._profile.lengths
        if length <= lengths[-1]:
            right, share = _between(lengths, length)
            found = _mixed(by_length[right - 1], by_length[right], share)
        else:
            found = self._longer(np.concatenate([self._times[:right, -2:], by_length[None, -2:]]), length)
        bounded = np.minimum(found, self._whole_ms(batch, length))
        return np.maximum.accumulate(bounded, axis=0)  # beyond the grid the line of p99 can be the flatter one

    def _longer(self, by_size: Floats, length: int) -> Floats:
        """[2, N, E] beyond the measured lengths, as a profile does it.

        ``by_size`` [B, 2, 2, N, E]: at the last two lengths, of every size up to this one.
        """
        lengths, last = self._profile.lengths, by_size[:, -1]
        found = last * (length / lengths[-1])
        if len(lengths) > 1:
            steps = (length - lengths[-1]) / (lengths[-1] - lengths[-2])
            found = np.maximum(found, last + steps * (last - by_size[:, -2]))
        return np.asarray(np.maximum.accumulate(found.max(axis=0), axis=-1))

    def _whole_ms(self, batch: int, length: int) -> Floats:
        """p50 and p99 [2, N, 1] measured of each name's variant to the end; infinite where only segments were."""
        measured = self._profile.predict_all(batch, length)
        unknown = Prediction(math.inf, math.inf)
        whole = [measured.get(point.variant, unknown) for point in self._points.values()]
        return np.array([[one.p50_ms for one in whole], [one.p99_ms for one in whole]])[:, :, None]

    # the grid

    def _grid(self) -> Floats:
        """[sizes, L, 2, N, E]; names with fewer exits than others repeat their last."""
        deepest = max((len(point.histogram) for point in self._points.values()), default=0)
        shape = (len(self._sizes), len(self._profile.lengths), 2, len(self._points), deepest)
        times = np.empty(shape)
        for variant in dict.fromkeys(point.variant for point in self._points.values()):
            names = [name for name, point in self._points.items() if point.variant == variant]
            places = [self._places[name] for name in names]
            histograms = [self._points[name].histogram for name in names]
            tables = self._by_rows(variant, len(histograms[0]))
            for index, size in enumerate(self._sizes):
                found = _quantiles(tables, np.stack([entering(histogram, size) for histogram in histograms]))
                padded = np.pad(found, [(0, 0), (0, 0), (0, 0), (0, deepest - found.shape[-1])], mode="edge")
                times[index][:, :, places] = padded
        return times

    def _by_rows(self, variant: str, exits: int) -> Floats:
        """p50 and p99 [2, L, E, B + 1] of every segment by the number of its rows; nothing to do for none."""
        batches, lengths = list(self._profile.batches), self._profile.lengths
        rows = np.arange(1, self._profile.largest_batch + 1)
        tables = np.zeros((2, len(lengths), exits, len(rows) + 1))
        for place, length in enumerate(lengths):
            for number in range(exits):
                measured = [self.segment_ms(variant, number, size, length) for size in batches]
                tables[0, place, number, 1:] = np.interp(rows, batches, [one.p50_ms for one in measured])
                tables[1, place, number, 1:] = np.interp(rows, batches, [one.p99_ms for one in measured])
        return tables


def entering(histogram: Sequence[float], batch: int) -> npt.NDArray[np.int64]:
    """[D, E] draws of how many of ``batch`` rows each segment gets, when rows leave as ``histogram`` [E] says."""
    shares: Any = np.asarray(histogram, dtype=np.float64)
    leaving = np.random.default_rng(SEED).multinomial(batch, shares / shares.sum(), size=DRAWS)
    left_before = np.cumsum(leaving, axis=1) - leaving
    return np.asarray(batch - left_before, dtype=np.int64)


def _quantiles(tables: Floats, rows: npt.NDArray[np.int64]) -> Floats:
    """[L, 2, P, E] median and 99th percentile of what ``rows`` [P, D, E] take by ``tables`` [2, L, E, B + 1]."""
    times = np.cumsum(tables[:, :, np.arange(rows.shape[-1]), rows], axis=-1)
    chosen = [np.partition(one, at, axis=2)[:, :, at] for one, at in zip(times, _QUANTILES, strict=True)]
    return np.stack([chosen[0], np.maximum(*chosen)], axis=1)


def _sizes(batches: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes of the grid, from 1 to the largest measured."""
    largest = batches[-1]
    found = {*range(1, min(_EACH_UP_TO, largest) + 1), *batches}
    size = float(_EACH_UP_TO)
    while (size := size * _STEP) < largest:
        found.add(round(size))
    return tuple(sorted(found))


def _between(axis: Sequence[int], value: int) -> tuple[int, float]:
    """The right one of the two neighbours of ``value`` on a sorted axis, and its share; at an end, that end alone."""
    right = bisect_right(axis, value)
    if right == len(axis):
        return right - 1, 1.0
    if right == 0:
        return 0, 1.0
    return right, (value - axis[right - 1]) / (axis[right] - axis[right - 1])


def _mixed(left: Floats, right: Floats, share: float) -> Floats:
    return right if share == 1.0 else left + share * (right - left)
