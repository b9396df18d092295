"""``build --exits auto``: the layers of a COST-EFF model where exits are worth a segment, on a user's texts.

Letters: N rows, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calib.batches import batches_by_length, collate_for, tokenise
from calib.data import Examples
from calib.progress import Progress, silent
from exporter.backbone import Backbone
from exporter.exits import choose_exits, faithful_threshold
from exporter.methods.costeff import CosteffModel, cost, exit_statistics

ROWS = 1000  # texts, at most, that are looked at
_BATCH = 32


def exit_layers(
    backbone: Backbone, model: CosteffModel, examples: Examples, *, progress: Progress = silent
) -> tuple[int, ...]:
    """The fewest exits that keep 95 % of the MACs which exits after every layer save on ``examples``.

    Rows leave below the largest entropy at which at most 1 % of them answer unlike the last exit; labels are not
    needed. Layers count from 1. MACs are those of a text of average length.
    """
    rows = tokenise(backbone, examples.sample(ROWS, seed=0), backbone.max_length)
    progress(f"choosing exits on {len(rows)} texts")
    logits = _all_logits(backbone, model, rows)
    entropy, answers = exit_statistics(logits).entropy.numpy(), logits.argmax(-1).numpy()
    length = round(sum(len(row["input_ids"]) for row in rows) / len(rows))
    macs = [cost(model, layer, layer + 1, (layer + 1,)).macs(length) for layer in range(model.facts.layers)]
    return choose_exits(entropy, faithful_threshold(entropy, answers), macs)


@torch.inference_mode()
def _all_logits(backbone: Backbone, model: CosteffModel, rows: Sequence[dict[str, object]]) -> torch.Tensor:
    """[N,L,C], rows in the order of their lengths."""
    batches = batches_by_length(rows, _BATCH, collate_for(backbone))
    return torch.cat([torch.stack(model(**batch).logits, dim=1) for batch in batches])
