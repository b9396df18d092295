"""How much of the ideal speed-up do the engines realise, and is the backbone's own engine as fast as a stock export?

    python -m benchmarks.latency [--work DIR] [--batch 1,8] [--length 128,512] [--runs 15] [--out FILE]

A BERT of the base size, random weights, ratios 1, 2, 4, 8 and the stock ``torch.onnx.export`` of the same model in
plain ONNX Runtime, with the same session options: all in one process, timed in turn. Then ONNX Runtime's own profiler
says where each cell's time goes. Exit code 3 when a target is missed (realised >= 0.90 in every cell, stock / ratio 1
>= 1.00).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import bert_base, stock_export
from benchmarks.record import command_line, save
from compexport.latency import random_feeds, realised, rows_of
from engines.backends import ort
from engines.bundle import Bundle
from engines.measure import environment, interleave, usable_cores
from exporter import family

RATIOS = (1, 2, 4, 8)
REALISED_TARGET, STOCK_TARGET = 0.90, 1.00
STOCK_NOISE = 0.02
BACKBONE = "variator-r1-fp32"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    work = options.work
    model = bert_base(work / "bert-base")
    family.build(model, RATIOS[1:], work / "bundle", untrained=True)
    bundle = Bundle.open(work / "bundle")
    stock = ort.open_file(stock_export(model, work / "stock.onnx"), optimised=False)
    sessions = ort.open_sessions(bundle)
    rows: list[dict[str, Any]] = []
    against_stock = []
    for batch in options.batch:
        for length in options.length:
            feeds = random_feeds(sessions[BACKBONE].inputs, batch, length)
            calls = {name: partial(session.run, feeds) for name, session in sessions.items()}
            runs = options.runs if batch * length < 4096 else options.runs // 2  # seconds each, and steadier
            timings = interleave(
                {"stock": partial(stock.run, None, feeds), **calls},
                min_runs=runs,
                min_seconds=options.seconds,
                warmup=2,
            )
            print(batch, length, {name: round(t.p50_ms, 1) for name, t in timings.items()}, flush=True)
            rows += rows_of(batch, length, {name: t for name, t in timings.items() if name != "stock"})
            against_stock.append(_stock_row(batch, length, timings))
    cells = realised(rows, bundle.manifest)
    shares = [_where(bundle, batch, length) for batch in options.batch for length in options.length]
    result = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "model": "BERT-base size, random weights, sequence classification",
        "environment": environment(),
        "rows": rows,
        "realised": cells,
        "stock": against_stock,
        "where_ms": shares,
        "memory_read_gb_s": memory_read_gb_s(),
    }
    if options.keep:
        _keep(json.loads(options.out.read_text(encoding="utf-8")), result)
    save(options.out, result)
    return 3 if _missed(cells, against_stock) else 0


def _keep(earlier: dict[str, Any], result: dict[str, Any]) -> None:
    """Add the cells of ``earlier`` that ``result`` lacks."""

    def cell(row: dict[str, Any]) -> tuple[int, int]:
        return row["batch"], row["length"]

    measured = {cell(row) for row in result["stock"]}
    for table in ("rows", "realised", "stock", "where_ms"):
        kept = [row for row in earlier[table] if cell(row) not in measured]
        result[table] = sorted([*kept, *result[table]], key=cell)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = command_line(__doc__, "latency", work=True)
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--length", type=numbers, default=[128, 512])
    parser.add_argument("--runs", type=int, default=16, help="at least, of each; half of it where one takes seconds")
    parser.add_argument("--seconds", type=float, default=40.0, help="at least, per batch and length")
    parser.add_argument("--keep", action="store_true", help="keep the other cells of an earlier result")
    return parser.parse_args(arguments)


def _stock_row(batch: int, length: int, timings: dict[str, Any]) -> dict[str, Any]:
    stock, own = timings["stock"], timings[BACKBONE]
    return {
        "batch": batch,
        "length": length,
        "stock_p50_ms": stock.p50_ms,
        "stock_p99_ms": stock.p99_ms,
        "speedup": stock.p50_ms / own.p50_ms,
    }


def _missed(cells: list[dict[str, Any]], against_stock: list[dict[str, Any]]) -> bool:
    for cell in cells:
        if cell["realised"] < REALISED_TARGET:
            print(f"missed: {cell}", file=sys.stderr)
    slow = [row for row in against_stock if row["speedup"] < STOCK_TARGET - STOCK_NOISE]
    return bool(slow) or any(cell["realised"] < REALISED_TARGET for cell in cells)


def _where(bundle: Bundle, batch: int, length: int) -> dict[str, Any]:
    """Milliseconds per run and group of operators, for ratio 1 and 8: what does not shrink with its FLOPs?"""
    found: dict[str, Any] = {"batch": batch, "length": length}
    for ratio in (RATIOS[0], RATIOS[-1]):
        graph = bundle.manifest.graphs[f"r{ratio}"]
        feeds = random_feeds(graph.inputs, batch, length)
        engine = next(e for e in bundle.manifest.engines.values() if e.graph == f"r{ratio}")
        found[f"r{ratio}"] = _profile(bundle.file(engine.path), feeds, runs=4)
    return found


def memory_read_gb_s() -> float:
    """What all cores together read from memory, GB/s: the pace at which weights can arrive at best."""
    values = np.ones(2**27, dtype=np.float32)  # 0.5 GB, beyond any cache
    parts = np.array_split(values, usable_cores())
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(8):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - started)
    return values.nbytes / best / 1e9


def _profile(path: Path, feeds: dict[str, Any], runs: int) -> dict[str, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    per_node: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            per_node[event["name"]].append((_group(event), event["dur"] / 1e3))
    totals: dict[str, float] = defaultdict(float)
    for times in per_node.values():
        totals[times[0][0]] += float(np.median([ms for _, ms in times[1:]]))
    return {group: round(ms, 3) for group, ms in sorted(totals.items(), key=lambda item: -item[1])}


def _group(event: dict[str, Any]) -> str:
    """Which part of the model a node belongs to, by operator and operand shapes."""
    name = event["args"]["op_name"]
    shapes = [next(iter(entry.values())) for entry in event["args"].get("input_type_shape", [])]
    if "MatMul" in name or "Gemm" in name:
        inner = shapes[0][-1] if shapes and shapes[0] else 0
        if len(shapes) > 1 and len(shapes[1]) == 4:
            return "attention scores and context" if len(shapes[0]) == 4 and shapes[0][2] != 1 else "merge and split"
        outer = event["args"].get("output_type_shape", [{}])
        width = (next(iter(outer[0].values())) or [0])[-1] if outer and outer[0] else 0
        if (inner, width) in {(768, 3072), (3072, 768)}:
            return "FFN products"
        return "attention projections" if (inner, width) == (768, 768) else "merge and split"
    return {"Softmax": "softmax", "LayerNormalization": "norms", "Gelu": "gelu", "BiasGelu": "gelu"}.get(name, "other")


if __name__ == "__main__":
    sys.exit(main())
