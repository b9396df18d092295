"""What do fewer steps of one shared layer cost: on disk, in memory, in time; and when is a step engine the better one?

    python -m benchmarks.ode_engines [--batch 1,8] [--length 128] [--runs 15] [--work DIR] [--out FILE] [--quick]

An ALBERT of the base size, random weights, one layer run N = 12 times; n = 12, 6, 4, 3 and 1 steps, each as a graph of
its own and by the step engine:

- disk: a graph of 12 steps with the weights it reads, over one of a single step;
- memory: proportional set size (PSS) of fresh processes, n = 3, 4, 6 and 12 together over n = 12 alone, each run twice
  at length 128;
- speed: all in one process, timed in turn; and what the step engine takes over the graph made for as many steps.

Exit code 3 when a target is missed (disk <= 1.02, memory <= 1.2, realised speed-up of n = 6 and 4 >= 0.95).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory import PROCESSES, middle_of_several, pss_mb
from benchmarks.models import FFN, HIDDEN, albert
from benchmarks.record import command_line, judged, save
from compexport.latency import random_feeds, realised, rows_of
from engines.backends import ort
from engines.bundle import Bundle
from engines.manifest import ENCODER
from engines.measure import environment, interleave
from exporter import family

STEPS = 12
RATIOS = {12: 1, 6: 2, 4: 3, 3: 4, 1: 12}  # by number of steps
TOGETHER = (3, 4, 6, 12)
TIMED = (12, 6, 4, 3)
JUDGED = (6, 4)
DISK_TARGET, MEMORY_TARGET, REALISED_TARGET = 1.02, 1.2, 0.95


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.case:
        print(json.dumps(measure_case(options.work / "albert-bundle", *options.case)))
        return 0
    sizes = {"hidden": 128, "ffn": 256} if options.quick else {"hidden": HIDDEN, "ffn": FFN}
    ratios = sorted(set(RATIOS.values()) - {1})
    model = albert(options.work / "albert", **sizes)
    family.build(model, ratios, options.work / "albert-bundle", method="ode", step_engine=True)
    bundle = Bundle.open(options.work / "albert-bundle")
    disk = {str(steps): _graph_bytes(bundle, variant(steps)) for steps in RATIOS}
    memory = {kind: _memory(options, kind) for kind in ("unrolled", "step engine")}
    rows = _timed(bundle, options)
    result = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "model": f"ALBERT, one layer, {sizes['hidden']} x {sizes['ffn']}, run {STEPS} times; random weights",
        "environment": environment(),
        "graph_bytes": disk,
        "disk_ratio": disk[str(STEPS)] / disk["1"],
        "memory": memory,
        "memory_ratio": memory["unrolled"]["together"]["pss_mb"] / memory["unrolled"]["one"]["pss_mb"],
        "rows": rows,
        "realised": realised(rows, bundle.manifest),
        "step_over_unrolled": _step_over_unrolled(rows),
    }
    save(options.out, result)
    return judged(missed(result))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = command_line(__doc__, "ode_engines", work=True)
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--length", type=numbers, default=[128])
    parser.add_argument("--runs", type=int, default=15, help="at least, of each")
    parser.add_argument("--seconds", type=float, default=40.0, help="at least, per batch and length")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="per case of memory")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all of it runs")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.length, options.runs, options.seconds, options.processes = [1], [16], 3, 0.0, 1
        options.work /= "quick"  # what is there already is taken as it is, and is another model
    return options


def variant(steps: int, kind: str = "unrolled") -> str:
    """The variant of so many steps, as a graph of its own or by the step engine."""
    return f"ode-r{RATIOS[steps]}-{'step-' if kind == 'step engine' else ''}fp32"


# --- disk and memory --------------------------------------------------------------------------------------------------


def _graph_bytes(bundle: Bundle, name: str) -> int:
    """A variant's ONNX file and what it reads of the weights."""
    import onnx

    path = bundle.file(bundle.manifest.graphs[bundle.manifest.variants[name].graphs[ENCODER]].path)
    places = set()
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in entries:
            places.add((int(entries.get("offset", 0)), int(entries["length"])))
    return path.stat().st_size + sum(length for _, length in places)


def _memory(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    cases = {"one": str(STEPS), "together": ",".join(map(str, TOGETHER))}
    module, processes = "benchmarks.ode_engines", options.processes
    return {name: middle_of_several(module, options.work, kind, steps, processes) for name, steps in cases.items()}


def measure_case(bundle_path: Path, kind: str, steps: str) -> dict[str, Any]:
    """Open the variants of so many steps in this process, run each twice, and report its PSS in MB."""
    names = [variant(int(one), kind) for one in steps.split(",")]
    sessions = ort.open_sessions(Bundle.open(bundle_path), names)
    feeds = random_feeds(sessions[names[0]].inputs, 1, 128)
    for session in (*sessions.values(), *sessions.values()):
        session.run(feeds)
    return {"pss_mb": pss_mb()}


# --- speed ------------------------------------------------------------------------------------------------------------


def _timed(bundle: Bundle, options: argparse.Namespace) -> list[dict[str, Any]]:
    names = [variant(steps, kind) for steps in TIMED for kind in ("unrolled", "step engine")]
    sessions = ort.open_sessions(bundle, names)
    rows = []
    for batch in options.batch:
        for length in options.length:
            feeds = random_feeds(sessions[names[0]].inputs, batch, length)
            calls = {name: partial(session.run, feeds) for name, session in sessions.items()}
            timings = interleave(calls, min_runs=options.runs, min_seconds=options.seconds, warmup=2)
            print(batch, length, {name: round(t.p50_ms, 1) for name, t in timings.items()}, flush=True)
            rows += rows_of(batch, length, timings)
    return rows


def _step_over_unrolled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the step engine takes over the graph made for as many steps; below 1 it is the faster one."""
    times = {(row["variant"], row["batch"], row["length"]): row["p50_ms"] for row in rows}
    sizes = dict.fromkeys((row["batch"], row["length"]) for row in rows)
    return [
        {
            "steps": steps,
            "batch": batch,
            "length": length,
            "time_ratio": times[variant(steps, "step engine"), batch, length] / times[variant(steps), batch, length],
        }
        for batch, length in sizes
        for steps in TIMED
    ]


def missed(result: dict[str, Any]) -> list[str]:
    """What the targets say of disk, memory and realised speed-ups."""
    problems = []
    for what, target in (("disk_ratio", DISK_TARGET), ("memory_ratio", MEMORY_TARGET)):
        if result[what] > target:
            problems.append(f"missed: {what} {result[what]:.3f}, target {target}")
    judged = {variant(steps): steps for steps in JUDGED}
    for row in result["realised"]:
        if row["variant"] in judged and row["realised"] < REALISED_TARGET:
            where = f"{judged[row['variant']]} steps at {row['batch']} x {row['length']}"
            problems.append(f"missed: {where}: realised {row['realised']:.3f}, target {REALISED_TARGET}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
