"""Tables of ``inspect`` and ``verify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compexport.present import Table
from compexport.tables.naming import shown_name


def inspect_tables(manifest: Mapping[str, Any]) -> list[Table]:
    """``inspect``: the manifest in short."""
    backbone = manifest["backbone"]
    with_exits = any("exits" in variant for variant in manifest["variants"].values())
    variants = [
        (
            shown_name({"variant": name, **variant}),
            variant["ratio"],
            variant["flops_ratio"],
            variant["precision"],
            f"{variant['extra_params']:,}",
            *((", ".join(map(str, variant.get("exits", ()))) or None,) if with_exits else ()),
            ", ".join(variant["graphs"].values()),
        )
        for name, variant in manifest["variants"].items()
    ]
    engines = [
        (name, engine["graph"], engine["backend"], engine["backend_version"], engine["device"])
        for name, engine in manifest["engines"].items()
    ]
    about = f"{backbone['name']} ({backbone['architecture']}, {backbone['params']:,} parameters), {manifest['task']}"
    exits = ("exits",) if with_exits else ()
    columns = ("variant", "ratio", "FLOPs ceiling", "precision", "extra parameters", *exits, "graphs")
    return [
        Table(about, columns, variants),
        Table("engines", ("engine", "graph", "backend", "version", "device"), engines),
    ]


def target_tables(document: Mapping[str, Any]) -> list[Table]:
    """``inspect --target``: what is expected of each graph, what the real parser said, and every broken rule."""
    parser = f"parsed by TensorRT-RTX {document['parser'] or ''}".strip()
    rows = [
        (
            graph["graph"],
            ", ".join(graph["variants"]) or None,
            graph["expected"],
            _parsed(graph),
            len(graph["findings"]),
        )
        for graph in document["graphs"]
    ]
    notes = [document["parser_missing"]] if document["parser_missing"] else []
    notes += ["expected to parse: no known rule is broken; only the compiler itself, on its own machine, can tell"]
    columns = ("graph", "variants", "expected", parser, "findings")
    return [
        Table(f"checked for {document['target']}", columns, rows, [*notes, *_tied(document)]),
        *_findings_tables(document),
    ]


def _parsed(graph: Mapping[str, Any]) -> str | None:
    parsed = graph["parsed"]
    return None if parsed is None else "yes" if parsed["ok"] else "refused"


def _tied(document: Mapping[str, Any]) -> list[str]:
    """Each set of axes once, however many graphs have it; of long ones the beginning, which --json has whole."""
    ties = {(name, tuple(axes)) for graph in document["graphs"] for name, axes in graph["sizes"].items()}
    return [f"one size in every profile, {name}: {_begun(axes)}" for name, axes in sorted(ties)]


def _begun(names: Sequence[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _findings_tables(document: Mapping[str, Any]) -> list[Table]:
    found = [
        (graph["graph"], one["operator"] or None, one["node"] or None, _where(one), one["outcome"], _asks(one))
        for graph in document["graphs"]
        for one in graph["findings"]
    ]
    refused = [
        (graph["graph"], error["operator"] or None, error["node"] or None, " ".join(error["says"].split()))
        for graph in document["graphs"]
        for error in (graph["parsed"] or {"errors": ()})["errors"]
    ]
    tables = []
    if found:
        columns = ("graph", "operator", "node", "module", "outcome", "rule")
        tables.append(Table("findings", columns, found))
    if refused:
        tables.append(Table("what TensorRT-RTX said", ("graph", "operator", "node", "error"), refused))
    return tables


def _where(finding: Mapping[str, Any]) -> str | None:
    return ", in ".join(part for part in (finding["module"], finding["function"]) if part) or None


def _asks(finding: Mapping[str, Any]) -> str:
    return f"{finding['rule']}: got {finding['got']}, expected {finding['expected']} ({finding['evidence']})"


def verify_table(document: Mapping[str, Any]) -> Table:
    """``verify``: every problem found."""
    rows = [(row["file"], row["problem"]) for row in document["problems"]]
    title = f"{document['files']} files checked: " + ("all right" if document["ok"] else f"{len(rows)} problem(s)")
    return Table(title, ("file", "problem"), rows) if rows else Table(title, (), ())
