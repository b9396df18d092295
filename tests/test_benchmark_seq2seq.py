"""What the benchmark of writing makes of what it measured; measuring itself is a command."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import seq2seq


def result(pytorch: float = 40.0, optimum: float = 30.0, half: float = 11.0) -> dict[str, Any]:
    took = {"engines 1": 20.0, "engines 2": half, "pytorch": pytorch, "optimum 1": optimum, "optimum 2": 12.0}
    macs, same = {1: 1000, 2: 500}, {"pytorch": 1.0, "optimum 1": 1.0, "optimum 2": 0.5}
    rows = [{"model": "t5", "batch": 1, **seq2seq._row(ratio, took, macs, same)} for ratio in (1, 2)]
    return {"targets": seq2seq.TARGETS, "rows": rows}


def test_a_row() -> None:
    one, two = result()["rows"]
    assert (one["speedup"], one["ceiling"], one["times_pytorch"], one["times_optimum"]) == (1, 1, 2, 1.5)
    assert two["realised"] == pytest.approx(20 / 11 / 2) and two["same_as_optimum"] == 0.5
    assert "times_pytorch" not in two  # it writes at ratio 1 alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"pytorch": 38.0}, ["missed: t5, batch 1, ratio 1: pytorch 1.90, target 2.0"]),
        ({"optimum": 25.0}, ["missed: t5, batch 1, ratio 1: optimum 1.25, target 1.3"]),
        ({"half": 12.0}, ["missed: t5, batch 1, ratio 2: realised 0.83, target 0.9"]),
    ],
)
def test_targets(changes: dict[str, float], said: list[str]) -> None:
    assert seq2seq.missed(result(**changes)) == said


def test_who_writes_other_tokens_is_told_from_who_writes_fewer() -> None:
    calls = {"engines 1": lambda: [[1, 2, 3, 4]], "pytorch": lambda: [[1, 2, 3, 5]]}
    assert seq2seq._agreement(calls) == {"engines 1": 1.0, "pytorch": 0.75}
    with pytest.raises(SystemExit, match=r"pytorch wrote \(1, 3\) tokens, expected \(1, 4\)"):
        seq2seq._agreement({**calls, "pytorch": lambda: [[1, 2, 3]]})
