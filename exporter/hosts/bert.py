"""BERT and its post-norm relatives: a layer is ``norm(x + feed_forward(x))`` after a normed attention sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engines.manifest import Task
from exporter.hosts.host import Host

CLASSES: dict[Task, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "feature-extraction": "AutoModel",
}


def inside(base: str) -> Callable[[nn.Module], nn.Module]:
    """The encoder is the attribute ``base`` of a model with a head, and the model itself without one."""
    return lambda model: getattr(model, base, model)


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


def classify(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.classifier(h)
    return out


def tag(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.classifier(model.dropout(h))
    return out


def answer(model: Any, h: Tensor) -> Tensor:
    out: Tensor = model.qa_outputs(h)
    return out


def _bert_like(
    base: str,
    classify: Callable[[Any, Tensor], Tensor],
    embed: Callable[[Any, Tensor, Tensor | None], Tensor] = _bert_embed,
    position_offset: int = 0,
) -> Host:
    return Host(
        encoder=inside(base),
        layers=lambda encoder: encoder.encoder.layer,
        embed=embed,
        attention=lambda layer: layer.attention,
        attend=_bert_attend,
        feed_forward=_bert_feed_forward,
        finish=_bert_finish,
        classes=CLASSES,
        heads={"sequence-classification": classify, "token-classification": tag, "question-answering": answer},
        position_offset=position_offset,
    )


HOSTS: dict[str, Host] = {
    "bert": _bert_like("bert", _bert_classify),
    # RoBERTa numbers positions from pad_token_id + 1, so the table holds two rows that no token uses.
    "roberta": _bert_like("roberta", classify, position_offset=2),
    "electra": _bert_like("electra", classify, _electra_embed),
    "distilbert": Host(
        encoder=inside("distilbert"),
        layers=lambda encoder: encoder.transformer.layer,
        embed=_distilbert_embed,
        attention=lambda layer: layer.attention,
        attend=_distilbert_attend,
        feed_forward=lambda layer, z: layer.ffn(z),
        finish=lambda layer, total: layer.output_layer_norm(total),
        classes=CLASSES,
        heads={
            "sequence-classification": _distilbert_classify,
            "token-classification": tag,
            "question-answering": answer,
        },
    ),
}
