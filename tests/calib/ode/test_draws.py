"""How many steps each batch of a training takes."""

from __future__ import annotations

from collections import Counter

import pytest

from calib.ode.draws import Draws, shared_out
from calib.ode.settings import OdeSettings
from compexport.errors import InputError


def test_every_number_of_the_range_is_drawn_and_goes_all_the_way() -> None:
    draws = Draws.of((12,), OdeSettings(form="auto", seed=3))
    drawn = [draws.at(step) for step in range(700)]
    counts = Counter(one.n for one in drawn)
    assert set(counts) == set(range(6, 13)) and min(counts.values()) > 60
    assert {one.form for one in drawn} == {"block", "sublayer"}
    assert all(one.total == pytest.approx(12) for one in drawn)


def test_a_draw_follows_from_seed_and_step_alone() -> None:
    draws, again, other = (Draws.of((12,), OdeSettings(seed=seed)) for seed in (5, 5, 6))
    numbers = [[one.at(step).n for step in range(50)] for one in (draws, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert draws.at(40) == again.at(40)


def test_plain_training_takes_all_iterations() -> None:
    draws = Draws.of((3, 2), OdeSettings(plain=True))
    assert all(draws.at(step).is_full for step in range(20))


def test_steps_are_shared_out_in_proportion() -> None:
    assert shared_out(7, (6, 6)) == [4, 3] and shared_out(6, (6, 6)) == [3, 3]
    assert shared_out(2, (10, 2)) == [1, 1] and shared_out(6, (10, 2)) == [5, 1]
    for n in range(3, 13):
        counts = shared_out(n, (7, 1, 4))
        assert sum(counts) == n and all(1 <= one <= most for one, most in zip(counts, (7, 1, 4), strict=True))


@pytest.mark.parametrize("lowest", [1, 13])
def test_a_range_that_the_model_does_not_have(lowest: int) -> None:
    with pytest.raises(InputError, match=f"fewest steps: got {lowest}, expected 2 to 12"):
        Draws.of((6, 6), OdeSettings(lowest=lowest))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OdeSettings(form="euler"), "form: got euler, expected one of block, sublayer, auto"),  # type: ignore[arg-type]
        (OdeSettings(objective="nsp"), "objective: got nsp"),  # type: ignore[arg-type]
        (OdeSettings(distance_weight=-1.0), "distance_weight: got -1.0, expected 0 or more"),
        (OdeSettings(plain=True, lowest=3), "--plain with --fewest-steps"),
        (OdeSettings(iterations=4), "--iterations: got 4, expected --share beside it"),
        (OdeSettings(share=1, from_scratch=True), "--share with --from-scratch"),
        (OdeSettings(lowest=0), "lowest: got 0, expected more than 0"),
    ],
)
def test_settings_that_cannot_be_meant(settings: OdeSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings.checked()
