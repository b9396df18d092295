"""Tables of ``build``, ``import`` and ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compexport.present import Table
from compexport.tables.naming import percent, shown_name


def build_table(document: Mapping[str, Any]) -> Table:
    """``build``: what was made, how it compares in cost, and how far it is from PyTorch."""
    columns = ("variant", "ratio", "FLOPs ceiling", "parameters", "max |difference|", "state")
    rows = [
        (
            shown_name(row),
            row["ratio"],
            row["flops_ratio"],
            f"{row['params']:,}",
            f"{row['parity_max_abs']:.1e}",
            "reused" if row["reused"] else "built",
        )
        for row in document["variants"]
    ]
    return Table(f"{document['bundle']}: built in {document['seconds']:.1f} s", columns, rows)


def engines_table(document: Mapping[str, Any]) -> Table:
    """``build`` for TensorRT: every engine of the bundle, for which device, and how large its file is."""
    columns = ("graph", "backend", "version", "device", "MiB")
    rows = [
        (row["graph"], row["backend"], row["version"], row["device"], row["size_bytes"] / 2**20)
        for row in document["engines"]
    ]
    return Table(f"{document['bundle']}: engines", columns, rows)


def import_table(document: Mapping[str, Any]) -> Table:
    """``import``: what the file added to the model, and what its backbone is made of."""
    if document["method"] == "costeff":
        return _slender_table(document)
    if document["method"] == "theseus":
        return _successors_table(document)
    ratio = document["ratio"]
    rows = [] if ratio is None else [(ratio, f"{document['extra_params']:,}", percent(document["extra_params_share"]))]
    source = "this file" if document["backbone_from_file"] else document["backbone"]
    notes = [f"backbone from {source}; ratios there now: {', '.join(map(str, document['ratios'])) or 'none'}"]
    if document["lora"]:
        notes.append(f"LoRA updates merged into {document['lora']} matrices")
    title = f"{document['output']}: {document['tensors']} tensors imported"
    return Table(title, ("ratio", "extra parameters", "share") if rows else (), rows, notes)


def _slender_table(document: Mapping[str, Any]) -> Table:
    """``import costeff``: the size of the model beside its teacher's."""
    rows = [(document["ratio"], f"{document['params']:,}", percent(document["params_share"]))]
    there = f"ratios there now: {', '.join(map(str, document['ratios']))}"
    made = "the backbone is this model at full width: name its teacher with --backbone to compare with that"
    notes = [f"{made}; {there}" if document["backbone_from_file"] else f"backbone from {document['backbone']}; {there}"]
    title = f"{document['output']}: {document['tensors']} tensors imported"
    return Table(title, ("ratio", "parameters", "of the backbone's"), rows, notes)


def _successors_table(document: Mapping[str, Any]) -> Table:
    """``import theseus``: the size of the plain model."""
    rows = [(document["layers"], document["replaced"], f"{document['params']:,}")]
    notes = [f"a plain model for {document['task']}: build it, or compress it further"]
    title = f"{document['output']}: {document['tensors']} tensors imported"
    return Table(title, ("layers", "replaced", "parameters"), rows, notes)


def export_table(document: Mapping[str, Any]) -> Table:
    """``export``: which variant, and where it is now."""
    size = f"{document['size_bytes'] / 1e6:.1f} MB"
    title = f"{document['output']}: {document['variant']}, {size}: {', '.join(document['files'])}"
    return Table(title, (), [], [])
