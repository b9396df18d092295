"""``bench``: the latency of every variant at every size, timed in turn, and what of the ideal was realised.

Letters: B batch, S sequence length in tokens, r ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport import writing_parts
from compexport.errors import InputError, describe
from compexport.present import Progress
from engines.cascade import Cascade
from engines.exit_rule import TO_THE_END
from engines.manifest import (
    DECODER,
    DECODER_WITH_PAST,
    ENCODER,
    TEXT2TEXT,
    Manifest,
    TensorSpec,
    backbones,
)
from engines.measure import Timing, environment, interleave
from engines.paths import segment_macs
from engines.points import (
    encoder_name,
    first_token_name,
    is_segment,
    is_token,
    segment_name,
    variant_of,
    written_before,
)
from engines.runtime import Runtime

Row = dict[str, Any]

USUAL_LENGTHS = (32, 128)

# Ids that every real vocabulary has; which ones is all the same to the time an engine takes.
_SMALLEST_ID, _LARGEST_ID = 5, 100


def measure(
    runtime: Runtime,
    batches: Sequence[int],
    lengths: Sequence[int],
    *,
    threads: int | None,
    min_runs: int,
    progress: Progress,
) -> dict[str, Any]:
    """The latency table of this device, as ``Bundle.save_profile`` keeps it and ``bench --json`` prints it.

    All variants of one (B, S) are timed in turn, A B A B, so that what the machine does meanwhile meets all alike.
    """
    manifest = runtime.bundle.manifest
    rows: list[Row] = []
    sizes = [(batch, length) for batch in batches for length in lengths]
    for done, (batch, length) in enumerate(sizes):
        progress(f"timing batch {batch} x length {length}", done, len(sizes))
        calls, same = _calls(runtime, batch, length)
        timings = interleave(calls, min_runs=min_runs, min_seconds=0.0, warmup=3)
        timings |= {name: timings[other] for name, other in same.items()}
        timings = {name: timing for name, timing in timings.items() if not name.endswith(writing_parts.BEFORE)}
        rows += rows_of(batch, length, timings)
    return {
        "device": runtime.device,
        "backend": runtime.backend,
        "threads": threads,
        "environment": environment(),
        "rows": rows,
        "realised": realised(rows, manifest),
    }


def rows_of(batch: int, length: int, timings: Mapping[str, Timing]) -> list[Row]:
    """One row per variant or part of one, by its name, of what was timed at (B, S)."""
    return [
        {"variant": name, "batch": batch, "length": length, "p50_ms": t.p50_ms, "p99_ms": t.p99_ms, "runs": t.runs}
        for name, t in timings.items()
    ]


def _calls(runtime: Runtime, batch: int, length: int) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed at (B, S): every variant to its end, and of one with exits every segment alone.

    Those that write are timed in parts (``compexport.writing_parts``). Besides, names that have the times of another.
    """
    if runtime.bundle.manifest.generation is not None:
        return writing_parts.calls_of(runtime, _random_ids(batch, length))
    calls: dict[str, Callable[[], object]] = {}
    for name in runtime.members.engines:
        session = runtime.session(name)
        feeds = random_feeds(session.inputs, batch, length)
        if isinstance(session, Cascade):
            calls[name] = partial(session.run_exits, feeds, TO_THE_END)
            calls |= {segment_name(name, number): call for number, call in enumerate(session.segment_calls(feeds))}
        else:
            calls[name] = partial(session.run, feeds)
    return calls, {}


def random_feeds(inputs: Sequence[TensorSpec], batch: int, length: int) -> dict[str, npt.NDArray[np.int64]]:
    """Feeds [B, S] without padding, the same for every variant: random ids, a mask of ones, types of zero."""
    ids = _random_ids(batch, length)
    made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {spec.name: made[spec.name] for spec in inputs}


def _random_ids(batch: int, length: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(_SMALLEST_ID, _LARGEST_ID, (batch, length), dtype=np.int64)


def realised(rows: Sequence[Row], manifest: Manifest) -> list[Row]:
    """For each compressed variant and size: the speed-up, what its FLOPs would allow, and the share of it reached.

    Variants that write have such rows up to the first token and for one more token, of those that read another text
    also for the encoder and the first token alone.
    """
    compared = [row for row in rows if not is_segment(row["variant"])]
    times = {(row["variant"], row["batch"], row["length"]): row["p50_ms"] for row in compared}
    variants = manifest.variants
    whole_ones = {(variants[n].method, variants[n].precision): n for n in reversed(backbones(variants))}
    found = []
    for (name, batch, length), p50_ms in times.items():
        owner = variant_of(name)
        variant = variants[owner]
        whole = whole_ones.get((variant.method, variant.precision))
        if whole is None or owner == whole or (whole + name.removeprefix(owner), batch, length) not in times:
            continue
        backbone = whole + name.removeprefix(owner)
        speedup = times[backbone, batch, length] / p50_ms
        ideal = _macs(manifest, backbone, length) / _macs(manifest, name, length)
        found.append(
            {
                "variant": name,
                "batch": batch,
                "length": length,
                "speedup": speedup,
                "ideal": ideal,
                "realised": speedup / ideal,
            }
        )
    return found


def _macs(manifest: Manifest, name: str, length: int) -> int:
    """MACs of one row of a variant, of a part of it, or of one token more."""
    variant = manifest.variants[variant_of(name)]
    costs = {role: manifest.graphs[graph].cost for role, graph in variant.graphs.items()}
    if manifest.task != TEXT2TEXT:
        if is_token(name):
            return costs[DECODER].token_macs(length)
        return sum(segment_macs(manifest, name, length))
    written = written_before(name)
    if written is not None:
        return costs[DECODER_WITH_PAST].token_macs(written, length)
    assert manifest.generation is not None
    encoder = costs[ENCODER].macs(length)
    first = costs[DECODER].macs(len(manifest.generation.decoder_start_ids), length)
    parts = {encoder_name(variant_of(name)): encoder, first_token_name(variant_of(name)): first}
    return parts.get(name, encoder + first)


def usual_lengths(longest: int | None) -> list[int]:
    """What is measured where nobody says: shorter where no text has so many tokens."""
    return sorted({min(length, longest or length) for length in USUAL_LENGTHS})


def check_sizes(what: str, values: Sequence[float], largest: int | None = None) -> list[int]:
    """``--batch`` or ``--length`` as sorted whole numbers from 1; lengths no longer than the model reads."""
    for value in values:
        if not math.isfinite(value) or value != int(value) or value < 1:
            raise InputError(describe(f"--{what} is out of range", got=f"{value:g}", expected="whole numbers from 1"))
        if largest is not None and value > largest:
            raise InputError(describe(f"--{what} is too long", got=f"{value:g}", expected=f"at most {largest} tokens"))
    return sorted({int(value) for value in values})


def faster_from(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int] | None]:
    """For each compressed variant of a ``realised`` table, the smallest (B, S) from which it beats the backbone.

    "From" means there and at every measured size with at least that batch and that length; the smallest is the one
    with the fewest tokens. None: there is no such size.
    """
    found: dict[str, tuple[int, int] | None] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        gains = {(row["batch"], row["length"]): row["speedup"] for row in rows if row["variant"] == name}
        holds = [
            (batch, length)
            for batch, length in gains
            if all(gain > 1 for (b, n), gain in gains.items() if b >= batch and n >= length)
        ]
        found[name] = min(holds, key=lambda size: (size[0] * size[1], size), default=None)
    return found
