"""Weights of slender models as named tensors: from a backbone's names to the official ones, and narrower.

Pure functions on dicts of tensors. Letters as in :mod:`exporter.methods.slender`; V words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exporter.backbone import Backbone

WORDS = "bert.embeddings.word_embeddings.weight"
WORDS_LEFT = "bert.embeddings.word_embeddings1.weight"
WORDS_RIGHT = "bert.embeddings.word_embeddings2.weight"

_DISTILBERT = (
    (r"^distilbert\.transformer\.layer\.(\d+)\.", r"bert.encoder.layer.\1."),
    (r"^distilbert\.", "bert."),
    (r"\.attention\.q_lin\.", ".attention.self.query."),
    (r"\.attention\.k_lin\.", ".attention.self.key."),
    (r"\.attention\.v_lin\.", ".attention.self.value."),
    (r"\.attention\.out_lin\.", ".attention.output.dense."),
    (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.ffn\.lin1\.", ".intermediate.dense."),
    (r"\.ffn\.lin2\.", ".output.dense."),
    (r"\.output_layer_norm\.", ".output.LayerNorm."),
    (r"^pre_classifier\.", "bert.pooler.dense."),
)
_HEAD = ((r"^classifier\.dense\.", "bert.pooler.dense."), (r"^classifier\.out_proj\.", "classifier."))
_RENAMED = {
    "bert": (),
    "roberta": ((r"^roberta\.", "bert."), *_HEAD),
    "electra": ((r"^electra\.", "bert."), *_HEAD),
    "distilbert": _DISTILBERT,
}


def official_names(backbone: Backbone, num_labels: int) -> dict[str, Tensor]:
    """The backbone's tensors under COST-EFF's names, at full width.

    Pooler and classifier are among them only if the backbone classifies into ``num_labels``; all else has a place in
    a multi-exit model of the same host.
    """
    kind = backbone.config.model_type
    classifies = backbone.task == "sequence-classification"
    base = "" if classifies else f"{kind}."
    tensors = {}
    for name, tensor in backbone.model.state_dict().items():
        renamed = base + name
        for pattern, replacement in _RENAMED[kind]:
            renamed = re.sub(pattern, replacement, renamed)
        tensors[renamed] = tensor.detach()
    if not classifies or len(tensors["classifier.weight"]) != num_labels:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(("bert.pooler.", "classifier."))}
    return tensors


def slenderised(
    tensors: Mapping[str, Tensor],
    head_width: int,
    heads: Sequence[Sequence[int]],
    neurons: Sequence[Sequence[int]],
    embedding: int | None,
) -> dict[str, Tensor]:
    """The tensors of a narrower model: per layer, the indices of heads and neurons that stay, in the order given.

    ``embedding``: rank of the word table afterwards; None leaves the table as it is, whole or factorised.
    """
    kept = dict(tensors)
    for layer, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons, strict=True)):
        prefix = f"bert.encoder.layer.{layer}."
        channels = torch.tensor([head * head_width + i for head in kept_heads for i in range(head_width)])
        units = torch.tensor(list(kept_neurons))
        for part in ("query", "key", "value"):
            _take(kept, f"{prefix}attention.self.{part}.weight", 0, channels)
            _take(kept, f"{prefix}attention.self.{part}.bias", 0, channels)
        _take(kept, f"{prefix}attention.output.dense.weight", 1, channels)
        _take(kept, f"{prefix}intermediate.dense.weight", 0, units)
        _take(kept, f"{prefix}intermediate.dense.bias", 0, units)
        _take(kept, f"{prefix}output.dense.weight", 1, units)
    if embedding is not None:
        table = kept.pop(WORDS) if WORDS in kept else kept.pop(WORDS_LEFT) @ kept.pop(WORDS_RIGHT).T
        kept[WORDS_LEFT], kept[WORDS_RIGHT] = factorised(table, embedding)
    return kept


def _take(tensors: dict[str, Tensor], name: str, axis: int, indices: Tensor) -> None:
    tensors[name] = tensors[name].index_select(axis, indices.to(tensors[name].device))


def factorised(table: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of rank e to a table [V,H]: left [V,e], right [H,e], table ≈ left rightᵀ.

    This is its truncated singular value decomposition, left = U S and right = V. The right vectors are those of the
    H x H Gram matrix, in fp64, which is far smaller than the table.
    """
    exact = table.double()
    _, vectors = torch.linalg.eigh(exact.T @ exact)  # in ascending order
    right = vectors.flip(1)[:, :rank]
    return (exact @ right).to(table.dtype), right.to(table.dtype).contiguous()
