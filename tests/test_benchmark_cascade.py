"""What the benchmark of cascades makes of what it measured: targets, ways through a variant, MACs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cascade as benchmark
from calib.data import Examples
from engines.cascade import Cascade
from engines.exit_rule import ExitRule
from engines.runtime import Runtime
from tests.engines.exits import EXITS, LAYERS, NAMES, C, H, feeds, make_bundle

R1 = NAMES[1.0]


def result() -> dict[str, Any]:
    """All targets met, barely."""
    row = {"variant": R1, "point": "2x", "allowed": 0.5, "realised": 0.75, "p99_over_full": 1.03}
    budgets = [
        {"share_of_full": share, "requests": 2000, "promised": 2000, "promised_in_time": 0.99, "accuracy": accuracy}
        for share, accuracy in ((0.2, 0.80), (0.6, 0.90), (1.0, 0.89))
    ]
    return {
        "saving": [row],
        "anytime": {"budgets": budgets},
        "identity": [{"variant": R1, "rows": 2000, "different": 0}],
    }


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([change("saving", 0, "realised", to=0.74)], "at 2x: realised 0.74"),
        ([change("saving", 0, "p99_over_full", to=1.04)], "at 2x: p99 1.04 of the full model's"),
        ([change("anytime", "budgets", 1, "promised_in_time", to=0.98)], "budget 60%: 98.00% in time"),
        (
            [change("anytime", "budgets", 2, "accuracy", to=0.88)],
            "budget 100%: accuracy 0.880, of a smaller budget 0.9",
        ),
        ([change("identity", 0, "different", to=1)], f"{R1}: 1 rows differ"),
        ([], None),
        ([change("saving", 0, "allowed", to=0.3), change("saving", 0, "realised", to=0.1)], None),
        ([change("saving", 0, "point", to=None), change("saving", 0, "realised", to=0.1)], None),
        (
            [
                change("anytime", "budgets", 0, "promised", to=0),
                change("anytime", "budgets", 0, "promised_in_time", to=None),
            ],
            None,
        ),
    ],
)
def test_targets(changes: list[Callable[[dict[str, Any]], None]], message: str | None) -> None:
    document = result()
    for apply in changes:
        apply(document)
    found = benchmark.missed(document)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def quality() -> dict[str, Any]:
    rule = ExitRule((0.5, 0.4)).document()
    sweep = [{"threshold": t, "value": 0.9 - t / 10, "speedup": 1 + t} for t in np.linspace(0, 1, 20).tolist()]
    return {
        "points": {f"{R1}@2x": {"rule": rule, "value": 0.9}, f"{NAMES[4.0]}@2x": {"rule": rule, "value": 0.7}},
        "exits": {R1: {"statistic": "entropy", "sweep": sweep}},
    }


def test_ways_are_the_variants_points_and_some_of_its_sweep() -> None:
    point, *thresholds = benchmark._ways(R1, quality())
    assert (point.point, point.threshold, point.rule, point.value) == ("2x", None, ExitRule((0.5, 0.4)), 0.9)
    assert len(thresholds) == benchmark.THRESHOLDS
    assert (thresholds[0].threshold, thresholds[-1].threshold) == (0.0, 1.0)
    assert all(way.point is None and way.rule == ExitRule(way.threshold or 0.0) for way in thresholds)


def test_macs_count_the_segments_that_each_row_went_through(tmp_path: Path) -> None:
    with Runtime(make_bundle(tmp_path / "bundle"), threads=1) as runtime:
        cascade = runtime.session(R1)
        assert isinstance(cascade, Cascade)
        batches = [feeds(7, seed=1), feeds(5, seed=2)]
        ways = [benchmark._Way(None, t, ExitRule(t), 0.0) for t in (-1.0, 0.3, 9.0)]
        whole, *found = benchmark._macs(runtime.bundle, R1, cascade, batches, ways)
        expected = [0.0] * 3
        for one in batches:
            length = one["input_ids"].shape[1]
            for number, way in enumerate(ways):
                layers = cascade.run_exits(one, way.rule).exit_layer.tolist()
                # Of every row: 1200 MACs a token and layer, and a head at each exit it came to.
                expected[number] += sum(1200 * length * n + C * H * (EXITS.index(n) + 1) for n in layers)
        assert found == expected and found[0] == whole > found[1] > found[2]
        assert max(EXITS) == LAYERS


def test_a_prefix_that_plays_the_full_model_is_closed(tmp_path: Path) -> None:
    closed: list[str] = []

    class Session:
        def run(self, given: Any, names: list[str]) -> str:
            return "logits of the prefix"

        def close(self) -> None:
            closed.append("closed")

    with Runtime(make_bundle(tmp_path / "bundle"), threads=1) as runtime:
        cascade: Any = runtime.session(R1)
        with benchmark._full(runtime, R1, cascade) as (full, called):
            assert called == benchmark.FULL and set(full(feeds(2))) == {"logits"}  # type: ignore[call-overload]
        runtime.bundle.manifest.variants[R1].graphs["prefix-6"] = "any"
        runtime.open_role = lambda variant, role: Session()  # type: ignore[assignment, method-assign, return-value]
        with benchmark._full(runtime, R1, cascade) as (full, called):
            assert (called, full(feeds(2)), closed) == ("prefix-6", "logits of the prefix", [])
    assert closed == ["closed"]


def test_identity_takes_train_rows_where_dev_has_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "IDENTITY_ROWS", 5)
    dev = Examples(["dev 0", "dev 1", "dev 2"])
    assert benchmark._identity_texts(tmp_path, dev) == dev.texts
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"train {n}\t1\n" for n in range(9)))
    texts = benchmark._identity_texts(tmp_path, dev)
    assert len(set(texts)) == 5 and texts[:3] == dev.texts and all(text.startswith("train") for text in texts[3:])
    many = Examples([f"dev {n}" for n in range(8)])
    assert benchmark._identity_texts(tmp_path, many) == many.texts[:5]
