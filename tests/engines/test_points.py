"""Operating points in the quality table, and what a profile predicts of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compexport.errors import BundleError
from engines.exit_rule import ExitRule
from engines.forecast import Forecast, entering
from engines.points import Point, engine_of, is_point, is_segment, point_name, points_of, segment_name, to_the_end
from engines.profile import Profile

NAME = "costeff-r4-fp32"
POINT = point_name(NAME, "2x")
LAYERS = {NAME: (3, 6, 12)}
RULE = ExitRule((0.4, 0.4))
# A segment takes 2 ms for itself and 1 ms a row; p99 is twice that. Length does not matter.
SEGMENT_MS = {batch: 2.0 + batch for batch in (1, 4, 8)}

Change = Callable[[dict[str, Any]], Any]


def profile(segments: int = 3) -> Profile:
    cells = {(b, s): (ms, 2 * ms) for b, ms in SEGMENT_MS.items() for s in (8, 16)}
    whole = {point: (3 * p50, 3 * p99) for point, (p50, p99) in cells.items()}
    return Profile({NAME: whole, **{segment_name(NAME, number): cells for number in range(segments)}})


def point(*histogram: float, values: tuple[float, ...] | None = None) -> Point:
    return Point(NAME, RULE, histogram, values)


def forecast(points: dict[str, Point], segments: int = 3) -> Forecast:
    return Forecast(profile(segments), {**to_the_end(None, {NAME: 3}), **points}, LAYERS)


def test_names() -> None:
    assert POINT == "costeff-r4-fp32@2x" and engine_of(POINT) == engine_of(NAME) == NAME
    assert is_point(POINT) and not is_point(NAME)
    assert is_segment(segment_name(NAME, 1)) and not is_segment(NAME) and not is_segment(POINT)


# --- predictions --------------------------------------------------------------------------------------------------


def test_when_nobody_leaves_it_takes_all_segments() -> None:
    predictions, rungs = forecast({POINT: point(0.0, 0.0, 1.0, values=(0.7, 0.8, 0.9))}).predict_chunks([(8, 16)])
    assert predictions[POINT].p50_ms == pytest.approx(30.0)
    assert predictions[POINT].p99_ms == pytest.approx(60.0)
    assert [(r.layer, r.share, r.p99_ms, r.value) for r in rungs[POINT]] == [(3, 0.25, 20.0, 0.7), (6, 0.5, 40.0, 0.8)]
    assert [(r.layer, r.p99_ms, r.value) for r in rungs[NAME]] == [(3, 20.0, None), (6, 40.0, None)]
    assert NAME not in predictions, "the profile's own measurement of the whole is better"


def test_when_everybody_leaves_it_takes_the_first() -> None:
    predictions, _ = forecast({POINT: point(1.0, 0.0, 0.0)}).predict_chunks([(4, 8)])
    assert predictions[POINT].p50_ms == pytest.approx(6.0)
    assert predictions[POINT].p99_ms == pytest.approx(12.0)


def test_one_row_goes_as_deep_as_one_in_a_hundred_does() -> None:
    """At batch 1 the median row decides the median, and the deepest of a hundred the 99th percentile."""
    often, seldom = point(0.6, 0.3, 0.1), point(0.6, 0.4 - 1e-4, 1e-4)
    predictions, _ = forecast({POINT: often, point_name(NAME, "rare"): seldom}).predict_chunks([(1, 8)])
    assert predictions[POINT].p50_ms == pytest.approx(3.0)
    assert predictions[POINT].p99_ms == pytest.approx(18.0)
    assert predictions[point_name(NAME, "rare")].p99_ms == pytest.approx(12.0)


def test_a_batch_lies_between_what_its_mean_takes_and_the_whole() -> None:
    predictions, rungs = forecast({POINT: point(0.5, 0.25, 0.25)}).predict_chunks([(8, 8)])
    mean_rows = 8 + 4 + 2
    assert predictions[POINT].p50_ms == pytest.approx(3 * 2 + mean_rows, abs=1.5)
    assert 2 * (3 * 2 + mean_rows) < predictions[POINT].p99_ms < 60.0
    assert rungs[POINT][0].p99_ms < rungs[POINT][1].p99_ms < predictions[POINT].p99_ms


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda h: sum(h) > 0.01), st.integers(1, 20))
def test_predictions_are_ordered(shares: list[float], batch: int) -> None:
    histogram = [share / sum(shares) for share in shares]
    predictions, rungs = forecast({POINT: point(*histogram)}).predict_chunks([(batch, 8)])
    first, second = (rung.p99_ms for rung in rungs[POINT])
    assert 0 < first <= second <= predictions[POINT].p99_ms
    assert predictions[POINT].p50_ms <= predictions[POINT].p99_ms
    whole = forecast({}).first_and_whole_ms(NAME, batch, 8)
    assert predictions[POINT].p99_ms <= whole[1] + 1e-9 and first == pytest.approx(whole[0])


def test_chunks_and_large_batches_add_up() -> None:
    found = forecast({POINT: point(0.0, 0.0, 1.0)})
    one, _ = found.predict_chunks([(8, 8)])
    other, _ = found.predict_chunks([(4, 16)])
    both, rungs = found.predict_chunks([(8, 8), (4, 16)])
    assert both[POINT].p99_ms == pytest.approx(one[POINT].p99_ms + other[POINT].p99_ms)
    assert rungs[POINT][0].p99_ms == pytest.approx(20.0 + 12.0)
    large, _ = found.predict_chunks([(20, 8)])
    assert large[POINT].p50_ms == pytest.approx(30.0 + 30.0 + 18.0)
    assert large[POINT].extrapolated and not one[POINT].extrapolated


def test_the_same_seed_every_time() -> None:
    several = [forecast({POINT: point(0.5, 0.25, 0.25)}).predict_chunks([(8, 8)]) for _ in range(2)]
    assert several[0] == several[1]
    assert np.array_equal(entering((0.5, 0.5), 9), entering((0.5, 0.5), 9))


def test_a_request_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws take milliseconds; made within a request, they would be taken from its budget."""
    ready = forecast({POINT: point(0.5, 0.25, 0.25)})

    def draw(*_: object) -> None:
        raise AssertionError("drawn within a request")

    monkeypatch.setattr("engines.forecast.entering", draw)
    for batch in (*range(1, 9), 11, 800):
        for length in (1, 8, 9, 13, 16, 40):
            predictions, rungs = ready.predict_chunks([(batch, length)])
            assert predictions[POINT].p99_ms > rungs[POINT][0].p99_ms > 0


def test_between_the_drawn_sizes_and_lengths_times_are_what_draws_say() -> None:
    """A grid to 64 rows, whose times grow with rows and tokens, against draws made for the size itself."""
    segments = {(b, s): (1.0 + b * s / 100, 2.0 + b * s / 50) for b in (1, 8, 64) for s in (8, 32)}
    cells = {NAME: {at: (3 * p50, 3 * p99) for at, (p50, p99) in segments.items()}}
    cells |= {segment_name(NAME, number): segments for number in range(3)}
    found = Forecast(Profile(cells), {NAME: point(0, 0, 1.0), POINT: point(0.5, 0.25, 0.25)}, LAYERS)
    for batch in (3, 13, 37, 59):
        for length in (8, 20, 32):
            rows = entering((0.5, 0.25, 0.25), batch)
            took = np.where(rows > 0, 2.0 + rows * length / 50, 0.0).sum(axis=1)
            predictions, _ = found.predict_chunks([(batch, length)])
            assert predictions[POINT].p99_ms == pytest.approx(np.quantile(took, 0.99), rel=0.06)
            assert predictions[POINT].p50_ms <= predictions[POINT].p99_ms


def test_no_point_is_slower_than_its_variant() -> None:
    """Segments timed alone came to more than the whole, as measurements do."""
    slow = dict.fromkeys(((1, 8), (8, 8)), (20.0, 40.0))
    cells = {NAME: dict.fromkeys(slow, (25.0, 50.0)), **{segment_name(NAME, n): slow for n in range(3)}}
    found = Forecast(Profile(cells), {NAME: point(0, 0, 1.0), POINT: point(0.0, 0.5, 0.5)}, LAYERS)
    for batch in (1, 5, 16):
        predictions, rungs = found.predict_chunks([(batch, 8)])
        whole = 50.0 if batch < 16 else 100.0
        assert predictions[POINT].p99_ms == whole and predictions[POINT].p50_ms == whole / 2
        for name in (NAME, POINT):
            assert [rung.p99_ms for rung in rungs[name]] == [whole * 0.8, whole]
        assert found.first_and_whole_ms(NAME, batch, 8) == (whole * 0.8, whole)


def test_segments_that_were_not_measured_give_no_prediction() -> None:
    found = forecast({POINT: point(0.5, 0.25, 0.25)}, segments=2)
    assert not found.knows(NAME)
    assert found.predict_chunks([(8, 8)]) == ({}, {})


# --- the table ----------------------------------------------------------------------------------------------------


def table(**changes: Any) -> dict[str, Any]:
    entry = {"variant": NAME, "rule": RULE.document(), "histogram": [0.5, 0.25, 0.25], "cut_values": [0.7, 0.8, 0.9]}
    return {"points": {POINT: {**entry, **changes}}, "exits": {NAME: {"values": [0.7, 0.85, 0.95]}}}


def test_points_are_read() -> None:
    assert points_of(table(), {NAME: 3}) == {POINT: Point(NAME, RULE, (0.5, 0.25, 0.25), (0.7, 0.8, 0.9))}
    assert points_of(table(rule={"thresholds": 0.4}), {NAME: 3})[POINT].rule == RULE
    assert to_the_end(table(), {NAME: 3})[NAME].cut_values == (0.7, 0.85, 0.95)
    assert to_the_end(table(), {NAME: 3})[NAME].histogram == (0.0, 0.0, 1.0)


def test_points_of_variants_that_are_not_there_are_left_out() -> None:
    assert points_of(table(), {}) == points_of(table(), {"costeff-r8-fp32": 3}) == points_of(None, {NAME: 3}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"histogram": [0.5, 0.5]}, r"costeff-r4-fp32@2x: histogram: got \[0.5, 0.5\], expected 3 finite numbers"),
        ({"histogram": [0.5, 0.25, math.nan]}, "expected 3 finite numbers"),
        ({"histogram": [0.5, 0.5, 0.5]}, "expected shares that add up to 1"),
        ({"histogram": [1.5, -0.5, 0.0]}, "expected shares that add up to 1"),
        ({"cut_values": [0.5]}, "cut_values: got .*, expected 3 finite numbers"),
        ({"rule": None}, "point costeff-r4-fp32@2x: exit rule"),
        ({"rule": {"thresholds": [0.1]}}, "exit thresholds do not fit: got 1 of them, expected 2"),
        ({"rule": {"thresholds": math.nan}}, "exit threshold is out of range: got nan"),
        ({"rule": {"thresholds": 10**400}}, "exit threshold is out of range: got 1000"),
        ({"histogram": [10**400, 0, 0]}, "expected 3 finite numbers"),
        ({"variant": "costeff-r1-fp32"}, "2x: variant: got costeff-r1-fp32, expected costeff-r4-fp32"),
    ],
)
def test_points_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        points_of(table(**changes), {NAME: 3})
    assert str(caught.value).endswith("run `compexport evaluate` again")


@pytest.mark.parametrize("name", [NAME, f"{NAME}@", f"{NAME}@2x@x"])
def test_names_of_points_that_are_none(name: str) -> None:
    entry = table()["points"][POINT]
    with pytest.raises(BundleError, match=f"a point's name: got {name}, expected {NAME}@NAME; run `compexport"):
        points_of({"points": {name: entry}}, {NAME: 3})


@pytest.mark.parametrize("section", ["points", "exits"])
def test_sections_that_are_none(section: str) -> None:
    with pytest.raises(BundleError, match=f"quality table: {section}: got .*, expected an object"):
        (points_of if section == "points" else to_the_end)({section: [1]}, {NAME: 3})
