"""What the modules of a modular model lose, one by one, for the calibrated choice of an assembly."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from calib.batches import batches_by_length
from calib.data import Examples
from calib.layer_times import layer_times
from calib.progress import Progress, silent
from calib.sequences import UNLABELLED, tokenise_pairs
from calib.writers import collate_pairs, label_error, next_tokens
from exporter.methods.assembly import STACKS, Assembly, Stack, layers_for_ratio
from exporter.methods.assembly_calibrated import LayerTimes, TileTable, TileTables, calibrated, tiles_of
from exporter.methods.modular import ModularModel

PAIRS, BATCH = 128, 32


Timed = Callable[[int, int], LayerTimes]


def assemblies_on(
    model: ModularModel,
    examples: Examples,
    ratios: Iterable[float],
    timed: Timed | None = None,
    progress: Progress = silent,
) -> dict[float, Assembly]:
    """For each ratio the assembly within so much of the layers' time whose modules lose least on these pairs of texts.

    At most 128 of them are read. What is lost is cross-entropy with the targets, the right tokens before given.
    ``timed``: what a layer of either stack costs for so many tokens read and written; by default
    ``calib.layer_times``. InputError for a ratio that the layers do not allow, and for examples without targets.
    """
    rows = tokenise_pairs(model.source, examples.sample(PAIRS, seed=0), model.source.max_length)
    read, written = (round(statistics.mean(len(row[name]) for row in rows)) for name in ("input_ids", "labels"))
    ratios = list(ratios)
    for ratio in ratios:
        layers_for_ratio(model.facts, ratio)
    times = (timed or partial(layer_times, model))(read, written)
    progress(
        f"to write {written} tokens after {read}, a decoder layer takes {times.decoder:.3g} times an encoder layer's"
        f" time, measured {times.origin}"
    )
    budgets = {ratio: times.budget(model.facts, ratio) for ratio in ratios}
    batches = batches_by_length(rows, BATCH, collate_pairs(model.source))
    total, done = 1 + sum(len(tiles_of(model.facts.stack(name))) - model.facts.stack(name).layers for name in STACKS), 0

    @torch.inference_mode()
    def loss(assembled: Any) -> float:
        nonlocal done
        progress("what each module loses", done, total)
        done += 1
        counts = [int((batch["labels"] != UNLABELLED).sum()) for batch in batches]
        errors = [float(label_error(next_tokens(assembled, **batch), batch["labels"])) for batch in batches]
        return sum(error * count for error, count in zip(errors, counts, strict=True)) / sum(counts)

    losses, costs = tile_losses(model, loss), times.costs(model.facts)
    return {ratio: calibrated(model.facts, costs, losses, budget) for ratio, budget in budgets.items()}


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
