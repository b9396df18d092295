"""Official checkpoints that say they are plain models: recognised by a field, before anything is built from them."""

from __future__ import annotations

import json
from pathlib import Path

from compexport.errors import InputError, describe

# What COST-EFF checkpoints, whose model_type is "bert", have in config.json and BERT has not.
COSTEFF_FIELD = "prun_hidden_size"


def require_plain_model(folder: Path) -> None:
    """InputError where ``folder`` is such a checkpoint; whatever else may be wrong with it is for its loader to say."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(raw, dict) and COSTEFF_FIELD in raw:
        raise InputError(
            describe(
                f"{folder}: a COST-EFF checkpoint, whatever model_type its config.json says",
                got=f"{COSTEFF_FIELD} {raw[COSTEFF_FIELD]}",
                expected="layers of full width",
                hint=f"`compexport import costeff {folder} -o OUT` makes a model folder of it",
            )
        )
