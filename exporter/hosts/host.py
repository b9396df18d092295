"""What a host is: the parts of one encoder architecture, named as functions of its own submodules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from engines.manifest import Task


def _unchanged(_: Any, h: Tensor) -> Tensor:
    return h


def _mask_alone(_: Any, mask: Tensor, buckets: Tensor | None) -> Tensor:
    return mask


@dataclass(frozen=True)
class Decoder:
    """The decoder of a generating model, for one pass over a short prefix. P prefix ids, C words.

    ``score(model, h, bias, prefix, words)``: encoder states [B,S,H], additive mask [B,1,S], prefix ids [P], word ids
    [C] -> the words' logits [B,C] after the prefix. ``layers(model)`` are the decoder's, ``heads(config)`` the number
    of heads of its cross-attention.
    """

    score: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
    layers: Callable[[Any], nn.ModuleList]
    heads: Callable[[Any], int]


@dataclass(frozen=True)
class Host:
    """The parts of one encoder architecture. Tensors: h, x, z [B,S,H]; mask is additive, [B,1,1,S].

    An encoder of such layers, with ``bias = attention_bias(encoder, mask, buckets)`` for all of them, computes::

        h = embed(encoder, ids, types)
        h = attend(layer, h, bias)        the attention sublayer with its residual and, where post-norm, its norm
        x = enter(layer, h)               what the FFN reads: h itself where post-norm, its norm where pre-norm
        h = finish(layer, h + feed_forward(layer, x))       the norm that closes the layer, or nothing
        h = close(encoder, h)             after the last layer

    ``attention`` is the part of a layer that holds attention's products, the first being the query's. ``classes``: the
    transformers class that loads each task. ``position_buckets`` gives what ``attention_bias`` needs and no input
    changes; it is computed once, outside of any trace. ``skips_padded_rows``: with plugins of pad mode "official",
    padded positions skip the attention sublayer, as in the network that such plugins were trained in.
    """

    encoder: Callable[[Any], nn.Module]
    layers: Callable[[Any], nn.ModuleList]
    embed: Callable[[Any, Tensor, Tensor | None], Tensor]
    attention: Callable[[Any], nn.Module]
    attend: Callable[[Any, Tensor, Tensor], Tensor]
    feed_forward: Callable[[Any, Tensor], Tensor]
    classes: Mapping[Task, str]
    finish: Callable[[Any, Tensor], Tensor] = _unchanged
    enter: Callable[[Any, Tensor], Tensor] = _unchanged
    close: Callable[[Any, Tensor], Tensor] = _unchanged
    position_buckets: Callable[[Any], Tensor | None] = lambda encoder: None
    attention_bias: Callable[[Any, Tensor, Tensor | None], Tensor] = _mask_alone
    heads: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=dict)
    decoder: Decoder | None = None
    position_offset: int = 0
    skips_padded_rows: bool = False
