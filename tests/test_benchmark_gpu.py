"""What the GPU's benchmark makes of what it measured, and that all of it runs where there is no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_judge, gpu_kernels, page, page_gpu
from benchmarks.gpu_judge import Ceilings, bound_ms, crossover, percentiles, with_speedups
from benchmarks.gpu_kernels import KernelCell
from benchmarks.gpu_models import ModelCell

ROOT = Path(__file__).resolve().parents[1]
WHERE = {"processor": "some", "cores": 2, "system": "Linux x86_64", "versions": {}}
H200 = Ceilings({"fp16": 800.0}, 4000.0)


def test_percentiles() -> None:
    assert percentiles([float(ms) for ms in range(1, 102)]) == {"p50_ms": 51, "p95_ms": 96, "p99_ms": 100, "runs": 101}


def test_the_roofline_is_the_slower_of_two() -> None:
    assert bound_ms(4e11, 0, "fp16", H200) == pytest.approx(1.0)  # 0.8 TFLOP at 800 TFLOP/s
    assert bound_ms(4e11, 8e9, "fp16", H200) == pytest.approx(2.0)  # 8 GB at 4000 GB/s


@pytest.mark.parametrize(
    ("times", "batch"),
    [
        ({1: (1.0, 2.0), 8: (1.0, 2.0)}, 1),
        ({1: (2.0, 1.0), 8: (1.0, 2.0), 32: (1.0, 2.0)}, 8),
        ({1: (1.0, 2.0), 8: (2.0, 1.0), 32: (1.0, 2.0)}, 32),  # what is faster at 1 alone is not faster from 1 on
        ({1: (1.0, 2.0), 8: (1.0, 1.0)}, None),
        ({}, None),
    ],
)
def test_crossover(times: dict[int, tuple[float, float]], batch: int | None) -> None:
    assert crossover(times) == batch


def model_row(subject: str, batch: int = 32, p50: float = 1.0, **changes: Any) -> dict[str, Any]:
    macs = 100 / gpu_judge.ratio_of(subject)
    facts = {"part": "encoder", "model": "bert-base", "precision": "fp16", "length": 128, "what": "engine"}
    return {**facts, "batch": batch, "subject": subject, "p50_ms": p50, "p99_ms": p50, "macs": macs, **changes}


def test_speedups_are_of_the_same_engine() -> None:
    rows = [model_row("ort r1", p50=4.0), model_row("ort r4", p50=1.25), model_row("torch eager", p50=9.0)]
    rows += [model_row("trt r4", p50=1.0)]  # whose ratio 1 was not timed
    _, four, eager, alone = with_speedups(rows)
    assert (four["speedup"], four["ideal"], four["realised"]) == (3.2, 4.0, 0.8)
    assert "speedup" not in eager and "speedup" not in alone


def test_crossovers_are_against_ratio_1_and_against_the_fastest_original() -> None:
    rows = []
    for batch, own, compressed, eager, compiled in (
        (1, 1.0, 1.2, 3.0, 1.1),
        (8, 4.0, 2.0, 5.0, 1.9),
        (32, 9.0, 4.0, 9.0, 8.0),
    ):
        rows += [model_row("ort r1", batch, own), model_row("ort r4", batch, compressed)]
        rows += [model_row("torch eager", batch, eager), model_row("torch compiled", batch, compiled)]
    rows += [model_row("ort r4", 1, 0.1, what="end to end")]
    (found,) = gpu_judge.crossovers(rows)
    assert (found["subject"], found["from_batch"], found["original_from_batch"]) == ("ort r4", 8, 32)


def kernel_row(share: float, **changes: Any) -> dict[str, Any]:
    facts = {"kernel": "token_merge", "ratio": 2, "tokens": 4096, "hidden": 768, "precision": "fp16"}
    return {**facts, "share_of_copy": share, **changes}


def all_met() -> list[dict[str, Any]]:
    one, full = model_row("ort r1", 1, 0.4), model_row("ort r1", 128, 5.0)
    return [one, full, model_row("ort r4", 32, realised=0.9)]


def test_targets_that_are_met() -> None:
    # Other sizes and types are not judged, neither is a small batch.
    others = [kernel_row(0.1, tokens=128), kernel_row(0.1, precision="fp32"), kernel_row(0.1, hidden=64)]
    assert gpu_judge.missed([kernel_row(0.8), *others], [*all_met(), model_row("ort r4", 8, realised=0.1)]) == []


@pytest.mark.parametrize(
    ("kernels", "more", "said"),
    [
        ([kernel_row(0.7)], [], "missed: token_merge, ratio 2, 4096 tokens: 0.70 of a copy, target 0.8"),
        (
            [kernel_row(0.9)],
            [model_row("ort r4", 128, realised=0.8)],
            "missed: bert-base fp16, ort r4, batch 128, length 128",
        ),
        ([], [], "not measured: kernels at fp16, hidden size 768, 4096 tokens or more"),
    ],
)
def test_targets_that_are_missed(kernels: list[Any], more: list[Any], said: str) -> None:
    (line,) = gpu_judge.missed(kernels, [*all_met(), *more])
    assert line.startswith(said)


def test_times_that_are_missed() -> None:
    slow = [model_row("ort r1", 1, 0.6), model_row("ort r4", 32, realised=0.9)]
    assert gpu_judge.missed([kernel_row(0.9)], slow) == [
        "missed: bert-base fp16, length 128, batch 1: p99_ms 0.600, target 0.5",
        "not measured: bert-base fp16, length 128, batch 128",
    ]


def test_bytes_that_a_kernel_moves() -> None:
    merge = KernelCell("token_merge", 2, 2, 5, 8, "fp16")
    assert merge.moved_bytes() == 2 * (2 * 5 * 8 + 2 * 3 * 8 + 2 * 2 * 8 + 2)
    masked = KernelCell("masked_token_merge", 2, 2, 5, 8, "fp16")
    assert masked.moved_bytes() == merge.moved_bytes() + 2 * 2 * 5
    split = KernelCell("token_split", 2, 2, 5, 8, "fp32")
    tensors = 2 * 3 * 8 + 2 * (2 * 5 * 8)  # y, and x in and out
    assert split.moved_bytes() == 4 * (tensors + 64 * 16 + 64 + 8 * 64 + 8)


def test_every_cell_has_a_name_of_its_own() -> None:
    keys = [cell.key for cell in gpu_kernels.cells(False, ["fp16", "bf16"])]
    assert len(set(keys)) == len(keys) == 72


def test_a_ledger_goes_on(tmp_path: Path) -> None:
    path, facts = tmp_path / "gpu.json", {"card": "H200", "tokens": 32}
    gpu.Ledger(path, facts).add("one", [{"part": "kernels"}])
    again = gpu.Ledger(path, facts)
    again.add("two", [{"part": "encoder"}])
    assert gpu.Ledger(path, facts).of("kernels", "decoder") == [{"part": "kernels"}]
    for others in ({"card": "A100", "tokens": 32}, {"card": "H200", "tokens": 8}):
        said = (
            f"gpu.json: of card H200, tokens 32, not of card {others['card']}, tokens {others['tokens']}; name another"
        )
        with pytest.raises(SystemExit, match=said):
            gpu.Ledger(path, others)


class Measure:
    """Measures one cell, and not the other."""

    def __init__(self) -> None:
        self.skipped = {"trt": "tensorrt is missing"}

    def __enter__(self) -> Measure:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __call__(self, cell: ModelCell, ceilings: Ceilings) -> list[dict[str, Any]]:
        if cell.batch == 1:
            raise RuntimeError("out of\nmemory")
        return [model_row("ort r1", cell.batch)]


def test_a_cell_that_fails_is_left_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the script sets, to be restored afterwards
    cells = [ModelCell("encoder", "bert-base", "fp16", batch, 128) for batch in (1, 8)]
    monkeypatch.setattr(gpu, "_work", lambda options, device: [(cells, Measure)])
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--quick", "--parts", "encoder", "--work", str(tmp_path), "--out", str(out)]
    assert gpu.main(options) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [row["batch"] for row in result["rows"]] == [8]
    said = "encoder bert-base fp16 1x128: out of memory"
    assert result["not_timed"] == {"encoder bert-base fp16 1x128": said, "trt": "tensorrt is missing"}
    told = capsys.readouterr().err
    assert f"not timed: {said}\n" in told and "1 cells are left" in told


def test_weights_of_which_only_rows_are_read_do_not_count(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    from benchmarks.gpu_models import read_bytes

    table, weight = np.zeros((50, 4), np.float32), np.zeros((4, 3), np.float16)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Cast", ["x"], ["h"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "weight"], ["y"]),
    ]
    stored = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], stored)), tmp_path / "g.onnx")
    assert read_bytes(tmp_path / "g.onnx") == weight.nbytes


def run(tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """In a process of its own: without a card, Triton is imported to interpret."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", *options]
    files = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *files], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")), done.stderr


def test_the_page_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_gpu.kernels_table() == [page.NOT_MEASURED] or page.measured("gpu")
    times = {"p95_ms": 1.0, "share_of_roofline": 0.5}
    rows = [model_row("ort r1", 1, 2.0, **times), model_row("ort r4", 1, 1.0, realised=0.9, **times)]
    rows += [model_row("ort r4", 1, 9.0, length=384, **times), model_row("ort r4", 8, 9.0, **times)]
    kernel = kernel_row(0.81, ratio=4, batch=128, length=128, p50_ms=0.01, eager_p50_ms=0.2, gb_s=3500.0)
    result = {
        "environment": {"card": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "date": "2026-11-22", **WHERE},
        "ceilings": {"matmul_tflops": {"fp16": 780.4}, "copy_gb_s": 4321.0},
        "kernels": [kernel, {**kernel, "batch": 1}],
        "rows": rows,
        "crossovers": gpu_judge.crossovers(rows),
        "not_timed": {"trt": "tensorrt is missing"},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page_gpu.kernels_table()[2:] == ["| token_merge | fp16 | 10.0 | 200.0 | 3500 | 0.81 |"]
    assert page_gpu.models_table()[2:] == [
        "| bert-base fp16, 1 x 128 | ort r1 | 2.000 | 1.000 | 2.000 |  | 0.50 |",
        "| bert-base fp16, 1 x 128 | ort r4 | 1.000 | 1.000 | 1.000 | 0.90 | 0.50 |",
    ]
    assert page_gpu.crossovers_table()[2] == "| bert-base fp16, length 128 | ort r4 | 1 | none |"
    card, missing, _ = page_gpu.card_notes()
    assert card.startswith("NVIDIA H200, driver 580.1, CUDA 13.0, 2026-11-22.") and "fp16 780 TFLOP/s" in card
    assert missing == "Not timed: tensorrt is missing"


@pytest.mark.slow
def test_all_of_it_runs_without_a_card(tmp_path: Path) -> None:
    result, said = run(tmp_path, "--parts", "kernels,encoder", "--max-seconds", "0")
    assert result["rows"] == [] and re.search(r"(2|11) cells are left: run it again, it goes on", said)
    result, said = run(tmp_path, "--parts", "kernels,encoder")
    assert "nothing is judged here" in said and "are left" not in said
    subjects = [f"ort r{ratio}" for ratio in (1, 2, 4, 8)] + ["torch eager", "torch compiled"]
    for batch in (1, 2):
        for what in ("engine", "end to end"):
            rows = [row for row in result["rows"] if (row["batch"], row["what"]) == (batch, what)]
            assert [row["subject"] for row in rows] == subjects
            assert all(row["bound_ms"] > 0 and 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in rows)
    assert len(result["crossovers"]) == 3
    assert len(result["kernels"]) == (0 if "kernels" in result["not_timed"] else 9)
    assert result["environment"]["card"] == "cpu" and result["ceilings"]["copy_gb_s"] > 0
