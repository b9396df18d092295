"""What the parts of ``docs/benchmarks.md`` are written with: result files and Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "Not measured yet: no figure."

Result = dict[str, Any]


def measured(name: str) -> bool:
    """Whether there is such a result file."""
    return (RESULTS / f"{name}.json").exists()


def load(name: str) -> Result:
    """One result file."""
    found: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; numbers to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    return [
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if index == 0 else "---:" for index in range(len(header))) + "|",
        *("| " + " | ".join(row) + " |" for row in body),
    ]


def environment_line(name: str) -> list[str]:
    """Where a result was measured, in one line."""
    where = load(name)["environment"]
    versions = ", ".join(f"{library} {version}" for library, version in where["versions"].items())
    return [f"Measured on {where['processor']}, {where['cores']} cores, {where['system']}; {versions}."]


def ratio_of(variant: str) -> str:
    """The ratio in a variant's name."""
    return variant.split("-r")[1].split("-")[0]
