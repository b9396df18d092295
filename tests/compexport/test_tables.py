"""What tables say beside their numbers."""

from __future__ import annotations

from typing import Any

from compexport.present import Table
from compexport.tables.measuring import points_table
from compexport.tables.training import ode_table


def shown(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_one_rule_that_serves_several_wishes_is_told_once() -> None:
    def point(threshold: float) -> dict[str, Any]:
        rule = {"statistic": "entropy", "mode": "per-row", "thresholds": threshold}
        return {"variant": "v", "rule": rule, "flops_ratio": 2.0, "speedup": 2.0, "value": 0.8, "drop": 0.1,
                "histogram": [0.5, 0.5]}  # fmt: skip

    points = {"v@1.5x": point(0.3), "v@2x": point(0.4), "v@3x": point(0.4), "v@4x": point(0.4)}
    document = {"metric": "accuracy", "points": points, "exits": {"v": {"layers": [1, 2]}}}
    rows = shown(points_table(document))
    assert [row["operating point"] for row in rows] == list(points)
    assert [row["threshold"] for row in rows] == ["entropy < 0.3", "entropy < 0.4", "as v@2x", "as v@2x"]


def test_training_without_effect_is_said() -> None:
    document = {
        "output": "out", "metric": "accuracy", "iterations": 4, "teacher": 0.5, "ratios": [2], "n": {"2": 2},
        "student": {"2": 0.51}, "dropped": {"2": 0.5}, "steps": 3, "seconds": 1.0, "form": "block", "held_out": 90,
        "majority": 0.5,
    }  # fmt: skip
    (note,) = [note for note in ode_table({**document, "learnt": False}).notes if "warning" in note]
    assert "nothing was learnt: the commonest answer alone has accuracy 0.5000" in note
    assert not any("warning" in note for note in ode_table({**document, "learnt": True}).notes)
