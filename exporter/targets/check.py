"""Whether graphs are expected to pass a compiler's parser and builder, as one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.targets import rtx, tensorrt
from exporter.targets.places import Opened, open_model
from exporter.targets.rules import FAILURES, Finding, findings


@dataclass(frozen=True)
class Candidate:
    """A graph to be checked: its key, its file, and the variants that use it."""

    graph: str
    path: Path
    variants: tuple[str, ...] = ()


def check(
    candidates: Sequence[Candidate], product: str, report: Callable[[str], object] = lambda message: None
) -> dict[str, Any]:
    """Check every graph by the rules of ``product`` and, where TensorRT-RTX is installed, by its parser.

    The document: ``ok``; ``parser``, the version that parsed, or null and ``parser_missing``; ``graphs``, each with
    ``expected``, ``findings``, ``sizes`` (names that several axes of inputs share) and ``parsed``. A graph that
    TensorRT-RTX refuses is not ok unless a rule that holds for TensorRT-RTX alone says why.
    """
    missing = rtx.unavailable()
    graphs, version = [], None
    for candidate in candidates:
        report(f"checking {candidate.graph}")
        model = open_model(candidate.path)
        parsed = None if missing else rtx.parse(candidate.path)
        version = version or (parsed.version if parsed else None)
        graphs.append(_graph(candidate, model, product, parsed))
    ok = all(graph["ok"] for graph in graphs)
    return {"target": product, "ok": ok, "parser": version, "parser_missing": missing or None, "graphs": graphs}


def _graph(candidate: Candidate, model: Opened, product: str, parsed: rtx.Parsed | None) -> dict[str, Any]:
    found = findings(tensorrt.RULES, model)
    own = [finding for finding in found if product in finding.products]
    stopping = [finding for finding in own if finding.stops]
    return {
        "graph": candidate.graph,
        "path": str(candidate.path),
        "variants": list(candidate.variants),
        "opset": model.opset,
        "nodes": len(model.places),
        "ok": not stopping and (parsed is None or parsed.ok or _explained(found, product)),
        "expected": _expected(stopping),
        "findings": [asdict(finding) for finding in own],
        "sizes": tensorrt.tied_sizes(model),
        "parsed": asdict(parsed) if parsed else None,
    }


def _explained(found: Sequence[Finding], product: str) -> bool:
    """Whether a rule says why TensorRT-RTX refuses what ``product`` is expected to take."""
    return any(
        tensorrt.TENSORRT_RTX in finding.products and product not in finding.products and finding.stops
        for finding in found
    )


def _expected(stopping: Sequence[Finding]) -> str:
    """The earliest way to fail; "to parse" where there is none."""
    outcomes = {finding.outcome for finding in stopping}
    return next((f"to be {outcome}" for outcome in FAILURES if outcome in outcomes), "to parse")
