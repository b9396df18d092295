"""What the benchmark of slender families makes of data and of what ``evaluate`` says; the rest are commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.costeff import RECIPES, quick, reached, rows_of, set_aside


def test_no_row_is_in_two_parts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"text {n:03d} is a review that somebody wrote one day\t{n % 2}" for n in range(300)]
    phrase = "a review that somebody wrote\t1"  # part of every row, and too short to choose thresholds on
    (data / "train.tsv").write_text("\n".join(["sentence\tlabel", phrase, *rows]) + "\n")
    (data / "dev.tsv").write_text("sentence\tlabel\nseen never\t1\nnor this\t0\n")
    (data / "labels.txt").write_text("no\nyes\n")
    made = set_aside(data, tmp_path / "parts", quick(RECIPES["sst2"]), dev_rows=1)
    assert made == {"train": 200, "calibration": 60, "dev": 1}
    parts = {name: (tmp_path / "parts" / f"{name}.tsv").read_text().splitlines() for name in made}
    assert all(lines[0] == "sentence\tlabel" for lines in parts.values())
    assert not set(parts["train"][1:]) & set(parts["calibration"][1:]) and parts["dev"][1:] == ["seen never\t1"]
    assert not any(phrase in lines for lines in parts.values())
    assert (tmp_path / "parts" / "labels.txt").read_text() == "no\nyes\n"
    # The whole recipes leave something to choose thresholds on.
    assert all(one.rows + one.calibration <= rows for one, rows in zip(RECIPES.values(), (67349, 7000), strict=True))


def test_the_target_is_a_point_that_keeps_and_saves_enough() -> None:
    def evaluated(value: float, speedup: float) -> dict[str, Any]:
        values = {"costeff-r1-fp32": 0.9, "costeff-r4-fp32": 0.85, "costeff-r4-fp32@2x": value}
        return {
            "backbone_variant": "costeff-r1-fp32",
            "variants": [{"variant": name, "value": one} for name, one in values.items()],
            "points": {"costeff-r4-fp32@2x": {"speedup": speedup, "flops_ratio": 10.0, "histogram": [0.5, 0.5]}},
        }

    rows = rows_of(evaluated(0.88, 2.6))
    assert [row["relative_quality"] for row in rows] == [1.0, 0.85 / 0.9, 0.88 / 0.9]
    assert [row["exits_speedup"] for row in rows] == [1.0, 1.0, 2.6] and rows[2]["flops_ratio"] == 10.0
    assert reached(rows)
    assert not reached(rows_of(evaluated(0.85, 2.6))) and not reached(rows_of(evaluated(0.88, 2.4)))
