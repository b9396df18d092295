"""Write ``docs/benchmarks.md`` from the files in ``benchmarks/results``: no figure gets there by hand.

    python -m benchmarks.report [--check]

``--check`` writes nothing and exits 1 when the page is not what the results say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.page_exits import (
    anytime_table,
    cascade_notes,
    cascade_picture,
    cascade_table,
    cascades,
    picture_name,
    slender_notes,
    slender_table,
)
from benchmarks.page_gpu import card_notes, crossovers_table, kernels_table, models_table
from benchmarks.page_modular import assemblies_notes, assemblies_table, writing_notes, writing_table
from benchmarks.page_quality import quality_notes, quality_table, tasks_notes, tasks_table
from benchmarks.page_speed import (
    build_table,
    latency_table,
    memory_pace,
    memory_table,
    selector_table,
    startup_table,
    stock_table,
    training_table,
    where_table,
)
from benchmarks.page_steps import generation_table, steps_notes, steps_quality_notes, steps_quality_table, steps_table

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "benchmarks.md"
TEXT = ROOT / "report.md"


def main(arguments: Sequence[str] | None = None) -> int:
    page = render()
    if "--check" in (sys.argv[1:] if arguments is None else arguments):
        return 0 if PAGE.read_text(encoding="utf-8") == page else 1
    PAGE.write_text(page, encoding="utf-8")
    for task, result in cascades().items():
        (PAGE.parent / picture_name(task)).write_bytes(cascade_picture(result))
    return 0


def render() -> str:
    """The page: ``report.md`` with every ``{{table name}}`` line replaced by that table."""
    lines = []
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        if line.startswith("{{") and line.endswith("}}"):
            lines += TABLES[line.strip("{}")]()
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], list[str]]] = {
    "gpu kernels": kernels_table,
    "gpu models": models_table,
    "gpu crossovers": crossovers_table,
    "gpu notes": card_notes,
    "latency": latency_table,
    "stock": stock_table,
    "where": where_table,
    "memory pace": memory_pace,
    "memory": memory_table,
    "build": build_table,
    "selector": selector_table,
    "startup": startup_table,
    "training": training_table,
    "quality": quality_table,
    "quality notes": quality_notes,
    "tasks": tasks_table,
    "tasks notes": tasks_notes,
    "slender": slender_table,
    "slender notes": slender_notes,
    "cascade": cascade_table,
    "anytime": anytime_table,
    "cascade notes": cascade_notes,
    "steps": steps_table,
    "steps notes": steps_notes,
    "generation": generation_table,
    "steps quality": steps_quality_table,
    "steps quality notes": steps_quality_notes,
    "assemblies": assemblies_table,
    "assemblies notes": assemblies_notes,
    "writing": writing_table,
    "writing notes": writing_notes,
}


if __name__ == "__main__":
    sys.exit(main())
