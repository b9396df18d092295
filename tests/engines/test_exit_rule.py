"""Which rules are refused, and when a row leaves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compexport.errors import InputError
from engines.exit_rule import BATCH_MAXIMUM, STATISTICS, ExitRule, is_sure, statistic_of

LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(2, 4)), elements=st.floats(-1e4, 1e4, width=32)
)


@pytest.mark.parametrize("value", [math.nan, -0.5, -2, math.inf, -math.inf, True, "0.3", None, 10**400, np.float32(-3)])
@pytest.mark.parametrize("listed", [False, True])
def test_thresholds_that_make_no_sense(value: Any, listed: bool) -> None:
    with pytest.raises(
        InputError, match=r"exit threshold is out of range: got .*, expected a finite number >= 0, or -1"
    ):
        ExitRule((0.5, value) if listed else value)


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0, math.inf])
def test_temperatures_that_make_no_sense(value: float) -> None:
    with pytest.raises(InputError, match="exit temperature is out of range: got .*, expected a number > 0"):
        ExitRule(0.5, temperatures=(1.0, value))


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="unknown exit statistic: got variance, expected one of entropy, max_prob"):
        ExitRule(0.5, "variance")
    with pytest.raises(InputError, match="unknown exit mode: got batch, expected one of per-row, batch-maximum"):
        ExitRule(0.5, mode="batch")


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_lists_of_the_wrong_length(count: int) -> None:
    with pytest.raises(InputError, match=f"exit thresholds do not fit: got {count} of them, expected 2, one for each"):
        ExitRule((0.1,) * count).checked(3)
    if count:
        with pytest.raises(InputError, match=f"exit temperatures do not fit: got {count} of them, expected 2"):
            ExitRule(0.1, temperatures=(1.0,) * count).checked(3)


def test_one_threshold_serves_every_exit() -> None:
    assert ExitRule(0.25).checked(4).thresholds == (0.25, 0.25, 0.25)
    assert ExitRule((0.25,)).checked(2).thresholds == (0.25,)
    assert ExitRule(-1).checked(1).thresholds == ()


@given(LOGITS)
def test_statistics_are_finite_and_in_range(logits: np.ndarray) -> None:
    classes = logits.shape[-1]
    entropy, most, margin = (statistic_of(name, logits) for name in STATISTICS)
    assert (entropy >= 0).all() and (entropy <= math.log(classes) + 1e-9).all()
    assert (most >= 1 / classes - 1e-9).all() and (most <= 1 + 1e-9).all()
    assert (margin >= 0).all() and (margin <= most).all()


def test_entropy_at_its_ends() -> None:
    found = statistic_of("entropy", np.array([[3.0, 3.0, 3.0], [1e4, 0.0, 0.0]], np.float32))
    assert found == pytest.approx([math.log(3), 0.0])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_minus_one_never_and_nan_never(statistic: str) -> None:
    values = np.array([0.0, 0.5, 1.0, math.nan])
    assert not is_sure(statistic, values, -1.0).any()
    assert not is_sure(statistic, values, 0.7)[3]


def test_the_comparison_is_strict_and_has_a_direction() -> None:
    values = np.array([0.3, 0.5, 0.7])
    assert is_sure("entropy", values, 0.5).tolist() == [True, False, False]
    assert is_sure("max_probability", values, 0.5).tolist() == [False, False, True]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_threshold_between_neighbours_in_fp32_parts_them(statistic: str) -> None:
    """Calibration puts thresholds there; rounded to fp32, this one would be the larger neighbour."""
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1.0))
    values = np.array([low, high])
    for threshold in (float(low) + (float(high) - float(low)) * share for share in (0.25, 0.5, 0.75)):
        assert is_sure(statistic, values, threshold).tolist() == [statistic == "entropy", statistic != "entropy"]


def test_scaled_logits_are_judged_as_when_calibrated() -> None:
    random = np.random.default_rng(0)
    logits = (random.normal(size=(2000, 3)) * 30).astype(np.float32)
    rule = ExitRule(0.1, temperatures=(0.0512345,)).checked(2)
    expected = statistic_of("entropy", logits / np.asarray((0.0512345,))[None, :])
    assert np.array_equal(rule.judged(0, {"logits": logits}), expected)


def test_thresholds_may_be_any_sequence_of_any_numbers() -> None:
    expected = ExitRule((0.25, 0.5), temperatures=(2.0, 1.0))
    for made in (list, np.array, lambda values: np.array(values, np.float32)):
        assert ExitRule(made([0.25, 0.5]), temperatures=made([2, 1])) == expected
    assert ExitRule(np.float32(0.5)) == ExitRule(np.float64(0.5)) == ExitRule(0.5)
    assert ExitRule(np.int64(-1)) == ExitRule(-1)
    assert isinstance(ExitRule([0.25, 0.5]).thresholds, tuple)
    json.dumps(ExitRule(np.array([0.25, 0.5], np.float32)).document())


def test_batch_maximum_waits_for_the_least_sure_row() -> None:
    rule = ExitRule(0.5, mode=BATCH_MAXIMUM).checked(2)
    assert rule.leaves(0, {"entropy": np.array([0.1, 0.4])}).tolist() == [True, True]
    assert rule.leaves(0, {"entropy": np.array([0.1, 0.6])}).tolist() == [False, False]
    assert rule.leaves(0, {"entropy": np.array([0.1, math.nan])}).tolist() == [False, False]


def test_a_temperature_is_applied_before_judging() -> None:
    logits = np.array([[2.0, 0.0], [6.0, 0.0]])
    outputs = {"logits": logits, "entropy": statistic_of("entropy", logits)}
    assert ExitRule(0.5).checked(2).leaves(0, outputs).tolist() == [True, True]
    hot = ExitRule(0.5, temperatures=(3.0,)).checked(2)
    assert hot.leaves(0, outputs).tolist() == [False, True]
    assert hot.needs() == ("logits",) and ExitRule(0.5).needs() == ("entropy",)


@pytest.mark.parametrize(
    "rule",
    [ExitRule(0.5), ExitRule((0.1, -1.0), "margin", BATCH_MAXIMUM), ExitRule(0.2, temperatures=(1.5, 2.0))],
)
def test_rules_are_kept_as_json(rule: ExitRule) -> None:
    assert ExitRule.from_document(json.loads(json.dumps(rule.document()))) == rule


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"thresholds": 0.5, "more": 1}, {"thresholds": None}, {"thresholds": 1, "temperatures": 2}],
)
def test_documents_that_are_no_rule(document: object) -> None:
    with pytest.raises(InputError, match="^exit "):
        ExitRule.from_document(document)
