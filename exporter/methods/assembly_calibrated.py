"""The assembly of the smallest measured loss within a measured cost. Needs no torch.

Every tile has a cost and a loss of its own, and those of an assembly are their sums; that the losses of tiles add up is
an assumption. All aligned tilings are considered (85,264 for a stack of 24 layers) and few are looked at: of the ways
to cover a stack up to some layer, only those matter that no other way beats in both.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from compexport.errors import InputError, describe
from exporter.methods.assembly import STACKS, Assembly, ModularFacts, Stack, StackFacts, Tiling

TileTable = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class TileTables:
    """Per stack, (start, size) of every tile that there may be -> a number."""

    encoder: TileTable
    decoder: TileTable

    def stack(self, name: Stack) -> TileTable:
        return self.encoder if name == "encoder" else self.decoder


def even_costs(facts: ModularFacts, encoder: float, decoder: float) -> TileTables:
    """Costs where all tiles of a stack cost the same, as they do but for noise: what one of either stack costs."""
    tiles = ((tiles_of(facts.encoder), encoder), (tiles_of(facts.decoder), decoder))
    return TileTables(*(dict.fromkeys(each, cost) for each, cost in tiles))


@dataclass(frozen=True)
class LayerTimes:
    """What one layer of either stack costs in time, for a text of usual length: the decoder's, all its tokens.

    Only what a layer of the decoder is to one of the encoder counts. ``origin``: how it was measured.
    """

    decoder: float
    origin: str
    encoder: float = 1.0

    @classmethod
    def of_differences(cls, encoder_ms: float, decoder_ms: float, origin: str) -> LayerTimes:
        """From measured times, to the next half power of two, so that noise seldom makes another choice.

        A difference that noise made negative counts as little.
        """
        quotient = max(decoder_ms, 1e-6) / max(encoder_ms, 1e-6)
        halves = round(2.0 * math.log2(min(max(quotient, 2.0**-10), 2.0**10)))
        return cls(2.0 ** (halves / 2.0), origin)

    def costs(self, facts: ModularFacts) -> TileTables:
        return even_costs(facts, self.encoder, self.decoder)

    def budget(self, facts: ModularFacts, ratio: float) -> float:
        """1/``ratio`` of what all layers of the base cost; InputError where the fewest layers cost more."""
        stacks = ((facts.encoder, self.encoder), (facts.decoder, self.decoder))
        whole, least = (
            sum(count(stack) * cost for stack, cost in stacks)
            for count in (lambda stack: stack.layers, lambda stack: stack.counts[0])
        )
        if not (math.isfinite(ratio) and ratio >= 1):
            raise InputError(describe("ratio", got=ratio, expected="a number of at least 1"))
        budget = whole / ratio * (1 + 1e-6)  # a ratio may have been rounded to a few digits on its way here
        if budget < least:
            most = f"at most {whole / least:.3g} for this model, by the time of its layers"
            raise InputError(describe("ratio", got=f"{ratio:g}", expected=most))
        return budget


class Cover(NamedTuple):
    """Tiles in order, what they cost and what they lose."""

    cost: float
    loss: float
    tiling: Tiling


def tiles_of(stack: StackFacts) -> list[tuple[int, int]]:
    """(start, size) of every tile that a stack may have: what the tables must hold."""
    sizes = (1, *stack.granularities)
    return [(start, size) for size in sizes for start in range(0, stack.layers, size)]


def calibrated(facts: ModularFacts, cost: TileTables, loss: TileTables, budget: float) -> Assembly:
    """The assembly of the smallest loss whose cost is within ``budget``; of equals, the cheapest.

    A larger budget never yields a larger loss. InputError if nothing fits, and for a table that lacks a tile or holds
    anything but numbers from 0 on.
    """
    encoders, decoders = (unbeaten(facts.stack(name), cost.stack(name), loss.stack(name), name) for name in STACKS)
    if encoders[0].cost + decoders[0].cost > budget:
        least = f"at least {encoders[0].cost + decoders[0].cost:g}"
        raise InputError(describe("budget of an assembly", got=f"{budget:g}", expected=least))
    best: tuple[float, float, Assembly] | None = None
    for encoder in encoders:
        # Sums, not the difference to the budget: a difference rounds otherwise.
        within = bisect_right(decoders, budget, key=lambda cover, e=encoder: e.cost + cover.cost)  # type: ignore[misc]
        if within:
            decoder = decoders[within - 1]
            assembly = Assembly(encoder.tiling, decoder.tiling)
            found = (encoder.loss + decoder.loss, encoder.cost + decoder.cost, assembly)
            best = found if best is None or found[:2] < best[:2] else best
    assert best is not None
    return best[2]


def unbeaten(stack: StackFacts, cost: TileTable, loss: TileTable, origin: str) -> list[Cover]:
    """The ways to cover a stack that no other way beats in both, ascending by cost and so descending by loss."""
    for name, table in (("cost", cost), ("loss", loss)):
        _require_table(table, stack, f"{origin}: {name}")
    reached: list[list[Cover]] = [[] for _ in range(stack.layers + 1)]
    reached[0] = [Cover(0.0, 0.0, ())]
    for start in range(stack.layers):
        reached[start] = _pruned(reached[start])
        for size in (1, *stack.granularities):
            if start % size == 0 and start + size <= stack.layers:
                tile = (start, size)
                reached[start + size] += [
                    Cover(before.cost + cost[tile], before.loss + loss[tile], (*before.tiling, size))
                    for before in reached[start]
                ]
    return _pruned(reached[stack.layers])


def _pruned(covers: list[Cover]) -> list[Cover]:
    kept: list[Cover] = []
    for cover in sorted(covers):
        if not kept or cover.loss < kept[-1].loss:
            kept.append(cover)
    return kept


def _require_table(table: TileTable, stack: StackFacts, origin: str) -> None:
    for start, size in tiles_of(stack):
        value = table.get((start, size))
        if value is None or not (math.isfinite(value) and value >= 0):
            got = "nothing" if value is None else value
            what = f"{origin} of the tile of size {size} at {start}"
            raise InputError(describe(what, got=got, expected="a number from 0 on"))
