"""The comparison that lets a graph into a bundle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from compexport.errors import ParityError
from exporter.parity import ROUNDING, Arrays, Tolerance, compare, compare_rounding, probe_feeds

FEEDS = probe_feeds(("input_ids", "attention_mask"), 2, 50, 16)


def _reference(feed: Arrays) -> list[np.ndarray]:
    return [feed["input_ids"].astype(np.float32), feed["attention_mask"].astype(np.float32)]


def test_equal_outputs_and_what_is_recorded() -> None:
    found = compare("r2", _reference, _reference, FEEDS, 1e-4)
    assert (found.max_abs, found.tolerance) == (0.0, 1e-4)
    assert found.shapes == [feed["input_ids"].shape for feed in FEEDS]


def test_the_largest_difference_is_recorded() -> None:
    def candidate(feed: Arrays) -> list[np.ndarray]:
        ids, mask = _reference(feed)
        return [ids, mask + (0.25 if ids.shape == FEEDS[1]["input_ids"].shape else 0.125)]

    assert compare("r2", _reference, candidate, FEEDS, 0.5).max_abs == 0.25


@pytest.mark.parametrize("value", [0.002, -0.002, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("which", [0, len(FEEDS) - 1])
def test_one_wrong_value_anywhere_is_a_mismatch(value: float, output: int, which: int) -> None:
    def candidate(feed: Arrays) -> list[np.ndarray]:
        outputs = _reference(feed)
        if feed is FEEDS[which]:
            outputs[output].flat[-1] += value
        return outputs

    batch, length = FEEDS[which]["input_ids"].shape
    with pytest.raises(ParityError, match=rf"^r2 at batch {batch}, length {length}: .*expected <= 0.001;"):
        compare("r2", _reference, candidate, FEEDS, 1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_same_wrong_value_on_both_sides_is_a_mismatch(value: float) -> None:
    def broken(feed: Arrays) -> list[np.ndarray]:
        return [np.full((1,), value, np.float32)]

    with np.errstate(invalid="ignore"), pytest.raises(ParityError, match="a value that is not finite"):
        compare("r2", broken, broken, FEEDS, 1e9)


def test_two_infinities_give_the_error_and_no_warning() -> None:
    def broken(feed: Arrays) -> list[np.ndarray]:
        return [np.full((1,), math.inf, np.float32)]

    with pytest.raises(ParityError):
        compare("r2", broken, broken, FEEDS, 1e9)


@pytest.mark.parametrize("cut", [lambda a: a[:, :-1], lambda a: a[..., None], lambda a: a[0]])
def test_another_shape_is_a_mismatch(cut: object) -> None:
    def candidate(feed: Arrays) -> list[np.ndarray]:
        return [cut(array) for array in _reference(feed)]  # type: ignore[operator]

    with pytest.raises(ParityError, match="output shape: got .*, expected"):
        compare("r2", _reference, candidate, FEEDS, math.inf)


def test_another_number_of_outputs_is_a_mismatch() -> None:
    with pytest.raises(ParityError):
        compare("r2", _reference, lambda feed: _reference(feed)[:1], FEEDS, 1e-4)


NAMES = ("input_ids", "attention_mask", "token_type_ids")


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_probe_shapes(ratio: int) -> None:
    """Batch 1 and 3; lengths 1, k-1, k, k+1, 3k+1, 128."""
    feeds = probe_feeds(NAMES, ratio, 100, 512)
    shapes = [feed["input_ids"].shape for feed in feeds]
    lengths = {1, ratio - 1, ratio, ratio + 1, 3 * ratio + 1, 128} - {0}
    assert sorted(shapes) == sorted((batch, length) for batch in (1, 3) for length in lengths)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("pad_id", [0, 1, 99])
def test_probe_values(ratio: int, pad_id: int) -> None:
    feeds = probe_feeds(NAMES, ratio, 100, 512, type_vocabulary=2, pad_id=pad_id)
    padded = []
    for feed in feeds:
        ids, mask, types = (feed[name] for name in NAMES)
        assert list(feed) == list(NAMES)
        assert {array.dtype for array in feed.values()} == {np.dtype(np.int64)}
        assert set(np.unique(mask)) <= {0, 1} and mask[:, 0].all()
        assert (np.diff(mask, axis=1) <= 0).all(), "padding is on the right"
        assert ((ids == pad_id) == (mask == 0)).all()
        assert ids.min() >= 0 and ids.max() < 100
        assert set(np.unique(types)) <= {0, 1}
        if not mask.all():
            padded.append(ids.shape)
    assert {batch for batch, _ in padded} == {3}
    assert len(padded) >= 2 and (3, 128) in padded
    assert any(feed["token_type_ids"].any() for feed in feeds)


def test_probe_keeps_to_the_models_limits() -> None:
    feeds = probe_feeds(("input_ids", "attention_mask"), 8, 100, 20)
    assert max(feed["input_ids"].shape[1] for feed in feeds) == 20
    assert all(set(feed) == {"input_ids", "attention_mask"} for feed in feeds)


# --- precisions below fp32

FP16 = ROUNDING["fp16"]


def _rounding(
    wanted: np.ndarray, found: np.ndarray, output: str = "logits", tolerance: Tolerance = FP16
) -> tuple[float, float | None]:
    made = compare_rounding("r2", [output], [[wanted]], [[found]], tolerance)
    return made.max_relative, made.same_choice


def test_rounding_is_relative_to_the_largest_magnitude_of_all_feeds() -> None:
    wanted = [[np.array([[1.0, 2.0]])], [np.array([[-50.0, 10.0]])]]
    found = [[np.array([[1.0, 2.5]])], [np.array([[-50.0, 10.25]])]]
    made = compare_rounding("r2", ["logits"], wanted, found, FP16)
    assert (made.max_relative, made.same_choice, made.tolerance) == (0.01, 1.0, 2e-2)
    with pytest.raises(ParityError, match=r"r2 .*: logits differs from fp32: got 0.025 of its largest.*<= 0.02;"):
        compare_rounding("r2", ["logits"], wanted[:1], [[np.array([[1.0, 2.05]])]], FP16)


def test_probabilities_and_nats_are_not_divided() -> None:
    wanted, found = np.array([0.01, 0.02]), np.array([0.02, 0.02])
    assert _rounding(wanted, found, "margin") == (pytest.approx(0.01), None)
    with pytest.raises(ParityError, match="hidden differs from fp32"):
        _rounding(wanted, found, "hidden")


def test_choices_count_unless_they_are_ties() -> None:
    """Of three rows one is a tie; of the two others one is chosen otherwise."""
    wanted = np.array([[100.0, 99.9, 0.0], [100.0, 99.0, 0.0], [100.0, 0.0, 0.0]])
    found = np.array([[99.9, 100.0, 0.0], [99.0, 99.5, 0.0], [100.0, 0.0, 0.0]])
    with pytest.raises(ParityError, match=r"chooses as fp32: got in 50.0% of 2 rows, expected at least 99%"):
        _rounding(wanted, found)
    assert _rounding(wanted, found, tolerance=replace(FP16, same_choice=0.5))[1] == 0.5
    assert _rounding(wanted[:1], found[:1])[1] is None
    assert _rounding(wanted[:1, :1], found[:1, :1])[1] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_a_precision(value: float) -> None:
    with pytest.raises(ParityError, match=r"a value that is not finite, .*build it with --precision fp32"):
        _rounding(np.array([[1.0, 2.0]]), np.array([[1.0, value]]))
