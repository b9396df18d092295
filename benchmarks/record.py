"""What every benchmark's command line and record have in common."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


def command_line(doc: str | None, result: str, *, work: bool = False) -> argparse.ArgumentParser:
    """A parser with ``--out`` and, where models are made, ``--work``; the module's ``doc`` is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if work:
        shared = Path(tempfile.gettempdir()) / "compexport-latency"
        parser.add_argument("--work", type=Path, default=shared, help="models and bundles, kept for the next run")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{result}.json")
    return parser


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
