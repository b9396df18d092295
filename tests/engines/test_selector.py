"""Choosing: the properties that make a budget mean something, the words that explain it, the live correction."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compexport.errors import BundleError, InputError
from engines.forecast import Rung
from engines.profile import Prediction, Profile
from engines.selector import Correction, Decision, Quality, decide, select

RATIOS = {"r1": 1.0, "r2": 2.0, "r4": 4.0, "r8": 8.0}
QUALITY = {"r1": 0.95, "r2": 0.94, "r4": 0.90, "r8": 0.80}
P99_MS = {"r1": 8.0, "r2": 6.0, "r4": 4.0, "r8": 2.0}


def profile_of(p99_ms: dict[str, float]) -> Profile:
    """One measured point: batch 1, length 16."""
    return Profile({name: {(1, 16): (ms / 2, ms)} for name, ms in p99_ms.items()})


def choose(budget_ms: float | None, **changes: Any) -> Decision:
    arguments: dict[str, Any] = {"batch": 1, "length": 16, **changes}
    profile = arguments.pop("profile", profile_of(P99_MS))
    quality = arguments.pop("quality", Quality(RATIOS, QUALITY))
    return select(profile, quality, arguments.pop("correction", None), budget_ms=budget_ms, **arguments)


def verdicts(decision: Decision) -> dict[str, str]:
    return {candidate.variant: candidate.verdict for candidate in decision.candidates}


times = st.floats(0.01, 1000.0)
families = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(times, min_size=n, max_size=n), st.lists(st.sampled_from([0.5, 0.7, 0.7, 0.9]), min_size=n, max_size=n)
    )
)


@given(families, st.floats(0.01, 2000.0), st.floats(0.0, 500.0), st.floats(0.0, 50.0), st.booleans())
def test_a_larger_budget_never_yields_worse_quality(
    family: tuple[list[float], list[float]], budget_ms: float, more_ms: float, waited_ms: float, measured: bool
) -> None:
    ratios = {f"v{i}": 1.0 + i for i in range(len(family[0]))}
    quality = Quality(ratios, dict(zip(ratios, family[1], strict=True)) if measured else None)
    profile = profile_of(dict(zip(ratios, family[0], strict=True)))
    tight, loose = (
        choose(budget, profile=profile, quality=quality, waited_ms=waited_ms)
        for budget in (budget_ms, budget_ms + more_ms)
    )
    assert quality.rank[loose.variant] >= quality.rank[tight.variant]
    assert loose.met_budget >= tight.met_budget
    assert choose(budget_ms, profile=profile, quality=quality, waited_ms=waited_ms) == tight
    for decision in (tight, loose):
        assert decision.budget_ms is not None and decision.predicted_ms is not None
        assert decision.met_budget == (decision.predicted_ms <= decision.budget_ms - waited_ms)
        assert {c.variant for c in decision.candidates} == set(ratios)
        assert [c.verdict for c in decision.candidates].count("chosen") == 1
        better = [c for c in decision.candidates if quality.rank[c.variant] > quality.rank[decision.variant]]
        if decision.met_budget:
            assert all(c.predicted_ms > decision.budget_ms - waited_ms for c in better)  # type: ignore[operator]
        else:
            assert decision.predicted_ms == min(c.predicted_ms for c in decision.candidates)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("budget_ms", "variant"), [(1, "r8"), (2, "r8"), (5, "r4"), (7.9, "r2"), (8, "r1"), (99, "r1")]
)
def test_walks_up_the_family_as_the_budget_grows(budget_ms: float, variant: str) -> None:
    decision = choose(budget_ms)
    assert (decision.variant, decision.met_budget) == (variant, budget_ms >= 2)


def test_waiting_uses_up_the_budget() -> None:
    assert choose(9.0, waited_ms=4.0).variant == "r4"
    late = choose(9.0, waited_ms=20.0)
    assert (late.variant, late.met_budget) == ("r8", False)


@pytest.mark.parametrize("budget_ms", [None, math.inf])
def test_without_a_budget_the_best(budget_ms: float | None) -> None:
    decision = choose(budget_ms)
    assert (decision.variant, decision.met_budget, decision.reason) == ("r1", True, "best quality; no budget")
    assert decision.document()["budget_ms"] is None


@pytest.mark.parametrize("budget_ms", [0, -1, -0.0, math.nan, -math.inf])
def test_senseless_budgets(budget_ms: float) -> None:
    with pytest.raises(InputError, match=r"budget_ms is out of range: got .*, expected a number of milliseconds > 0"):
        choose(budget_ms)


@pytest.mark.parametrize("waited_ms", [-1, math.nan, math.inf])
def test_senseless_waits(waited_ms: float) -> None:
    with pytest.raises(InputError, match="waited_ms is out of range"):
        choose(5.0, waited_ms=waited_ms)


PARTLY = {"r1": 0.95, "r1@2x": 0.9, "r1@4x": 0.6, "r2@2x": 0.7}  # r2 itself was built later
WITH_POINTS = {"r1": 1.0, "r1@4x": 1.0, "r1@2x": 1.0, "r2": 2.0, "r2@2x": 2.0}


def test_points_are_worse_than_their_variants_where_not_all_was_measured() -> None:
    """A point is faster than its variant, so as its equal it would always win."""
    quality = Quality(WITH_POINTS, PARTLY)
    assert not quality.measured
    assert quality.variants == ("r1", "r1@2x", "r1@4x", "r2", "r2@2x")
    assert len(set(quality.rank.values())) == 5
    profile = profile_of({"r1": 8.0, "r1@2x": 4.0, "r1@4x": 2.0, "r2": 5.0, "r2@2x": 3.0})
    chosen = {ms: choose(ms, quality=quality, profile=profile) for ms in (None, 9.0, 7.0, 3.5)}
    assert {ms: one.variant for ms, one in chosen.items()} == {None: "r1", 9.0: "r1", 7.0: "r1@2x", 3.5: "r1@4x"}
    assert "a lower ratio counts as better, and a variant as better than its points" in chosen[9.0].reason
    assert verdicts(chosen[9.0])["r1@2x"] == "counts as worse than r1, since rows leave it early"


def test_of_metrics_that_should_be_low_the_point_with_the_lower_is_better() -> None:
    assert Quality(WITH_POINTS, PARTLY, higher_is_better=False).variants[1:3] == ("r1@4x", "r1@2x")


def test_ties_go_to_the_faster() -> None:
    quality = Quality(RATIOS, {"r1": 0.9, "r2": 0.9, "r4": 0.9, "r8": 0.8})
    decision = choose(7.0, quality=quality)
    assert decision.variant == "r4"
    assert verdicts(decision)["r2"] == "as good as r4, but not faster"


def test_lower_can_be_better() -> None:
    quality = Quality(RATIOS, {"r1": 3.0, "r2": 4.0, "r4": 5.0, "r8": 1.0}, higher_is_better=False)
    assert quality.variants == ("r8", "r1", "r2", "r4")
    assert choose(100.0, quality=quality).variant == "r8"


def test_every_loser_is_told_why() -> None:
    decision = choose(6.5)
    assert decision.reason == "best quality that fits: 6.00 ms of 6.50 ms left"
    assert verdicts(decision) == {
        "r1": "needs 8.00 ms, 6.50 ms left",
        "r2": "chosen",
        "r4": "quality 0.9 is worse than 0.94 of r2",
        "r8": "quality 0.8 is worse than 0.94 of r2",
    }


def test_the_document_has_its_keys() -> None:
    document = choose(6.5).document()
    assert {"variant", "predicted_ms", "budget_ms", "met_budget", "reason", "candidates"} <= set(document)
    assert document["candidates"][0] == {
        "variant": "r1",
        "predicted_ms": 8.0,
        "usual_ms": 4.0,
        "quality": 0.95,
        "verdict": "needs 8.00 ms, 6.50 ms left",
    }


def test_none_fits() -> None:
    decision = choose(1.5)
    assert decision.reason == "none fits into 1.50 ms; this is the fastest, 2.00 ms"
    assert verdicts(decision)["r8"] == "chosen"


@pytest.mark.parametrize("values", [None, {"r1": 0.9}])
def test_unmeasured_quality_falls_back_to_the_ratio(values: dict[str, float] | None) -> None:
    decision = choose(6.5, quality=Quality(RATIOS, values))
    assert decision.variant == "r2"
    assert "quality not measured, so a lower ratio counts as better" in decision.reason
    assert verdicts(decision)["r4"] == "ratio 4 is above 2 of r2"
    assert all(candidate.quality is None for candidate in decision.candidates)


def test_an_unmeasured_variant_is_never_taken_to_meet_a_budget() -> None:
    profile = profile_of({"r1": 8.0, "r4": 4.0, "stale": 1.0})
    decision = choose(5.0, profile=profile)
    assert decision.variant == "r4"
    assert verdicts(decision)["r8"] == "no latency measured on this device; run `compexport bench`"
    assert choose(1.0, profile=profile).variant == "r4"
    assert choose(None, profile=profile).variant == "r1"


def test_without_a_profile() -> None:
    assert choose(None, profile=None).predicted_ms is None
    decision = choose(5.0, profile=None)
    assert (decision.variant, decision.predicted_ms, decision.met_budget) == ("r1", None, False)
    assert "not measured on this device" in decision.reason


def test_forced() -> None:
    decision = choose(5.0, forced="r1")
    assert (decision.variant, decision.met_budget) == ("r1", False)
    assert decision.reason == "asked for; 8.00 ms does not fit into 5.00 ms"
    assert verdicts(decision)["r4"] == "not asked for; r1 was"
    assert choose(None, forced="r8").reason == "asked for"
    assert choose(None, forced="r8", profile=None).reason == "asked for; its latency was not measured on this device"


def test_extrapolation_is_said() -> None:
    decision = choose(100.0, length=17)
    assert decision.extrapolated
    assert decision.reason.endswith("its latency is extrapolated from outside the measured batches and lengths")


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "good", True])
def test_a_quality_that_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(BundleError, match="quality table, variant r2: got"):
        Quality.from_table({"higher_is_better": True, "variants": {"r1": 0.9, "r2": value}}, RATIOS)


def test_quality_tables() -> None:
    table = {"metric": "mse", "higher_is_better": False, "variants": {**QUALITY, "gone": 1.0}}
    quality = Quality.from_table(table, RATIOS)
    assert quality.measured and quality.variants == ("r8", "r4", "r2", "r1")
    assert not Quality.from_table(None, RATIOS).measured
    with pytest.raises(BundleError, match="has no variants"):
        Quality.from_table({"metric": "mse"}, RATIOS)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_correction_starts_neutral_and_follows_a_slow_machine() -> None:
    correction = Correction(clock=Clock())
    assert correction.factors(["r1", "r2"]) == [1.0, 1.0]
    before = 1.0
    for _ in range(60):
        correction.observe("r1", 2.0, 1.0)
        assert before <= correction.factor("r1") <= 2.0
        before = correction.factor("r1")
    assert correction.factor("r1") == pytest.approx(2.0, rel=0.01)


def test_an_observation_informs_the_other_variants() -> None:
    correction = Correction(clock=Clock())
    for _ in range(60):
        correction.observe("r1", 4.0, 1.0)
    assert 2.0 < correction.factor("r8") < 3.0  # two thirds of it in logarithms: 4 ** (2/3) = 2.52


def test_one_slow_engine_on_a_normal_machine_is_told_apart() -> None:
    correction = Correction(clock=Clock())
    for _ in range(300):
        for name in ("r2", "r4", "r8"):
            correction.observe(name, 1.0, 1.0)
        correction.observe("r1", 3.0, 1.0)
    assert correction.factor("r1") == pytest.approx(3.0, rel=0.15)
    assert correction.factor("r8") == pytest.approx(1.0, abs=0.15)


def test_correction_fades_when_nothing_is_observed() -> None:
    clock = Clock()
    correction = Correction(clock=clock)
    for _ in range(60):
        correction.observe("r1", 4.0, 1.0)
    factors = []
    for seconds in (0, 30, 120, 600, 3600):
        clock.now = seconds
        factors.append(correction.factor("r1"))
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0, abs=1e-3)


def test_one_outlier_moves_little() -> None:
    correction = Correction(clock=Clock())
    correction.observe("r1", 1e9, 1.0)
    assert correction.factor("r1") < 1.6


@given(st.lists(st.tuples(st.sampled_from(list(RATIOS)), st.floats(), st.floats()), max_size=60))
def test_correction_is_bounded_whatever_it_sees(observations: list[tuple[str, float, float]]) -> None:
    correction = Correction(clock=Clock(), bounds=(0.5, 3.0))
    for variant, observed_ms, expected_ms in observations:
        correction.observe(variant, observed_ms, expected_ms)
    assert all(0.5 <= factor <= 3.0 for factor in correction.factors(list(RATIOS)))


def test_correction_changes_the_choice() -> None:
    correction = Correction(clock=Clock())
    assert choose(6.2, correction=correction).variant == "r2"
    for _ in range(60):
        correction.observe("r2", 2.0, 1.0)
    decision = choose(6.2, correction=correction)
    assert decision.variant == "r8"
    assert decision.met_budget


def test_correction_with_many_threads() -> None:
    correction = Correction()

    def work() -> None:
        for _ in range(300):
            correction.observe("r1", 2.0, 1.0)
            assert 1.0 <= correction.factor("r1") <= 2.01

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert correction.factor("r1") == pytest.approx(2.0, rel=0.02)


# --- cascades that can be cut short -------------------------------------------------------------------------------

WHOLE_MS = {"deep": 20.0, "deep@2x": 12.0, "small": 4.0}
WHOLE_QUALITY = {"deep": 0.95, "deep@2x": 0.94, "small": 0.80}
RUNGS = {
    "deep": (Rung(3, 0.25, 3.0, 0.6), Rung(6, 0.5, 8.0, 0.9)),
    "deep@2x": (Rung(3, 0.25, 3.0, 0.6), Rung(6, 0.5, 7.0, 0.89)),
}


def cut(budget_ms: float | None, **changes: Any) -> Decision:
    quality = changes.pop("quality", WHOLE_QUALITY)
    return decide(
        {name: Prediction(ms / 2, ms) for name, ms in WHOLE_MS.items()},
        Quality({"deep": 1.0, "deep@2x": 1.0, "small": 4.0}, quality),
        budget_ms=budget_ms,
        rungs=changes.pop("rungs", RUNGS),
        **changes,
    )


@pytest.mark.parametrize(
    ("budget_ms", "variant", "stops_at", "predicted_ms"),
    [
        (None, "deep", None, 20.0),
        (25.0, "deep", None, 20.0),
        (15.0, "deep@2x", None, 12.0),
        (10.0, "deep", 6, 8.0),  # at 0.9 still better than the small one, and than the point's 0.89
        (7.5, "deep@2x", 6, 7.0),
        (5.0, "small", None, 4.0),  # better than either after layer 3
        (3.5, "deep", 3, 3.0),
    ],
)
def test_what_does_not_fit_competes_with_its_deepest_exit_that_does(
    budget_ms: float | None, variant: str, stops_at: int | None, predicted_ms: float
) -> None:
    decision = cut(budget_ms)
    assert (decision.variant, decision.stops_at, decision.met_budget) == (variant, stops_at, True)
    assert decision.predicted_ms == predicted_ms
    assert ("goes on past exit" in decision.reason) == (stops_at is not None)


def test_none_fits_takes_what_answers_first() -> None:
    decision = cut(1.0)
    assert (decision.variant, decision.stops_at, decision.met_budget) == ("deep", 3, False)
    assert decision.predicted_ms == 3.0


def test_unmeasured_quality_prefers_whole_variants_then_depth() -> None:
    assert cut(10.0, quality=None).variant == "small"
    rungs = {
        **RUNGS,
        "deep": (Rung(3, 0.25, 3.0, None),),
        "deep@2x": (Rung(3, 0.25, 2.0, None), Rung(6, 0.5, 3.0, None)),
    }
    decision = cut(3.5, quality=None, rungs=rungs)
    assert (decision.variant, decision.stops_at) == ("deep@2x", 6)


def test_a_forced_cascade_is_cut_too() -> None:
    decision = cut(9.0, forced="deep")
    assert (decision.stops_at, decision.predicted_ms, decision.met_budget) == (6, 8.0, True)
    assert not cut(2.0, forced="deep").met_budget
    assert cut(99.0, forced="deep").stops_at is None


def test_a_cut_loses_in_words() -> None:
    found = verdicts(cut(5.0))
    assert found["deep"] == "quality 0.6 to exit 3 is worse than 0.8 of small"
    assert verdicts(cut(2.0))["deep@2x"] == "needs 3.00 ms to exit 3, 2.00 ms left"


def test_cuts_are_corrected_by_how_fast_their_engine_runs_now() -> None:
    correction = Correction(clock=lambda: 0.0)
    for _ in range(50):
        correction.observe("deep", 2.0, 1.0)
    factor = correction.factor("deep")
    assert factor > 1.8
    decision = cut(10.0, correction=correction)
    assert decision.variant == "small" or decision.predicted_ms == pytest.approx(3.0 * factor)
    quick = Correction(clock=lambda: 0.0)
    for _ in range(50):
        quick.observe("deep", 0.5, 1.0)
    assert cut(15.0, correction=quick).predicted_ms == pytest.approx(20.0 * quick.factor("deep"))
    assert quick.factors(["deep"]) == [quick.factor("deep")]


@given(st.floats(0.5, 30.0), st.floats(0.0, 20.0))
def test_a_larger_budget_never_expects_less_of_cascades(budget_ms: float, more_ms: float) -> None:
    def expected(decision: Decision) -> float | None:
        return next(c.quality for c in decision.candidates if c.variant == decision.variant)

    tight, loose = cut(budget_ms), cut(budget_ms + more_ms)
    if tight.met_budget:
        assert loose.met_budget
        assert expected(loose) >= expected(tight)  # type: ignore[operator]
