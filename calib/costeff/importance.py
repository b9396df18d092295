"""How much each attention head and each neuron matters, to first order: |weight| · |gradient|, summed.

Letters: H hidden size, a heads, w width of one head, f neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAYER = "bert.encoder.layer."
HEADS_OUT = "attention.output.dense.weight"  # [H, a·w]
NEURONS_IN = "intermediate.dense.weight"  # [f, H]
NEURONS_OUT = "output.dense.weight"  # [H, f]


@dataclass(frozen=True)
class Importance:
    """Scores of one layer: ``heads`` [a], ``neurons`` [f]."""

    heads: Tensor
    neurons: Tensor


def gradient_sums(weights: Mapping[str, Tensor], losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """The absolute gradient of every weight, summed over batches; each loss is called once."""
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for loss in losses:
        found = torch.autograd.grad(loss(), list(weights.values()))
        for total, gradient in zip(sums.values(), found, strict=True):
            total += gradient.abs()
    return sums


def scored_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, of a model's tensors, by which heads and neurons are scored."""
    endings = (HEADS_OUT, NEURONS_IN, NEURONS_OUT)
    return {name: one for name, one in tensors.items() if name.startswith(LAYER) and name.endswith(endings)}


def importance(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], head_size: int) -> list[Importance]:
    """The scores of all layers, from weights and their summed absolute gradients."""
    score = {name: weights[name].detach().float().abs() * gradients[name] for name in weights}
    layers = sum(name.endswith(NEURONS_IN) for name in weights)
    return [
        Importance(
            heads=score[f"{LAYER}{layer}.{HEADS_OUT}"].sum(0).view(-1, head_size).sum(1),
            neurons=score[f"{LAYER}{layer}.{NEURONS_IN}"].sum(1) + score[f"{LAYER}{layer}.{NEURONS_OUT}"].sum(0),
        )
        for layer in range(layers)
    ]
