"""One decoder pass over a short prefix: causal masks, and cross-attention that never makes keys and values.

Letters: B batch, S encoder length, P prefix length, H hidden size, a heads, w head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporter.precision import lowest


def causal(length: int, like: Tensor) -> Tensor:
    """Additive mask [P,P] in the dtype of ``like``: a position sees itself and those before it."""
    return torch.full((length, length), lowest(like.dtype), dtype=like.dtype, device=like.device).triu(1)


def cross_attend(query: Tensor, h: Tensor, bias: Tensor, keys: nn.Linear, values: nn.Linear, heads: int) -> Tensor:
    """Attention of a few queries [B or 1,P,a*w] to encoder states h [B,S,H]; bias [B,1,S] is additive -> [B,P,a*w].

    ``keys`` and ``values`` are applied to the queries and to the attended sums instead of to all S states, which gives
    the same by associativity and costs 2*a*P*H products per state instead of 2*a*w*H. The keys' bias moves all scores
    of a query alike, so it has no effect; the values' bias passes through weights that sum to 1.
    """
    split = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    asked = torch.matmul(split, keys.weight.unflatten(0, (heads, -1)))
    scores = torch.matmul(asked.flatten(1, 2), h.transpose(1, 2)) + bias
    sums = torch.matmul(scores.softmax(-1), h).unflatten(1, (heads, -1))
    attended = torch.matmul(sums, values.weight.unflatten(0, (heads, -1)).transpose(1, 2))
    joined = attended.transpose(1, 2).flatten(2)
    return joined if values.bias is None else joined + values.bias
