"""Exit thresholds from what every exit says of every row: quality against cost, and the best of both. Pure numpy.

Letters: N rows, E exits (the last at the full depth), C classes, T thresholds tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.exit_rule import ENTROPY, MAX_PROBABILITY, NEVER, ExitRule, is_sure, statistic_of, thresholds_of

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

# Relative quality given up, and MACs saved, by the named points.
DROPS = {"drop-0.5%": 0.005, "drop-1%": 0.01, "drop-2%": 0.02}
SPEEDUPS = {"1.5x": 1.5, "2x": 2.0, "2.5x": 2.5, "3x": 3.0, "4x": 4.0}
TRIED = 200  # thresholds for all exits together
TRIED_PER_EXIT = 40
ROUNDS = 4  # over all exits, when each has its own threshold
SWEEP = 20  # thresholds of the table that shows quality against cost
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Search:
    """What to look for: thresholds of ``statistic``, one for each exit (``per_exit``), at fitted temperatures."""

    statistic: str = ENTROPY
    per_exit: bool = False
    temperature: bool = False

    def __post_init__(self) -> None:
        ExitRule(NEVER, self.statistic)  # refuses an unknown name before anything is run


@dataclass(frozen=True)
class Exits:
    """What the exits say of N rows: ``logits`` [N, E, C], which class is right [N], and ``macs`` [N, E] up to each.

    ``statistics`` [N, E]: those of the graph, in fp32.
    """

    logits: Array
    statistics: Array
    truth: npt.NDArray[np.int64]
    macs: Floats

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """[N, E] whether a row that leaves there is answered rightly."""
        return np.asarray(self.logits.argmax(axis=-1) == self.truth[:, None])

    def judged(self, statistic: str, temperatures: Sequence[float] | None) -> Floats:
        """[N, E - 1] what a rule compares with its thresholds."""
        if temperatures is None:
            return np.asarray(self.statistics[:, :-1], np.float64)
        scaled = self.logits[:, :-1] / np.asarray(temperatures)[None, :, None]
        return statistic_of(statistic, scaled)

    def take(self, rows: npt.NDArray[np.int64]) -> Exits:
        """These rows only."""
        return Exits(self.logits[rows], self.statistics[rows], self.truth[rows], self.macs[rows])


@dataclass(frozen=True)
class Outcome:
    """How rows fare under a rule. ``histogram`` [E]: share that leaves at each exit; MACs per row."""

    value: float
    histogram: list[float]
    cut_values: list[float]
    expected_macs: float
    worst_macs: float
    speedup: float

    def document(self) -> dict[str, Any]:
        return dict(vars(self))


def outcome(exits: Exits, rule: ExitRule) -> Outcome:
    """What ``rule`` (checked) comes to on ``exits``. ``worst_macs``: of a row as deep as any may go, on average.

    ``speedup``: MACs of the full depth over those expected. ``cut_values`` [E]: the value when every row must have left
    by that exit.
    """
    assert isinstance(rule.thresholds, tuple)
    left = leaving(rule.statistic, exits.judged(rule.statistic, rule.temperatures), rule.thresholds)
    right, count = exits.right, exits.macs.shape[1]
    rows = np.arange(len(left))
    cuts = [float(right[rows, np.minimum(left, number)].mean()) for number in range(count)]
    expected = float(exits.macs[rows, left].mean())
    means = exits.macs.mean(axis=0)
    return Outcome(
        cuts[-1],
        (np.bincount(left, minlength=count) / len(left)).tolist(),
        cuts,
        expected,
        float(means[_deepest(rule, exits.logits.shape[-1])]),
        float(means[-1]) / expected,
    )


def leaving(statistic: str, values: Floats, thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """[N] at which exit, from 0, each row leaves. ``values`` [N, E - 1]."""
    sure = is_sure(statistic, values, np.asarray(thresholds, np.float64))
    last = np.ones((len(values), 1), bool)
    return np.asarray(np.concatenate([sure, last], axis=1).argmax(axis=1))


def named_rules(exits: Exits, search: Search) -> dict[str, ExitRule]:
    """The rule of every named point that ``exits`` allow.

    "drop-1%": the cheapest that keeps 99 % of the full depth's value; "2x": the best that costs at most half of it.
    Points that save nothing, and speed-ups out of reach, are left out.
    """
    temperatures = fit_temperatures(exits.logits[:, :-1], exits.truth) if search.temperature else None
    scale = _Scale(exits, search.statistic, temperatures)
    full_value, full_macs = float(exits.right[:, -1].mean()), float(exits.macs[:, -1].mean())
    goals = {name: _keeps(full_value * (1 - drop)) for name, drop in DROPS.items()}
    goals |= {name: _costs(full_macs / speedup, full_macs) for name, speedup in SPEEDUPS.items()}
    found = {}
    for name, goal in goals.items():
        thresholds = scale.best(goal, per_exit=search.per_exit)
        if thresholds is not None:
            found[name] = ExitRule(thresholds, search.statistic, temperatures=temperatures)
    return found


def swept_rules(exits: Exits, search: Search) -> list[ExitRule]:
    """Rules from "never" to "at the first exit", spread evenly over the rows of ``exits``."""
    values = exits.judged(search.statistic, None)
    thresholds = dict.fromkeys([NEVER, *_tried(values, SWEEP)])
    return [ExitRule(value, search.statistic) for value in thresholds]


def fit_temperatures(logits: Array, truth: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """For each exit of ``logits`` [N, E, C] the temperature at which the truth [N] is likeliest (Guo et al., 2017)."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(truth))

    def nll(log_temperature: float, exit_logits: Floats) -> float:
        scaled = exit_logits / np.exp(log_temperature)
        scaled = scaled - scaled.max(axis=-1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(axis=-1)) - scaled[rows, truth]).mean())

    bounds = (np.log(COLDEST), np.log(HOTTEST))
    wide = logits.astype(np.float64)
    fitted = [minimize_scalar(nll, bounds=bounds, args=(wide[:, e],), method="bounded").x for e in range(wide.shape[1])]
    return tuple(float(np.exp(one)) for one in fitted)


# --- the search ------------------------------------------------------------------------------------------------------

# (value, macs) -> whether they are allowed, and what to make as large as possible.
_Goal = Callable[[float, float], tuple[bool, float]]


def _keeps(least: float) -> _Goal:
    """The cheapest whose value is at least this."""
    return lambda value, macs: (value >= least - 1e-12, -macs)


def _costs(most: float, full: float) -> _Goal:
    """The best that costs at most this; of equals the cheapest."""
    return lambda value, macs: (macs <= most * (1 + 1e-12), value - 1e-9 * macs / full)


class _Scale:
    """The thresholds worth trying, and what they come to."""

    def __init__(self, exits: Exits, statistic: str, temperatures: Sequence[float] | None) -> None:
        self._statistic = statistic
        self._values = exits.judged(statistic, temperatures)
        self._right = exits.right.astype(np.float64)
        self._macs = exits.macs
        self._rows = np.arange(len(self._values))
        self._early = self._values.shape[1]

    def best(self, goal: _Goal, *, per_exit: bool) -> float | tuple[float, ...] | None:
        """One threshold for all exits, or one each; None when no allowed one lets any row leave early."""
        tried = [(value,) * self._early for value in (NEVER, *_tried(self._values, TRIED))] if self._early else []
        scores = [self._score(goal, thresholds) for thresholds in tried]
        allowed = [index for index, (fits, _) in enumerate(scores) if fits]
        if not allowed:
            return None
        index = max(allowed, key=lambda index: scores[index][1])
        best = self._refined(goal, tried[index], scores[index][1]) if per_exit else tried[index]
        if not leaving(self._statistic, self._values, best).min() < self._early:
            return None
        return thresholds_of([best[0]] if len(set(best)) == 1 else best)

    def _refined(self, goal: _Goal, start: tuple[float, ...], score: float) -> tuple[float, ...]:
        """Coordinate ascent: each exit in turn takes the threshold that serves the goal best, until none helps."""
        best = start
        choices = [(NEVER, *_tried(self._values[:, [number]], TRIED_PER_EXIT)) for number in range(self._early)]
        for _ in range(ROUNDS):
            before = best
            for number in range(self._early):
                for value in choices[number]:
                    thresholds = (*best[:number], value, *best[number + 1 :])
                    fits, found = self._score(goal, thresholds)
                    if fits and found > score:
                        best, score = thresholds, found
            if best == before:
                break
        return best

    def _score(self, goal: _Goal, thresholds: Sequence[float]) -> tuple[bool, float]:
        left = leaving(self._statistic, self._values, thresholds)
        return goal(float(self._right[self._rows, left].mean()), float(self._macs[self._rows, left].mean()))


def _tried(values: Floats, count: int) -> list[float]:
    """At most ``count`` thresholds between the distinct ``values``, and one beyond each end; none without values."""
    found = np.unique(values)
    if not len(found):  # a variant that is not cut: its only exit is the end
        return []
    between = (found[1:] + found[:-1]) / 2
    # Between neighbours in floating point the mean may be one of them, which is as good.
    steps = np.concatenate([[max(found[0] / 2, 0.0)], between, [found[-1] * 1.01 + 1e-6]])
    if len(steps) > count:
        quantiles = np.quantile(values, np.linspace(0, 1, count - 2), method="lower")
        steps = np.unique(np.concatenate([steps[[0, -1]], steps[np.searchsorted(found, quantiles)]]))
    return [float(step) for step in np.maximum(steps, 0.0)]  # rounding may leave an entropy a little below 0


def _deepest(rule: ExitRule, classes: int) -> int:
    """The last exit, from 0, that a row can reach: some thresholds let every row leave."""
    assert isinstance(rule.thresholds, tuple)
    beyond = {ENTROPY: lambda t: t > np.log(classes), MAX_PROBABILITY: lambda t: NEVER < t < 1 / classes}
    everybody = beyond.get(rule.statistic, lambda t: False)
    return next((number for number, t in enumerate(rule.thresholds) if everybody(t)), len(rule.thresholds))
