"""How long does choosing a variant take? Warm, in Python, four variants, live correction included.

    python -m benchmarks.selector [--decisions 20000] [--out benchmarks/results/selector.json]

Two cases: a shape (batch, length) seen before, as nearly all are in service, and one never seen. Every decision is
timed on its own with the garbage collector as the user has it; the clock's own cost is measured and recorded, not
subtracted. Exit code 3 when a seen shape misses the target (median 20 us, p99 50 us).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from benchmarks.record import command_line, save
from engines.measure import environment
from engines.profile import Profile
from engines.selector import Correction, Decision, Quality, select

TARGET_P50_US = 20.0
TARGET_P99_US = 50.0
RATIOS = {"variator-r1-fp32": 1.0, "variator-r2-fp32": 2.0, "variator-r4-fp32": 4.0, "variator-r8-fp32": 8.0}
QUALITY = {"variator-r1-fp32": 1.0, "variator-r2-fp32": 0.96, "variator-r4-fp32": 0.9, "variator-r8-fp32": 0.83}
SPEEDUP = {1.0: 1.0, 2.0: 1.35, 4.0: 1.65, 8.0: 1.85}


def example_profile() -> Profile:
    """A grid of 3 batches x 4 lengths with times of the size a small encoder has on a CPU."""
    rows = [
        {"variant": name, "batch": b, "length": s, "p50_ms": ms, "p99_ms": 1.2 * ms, "runs": 50}
        for name, ratio in RATIOS.items()
        for b in (1, 8, 32)
        for s in (16, 32, 128, 512)
        for ms in [(0.5 + 0.02 * b * s) / SPEEDUP[ratio]]
    ]
    return Profile.from_table({"device": "example", "backend": "ort", "threads": 2, "rows": rows})


def busy_correction() -> Correction:
    """One that has seen every variant, so that no short cut is taken."""
    correction = Correction()
    for name in RATIOS:
        correction.observe(name, 1.1, 1.0)
    return correction


def times_us(decide: Callable[[int], object], decisions: int) -> list[float]:
    """The time of every single call, in microseconds, sorted."""
    for number in range(decisions // 10):
        decide(number)
    times = []
    for number in range(decisions):
        started = perf_counter_ns()
        decide(number)
        times.append((perf_counter_ns() - started) / 1000.0)
    return sorted(times)


def summary(times: list[float]) -> dict[str, float]:
    return {
        "p50_us": round(times[len(times) // 2], 3),
        "p99_us": round(times[int(len(times) * 0.99)], 3),
        "max_us": round(times[-1], 3),
        "decisions": len(times),
    }


def measure(decisions: int) -> dict[str, Any]:
    """All cases, with the environment."""
    quality, correction = Quality(RATIOS, QUALITY), busy_correction()
    draw = random.Random(0)
    # From a budget that nothing meets to one that everything meets.
    requests = [(draw.randint(1, 32), draw.randint(8, 512), draw.uniform(0.1, 400.0)) for _ in range(1000)]
    seen, unseen = example_profile(), example_profile()

    def choose(profile: Profile, number: int) -> Decision:
        batch, length, budget_ms = requests[number % len(requests)]
        return select(profile, quality, correction, batch=batch, length=length, budget_ms=budget_ms, waited_ms=0.05)

    def choose_unseen(number: int) -> object:
        unseen._remembered.clear()
        return choose(unseen, number)

    for number in range(len(requests)):
        choose(seen, number)
    return {
        "question": "time of one selector decision, four variants, microseconds",
        "target": {"p50_us": TARGET_P50_US, "p99_us": TARGET_P99_US},
        "seen_shape": summary(times_us(lambda number: choose(seen, number), decisions)),
        "new_shape": summary(times_us(choose_unseen, decisions)),
        "seen_shape_and_its_reasons": summary(times_us(lambda number: choose(seen, number).document(), decisions)),
        "empty_call": summary(times_us(lambda number: None, decisions)),
        "environment": environment(),
    }


def main() -> int:
    parser = command_line(__doc__, "selector")
    parser.add_argument("--decisions", type=int, default=20_000)
    options = parser.parse_args()
    record = measure(options.decisions)
    save(options.out, record)
    print(json.dumps(record, indent=2))
    seen = record["seen_shape"]
    return 0 if seen["p50_us"] <= TARGET_P50_US and seen["p99_us"] <= TARGET_P99_US else 3


if __name__ == "__main__":
    sys.exit(main())
