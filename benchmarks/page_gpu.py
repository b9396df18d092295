"""The page's tables of a GPU: kernels, models, and from which batch on a ratio is faster."""

from __future__ import annotations

from benchmarks.page import NOT_MEASURED, Result, environment_line, load, measured, table

RESULT = "gpu"
_KERNEL_SIZE = {"ratio": 4, "batch": 128, "length": 128}
_MODEL_BATCHES = (1, 128)


def kernels_table() -> list[str]:
    """The merge kernels at one size in every type, beside the eager operators and a copy."""
    rows = [
        (
            row["kernel"],
            row["precision"],
            f"{1e3 * row['p50_ms']:.1f}",
            f"{1e3 * row['eager_p50_ms']:.1f}",
            f"{row['gb_s']:.0f}",
            f"{row['share_of_copy']:.2f}",
        )
        for row in _found("kernels")
        if _KERNEL_SIZE.items() <= row.items()
    ]
    header = ["kernel", "type", "p50 us", "eager us", "GB/s", "share of a copy"]
    return _or_not_measured(header, rows)


def models_table() -> list[str]:
    """The models alone, at the shortest length and the smallest and largest batch."""
    found = [row for row in _found("rows") if row["what"] == "engine" and row["batch"] in _MODEL_BATCHES]
    shortest = min((row["length"] for row in found), default=0)
    rows = [
        (
            f"{row['model']} {row['precision']}, {row['batch']} x {row['length']}",
            row["subject"],
            *(f"{row[f'p{percent}_ms']:.3f}" for percent in (50, 95, 99)),
            f"{row['realised']:.2f}" if "realised" in row else "",
            f"{row['share_of_roofline']:.2f}",
        )
        for row in found
        if row["length"] == shortest
    ]
    header = ["batch x length", "what", "p50 ms", "p95 ms", "p99 ms", "realised", "roofline"]
    return _or_not_measured(header, rows)


def crossovers_table() -> list[str]:
    """From which batch on a ratio is faster than ratio 1, and than PyTorch's fastest form."""
    rows = [
        (
            f"{row['model']} {row['precision']}, length {row['length']}",
            row["subject"],
            row["from_batch"] or "none",
            row["original_from_batch"] or "none",
        )
        for row in _found("crossovers")
    ]
    return _or_not_measured(["model", "engine", "than ratio 1 from batch", "than PyTorch from batch"], rows)


def card_notes() -> list[str]:
    """Which card, and what it can do."""
    if not measured(RESULT):
        return []
    result = load(RESULT)
    where, ceilings = result["environment"], result["ceilings"]
    products = ", ".join(f"{name} {value:.0f} TFLOP/s" for name, value in ceilings["matmul_tflops"].items())
    return [
        f"{where['card']}, driver {where.get('driver') or 'unknown'}, CUDA {where.get('cuda')}, {where['date']}."
        f" Ceilings measured in the same run: {products}; a copy reads and writes {ceilings['copy_gb_s']:.0f} GB/s.",
        *(f"Not timed: {reason}" for reason in result["not_timed"].values()),
        *environment_line(RESULT),
    ]


def _found(part: str) -> list[Result]:
    rows: list[Result] = load(RESULT)[part] if measured(RESULT) else []
    return rows


def _or_not_measured(header: list[str], rows: list[tuple[object, ...]]) -> list[str]:
    return table(header, rows) if rows else [NOT_MEASURED]
