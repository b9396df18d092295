"""What a method checkpoint holds of a model that is run in steps: the steps of each ratio, and exit heads.

One set of weights gives every ratio, so a ratio has a file of its own only if it has exit heads. A folder without
``compexport.json`` is complete: even steps, sublayer form. ``settings``: ``form``, ``steps`` by ratio (a list of dt per
group), ``exits`` by ratio (the steps after which heads answer), and the record of the training.
"""

from __future__ import annotations

from exporter.checkpoint import MethodCheckpoint
from exporter.methods.ode_exits import ExitHeads
from exporter.methods.ode_stepping import OdeFacts, described_stepping


def load_exits(checkpoint: MethodCheckpoint | None, facts: OdeFacts, num_labels: int, ratio: float) -> ExitHeads | None:
    """The heads of one ratio, in eval mode; None where it has none. InputError for tensors that do not fit."""
    if checkpoint is None or ratio not in checkpoint.files:
        return None
    origin = str(checkpoint.folder / checkpoint.files[ratio])
    n = described_stepping(checkpoint, facts.groups, ratio).n
    heads = ExitHeads.from_tensors(checkpoint.load(ratio), n, facts.hidden, num_labels, origin)
    return heads.requires_grad_(False)
