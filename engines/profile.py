"""Measured latency of every variant on one device, and what it predicts for other batch sizes and lengths.

The table holds one row per (variant, batch, length). All variants share one grid: every measured batch with every
measured length. Letters: B batch, S sequence length in tokens (padding included), all times in milliseconds.

What a prediction is, by where the request (B, S) lies:

- on a grid point: the measured value, exactly;
- inside the grid: bilinear in B and S, so monotone wherever the four neighbouring points are;
- S below the smallest length, or B below the smallest batch: the value at that edge (a bound from above, since less
  work never takes longer);
- S above the largest length: the line through the last two lengths, at least in proportion to S, and at least what a
  smaller measured batch comes to, since steeper lines of small batches would cross those of large ones;
- B above the largest batch: the sum of its chunks, ``B // largest`` full ones and the remainder, which is how the
  runtime runs it.

The last three are guesses, and a prediction made so carries ``extrapolated=True``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compexport.errors import BundleError, InputError, describe
from engines.strict_json import is_finite

# Cell indices and what their measured values are multiplied by, to be added up.
Weighted = tuple[tuple[int, float], ...]
# A prediction is the sum over a plan's terms: each a factor, and the sums of which the largest counts.
Plan = tuple[tuple[float, tuple[Weighted, ...]], ...]

MAX_REMEMBERED_SHAPES = 4096  # predictions are kept per (batch, length); far more shapes than any service sees


@dataclass(frozen=True, slots=True)
class Prediction:
    """Engine time of one request, before live correction. ``extrapolated``: outside the measured grid."""

    p50_ms: float
    p99_ms: float
    extrapolated: bool = False

    def slowed_ms(self, factor: float) -> float:
        """p99 on a machine that is slower by ``factor`` now: the usual time grows, interrupts are no longer."""
        return self.p50_ms * factor + (self.p99_ms - self.p50_ms)

    def __add__(self, other: Prediction) -> Prediction:
        """Two runs after each other. Adding p99 values bounds the p99 of the sum from above in practice."""
        extrapolated = self.extrapolated or other.extrapolated
        return Prediction(self.p50_ms + other.p50_ms, self.p99_ms + other.p99_ms, extrapolated)


class Profile:
    """The latency table of one device; immutable, so threads may share it.

    ``batches`` and ``lengths`` are the sorted axes of the grid, ``variants`` the measured ones in table order.
    """

    def __init__(
        self,
        cells: Mapping[str, Mapping[tuple[int, int], tuple[float, float]]],
        *,
        device: str = "",
        backend: str = "",
        threads: int | None = None,
    ) -> None:
        """``cells``: per variant, (batch, length) -> (p50_ms, p99_ms), complete over one common grid.

        Raises BundleError when a cell is missing.
        """
        points = {point for measured in cells.values() for point in measured}
        self.device = device
        self.backend = backend
        self.threads = threads
        self.variants = tuple(cells)
        self.batches = tuple(sorted({batch for batch, _ in points}))
        self.lengths = tuple(sorted({length for _, length in points}))
        self._cells: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
        for variant, measured in cells.items():
            ordered = [_cell(variant, measured, b, s) for b in self.batches for s in self.lengths]
            self._cells[variant] = (tuple(p50 for p50, _ in ordered), tuple(p99 for _, p99 in ordered))
        self._remembered: dict[tuple[int, int], dict[str, Prediction]] = {}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Profile:
        """Check and take over a table ``{"device", "backend", "threads", "rows": [...], ...}``.

        Raises BundleError that names the row: a missing or extra cell, a time that is not a positive finite number,
        a p99 below its p50, a batch or length below 1, a repeated row, a table without rows.
        """
        rows = table.get("rows") if isinstance(table, Mapping) else None
        if not isinstance(rows, list) or not rows:
            raise BundleError(describe("latency profile has no rows", hint="run `compexport bench` again"))
        cells: dict[str, dict[tuple[int, int], tuple[float, float]]] = {}
        for number, row in enumerate(rows):
            variant, point, times = _read_row(number, row)
            measured = cells.setdefault(variant, {})
            if point in measured:
                raise _row_error(number, row, "is there twice")
            measured[point] = times
        threads = table.get("threads")
        return cls(
            cells,
            device=str(table.get("device", "")),
            backend=str(table.get("backend", "")),
            threads=threads if isinstance(threads, int) else None,
        )

    @property
    def largest_batch(self) -> int:
        """The batch size above which a request is run in chunks."""
        return self.batches[-1]

    def predict(self, variant: str, batch: int, length: int) -> Prediction:
        """Engine time of ``batch`` sequences padded to ``length`` tokens.

        Raises InputError for a variant that was not measured, or a batch or length below 1.
        """
        predictions = self.predict_all(batch, length)
        if variant not in predictions:
            raise InputError(describe("variant was not measured", got=variant, expected=", ".join(self.variants)))
        return predictions[variant]

    def predict_all(self, batch: int, length: int) -> Mapping[str, Prediction]:
        """``predict`` for every measured variant; remembered, so asking again costs one look-up."""
        known = self._remembered.get((batch, length))
        if known is not None:
            return known
        plan, extrapolated = self._plan(check_count("batch", batch), check_count("length", length))
        predictions = {
            variant: _prediction(_evaluate(plan, p50), _evaluate(plan, p99), extrapolated)
            for variant, (p50, p99) in self._cells.items()
        }
        if len(self._remembered) >= MAX_REMEMBERED_SHAPES:
            self._remembered.clear()
        self._remembered[batch, length] = predictions
        return predictions

    def predict_chunks(self, shapes: Sequence[tuple[int, int]]) -> Mapping[str, Prediction]:
        """Time of running several (batch, length) chunks after each other, for every measured variant."""
        if len(shapes) == 1:
            return self.predict_all(*shapes[0])
        totals = dict.fromkeys(self.variants, Prediction(0.0, 0.0))
        for shape in shapes:
            for variant, prediction in self.predict_all(*shape).items():
                totals[variant] += prediction
        return totals

    def _plan(self, batch: int, length: int) -> tuple[Plan, bool]:
        """How a prediction follows from the cells, and whether it leaves the grid."""
        full, rest = divmod(batch, self.largest_batch)
        rows: list[tuple[int, float]] = [(len(self.batches) - 1, float(full))] if full else []
        if rest:
            rows += _weights(self.batches, rest)
        columns, length_outside = _length_weights(self.lengths, length)
        width, longer = len(self.lengths), length > self.lengths[-1]
        plan = tuple(
            (factor, tuple(
                tuple((row * width + j, weight) for j, weight in column)
                for row in range(0 if longer else last, last + 1)
                for column in columns
            ))
            for last, factor in rows
        )  # fmt: skip
        return plan, length_outside or not self.batches[0] <= batch <= self.largest_batch


def check_count(what: str, value: int) -> int:
    """``value``, or InputError unless it is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(describe(f"{what} is out of range", got=value, expected="a whole number >= 1"))
    return value


def _prediction(p50_ms: float, p99_ms: float, extrapolated: bool) -> Prediction:
    # Each follows its own line beyond the grid: one p99 that stands out can make the line of p99 the flatter one.
    return Prediction(p50_ms, max(p50_ms, p99_ms), extrapolated)


def _evaluate(plan: Plan, values: tuple[float, ...]) -> float:
    return sum(
        factor * max(sum(values[cell] * weight for cell, weight in choice) for choice in choices)
        for factor, choices in plan
    )


def _weights(axis: tuple[int, ...], value: int) -> list[tuple[int, float]]:
    """Linear interpolation on a sorted axis as (index, weight); beyond an end, that end alone."""
    right = bisect_right(axis, value)
    if right == 0 or axis[right - 1] == value or right == len(axis):
        return [(max(right - 1, 0), 1.0)]
    share = (value - axis[right - 1]) / (axis[right] - axis[right - 1])
    return [(right - 1, 1.0 - share), (right, share)]


def _length_weights(lengths: tuple[int, ...], length: int) -> tuple[list[list[tuple[int, float]]], bool]:
    """Weights on the length axis: one set inside, two above the largest (their maximum holds), and if outside."""
    last = len(lengths) - 1
    if length <= lengths[last]:
        return [_weights(lengths, length)], length < lengths[0]
    in_proportion = [(last, length / lengths[last])]
    if last == 0:
        return [in_proportion], True
    steps = (length - lengths[last]) / (lengths[last] - lengths[last - 1])
    return [in_proportion, [(last, 1.0 + steps), (last - 1, -steps)]], True


def _cell(
    variant: str, measured: Mapping[tuple[int, int], tuple[float, float]], batch: int, length: int
) -> tuple[float, float]:
    if (batch, length) not in measured:
        what = f"latency profile lacks a cell: variant {variant}, batch {batch}, length {length}"
        raise BundleError(describe(what, hint="run `compexport bench` again"))
    return measured[batch, length]


def _read_row(number: int, row: object) -> tuple[str, tuple[int, int], tuple[float, float]]:
    if not isinstance(row, Mapping):
        raise _row_error(number, row, "is not a table row")
    variant = row.get("variant")
    if not isinstance(variant, str) or not variant:
        raise _row_error(number, row, "has no variant")
    for key in ("batch", "length", "runs"):
        value = row.get(key, 1 if key == "runs" else None)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _row_error(number, row, f"has {key} {value}, expected a whole number >= 1")
    for key in ("p50_ms", "p99_ms"):
        ms: Any = row.get(key)
        if not is_finite(ms) or ms <= 0:
            raise _row_error(number, row, f"has {key} {ms}, expected a positive number")
    if row["p99_ms"] < row["p50_ms"]:
        raise _row_error(number, row, f"has p99_ms {row['p99_ms']} below p50_ms {row['p50_ms']}")
    return variant, (row["batch"], row["length"]), (float(row["p50_ms"]), float(row["p99_ms"]))


def _row_error(number: int, row: object, problem: str) -> BundleError:
    where = f"latency profile row {number}"
    if isinstance(row, Mapping):
        where += f" ({row.get('variant')}, batch {row.get('batch')}, length {row.get('length')})"
    return BundleError(describe(f"{where} {problem}", hint="run `compexport bench` again"))
