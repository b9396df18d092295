"""Commands on a family with exits: bench times segments, evaluate makes points, select and run take them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from tests.engines.exits import EXITS, LABELS, LAYERS, NAMES, make_bundle
from tests.engines.test_text import WORDS

Cli = Callable[..., Any]
R1, R4 = NAMES[1.0], NAMES[4.0]
SEGMENTS = [f"{name}/segment-{number}" for name in (R1, R4) for number in range(3)]


def rows(path: Path, count: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    texts = [f"{' '.join(random.choice(WORDS, random.integers(1, 10)))} {seed} {number}" for number in range(count)]
    lines = [f"{text}\t{random.choice(LABELS)}" for text in texts]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits") / "bundle"
    make_bundle(folder)
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path, cli: Cli) -> Path:
    """At ``./bundle``, with ``dev.tsv`` and ``other.tsv`` beside it."""
    rows(tmp_path / "dev.tsv", 60, 0)
    rows(tmp_path / "other.tsv", 40, 1)
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def bench(cli: Cli) -> dict[str, Any]:
    arguments = ("--batch", "1,4", "--length", "8", "--min-runs", "3", "--threads", 1, "--json")
    document: dict[str, Any] = cli("bench", *arguments).document
    return document


def test_bench_times_every_segment_too(cli: Cli, bundle: Path) -> None:
    document = bench(cli)
    assert [row["variant"] for row in document["rows"][:8]] == [R1, *SEGMENTS[:3], R4, *SEGMENTS[3:]]
    assert len(document["rows"]) == 16
    assert {row["variant"] for row in document["realised"]} == {R4}
    # All-exits engines are for calibration: they count nothing. 1200 MACs a token and layer against 300, and heads.
    layers, heads = 1200 * 8 * LAYERS, 3 * 24
    assert document["realised"][0]["ideal"] == pytest.approx((layers + heads) / (layers / 4 + heads))


def test_bench_shows_segments_in_a_table_of_their_own(cli: Cli, bundle: Path) -> None:
    out = cli("bench", "--batch", 1, "--length", 8, "--quick", "--threads", 1).out
    whole, segments = out.split("segments\n")
    assert R1 in whole and f"{R1}/segment-0" not in whole and f"{R4}/segment-2" in segments


def test_inspect_shows_exits(cli: Cli, bundle: Path) -> None:
    lines = [line for line in cli("inspect").out.splitlines() if line.lstrip().startswith((R1, R4))]
    assert len(lines) == 2 and all(", ".join(map(str, EXITS)) in line for line in lines)


def test_evaluate_makes_points(cli: Cli, bundle: Path) -> None:
    document = cli("evaluate", "--data", "dev.tsv", "--json").document
    assert document["n"] == 30 and document["calibration"]["n"] == 30
    assert "30 of 60 rows of dev.tsv" in document["calibration"]["rows"]
    names = [row["variant"] for row in document["variants"]]
    assert names == [R1, R4, *document["points"]] and document["variants"][0]["drop"] == 0
    keys = {"variant", "rule", "value", "drop", "histogram", "cut_values", "expected_macs", "worst_macs", "speedup"}
    assert document["points"]
    for point in document["points"].values():
        assert set(point) >= keys and sum(point["histogram"]) == pytest.approx(1.0)
    assert set(document["exits"]) == {R1, R4}
    kept = Bundle.open("bundle").quality()
    assert kept is not None and kept["points"] == document["points"] and kept["variants"].keys() == set(names)


def test_evaluate_shows_points_and_where_they_come_from(cli: Cli, bundle: Path) -> None:
    out = cli("evaluate", "--data", "dev.tsv", "--calibration", "other.tsv", "--statistic", "margin").out
    assert "accuracy on 60 examples" in out
    assert "exit thresholds chosen on 40 rows of other.tsv" in out
    assert "operating points" in out and "margin > " in out and f"{EXITS[0]}: " in out


def test_evaluate_with_every_option(cli: Cli, bundle: Path) -> None:
    arguments = ("--calibration", "other.tsv", "--per-exit", "--temperature", "--statistic", "max_probability")
    document = cli("evaluate", "--data", "dev.tsv", *arguments, "--json").document
    assert all(len(point["rule"]["temperatures"]) == 2 for point in document["points"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--statistic", "variance"), "unknown exit statistic: got variance"),
        (("--calibration", "dev.tsv"), "all calibration rows are in the data too"),
        (("--calibration", "gone.tsv"), "gone.tsv: no such file or folder"),
        (("--limit", 1), "too few examples to choose exit thresholds on"),
    ],
)
def test_evaluate_refuses(cli: Cli, bundle: Path, arguments: tuple[Any, ...], message: str) -> None:
    done = cli("evaluate", "--data", "dev.tsv", *arguments)
    assert done.code == 2 and message in done.error
    assert not (bundle / "quality.json").exists()


def test_points_are_selected_and_run(cli: Cli, bundle: Path) -> None:
    bench(cli)
    points = cli("evaluate", "--data", "dev.tsv", "--json").document["points"]
    name = next(iter(points))
    document = cli("select", "--budget-ms", 1e6, "--length", 8, "--threads", 1, "--json").document
    assert {row["variant"] for row in document["candidates"]} == {R1, R4, *points}
    assert all(row["predicted_ms"] > 0 for row in document["candidates"])
    assert document["stops_at"] is None
    answered = cli("run", "--text", "a fine film", "--variant", name, "--threads", 1, "--json").document
    assert answered["variant"] == name
    assert set(answered["outputs"][0]) >= {"label", "scores", "exit", "why"}


def test_thresholds_on_the_command_line(cli: Cli, bundle: Path) -> None:
    def run(*arguments: object) -> list[tuple[int, str]]:
        done = cli("run", "--text", "a fine film", "--text", "who made it ?", "--ratio", 1, *arguments, "--json")
        return [(output["exit"], output["why"]) for output in done.document["outputs"]]

    assert run() == run("--threshold", -1) == [(LAYERS, "last")] * 2
    assert run("--threshold", 9) == [(EXITS[0], "confident")] * 2
    assert run("--threshold", "-1,9") == [(EXITS[1], "confident")] * 2
    assert run("--threshold", 0, "--statistic", "margin") == [(EXITS[0], "confident")] * 2
    assert run("--threshold", 9, "--exit-mode", "batch-maximum") == [(EXITS[0], "confident")] * 2
    table = cli("run", "--text", "a fine film", "--ratio", 1, "--threshold", 9).out
    assert f"(exit {EXITS[0]}, confident)" in table


def test_a_threshold_may_stand_in_the_file(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "compexport.toml").write_text("[run]\nratio = 1\nthreshold = [-1, 9]\n")
    assert cli("run", "--text", "a fine film", "--json").document["outputs"][0]["exit"] == EXITS[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "nan", "--ratio", 1), "exit threshold is out of range: got nan"),
        (("--threshold", "-0.5", "--ratio", 1), "exit threshold is out of range: got -0.5"),
        (("--threshold", "0.1,0.2,0.3", "--ratio", 1), "exit thresholds do not fit: got 3 of them, expected 2"),
        (("--threshold", "half", "--ratio", 1), "--threshold is not a number: got 'half', expected numbers like 0.3"),
        (("--threshold", "0.5"), f"exit thresholds need a variant: expected a ratio or a name: {R1}, {R4}"),
        (("--statistic", "margin"), "--statistic without a threshold: got margin"),
        (("--exit-mode", "per-row"), "--exit-mode without a threshold: got per-row"),
        (("--threshold", "0.5", "--ratio", 1, "--statistic", "luck"), "unknown exit statistic: got luck"),
        (("--threshold", "0.5", "--ratio", 1, "--exit-mode", "some"), "unknown exit mode: got some"),
        (("--variant", f"{R4}@2x"), f"unknown variant: got {R4}@2x, expected one of {R1}, {R4}"),
    ],
)
def test_run_refuses(cli: Cli, bundle: Path, arguments: tuple[Any, ...], message: str) -> None:
    done = cli("run", "--text", "a fine film", *arguments)
    assert done.code == 2 and message in done.error


def test_a_variant_without_exits_takes_no_threshold(cli: Cli, built: Path) -> None:
    done = cli("run", built, "--text", "a fine film", "--ratio", 2, "--threshold", 0.5)
    assert done.code == 2 and "variator-r2-fp32 has no exits" in done.error
    done = cli("evaluate", built, "--data", rows(Path("dev.tsv"), 4, 0), "--calibration", rows(Path("o.tsv"), 4, 1))
    assert done.code == 2 and "calibration data: got o.tsv, expected a bundle with exits" in done.error


def test_nan_logits_exit_with_one(cli: Cli, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", broken=2)
    done = cli("run", "--text", "a fine film", "--ratio", 1)
    assert done.code == 1 and "logits of exit 2 hold NaN or infinity" in done.error


def test_measured_tables_outlive_a_rebuild_of_the_same(cli: Cli, bundle: Path) -> None:
    """Rows of segments and points belong to their variant, and go with it."""
    bench(cli)
    points = cli("evaluate", "--data", "dev.tsv", "--json").document["points"]
    make_bundle(bundle, exits=EXITS)
    again = Bundle.open(bundle)
    quality, profile = again.quality(), again.profile(again.profiles()[0])
    assert quality is not None and profile is not None
    assert quality["points"] == points and {row["variant"] for row in profile["rows"]} == {R1, R4, *SEGMENTS}
    make_bundle(bundle, exits=(3, LAYERS))
    other = Bundle.open(bundle)
    assert other.quality() is None and other.profiles() == []
    assert json.loads((bundle / "manifest.json").read_text())["variants"][R1]["exits"] == [3, LAYERS]
