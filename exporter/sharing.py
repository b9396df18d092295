"""How a model's configuration says that its layers are one layer many times. Needs no torch.

ALBERT's are by their kind. A decoder's are by a field of ours, ``shared_layers``: how many layers in a row are the
same, group by group; the file then holds the first layer of each group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compexport.errors import InputError, describe

FIELD = "shared_layers"
DECODERS = ("gpt2",)
MODEL_TYPES = ("albert", *DECODERS)  # whose layers may be shared
CONVERTIBLE = ("bert", "gpt2")  # of which a model that shares its layers can be made
# What transformers takes where ALBERT's config.json is silent.
_ALBERT_LAYERS, _ALBERT_GROUPS = 12, 1


def iterations_of_groups(iterations: int, groups: int) -> list[int]:
    """How often ALBERT runs each group: iteration i belongs to group int(i / (iterations / groups)).

    InputError without any group.
    """
    if groups < 1:
        raise InputError(describe("config.json: num_hidden_groups", got=groups, expected="at least 1"))
    counts = [0] * groups
    for iteration in range(iterations):
        counts[int(iteration / (iterations / groups))] += 1
    return counts


def checked_groups(stated: Any, layers: int, origin: str) -> tuple[int, ...]:
    """``stated`` if it shares out ``layers``; InputError otherwise."""
    whole = isinstance(stated, list | tuple) and all(type(count) is int and count > 0 for count in stated)
    if not whole or sum(stated) != layers:
        expected = f"numbers of layers, {layers} together"
        raise InputError(describe(f"{origin}: {FIELD}", got=stated, expected=expected))
    return tuple(stated)


def may_share(folder: Path) -> bool:
    """Whether the model in ``folder`` is of a kind whose layers may be shared; False where that cannot be read."""
    return model_type_of(folder) in MODEL_TYPES


def model_type_of(folder: Path) -> str:
    """The kind of the model in ``folder``; empty where that cannot be read."""
    return str(raw_config(folder).get("model_type", ""))


def groups_of_folder(folder: Path, task: str | None = None) -> tuple[int, ...]:
    """Iterations of each group of the model in ``folder``, in the order they run.

    Read from ``config.json``; a decoder that does not state them there is loaded and its layers compared. InputError as
    the loader raises it, and for a model that shares nothing.
    """
    raw = raw_config(folder)
    try:
        if raw.get("model_type") == "albert":
            layers = int(raw.get("num_hidden_layers", _ALBERT_LAYERS))
            counts = iterations_of_groups(layers, int(raw.get("num_hidden_groups", _ALBERT_GROUPS)))
            return tuple(count for count in counts if count)
        if raw.get("model_type") in MODEL_TYPES and raw.get(FIELD) is not None and "n_layer" in raw:
            return checked_groups(raw[FIELD], int(raw["n_layer"]), f"{folder}/config.json")
    except (TypeError, ValueError):
        pass  # the loader says what is wrong
    from exporter.backbone import load_backbone
    from exporter.methods.ode import facts_of

    return facts_of(load_backbone(folder, task)).groups


def raw_config(folder: Path) -> Mapping[str, Any]:
    """``config.json`` as it stands; empty where it cannot be read."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}
