"""What the benchmark of fewer steps makes of two training records; the rest are commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.ode import QUICK_ROWS, RECIPES, _beginning, missed, quick, rows_of


def record(half: float, third: float) -> dict[str, Any]:
    forms = {"block": {"2": 0.7, "3": 0.1}, "sublayer": {"2": half, "3": third}}
    dropped = {"2": 0.6, "3": 0.5}
    return {
        "iterations": 12,
        "ratios": [2, 3],
        "n": {"2": 6, "3": 4},
        "teacher": 0.8,
        "student": forms["sublayer"],
        "forms": forms,
        "dropped": dropped,
    }


def test_rows_name_what_is_lost_against_all_iterations() -> None:
    rows = rows_of("randomised", record(0.796, 0.78))
    assert [row["n"] for row in rows] == [12, 6, 4]
    assert rows[0]["block"] == rows[0]["sublayer"] == rows[0]["dropped"] == 0.8
    assert rows[1]["dropped"] == 0.6 and rows[2]["block"] == 0.1
    assert [row["relative_drop"] for row in rows] == pytest.approx([0.0, 0.005, 0.025])


def test_the_targets_are_those_of_the_model_that_was_trained_for_it() -> None:
    assert missed(rows_of("randomised", record(0.796, 0.78))) == []
    assert missed(rows_of("randomised", record(0.79, 0.77))) == ["n = 6: lost 1.25%", "n = 4: lost 3.75%"]
    assert missed(rows_of("ordinary", record(0.5, 0.4))) == []


def test_a_quick_run_reads_few_rows(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("\n".join(["sentence\tlabel", *(f"text {n}\t{n % 2}" for n in range(300))]) + "\n")
    made = _beginning(data, tmp_path / "parts")
    assert all(len((made / name).read_text().splitlines()) == QUICK_ROWS for name in ("train.tsv", "dev.tsv"))
    assert quick(RECIPES["agnews"]).then.steps == 3 and quick(RECIPES["agnews"]).shared == RECIPES["agnews"].shared
