"""The parts of an assembled model that generation calls in turn, as modules that take and give plain tensors.

Batch B, source length n and the number p of tokens in the cache are free in each: nothing branches on them. Keys and
values are [B,a,length,w] for a heads of width w; those of one tile follow those of the one before it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from exporter.methods.modular_cache import new_cache, owner_of


class EncoderPass(nn.Module):
    """Source ids and mask, both [B,n] -> encoder states [B,n,H]. ``model`` is an assembled one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class FirstStep(nn.Module):
    """Target ids [B,t], encoder states [B,n,H], source mask [B,n] -> logits [B,t,V], then four tensors a tile:

    keys and values of the target, of length t, and those of the source, of length n. ``model`` is an assembled one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, states: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        out = self.model(
            encoder_outputs=(states,),
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=True,
        )
        cache = out.past_key_values
        pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        kept = [(own.keys, own.values, cross.keys, cross.values) for own, cross in pairs]
        return out.logits, *(tensor for tile in kept for tensor in tile)


class CachedStep(nn.Module):
    """Target ids [B,t], source mask [B,n], four tensors a tile as of :class:`FirstStep`, those of the target of length
    p -> logits [B,t,V], then the target's keys and values of every tile, of length p + t.

    Encoder states are not needed any more. ``model`` is an assembled one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        out = self.model(
            # Asked for its shape alone: how long the source is.
            encoder_outputs=(attention_mask[:, :, None].to(past[0].dtype),),
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=_cache_of(past, owner_of(self.model)),
            use_cache=True,
        )
        layers = out.past_key_values.self_attention_cache.layers
        return out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _cache_of(past: tuple[Tensor, ...], owner: object) -> EncoderDecoderCache:
    tiles = len(past) // 4
    cache = new_cache(tiles, owner)
    for index in range(tiles):
        keys, values, cross_keys, cross_values = past[4 * index : 4 * index + 4]
        cache.self_attention_cache.update(keys, values, index)
        cache.cross_attention_cache.update(cross_keys, cross_values, index)
        cache.is_updated[index] = True
    return cache
