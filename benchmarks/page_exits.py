"""Tables and pictures of slender models with exits."""

from __future__ import annotations

import io

from benchmarks.page import NOT_MEASURED, Result, environment_line, load, measured, ratio_of, table
from benchmarks.page_quality import TASKS


def _slender() -> dict[str, Result]:
    """The results of the tasks on which slender models were trained."""
    return {task: load(f"costeff_{task}") for task in TASKS if measured(f"costeff_{task}")}


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
        return [NOT_MEASURED]
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


def cascades() -> dict[str, Result]:
    """The results of the tasks on which exits were measured."""
    return {task: load(f"cascade_{task}") for task in TASKS if measured(f"cascade_{task}")}


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
        for task, result in cascades().items()
        for row in result["saving"]
        if row["point"] is not None
    ]
    if not rows:
        return [NOT_MEASURED]
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
        for task, result in cascades().items()
        for row in result["anytime"]["budgets"]
    ]
    if not rows:
        return [NOT_MEASURED]
    header = ["task, variant", "budget / full p50", "requests", "in time", "in time where promised", "accuracy"]
    return table([*header, "mean exit layer"], rows)


def cascade_notes() -> list[str]:
    """Whether batches answer as rows alone do, the pictures, and where it was measured."""
    lines = []
    for task, result in cascades().items():
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
