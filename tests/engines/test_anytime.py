"""What a request keeps for later: chunks still to come, and what follows the engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.anytime import Aftercare, Margin, OwnPace, chunk_end_s


def test_one_chunk_has_all_the_time() -> None:
    assert chunk_end_s(10.0, 12.0, [(100.0, 400.0)]) == 12.0


def test_time_is_shared_by_what_whole_runs_take() -> None:
    assert chunk_end_s(10.0, 12.0, [(100.0, 300.0), (100.0, 900.0)]) == pytest.approx(10.5)


def test_later_chunks_keep_their_first_segments() -> None:
    """By its share the first would have until 11.8; the second needs half a second for an answer at all."""
    assert chunk_end_s(10.0, 12.0, [(100.0, 900.0), (500.0, 100.0)]) == pytest.approx(11.5)


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0, 200)), min_size=1, max_size=6), st.floats(0.0, 5.0))
def test_time_is_given_to_chunks_so_that_all_are_answered(pairs: list[tuple[float, float]], left_s: float) -> None:
    """Chunk after chunk, each over when it was told to be, or after its first segment, which always runs."""
    chunks = [(first, first + more) for first, more in pairs]
    first_s, whole_s = (sum(column) / 1000.0 for column in zip(*chunks, strict=True))
    now_s, end_s = 3.0, 3.0 + left_s
    for number, (first, whole) in enumerate(chunks):
        until_s = chunk_end_s(now_s, end_s, chunks[number:])
        assert until_s <= end_s
        if left_s >= whole_s:
            assert until_s - now_s >= whole / 1000.0 - 1e-9, "with time for all of everything, nothing is cut"
        now_s = max(until_s, now_s + first / 1000.0)
    if left_s >= first_s:
        assert now_s <= end_s + 1e-9, "no chunk takes the time that a later one's first segment needs"
    assert until_s == pytest.approx(end_s), "the last has all that is left"


def test_the_reserve_follows_what_was_seen_lately() -> None:
    aftercare = Aftercare()
    unseen = aftercare.reserve_ms(10)
    assert unseen == pytest.approx(Aftercare.FIXED_MS + 10 * Aftercare.UNSEEN_MS)
    aftercare.observe(10, Aftercare.FIXED_MS + 30.0)
    aftercare.observe(10, Aftercare.FIXED_MS + 10.0)
    assert aftercare.reserve_ms(2) == pytest.approx(Aftercare.FIXED_MS + 6.0)
    for _ in range(Aftercare.REMEMBERED):
        aftercare.observe(10, 0.0)
    assert aftercare.reserve_ms(2) == pytest.approx(Aftercare.FIXED_MS)


def test_one_interruption_is_not_kept_for_every_request() -> None:
    aftercare = Aftercare()
    for number in range(Aftercare.REMEMBERED):
        aftercare.observe(1, Aftercare.FIXED_MS + (500.0 if number == 64 else 2.0))
    assert aftercare.reserve_ms(1) == pytest.approx(Aftercare.FIXED_MS + 2.0)


@pytest.mark.parametrize("jitter", [0.02, 0.1])
def test_the_margin_makes_few_late_whatever_the_jitter(jitter: float) -> None:
    """Runs that end at their deadline but for a random delay: late, without a margin, every other time."""
    random, margin = np.random.default_rng(0), Margin()
    late = []
    for delay in random.normal(0.0, jitter, 20_000):
        late.append(delay > margin.share)
        margin.observe(late[-1])
    assert np.mean(late[2000:]) == pytest.approx(Margin.LATE, abs=0.002)


def test_the_margin_has_two_ends() -> None:
    margin = Margin()
    margin.observe(late=False)
    assert margin.share == 0.0
    for _ in range(100):
        margin.observe(late=True)
    assert margin.share == Margin.WIDEST
    for _ in range(10_000):
        margin.observe(late=False)
    assert margin.lasting == 0.0 and margin.share == pytest.approx(0.0)


def test_a_burst_is_soon_over() -> None:
    """Interference with twenty requests in 5,000: soon afterwards the margin is that of the calm."""
    random, margin = np.random.default_rng(0), Margin()
    late, shares = [], []
    for number, delay in enumerate(random.exponential(0.01, 40_000)):
        shares.append(margin.share)
        late.append(delay + (0.6 if number % 5000 < 20 else 0.0) > margin.share)
        margin.observe(late[-1])
    by_place = np.array(shares).reshape(-1, 5000)[2:]
    assert by_place[:, 20].mean() > 0.4, "a burst is answered at once"
    assert by_place[:, 400:].mean() < 0.15 < by_place[:, 40].mean()
    calm = np.array(late).reshape(-1, 5000)[2:, 20:]
    assert calm.mean() < Margin.LATE


def test_a_generation_goes_by_its_slowest_step_of_late() -> None:
    times = iter([0.0, 2.0, 3.0, *(3.0 + 0.5 * step for step in range(1, 9))])
    pace = OwnPace(lambda: next(times))
    assert [pace(1, 4), pace(1, 5), pace(1, 6)] == [0.0, 2000.0, 2000.0], "of the first step nothing is known"
    later = [pace(1, 7 + step) for step in range(8)]
    assert later[5:] == [2000.0, 1000.0, 500.0], "what is eight steps ago is forgotten"
