"""Weights of slender models as named tensors: from a backbone's names to the official ones, narrower, and measured.

Pure functions on dicts of tensors. Letters as in :mod:`exporter.methods.slender`; V words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compexport.errors import InputError, describe
from exporter.backbone import Backbone
from exporter.methods.slender import HostFacts, SlenderShape
from exporter.plans.costeff import HIGHWAY

WORDS = "bert.embeddings.word_embeddings.weight"
WORDS_LEFT = "bert.embeddings.word_embeddings1.weight"
WORDS_RIGHT = "bert.embeddings.word_embeddings2.weight"
LAYER = "bert.encoder.layer."

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
        prefix = f"{LAYER}{layer}."
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


# --- shapes of stored tensors ----------------------------------------------------------------------------------------


def shape_of(tensors: Mapping[str, Tensor], facts: HostFacts, origin: str) -> SlenderShape:
    """Widths per layer; a query that is no whole number of heads is refused."""
    heads, neurons = [], []
    for layer in range(facts.layers):
        name = f"{LAYER}{layer}.attention.self.query.weight"
        width = size_of(tensors, name, 0, origin)
        if width % facts.head_width or not width:
            expected = f"a multiple of the head width {facts.head_width}"
            raise InputError(describe(f"{origin}: {name}", got=f"{width} rows", expected=expected))
        heads.append(width // facts.head_width)
        neurons.append(size_of(tensors, f"{LAYER}{layer}.intermediate.dense.weight", 0, origin))
    rank = size_of(tensors, WORDS_LEFT, 1, origin) if WORDS_LEFT in tensors else None
    shape = SlenderShape(tuple(heads), tuple(neurons), rank)
    shape.require_fit(facts, origin)
    return shape


def require_tables(
    tensors: Mapping[str, Tensor], facts: HostFacts, shape: SlenderShape, classifier: list[int], origin: str
) -> None:
    """InputError where the sizes that only the host's configuration names are not those of the tensors.

    Before anything is made of such sizes, which can be any number. ``classifier``: [C, what it reads].
    """
    base, width = "bert.embeddings.", facts.word_width
    words, rank = (WORDS, width) if shape.embedding is None else (WORDS_LEFT, shape.embedding)
    expected = {
        words: [facts.vocabulary, rank],
        f"{base}position_embeddings.weight": [facts.positions, width],
        "classifier.weight": classifier,
    }
    if facts.types:
        expected[f"{base}token_type_embeddings.weight"] = [facts.types, width]
    for name, wanted in expected.items():
        got = list(tensors[name].shape) if name in tensors else "nothing"
        if got != wanted:
            raise InputError(describe(f"{origin}: {name}", got=got, expected=wanted))


def reads_mean(tensors: Mapping[str, Tensor], facts: HostFacts, origin: str) -> bool:
    """Whether exits read the mean of the tokens beside the first one: then the first exit's matrix has 2 H columns."""
    ways = [f"{HIGHWAY}0.pooler.dense.weight", f"{HIGHWAY}0.classifier.weight", "bert.pooler.dense.weight"]
    first = next((name for name in ways if name in tensors), "classifier.weight")
    return size_of(tensors, first, 1, origin) == 2 * facts.hidden


def size_of(tensors: Mapping[str, Tensor], name: str, axis: int, origin: str) -> int:
    """Rows (axis 0) or columns (1) of a stored matrix; InputError if there is none of this name."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != 2:
        got = "nothing" if tensor is None else list(tensor.shape)
        raise InputError(describe(f"{origin}: {name}", got=got, expected="a matrix"))
    return int(tensor.shape[axis])
