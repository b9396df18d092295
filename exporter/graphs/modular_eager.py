"""What a graph of tiles computes, by the modules that it is traced from: of weights that are not the base's own.

transformers' own code would scale and clamp half states in its way. Letters as in ``exporter.graphs.modular_trace``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engines.manifest import PAST
from exporter.graphs.modular_trace import (
    IDS,
    MASK,
    SOURCE_MASK,
    STATES,
    cache_names,
    closing,
    entering,
    tile_of,
)
from exporter.hosts.tiles import TILE_HOSTS
from exporter.methods.assembly import Stack, Tiling, spans
from exporter.methods.modular import ModularModel
from exporter.plans.modular import Part


def joined_outputs(modular: ModularModel, part: Part, tiling: Tiling, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of ``exporter.graphs.modular_join.joined``, in their order."""
    host = TILE_HOSTS[modular.base.config.model_type]
    tiles = [tile_of(modular.tile(_stack(part), start, size), part, host) for start, size in spans(tiling)]
    if part == "encoder":
        h, bias = entering(modular, part)(inputs[IDS], inputs[MASK])
        for tile in tiles:
            h = tile(h, bias)
        return [closing(modular, "encoder")(h)]
    pasts = [inputs[name] for name in cache_names(PAST, len(tiles))] if part == "cached" else []
    h, *biases = entering(modular, part)(inputs[IDS], inputs[SOURCE_MASK], *pasts[:1])
    present: list[Tensor] = []
    for index, tile in enumerate(tiles):
        given = pasts[4 * index : 4 * index + 4] if part == "cached" else [inputs[STATES]]
        h, *made = tile(h, *biases, *given)
        present += made
    return [closing(modular, "decoder")(h), *present]


def _stack(part: Part) -> Stack:
    return "encoder" if part == "encoder" else "decoder"
