"""Measured tables of a bundle (profiles, quality): their file form, and what of them outlives a rebuild.

A table's file is exactly ``{"checksum": "<sha256>", "table": <table>}`` and a newline, where the checksum is that of
the bytes of ``<table>`` as they stand in the file. A reader in any language can check it without rewriting JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from engines.manifest import Manifest, Variant
from engines.strict_json import parse

_HEAD = b'{"checksum": "'
_MIDDLE = b'", "table": '
_TAIL = b"}\n"
_START = len(_HEAD) + 64 + len(_MIDDLE)
MAX_BYTES = 64 << 20

Table = dict[str, Any]


def encode(table: Table) -> bytes:
    """The file of a table; raises ValueError or TypeError for what strict JSON cannot hold."""
    body = json.dumps(table, indent=1, allow_nan=False, ensure_ascii=True).encode()
    data = _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    parse(data)
    return data


def decode(data: bytes) -> Table:
    """The table in a file; raises ValueError with a one-line reason when it is not what ``encode`` wrote."""
    body = data[_START : -len(_TAIL)]
    checksum = hashlib.sha256(body).hexdigest().encode()
    if data != _HEAD + checksum + _MIDDLE + body + _TAIL:
        raise ValueError("it is damaged or was edited: its checksum differs")
    table = parse(data)["table"]
    if not isinstance(table, dict):
        raise ValueError("its table is not an object")
    return table


def unchanged_variants(old: Manifest, new: Manifest) -> set[str]:
    """Names of variants whose graphs were made from exactly the same inputs in both manifests."""
    return {
        name
        for name, variant in new.variants.items()
        if name in old.variants and _graph_keys(old, old.variants[name]) == _graph_keys(new, variant)
    }


def _graph_keys(manifest: Manifest, variant: Variant) -> dict[str, str]:
    return {role: manifest.graphs[graph].key for role, graph in variant.graphs.items()}


def carried_profile(table: Table, old: Manifest, new: Manifest) -> Table | None:
    """The latencies that still hold: graph and engine of the variant unchanged. None when no row is left.

    ``realised`` compares with the backbone, so it goes as soon as a backbone variant changed.
    """
    backend = table.get("backend")
    kept = {
        name
        for name in unchanged_variants(old, new)
        if _engine_keys(old, name, backend) == _engine_keys(new, name, backend)
    }
    rows = _rows_of(table.get("rows"), kept)
    if not rows:
        return None
    backbones = {name for name, variant in old.variants.items() if variant.ratio == 1}
    realised = _rows_of(table.get("realised"), kept) if backbones <= kept else []
    return {**table, "rows": rows, **({"realised": realised} if "realised" in table else {})}


def _engine_keys(manifest: Manifest, variant: str, backend: object) -> set[tuple[str, str, str, str]]:
    graphs = set(manifest.variants[variant].graphs.values())
    return {
        (engine.graph, engine.backend, engine.device, engine.key)
        for engine in manifest.engines.values()
        if engine.graph in graphs and backend in (None, engine.backend)
    }


def _rows_of(rows: object, kept: set[str]) -> list[Any]:
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, dict) and _variant_of(row.get("variant")) in kept]


def _variant_of(name: object) -> str:
    """The variant that a row or value belongs to: of one segment's or operating point's name, what stands before."""
    return re.split("[/@]", name, maxsplit=1)[0] if isinstance(name, str) else ""


def carried_quality(table: Table, old: Manifest, new: Manifest) -> Table | None:
    """The values that still hold: graph, tokenizer, labels, task unchanged. None when nothing is left.

    Quality is read relative to the backbone's, so all of it goes when the backbone variant changed.
    """
    values = table.get("variants")
    if not isinstance(values, dict) or _reading(old) != _reading(new):
        return None
    kept = unchanged_variants(old, new)
    left = {name: value for name, value in values.items() if _variant_of(name) in kept}
    if not left or table.get("backbone_variant", next(iter(left))) not in kept:
        return None
    rows = {"rows": _rows_of(table["rows"], kept)} if "rows" in table else {}
    exits: Table = {name: _values_of(table[name], kept) for name in ("points", "exits") if name in table}
    return {**table, "variants": left, **rows, **exits}


def _values_of(section: object, kept: set[str]) -> dict[str, Any]:
    if not isinstance(section, dict):
        return {}
    return {name: value for name, value in section.items() if _variant_of(name) in kept}


def _reading(manifest: Manifest) -> tuple[object, ...]:
    """What turns text into inputs and outputs into answers, outside the graphs."""
    tokenizer = manifest.tokenizer
    content = manifest.files[tokenizer.path].sha256 if tokenizer else None
    return manifest.task, manifest.labels, manifest.label_words, manifest.pooling, tokenizer, content
