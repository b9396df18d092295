"""The ``config.json`` of an official COST-EFF checkpoint: what it says, checked, and the same host at full width.

Source: the official code of COST-EFF (arXiv 2210.15523). ``model_type`` says "bert", ``num_attention_heads`` counts the
kept heads, ``hidden_size`` and ``intermediate_size`` are those of the BERT that was made slender.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compexport.errors import InputError, describe
from exporter.importers.folder import OF_A_RUN
from exporter.methods.slender import HostFacts
from exporter.official import COSTEFF_FIELD

# Fields that BERT's configuration has not, and what the official code takes them for where they are missing.
_OWN_FIELDS = {
    COSTEFF_FIELD: None,
    "prun_intermediate_size": None,
    "emb_hidden_dim": -1,
    "head_to_distill": None,
    "hidden_mode": "concat",
    "pooling_mode": "cls",
    "last_n_hidden": 1,
    "pooler_dense": False,
    "return_grad": False,
}
_SIZES = (
    COSTEFF_FIELD,
    "prun_intermediate_size",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
)


@dataclass(frozen=True)
class OfficialConfig:
    """``heads``, ``neurons``, ``rank`` (None: one whole table) are the kept ones, in every layer alike.

    ``full_width`` is the document of the BERT that the host was, ``facts`` the same as the method reads it.
    ``kept_heads``: per layer, which heads of that BERT were kept, where the file tells.
    """

    facts: HostFacts
    full_width: dict[str, Any]
    heads: int
    neurons: int
    rank: int | None
    pooler_dense: bool
    labels: list[str]
    kept_heads: list[list[int]] | None


def read_official_config(folder: Path) -> OfficialConfig:
    """Read ``folder/config.json``; InputError if it is missing, not COST-EFF's, or not in its published setting."""
    path = folder / "config.json"
    raw = _read(path)
    if COSTEFF_FIELD not in raw:
        got = f"a configuration of {raw.get('model_type', 'nothing')!r} without {COSTEFF_FIELD}"
        raise InputError(describe(f"{path}: no COST-EFF checkpoint", got=got, expected=COSTEFF_FIELD))
    sizes = {name: _size(path, raw, name) for name in _SIZES}
    own = {name: raw.get(name, default) for name, default in _OWN_FIELDS.items()}
    _require_published_pooling(path, own)
    full_heads = _full_heads(path, sizes)
    full_width = {
        **{name: value for name, value in raw.items() if name not in (*_OWN_FIELDS, *OF_A_RUN)},
        "architectures": ["BertForSequenceClassification"],
        "num_attention_heads": full_heads,
        "dtype": "float32",
    }
    config, labels = _bert_config(path, full_width)
    rank = own["emb_hidden_dim"]
    return OfficialConfig(
        facts=HostFacts.of(config),
        full_width=full_width,
        heads=sizes["num_attention_heads"],
        neurons=sizes["prun_intermediate_size"],
        rank=None if rank == -1 else _size(path, raw, "emb_hidden_dim"),
        pooler_dense=bool(own["pooler_dense"]),
        labels=labels,
        kept_heads=_kept_heads(own["head_to_distill"], sizes, full_heads),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent
        found = "no config.json in it" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        expected = "the folder that the official code wrote (config.json, pytorch_model.bin, vocab.txt)"
        raise InputError(describe(f"{folder}: no COST-EFF checkpoint", got=found, expected=expected))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(describe(f"{path}: unreadable", got=error, expected="JSON")) from error
    if not isinstance(raw, dict):
        raise InputError(describe(f"{path}: no model's", got=raw, expected="an object"))
    return raw


def _size(path: Path, raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            describe(
                f"{path}: {name}", got="nothing" if value is None else value, expected="a whole number of at least 1"
            )
        )
    return value


def _require_published_pooling(path: Path, own: Mapping[str, Any]) -> None:
    """The general code can also join or average several states, or pool over padding; no published run does."""
    if own["pooler_dense"]:
        return
    expected = {"pooling_mode": "cls", "last_n_hidden": 1}
    for name, value in expected.items():
        if own[name] != value:
            raise InputError(describe(f"{path}: {name}", got=own[name], expected=f"{value}, the published setting"))


def _full_heads(path: Path, sizes: Mapping[str, int]) -> int:
    """Heads at full width: the width of one head never changes."""
    kept, together, hidden = sizes["num_attention_heads"], sizes[COSTEFF_FIELD], sizes["hidden_size"]
    width = together // kept
    if together % kept or hidden % width or together > hidden:
        what = f"{path}: {COSTEFF_FIELD} of {kept} heads"
        raise InputError(describe(what, got=together, expected=f"{kept} x a head width that divides {hidden}"))
    return hidden // width


def _bert_config(path: Path, document: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """As transformers reads it, and the names of the labels."""
    from transformers import BertConfig

    if document.get("model_type") != "bert":
        raise InputError(describe(f"{path}: model_type", got=document.get("model_type"), expected="bert"))
    try:
        config = BertConfig.from_dict(dict(document))
        return config, [str(config.id2label[i]) for i in range(config.num_labels)]
    except Exception as error:  # a class of its own for every field
        got = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(describe(f"{path}: unreadable", got=got)) from error


def _kept_heads(found: Any, sizes: Mapping[str, int], full_heads: int) -> list[list[int]] | None:
    """The lists where they describe these very heads; the official default is that of BERT-base whatever the size."""
    if not isinstance(found, list) or len(found) != sizes["num_hidden_layers"]:
        return None
    for row in found:
        whole = isinstance(row, list) and all(isinstance(head, int) and 0 <= head < full_heads for head in row)
        if not whole or len(row) != sizes["num_attention_heads"]:
            return None
    return found
