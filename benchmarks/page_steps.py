"""The page's tables of models that share layers: fewer steps, and writing with them."""

from __future__ import annotations

from benchmarks.page import NOT_MEASURED, Result, environment_line, load, measured, ratio_of, table


def steps_table() -> list[str]:
    """Time by number of steps, as a graph of its own and by the step engine."""
    if not measured("ode_engines"):
        return [NOT_MEASURED]
    result = load("ode_engines")
    gains = {(r["variant"], r["batch"], r["length"]): r for r in result["realised"]}
    rows = []
    for row in result["rows"]:
        gain = gains.get((row["variant"], row["batch"], row["length"]))
        size, ratio = f"{row['batch']} x {row['length']}", ratio_of(row["variant"])
        kind = "step engine" if "-step-" in row["variant"] else "unrolled"
        shown = [f"{gain[name]:.2f}" if gain else "" for name in ("ideal", "speedup", "realised")]
        rows.append((size, f"{12 // int(ratio)}", kind, *shown, f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}"))
    header = ["batch x length", "steps", "kind", "FLOPs ceiling", "measured speed-up", "realised", "p50 ms", "p99 ms"]
    return [*table(header, rows), "", *environment_line("ode_engines")]


def steps_notes() -> list[str]:
    """Disk, memory, and which kind is the faster one where."""
    if not measured("ode_engines"):
        return []
    result = load("ode_engines")
    kinds = [
        f"{kind}: {cases['one']['pss_mb']:.0f} MB for n = 12, {cases['together']['pss_mb']:.0f} MB for 3, 4, 6 and 12"
        for kind, cases in result["memory"].items()
    ]
    beside = [
        f"{row['time_ratio']:.2f} ({row['steps']} steps, {row['batch']} x {row['length']})"
        for row in result["step_over_unrolled"]
    ]
    return [
        f"{result['model']}. On disk, a graph of 12 steps with its weights is {result['disk_ratio']:.4f} times one of a"
        f" single step. In memory (PSS), {'; '.join(kinds)}: {result['memory_ratio']:.2f} times one.",
        "",
        f"Time of the step engine over that of the graph made for as many steps: {', '.join(beside)}.",
    ]


def generation_table() -> list[str]:
    """Tokens per second at half the steps."""
    if not measured("generation"):
        return [NOT_MEASURED]
    result = load("generation")
    rows = [
        (
            f"{one['model']}, width {one['hidden_size']}",
            f"{one['steps']['1']} and {one['steps']['2']}",
            f"{one['tokens_per_second']['1']:.1f}",
            f"{one['tokens_per_second']['2']:.1f}",
            f"{one['speedup']:.2f}",
            f"{one['speedup_after_prompt']:.2f}",
            f"{one['ceiling']:.2f}",
        )
        for one in result["models"]
    ]
    header = ["GPT-2 of the size", "steps", "tokens/s at all", "at half", "quotient", "without prompt", "FLOPs ceiling"]
    about = f"{result['tokens']} tokens after a prompt of {result['prompt']}, batch 1, the prompt's reading included."
    return [*table(header, rows), "", about, "", *environment_line("generation")]


def steps_quality_table() -> list[str]:
    """What is kept in fewer steps, by task and training: in both forms, and with the other iterations left out."""
    if not _stepped():
        return [NOT_MEASURED]
    rows = []
    for task, result in _stepped().items():
        for row in result["rows"]:
            values = [f"{row[name]:.4f}" for name in ("sublayer", "block", "dropped")]
            rows.append([task, row["training"], row["n"], *values, f"{row['relative_drop']:.2%}"])
    return table(
        ["task", "trained", "n", "sublayer form", "block form", "iterations dropped", "lost in the form trained"], rows
    )


def steps_quality_notes() -> list[str]:
    """How it was trained."""
    lines = []
    for task, result in _stepped().items():
        recipe = result["recipe"]
        first, then = recipe["first"], recipe["then"]
        lines.append(
            f"- {task}: {result['metric']} on {result['n']} dev rows; {first['epochs']:g} epochs ordinarily, then "
            f"{then['epochs']:g} more either way, batches of {first['batch_size']}, at most {first['max_length']} "
            f"tokens, {recipe['shared']['fewest_steps']} to 12 steps, {recipe['shared']['form']} form."
        )
        lines += environment_line(f"ode_{task}")
    return lines


def _stepped() -> dict[str, Result]:
    """The results of the tasks on which models were trained to take fewer steps."""
    names = [task for task in ("agnews", "news20") if measured(f"ode_{task}")]
    return {task: load(f"ode_{task}") for task in names}
