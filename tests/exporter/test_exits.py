"""Where to cut a model with exits: against trying every set of exits."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.exits import choose_exits, faithful_threshold

THRESHOLD = 0.3


def mean_cost(entropy: np.ndarray, macs: list[float], exits: tuple[int, ...]) -> float:
    """What a row costs on average, one row and one layer after the other."""
    total = 0.0
    for row in entropy:
        for layer in range(1, len(macs) + 1):
            total += macs[layer - 1]
            if layer in exits and (row[layer - 1] < THRESHOLD or layer == exits[-1]):
                break
    return total / len(entropy)


def fewest(entropy: np.ndarray, macs: list[float], keep: float) -> int:
    depth = len(macs)
    everywhere = tuple(range(1, depth + 1))
    goal = keep * (sum(macs) - mean_cost(entropy, macs, everywhere))
    for count in range(1, depth + 1):
        for chosen in combinations(everywhere[:-1], count - 1):
            if sum(macs) - mean_cost(entropy, macs, (*chosen, depth)) >= goal * (1 - 1e-9) - 1e-12:
                return count
    raise AssertionError("all exits keep the whole saving")


@st.composite
def sure_from(draw: st.DrawFn) -> tuple[np.ndarray, list[float]]:
    """Rows that are sure from some layer on, or never; layers of different cost."""
    depth = draw(st.integers(1, 6))
    layers = draw(st.lists(st.integers(0, depth), min_size=1, max_size=12))
    macs = draw(st.lists(st.integers(1, 9), min_size=depth, max_size=depth))
    entropy = np.array([[0.6 if layer < first else 0.1 for layer in range(depth)] for first in layers])
    return entropy, [float(one) for one in macs]


@given(sure_from(), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_fewest_that_keep_the_saving(case: tuple[np.ndarray, list[float]], keep: float) -> None:
    entropy, macs = case
    chosen = choose_exits(entropy, THRESHOLD, macs, keep)
    depth = len(macs)
    assert list(chosen) == sorted(set(chosen)) and chosen[-1] == depth and chosen[0] >= 1
    everywhere = mean_cost(entropy, macs, tuple(range(1, depth + 1)))
    assert sum(macs) - mean_cost(entropy, macs, chosen) >= keep * (sum(macs) - everywhere) - 1e-9
    assert len(chosen) == fewest(entropy, macs, keep)


@given(st.integers(0, 10_000), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_rows_that_change_their_mind_keep_it_too(seed: int, depth: int) -> None:
    generator = np.random.default_rng(seed)
    entropy, macs = generator.random((20, depth)) * 0.7, [1.0] * depth
    chosen = choose_exits(entropy, THRESHOLD, macs)
    everywhere = mean_cost(entropy, macs, tuple(range(1, depth + 1)))
    assert sum(macs) - mean_cost(entropy, macs, chosen) >= 0.95 * (sum(macs) - everywhere) - 1e-9


def test_known_cases() -> None:
    half = np.array([[0.6, 0.1, 0.1, 0.1], [0.6, 0.6, 0.6, 0.6]])
    assert choose_exits(half, THRESHOLD, [1, 1, 1, 1]) == (2, 4)
    assert choose_exits(half, 0.0, [1, 1, 1, 1]) == (4,), "nobody is sure: one segment"
    everybody = np.zeros((3, 4))
    assert choose_exits(everybody, THRESHOLD, [1, 1, 1, 1]) == (1, 4)


def test_threshold() -> None:
    entropy = np.array([[0.1, 0.05], [0.3, 0.05], [0.5, 0.05], [0.6, 0.05]])
    agree = np.array([[1, 1], [0, 0], [0, 1], [1, 1]])
    # The third row would leave wrongly above 0.5.
    assert 0.49 < faithful_threshold(entropy, agree) <= 0.5
    assert faithful_threshold(entropy, agree, changed=0.25) == pytest.approx(0.6, rel=1e-3)
    wrong = np.array([[0, 1]])
    assert faithful_threshold(np.array([[0.0, 0.0]]), wrong) == 0.0


def test_a_threshold_of_unsure_rows_lets_no_nan_leave() -> None:
    entropy = np.array([[np.nan, 0.1, 0.1]])
    assert choose_exits(entropy, THRESHOLD, [1, 1, 1]) == (2, 3)
