"""Measuring a family: how long its members take, and how well they answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.api.bundles import open_bundle, open_runtime
from compexport.api.options import COLUMNS, DEVICE, EXITS, WRITING, Columns, Device, Exits, WritingCheck
from compexport.api.reading import read_examples
from compexport.present import Progress, quiet

if TYPE_CHECKING:
    from calib.data import Examples


def bench(
    bundle: str | Path = "bundle",
    *,
    batches: Sequence[float] = (1, 8),
    lengths: Sequence[float] | None = None,
    min_runs: int = 20,
    device: Device = DEVICE,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure every variant at every batch size and length, keep the table in the bundle, and return it.

    ``lengths`` in tokens; None stands for 32 and 128, as far as the bundle reads such texts.
    """
    from compexport import latency
    from engines.manifest import GENERATION

    sizes = latency.check_sizes("batch", batches)
    with open_runtime(bundle, device) as runtime:
        tokenizer = runtime.bundle.manifest.tokenizer
        longest, generation = tokenizer.max_length if tokenizer else None, runtime.bundle.manifest.generation
        if generation is not None:  # one more token is timed after each length, where both are one text
            more = 1 if runtime.bundle.manifest.task == GENERATION else 0
            longest = min(longest or generation.positions, generation.positions - more)
        table = latency.measure(
            runtime,
            sizes,
            latency.check_sizes("length", lengths or latency.usual_lengths(longest), longest),
            threads=device.threads,
            min_runs=min_runs,
            progress=progress,
        )
        runtime.bundle.save_profile(runtime.device, table)
    return table


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    columns: Columns = COLUMNS,
    limit: int | None = None,
    exits: Exits = EXITS,
    writing: WritingCheck = WRITING,
    device: Device = DEVICE,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure the quality of every variant on ``data``, keep the table in the bundle, and return the rows.

    Without labels the backbone's own answers are the truth. Variants with exits get named operating points, found as
    ``exits`` says and measured on other rows than those they were found on. Written texts are compared as ``writing``
    says, and how long they are is kept too.
    """
    open_bundle(bundle)  # a wrong bundle is said before a large file is read
    examples = read_examples(data, "dev or test", columns, progress, limit)
    return evaluate_examples(
        bundle, examples, columns=columns, exits=exits, writing=writing, device=device, progress=progress
    )


def evaluate_examples(
    bundle: str | Path,
    examples: Examples,
    *,
    columns: Columns = COLUMNS,
    exits: Exits = EXITS,
    writing: WritingCheck = WRITING,
    device: Device = DEVICE,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """``evaluate`` on examples already read; ``columns`` are those of the calibration data."""
    from calib import quality
    from calib.exits_search import Search

    search = Search(exits.statistic, exits.per_exit, exits.temperature)
    calibration = None
    if exits.calibration is not None:
        calibration = read_examples(exits.calibration, "dev", columns, progress)
    with open_runtime(bundle, device) as runtime:
        evaluation = quality.evaluate(
            runtime,
            examples,
            calibration=calibration,
            search=search,
            metric=writing.metric,
            settings=writing.settings,
            progress=progress,
        )
        runtime.bundle.save_quality(evaluation.table)
    return evaluation.document()
