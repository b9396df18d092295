"""What the modules of a modular model lose, one by one, for the calibrated choice of an assembly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exporter.methods.assembly import STACKS, Assembly, Stack
from exporter.methods.assembly_calibrated import TileTable, TileTables, tiles_of
from exporter.methods.modular import ModularModel


def tile_losses(model: ModularModel, loss: Callable[[Any], float]) -> TileTables:
    """By how much ``loss`` rises when one module alone takes the place of its span; layers lose nothing.

    ``loss`` is given a transformers model in eval mode and measures it on data, where less is better; it is called once
    for the base and once per module. A module that makes it fall counts as losing nothing: on few data that is noise.
    """
    base = Assembly.base(model.facts)
    least = loss(model.assemble(base))
    return TileTables(*(_stack_losses(model, base, name, loss, least) for name in STACKS))


def _stack_losses(
    model: ModularModel, base: Assembly, name: Stack, loss: Callable[[Any], float], least: float
) -> TileTable:
    stack = model.facts.stack(name)
    table = {}
    for start, size in tiles_of(stack):
        tiling = (*[1] * start, size, *[1] * (stack.layers - start - size))
        with_it = Assembly(tiling, base.decoder) if name == "encoder" else Assembly(base.encoder, tiling)
        table[start, size] = 0.0 if size == 1 else max(0.0, loss(model.assemble(with_it)) - least)
    return table
