"""How long writing takes by a profile: first tokens, steps between those measured, lengths, beams, single steps."""

from __future__ import annotations

import math

import pytest

from engines.lengths import Expected
from engines.points import (
    encoder_name,
    first_token_name,
    is_part,
    is_segment,
    is_token,
    token_name,
    variant_of,
    written_before,
)
from engines.profile import Profile
from engines.writing_time import WritingTimes

BOTH, ON = "modular-r1-fp32", "ode-r1-fp32"
SIZES = [(batch, length) for batch in (1, 4) for length in (8, 32)]


def profile(early_ms: float = 1.0, late_ms: float = 3.0, spread_ms: float = 0.0) -> Profile:
    """10 ms to the first token; a step takes ``early_ms`` after 1 token, ``late_ms`` after 65, four times as many rows
    twice that."""

    def cells(ms: float) -> dict[tuple[int, int], tuple[float, float]]:
        return {(b, s): (ms * (2 if b == 4 else 1), ms * (2 if b == 4 else 1) + spread_ms) for b, s in SIZES}

    first = dict.fromkeys(SIZES, (10.0, 10.0))
    return Profile(
        {
            BOTH: first,
            encoder_name(BOTH): first,
            first_token_name(BOTH): first,
            token_name(BOTH, 1): cells(early_ms),
            token_name(BOTH, 65): cells(late_ms),
            "modular-r2-fp32": first,  # of which no token was timed
        }
    )


def test_names_of_parts() -> None:
    assert token_name(BOTH, 65) == f"{BOTH}/token-65" and written_before(token_name(BOTH, 65)) == 65
    assert written_before(token_name(ON)) is None and is_token(token_name(ON)) and is_token(token_name(BOTH, 1))
    for name in (encoder_name(BOTH), first_token_name(BOTH)):
        assert is_part(name) and not is_token(name) and not is_segment(name) and variant_of(name) == BOTH


def test_a_step_lies_on_the_line_through_those_measured() -> None:
    times = WritingTimes(profile())
    assert [times.token(BOTH, 1, 8, written).p50_ms for written in (1, 33, 65, 129)] == [1.0, 2.0, 3.0, 5.0]
    assert [times.token(BOTH, 1, 8, written).extrapolated for written in (65, 66)] == [False, True]
    assert times.token(BOTH, 1, 64, 1).extrapolated, "longer than any text that was read"
    assert WritingTimes(profile(3.0, 1.0)).token(BOTH, 1, 8, 65).p50_ms == 3.0, "noise is no gain"


def test_writing_is_the_first_token_and_steps_at_the_expected_length() -> None:
    found = WritingTimes(profile()).writing([(1, 8)], [Expected(2, 66)])
    assert set(found) == {BOTH}, "no token was timed of the other"
    assert found[BOTH].p50_ms == pytest.approx(10 + 1), "one step, after one token"
    assert found[BOTH].p99_ms == pytest.approx(10 + 65 * 2), "65 steps, on average after 33 tokens"
    assert not found[BOTH].extrapolated
    assert WritingTimes(profile()).writing([(1, 8)], [Expected(2, 300)])[BOTH].extrapolated
    one = WritingTimes(profile()).writing([(1, 8)], [Expected(1, 1)])[BOTH]
    assert (one.p50_ms, one.p99_ms) == (10.0, 10.0)


def test_beams_are_rows_and_chunks_come_after_each_other() -> None:
    times = WritingTimes(profile(1.0, 1.0))
    assert times.writing([(1, 8)], [Expected(11, 11)], beams=4)[BOTH].p99_ms == pytest.approx(10 + 10 * 2)
    chunks = times.writing([(1, 8), (4, 32)], [Expected(11, 11), Expected(3, 3)])
    assert chunks[BOTH].p99_ms == pytest.approx(10 + 10 + 10 + 2 * 2)


def test_spreads_of_steps_add_up_by_their_squares() -> None:
    found = WritingTimes(profile(1.0, 1.0, spread_ms=6.0)).writing([(1, 8)], [Expected(17, 17)])[BOTH]
    assert found.p50_ms == pytest.approx(10 + 16)
    assert found.p99_ms == pytest.approx(10 + 16 + math.sqrt(16) * 6)


def test_single_steps_are_asked_for_quickly() -> None:
    times = WritingTimes(profile())
    step_ms = times.step_ms(BOTH, 8, factor=2.0)
    for rows in (1, 4, 3):
        for written in (1, 7, 40):
            assert step_ms(rows, written) == pytest.approx(2.0 * times.token(BOTH, rows, 8, written).p99_ms)
    assert WritingTimes(profile(1.0, 1.0, spread_ms=6.0)).step_ms(BOTH, 8, factor=2.0)(1, 1) == pytest.approx(2 + 6)
    sizes = {(b, s): (float(s), float(s)) for b, s in SIZES}
    on = WritingTimes(Profile({ON: sizes, token_name(ON): sizes}))
    assert on.step_ms(ON, 8, 1.0)(1, 8 + 5) == pytest.approx(13.0), "what was read is kept as well"
