"""Verbs that measure a bundle and keep the tables in it: ``bench`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compexport.cli.options import (
    Backend,
    BundlePath,
    Config,
    Debug,
    Json,
    LabelColumn,
    MaxNewTokens,
    NumBeams,
    PairColumn,
    Provider,
    RequiredData,
    TargetColumn,
    TextColumn,
    Threads,
)
from compexport.cli.screens import opened_screen
from compexport.cli.typed import numbers_of


def bench(
    bundle: BundlePath = Path("bundle"),
    *,
    batch: Annotated[str, typer.Option(metavar="LIST", help="Batch sizes.")] = "1,8",
    length: Annotated[
        str | None, typer.Option(metavar="LIST", help="Lengths in tokens [default: 32,128, or what BUNDLE reads].")
    ] = None,
    min_runs: Annotated[int, typer.Option(metavar="N", min=3, help="Timed runs of each cell.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Five runs of each cell: a first look.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also draw latency against quality.")] = None,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Measure the latency of every variant here.

    All variants are timed in turn at every batch size and length. The bundle keeps the table, for this device;
    `select` and `run` choose by it.
    """
    from compexport import api, present, report, tables

    with opened_screen(as_json) as screen, present.progress() as progress:
        if plot is not None:
            report.require_quality(api.open_bundle(bundle).quality())
        document = api.bench(
            bundle,
            batches=numbers_of("batch", batch),
            lengths=None if length is None else numbers_of("length", length),
            min_runs=5 if quick else min_runs,
            device=api.Device(backend, provider, threads),
            progress=progress,
        )
        opened = api.open_bundle(bundle)
        variants, quality = opened.manifest.variants, opened.quality()
        if plot is not None and quality is not None:
            report.write_bytes(plot, report.pareto_png(document, quality, variants))
    parts = [tables.segments_table(document), tables.tokens_table(document)]
    further = [table for table in (*parts, tables.reading_and_writing_table(document, variants)) if table.rows]
    screen.document(document, [tables.bench_table(document, variants, quality), *further])


def evaluate(
    bundle: BundlePath = Path("bundle"),
    *,
    data: RequiredData,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    target: TargetColumn = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use the first N examples only.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What ranks written texts: bleu, exact_match or word_error_rate."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="D", help="Choose exit thresholds on these rows [default: on one half of --data]."),
    ] = None,
    statistic: Annotated[
        str, typer.Option(metavar="NAME", help="What exits are judged by: entropy, max_probability or margin.")
    ] = "entropy",
    per_exit: Annotated[bool, typer.Option("--per-exit", help="A threshold for each exit, not one for all.")] = False,
    temperature: Annotated[bool, typer.Option("--temperature", help="Fit a temperature for each exit first.")] = False,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Measure the quality of every variant on data.

    The engines themselves are measured. The bundle keeps the table; `select` and `run` choose by it. Variants with
    exits get operating points (drop-1%, 2x, ...), which are members of the family from then on: their thresholds are
    chosen on some rows and everything is measured on others. Where texts are written from others, it is kept how long
    they are, for `select` and `run` to know what to expect.
    """
    from compexport import api, present, tables

    with opened_screen(as_json) as screen, present.progress() as progress:
        document = api.evaluate(
            bundle,
            data,
            columns=api.Columns(text=text, text_pair=text_pair, label=label, target=target),
            limit=limit,
            exits=api.Exits(calibration, statistic, per_exit, temperature),
            writing=api.WritingCheck(metric, {"max_new_tokens": max_new_tokens, "num_beams": num_beams}),
            device=api.Device(backend, provider, threads),
            progress=progress,
        )
        variants = api.open_bundle(bundle).manifest.variants
    points = [tables.points_table(document)] if document.get("points") else []
    screen.document(document, [tables.evaluate_table(document, variants), *points])
