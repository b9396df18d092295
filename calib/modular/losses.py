"""What modules learn from: labels, the base's answers, its hidden states and its attention scores, weighed alike.

Letters: B batch, S source tokens, T target tokens, Q queries, K keys, A heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.losses import hidden_error
from calib.sequences import UNLABELLED
from calib.writers import label_error
from exporter.methods.assembly import Assembly, Tiling, spans


def modular_loss(ours: Any, base: Any, assembly: Assembly, source: Tensor, labels: Tensor) -> Tensor:
    """All four losses of an assembly's observed outputs beside the base's; source mask [B,S], labels [B,T]."""
    target = (labels != UNLABELLED).to(source.dtype)
    states = states_error(ours, base, assembly, source, target)
    total = label_error(ours.logits, labels) + answer_error(ours.logits, base.logits, labels) + states
    scores = list(score_errors(ours, base, assembly, source.bool(), target.bool()))
    return total + torch.stack(scores).mean() if scores else total


def answer_error(logits: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the base's distribution of the next token, mean over the places of ``labels``."""
    asked = labels != UNLABELLED
    return F.cross_entropy(logits[asked].float(), base[asked].float().softmax(-1))


def states_error(ours: Any, base: Any, assembly: Assembly, source: Tensor, target: Tensor) -> Tensor:
    """Mean squared error after every tile against the base after the last layer that the tile stands for.

    Of both stacks alike, and in units of the base's variance there: what T5's layers hand on grows without bound.
    """

    def of(name: str, tiling: Tiling, mask: Tensor) -> Tensor:
        student, teacher = getattr(ours, name), getattr(base, name)
        ends = [0, *(start + size for start, size in spans(tiling))]
        return hidden_error(student, [(teacher[end], mask) for end in ends])

    encoder = of("encoder_hidden_states", assembly.encoder, source)
    return (encoder + of("decoder_hidden_states", assembly.decoder, target)) / 2


def score_errors(ours: Any, base: Any, assembly: Assembly, source: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Of every module's attention scores against those of its span's last layer; masks bool [B,S] and [B,T]."""
    seen = target[:, None, :, None]
    earlier = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).tril()
    pairs = (
        ("encoder_attentions", assembly.encoder, source[:, None, :, None] & source[:, None, None, :]),
        ("decoder_attentions", assembly.decoder, seen & earlier),
        ("cross_attentions", assembly.decoder, seen & source[:, None, None, :]),
    )
    for name, tiling, visible in pairs:
        student, teacher = getattr(ours, name), getattr(base, name)
        for number, (start, size) in enumerate(spans(tiling)):
            if size > 1:
                yield score_error(student[number], teacher[start + size - 1], visible)


def score_error(ours: Tensor, base: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error of scores [B,A,Q,K] where ``visible`` [B,1,Q,K], in units of the base's variance there."""
    places = visible.expand_as(base)
    count, wanted = places.sum().clamp_min(1), base.float()
    mean = (wanted * places).sum() / count
    variance = ((wanted - mean).square() * places).sum() / count
    return ((ours.float() - wanted).square() * places).sum() / count / variance.clamp_min(1e-6)
