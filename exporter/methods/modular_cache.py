"""Caches of assembled models: one layer per decoder tile, and never those of another assembly.

Keys and values that another assembly left in a cache belong to other states, and nothing in their shapes tells.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from compexport.errors import InputError, describe

_OWNER = "_compexport_assembly"


def new_cache(tiles: int, owner: object) -> EncoderDecoderCache:
    """An empty cache with a layer per tile."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    _fit(cache, tiles)
    setattr(cache, _OWNER, owner)
    return cache


def owner_of(model: Any) -> object:
    """Whose caches an assembled model takes; None for any other model, which takes all."""
    return getattr(model.get_decoder(), _OWNER, None)


def guard_cache(decoder: nn.Module, tiles: int, owner: object, name: str) -> None:
    """Make ``decoder`` take only caches of ``owner``, which it recognises by equality, and empty ones.

    It makes its own with one layer per tile, and fits those that ``generate`` sizes by the encoder. InputError, when
    the decoder runs, for a cache that somebody else filled; ``name`` is the assembly's, for that message.
    """

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is None:
            if kwargs.get("use_cache"):
                kwargs["past_key_values"] = new_cache(tiles, owner)
            return args, kwargs
        if getattr(cache, _OWNER, None) == owner:
            return args, kwargs
        if not isinstance(cache, EncoderDecoderCache) or _is_filled(cache):
            hint = "begin a text with the assembly that goes on with it"
            raise InputError(
                describe(f"cache of assembly {name}", got="another model's", expected="its own", hint=hint)
            )
        _fit(cache, tiles)
        setattr(cache, _OWNER, owner)
        return args, kwargs

    setattr(decoder, _OWNER, owner)
    decoder.register_forward_pre_hook(check, with_kwargs=True)


def _is_filled(cache: EncoderDecoderCache) -> bool:
    return any(layer.is_initialized for part in _parts(cache) for layer in part.layers)


def _fit(cache: EncoderDecoderCache, tiles: int) -> None:
    """An empty cache gets one layer per tile."""
    for part in _parts(cache):
        kinds = {type(layer) for layer in part.layers}
        if kinds - {DynamicLayer}:
            if len(part.layers) != tiles:
                raise InputError(describe("cache: layers", got=len(part.layers), expected=f"{tiles}, one per tile"))
            continue
        part.layers[:] = [DynamicLayer() for _ in range(tiles)]
    cache.is_updated = dict.fromkeys(range(tiles), False)


def _parts(cache: EncoderDecoderCache) -> tuple[Cache, Cache]:
    return cache.self_attention_cache, cache.cross_attention_cache
