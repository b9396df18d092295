"""What a host is: the parts of one encoder architecture, named as functions of its own submodules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from engines.manifest import Task
from exporter.precision import Shrink


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


class Repeated(NamedTuple):
    """One group of a model that shares layers: the layers of one iteration, and how often they are run."""

    layers: tuple[nn.Module, ...]
    iterations: int


@dataclass(frozen=True)
class Sharing:
    """What an architecture that may share its layers adds, so that an iteration can be a step of any size dt.

    One layer, with its two sublayers scaled (dt = 1 is the layer itself)::

        h = settle(layer, h + dt * attended(layer, h, bias, cache))
        h = finish(layer, h + dt * feed_forward(layer, enter(layer, h)))

    ``attended`` is the attention sublayer without residual and closing norm; where post-norm, ``settle`` is that norm.
    ``cache`` is what the layer's attention calls ``update`` of, or None. ``embed(encoder, ids, types, positions)``
    gives what the first iteration reads. ``groups(encoder, config)``: the groups in the order they are run.
    ``stated(config)``: their iterations where the configuration tells, otherwise None; ``inner(config)``: the layers of
    one iteration.
    """

    groups: Callable[[Any, Any], list[Repeated]]
    stated: Callable[[Any], tuple[int, ...] | None]
    embed: Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]
    attended: Callable[[Any, Tensor, Tensor, Any], Tensor]
    settle: Callable[[Any, Tensor], Tensor] = _unchanged
    inner: Callable[[Any], int] = lambda config: 1
    causal: bool = False


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
    changes; it is computed once, outside of any trace. ``sharing``: for architectures whose layers are run as steps,
    which no method but ``ode`` fits; ``layers`` are then those that the file may hold. ``shrink``: for architectures
    whose residual stream outgrows fp16; it makes that smaller and leaves what the model computes as it is, see
    ``exporter.precision``. ``skips_padded_rows``: with
    plugins of pad mode "official", padded positions skip the attention sublayer, as in the network that such plugins
    were trained in.
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
    sharing: Sharing | None = None
    position_offset: int = 0
    shrink: Shrink | None = None
    skips_padded_rows: bool = False
