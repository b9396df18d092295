"""BART and mBART encoders: learnt positions and a norm over the embeddings; BART is post-norm, mBART pre-norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exporter.hosts.decoding import causal, cross_attend
from exporter.hosts.host import Decoder, Host


def _embed(stack: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return embed(stack, input_ids)


def embed(stack: Any, input_ids: Tensor, past: int = 0) -> Tensor:
    """Of the encoder, or of the decoder after ``past`` other tokens."""
    # One row of positions for the whole batch; left alone, the module looks them up for every text.
    position = torch.arange(input_ids.shape[1], device=input_ids.device) + past
    places = stack.embed_positions(input_ids, position_ids=position)
    out: Tensor = stack.layernorm_embedding(stack.embed_tokens(input_ids) + places)
    return out


def _attend(layer: Any, h: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = layer.self_attn_layer_norm(h + layer.self_attn(h, attention_mask=bias)[0])
    return out


def _attend_pre_norm(layer: Any, h: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = h + layer.self_attn(layer.self_attn_layer_norm(h), attention_mask=bias)[0]
    return out


def _norm(layer: Any, h: Tensor) -> Tensor:
    out: Tensor = layer.final_layer_norm(h)
    return out


def feed_forward(layer: Any, z: Tensor) -> Tensor:
    """Of a layer of the encoder or the decoder, without its norm."""
    out: Tensor = layer.fc2(layer.activation_fn(layer.fc1(z)))
    return out


def _encoder(model: Any) -> Any:
    """The encoder of the bare model, of one that generates, or the encoder itself."""
    inner = getattr(model, "model", model)
    return getattr(inner, "encoder", inner)


def _score(model: Any, h: Tensor, bias: Tensor, prefix: Tensor, words: Tensor) -> Tensor:
    """BART normalises after each sublayer, mBART before it and once at the end."""
    decoder, length = model.model.decoder, prefix.shape[0]
    pre_norm = hasattr(decoder, "layer_norm")
    # Batch 1 up to the first look at the text: that much is the same for all and a runtime computes it once.
    state, own = _embed(decoder, prefix[None], None), causal(length, h)
    for layer in decoder.layers:
        state = (_attend_pre_norm if pre_norm else _attend)(layer, state, own)
        norm = layer.encoder_attn_layer_norm
        seen = _cross_attend(layer.encoder_attn, norm(state) if pre_norm else state, h, bias)
        state = state + seen if pre_norm else norm(state + seen)
        norm = layer.final_layer_norm
        state = state + feed_forward(layer, norm(state)) if pre_norm else norm(state + feed_forward(layer, state))
    last = decoder.layer_norm(state[:, -1]) if pre_norm else state[:, -1]
    rows = nn.functional.embedding(words, model.lm_head.weight)
    return nn.functional.linear(last, rows, model.final_logits_bias[0, words])


def _cross_attend(attention: Any, state: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    query = attention.q_proj(state) * attention.scaling
    seen = cross_attend(query, h, bias, attention.k_proj, attention.v_proj, attention.num_heads)
    out: Tensor = attention.out_proj(seen)
    return out


_DECODER = Decoder(
    score=_score,
    layers=lambda model: model.model.decoder.layers,
    heads=lambda config: config.decoder_attention_heads,
)

_bart_like = partial(
    Host,
    encoder=_encoder,
    layers=lambda encoder: encoder.layers,
    embed=_embed,
    attention=lambda layer: layer.self_attn,
    feed_forward=feed_forward,
    decoder=_DECODER,
)

HOSTS: dict[str, Host] = {
    "bart": _bart_like(
        attend=_attend,
        finish=_norm,
        classes={"feature-extraction": "BartModel", "label-words": "BartForConditionalGeneration"},
    ),
    "mbart": _bart_like(
        attend=_attend_pre_norm,
        enter=_norm,
        close=lambda encoder, h: encoder.layer_norm(h),
        classes={"feature-extraction": "MBartModel", "label-words": "MBartForConditionalGeneration"},
    ),
}
