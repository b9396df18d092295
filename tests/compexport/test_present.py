"""Tables and progress: aligned text in a pipe, drawn on a terminal, one document for programs."""

from __future__ import annotations

import io
import json

from compexport import tables
from compexport.present import Screen, Table, cell, progress

TABLE = Table("sizes", ("name", "n", "ms"), [("a", 10, 1.25), ("bcd", 2, None)], ["a note"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_table_is_aligned() -> None:
    out = io.StringIO()
    Screen(out).show(TABLE)
    assert out.getvalue().splitlines() == ["sizes", "name   n    ms", "a     10  1.25", "bcd    2     -", "a note", ""]


def test_terminal_table_holds_the_same_cells() -> None:
    out = Terminal()
    Screen(out).show(TABLE)
    for text in ("sizes", "name", "bcd", "1.25", "a note"):
        assert text in out.getvalue()


def test_brackets_are_text_not_markup() -> None:
    out = Terminal()
    Screen(out).show(Table("t", ("x",), [("[bold]x",)]))
    assert "[bold]x" in out.getvalue()


def test_table_without_rows_or_columns_is_its_title() -> None:
    for out in (io.StringIO(), Terminal()):
        Screen(out).show(Table("all right", (), ()))
        assert out.getvalue().strip() == "all right"


def test_document_is_all_that_a_program_gets() -> None:
    out = io.StringIO()
    screen = Screen(out, as_json=True)
    screen.line("for people")
    screen.document({"a": 1, "b": [float("nan")]}, [TABLE])
    assert json.loads(out.getvalue()) == {"a": 1, "b": [None]}


def test_cells() -> None:
    values = [None, "x", 3, 0.01234, 1.2345, 123456.7, float("nan"), True]
    assert [cell(value) for value in values] == ["-", "x", "3", "0.012", "1.23", "123,457", "-", "True"]


def test_progress_in_a_pipe_is_a_line_per_stage() -> None:
    err = io.StringIO()
    with progress(err) as report:
        for done in range(100):
            report("fitting", done, 100)
        report("building")
    assert err.getvalue().splitlines() == ["fitting", "building"]


def test_progress_on_a_terminal_draws_and_cleans_up() -> None:
    err = Terminal()
    with progress(err) as report:
        report("fitting [x]", 1, 2)
    assert "fitting [x]" in err.getvalue()


def test_ratio_is_never_shown_alone_as_a_gain() -> None:
    """Ratio, FLOPs ceiling, measured speed-up and quality are columns of one table."""
    from engines.manifest import Variant

    common = {"method": "variator", "precision": "fp32", "graphs": {"encoder": "r1"}, "params": 1, "extra_params": 0}
    variants = {
        "r1": Variant(ratio=1, flops_ratio=1.0, **common),
        "r4": Variant(ratio=4, flops_ratio=1.9, untrained=True, **common),
    }
    bench = {
        "device": "cpu",
        "rows": [
            {"variant": "r1", "batch": 1, "length": 8, "p50_ms": 2.0, "p99_ms": 2.5, "runs": 5},
            {"variant": "r4", "batch": 1, "length": 8, "p50_ms": 1.25, "p99_ms": 1.5, "runs": 5},
        ],
        "realised": [{"variant": "r4", "batch": 1, "length": 8, "speedup": 1.6, "ideal": 1.9, "realised": 0.84}],
    }
    quality = {"metric": "cosine", "n": 3, "variants": {"r1": 1.0, "r4": 0.9}}
    table = tables.bench_table(bench, variants, quality)
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["variant"] == "r4 (untrained)"
    assert (row["ratio"], row["FLOPs ceiling"], row["speed-up"], row["cosine"]) == (4, 1.9, 1.6, 0.9)
    assert table.notes == ["r4 is faster than the backbone from batch 1 × length 8 on"]


def test_smallest_size_from_which_a_variant_is_faster() -> None:
    from compexport.latency import faster_from

    def rows(gains: dict[tuple[int, int], float]) -> list[dict[str, object]]:
        return [{"variant": "r4", "batch": b, "length": n, "speedup": gain} for (b, n), gain in gains.items()]

    grid = {(1, 32): 0.9, (1, 128): 1.1, (8, 32): 1.2, (8, 128): 1.5}
    assert faster_from(rows(grid)) == {"r4": (1, 128)}
    assert faster_from(rows({**grid, (1, 32): 1.01})) == {"r4": (1, 32)}
    assert faster_from(rows({**grid, (8, 128): 0.99})) == {"r4": None}


def test_one_token_is_no_plural() -> None:
    assert tables.answer_text({"text": "K", "tokens": [7], "why": "eos"}) == "'K' (1 token, eos)"
    assert tables.answer_text({"text": "K L", "tokens": [7, 8], "why": "length"}) == "'K L' (2 tokens, length)"
