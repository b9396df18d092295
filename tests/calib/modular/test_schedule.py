"""Which modules a step draws."""

from __future__ import annotations

import random

import pytest

from calib.modular.schedule import draw, generator_of, replacing_probability
from exporter.methods.assembly import require_tiling


def test_the_probability_rises_to_one_over_the_first_half() -> None:
    assert replacing_probability(0.0) == 0.3 and replacing_probability(0.25) == pytest.approx(0.65)
    assert replacing_probability(0.5) == replacing_probability(1.0) == 1.0


@pytest.mark.parametrize("layers, sizes", [(12, (2, 3, 4, 6)), (24, (2, 3, 4, 6)), (6, (2, 3, 6)), (9, (3,)), (5, ())])
def test_every_draw_is_aligned(layers: int, sizes: tuple[int, ...]) -> None:
    drawn = [draw(layers, sizes, 0.6, random.Random(seed)) for seed in range(200)]
    for tiling in drawn:
        require_tiling(tiling, layers, sizes, "drawn")
    assert {size for tiling in drawn for size in tiling} == {1, *sizes}  # none is left out


def test_no_module_at_zero_and_nothing_else_at_one() -> None:
    for seed in range(100):
        assert draw(12, (2, 3, 4, 6), 0.0, random.Random(seed)) == (1,) * 12
        assert min(draw(12, (2, 3, 4, 6), 1.0, random.Random(seed))) > 1


def test_a_step_always_draws_the_same_and_stacks_draw_apart() -> None:
    def drawn(seed: int, stack: str) -> list[tuple[int, ...]]:
        return [draw(12, (2, 3, 4, 6), 0.7, generator_of(seed, step, stack)) for step in range(50)]

    assert drawn(1, "encoder") == drawn(1, "encoder")
    assert drawn(1, "encoder") != drawn(1, "decoder") and drawn(1, "encoder") != drawn(2, "encoder")
