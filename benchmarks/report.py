"""Write ``docs/benchmarks.md`` from the files in ``benchmarks/results``: no figure gets there by hand.

    python -m benchmarks.report [--check]

``--check`` writes nothing and exits 1 when the page is not what the results say.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import FFN, HIDDEN, LAYERS
from benchmarks.page import RESULTS, Result, environment_line, load, ratio_of, table
from benchmarks.page_modular import assemblies_notes, assemblies_table, writing_notes, writing_table
from benchmarks.page_steps import generation_table, steps_notes, steps_quality_notes, steps_quality_table, steps_table

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "benchmarks.md"
TEXT = ROOT / "report.md"


def main(arguments: Sequence[str] | None = None) -> int:
    page = render()
    if "--check" in (sys.argv[1:] if arguments is None else arguments):
        return 0 if PAGE.read_text(encoding="utf-8") == page else 1
    PAGE.write_text(page, encoding="utf-8")
    for task, result in _cascades().items():
        (PAGE.parent / picture_name(task)).write_bytes(cascade_picture(result))
    return 0


def render() -> str:
    """The page: ``report.md`` with every ``{{table name}}`` line replaced by that table."""
    lines = []
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        if line.startswith("{{") and line.endswith("}}"):
            lines += TABLES[line.strip("{}")]()
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def latency_table() -> list[str]:
    result = load("latency")
    times = {(r["variant"], r["batch"], r["length"]): r for r in result["rows"]}
    rows = []
    for cell in result["realised"]:
        row = times[cell["variant"], cell["batch"], cell["length"]]
        rows.append(
            (
                f"{cell['batch']} x {cell['length']}",
                ratio_of(cell["variant"]),
                f"{cell['ideal']:.2f}",
                f"{cell['speedup']:.2f}",
                f"{cell['realised']:.2f}",
                f"{row['p50_ms']:.0f}",
                f"{row['p99_ms']:.0f}",
                row["runs"],
            )
        )
    header = ["batch x length", "ratio", "FLOPs ceiling", "measured speed-up", "realised", "p50 ms", "p99 ms", "runs"]
    return [*table(header, rows), "", *environment_line("latency")]


def stock_table() -> list[str]:
    rows = [
        (f"{r['batch']} x {r['length']}", f"{r['stock_p50_ms']:.0f}", f"{r['speedup']:.3f}")
        for r in load("latency")["stock"]
    ]
    return table(["batch x length", "stock p50 ms", "stock / ratio-1 engine"], rows)


def where_table() -> list[str]:
    cells = load("latency")["where_ms"]
    groups = list(dict.fromkeys(group for cell in cells for ratio in ("r1", "r8") for group in cell[ratio]))
    header = ["part", *(f"{c['batch']} x {c['length']}, {r}" for c in cells for r in ("r1", "r8"))]
    rows = [[g, *(f"{cell[r].get(g, 0.0):.1f}" for cell in cells for r in ("r1", "r8"))] for g in groups]
    return table(header, rows)


def memory_pace() -> list[str]:
    """At what pace ratio 8 reads the FFN's weights at batch 1, beside what memory gives."""
    result = load("latency")
    cell = next(cell for cell in result["where_ms"] if (cell["batch"], cell["length"]) == (1, 128))
    size = LAYERS * 2 * HIDDEN * FFN * 4 / 1e9
    ms = cell["r8"]["FFN products"]
    return [
        f"At 1 x 128 the FFN products of ratio 8 take {ms:.1f} ms and read {1000 * size:.0f} MB of weights: "
        f"{1000 * size / ms:.0f} GB/s. All cores together read {result['memory_read_gb_s']:.0f} GB/s from memory here. "
        f"An eighth of ratio 1's time would be {cell['r1']['FFN products'] / 8:.1f} ms."
    ]


def memory_table() -> list[str]:
    result = load("memory")
    rows = [(name, f"{case['pss_mb']:.0f}") for name, case in result["cases"].items()]
    speed = result["cases"]["engines, ratios 1 2 4 8"]["plain_time_over_shared_time"]
    return [
        *table(["loaded in one process", "PSS, MB"], rows),
        "",
        f"All four engines over one: **{result['memory_ratio']:.2f}**. A plain session takes {speed:.2f} times as long"
        " as the engine on shared weights.",
        f"Graphs of the four ratios on disk over one stock export: **{result['disk_ratio']:.3f}**"
        f" ({result['graphs_bytes'] / 1e6:.0f} MB; the engines add {result['engines_bytes'] / 1e6:.0f} MB).",
    ]


def build_table() -> list[str]:
    result = load("build_time")
    rows = [
        (
            "ratios 1 2 4 8, graphs checked / ratio 1, graph checked",
            f"{result['family_graphs_over_export_and_check']:.2f}",
        ),
        ("ratios 1 2 4 8, engines too / ratio 1, graph checked", f"{result['family_over_export_and_check']:.2f}"),
        ("ratios 1 2 4 8, engines too / ratio 1, engine too", f"{result['family_over_one_whole_build']:.2f}"),
        ("nothing changed, whole process, s", f"{result['unchanged_s']:.2f}"),
    ]
    return [*table(["what", "measured"], rows), "", *environment_line("build_time")]


def selector_table() -> list[str]:
    result = load("selector")
    names = {"seen_shape": "batch and length seen before", "new_shape": "never seen"}
    rows = [(text, f"{result[name]['p50_us']:.1f}", f"{result[name]['p99_us']:.1f}") for name, text in names.items()]
    return table(["shape", "p50 us", "p99 us"], rows)


def startup_table() -> list[str]:
    timings = load("startup")["timings"]
    rows = [(name, f"{t['p50_ms']:.0f}", f"{t['p99_ms']:.0f}") for name, t in timings.items()]
    return table(["command", "p50 ms", "p99 ms"], rows)


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
    return (RESULTS / "fit_minilm.json").exists()


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


def training_table() -> list[str]:
    if not (RESULTS / "training.json").exists():
        return ["Not measured yet: no figure."]
    result = load("training")
    rows = [
        (
            f"fit, {name}",
            f"{result['timings'][name]['p50_ms'] / 2:.0f}",
            f"{result['ratio_steps'][name] / 2:g}",
            f"{value:.2f}",
        )
        for name, value in result["throughput"].items()
    ]
    trainer = ("Trainer step of the whole backbone", f"{result['timings']['trainer']['p50_ms'] / 2:.0f}", "", "1.00")
    about = (
        f"{result['model']}, batch {result['batch']}, texts cut at {result['length']} tokens"
        f" ({result['tokens_per_batch']:.0f} in a batch), {result['precision']}."
    )
    header = ["step", "p50 ms", "ratios taught in a step", "throughput per ratio"]
    return [*table(header, [trainer, *rows]), "", about, "", *environment_line("training")]


# --- slender models ---------------------------------------------------------------------------------------------------


def _slender() -> dict[str, Result]:
    """The results of the tasks on which slender models were trained."""
    return {task: load(f"costeff_{task}") for task in TASKS if (RESULTS / f"costeff_{task}.json").exists()}


def slender_table() -> list[str]:
    """Every variant to its end and by its points that save by a factor."""
    rows = [
        (
            f"{task}, n = {result['evaluate']['n']}",
            ratio_of(row["variant"]),
            row["variant"].partition("@")[2] or "to the end",
            f"{row['value']:.3f}",
            f"{row['relative_quality']:.1%}",
            f"{row['exits_speedup']:.2f}",
            f"{row['flops_ratio'] or whole[row['variant']]:.1f}",
        )
        for task, result in _slender().items()
        for whole in [{one["variant"]: one["flops_ratio"] for one in result["build"]["variants"]}]
        for row in result["rows"]
        if "drop-" not in row["variant"]
    ]
    if not rows:
        return ["Not measured yet: no figure."]
    header = ["task, rows of dev", "ratio", "exits", "accuracy", "of the backbone's", "MACs saved by exits", "in all"]
    return table(header, rows)


def slender_notes() -> list[str]:
    """How each family was trained, in numbers, and how good each of its exits is alone."""
    lines = []
    for task, result in _slender().items():
        trained, recipe = result["train"], result["recipe"]
        exits = "; ".join(
            f"ratio {ratio}: {', '.join(f'{value:.3f}' for value in values)}"
            for ratio, values in trained["exits"].items()
        )
        lines += [
            f"{task}: {trained['texts']} texts of at most {recipe['length']} tokens, {trained['steps']} steps of"
            f" {recipe['fit']['batch_size']} in {trained['seconds'] / 60:.0f} minutes on one busy core; the fine-tuned"
            f" model's accuracy is {trained['teacher']:.3f}. Accuracy of each exit on all of dev, {exits}.",
            "",
            *environment_line(f"costeff_{task}"),
            "",
        ]
    return lines[:-1]


# --- exits ------------------------------------------------------------------------------------------------------------


def _cascades() -> dict[str, Result]:
    """The results of the tasks on which exits were measured."""
    return {task: load(f"cascade_{task}") for task in TASKS if (RESULTS / f"cascade_{task}.json").exists()}


def cascade_table() -> list[str]:
    """Named points: quality, MACs and time saved, and the share of the one that became the other."""
    rows = [
        (
            f"{task}, {result['batch']} texts",
            f"{row['ratio']:g}",
            row["point"],
            f"{row['value']:.3f}",
            f"{row['value'] / result['backbone_value']:.1%}",
            f"{row['allowed']:.1%}",
            f"{row['saved']:.1%}",
            f"{row['realised']:.2f}",
            f"{row['p99_over_full']:.2f}",
        )
        for task, result in _cascades().items()
        for row in result["saving"]
        if row["point"] is not None
    ]
    if not rows:
        return ["Not measured yet: no figure."]
    header = ["task, batch", "ratio", "point", "accuracy", "of the backbone's", "MACs saved", "time saved"]
    return table([*header, "realised", "p99 / full model's"], rows)


def anytime_table() -> list[str]:
    rows = [
        (
            f"{task}, {result['anytime']['variant']}",
            f"{row['share_of_full']:.0%}",
            row["requests"],
            f"{row['in_time']:.1%}",
            f"{row['promised_in_time']:.1%} of {row['promised']}" if row["promised"] else "-",
            f"{row['accuracy']:.3f}",
            f"{row['mean_layer']:.1f}",
        )
        for task, result in _cascades().items()
        for row in result["anytime"]["budgets"]
    ]
    if not rows:
        return ["Not measured yet: no figure."]
    header = ["task, variant", "budget / full p50", "requests", "in time", "in time where promised", "accuracy"]
    return table([*header, "mean exit layer"], rows)


def cascade_notes() -> list[str]:
    """Whether batches answer as rows alone do, the pictures, and where it was measured."""
    lines = []
    for task, result in _cascades().items():
        same = [f"{row['variant']}: {row['different']} of {row['rows']}" for row in result["identity"]]
        lines += [
            f"{task}: rows that answer otherwise in a batch than alone: {'; '.join(same)}.",
            "",
            f"![quality against measured latency on {task}]({picture_name(task)})",
            "",
            *environment_line(f"cascade_{task}"),
            "",
        ]
    return lines[:-1]


def picture_name(task: str) -> str:
    """The file beside the page with a task's plot."""
    return f"cascade_{task}.png"


def cascade_picture(result: Result) -> bytes:
    """Measured time per batch (x) against quality (y): a line per ratio, a point per threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    swept = [row for row in result["saving"] if row["point"] is None]
    slowest = max(row["full_ms_per_batch"] for row in swept)
    for ratio in sorted({row["ratio"] for row in swept}):
        points = sorted((r["ms_per_batch"] / slowest, r["value"]) for r in swept if r["ratio"] == ratio)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"ratio {ratio:g}")
    axes.axhline(result["backbone_value"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"median time of a batch of {result['batch']} ÷ time of the largest model to its end")
    axes.set_ylabel(result["metric"])
    axes.set_title(f"{result['task']}: exits by threshold", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    return drawn.getvalue()


TABLES: dict[str, Callable[[], list[str]]] = {
    "latency": latency_table,
    "stock": stock_table,
    "where": where_table,
    "memory pace": memory_pace,
    "memory": memory_table,
    "build": build_table,
    "selector": selector_table,
    "startup": startup_table,
    "training": training_table,
    "quality": quality_table,
    "quality notes": quality_notes,
    "tasks": tasks_table,
    "tasks notes": tasks_notes,
    "slender": slender_table,
    "slender notes": slender_notes,
    "cascade": cascade_table,
    "anytime": anytime_table,
    "cascade notes": cascade_notes,
    "steps": steps_table,
    "steps notes": steps_notes,
    "generation": generation_table,
    "steps quality": steps_quality_table,
    "steps quality notes": steps_quality_notes,
    "assemblies": assemblies_table,
    "assemblies notes": assemblies_notes,
    "writing": writing_table,
    "writing notes": writing_notes,
}


if __name__ == "__main__":
    sys.exit(main())
