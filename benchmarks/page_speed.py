"""Tables of what building, loading, choosing and answering take, and of training's pace."""

from __future__ import annotations

from benchmarks.models import FFN, HIDDEN, LAYERS
from benchmarks.page import NOT_MEASURED, environment_line, load, measured, ratio_of, table


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


def training_table() -> list[str]:
    if not measured("training"):
        return [NOT_MEASURED]
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
