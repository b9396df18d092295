"""``compexport build --exits``: the layers at which a COST-EFF family's segments end, as asked, or chosen on data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compexport.errors import InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples
    from exporter.checkpoint import MethodCheckpoint

AUTO = "auto"


def given_exits(model: str | Path, exits: Sequence[float], ratios: Sequence[float]) -> dict[float, tuple[int, ...]]:
    """The same checked exits for all ratios; InputError as ``checked_exits``."""
    from exporter.plans.costeff import CosteffPlan, checked_exits

    checked = checked_exits(exits, CosteffPlan(Path(model), (1,)).depth)
    return dict.fromkeys((1, *ratios), checked)


def chosen_exits(
    model: str | Path,
    checkpoint: MethodCheckpoint | None,
    ratios: Sequence[float],
    examples: Examples,
    progress: Progress,
) -> dict[float, tuple[int, ...]]:
    """For each trained ratio, the exits that are worth a segment on ``examples``; InputError if there is none."""
    from calib.exit_layers import exit_layers
    from exporter.backbone import load_backbone
    from exporter.methods.costeff_checkpoint import load_model

    there = checkpoint.ratios if checkpoint is not None else []
    trained = sorted({1, *ratios} & set(there))
    if checkpoint is None or not trained:
        what = f"{model}: exits can only be chosen for trained models"
        raise InputError(describe(what, got="none", expected="a model trained by `compexport train costeff`"))
    backbone = load_backbone(model)
    chosen = {}
    for ratio in trained:
        found = load_model(checkpoint, backbone, ratio)
        chosen[ratio] = exit_layers(backbone, found, examples, progress=progress)
        progress(f"ratio {ratio}: exits after layers {', '.join(map(str, chosen[ratio]))}")
    return chosen
