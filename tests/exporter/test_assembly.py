"""Tilings, their canonical choice and the strategies; no torch in any of it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compexport.errors import InputError
from exporter.methods.assembly import (
    STRATEGIES,
    Assembly,
    ModularFacts,
    StackFacts,
    Tiling,
    assembly_for_ratio,
    canonical,
    cost,
    size_first,
    spans,
    speed_first,
    usable_granularities,
)
from exporter.methods.assembly_calibrated import TileTables, calibrated, tiles_of, unbeaten


def stack_facts(layers: int, layer_params: int = 100) -> StackFacts:
    sizes = usable_granularities(layers)
    return StackFacts(layers, sizes, layer_params, hidden=8, inner=6, feed_forward=2 * 8 * 16)


def facts_of(encoder: int = 12, decoder: int = 12) -> ModularFacts:
    return ModularFacts(stack_facts(encoder, 100), stack_facts(decoder, 140), shared_params=1000, vocabulary=50)


def all_tilings(layers: int, sizes: Tiling, start: int = 0) -> list[Tiling]:
    if start == layers:
        return [()]
    fitting = [size for size in (1, *sizes) if start % size == 0 and start + size <= layers]
    return [(size, *rest) for size in fitting for rest in all_tilings(layers, sizes, start + size)]


FACTS = facts_of()
TWELVE = all_tilings(12, (2, 3, 4, 6))


def test_there_are_as_many_tilings_as_specified() -> None:
    assert len(TWELVE) == 292


def test_canonical_is_the_smallest_of_all_tilings_in_its_order() -> None:
    for layers in (6, 8, 9, 12):
        sizes = usable_granularities(layers)
        for count, group in itertools.groupby(sorted(all_tilings(layers, sizes), key=len), key=len):
            best = min(group, key=lambda t: (max(t), sum(size * size for size in t), t))
            assert canonical(layers, count, sizes) == best


def test_canonical_tilings_of_twelve_layers() -> None:
    assert canonical(12, 11, (2, 3, 4, 6)) == (*[1] * 10, 2)
    assert canonical(12, 6, (2, 3, 4, 6)) == (2,) * 6
    assert canonical(12, 5, (2, 3, 4, 6)) == (2, 2, 2, 3, 3)
    assert canonical(12, 2, (2, 3, 4, 6)) == (6, 6)


@pytest.mark.parametrize("layers", [6, 12, 24])
def test_a_stack_can_have_every_number_of_tiles_from_a_sixth_on(layers: int) -> None:
    stack = stack_facts(layers)
    assert stack.counts == tuple(range(layers // 6, layers + 1))
    for count in stack.counts:
        assert len(canonical(layers, count, stack.granularities)) == count


def test_no_tiling_of_that_many_tiles() -> None:
    with pytest.raises(InputError, match=r"tiles of a stack of 12 layers: got 1, expected one of 2, 3, .*12"):
        canonical(12, 1, (2, 3, 4, 6))


def test_granularities_are_the_divisors() -> None:
    assert usable_granularities(12) == (2, 3, 4, 6)
    assert usable_granularities(8) == (2, 4)
    assert usable_granularities(7) == ()
    assert usable_granularities(12, [6, 2, 2]) == (2, 6)
    with pytest.raises(InputError, match="granularities: got 1, expected whole numbers from 2 on"):
        usable_granularities(12, [1, 2])


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ((6,), (6, 6), "encoder: tiles: got sum 6, expected 12, the layers of the base"),
        ((6, 6), (6, 6, 1), "decoder: tiles: got sum 13, expected 12"),
        ((), (6, 6), "encoder: tiles: got sum 0"),
        ((1, 2, 3, 6), (6, 6), "encoder: tile of size 2: got start 1, expected a multiple of 2"),
        ((6, 6), (2, 4, 6), "decoder: tile of size 4: got start 2, expected a multiple of 4"),
        ((5, 5, 2), (6, 6), "encoder: tile: got size 5, expected one of 1, 2, 3, 4, 6"),
        ((12,), (6, 6), "encoder: tile: got size 12"),
        ((6, 6), (0, 6, 6), "decoder: tile: got size 0"),
    ],
)
def test_a_misfit_is_refused_with_the_reason(encoder: Tiling, decoder: Tiling, message: str) -> None:
    with pytest.raises(InputError, match=f"assembly: {message}"):
        Assembly(encoder, decoder).require_fit(FACTS)


def test_documents() -> None:
    assembly = Assembly((1, 1, 2, 2, 6), (6, 6))
    assert Assembly.from_document(assembly.document(), "x") == assembly
    assert str(assembly) == "e2x1+2x2+1x6-d2x6"
    assert ModularFacts.from_document(FACTS.document(), "x") == FACTS


@pytest.mark.parametrize("document", [None, {"encoder": [1]}, {"encoder": [1.5], "decoder": []}, {"encoder": 3}])
def test_a_damaged_document(document: Any) -> None:
    with pytest.raises(InputError, match="here: no assembly"):
        Assembly.from_document(document, "here")
    with pytest.raises(InputError, match="here: no facts"):
        ModularFacts.from_document(document, "here")


def test_spans() -> None:
    assert spans((1, 1, 2, 6)) == [(0, 1), (1, 1), (2, 2), (4, 6)]


# --- strategies


def test_size_first_takes_the_most_tiles_then_even_stacks_then_the_deeper_decoder() -> None:
    room = cost(FACTS, Assembly.base(FACTS)).params
    assert size_first(FACTS, room) == Assembly.base(FACTS)
    less = size_first(FACTS, room - 1)
    assert (len(less.encoder), len(less.decoder)) == (11, 12)
    # Room for 6 + 6 tiles, and so, with fewer of the larger decoder layers, for 10 + 3; 9 + 4 would be too much.
    most = size_first(FACTS, 1000 + 6 * 240)
    assert (len(most.encoder), len(most.decoder)) == (10, 3)


def test_speed_first_makes_the_decoder_shallow_before_it_touches_the_encoder() -> None:
    def steps(assembly: Assembly) -> float:
        return len(assembly.encoder) + 10 * len(assembly.decoder)

    assert speed_first(FACTS, steps, 132) == Assembly.base(FACTS)
    assert speed_first(FACTS, steps, 131) == Assembly((1,) * 12, (*[1] * 10, 2))
    assert speed_first(FACTS, steps, 32) == Assembly((1,) * 12, (6, 6))
    assert speed_first(FACTS, steps, 31) == Assembly((*[1] * 10, 2), (6, 6))


@settings(deadline=None, max_examples=60)
@given(
    encoder=st.sampled_from([2, 6, 7, 8, 12]),
    decoder=st.sampled_from([1, 6, 9, 12]),
    budgets=st.lists(st.integers(0, 5000), min_size=2, max_size=2),
    per_tile=st.tuples(st.integers(1, 50), st.integers(1, 300)),
)
def test_strategies_stay_within_budget_and_grow_with_it(
    encoder: int, decoder: int, budgets: list[int], per_tile: tuple[int, int]
) -> None:
    facts = facts_of(encoder, decoder)

    def latency(assembly: Assembly) -> float:
        return len(assembly.encoder) * per_tile[0] + len(assembly.decoder) * per_tile[1]

    choices = (
        (lambda budget: size_first(facts, budget), lambda assembly: cost(facts, assembly).params),
        (lambda budget: speed_first(facts, latency, budget), latency),
    )
    for choose, measure in choices:
        tiles = []
        for budget in sorted(budgets):
            try:
                chosen = choose(budget)
            except InputError:
                tiles.append(0)
                continue
            assert measure(chosen.require_fit(facts)) <= budget
            assert choose(budget) == chosen
            tiles.append(chosen.layers)
        assert tiles == sorted(tiles)


def test_nothing_fits() -> None:
    with pytest.raises(InputError, match="parameters of an assembly: got 1479, expected at least 1480"):
        size_first(FACTS, 1479)
    with pytest.raises(InputError, match="budget of an assembly: got 3, expected at least 4"):
        speed_first(FACTS, lambda assembly: assembly.layers, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ratio_is_layers_by_layers(strategy: Any) -> None:
    layers = [assembly_for_ratio(FACTS, ratio, strategy).layers for ratio in (1, 12 / 11, 1.5, 2, 3, 5, 6)]
    assert layers == [24, 22, 16, 12, 8, 4, 4]
    assert assembly_for_ratio(FACTS, 1, strategy) == Assembly.base(FACTS)
    assert assembly_for_ratio(FACTS, 1.0909, strategy).layers == 22, "a rounded ratio"
    with pytest.raises(InputError, match="ratio: got 6.1, expected at most 6 for this model"):
        assembly_for_ratio(FACTS, 6.1, strategy)
    with pytest.raises(InputError, match="ratio: got 0.5, expected a number of at least 1"):
        assembly_for_ratio(FACTS, 0.5, strategy)


def test_strategies_share_two_thirds_of_the_layers_in_their_own_ways() -> None:
    assert assembly_for_ratio(FACTS, 1.5) == Assembly((1,) * 12, (3,) * 4)
    assert assembly_for_ratio(FACTS, 1.5, "size-first") == Assembly((*[1] * 4, *[2] * 4), (*[1] * 4, *[2] * 4))


def test_an_unknown_strategy() -> None:
    with pytest.raises(InputError, match="strategy: got 'fast', expected size-first or speed-first"):
        assembly_for_ratio(FACTS, 2, "fast")  # type: ignore[arg-type]


# --- the calibrated choice


def random_tables(facts: ModularFacts, seed: int) -> TileTables:
    draw = random.Random(seed)
    stacks = (facts.encoder, facts.decoder)
    return TileTables(*({tile: draw.random() * tile[1] for tile in tiles_of(stack)} for stack in stacks))


def total(assembly: Assembly, tables: TileTables) -> float:
    return sum(tables.encoder[tile] for tile in spans(assembly.encoder)) + sum(
        tables.decoder[tile] for tile in spans(assembly.decoder)
    )


def test_calibrated_finds_what_trying_all_tilings_finds() -> None:
    facts = facts_of(6, 6)
    pairs = [Assembly(e, d) for e in all_tilings(6, (2, 3, 6)) for d in all_tilings(6, (2, 3, 6))]
    for seed in range(10):
        costs, losses = random_tables(facts, seed), random_tables(facts, 100 + seed)
        cheapest = min(total(pair, costs) for pair in pairs)
        for budget in (1.001 * cheapest, 1.2 * cheapest, 2 * cheapest):
            within = [pair for pair in pairs if total(pair, costs) <= budget]
            chosen = calibrated(facts, costs, losses, budget).require_fit(facts)
            assert total(chosen, costs) <= budget
            assert total(chosen, losses) == pytest.approx(min(total(pair, losses) for pair in within))


def test_a_larger_budget_never_loses_more() -> None:
    costs, losses = random_tables(FACTS, 1), random_tables(FACTS, 2)
    found = [total(calibrated(FACTS, costs, losses, budget), losses) for budget in (6, 7, 8, 10, 14, 40)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    assert calibrated(FACTS, costs, losses, 8) == calibrated(FACTS, costs, losses, 8)


def test_few_of_many_tilings_are_looked_at() -> None:
    facts = facts_of(24, 24)
    costs, losses = random_tables(facts, 3), random_tables(facts, 4)
    assert len(unbeaten(facts.encoder, costs.encoder, losses.encoder, "encoder")) < 1000
    # Layers lose nothing and all tiles cost the same: as many tiles as may be.
    same = TileTables(*(dict.fromkeys(table, 1.0) for table in (costs.encoder, costs.decoder)))
    squares = TileTables(*({tile: tile[1] ** 2 - 1.0 for tile in table} for table in (costs.encoder, costs.decoder)))
    assert calibrated(facts, same, squares, 24).layers == 24


def test_tables_must_be_whole() -> None:
    costs, losses = random_tables(FACTS, 1), random_tables(FACTS, 2)
    holed = TileTables({tile: x for tile, x in losses.encoder.items() if tile != (6, 3)}, losses.decoder)
    with pytest.raises(InputError, match="encoder: loss of the tile of size 3 at 6: got nothing"):
        calibrated(FACTS, costs, holed, 5)
    odd = TileTables(costs.encoder, {**costs.decoder, (0, 1): float("nan")})
    with pytest.raises(InputError, match="decoder: cost of the tile of size 1 at 0: got nan"):
        calibrated(FACTS, odd, losses, 5)
    with pytest.raises(InputError, match="budget of an assembly: got 0, expected at least"):
        calibrated(FACTS, costs, losses, 0)


# --- cost


def test_cost_counts_what_the_shapes_say() -> None:
    """H 8, heads together 6, FFN 16, 50 words; 3 encoder tokens, 4 in the cache."""
    found = cost(FACTS, Assembly((6, 6), (3, 3, 3, 3)))
    assert found.params == 1000 + 2 * 100 + 4 * 140
    attention, ffn = 4 * 8 * 6, 2 * 8 * 16
    assert found.encoder(3) == 2 * (3 * (attention + ffn) + 2 * 3 * 3 * 6)
    crossing = 2 * 8 * 6 + 2 * 3 * 6
    assert found.step(3, 4) == 4 * (attention + 2 * 5 * 6 + crossing + ffn) + 8 * 50
    assert found.first_step(3) - found.step(3, 0) == 4 * 2 * 3 * 8 * 6
    assert found.generation(3, 2) == found.encoder(3) + found.first_step(3) + found.step(3, 1)


def test_a_base_costs_its_layers() -> None:
    """T5-base: 7,077,888 and 9,437,184 parameters a layer without norms, 24.7 M embeddings (tied)."""
    encoder = StackFacts(12, (2, 3, 4, 6), 7_077_888 + 2 * 768, 768, 768, 2 * 768 * 3072)
    decoder = StackFacts(12, (2, 3, 4, 6), 9_437_184 + 3 * 768, 768, 768, 2 * 768 * 3072)
    facts = ModularFacts(encoder, decoder, 32128 * 768 + 2 * 768 + 2 * 32 * 12, 32128)
    assert cost(facts, Assembly.base(facts)).params == pytest.approx(222.9e6, rel=1e-3)
    assert cost(facts, Assembly((6, 6), (6, 6))).params == pytest.approx(57.7e6, rel=1e-3)
