"""BART and mBART encoders: learnt positions and a norm over the embeddings; BART is post-norm, mBART pre-norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exporter.hosts.host import Decoder, Host


def _embed(encoder: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    # One row of positions for the whole batch; left alone, the module looks them up for every text.
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    places = encoder.embed_positions(input_ids, position_ids=position)
    out: Tensor = encoder.layernorm_embedding(encoder.embed_tokens(input_ids) + places)
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


def _feed_forward(layer: Any, z: Tensor) -> Tensor:
    out: Tensor = layer.fc2(layer.activation_fn(layer.fc1(z)))
    return out


def _encoder(model: Any) -> Any:
    """The encoder of the bare model, of one that generates, or the encoder itself."""
    inner = getattr(model, "model", model)
    return getattr(inner, "encoder", inner)


def _score(model: Any, h: Tensor, attention_mask: Tensor, prefix: Tensor, words: Tensor) -> Tensor:
    decoded = model.model.decoder(
        input_ids=prefix.expand(h.shape[0], -1),
        encoder_hidden_states=h,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    )
    last = decoded.last_hidden_state[:, -1]
    return nn.functional.linear(last, model.lm_head.weight[words], model.final_logits_bias[0, words])


_DECODER = Decoder(
    score=_score,
    layers=lambda model: model.model.decoder.layers,
    read_encoder=lambda layer: [layer.encoder_attn.k_proj, layer.encoder_attn.v_proj],
)

HOSTS: dict[str, Host] = {
    "bart": Host(
        encoder=_encoder,
        layers=lambda encoder: encoder.layers,
        embed=_embed,
        attention=lambda layer: layer.self_attn,
        attend=_attend,
        feed_forward=_feed_forward,
        finish=_norm,
        classes={"feature-extraction": "BartModel", "label-words": "BartForConditionalGeneration"},
        decoder=_DECODER,
    ),
    "mbart": Host(
        encoder=_encoder,
        layers=lambda encoder: encoder.layers,
        embed=_embed,
        attention=lambda layer: layer.self_attn,
        attend=_attend_pre_norm,
        enter=_norm,
        feed_forward=_feed_forward,
        close=lambda encoder, h: encoder.layer_norm(h),
        classes={"feature-extraction": "MBartModel", "label-words": "MBartForConditionalGeneration"},
        decoder=_DECODER,
    ),
}
