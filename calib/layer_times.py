"""How long a layer of either stack takes here, in PyTorch: what one of the encoder and one of the decoder cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from exporter.methods.assembly import Assembly, canonical
from exporter.methods.assembly_calibrated import LayerTimes
from exporter.methods.modular import ModularModel

ROUNDS = 5
MOST_TOKENS = 32  # written to be timed; of more, the time is taken to grow evenly


@torch.inference_mode()
def layer_times(model: ModularModel, read: int, written: int) -> LayerTimes:
    """For one text of ``read`` tokens and ``written`` ones after it: the whole model less one of fewer layers.

    What both have in common, embeddings, the head and the loop around them, is in neither. Timed in turn, medians.
    """
    base, facts = Assembly.base(model.facts), model.facts
    fewest = {
        name: canonical(stack.layers, stack.counts[0], stack.granularities)
        for name, stack in (("encoder", facts.encoder), ("decoder", facts.decoder))
    }
    whole = model.assemble(base)
    shallow = model.assemble(Assembly(base.encoder, fewest["decoder"]))
    low = model.assemble(Assembly(fewest["encoder"], base.decoder))
    ids = torch.randint(model.facts.vocabulary, (1, read), generator=torch.Generator().manual_seed(0))
    tokens = min(written, MOST_TOKENS)
    options: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    mask = torch.ones_like(ids)

    def reads(one: Any) -> Callable[[], object]:
        return lambda: one.get_encoder()(input_ids=ids, attention_mask=mask)

    def writes(one: Any) -> Callable[[], object]:
        return lambda: one.generate(input_ids=ids, attention_mask=mask, **options)

    encoder, low_ms, decoder, shallow_ms = _medians([reads(whole), reads(low), writes(whole), writes(shallow)])
    return LayerTimes.of_differences(
        _a_layer(encoder, low_ms, len(base.encoder), len(fewest["encoder"])),
        _a_layer(decoder, shallow_ms, len(base.decoder), len(fewest["decoder"])) * written / tokens,
        "in PyTorch",
    )


def _a_layer(all_ms: float, fewest_ms: float, layers: int, fewest: int) -> float:
    """Of a stack that no module makes shallower, its share of everything."""
    return (all_ms - fewest_ms) / (layers - fewest) if fewest < layers else all_ms / layers


def _medians(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each, timed in turn after one round that is not."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 1):
        for call, times in zip(calls, taken, strict=True):
            started = time.perf_counter()
            call()
            if number:
                times.append((time.perf_counter() - started) * 1000.0)
    return [statistics.median(times) for times in taken]
