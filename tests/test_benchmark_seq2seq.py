"""What the benchmark of writing makes of what it measured; measuring itself is a command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import seq2seq, traffic


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


def test_bytes_that_are_read_are_those_of_the_matrices() -> None:
    """Of a T5 of width 4 with heads of 4 in all, networks of 10, 12 + 12 layers and 50 words; 2 + 2 at ratio 6."""
    sizes = {"d_model": 4, "d_kv": 2, "num_heads": 2, "d_ff": 10, "num_layers": 12, "vocab_size": 50}
    facts = traffic.facts_of_sizes(sizes)
    encoder, step, head = 4 * 16 + 80, 6 * 16 + 80, 200
    whole = 12 * (encoder + 2 * 16) + 3 * (12 * step + head)
    assert traffic.bytes_read(facts, traffic.Assembly.base(facts), tokens=3) == 4 * whole
    fewest = 2 * (encoder + 2 * 16) + 3 * (2 * step + head)
    assert traffic.bytes_ceiling(sizes, 6, tokens=3) == pytest.approx(whole / fewest)
    assert traffic.bytes_ceiling(sizes, 1, tokens=3) == 1.0


@pytest.mark.parametrize("name", ["t5-tiny", "bart-tiny"])
def test_sizes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    from exporter.backbone import load_seq2seq
    from exporter.methods.modular import facts_of

    counted = traffic.facts_of_sizes(seq2seq.SEQ2SEQ[name][1])
    model = facts_of(load_seq2seq(seq2seq.seq2seq(tmp_path / name, name)))
    for stack in ("encoder", "decoder"):
        assert replace(model.stack(stack), layer_params=0) == counted.stack(stack)
    assert model.vocabulary == counted.vocabulary
