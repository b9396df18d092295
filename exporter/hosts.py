"""Architectures that methods fit: how to reach the parts of a Hugging Face encoder without changing it.

A :class:`Host` names the parts of one architecture as functions of the model's own submodules; a :class:`Backbone`
is a loaded model folder with everything the exporter needs to know about it. Nothing here alters a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe


@dataclass(frozen=True)
class Host:
    """The parts of one encoder architecture. Tensors: h, x, z, y [B,S,H]; mask is additive, [B,1,1,S].

    ``attend`` is the whole attention sublayer with its residual and norm, ``feed_forward`` the bare FFN, ``finish``
    the norm that closes the layer: a layer is ``finish(x + feed_forward(x))`` with ``x = attend(h, mask)``.
    """

    base: str
    layers: Callable[[nn.Module], nn.ModuleList]
    embed: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    attend: Callable[[nn.Module, Tensor, Tensor], Tensor]
    feed_forward: Callable[[nn.Module, Tensor], Tensor]
    finish: Callable[[nn.Module, Tensor], Tensor]
    heads: Mapping[str, Callable[[Any, Tensor], Tensor]]
    position_offset: int = 0

    def encoder(self, model: nn.Module) -> nn.Module:
        """The bare encoder inside a model with or without a task head."""
        inner = getattr(model, self.base, model)
        assert isinstance(inner, nn.Module)
        return inner


def _bert_embed(base: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    out: Tensor = base.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    return out


def _electra_embed(base: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    out = _bert_embed(base, input_ids, token_type_ids)
    return base.embeddings_project(out) if hasattr(base, "embeddings_project") else out


def _bert_attend(layer: Any, h: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = layer.attention(h, mask)[0]
    return out


def _bert_feed_forward(layer: Any, z: Tensor) -> Tensor:
    out: Tensor = layer.output.dropout(layer.output.dense(layer.intermediate(z)))
    return out


def _bert_finish(layer: Any, total: Tensor) -> Tensor:
    out: Tensor = layer.output.LayerNorm(total)
    return out


def _distilbert_embed(base: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    out: Tensor = base.embeddings(input_ids)
    return out


def _distilbert_attend(layer: Any, h: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = layer.sa_layer_norm(layer.attention(h, mask)[0] + h)
    return out


def _bert_classify(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.classifier(model.dropout(model.bert.pooler(h)))
    return out


def _distilbert_classify(model: Any, h: Tensor) -> Tensor:
    pooled = torch.relu(model.pre_classifier(h[:, 0]))
    out: Tensor = model.classifier(model.dropout(pooled))
    return out


def _classify(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.classifier(h)
    return out


def _tag(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.classifier(model.dropout(h))
    return out


def _answer(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.qa_outputs(h)
    return out


def _bert_like(
    base: str,
    classify: Callable[[Any, Tensor], Tensor],
    embed: Callable[[Any, Tensor, Tensor | None], Tensor] = _bert_embed,
    position_offset: int = 0,
) -> Host:
    return Host(
        base=base,
        layers=lambda encoder: encoder.encoder.layer,  # type: ignore[union-attr, return-value]
        embed=embed,
        attend=_bert_attend,
        feed_forward=_bert_feed_forward,
        finish=_bert_finish,
        heads={"sequence-classification": classify, "token-classification": _tag, "question-answering": _answer},
        position_offset=position_offset,
    )


HOSTS: dict[str, Host] = {
    "bert": _bert_like("bert", _bert_classify),
    # RoBERTa numbers positions from pad_token_id + 1, so the table holds two rows that no token uses.
    "roberta": _bert_like("roberta", _classify, position_offset=2),
    "electra": _bert_like("electra", _classify, _electra_embed),
    "distilbert": Host(
        base="distilbert",
        layers=lambda encoder: encoder.transformer.layer,  # type: ignore[union-attr, return-value]
        embed=_distilbert_embed,
        attend=_distilbert_attend,
        feed_forward=lambda layer, z: layer.ffn(z),
        finish=lambda layer, total: layer.output_layer_norm(total),
        heads={
            "sequence-classification": _distilbert_classify,
            "token-classification": _tag,
            "question-answering": _answer,
        },
    ),
}


def host_of(model_type: str, folder: Path) -> Host:
    """The host for a ``config.json`` model type; InputError names the supported ones."""
    try:
        return HOSTS[model_type]
    except KeyError:
        raise InputError(
            describe(
                f"{folder}: unsupported architecture",
                got=repr(model_type),
                expected=f"one of {', '.join(sorted(HOSTS))}",
                hint="Variator fits post-norm encoders of these families",
            )
        ) from None
