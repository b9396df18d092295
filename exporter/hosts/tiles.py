"""What the layers of an encoder-decoder compute, and what stands around them, over plain tensors.

Keys and values come and go as tensors, positions are counted from what was read before, and biases are made once for
all layers. Letters: B batch, n source tokens, t target tokens, p target tokens before, a heads of width w, H hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exporter.hosts import bart, t5
from exporter.precision import lowest


@dataclass(frozen=True)
class Attention:
    """One attention of a layer: its projections, the norm before or after it, heads, and what queries are scaled by."""

    norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    heads: int
    scale: float

    def split(self, projected: Tensor) -> Tensor:
        """[B,t,a*w] -> [B,a,t,w]."""
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attended(self, h: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Of queries made of h [B,t,H], which is normalised where it must be; key and value [B,a,n,w] -> [B,t,H]."""
        query = self.q(h) if self.scale == 1 else self.q(h) * self.scale
        scores = torch.matmul(self.split(query), key.transpose(2, 3)) + bias
        out: Tensor = self.o(torch.matmul(scores.softmax(-1), value).transpose(1, 2).flatten(2))
        return out


@dataclass(frozen=True)
class TileHost:
    """One architecture. ``attention(layer, crossing)``; ``feed_forward(layer, h)`` with its norm and residual.

    ``embed(stack, ids, past)``: ids [B,t] after ``past`` others -> [B,t,H]. ``close(stack, h)``: what follows the
    layers. ``head(model, h)``: h as it enters the product that makes logits, its matrix [V,H] and bias [V] or None.

    Where positions are relative, ``buckets(stack)`` are made once, and ``relative(stack, buckets, t, past)`` is the
    bias [a,t,past+t] that they are worth.
    """

    pre_norm: bool
    attention: Callable[[Any, bool], Attention]
    feed_forward: Callable[[Any, Tensor], Tensor]
    embed: Callable[[Any, Tensor, int], Tensor]
    close: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor | None]]
    buckets: Callable[[Any], Tensor] | None = None
    relative: Callable[[Any, Tensor, int, int], Tensor] | None = None

    def enter(self, attention: Attention, h: Tensor) -> Tensor:
        """What queries, and of an attention to itself keys and values, are made of."""
        out: Tensor = attention.norm(h) if self.pre_norm else h
        return out

    def leave(self, attention: Attention, h: Tensor, attended: Tensor) -> Tensor:
        """The sublayer's output."""
        out: Tensor = h + attended if self.pre_norm else attention.norm(h + attended)
        return out


def hidden_bias(mask: Tensor, like: Tensor) -> Tensor:
    """Mask [B,n] -> additive mask [B,1,1,n] in the type of ``like``."""
    return (1 - mask[:, None, None, :].to(like.dtype)) * lowest(like.dtype)


def causal_bias(length: int, past: int, like: Tensor) -> Tensor:
    """Additive mask [t,p+t]: every target token sees those before it, those of the past too."""
    row, column = torch.arange(length)[:, None], torch.arange(past + length)[None, :]
    return (column > row + past).to(like.dtype) * lowest(like.dtype)


# --- T5 --------------------------------------------------------------------------------------------------------------


def _t5_attention(layer: Any, crossing: bool) -> Attention:
    sublayer = layer.layer[1 if crossing else 0]
    inner = sublayer.EncDecAttention if crossing else sublayer.SelfAttention
    return Attention(sublayer.layer_norm, inner.q, inner.k, inner.v, inner.o, inner.n_heads, 1.0)


def _t5_relative(stack: Any, buckets: Tensor, length: int, past: int) -> Tensor:
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
    farthest = buckets.shape[0] // 2
    row, column = torch.arange(length)[:, None] + past, torch.arange(past + length)[None, :]
    distance = (column - row).clamp(-farthest, farthest) + farthest
    bias: Tensor = table.transpose(0, 1).index_select(1, distance.flatten())
    return bias.unflatten(1, (length, past + length))


def _t5_head(model: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if model.config.scale_decoder_outputs:
        h = h * model.model_dim**-0.5
    return h, model.lm_head.weight, None


# --- BART and mBART ---------------------------------------------------------------------------------------------------


def _bart_attention(layer: Any, crossing: bool) -> Attention:
    inner = layer.encoder_attn if crossing else layer.self_attn
    norm = layer.encoder_attn_layer_norm if crossing else layer.self_attn_layer_norm
    return Attention(
        norm, inner.q_proj, inner.k_proj, inner.v_proj, inner.out_proj, inner.num_heads, inner.head_dim**-0.5
    )


def _bart_feed_forward(layer: Any, h: Tensor) -> Tensor:
    out: Tensor = layer.final_layer_norm(h + bart.feed_forward(layer, h))
    return out


def _mbart_feed_forward(layer: Any, h: Tensor) -> Tensor:
    return h + bart.feed_forward(layer, layer.final_layer_norm(h))


def _bart_head(model: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return h, model.lm_head.weight, model.final_logits_bias[0]


def _mbart_close(stack: Any, h: Tensor) -> Tensor:
    out: Tensor = stack.layer_norm(h)
    return out


_bart_like = partial(TileHost, attention=_bart_attention, embed=bart.embed, head=_bart_head)

TILE_HOSTS: dict[str, TileHost] = {
    "t5": TileHost(
        pre_norm=True,
        attention=_t5_attention,
        feed_forward=lambda layer, h: layer.layer[-1](h),
        embed=lambda stack, ids, past: stack.embed_tokens(ids),
        close=lambda stack, h: stack.final_layer_norm(h),
        head=_t5_head,
        buckets=t5.position_buckets,
        relative=_t5_relative,
    ),
    "bart": _bart_like(pre_norm=False, feed_forward=_bart_feed_forward, close=lambda stack, h: h),
    "mbart": _bart_like(pre_norm=True, feed_forward=_mbart_feed_forward, close=_mbart_close),
}
