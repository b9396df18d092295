"""What the GPU's benchmark makes of what it measured: percentiles, ceilings, crossovers, targets. Only arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

# Of an H200. A kernel's share is of a copy of as many bytes, timed in turn with it.
CARD = "H200"
TARGETS = {"kernel_share": 0.80, "first_p99_ms": 0.5, "full_p50_ms": 6.0, "realised": 0.85}
_KERNEL = {"tokens": 4096, "hidden": 768, "precision": "fp16"}
_BERT = {"model": "bert-base", "precision": "fp16", "length": 128}
_FULL_BATCH, _JUDGED_RATIO, _JUDGED_BATCH = 128, 4, 32


@dataclass(frozen=True)
class Ceilings:
    """What this card reached just before: products per precision, and bytes read and written by a copy."""

    matmul_tflops: Mapping[str, float]
    copy_gb_s: float


def percentiles(taken_ms: Sequence[float]) -> Row:
    """p50, p95 and p99 of one thing's times, rounded to tenths of a microsecond."""
    named = {f"p{percent}_ms": round(float(np.percentile(taken_ms, percent)), 4) for percent in (50, 95, 99)}
    return {**named, "runs": len(taken_ms)}


def bound_ms(macs: float, size_bytes: float, precision: str, ceilings: Ceilings) -> float:
    """The least time that so many multiply-accumulates, or reading so many bytes, take at the measured ceilings."""
    by_products = 2 * macs / (ceilings.matmul_tflops[precision] * 1e12)
    by_bytes = size_bytes / (ceilings.copy_gb_s * 1e9)
    return 1e3 * max(by_products, by_bytes)


def crossover(times: Mapping[int, tuple[float, float]]) -> int | None:
    """From (ours, theirs) by batch: the smallest batch from which on ours is faster at every one; None without any."""
    first = None
    for batch in sorted(times, reverse=True):
        ours, theirs = times[batch]
        if ours >= theirs:
            break
        first = batch
    return first


def crossovers(rows: Iterable[Row]) -> list[Row]:
    """Per engine, ratio, precision and length: from which batch on it beats its own ratio 1, and the original.

    The original is the model in PyTorch in its fastest form. Compared are medians of ``what`` "engine".
    """
    groups: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["what"] == "engine":
            key = (row["model"], row["precision"], row["length"])
            groups.setdefault(key, {}).setdefault(row["batch"], {})[row["subject"]] = row["p50_ms"]
    found = []
    for (model, precision, length), by_batch in groups.items():
        subjects = {subject for times in by_batch.values() for subject in times}
        for subject in sorted(name for name in subjects if is_compressed(name)):
            own = {
                b: (t[subject], t[whole_of(subject)])
                for b, t in by_batch.items()
                if {subject, whole_of(subject)} <= t.keys()
            }
            other = {
                b: (t[subject], min(original))
                for b, t in by_batch.items()
                if subject in t and (original := _originals(t))
            }
            found.append(
                {
                    "model": model,
                    "precision": precision,
                    "length": length,
                    "subject": subject,
                    "from_batch": crossover(own),
                    "original_from_batch": crossover(other),
                }
            )
    return found


def _originals(times: Mapping[str, float]) -> list[float]:
    return [ms for subject, ms in times.items() if subject.startswith("torch")]


def is_compressed(subject: str) -> bool:
    """Whether a subject such as "ort r4" is an engine of a ratio above 1."""
    return ratio_of(subject) > 1


def ratio_of(subject: str) -> float:
    """The ratio of a subject such as "ort r4"; 1 of what is not compressed, as "torch eager"."""
    _, _, ratio = subject.partition(" r")
    return float(ratio) if ratio.replace(".", "").isdecimal() else 1.0


def whole_of(subject: str) -> str:
    """The same engine at ratio 1."""
    return subject.split(" r")[0] + " r1"


def with_speedups(rows: list[Row]) -> list[Row]:
    """The rows of one cell, those of compressed engines with speed-up, its ceiling by MACs, and the share realised."""
    times = {(row["what"], row["subject"]): row for row in rows}
    for row in rows:
        whole = times.get((row["what"], whole_of(row["subject"])))
        if not is_compressed(row["subject"]) or whole is None:
            continue
        speedup, ideal = whole["p50_ms"] / row["p50_ms"], whole["macs"] / row["macs"]
        row |= {"speedup": round(speedup, 3), "ideal": round(ideal, 3), "realised": round(speedup / ideal, 3)}
    return rows


def missed(kernels: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Every target that is not reached or not measured."""
    return [*_missed_kernels(kernels), *_missed_times(rows), *_missed_speedups(rows)]


def _missed_kernels(kernels: Sequence[Row]) -> list[str]:
    known = {name: _KERNEL[name] for name in ("hidden", "precision")}
    judged = [row for row in kernels if row["tokens"] >= _KERNEL["tokens"] and known.items() <= row.items()]
    low = [row for row in judged if row["share_of_copy"] < TARGETS["kernel_share"]]
    found = [
        f"missed: {row['kernel']}, ratio {row['ratio']}, {row['tokens']} tokens: {row['share_of_copy']:.2f} of a copy, "
        f"target {TARGETS['kernel_share']}"
        for row in low
    ]
    return found if judged else ["not measured: kernels at fp16, hidden size 768, 4096 tokens or more"]


def _missed_times(rows: Sequence[Row]) -> list[str]:
    found = []
    for batch, value, target in ((1, "p99_ms", "first_p99_ms"), (_FULL_BATCH, "p50_ms", "full_p50_ms")):
        where = f"{_BERT['model']} fp16, length 128, batch {batch}"
        wanted = {**_BERT, "batch": batch, "what": "engine"}
        times = [row[value] for row in rows if wanted.items() <= row.items() and row["subject"].endswith(" r1")]
        if not times:
            found.append(f"not measured: {where}")
        elif min(times) > TARGETS[target]:
            found.append(f"missed: {where}: {value} {min(times):.3f}, target {TARGETS[target]}")
    return found


def _missed_speedups(rows: Sequence[Row]) -> list[str]:
    judged = [
        row
        for row in rows
        if row["what"] == "engine"
        and row["part"] == "encoder"
        and row["batch"] >= _JUDGED_BATCH
        and ratio_of(row["subject"]) == _JUDGED_RATIO
    ]
    found = [
        f"missed: {row['model']} {row['precision']}, {row['subject']}, batch {row['batch']}, length {row['length']}: "
        f"realised {row['realised']:.2f}, target {TARGETS['realised']}"
        for row in judged
        if row["realised"] < TARGETS["realised"]
    ]
    return found if judged else [f"not measured: ratio {_JUDGED_RATIO} at batch {_JUDGED_BATCH} or more"]
