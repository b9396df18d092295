"""Which member of the family answers a request: latency profile + quality + live correction + budget -> decision.

``select`` is a pure function of its arguments (the live correction reads its own clock, which tests replace). A
candidate is a name with a quality and a predicted time, so the operating points of a variant with exits enter as
further names. What stops at any exit can also be cut short: its ``Rung``s say by when which exit has answered.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from compexport.errors import BundleError, InputError, describe
from engines.forecast import Rung
from engines.lengths import Expected
from engines.points import engine_of, is_point
from engines.profile import Prediction, Profile
from engines.strict_json import is_finite

NOT_MEASURED = "no latency measured on this device; run `compexport bench`"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant as the decision saw it. ``predicted_ms``: corrected p99, None when it was not measured.

    ``usual_ms``: corrected p50; None too where only a part of its work would be done.
    """

    variant: str
    predicted_ms: float | None
    usual_ms: float | None
    quality: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Which variant was chosen and why.

    ``predicted_ms`` is the engine's p99 for this request on this device, times the live correction (None without a
    measurement). ``met_budget`` says that it fits into ``budget_ms - waited_ms``; always true without a budget.
    ``stops_at``: the layer (of a variant with steps, the step) whose exit answers at the latest, where only a cascade
    that stops early fits; then ``predicted_ms`` is that exit's. None for a variant that runs as it is meant to.
    ``reason`` and ``candidates`` are put into words when they are read, as most requests never ask.
    """

    variant: str
    predicted_ms: float | None
    met_budget: bool
    budget_ms: float | None
    waited_ms: float
    extrapolated: bool
    comparison: Comparison = field(repr=False)

    @property
    def usual_ms(self) -> float | None:
        """The p50 of what ``predicted_ms`` is the p99 of; None without a measurement, or where it would stop early."""
        return self.comparison.usual_ms(self.variant)

    @property
    def expected_tokens(self) -> Expected | None:
        """The tokens that the predicted times are of, in a bundle that writes text."""
        return self.comparison.expected

    @property
    def stops_at(self) -> int | None:
        cut = self.comparison.cuts.get(self.variant)
        return None if cut is None else cut.layer

    @property
    def reason(self) -> str:
        """Why this variant, in one line."""
        return self.comparison.reason(self.extrapolated)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every variant with the reason it lost, best quality first."""
        return self.comparison.candidates()

    def document(self) -> dict[str, Any]:
        """What ``select --json`` prints. An infinite budget is null there, as JSON has no infinity."""
        finite = self.budget_ms is not None and math.isfinite(self.budget_ms)
        tokens = {} if self.expected_tokens is None else {"expected_tokens": self.expected_tokens.document()}
        return {
            "variant": self.variant,
            "predicted_ms": self.predicted_ms,
            "usual_ms": self.usual_ms,
            "budget_ms": self.budget_ms if finite else None,
            "met_budget": self.met_budget,
            "reason": self.reason,
            "extrapolated": self.extrapolated,
            "stops_at": self.stops_at,
            **tokens,
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }


class Quality:
    """The variants to choose from, best first (``ranked``; a larger ``rank`` is better); immutable.

    Without a measured value for every one of them (``measured`` is then False) a lower ratio counts as better, a
    variant as better than its points, and of points of one ratio that of the higher value.
    """

    def __init__(
        self, ratios: Mapping[str, float], values: Mapping[str, float] | None = None, *, higher_is_better: bool = True
    ) -> None:
        """``ratios``: every variant to choose from. ``values``: measured metric, for all of them or not used."""
        self.ratios = dict(ratios)
        self.measured = values is not None and all(name in values for name in ratios)
        self.values: dict[str, float] = {n: values[n] for n in ratios} if values is not None and self.measured else {}
        self.sign = 1.0 if higher_is_better else -1.0
        if self.measured:
            self.rank = {name: self.sign * self.values[name] for name in ratios}
        else:
            self.rank = self._unmeasured(values or {})
        self.ranked = tuple(sorted(self.rank.items(), key=lambda item: -item[1]))
        self.variants = tuple(name for name, _ in self.ranked)
        self.engines = tuple(map(engine_of, self.variants))

    def _unmeasured(self, values: Mapping[str, float]) -> dict[str, float]:
        """A rank for every variant from its ratio, below 0; equals share one."""
        keys = {
            name: (ratio, -self.sign * values.get(name, -self.sign * math.inf) if is_point(name) else -math.inf)
            for name, ratio in self.ratios.items()
        }
        places = {key: float(-number) for number, key in enumerate(sorted(set(keys.values())), start=1)}
        return {name: places[key] for name, key in keys.items()}

    @classmethod
    def from_table(cls, table: Mapping[str, Any] | None, ratios: Mapping[str, float]) -> Quality:
        """From ``quality.json`` (None when nothing was evaluated). Raises BundleError for a value that is no number."""
        if table is None:
            return cls(ratios)
        values = table.get("variants")
        if not isinstance(values, Mapping):
            raise BundleError(describe("quality table has no variants", hint="run `compexport evaluate` again"))
        for name, value in values.items():
            if not is_finite(value):
                what = f"quality table, variant {name}"
                hint = "run `compexport evaluate` again"
                raise BundleError(describe(what, got=repr(value)[:80], expected="a finite number", hint=hint))
        return cls(ratios, values, higher_is_better=bool(table.get("higher_is_better", True)))


class Correction:
    """How much slower or faster than its profile this machine runs right now; thread-safe.

    Model, in natural logarithms: ``log(observed / expected) = shared + own[variant] + noise``. ``shared`` is the state
    of the machine (other load, heat), so an observation of one engine informs the others; ``own`` is what is particular
    to one engine. Each observation moves both toward the error they left, ``shared`` twice as far, as machines change
    more than engines do (the steady-state Kalman filter of two random walks with that ratio of variances). Both fall
    back to 0 with their half-lives, so a variant that looked slow once is tried again. One observation is cut to a
    factor of 4 around what was believed, and the whole factor to ``bounds``.
    """

    SHARED_GAIN = 0.2
    OWN_GAIN = 0.1
    SHARED_HALF_LIFE_S = 30.0
    OWN_HALF_LIFE_S = 120.0
    LARGEST_SURPRISE = math.log(4.0)

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, bounds: tuple[float, float] = (0.25, 8.0)
    ) -> None:
        """``clock`` in seconds. ``bounds``: smallest and largest factor ever returned."""
        self._clock = clock
        self._bounds = bounds
        self._lock = threading.Lock()
        # (value, time) pairs are replaced whole, never changed, so readers need no lock.
        self._shared = (0.0, 0.0)
        self._own: dict[str, tuple[float, float]] = {}

    def observe(self, variant: str, observed_ms: float, expected_ms: float) -> None:
        """Tell that ``variant`` took ``observed_ms`` where its profile's median said ``expected_ms``.

        Values that are not positive and finite are ignored.
        """
        if not (0.0 < observed_ms < math.inf and 0.0 < expected_ms < math.inf):
            return
        with self._lock:
            now = self._clock()
            shared = _decayed(self._shared, now, self.SHARED_HALF_LIFE_S)
            own = _decayed(self._own.get(variant, (0.0, now)), now, self.OWN_HALF_LIFE_S)
            error = math.log(observed_ms) - math.log(expected_ms) - shared - own
            error = min(max(error, -self.LARGEST_SURPRISE), self.LARGEST_SURPRISE)
            self._shared = (self._bounded(shared + self.SHARED_GAIN * error), now)
            self._own[variant] = (self._bounded(own + self.OWN_GAIN * error), now)

    def factor(self, variant: str) -> float:
        """What to multiply a predicted time of ``variant`` with, now."""
        return self.factors((variant,))[0]

    def factors(self, variants: Sequence[str]) -> list[float]:
        """``factor`` of several variants at one moment."""
        if not self._own:
            return [1.0] * len(variants)
        now = self._clock()
        lowest, highest = self._bounds
        shared = _decayed(self._shared, now, self.SHARED_HALF_LIFE_S)
        unseen = (0.0, now)
        own = [_decayed(self._own.get(variant, unseen), now, self.OWN_HALF_LIFE_S) for variant in variants]
        return [min(max(math.exp(shared + value), lowest), highest) for value in own]

    def _bounded(self, log_factor: float) -> float:
        lowest, highest = self._bounds
        return min(max(log_factor, math.log(lowest)), math.log(highest))


def _decayed(state: tuple[float, float], now: float, half_life_s: float) -> float:
    value, seen_at = state
    return float(value * 0.5 ** ((now - seen_at) / half_life_s)) if value else 0.0


def select(
    profile: Profile | None,
    quality: Quality,
    correction: Correction | None = None,
    *,
    batch: int = 1,
    length: int = 1,
    budget_ms: float | None = None,
    waited_ms: float = 0.0,
    forced: str | None = None,
) -> Decision:
    """Choose among ``quality.variants`` for ``batch`` sequences padded to ``length`` tokens.

    The best quality whose corrected p99 fits ``budget_ms - waited_ms`` wins, ties go to the faster; when none fits, the
    fastest. No budget: the best quality. ``forced`` names the variant to take whatever the budget says. Variants
    without a measurement are never taken to meet a budget. Raises InputError for a budget that is NaN or <= 0, a
    negative or NaN wait, or a batch or length below 1.
    """
    predictions = profile.predict_all(batch, length) if profile is not None else {}
    return decide(predictions, quality, correction, budget_ms=budget_ms, waited_ms=waited_ms, forced=forced)


def decide(
    predictions: Mapping[str, Prediction],
    quality: Quality,
    correction: Correction | None = None,
    *,
    budget_ms: float | None = None,
    waited_ms: float = 0.0,
    forced: str | None = None,
    rungs: Mapping[str, Sequence[Rung]] | None = None,
    expected: Expected | None = None,
) -> Decision:
    """``select`` from predictions already made, for example of several chunks.

    ``rungs``: for each cascade, the exits before its last one, shallow first. A cascade that is too slow as a whole
    competes with the deepest exit that fits, at the quality of rows that all stop there. ``expected``: the tokens that
    the predictions are of, where text is written.
    """
    left_ms = time_left_ms(budget_ms, waited_ms)
    factors = correction.factors(quality.engines) if correction is not None else [1.0] * len(quality.engines)
    times = _corrected(predictions, quality.variants, factors)
    ranked, cuts = quality.ranked, _NO_CUTS
    if rungs and left_ms < math.inf:
        cuts = _cut(quality, times, rungs, dict(zip(quality.variants, factors, strict=True)), left_ms)
        times.update({name: cut.p99_ms for name, cut in cuts.items()})
        ranked = _ranked(quality, cuts)
    chosen = forced if forced is not None else _choose(ranked, times, left_ms)
    predicted_ms = times[chosen]
    fits = predicted_ms <= left_ms if predicted_ms is not None else left_ms == math.inf
    prediction = predictions.get(chosen)
    extrapolated = prediction is not None and prediction.extrapolated
    comparison = Comparison(
        quality, times, left_ms, chosen, fits, forced is not None, cuts, predictions, factors, expected
    )
    return Decision(chosen, predicted_ms, fits, budget_ms, waited_ms, extrapolated, comparison)


def time_left_ms(budget_ms: float | None, waited_ms: float) -> float:
    """Milliseconds left; infinite without a budget. Raises InputError for a budget or wait that makes no sense."""
    if not 0.0 <= waited_ms < math.inf:
        raise InputError(describe("waited_ms is out of range", got=waited_ms, expected="a finite number >= 0"))
    if budget_ms is None:
        return math.inf
    if not budget_ms > 0.0:  # NaN too
        raise InputError(describe("budget_ms is out of range", got=budget_ms, expected="a number of milliseconds > 0"))
    return budget_ms - waited_ms


_NO_CUTS: Mapping[str, Rung] = {}


def _corrected(
    predictions: Mapping[str, Prediction], variants: tuple[str, ...], factors: Sequence[float]
) -> dict[str, float | None]:
    return {
        name: predictions[name].p99_ms * factor if name in predictions else None
        for name, factor in zip(variants, factors, strict=True)
    }


def _cut(
    quality: Quality,
    times: Mapping[str, float | None],
    rungs: Mapping[str, Sequence[Rung]],
    factors: Mapping[str, float],
    left_ms: float,
) -> dict[str, Rung]:
    """For each cascade that does not fit as a whole, the deepest rung that does, else its shallowest; corrected."""
    found = {}
    for name in quality.variants:
        time_ms = times[name]
        if not rungs.get(name) or (time_ms is not None and time_ms <= left_ms):
            continue
        steps, factor = rungs[name], factors[name]
        deepest = next((step for step in reversed(steps) if step.p99_ms * factor <= left_ms), steps[0])
        found[name] = replace(deepest, p99_ms=deepest.p99_ms * factor)
    return found


def _ranked(quality: Quality, cuts: Mapping[str, Rung]) -> tuple[tuple[str, float], ...]:
    """All variants, best first, those that are cut at what is left of their quality.

    Where that was not measured, a cut variant comes after every whole one, the deeper the better.
    """
    worst = quality.ranked[-1][1]
    ranks = dict(quality.ranked)
    for name, cut in cuts.items():
        measured = quality.measured and cut.value is not None
        ranks[name] = quality.sign * cut.value if measured and cut.value is not None else worst - 2.0 + cut.share
    return tuple(sorted(ranks.items(), key=lambda item: -item[1]))


def _choose(ranked: Sequence[tuple[str, float]], times: Mapping[str, float | None], left_ms: float) -> str:
    """The name of the winner. ``ranked`` is best first, so the first group of equals with a fit decides."""
    best, best_rank, best_ms = "", 0.0, math.inf
    fastest, fastest_ms = ranked[0][0], math.inf
    for name, rank in ranked:
        time_ms = times[name]
        if time_ms is None:
            if left_ms < math.inf:
                continue
            time_ms = math.inf
        if time_ms < fastest_ms:
            fastest, fastest_ms = name, time_ms
        if time_ms <= left_ms and (not best or (rank == best_rank and time_ms < best_ms)):
            best, best_rank, best_ms = name, rank, time_ms
    return best or fastest


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a decision compared: ``times`` are corrected p99 by variant, None where nothing was measured.

    ``cuts``: the exit at which a cascade stops that does not fit as a whole; ``times`` then holds that exit's.
    ``predictions`` and ``factors`` (of each variant of ``quality``): what ``times`` were made of. ``expected``: the
    tokens that they are of. All texts about decisions are composed here.
    """

    quality: Quality
    times: Mapping[str, float | None]
    left_ms: float
    chosen: str
    fits: bool
    forced: bool
    cuts: Mapping[str, Rung] = field(default_factory=dict)
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    factors: Sequence[float] = ()
    expected: Expected | None = None

    def candidates(self) -> tuple[Candidate, ...]:
        """All variants, best quality first."""
        return tuple(
            [
                Candidate(name, ms, self.usual_ms(name), self._value(name), self._verdict(name, ms))
                for name, ms in self.times.items()
            ]
        )

    def usual_ms(self, name: str) -> float | None:
        """Corrected p50; None for what was not measured, or would be cut short."""
        if name in self.cuts or name not in self.predictions:
            return None
        return self.predictions[name].p50_ms * self.factors[self.quality.variants.index(name)]

    def _value(self, name: str) -> float | None:
        """The quality to expect of a variant in the time left."""
        return self.cuts[name].value if name in self.cuts else self.quality.values.get(name)

    def _verdict(self, name: str, time_ms: float | None) -> str:
        if name == self.chosen:
            return "chosen"
        if self.forced:
            return f"not asked for; {self.chosen} was"
        if time_ms is None and self.left_ms < math.inf:
            return NOT_MEASURED
        cut = f" to exit {self.cuts[name].layer}" if name in self.cuts else ""
        if time_ms is not None and time_ms > self.left_ms:
            return f"needs {_ms(time_ms)}{cut}, {_ms(self.left_ms)} left"
        mine, its = self._value(name), self._value(self.chosen)
        if mine is not None and its is not None:
            if mine == its:
                return f"as good as {self.chosen}, but not faster"
            return f"quality {mine:.4g}{cut} is worse than {its:.4g} of {self.chosen}"
        if cut:
            return f"would have to stop at exit {self.cuts[name].layer}"
        if self.quality.rank[name] == self.quality.rank[self.chosen]:
            return f"as good as {self.chosen}, but not faster"
        ratio, its_ratio = self.quality.ratios[name], self.quality.ratios[self.chosen]
        if ratio == its_ratio:
            return f"counts as worse than {self.chosen}, since rows leave it early"
        return f"ratio {ratio:g} is above {its_ratio:g} of {self.chosen}"

    def reason(self, extrapolated: bool) -> str:
        """Why ``chosen`` was chosen, in one line."""
        reason = self._why_chosen()
        if not self.quality.measured and not self.forced:
            points = ", and a variant as better than its points" if any(map(is_point, self.quality.ratios)) else ""
            missing = "quality not measured" if not points else "quality not measured of all"
            reason += f"; {missing}, so a lower ratio counts as better{points} (`compexport evaluate` measures it)"
        if self.expected is not None and self.times[self.chosen] is not None:
            reason += f"; {self._tokens(self.expected)}"
        if extrapolated:
            reason += "; its latency is extrapolated from outside the measured batches and lengths"
        return reason

    def _tokens(self, expected: Expected) -> str:
        """Of how many tokens the times are."""
        usual_ms = self.usual_ms(self.chosen)
        if not expected.measured:
            return f"for all {expected.p99} tokens that are allowed, as lengths of outputs were not measured"
        usual = "" if usual_ms is None else f", usually {_ms(usual_ms)} for {expected.p50}"
        beams = expected.counted_with
        counted = "" if beams is None else f", counted {'without beams' if beams == 1 else f'with {beams} beams'}"
        return f"for the {expected.p99} tokens that one output in a hundred has{usual}{counted}"

    def _why_chosen(self) -> str:
        time_ms = self.times[self.chosen]
        if time_ms is None:
            return ("asked for" if self.forced else "best quality") + "; its latency was not measured on this device"
        if self.left_ms == math.inf:
            return "asked for" if self.forced else "best quality; no budget"
        fit = "fits" if self.fits else "does not fit"
        cut = self.cuts.get(self.chosen)
        stop = f", and goes on past exit {cut.layer} only while there is time" if cut is not None else ""
        if self.forced:
            return f"asked for; {_ms(time_ms)} {fit} into {_ms(self.left_ms)}{stop}"
        if self.fits:
            return f"best quality that fits: {_ms(time_ms)} of {_ms(self.left_ms)} left{stop}"
        return f"none fits into {_ms(self.left_ms)}; this is the fastest, {_ms(time_ms)}{stop}"


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if not 0.0 < abs(value) < 0.1 else f"{value:.2g} ms"
