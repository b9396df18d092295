"""What does a family cost to build, compared with exporting one model?

    python -m benchmarks.build_time [--work DIR] [--rounds 2] [--out FILE]

BERT-base size. In turn, each in a fresh process: ratio 1 alone, ratios 1 2 4 8, and the same again with nothing
changed. Ratio 1 alone counts twice: up to its checked graph ("export and check"), and with its engine. Exit code 3
when a target is missed (family / export and check of ratio 1 <= 1.8, nothing changed <= 2 s).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.models import bert_base
from benchmarks.record import command_line, save

FAMILY_TARGET, UNCHANGED_TARGET_S = 1.8, 2.0


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "build_time", work=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--build", nargs=2, metavar=("RATIOS", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = options.work
    if options.build:
        print(json.dumps(build(work / "bert-base", *options.build)))
        return 0
    bert_base(work / "bert-base")
    rounds = [_round(work) for _ in range(options.rounds)]
    result = _summary(rounds)
    save(options.out, result)
    print(json.dumps(result, indent=1))
    met = result["family_over_export_and_check"] <= FAMILY_TARGET
    return 0 if met and result["unchanged_s"] <= UNCHANGED_TARGET_S else 3


def build(model: Path, ratios: str, output: str) -> dict[str, float]:
    """Seconds to the first engine and in all; ``ratios`` "1" or "1,2,4,8"."""
    from exporter import family

    started = time.perf_counter()
    marks: dict[str, float] = {}

    def progress(message: str, done: float | None = None, total: float | None = None) -> None:
        if message.startswith("optimising"):
            marks.setdefault("checked_s", time.perf_counter() - started)

    family.build(model, [int(r) for r in ratios.split(",") if r != "1"], output, untrained=True, progress=progress)
    return {**marks, "total_s": time.perf_counter() - started}


def _round(work: Path) -> dict[str, dict[str, float]]:
    outputs = {"one": work / "build-one", "family": work / "build-family"}
    for path in outputs.values():
        shutil.rmtree(path, ignore_errors=True)
    return {
        "one": _in_fresh_process(work, "1", outputs["one"]),
        "family": _in_fresh_process(work, "1,2,4,8", outputs["family"]),
        "unchanged": _in_fresh_process(work, "1,2,4,8", outputs["family"]),
    }


def _in_fresh_process(work: Path, ratios: str, output: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.build_time", "--work", str(work), "--build", ratios, str(output)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process_s": time.perf_counter() - started}


def _summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    from engines.measure import environment

    def median(case: str, key: str) -> float:
        return statistics.median(entry[case][key] for entry in rounds)

    family_s = median("family", "total_s")
    return {
        "model": "BERT-base size, random weights",
        "environment": environment(),
        "rounds": rounds,
        "family_over_export_and_check": family_s / median("one", "checked_s"),
        "family_graphs_over_export_and_check": median("family", "checked_s") / median("one", "checked_s"),
        "family_over_one_whole_build": family_s / median("one", "total_s"),
        "unchanged_s": median("unchanged", "process_s"),
    }


if __name__ == "__main__":
    sys.exit(main())
