"""T5 encoders: pre-norm with an RMS norm, positions as a bias that all layers add to their attention scores.

Both forms of the FFN, ReLU (v1.0) and gated (v1.1), are the layer's own module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exporter.hosts.decoding import causal, cross_attend
from exporter.hosts.host import Decoder, Host


def _attend(layer: Any, h: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = layer.layer[0](h, position_bias=bias)[0]
    return out


def _enter(layer: Any, h: Tensor) -> Tensor:
    out: Tensor = layer.layer[-1].layer_norm(h)
    return out


def _feed_forward(layer: Any, z: Tensor) -> Tensor:
    sublayer = layer.layer[-1]
    out: Tensor = sublayer.dropout(sublayer.DenseReluDense(z))
    return out


def position_buckets(stack: Any) -> Tensor:
    """The row of the bias table for every distance from -D to D, [2D+1]; beyond D all distances share a row.

    Made once and not in the graph: it takes a logarithm whose last bit decides about a row, and a runtime may round
    otherwise than PyTorch.
    """
    attention = stack.block[0].layer[0].SelfAttention
    farthest = max(attention.relative_attention_max_distance, attention.relative_attention_num_buckets)
    buckets: Tensor = attention._relative_position_bucket(
        torch.arange(-farthest, farthest + 1),
        bidirectional=not stack.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return buckets


def _attention_bias(encoder: Any, mask: Tensor, buckets: Tensor | None) -> Tensor:
    """Additive mask [B,1,1,S] -> mask plus relative position bias, [B,heads,S,S]."""
    assert buckets is not None
    length, farthest = mask.shape[-1], buckets.shape[0] // 2
    table = encoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
    position = torch.arange(length, device=mask.device)
    distance = (position[None, :] - position[:, None]).clamp(-farthest, farthest) + farthest
    bias = table.transpose(0, 1).index_select(1, distance.flatten())
    return bias.unflatten(1, (length, length)) + mask


def _score(model: Any, h: Tensor, bias: Tensor, prefix: Tensor, words: Tensor) -> Tensor:
    decoder, length = model.decoder, prefix.shape[0]
    # Batch 1 up to the first look at the text: that much is the same for all and a runtime computes it once.
    state = decoder.embed_tokens(prefix)[None]
    own = decoder.block[0].layer[0].SelfAttention.compute_bias(length, length) + causal(length, h)
    for block in decoder.block:
        state = block.layer[0](state, position_bias=own)[0]
        crossing, attention = block.layer[1], block.layer[1].EncDecAttention
        query = attention.q(crossing.layer_norm(state))
        seen = cross_attend(query, h, bias, attention.k, attention.v, attention.n_heads)
        state = block.layer[2](state + attention.o(seen))
    last = decoder.final_layer_norm(state[:, -1])
    if model.config.scale_decoder_outputs:
        last = last * model.model_dim**-0.5
    return nn.functional.linear(last, nn.functional.embedding(words, model.lm_head.weight))


def shrink(module: nn.Module, factor: float) -> None:
    """Divide the residual stream of all T5 parts in ``module`` by ``factor``, in place; what they compute stays.

    Embeddings and what attention and feed-forward networks add are divided, the latter's where it enters, so that their
    inside shrinks too; each norm gives what it gave with an epsilon that is divided likewise, squared. Where embeddings
    also make the logits, the last norm makes up for it.
    """
    from transformers.models.t5 import modeling_t5 as t5

    tables = {}
    for part in module.modules():
        if isinstance(part, t5.T5LayerNorm):
            # As a tensor with an axis: the exporter takes a scalar this small for 0 and drops the sum.
            part.variance_epsilon = torch.tensor([part.variance_epsilon / (factor * factor)])
        elif isinstance(part, t5.T5Attention):
            part.o.weight.div_(factor)
        elif isinstance(part, t5.T5DenseGatedActDense):
            part.wi_1.weight.div_(factor)
        elif isinstance(part, t5.T5DenseActDense):
            (part.wi if isinstance(part.act, nn.ReLU) else part.wo).weight.div_(factor)
        elif isinstance(part, t5.T5Stack):
            tables[id(part.embed_tokens.weight)] = part.embed_tokens.weight
    for table in tables.values():
        table.div_(factor)
    for part in module.modules():
        if isinstance(part, t5.T5ForConditionalGeneration) and id(part.lm_head.weight) in tables:
            part.decoder.final_layer_norm.weight.mul_(factor)


HOSTS: dict[str, Host] = {
    "t5": Host(
        encoder=lambda model: getattr(model, "encoder", model),
        layers=lambda encoder: encoder.block,
        embed=lambda encoder, input_ids, token_type_ids: encoder.embed_tokens(input_ids),
        attention=lambda layer: layer.layer[0],
        attend=_attend,
        enter=_enter,
        feed_forward=_feed_forward,
        close=lambda encoder, h: encoder.final_layer_norm(h),
        position_buckets=position_buckets,
        attention_bias=_attention_bias,
        classes={"feature-extraction": "T5EncoderModel", "label-words": "T5ForConditionalGeneration"},
        decoder=Decoder(
            score=_score,
            layers=lambda model: model.decoder.block,
            heads=lambda config: config.num_heads,
        ),
        shrink=shrink,
        skips_padded_rows=True,
    ),
}
