"""The table of each command, made from the same document that ``--json`` prints.

A ratio is never shown as a speed-up: ratio, FLOPs ceiling, measured speed-up and quality stand side by side.
"""

from __future__ import annotations

from compexport.tables.answering import answer_text, run_table, select_table
from compexport.tables.building import build_table, engines_table, export_table, import_table
from compexport.tables.inspecting import inspect_tables, target_tables, verify_table
from compexport.tables.measuring import (
    bench_table,
    evaluate_table,
    points_table,
    reading_and_writing_table,
    segments_table,
    tokens_table,
)
from compexport.tables.training import TRAIN_TABLES, train_table

__all__ = [
    "TRAIN_TABLES",
    "answer_text",
    "bench_table",
    "build_table",
    "engines_table",
    "evaluate_table",
    "export_table",
    "import_table",
    "inspect_tables",
    "points_table",
    "reading_and_writing_table",
    "run_table",
    "segments_table",
    "select_table",
    "target_tables",
    "tokens_table",
    "train_table",
    "verify_table",
]
