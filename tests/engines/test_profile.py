"""The latency profile: exact on its grid, monotone between, honest outside, and strict about what it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compexport.errors import BundleError, InputError
from engines.profile import MAX_REMEMBERED_SHAPES, Prediction, Profile

BATCHES = (1, 8, 32)
LENGTHS = (16, 128, 512)


def make_row(
    variant: str = "v", batch: int = 1, length: int = 16, p50: float = 1.0, p99: float = 2.0
) -> dict[str, Any]:
    return {"variant": variant, "batch": batch, "length": length, "p50_ms": p50, "p99_ms": p99, "runs": 20}


def make_table(rows: list[Any]) -> dict[str, Any]:
    return {"device": "cpu", "backend": "ort", "threads": 2, "environment": {}, "rows": rows, "realised": []}


def linear(a: float = 0.5, b: float = 0.01) -> Profile:
    """Cost a + b * batch * length, which bilinear interpolation meets exactly."""
    rows = [make_row(batch=n, length=s, p50=a + b * n * s, p99=2 * (a + b * n * s)) for n in BATCHES for s in LENGTHS]
    return Profile.from_table(make_table(rows))


@st.composite
def monotone_profiles(draw: st.DrawFn) -> Profile:
    """Times that never fall with batch or length, otherwise arbitrary."""
    batches = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))
    lengths = sorted(draw(st.sets(st.integers(1, 600), min_size=1, max_size=4)))
    cells: dict[tuple[int, int], tuple[float, float]] = {}
    step = st.floats(0.0, 50.0)
    for i, batch in enumerate(batches):
        for j, length in enumerate(lengths):
            floor = max(
                [0.1]
                + ([cells[batches[i - 1], length][0]] if i else [])
                + ([cells[batch, lengths[j - 1]][0]] if j else [])
            )
            p50 = floor + draw(step)
            cells[batch, length] = (p50, 3 * p50)
    return Profile({"v": cells})


def test_reads_the_table() -> None:
    profile = linear()
    assert (profile.device, profile.backend, profile.threads) == ("cpu", "ort", 2)
    assert (profile.variants, profile.batches, profile.lengths) == (("v",), BATCHES, LENGTHS)
    assert profile.largest_batch == 32


@given(monotone_profiles())
def test_exact_on_the_grid(profile: Profile) -> None:
    for i, batch in enumerate(profile.batches):
        for j, length in enumerate(profile.lengths):
            p50, p99 = (values[i * len(profile.lengths) + j] for values in profile._cells["v"])
            assert profile.predict("v", batch, length) == Prediction(p50, p99, extrapolated=False)


@given(monotone_profiles(), st.integers(1, 40), st.integers(1, 1200), st.integers(0, 40), st.integers(0, 600))
def test_more_work_is_never_predicted_faster(
    profile: Profile, batch: int, length: int, more_batch: int, more_length: int
) -> None:
    more = profile.predict("v", batch + more_batch, length + more_length)
    less = profile.predict("v", batch, length)
    assert more.p50_ms >= less.p50_ms * (1 - 1e-9)
    assert more.p99_ms >= less.p99_ms * (1 - 1e-9)


@given(st.integers(1, 32), st.integers(16, 512))
def test_bilinear_inside(batch: int, length: int) -> None:
    prediction = linear().predict("v", batch, length)
    assert prediction.p50_ms == pytest.approx(0.5 + 0.01 * batch * length)
    assert prediction.p99_ms == pytest.approx(2 * prediction.p50_ms)
    assert not prediction.extrapolated


def test_below_the_grid_is_the_edge() -> None:
    profile = Profile.from_table(make_table([make_row(batch=4, length=16), make_row(batch=8, length=16)]))
    assert profile.predict("v", 4, 3) == Prediction(1.0, 2.0, extrapolated=True)
    assert profile.predict("v", 1, 16) == Prediction(1.0, 2.0, extrapolated=True)


def test_above_the_longest_follows_the_last_slope() -> None:
    rows = [make_row(length=100, p50=1.0, p99=2.0), make_row(length=200, p50=3.0, p99=5.0)]
    prediction = Profile.from_table(make_table(rows)).predict("v", 1, 300)
    assert prediction == Prediction(5.0, 8.0, extrapolated=True)


@pytest.mark.parametrize("rows", [[(200, 3.0)], [(100, 2.9), (200, 3.0)], [(100, 4.0), (200, 3.0)]])
def test_above_the_longest_grows_at_least_in_proportion(rows: list[tuple[int, float]]) -> None:
    table = make_table([make_row(length=length, p50=ms, p99=ms) for length, ms in rows])
    assert Profile.from_table(table).predict("v", 1, 400) == Prediction(6.0, 6.0, extrapolated=True)


def test_a_p99_that_stands_out_leaves_no_p99_below_its_p50() -> None:
    rows = [make_row(length=64, p50=1.0, p99=19.5), make_row(length=128, p50=20.0, p99=20.5)]
    prediction = Profile.from_table(make_table(rows)).predict("v", 1, 256)
    assert prediction.p50_ms == pytest.approx(58.0) == prediction.p99_ms


def test_above_the_longest_a_larger_batch_never_takes_less() -> None:
    table = make_table([
        make_row(batch=1, length=100, p50=1.0), make_row(batch=1, length=200, p50=3.0, p99=3.0),
        make_row(batch=8, length=100, p50=3.0, p99=3.0), make_row(batch=8, length=200, p50=3.0, p99=3.0),
    ])  # fmt: skip
    assert (
        Profile.from_table(table).predict("v", 8, 500).p50_ms == Profile.from_table(table).predict("v", 1, 500).p50_ms
    )


def test_a_batch_above_the_largest_is_the_sum_of_its_chunks() -> None:
    profile = linear()
    whole = profile.predict("v", 70, 128)
    parts = [profile.predict("v", size, 128) for size in (32, 32, 6)]
    assert whole.extrapolated and not any(part.extrapolated for part in parts)
    assert whole.p50_ms == pytest.approx(sum(part.p50_ms for part in parts))
    assert whole.p99_ms == pytest.approx(sum(part.p99_ms for part in parts))
    assert profile.predict("v", 64, 128).p50_ms == pytest.approx(2 * parts[0].p50_ms)


def test_chunks_of_different_lengths_add_up() -> None:
    profile = linear()
    total = profile.predict_chunks([(32, 20), (5, 300), (1, 4)])["v"]
    parts = [profile.predict("v", 32, 20), profile.predict("v", 5, 300), profile.predict("v", 1, 4)]
    assert total.p50_ms == pytest.approx(sum(part.p50_ms for part in parts))
    assert total.extrapolated
    assert profile.predict_chunks([(8, 128)])["v"] == profile.predict("v", 8, 128)


def test_remembering_is_bounded_and_changes_nothing() -> None:
    profile = linear()
    first = profile.predict("v", 3, 77)
    for length in range(1, MAX_REMEMBERED_SHAPES + 10):
        profile.predict("v", 1, length)
    assert len(profile._remembered) <= MAX_REMEMBERED_SHAPES
    assert profile.predict("v", 3, 77) == first


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"p50_ms": math.nan}, r"row 1 \(v, batch 8, length 16\) has p50_ms nan, expected a positive number"),
        ({"p99_ms": math.inf}, "row 1 .* has p99_ms inf"),
        ({"p50_ms": -1.0}, "row 1 .* has p50_ms -1.0"),
        ({"p50_ms": 0}, "row 1 .* has p50_ms 0"),
        ({"p50_ms": None}, "row 1 .* has p50_ms None"),
        ({"p50_ms": "1"}, "row 1 .* has p50_ms 1"),
        ({"p50_ms": True}, "row 1 .* has p50_ms True"),
        ({"p99_ms": 0.5}, "row 1 .* has p99_ms 0.5 below p50_ms 1.0"),
        ({"batch": 0}, "row 1 .* has batch 0"),
        ({"batch": 1.5}, "row 1 .* has batch 1.5"),
        ({"length": "16"}, "row 1 .* has length 16"),
        ({"runs": 0}, "row 1 .* has runs 0"),
        ({"variant": None}, "row 1 .* has no variant"),
        ({"batch": 1}, "row 1 .* is there twice"),
        ({"length": 17}, "lacks a cell: variant v, batch 1, length 17"),
        ({"variant": "w"}, "lacks a cell: variant v, batch 8, length 16"),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, Any], problem: str) -> None:
    rows = [make_row(), {**make_row(batch=8), **change}]
    with pytest.raises(BundleError, match=problem):
        Profile.from_table(make_table(rows))


@pytest.mark.parametrize("rows", [[], None, "rows", [3], {}])
def test_a_table_without_rows(rows: Any) -> None:
    with pytest.raises(BundleError, match=r"no rows|is not a table row"):
        Profile.from_table(make_table(rows))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, math.nan])
def test_shapes_are_whole_numbers(value: Any) -> None:
    with pytest.raises(InputError, match="batch is out of range"):
        linear().predict("v", value, 16)
    with pytest.raises(InputError, match="length is out of range"):
        linear().predict("v", 1, value)


def test_an_unknown_variant_lists_the_choices() -> None:
    with pytest.raises(InputError, match="got w, expected v"):
        linear().predict("w", 1, 16)
