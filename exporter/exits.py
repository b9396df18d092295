"""Where to cut a model with exits: the fewest segments that keep what leaving early saves. numpy only.

Letters: N calibration rows, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Layers = npt.NDArray[np.int64]

KEPT_SAVING = 0.95
CHANGED_ANSWERS = 0.01
_STEPS = 200


def faithful_threshold(entropy: Floats, answers: Layers, changed: float = CHANGED_ANSWERS) -> float:
    """The largest entropy threshold up to which at most a share ``changed`` of the rows answers unlike the last exit.

    entropy, answers: [N,L], the exits' entropies and classes; a row leaves after the first layer below the threshold.
    """
    limit = 0.0
    rows = np.arange(len(entropy))
    for threshold in np.linspace(0, entropy.max(initial=0.0) * (1 + 1e-6), _STEPS)[1:]:
        left = _first_below(entropy, threshold)
        if np.mean(answers[rows, left] != answers[:, -1]) > changed:
            break
        limit = float(threshold)
    return limit


def choose_exits(
    entropy: Floats, threshold: float, layer_macs: Sequence[float], keep: float = KEPT_SAVING
) -> tuple[int, ...]:
    """The fewest layers, counted from 1, the last among them, whose exits save ``keep`` of what all exits save.

    entropy: [N,L]; a row leaves at the first exit whose entropy is below ``threshold``. ``layer_macs``: MACs of each
    layer, for one row. Where nothing can be saved, the last layer alone.
    """
    depth = entropy.shape[1]
    cost = np.cumsum(np.asarray(layer_macs, dtype=np.float64))
    goal = keep * (cost[-1] - _mean_cost(entropy, threshold, range(1, depth + 1), cost))
    if goal <= 0:
        return (depth,)
    share = np.bincount(_first_below(entropy, threshold), minlength=depth) / len(entropy)
    for count in range(1, depth):
        exits = _cheapest(share, cost, count)
        if cost[-1] - _mean_cost(entropy, threshold, exits, cost) >= goal * (1 - 1e-12):
            return exits
    return tuple(range(1, depth + 1))


def _first_below(entropy: Floats, threshold: float) -> Layers:
    """[N]: the first layer, from 0, below the threshold; the last where none is."""
    below = entropy < threshold
    below[:, -1] = True
    return below.argmax(axis=1)


def _mean_cost(entropy: Floats, threshold: float, exits: Sequence[int], cost: Floats) -> float:
    layers = np.array(exits) - 1
    return float(cost[layers][_first_below(entropy[:, layers], threshold)].mean())


def _cheapest(share: Floats, cost: Floats, count: int) -> tuple[int, ...]:
    """The ``count`` exits that are cheapest if a row that is sure at a layer stays so: it leaves at the next of them.

    share [L]: of the rows that are sure from this layer on; cost [L] up to a layer.
    """
    depth = len(share)
    until = np.concatenate([[0.0], np.cumsum(share)])
    # best[l]: the least cost of the rows that are sure by layer l, with an exit there; after so many exits as rounds.
    best = np.array([until[layer] * cost[layer - 1] if layer else 0.0 for layer in range(depth + 1)])
    before: list[Layers] = []
    for _ in range(count - 1):
        # total[p, l]: the last exit but one after layer p, the last after layer l.
        total = best[:, None] + (until[None, :] - until[:, None]) * np.concatenate([[0.0], cost])[None, :]
        total[~np.triu(np.ones_like(total, dtype=bool), 1)] = np.inf
        total[0] = np.inf
        before.append(total.argmin(axis=0))
        best = total.min(axis=0)
    exits = [depth]
    for previous in reversed(before):
        exits.append(int(previous[exits[-1]]))
    return tuple(reversed(exits))
