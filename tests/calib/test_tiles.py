"""Losses of single modules, and the assembly chosen by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.data import Examples
from calib.layer_times import layer_times
from calib.tiles import assemblies_on, tile_losses
from compexport.errors import InputError
from exporter.backbone import load_seq2seq
from exporter.methods.assembly import Assembly
from exporter.methods.assembly_calibrated import LayerTimes, calibrated, even_costs
from exporter.methods.modular import ModularModel


def test_modules_that_lose_nothing_are_found_and_taken(tiny: Callable[..., Path]) -> None:
    """In a base whose spans of 3 are a layer and two identities, copies of first layers stand for them exactly."""
    base = load_seq2seq(tiny("tiny-t5-twelve", "text2text-generation"))
    for layers in (base.model.encoder.block, base.model.decoder.block):
        for index, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                if index % 3 and name.endswith((".o.weight", ".wo.weight")):
                    parameter.zero_()
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = base.model(input_ids=ids, decoder_input_ids=ids).logits

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float((model(input_ids=ids, decoder_input_ids=ids).logits - wanted).square().mean())

    model = ModularModel(base)
    losses = tile_losses(model, loss)
    for table in (losses.encoder, losses.decoder):
        # Of two layers, those that are identities but for the first of them, and those that are nothing else.
        twos = {(0, 2), (4, 2), (6, 2), (10, 2)}
        assert {tile for tile, value in table.items() if value == 0 and tile[1] > 1} == twos | {
            (start, 3) for start in range(0, 12, 3)
        }
        assert len(table) == 12 + 15
    costs = even_costs(model.facts, encoder=1, decoder=2)
    assert calibrated(model.facts, costs, losses, budget=12) == Assembly((3,) * 4, (3,) * 4)
    shallower = calibrated(model.facts, costs, losses, budget=8)
    assert len(shallower.encoder) + 2 * len(shallower.decoder) <= 8
    assert loss(model.assemble(shallower)) > 0

    texts = ["one two", "three", "four five six"] * 3
    asked: list[tuple[int, int]] = []

    def timed(read: int, written: int) -> LayerTimes:
        asked.append((read, written))
        return LayerTimes(4.0, "by hand")

    chosen = assemblies_on(model, Examples(texts, targets=texts[::-1]), [2, 3], timed)
    for ratio, assembly in chosen.items():  # as few as lose nothing: these weights are random, and nothing is lost
        tiles = assembly.require_fit(model.facts)
        assert len(tiles.encoder) + 4 * len(tiles.decoder) <= (12 + 4 * 12) / ratio
    (lengths,) = asked
    assert all(1 < tokens < 40 for tokens in lengths), "tokens of these texts"
    with pytest.raises(InputError, match="ratio: got 7, expected at most 6"):
        assemblies_on(model, Examples(texts, targets=texts), [7])
    with pytest.raises(InputError, match="no target column"):
        assemblies_on(model, Examples(texts), [2])


def test_layers_are_timed_and_compared_coarsely(tiny: Callable[..., Path]) -> None:
    model = ModularModel(load_seq2seq(tiny("tiny-t5-twelve", "text2text-generation")))
    times = layer_times(model, read=4, written=3)
    assert times.origin == "in PyTorch" and 2.0**-10 <= times.decoder <= 2.0**10

    def quotient(encoder_ms: float, decoder_ms: float) -> float:
        return LayerTimes.of_differences(encoder_ms, decoder_ms, "here").decoder

    assert quotient(1.0, 8.5) == quotient(1.0, 7.5) == 8.0 < quotient(1.0, 11.0)
    assert quotient(1.0, -0.1) == 2.0**-10 and quotient(-0.1, 1.0) == 2.0**10


def test_a_ratio_is_of_the_time_of_layers(tiny: Callable[..., Path]) -> None:
    facts = ModularModel(load_seq2seq(tiny("tiny-t5-twelve", "text2text-generation"))).facts
    assert LayerTimes(4.0, "here").budget(facts, 2) == pytest.approx((12 + 48) / 2)
    assert LayerTimes(4.0, "here").budget(facts, 6) == pytest.approx(10)
    with pytest.raises(InputError, match="ratio: got 7, expected at most 6 for this model, by the time of its layers"):
        LayerTimes(4.0, "here").budget(facts, 7)
