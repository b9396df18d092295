"""How often modules stand in for the layers they replace, and which do: a tiling of each stack for every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from exporter.methods.assembly import StackFacts, Tiling, canonical

FIRST, RISING_SHARE = 0.3, 0.2
CANONICAL_SHARE = 0.75
Granularities = Sequence[int]


def replacing_probability(share: float, first: float = FIRST, rising: float = RISING_SHARE) -> float:
    """The probability of a module at each place when ``share`` of the training is done: from ``first``, straight to 1.

    It gets there at the share ``rising``.
    """
    return min(1.0, first + (1.0 - first) * share / rising)


def draw(stack: StackFacts, probability: float, generator: random.Random) -> Tiling:
    """The tiling of one stack for one step: a canonical one with 3/4 of ``probability``, otherwise a walk.

    The strategies choose canonical tilings, which a walk hardly ever comes upon; those of few tiles, where every module
    has most to make up for, are drawn more often: as one over the number of tiles.
    """
    shorter = _shorter(stack)
    if shorter and generator.random() < CANONICAL_SHARE * probability:
        (tiling,) = generator.choices(shorter, [1 / len(one) for one in shorter])
        return tiling
    return walk(stack.layers, stack.granularities, probability, generator)


@lru_cache
def _shorter(stack: StackFacts) -> list[Tiling]:
    """The canonical tilings with modules."""
    counts = [count for count in stack.counts if count < stack.layers]
    return [canonical(stack.layers, count, stack.granularities) for count in counts]


def walk(layers: int, granularities: Granularities, probability: float, generator: random.Random) -> Tiling:
    """A tiling of 0..layers-1: at each place a module, all that may start there alike, or else the layer itself."""
    tiles: list[int] = []
    start = 0
    while start < layers:
        fitting = [g for g in granularities if start % g == 0 and start + g <= layers]
        tiles.append(generator.choice(fitting) if fitting and generator.random() < probability else 1)
        start += tiles[-1]
    return tuple(tiles)


def generator_of(seed: int, step: int, stack: str) -> random.Random:
    """What a step draws from: the same in all processes, and in a run that goes on there."""
    return random.Random(f"{seed}/{step}/{stack}")
