"""Checking decoders against PyTorch: feeds with and without a past, and what a graph must make of them.

Letters: B batch, S sequence length, P past, T = P + S, V vocabulary, n steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engines.manifest import PAST, cache_name
from exporter import parity
from exporter.backbone import Backbone
from exporter.graphs.ode_trace import KEY, MASK, VALUE
from exporter.methods.ode import Pair, SteppedCache, SteppedModel, Stepping, task_outputs

# (batch, past, sequence) of every comparison: prompts, single tokens after a past, and several. Engines see the last.
_SHAPES = ((1, 0, 1), (3, 0, 5), (1, 0, 128), (1, 1, 1), (3, 6, 1), (1, 5, 4), (3, 9, 31))


def decoder_feeds(model: SteppedModel, stepping: Stepping, max_length: int) -> list[parity.Arrays]:
    """Random ids, of batches padded on the left; a past is what the model makes of the ids before."""
    generator = np.random.default_rng(0)
    feeds = []
    for batch, past, length in _SHAPES:
        past = min(past, max_length - 1)
        whole = _prompt(generator, batch, past, min(length, max_length - past), model.facts.vocabulary)
        with torch.inference_mode():
            feeds.append(_after(model, stepping, whole, past))
    return feeds


def _prompt(generator: np.random.Generator, batch: int, past: int, length: int, vocabulary: int) -> parity.Arrays:
    """Ids, mask and positions [B,P+S]; each row but the first begins with some padding, never all of the past."""
    total = past + length
    padding = generator.integers(0, max(1, past or length), batch) * (np.arange(batch) > 0)
    mask = (np.arange(total) >= padding[:, None]).astype(np.int64)
    ids = generator.integers(0, vocabulary, (batch, total)) * mask
    return {"input_ids": ids, MASK: mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}


def _after(model: SteppedModel, stepping: Stepping, whole: parity.Arrays, past: int) -> parity.Arrays:
    """The feed of the tokens after ``past``, whose keys and values eager PyTorch computes."""
    feed = {name: np.ascontiguousarray(whole[name] if name == MASK else whole[name][:, past:]) for name in whole}
    batch, facts = len(whole[MASK]), model.facts
    pairs: Sequence[Pair] = [(torch.zeros(batch, facts.heads, 0, facts.head_width),) * 2] * stepping.n
    if past:
        before = {name: torch.from_numpy(array[:, :past]) for name, array in whole.items()}
        found = model.encoder(**before, stepping=stepping, keep_cache=True).cache
        assert found is not None
        pairs = found.pairs
    for step, (key, value) in enumerate(pairs):
        feed |= {cache_name(PAST, step, KEY): key.numpy(), cache_name(PAST, step, VALUE): value.numpy()}
    return feed


def decoder_outputs(model: SteppedModel, stepping: Stepping, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Logits [B,S,V], then each step's key and value, by the model in steps."""
    past = SteppedCache(stepping, tuple(_pairs(inputs, stepping.n)))
    found = model.encoder(
        inputs["input_ids"],
        inputs[MASK],
        None,
        inputs["position_ids"],
        stepping=stepping,
        past=past,
        keep_cache=True,
    )
    assert found.cache is not None
    logits = task_outputs(model.backbone, found.last_hidden_state, inputs[MASK])
    return *logits, *(tensor for pair in found.cache.pairs for tensor in pair)


def real_outputs(feed: parity.Arrays, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [B,S,V], keys and values [B,a,T,w] with 0 where the mask [B,T] has padding."""
    mask = feed[MASK] == 1
    logits, *pairs = outputs
    now = mask[:, mask.shape[1] - logits.shape[1] :, None]
    return [np.where(now, logits, 0), *(np.where(mask[:, None, :, None], pair, 0) for pair in pairs)]


def stock_decoder_outputs(backbone: Backbone, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """The same by the Hugging Face model as it is, whose cache has an entry per layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(_pairs(inputs, backbone.num_layers)):
        cache.update(key, value, layer)
    names = ("input_ids", MASK, "position_ids")
    with torch.inference_mode():
        found = backbone.model(**{name: inputs[name] for name in names}, past_key_values=cache, use_cache=True)
    layers = found.past_key_values.layers
    return found.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _pairs(inputs: Mapping[str, Tensor], n: int) -> list[Pair]:
    return [(inputs[cache_name(PAST, step, KEY)], inputs[cache_name(PAST, step, VALUE)]) for step in range(n)]
