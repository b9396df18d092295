"""ALBERT: post-norm groups of layers, each group run for its share of ``num_hidden_layers`` iterations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exporter.hosts.bert import CLASSES, answer, classify, inside, tag
from exporter.hosts.host import Host, Repeated, Sharing
from exporter.sharing import iterations_of_groups


def _counts(config: Any) -> list[int]:
    return iterations_of_groups(config.num_hidden_layers, config.num_hidden_groups)


def _groups(base: Any, config: Any) -> list[Repeated]:
    """More groups than iterations leave some without any; those are not run."""
    stack = zip(base.encoder.albert_layer_groups, _counts(config), strict=True)
    return [Repeated(tuple(group.albert_layers), count) for group, count in stack if count]


def _embed(
    base: Any, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    narrow = base.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
    out: Tensor = base.encoder.embedding_hidden_mapping_in(narrow)
    return out


def _attended(layer: Any, h: Tensor, bias: Tensor, cache: Any = None) -> Tensor:
    """The host's own attention ends in its norm, so its products are taken one by one."""
    attention = layer.attention
    query, key, value = (
        linear(h).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for linear in (attention.query, attention.key, attention.value)
    )
    seen = _product(attention, query, key, value, bias).transpose(1, 2).flatten(2)
    out: Tensor = attention.output_dropout(attention.dense(seen))
    return out


def _product(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of [B,heads,S,w] by the implementation that the model was loaded with."""
    dropout = attention.attention_dropout
    if attention.config._attn_implementation == "sdpa":
        rate = dropout.p if dropout.training else 0.0
        return nn.functional.scaled_dot_product_attention(query, key, value, bias, rate, scale=attention.scaling)
    scores = torch.matmul(query, key.transpose(2, 3)) * attention.scaling + bias
    return torch.matmul(dropout(scores.softmax(-1)), value)


def _settle(layer: Any, total: Tensor) -> Tensor:
    out: Tensor = layer.attention.LayerNorm(total)
    return out


def _attend(layer: Any, h: Tensor, bias: Tensor) -> Tensor:
    return _settle(layer, h + _attended(layer, h, bias))


def _finish(layer: Any, total: Tensor) -> Tensor:
    out: Tensor = layer.full_layer_layer_norm(total)
    return out


def _pool_and_classify(model: Any, h: Tensor) -> Tensor:
    base = model.albert
    return classify(model, model.dropout(base.pooler_activation(base.pooler(h[:, 0]))))


HOSTS: dict[str, Host] = {
    "albert": Host(
        encoder=inside("albert"),
        layers=lambda base: nn.ModuleList(
            layer for group in base.encoder.albert_layer_groups for layer in group.albert_layers
        ),
        embed=_embed,
        attention=lambda layer: layer.attention,
        attend=_attend,
        feed_forward=lambda layer, z: layer.ff_chunk(z),
        finish=_finish,
        classes=CLASSES,
        heads={
            "sequence-classification": _pool_and_classify,
            "token-classification": tag,
            "question-answering": answer,
        },
        sharing=Sharing(
            groups=_groups,
            stated=lambda config: tuple(count for count in _counts(config) if count),
            embed=_embed,
            attended=_attended,
            settle=_settle,
            inner=lambda config: int(config.inner_group_num),
        ),
    )
}
