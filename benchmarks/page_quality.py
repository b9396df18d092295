"""Tables of what plugins cost in quality."""

from __future__ import annotations

from typing import Any

from benchmarks.page import RESULTS, load, measured, ratio_of, table

TASKS = ("sst2", "sick", "news20")
QUALITY_TARGETS = {"demo": {"2": 0.95, "4": 0.88, "8": 0.80}, "long fit": {"2": 0.98, "4": 0.94, "8": 0.88}}


def quality_table() -> list[str]:
    demo = load("demo")
    evaluated = {row["variant"]: row["value"] for row in demo["evaluate"]["variants"]}
    reached = {
        "demo": {ratio_of(name): value for name, value in evaluated.items()},
    }
    if _fitted_long():
        reached["long fit"] = load("fit_minilm")["cosine"]
    share = demo["train"]["extra_params_share"]
    rows = [
        (kind, ratio, f"{reached[kind][ratio]:.3f}", f"{target:.2f}", f"{share[ratio]:.2%}")
        for kind in reached
        for ratio, target in QUALITY_TARGETS[kind].items()
    ]
    return table(["fit", "ratio", "mean cosine", "target", "extra parameters"], rows)


def quality_notes() -> list[str]:
    demo = load("demo")
    notes = [
        f"The demo took {demo['seconds']:.0f} s in all and fitted for {demo['train']['seconds']:.0f} s, "
        f"{demo['train']['steps']} steps; with `--fast`, {load('demo_fast')['seconds']:.0f} s in all."
    ]
    if not _fitted_long():
        return [*notes, "The long fit (targets 0.98, 0.94, 0.88) has not been run to its end yet: no figure."]
    fit = load("fit_minilm")
    steps, spent = fit["record"]["steps"], fit["core_minutes"]
    return [*notes, f"The long fit took {steps} steps in {spent:.0f} core-minutes (two cores for 40 minutes have 80)."]


def _fitted_long() -> bool:
    return measured("fit_minilm")


def _task_results() -> list[dict[str, Any]]:
    """The records of the tasks that were measured, each with plugins around every FFN, then with spans."""
    found = [path.stem for task in TASKS for path in sorted(RESULTS.glob(f"quality_{task}*.json"))]
    return [load(name) for name in found]


def _merging(result: dict[str, Any]) -> str:
    return f"once, before layer {result['span']}" if result["span"] else "around each FFN"


def tasks_table() -> list[str]:
    """One row per task, form and ratio."""
    rows = [
        (
            f"{result['task']}, {result['length']} tokens",
            _merging(result),
            f"{row['ratio']:g}",
            f"{row['value']:.3f}",
            f"{row['relative_drop']:+.1%}",
            f"{row['extra_params_share']:.2%}",
            f"{row['ideal']:.2f}",
            f"{row['speedup']:.2f}",
        )
        for result in _task_results()
        for row in result["rows"]
        if row["ratio"] != 1 or not result["span"]
    ]
    header = ["task", "merging", "ratio", "accuracy", "relative drop", "extra parameters"]
    return table([*header, "FLOPs ceiling", "measured speed-up"], rows)


def tasks_notes() -> list[str]:
    """How each task was learnt."""
    notes = []
    for result in _task_results():
        tuned, fitted, start = result["finetune"], result["train"], result["recipe"]["fit"]["start"]
        rows = f"{fitted['texts']}" + (f" of at least {result['words']} words" if result["words"] else "")
        began = f", which began with plugins pre-trained in {start['steps']} steps on plain text" if start else ""
        notes.append(
            f"- {result['task']}, {_merging(result)}: fine-tuned on {tuned['texts']} rows ({tuned['steps']} "
            f"steps), fitted on {rows} in {fitted['steps']} steps ({fitted['seconds'] / 60:.0f} minutes){began}; "
            f"{result['n']} dev rows."
        )
    return notes
