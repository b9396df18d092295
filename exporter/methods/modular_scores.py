"""Attention that hands out its scores in place of its probabilities, for distilling them.

A model whose ``_attn_implementation`` is ``SCORES`` returns, where transformers would return attention probabilities,
the scores that the softmax is taken of: scaled products of queries and keys with T5's position bias, before the mask.
Its outputs are those of transformers' "eager" attention, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

SCORES = "compexport_scores"


def attention_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Queries [B,a,t,w], keys and values [B,a,n,w] -> attended [B,t,a,w] and scores [B,a,t,n]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if position_bias is not None:
        scores = scores + position_bias
    masked = scores if attention_mask is None else scores + attention_mask
    weights = nn.functional.dropout(masked.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), scores


AttentionInterface.register(SCORES, attention_with_scores)
AttentionMaskInterface.register(SCORES, eager_mask)
