"""Reading ``manifest.json``: format version first, then strict JSON, schema, names, paths, references."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator
from typing import Any

from pydantic import ValidationError

from engines.bundle_paths import MANIFEST, FileFault, check_listed, shown, unsafe_reason
from engines.manifest import FORMAT, Manifest
from engines.strict_json import parse

MAX_BYTES = 8 << 20


def seal_of(raw: bytes) -> bytes:
    """What ``manifest.sha256`` must hold for a manifest: the line that ``sha256sum -c`` reads."""
    return f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n".encode()


def parse_manifest(raw: bytes) -> Manifest:
    """The checked manifest; raises FileFault. The seal is the caller's to compare."""
    if len(raw) > MAX_BYTES:
        raise FileFault(MANIFEST, f"is larger than {MAX_BYTES} bytes")
    try:
        value = parse(raw)
    except ValueError as error:
        raise FileFault(MANIFEST, f"cannot be read: {error}") from None
    _check_format(value)
    try:
        manifest = Manifest.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise FileFault(MANIFEST, f"is not valid: {_first(error)}") from None
    check_listed(manifest.files)
    _check_names(manifest)
    for owner, path in _references(manifest):
        _check_reference(owner, path, manifest.files)
    for name, engine in manifest.engines.items():
        # What a backend opens may also be the folder that its files are in.
        folders = {rel[: at.start()] for rel in engine.files for at in re.finditer("/", rel)}
        _check_reference(f"engine {name}", engine.path, {*manifest.files, *folders})
    return manifest


def _check_format(value: Any) -> None:
    version = value.get("format") if isinstance(value, dict) else None
    if type(version) is not int or version < 1:
        raise FileFault(MANIFEST, "has no bundle format version: this folder is not a bundle")
    if version > FORMAT:
        raise FileFault(
            MANIFEST, f"has bundle format {version}, this version reads up to {FORMAT}: upgrade compexport to read it"
        )


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in detail["loc"])
    message = shown(detail["msg"].removeprefix("Value error, "))
    return f"{shown(where)}: {message}" if where else message


def _check_names(manifest: Manifest) -> None:
    for kind, names in (("variant", manifest.variants), ("graph", manifest.graphs), ("engine", manifest.engines)):
        for name in names:
            if not name or not name.isprintable() or len(name) > 200:
                raise FileFault(MANIFEST, f"has a {kind} with a name that cannot be shown: {shown(ascii(name))}")
    for name in manifest.graphs:
        if set(name) & set("/\\:"):  # an engine's file is named after its graph
            raise FileFault(MANIFEST, f"has a graph with a name that is no file's: {shown(name)}")
    graphs = [(f"variant {name}", graph) for name, v in manifest.variants.items() for graph in v.graphs.values()]
    graphs += [(f"engine {name}", engine.graph) for name, engine in manifest.engines.items()]
    for owner, graph in graphs:
        if graph not in manifest.graphs:
            raise FileFault(MANIFEST, f"{owner} needs the graph {shown(graph)}, which is not there")


def _references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, graph in manifest.graphs.items():
        yield f"graph {name}", graph.path
    for name, engine in manifest.engines.items():
        for path in engine.files:
            yield f"engine {name}", path
    if manifest.tokenizer:
        yield "the tokenizer", manifest.tokenizer.path


def _check_reference(owner: str, path: str, allowed: Container[str]) -> None:
    if reason := unsafe_reason(path):
        raise FileFault(MANIFEST, f"{owner} names the file {shown(path)}, which is not allowed: {reason}")
    if path not in allowed:
        raise FileFault(MANIFEST, f"{owner} names the file {shown(path)}, which is not in its list of files")
