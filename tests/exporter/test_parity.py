"""The comparison that lets a graph into a bundle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compexport.errors import ParityError
from exporter.parity import Arrays, compare, probe_feeds

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
