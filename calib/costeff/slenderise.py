"""Making a model slender: in equal steps, heads and neurons leave by their importance and the word table loses rank.

Pure functions. Letters: H hidden size, a heads, f neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from calib.costeff.importance import Importance
from exporter.methods.costeff import HostFacts, SlenderShape, slenderised


def events(start: SlenderShape, target: SlenderShape, facts: HostFacts, heads_per_event: int) -> list[SlenderShape]:
    """The shapes on the way from ``start`` to ``target``, the last of which it is: all sizes go down in equal steps."""
    most = max(a - b for a, b in zip(start.heads, target.heads, strict=True))
    count = max(1, -(-most // heads_per_event))
    return [_between(start, target, facts, step / count) for step in range(1, count + 1)]


def _between(start: SlenderShape, target: SlenderShape, facts: HostFacts, share: float) -> SlenderShape:
    rank = None
    if target.embedding is not None:
        rank = _step(start.embedding or facts.word_width, target.embedding, share)
    return SlenderShape(
        heads=tuple(_step(a, b, share) for a, b in zip(start.heads, target.heads, strict=True)),
        neurons=tuple(_step(a, b, share) for a, b in zip(start.neurons, target.neurons, strict=True)),
        embedding=rank,
    )


def _step(start: int, end: int, share: float) -> int:
    return start - round((start - end) * share)


def slenderise(
    tensors: Mapping[str, Tensor], shape: SlenderShape, scores: Sequence[Importance], head_width: int
) -> dict[str, Tensor]:
    """The tensors of a model of ``shape``: the most important heads and neurons of every layer, in their old order."""
    heads = [most_important(score.heads, count) for score, count in zip(scores, shape.heads, strict=True)]
    neurons = [most_important(score.neurons, count) for score, count in zip(scores, shape.neurons, strict=True)]
    return slenderised(tensors, head_width, heads, neurons, shape.embedding)


def most_important(scores: Tensor, count: int) -> list[int]:
    """The positions of the ``count`` largest scores, ascending; of equal ones the first."""
    kept: list[int] = scores.sort(descending=True, stable=True).indices[:count].tolist()
    return sorted(kept)
