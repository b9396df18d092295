"""Do exits pay in batches, and is a budget a promise? A built family with exits on a real task.

    python -m benchmarks.cascade sst2 --bundle BUNDLE --data ../shared/data/sst2 [--requests 2000] [--out FILE]

BUNDLE holds a family with exits for the task; what was not measured of it yet (operating points, segments) is measured
first and kept in it. Then, on the dev split and on the CPU:

- saving: batches of 32 texts as they come, through every variant with exits, run to the end and by each of its
  thresholds, in turn; the share of the time that exits save over that of the MACs they save, padding included;
- anytime: single texts under budgets from 20 % to 120 % of what one takes to the end (median): how many are done within
  the budget and 5 %, and how many rightly;
- identity: answer and exit of 2,000 rows (dev, then train; all there are if they are fewer), in batches and alone.

Exit code 3 when a target is missed: realised saving >= 0.75 and p99 <= 1.03 of the full model's at every named point
that saves a third or more, >= 99 % in time wherever the budget is at least the first segment's p99, accuracy that does
not fall by more than noise as the budget grows, no row different.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.record import command_line, judged, save
from calib.data import Examples, has_split
from compexport import api
from engines.bundle import Bundle
from engines.cascade import Cascade
from engines.exit_rule import ExitRule
from engines.manifest import prefix_role
from engines.measure import environment
from engines.paths import segment_macs
from engines.points import engine_of, is_segment
from engines.runtime import Runtime
from engines.session import Array
from engines.text import TextEncoder

BATCH, SEED = 32, 0
IDENTITY_ROWS = 2000
GRID = (1, 2, 4, 8, 16, 32)
REALISED, SLOWEST, IN_TIME, WORTH = 0.75, 1.03, 0.99, 1 / 3
GRACE = 1.05
THRESHOLDS = 8  # of the sweep, per ratio, for the plot
FULL = "to the end"

Feeds = dict[str, Array]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    examples = api.read_examples(options.data, "dev", api.COLUMNS, _say).sample(options.rows, SEED)
    texts = _identity_texts(options.data, examples)
    _measure_missing(options.bundle, options, examples)
    with api.load(options.bundle, threads=options.threads) as runtime:
        quality = runtime.bundle.quality()
        assert quality is not None
        batches = _batches(runtime.bundle, examples)
        saving = [row for name in runtime.members.layers for row in _saving(runtime, name, quality, batches, options)]
        variant = options.variant or runtime.members.with_exits(_first(runtime))
        result = {
            "question": f"what exits save on {options.task}, and whether budgets are kept",
            "task": options.task,
            "environment": environment(),
            "backbone": runtime.bundle.manifest.backbone.name,
            "metric": quality["metric"],
            "n": quality["n"],
            "backbone_value": quality["variants"][quality["backbone_variant"]],
            "batch": BATCH,
            "batches": len(batches),
            "saving": saving,
            "anytime": _anytime(runtime, variant, examples, options.requests),
            "identity": [_identity(runtime, name, texts, quality) for name in runtime.members.layers],
        }
    save(Path(str(options.out).replace("TASK", options.task)), result)
    return judged(missed(result))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "cascade_TASK")
    parser.add_argument("task")
    parser.add_argument("--bundle", type=Path, required=True, help="a built family with exits, fitted to the task")
    parser.add_argument("--data", type=Path, required=True, help="folder with dev.tsv")
    parser.add_argument("--variant", help="whose budgets are swept [default: the lowest ratio with exits]")
    parser.add_argument("--requests", type=int, default=2000, help="for each budget")
    parser.add_argument("--rows", type=int, default=2000, help="of the dev split, at most")
    parser.add_argument("--runs", type=int, default=3, help="of every batch, each way")
    parser.add_argument("--min-runs", type=int, default=100, help="of each cell, where the latency profile is missing")
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args(arguments)


def missed(result: Mapping[str, Any]) -> list[str]:
    """The targets that were missed, in words."""
    found = []
    for row in result["saving"]:
        if row["point"] is None or row["allowed"] < WORTH:
            continue
        if row["realised"] < REALISED:
            found.append(f"{row['variant']} at {row['point']}: realised {row['realised']:.2f}")
        if row["p99_over_full"] > SLOWEST:
            found.append(f"{row['variant']} at {row['point']}: p99 {row['p99_over_full']:.2f} of the full model's")
    for row in result["anytime"]["budgets"]:
        if row["promised"] and row["promised_in_time"] < IN_TIME:
            found.append(f"budget {row['share_of_full']:.0%}: {row['promised_in_time']:.2%} in time")
    found += _falls(result["anytime"]["budgets"])
    found += [f"{row['variant']}: {row['different']} rows differ" for row in result["identity"] if row["different"]]
    return found


def _falls(budgets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Budgets that answer worse than a smaller one, by more than two standard errors of its accuracy."""
    found = []
    for number, row in enumerate(budgets[1:], start=1):
        best = max(one["accuracy"] for one in budgets[:number])
        noise = 2.0 * (best * (1.0 - best) / row["requests"]) ** 0.5
        if row["accuracy"] < best - noise:
            share = f"budget {row['share_of_full']:.0%}"
            found.append(f"{share}: accuracy {row['accuracy']:.3f}, of a smaller budget {best:.3f}")
    return found


# --- what must be there ----------------------------------------------------------------------------------------------


def _measure_missing(path: Path, options: argparse.Namespace, examples: Examples) -> None:
    device = api.Device(threads=options.threads)
    bundle = Bundle.open(path)
    if "points" not in (bundle.quality() or {}):
        api.evaluate(path, options.data, device=device, progress=_say)
    with api.load(path, threads=options.threads) as runtime:
        profile = runtime.profile
    if profile is None or not any(map(is_segment, profile.variants)):
        longest = max(len(one) for one in _encoder(bundle).encode(examples.inputs))
        lengths = sorted({8, *(size for size in (16, 32, 64, 128, 256, 512) if size < longest), longest})
        api.bench(path, batches=GRID, lengths=lengths, min_runs=options.min_runs, device=device, progress=_say)


def _encoder(bundle: Bundle) -> TextEncoder:
    tokenizer = bundle.manifest.tokenizer
    assert tokenizer is not None
    return TextEncoder(bundle.file(tokenizer.path), tokenizer, bundle.manifest.task)


def _batches(bundle: Bundle, examples: Examples) -> list[Feeds]:
    """Full batches in an order drawn by chance, so that lengths and depths mix as in a queue."""
    encoder = _encoder(bundle)
    order = np.random.default_rng(SEED).permutation(len(examples)).tolist()
    inputs = [examples.inputs[index] for index in order]
    starts = range(0, max(len(inputs) - BATCH + 1, 1), BATCH)
    return [encoder.feeds(encoder.encode(inputs[start : start + BATCH])) for start in starts]


def _first(runtime: Runtime) -> str:
    variants = runtime.bundle.manifest.variants
    return min(runtime.members.layers, key=lambda name: variants[name].ratio)


# --- saving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """One way through a variant: a named point, or a threshold of the sweep; ``value`` as evaluated."""

    point: str | None
    threshold: float | None
    rule: ExitRule
    value: float


def _saving(
    runtime: Runtime, variant: str, quality: Mapping[str, Any], batches: Sequence[Feeds], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per way, timed in turn with the full model on the same batches."""
    cascade = runtime.session(variant)
    assert isinstance(cascade, Cascade)
    with _full(runtime, variant, cascade) as (full, called):
        return _timed_ways(runtime, cascade, (full, called), _ways(variant, quality), batches, options)


def _timed_ways(
    runtime: Runtime,
    cascade: Cascade,
    whole_model: tuple[Callable[[Feeds], object], str],
    ways: Sequence[_Way],
    batches: Sequence[Feeds],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    variant, (full, called) = cascade.name, whole_model
    times = np.zeros((1 + len(ways), len(batches), options.runs))
    for number, feeds in enumerate(batches):
        _say(f"{variant}, batch {number + 1} of {len(batches)}")
        calls: list[Callable[[], object]] = [
            partial(full, feeds),
            *(partial(cascade.run_exits, feeds, way.rule) for way in ways),
        ]
        for call in calls:
            call()
        for run in range(options.runs):
            for index, call in enumerate(calls):
                times[index, number, run] = _timed(call)
    cost = _macs(runtime.bundle, variant, cascade, batches, ways)
    rows = []
    for index, way in enumerate(ways, start=1):
        # The median run of each batch: whatever else the machine did in one of them does not count.
        took, whole = (float(np.median(times[i], axis=1).sum()) for i in (index, 0))
        allowed, saved = 1.0 - float(cost[index] / cost[0]), 1.0 - took / whole
        rows.append(
            {
                "variant": variant,
                "ratio": runtime.bundle.manifest.variants[variant].ratio,
                "point": way.point,
                "threshold": way.threshold,
                "value": way.value,
                "ms_per_batch": took / len(batches),
                "full_ms_per_batch": whole / len(batches),
                "full": called,
                "allowed": allowed,
                "saved": saved,
                "realised": saved / allowed if allowed > 0 else 1.0,
                "p99_over_full": float(np.percentile(times[index], 99) / np.percentile(times[0], 99)),
            }
        )
    return rows


def _ways(variant: str, quality: Mapping[str, Any]) -> list[_Way]:
    points = [
        _Way(name.partition("@")[2], None, ExitRule.from_document(point["rule"]), point["value"])
        for name, point in quality["points"].items()
        if engine_of(name) == variant
    ]
    entry = quality["exits"][variant]
    sweep = entry["sweep"]
    kept = sorted({round(step) for step in np.linspace(0, len(sweep) - 1, min(THRESHOLDS, len(sweep)))})
    thresholds = [
        _Way(None, sweep[i]["threshold"], ExitRule(sweep[i]["threshold"], entry["statistic"]), sweep[i]["value"])
        for i in kept
    ]
    return [*points, *thresholds]


@contextmanager
def _full(runtime: Runtime, variant: str, cascade: Cascade) -> Iterator[tuple[Callable[[Feeds], object], str]]:
    """The model without exits: the prefix engine of the whole depth where there is one, else all segments."""
    role = prefix_role(cascade.exits[-1])
    if role in runtime.bundle.manifest.variants[variant].graphs:
        session = runtime.open_role(variant, role)
        try:
            yield lambda feeds: session.run(feeds, ["logits"]), role
        finally:
            session.close()
    else:
        yield lambda feeds: cascade.run(feeds, ["logits"]), FULL


def _macs(
    bundle: Bundle, variant: str, cascade: Cascade, batches: Sequence[Feeds], ways: Sequence[_Way]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """MACs of the full model and of each way over all batches, every row padded to its batch's length."""
    total = np.zeros(1 + len(ways))
    for feeds in batches:
        rows, length = feeds["input_ids"].shape
        up_to = np.cumsum(segment_macs(bundle.manifest, variant, length))
        total[0] += rows * up_to[-1]
        for index, way in enumerate(ways, start=1):
            layers = cascade.run_exits(feeds, way.rule).exit_layer
            total[index] += up_to[np.searchsorted(cascade.exits, layers)].sum()
    return total


def _timed(call: Callable[[], object]) -> float:
    before = perf_counter()
    call()
    return (perf_counter() - before) * 1e3


# --- anytime and identity --------------------------------------------------------------------------------------------


def _anytime(runtime: Runtime, variant: str, examples: Examples, requests: int) -> dict[str, Any]:
    """Single texts, the same for every budget, forced to the variant; budgets are shares of its median time."""
    random = np.random.default_rng(SEED)
    assert examples.labels is not None
    labels, forecast = _names(runtime.bundle, examples), runtime.members.forecast
    assert forecast is not None
    inputs = examples.inputs
    tokens = [len(one) for one in _encoder(runtime.bundle).encode(inputs)]
    for index in random.integers(0, len(inputs), 50):
        runtime.run_batch([inputs[index]], variant=variant)
    drawn = random.integers(0, len(inputs), min(requests, 500))
    full_ms = float(np.median([runtime.run_batch([inputs[i]], variant=variant).latency_ms for i in drawn]))
    rows = []
    drawn = random.integers(0, len(inputs), requests)
    for percent in range(20, 121, 10):
        budget_ms = full_ms * percent / 100
        _say(f"{variant}, budget {percent} %")
        promised, in_time, right, depth = (np.zeros(requests) for _ in range(4))
        for number, index in enumerate(drawn):
            first_ms = forecast.segment_ms(variant, 0, 1, tokens[index]).p99_ms
            done = runtime.run_batch([inputs[index]], variant=variant, budget_ms=budget_ms)
            promised[number] = budget_ms >= first_ms
            in_time[number] = done.latency_ms <= budget_ms * GRACE
            right[number] = done.outputs[0]["label"] == labels[index]
            depth[number] = done.outputs[0]["exit"]
        kept = promised > 0
        rows.append(
            {
                "share_of_full": percent / 100,
                "budget_ms": budget_ms,
                "requests": requests,
                "in_time": float(in_time.mean()),
                "promised": int(kept.sum()),
                "promised_in_time": float(in_time[kept].mean()) if kept.any() else None,
                "accuracy": float(right.mean()),
                "mean_layer": float(depth.mean()),
            }
        )
    return {"variant": variant, "full_p50_ms": full_ms, "budgets": rows}


def _names(bundle: Bundle, examples: Examples) -> list[str]:
    from calib.labels import label_ids

    assert examples.labels is not None
    names = list(bundle.manifest.labels)
    return [names[i] for i in label_ids(examples.labels, names, examples.origin, examples.label_names)]


def _identity_texts(data: Path, examples: Examples) -> list[Any]:
    """What dev holds, and as much of train as is missing; fewer where there are no more."""
    missing = IDENTITY_ROWS - len(examples)
    if missing <= 0 or not has_split(data, "train"):
        return list(examples.inputs)[:IDENTITY_ROWS]
    return [*examples.inputs, *api.read_examples(data, "train", api.COLUMNS, _say).sample(missing, SEED).inputs]


def _identity(runtime: Runtime, variant: str, inputs: Sequence[Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """Answers and exits of all rows in batches of 32 and alone, by the threshold in the middle of the sweep."""
    entry = quality["exits"][variant]
    middle = min(entry["sweep"], key=lambda row: abs(row["speedup"] - 2.0))
    rule = ExitRule(middle["threshold"], entry["statistic"])
    together: list[tuple[str, int]] = []
    for start in range(0, len(inputs), BATCH):
        together += _answers(runtime, variant, rule, inputs[start : start + BATCH])
    _say(f"{variant}, one by one")
    alone = [one for text in inputs for one in _answers(runtime, variant, rule, [text])]
    different = sum(a != b for a, b in zip(together, alone, strict=True))
    return {"variant": variant, "threshold": middle["threshold"], "rows": len(inputs), "different": different}


def _answers(runtime: Runtime, variant: str, rule: ExitRule, texts: Sequence[Any]) -> list[tuple[str, int]]:
    outputs = runtime.run_batch(texts, variant=variant, rule=rule).outputs
    return [(output["label"], output["exit"]) for output in outputs]


def _say(message: str, done: float | None = None, total: float | None = None) -> None:
    if not done or done == total:
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
