"""Which modules a step draws."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from calib.modular.schedule import draw, generator_of, replacing_probability, walk
from exporter.methods.assembly import StackFacts, Tiling, canonical, require_tiling


def stack_of(layers: int, sizes: Tiling) -> StackFacts:
    return StackFacts(layers, sizes, layer_params=1, hidden=1, inner=1, feed_forward=1)


def test_the_probability_rises_to_one_over_the_first_fifth() -> None:
    assert replacing_probability(0.0) == 0.3 and replacing_probability(0.1) == pytest.approx(0.65)
    assert replacing_probability(0.2) == pytest.approx(1.0) and replacing_probability(1.0) == 1.0


@pytest.mark.parametrize("layers, sizes", [(12, (2, 3, 4, 6)), (24, (2, 3, 4, 6)), (6, (2, 3, 6)), (9, (3,)), (5, ())])
def test_every_draw_is_aligned(layers: int, sizes: tuple[int, ...]) -> None:
    drawn = [draw(stack_of(layers, sizes), 0.6, random.Random(seed)) for seed in range(200)]
    for tiling in drawn:
        require_tiling(tiling, layers, sizes, "drawn")
    assert {size for tiling in drawn for size in tiling} == {1, *sizes}  # none is left out


def test_no_module_at_zero_and_nothing_else_at_one() -> None:
    for seed in range(100):
        assert draw(stack_of(12, (2, 3, 4, 6)), 0.0, random.Random(seed)) == (1,) * 12
        assert min(walk(12, (2, 3, 4, 6), 1.0, random.Random(seed))) > 1


def test_canonical_tilings_are_drawn_and_those_of_few_tiles_more_often() -> None:
    stack = stack_of(12, (2, 3, 4, 6))
    drawn = Counter(draw(stack, 1.0, random.Random(seed)) for seed in range(2000))
    shorter = [canonical(12, tiles, stack.granularities) for tiles in stack.counts[:-1]]
    assert sum(drawn[tiling] for tiling in shorter) > 1400
    assert drawn[(6, 6)] > drawn[(3, 3, 3, 3)] > drawn[canonical(12, 11, stack.granularities)] > 0


def test_a_step_always_draws_the_same_and_stacks_draw_apart() -> None:
    def drawn(seed: int, stack: str) -> list[tuple[int, ...]]:
        return [draw(stack_of(12, (2, 3, 4, 6)), 0.7, generator_of(seed, step, stack)) for step in range(50)]

    assert drawn(1, "encoder") == drawn(1, "encoder")
    assert drawn(1, "encoder") != drawn(1, "decoder") and drawn(1, "encoder") != drawn(2, "encoder")
