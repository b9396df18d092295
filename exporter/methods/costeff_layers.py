"""The parts of a slender multi-exit encoder, as modules whose names make the official tensor names.

Letters: B batch, S sequence length, H hidden size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from exporter.methods.slender import HostFacts

# "eager" traces to plain MatMul and Softmax; "sdpa" is one fused kernel where the device has one.
Attention = Literal["eager", "sdpa"]


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


class _SelfAttention(nn.Module):
    """W_Q, W_K, W_V of the kept heads; scores are scaled by the width of one head, however many there are."""

    def __init__(self, facts: HostFacts, heads: int, kind: Attention) -> None:
        super().__init__()
        self.head_width, self.kind = facts.head_width, kind
        self.query, self.key, self.value = (nn.Linear(facts.hidden, heads * facts.head_width) for _ in range(3))
        self.dropout = nn.Dropout(facts.attention_dropout)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        split = (*h.shape[:-1], -1, self.head_width)
        query, key, value = (part(h).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.kind == "sdpa":
            dropout = self.dropout.p if self.training else 0.0
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        else:
            scores = torch.matmul(query, key.transpose(2, 3)) * self.head_width**-0.5 + bias
            mixed = torch.matmul(self.dropout(torch.softmax(scores, dim=-1)), value)
        return mixed.transpose(1, 2).reshape(*h.shape[:-1], -1)


class _Output(nn.Module):
    """Back to the residual stream: ``norm(dense(x) + h)``."""

    def __init__(self, facts: HostFacts, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, facts.hidden)
        self.LayerNorm = nn.LayerNorm(facts.hidden, eps=facts.norm_epsilon)
        self.dropout = nn.Dropout(facts.dropout)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + h)
        return out


class Layer(nn.Module):
    """Attention over the kept heads, then a feed-forward network of the kept neurons."""

    def __init__(self, facts: HostFacts, heads: int, neurons: int, attention: Attention) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": _SelfAttention(facts, heads, attention),
                "output": _Output(facts, heads * facts.head_width),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(facts.hidden, neurons)})
        self.activation = _activation(facts.activation)
        self.output = _Output(facts, neurons)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        h = self.attention["output"](self.attention["self"](h, bias), h)
        out: Tensor = self.output(self.activation(self.intermediate["dense"](h)), h)
        return out


class Embeddings(nn.Module):
    """Words, types and positions, summed in the hosts' own order, then normed."""

    def __init__(self, facts: HostFacts, rank: int | None) -> None:
        super().__init__()
        self.position_start = facts.position_start
        if rank is None:
            self.word_embeddings = nn.Embedding(facts.vocabulary, facts.word_width)
        else:
            self.word_embeddings1 = nn.Embedding(facts.vocabulary, rank)
            self.word_embeddings2 = nn.Linear(rank, facts.word_width, bias=False)
        self.position_embeddings = nn.Embedding(facts.positions, facts.word_width)
        if facts.types:
            self.token_type_embeddings = nn.Embedding(facts.types, facts.word_width)
        self.LayerNorm = nn.LayerNorm(facts.word_width, eps=facts.norm_epsilon)
        self.dropout = nn.Dropout(facts.dropout)

    def words(self, ids: Tensor) -> Tensor:
        whole = hasattr(self, "word_embeddings")
        out: Tensor = self.word_embeddings(ids) if whole else self.word_embeddings2(self.word_embeddings1(ids))
        return out

    def positions(self, ids: Tensor) -> Tensor:
        """[1,S,…], or [B,S,…] where pad tokens have no position of their own."""
        if self.position_start is None:
            return self.position_embeddings.weight[: ids.shape[1]].unsqueeze(0)
        real = ids.ne(self.position_start).long()
        out: Tensor = self.position_embeddings(torch.cumsum(real, dim=1) * real + self.position_start)
        return out

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        h = self.words(ids)
        if hasattr(self, "token_type_embeddings"):
            h = h + (self.token_type_embeddings.weight[0] if types is None else self.token_type_embeddings(types))
        out: Tensor = self.dropout(self.LayerNorm(h + self.positions(ids)))
        return out


class Pooler(nn.Module):
    """The dense layer that a head may read its ``width`` numbers through, to [B,H]."""

    def __init__(self, facts: HostFacts, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, facts.hidden)
        self.activation = _activation(facts.pooler_activation)

    def forward(self, read: Tensor) -> Tensor:
        out: Tensor = self.activation(self.dense(read))
        return out


class Highway(nn.Module):
    """The exit head after one layer, which reads ``width`` numbers of a text."""

    def __init__(self, facts: HostFacts, num_labels: int, dense: bool, width: int) -> None:
        super().__init__()
        if dense:
            self.pooler = Pooler(facts, width)
        self.classifier = nn.Linear(facts.hidden if dense else width, num_labels)
