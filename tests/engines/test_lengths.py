"""Lengths of outputs: groups of sources, quantiles of the longest of a batch, what is cut, what cannot be read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from compexport.errors import BundleError
from engines.lengths import GROUPS, SMALLEST_GROUP, Expected, Group, OutputLengths

MOST = 1000


def uniform(source: int, shortest: int, longest: int, cut: int = 0) -> Group:
    return Group(float(source), source, dict.fromkeys(range(shortest, longest + 1), 1), cut)


def test_quantiles_are_those_of_the_outputs() -> None:
    lengths = OutputLengths([uniform(10, 1, 100)])
    assert lengths.expected(1, 10, MOST) == Expected(50, 99)
    assert lengths.expected(1, 3, MOST) == Expected(50, 99), "shorter than any: not longer than those"
    assert lengths.expected(1, 10, 60) == Expected(50, 60)
    assert lengths.expected(1, 20, MOST) == Expected(100, 198, extrapolated=True)


def test_a_batch_takes_as_long_as_its_longest() -> None:
    """Drawn, not derived: how long the longest of eight is."""
    random = np.random.default_rng(0)
    written = random.geometric(0.2, 4000)
    lengths = OutputLengths.measured([7] * 4000, written.tolist(), [False] * 4000)
    longest = random.choice(written, (20_000, 8)).max(axis=1)
    found = lengths.expected(8, 7, MOST)
    assert abs(found.p50 - np.quantile(longest, 0.5)) <= 1
    assert abs(found.p99 - np.quantile(longest, 0.99)) <= 2
    assert lengths.expected(1, 7, MOST).p50 < found.p50


def test_lengths_between_groups_are_interpolated() -> None:
    lengths = OutputLengths([uniform(10, 5, 5), uniform(20, 15, 15)])
    assert [lengths.expected(1, source, MOST).p50 for source in (10, 15, 17, 20)] == [5, 10, 12, 15]


def test_what_was_cut_may_have_any_length() -> None:
    lengths = OutputLengths([uniform(10, 1, 90, cut=10)])
    assert lengths.expected(1, 10, MOST) == Expected(50, MOST)
    assert lengths.expected(1, 10, 95) == Expected(50, 95)


@pytest.mark.parametrize("count", [5, SMALLEST_GROUP, 200, 1000])
def test_groups_are_of_similar_sources_and_enough_of_them(count: int) -> None:
    sources = np.random.default_rng(1).integers(3, 40, count).tolist()
    written = [2 * source for source in sources]
    cut = [source > 36 for source in sources]
    lengths = OutputLengths.measured(sources, written, cut)
    assert 1 <= len(lengths.groups) <= GROUPS
    sizes = [group.cut + sum(group.counts.values()) for group in lengths.groups]
    assert sum(sizes) == count and min(sizes) >= min(count, SMALLEST_GROUP)
    assert lengths.groups[-1].longest == max(sources)
    bounds = [(min(group.counts, default=0), max(group.counts, default=0)) for group in lengths.groups]
    assert all(left[1] < right[0] for left, right in pairwise(bounds)), "no length in two groups"
    read = OutputLengths.from_table({"output_tokens": {"groups": lengths.table()}})
    assert read is not None and read.groups == lengths.groups


def test_nothing_measured() -> None:
    assert OutputLengths.from_table(None) is None and OutputLengths.from_table({"metric": "bleu"}) is None
    assert Expected.at_most(7) == Expected(7, 7, measured=False)


GOOD = {"source": 3.5, "longest_source": 4, "tokens": [2, 5], "counts": [1, 1], "cut": 0}


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ([], r"output_tokens: got \[\]"),
        ({"groups": []}, "groups of rising source length"),
        ({"groups": [GOOD, GOOD]}, "groups of rising source length"),
        ({"groups": [3]}, "group 0: got 3, expected an object"),
        ({"groups": [GOOD, {**GOOD, "source": None}]}, "group 1: sources: got None up to 4"),
        ({"groups": [{**GOOD, "longest_source": 3}]}, "sources: got 3.5 up to 3"),
        ({"groups": [{**GOOD, "counts": [1]}]}, "group 0: counts"),
        ({"groups": [{**GOOD, "counts": [1, 0]}]}, "group 0: counts"),
        ({"groups": [{**GOOD, "tokens": [2, 2]}]}, "group 0: tokens"),
        ({"groups": [{**GOOD, "cut": -1}]}, "group 0: counts"),
        ({"groups": [{**GOOD, "tokens": [], "counts": []}]}, "group 0: tokens"),
    ],
)
def test_a_damaged_table_is_said(section: Any, match: str) -> None:
    with pytest.raises(BundleError, match=match):
        OutputLengths.from_table({"output_tokens": section})
