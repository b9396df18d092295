"""What decoders are checked with: random texts, padded and not, and a past that PyTorch made."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engines.manifest import PAST
from exporter import parity
from exporter.graphs.modular_trace import IDS, SOURCE_MASK, STATES, cache_names
from exporter.methods.modular import ModularModel
from exporter.methods.modular_steps import EncoderPass, FirstStep

# (batch, source, tokens read before, tokens read now) of every comparison; engines see the last.
_FIRST = ((1, 1, 0, 1), (3, 9, 0, 1), (1, 40, 0, 5), (3, 128, 0, 1))
_CACHED = ((1, 1, 1, 1), (3, 9, 2, 1), (1, 40, 6, 3), (1, 5, 130, 1), (3, 128, 31, 1))


def decoder_feeds(modular: ModularModel, assembled: Any, longest: int, *, cached: bool) -> list[parity.Arrays]:
    """Feeds in the order of the module's arguments; states are the base's of random texts, a past is ``assembled``'s.

    No text is longer than ``longest``, nor what is written than the decoder has positions.
    """
    generator = np.random.default_rng(0)
    positions = getattr(assembled.config, "max_position_embeddings", None)
    feeds = []
    for batch, source, past, now in _CACHED if cached else _FIRST:
        if positions is not None:
            past = min(past, positions - now)
        feeds.append(_feed(generator, modular, assembled, (batch, min(source, longest), past, now)))
    return feeds


def _feed(
    generator: np.random.Generator, modular: ModularModel, assembled: Any, shape: tuple[int, int, int, int]
) -> parity.Arrays:
    batch, source, past, now = shape
    vocabulary = modular.facts.vocabulary
    mask = torch.from_numpy(_mask(generator, batch, source))
    ids = torch.from_numpy(generator.integers(0, vocabulary, (batch, source)))
    targets = torch.from_numpy(generator.integers(0, vocabulary, (batch, past + now)))
    with torch.no_grad():
        states = EncoderPass(modular.base)(ids, mask)
        if not past:
            made = {IDS: targets, STATES: states, SOURCE_MASK: mask}
        else:
            _, *caches = FirstStep(assembled)(targets[:, :past], states, mask)
            names = cache_names(PAST, len(caches) // 4)
            made = {IDS: targets[:, past:], SOURCE_MASK: mask, **dict(zip(names, caches, strict=True))}
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in made.items()}


def _mask(generator: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """[B,n]: the first text fills all of it, the others end somewhere."""
    real = np.full(batch, length) if batch == 1 else generator.integers(1, length + 1, batch)
    real[0] = length
    return (np.arange(length) < real[:, None]).astype(np.int64)
