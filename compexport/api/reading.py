"""The texts that a verb is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compexport.api.options import Columns
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples


def read_examples(
    data: str | Path, split: str, columns: Columns, progress: Progress, limit: int | None = None
) -> Examples:
    """The examples of a file or folder, after saying which columns were taken."""
    from calib import data as reading

    progress(f"reading {data}")
    examples = reading.read(
        data,
        split,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        target=columns.target,
        limit=limit,
    )
    progress(f"{len(examples)} texts of {examples.origin} ({examples.columns_chosen})")
    return examples
