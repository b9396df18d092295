"""``--json`` of every command: the keys that are always there, one document on stdout and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compexport.conftest import TEXTS, labelled_texts, plain_texts

Cli = Callable[..., Any]
NAMES = ["variator-r1-fp32", "variator-r2-fp32", "variator-r4-fp32"]


def test_build(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("build", tiny("tiny-roberta"), "--ratio", "2", "--untrained", "-o", "b", "--json")
    document = cli(*arguments).document
    assert set(document) >= {"bundle", "seconds", "variants"}
    keys = {"variant", "method", "ratio", "precision", "flops_ratio", "params", "parity_max_abs", "reused"}
    for row in document["variants"]:
        assert set(row) >= keys
        assert row["parity_max_abs"] <= 1e-4
    assert [row["variant"] for row in document["variants"]] == NAMES[:2]
    assert not any(row["reused"] for row in document["variants"])
    again = cli(*arguments).document
    assert all(row["reused"] for row in again["variants"])


def test_bench(cli: Cli, bundle: Path) -> None:
    document = cli("bench", "--batch", "1,2", "--length", "8", "--min-runs", "3", "--json").document
    assert document["device"]
    assert len(document["rows"]) == 6
    for row in document["rows"]:
        assert set(row) >= {"variant", "batch", "length", "p50_ms", "p99_ms", "runs"}
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["runs"] >= 3
    assert {(row["variant"], row["batch"]) for row in document["realised"]} == {
        (n, b) for n in NAMES[1:] for b in (1, 2)
    }
    for row in document["realised"]:
        assert set(row) >= {"variant", "batch", "length", "speedup", "ideal", "realised"}
        assert row["realised"] == pytest.approx(row["speedup"] / row["ideal"])


def test_evaluate(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    document = cli("evaluate", "--data", labelled_texts(tmp_path), "--json").document
    assert document["metric"] and document["n"] == len(TEXTS)
    assert [row["variant"] for row in document["variants"]] == NAMES
    assert document["variants"][0]["drop"] == 0


def test_select_walks_from_the_fastest_to_the_backbone(cli: Cli, bundle: Path) -> None:
    chosen = []
    for budget in (1, 11, 21, 41):
        document = cli("select", "--budget-ms", budget, "--json").document
        assert set(document) >= {"variant", "predicted_ms", "budget_ms", "met_budget", "reason", "candidates"}
        assert document["budget_ms"] == budget
        for row in document["candidates"]:
            assert set(row) >= {"variant", "predicted_ms", "quality", "verdict"}
        chosen.append((document["variant"], document["met_budget"]))
    assert chosen == [(NAMES[2], False), (NAMES[2], True), (NAMES[1], True), (NAMES[0], True)]


def test_run(cli: Cli, bundle: Path) -> None:
    document = cli("run", "--text", TEXTS[0], "--text", TEXTS[1], "--budget-ms", 1000, "--json").document
    assert set(document) >= {"variant", "predicted_ms", "latency_ms", "met_budget", "outputs"}
    assert [set(output) >= {"label", "scores"} for output in document["outputs"]] == [True, True]


def test_run_pairs_and_forced_members(cli: Cli, bundle: Path) -> None:
    document = cli("run", "--text", "a film", "--text-pair", "a fine film", "--ratio", "4", "--json").document
    assert document["variant"] == "variator-r4-fp32" and len(document["outputs"]) == 1
    assert cli("run", "--text", "x", "--variant", NAMES[1], "--json").document["variant"] == NAMES[1]


def test_inspect_and_verify(cli: Cli, bundle: Path) -> None:
    manifest = cli("inspect", "--json").document
    assert list(manifest["variants"]) == NAMES
    assert [variant["untrained"] for variant in manifest["variants"].values()] == [False, True, True]
    verified = cli("verify", "--json").document
    assert verified == {"ok": True, "files": len(manifest["files"]), "problems": []}


@pytest.mark.slow
def test_train_and_build_with_data(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, data = tiny("tiny-distilbert"), plain_texts(tmp_path)
    document = cli(
        "train", "variator", model, "--data", data, "--ratio", "2", "--steps", "3", "-o", "t", "--json"
    ).document
    keys = {"method", "output", "ratios", "extra_params", "extra_params_share", "steps", "seconds"}
    assert set(document) >= {*keys, "metric", "teacher", "student"}
    assert document["ratios"] == [2]
    built = cli("build", "t", "--ratio", "2", "-o", "b", "--json")
    assert built.code == 0 and not built.document["variants"][1].get("untrained")


@pytest.mark.parametrize("command", ["inspect", "verify", "select --budget-ms 1000", "run --text x"])
def test_people_get_text_in_a_pipe(cli: Cli, bundle: Path, command: str) -> None:
    done = cli(*command.split())
    assert done.code == 0, done.err
    assert done.out.strip() and not done.out.startswith("{")
    assert "\x1b" not in done.out


def test_bench_and_evaluate_print_tables(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    benched = cli("bench", "--batch", "1", "--length", "8", "--quick")
    for heading in ("ratio", "FLOPs ceiling", "speed-up", "realised", "variator-r4-fp32 (untrained)"):
        assert heading in benched.out
    evaluated = cli("evaluate", "--data", labelled_texts(tmp_path))
    assert "FLOPs ceiling" in evaluated.out and "drop" in evaluated.out


def test_bench_draws_latency_against_quality(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    done = cli("bench", "--batch", "1", "--length", "8", "--quick", "--plot", "pareto.png", "--json")
    assert done.document["rows"]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
