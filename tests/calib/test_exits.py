"""Thresholds from what the exits say: the arithmetic against a loop over rows, the goals, and no peeking."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.data import Examples
from calib.exits import split
from calib.exits_search import (
    DROPS,
    SPEEDUPS,
    Exits,
    Search,
    fit_temperatures,
    leaving,
    named_rules,
    outcome,
    swept_rules,
)
from calib.quality import evaluate
from compexport.errors import CompexportError, InputError
from engines.bundle import Bundle
from engines.exit_rule import STATISTICS, ExitRule, statistic_of
from engines.manifest import ALL_EXITS
from engines.points import engine_of, points_of
from engines.runtime import Runtime
from tests.engines.exits import EXITS, LABELS, LAYERS, NAMES, make_bundle
from tests.engines.test_text import WORDS

R1, R4 = NAMES[1.0], NAMES[4.0]


def made(rows: int = 400, exits: int = 4, classes: int = 3, seed: int = 0, statistic: str = "entropy") -> Exits:
    """Exits that get surer and better with depth; each costs 100 MACs, and longer rows more."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, rows)
    hard = random.uniform(0.2, 3.0, rows)
    depth = np.arange(1, exits + 1)
    right = np.eye(classes)[truth][:, None, :] * depth[None, :, None] * 1.2 / hard[:, None, None]
    logits = (right + random.normal(size=(rows, exits, classes)) * 0.8).astype(np.float32)
    macs = np.cumsum(np.full((rows, exits), 100.0) * random.integers(1, 4, rows)[:, None], axis=1)
    return Exits(logits, statistic_of(statistic, logits), truth, macs)


def by_hand(exits: Exits, rule: ExitRule) -> list[int]:
    """Where each row leaves, one row and one exit after the other."""
    assert isinstance(rule.thresholds, tuple)
    found = []
    for row in exits.statistics:
        for number, (value, threshold) in enumerate(zip(row, (*rule.thresholds, None), strict=True)):
            if threshold is None or (threshold != -1 and (value < threshold) == (rule.statistic == "entropy")):
                found.append(number)
                break
    return found


@pytest.mark.parametrize("statistic", STATISTICS)
@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.2, 0.5, 0.8, 1.2]), min_size=3, max_size=3), st.integers(0, 5))
def test_outcomes_are_those_of_a_loop(statistic: str, thresholds: list[float], seed: int) -> None:
    exits = made(60, seed=seed, statistic=statistic)
    rule = ExitRule(tuple(thresholds), statistic).checked(4)
    assert isinstance(rule.thresholds, tuple)
    left = by_hand(exits, rule)
    assert leaving(statistic, exits.statistics[:, :-1], rule.thresholds).tolist() == left
    found = outcome(exits, rule)
    assert found.value == pytest.approx(np.mean([exits.right[i, e] for i, e in enumerate(left)]))
    assert found.histogram == pytest.approx([left.count(e) / 60 for e in range(4)])
    assert found.expected_macs == pytest.approx(np.mean([exits.macs[i, e] for i, e in enumerate(left)]))
    assert found.speedup == pytest.approx(exits.macs[:, -1].mean() / found.expected_macs)
    assert found.expected_macs <= found.worst_macs * (1 + 1e-9)
    for most in range(4):
        cut = np.mean([exits.right[i, min(e, most)] for i, e in enumerate(left)])
        assert found.cut_values[most] == pytest.approx(cut)


def test_the_worst_case_ends_where_nobody_passes() -> None:
    exits = made()
    means = exits.macs.mean(axis=0)
    assert outcome(exits, ExitRule((0.1, 0.1, 0.1))).worst_macs == pytest.approx(means[3])
    assert outcome(exits, ExitRule((-1, math.log(3) + 0.01, 0.1))).worst_macs == pytest.approx(means[1])
    sure = made(statistic="max_probability")
    assert outcome(sure, ExitRule((0.9, 0.9, 0.2), "max_probability")).worst_macs == pytest.approx(means[2])
    assert outcome(sure, ExitRule((-1.0, 0.9, 0.9), "max_probability")).worst_macs == pytest.approx(means[3])


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_named_points_reach_their_goals_where_they_were_chosen(statistic: str, per_exit: bool) -> None:
    exits = made(statistic=statistic)
    full = exits.right[:, -1].mean()
    rules = named_rules(exits, Search(statistic, per_exit))
    assert set(rules) >= {*DROPS, "1.5x", "2x"}
    for name, rule in rules.items():
        found = outcome(exits, rule.checked(4))
        if name in DROPS:
            assert found.value >= full * (1 - DROPS[name]) - 1e-9
            assert found.speedup > 1.0
        else:
            assert found.speedup >= SPEEDUPS[name] - 1e-9
    speedups = [outcome(exits, rules[name].checked(4)).speedup for name in DROPS]
    assert speedups == sorted(speedups), "who may lose more saves no less"


def test_no_threshold_that_was_tried_does_better() -> None:
    """The search against trying a fine grid; it may do better than the grid, never worse."""
    exits = made(300)
    full = exits.right[:, -1].mean()
    rule = named_rules(exits, Search())["drop-1%"]
    assert isinstance(rule.thresholds, float)
    reached = outcome(exits, rule.checked(4)).expected_macs
    allowed = [outcome(exits, ExitRule(t).checked(4)) for t in np.linspace(0, 1.2, 60).tolist()]
    assert reached <= min(o.expected_macs for o in allowed if o.value >= 0.99 * full) * 1.02


def test_a_threshold_for_each_exit_is_never_worse() -> None:
    exits = made()
    single, each = (named_rules(exits, Search(per_exit=per_exit)) for per_exit in (False, True))
    for name in DROPS:
        cheap, dear = (outcome(exits, rules[name].checked(4)).expected_macs for rules in (each, single))
        assert cheap <= dear
    for name in set(SPEEDUPS) & set(single):
        better, good = (outcome(exits, rules[name].checked(4)).value for rules in (each, single))
        assert better >= good - 1e-9
    assert any(isinstance(rule.thresholds, tuple) for rule in each.values())


def test_speedups_out_of_reach_are_left_out() -> None:
    """Two exits, the first at half the cost: nothing is three times as fast."""
    rules = named_rules(made(exits=2), Search())
    assert "2x" in rules and not {"2.5x", "3x", "4x"} & set(rules)


@pytest.mark.parametrize("search", [Search(), Search(per_exit=True), Search(temperature=True)])
def test_a_single_exit_leaves_nothing_to_choose(search: Search) -> None:
    alone = made(exits=1)
    assert named_rules(alone, search) == {}
    assert [outcome(alone, rule.checked(1)).histogram for rule in swept_rules(alone, search)] == [[1.0]]


def test_sweeps_go_from_never_to_the_first_exit() -> None:
    exits = made()
    found = [outcome(exits, rule.checked(4)) for rule in swept_rules(exits, Search())]
    assert found[0].histogram == [0.0, 0.0, 0.0, 1.0]
    assert found[-1].histogram == [1.0, 0.0, 0.0, 0.0]
    macs = [one.expected_macs for one in found]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) > 10


def test_temperatures_are_those_that_were_put_in() -> None:
    """Labels drawn from softmax(logits): scaled by 3, the logits are three times too sure."""
    random = np.random.default_rng(0)
    honest = random.normal(size=(4000, 2, 3)) * 1.5
    draws = np.exp(honest) / np.exp(honest).sum(-1, keepdims=True)
    truth = np.array([random.choice(3, p=p) for p in draws[:, 0]])
    honest[:, 1] = honest[:, 0]
    scaled = honest * np.array([1.0, 3.0])[None, :, None]
    assert fit_temperatures(scaled, truth) == pytest.approx((1.0, 3.0), rel=0.1)


def test_rules_at_temperatures_keep_them() -> None:
    exits = made()
    for rule in named_rules(exits, Search(temperature=True)).values():
        assert rule.temperatures is not None and len(rule.temperatures) == 3
        assert outcome(exits, rule.checked(4)).speedup > 1.0


def test_an_unknown_statistic_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="unknown exit statistic: got variance"):
        Search("variance")


# --- which rows ---------------------------------------------------------------------------------------------------


def examples(count: int, seed: int = 0, labelled: bool = True) -> Examples:
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 12))) + f" {number}" for number in range(count)]
    labels = random.choice(LABELS, count).tolist() if labelled else None
    return Examples(texts, labels=labels, origin=f"rows-{seed}.tsv")


def test_halves_share_no_row() -> None:
    whole = examples(101)
    parts = split(whole, None)
    assert (len(parts.chosen), len(parts.reported)) == (50, 51)
    assert set(parts.chosen.texts) | set(parts.reported.texts) == set(whole.texts)
    assert not set(parts.chosen.texts) & set(parts.reported.texts)
    assert split(whole, None).chosen.texts == parts.chosen.texts
    assert parts.said == "50 of 101 rows of rows-0.tsv, drawn at random; the others are reported"


def test_calibration_data_leave_all_rows_to_report() -> None:
    whole, other = examples(20), examples(30, seed=1)
    parts = split(whole, other)
    assert parts.chosen is other and parts.reported is whole and parts.said == "30 rows of rows-1.tsv"


def test_peeking_is_refused() -> None:
    with pytest.raises(InputError, match="calibration data are the data themselves"):
        split(examples(20), examples(20))
    with pytest.raises(InputError, match="too few examples to choose exit thresholds on: got 1, expected at least 2"):
        split(examples(1), None)


# --- on engines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("exits") / "bundle")


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Runtime:
    return Runtime(bundle, threads=1)


@pytest.fixture(scope="module")
def table(runtime: Runtime) -> dict[str, Any]:
    done: list[float] = []
    found = evaluate(runtime, examples(120), progress=lambda _, at=None, total=None: done.append((at or 0) / total))
    assert done == sorted(done) and done[-1] == 1.0
    assert found.rows[0]["variant"] == R1 and {row["variant"] for row in found.rows} == set(found.table["variants"])
    assert set(found.document()) >= {"metric", "n", "variants", "points", "exits", "calibration"}
    return found.table


def test_figures_are_of_rows_that_thresholds_were_not_chosen_on(table: dict[str, Any], runtime: Runtime) -> None:
    assert (table["n"], table["calibration"]["n"]) == (60, 60)
    reported = split(examples(120), None).reported
    answers = runtime.run_batch(reported.inputs, variant=R4).outputs
    right = np.mean([output["label"] == label for output, label in zip(answers, reported.labels or [], strict=True)])
    assert table["variants"][R4] == pytest.approx(right)
    assert table["exits"][R4]["values"][-1] == pytest.approx(right)


def test_points_promise_what_the_cascade_then_does(table: dict[str, Any], runtime: Runtime) -> None:
    """The all-exits engine chose and judged; the segments must agree, row by row."""
    points = points_of(table, {R1: 3, R4: 3})
    assert points and {engine_of(name) for name in points} == {R1, R4}
    reported = split(examples(120), None).reported
    for name, point in points.items():
        outputs = runtime.run_batch(reported.inputs, variant=point.variant, rule=point.rule).outputs
        layers = [output["exit"] for output in outputs]
        assert point.histogram == pytest.approx([layers.count(layer) / 60 for layer in EXITS])
        right = [output["label"] == label for output, label in zip(outputs, reported.labels or [], strict=True)]
        assert table["points"][name]["value"] == table["variants"][name] == pytest.approx(np.mean(right))
        assert table["points"][name]["drop"] == pytest.approx(table["variants"][R1] - np.mean(right))


def test_macs_are_those_of_each_rows_own_length(table: dict[str, Any], bundle: Bundle, runtime: Runtime) -> None:
    reported = split(examples(120), None).reported
    session = runtime.open_role(R4, ALL_EXITS)
    _, lengths = runtime.run_raw(session, reported.inputs, ["logits"])
    roles = bundle.manifest.variants[R4].graphs
    each = [np.mean([bundle.manifest.graphs[roles[f"segment-{i}"]].cost.macs(n) for n in lengths]) for i in range(3)]
    last = next(one for one in table["exits"][R4]["sweep"] if one["histogram"][-1] == 1.0)
    assert last["expected_macs"] == last["worst_macs"] == pytest.approx(sum(each))
    for point in table["points"].values():
        assert point["flops_ratio"] >= point["speedup"] * 0.99


def test_kept_tables_are_read_back(table: dict[str, Any], bundle: Bundle) -> None:
    bundle.save_quality(table)
    fresh = Runtime(bundle, threads=1)
    assert set(fresh.variants) == set(table["variants"])
    assert fresh.quality.measured


def test_without_labels_the_backbone_is_the_truth(runtime: Runtime) -> None:
    found = evaluate(runtime, examples(40, labelled=False), calibration=examples(40, seed=2, labelled=False))
    assert found.table["metric"] == "agreement" and found.table["n"] == 40
    assert found.table["variants"][R1] == found.table["exits"][R1]["values"][-1] == 1.0
    assert found.table["calibration"]["rows"] == "40 rows of rows-2.tsv"


@pytest.mark.parametrize("search", [Search("margin", True, True), Search("max_probability")])
def test_every_kind_of_search_runs(runtime: Runtime, search: Search) -> None:
    table = evaluate(runtime, examples(60), search=search).table
    assert points_of(table, {R1: 3, R4: 3})
    assert all(point["rule"]["statistic"] == search.statistic for point in table["points"].values())
    assert all(("temperatures" in point["rule"]) == search.temperature for point in table["points"].values())


@pytest.mark.parametrize("labelled", [True, False])
def test_a_backbone_without_exits(tmp_path: Path, labelled: bool) -> None:
    runtime = Runtime(make_bundle(tmp_path / "plain", plain_backbone=True), threads=1)
    done: list[float] = []
    table = evaluate(
        runtime, examples(60, labelled=labelled), progress=lambda _, at=None, total=None: done.append((at or 0) / total)
    ).table
    assert done == sorted(done) and done[-1] == 1.0
    assert set(table["exits"]) == {R4} and {engine_of(name) for name in table["points"]} == {R4}
    assert table["backbone_variant"] == R1
    reported = split(examples(60, labelled=labelled), None).reported
    backbone, small = (runtime.run_batch(reported.inputs, variant=name).outputs for name in (R1, R4))
    truth = reported.labels or [output["label"] for output in backbone]
    right = np.mean([output["label"] == label for output, label in zip(small, truth, strict=True)])
    assert table["variants"][R4] == pytest.approx(right)
    for point in table["points"].values():
        assert point["flops_ratio"] > point["speedup"] * 3.5, "ratio 4 saves without exits too"


def test_nan_logits_are_no_quality(tmp_path: Path) -> None:
    runtime = Runtime(make_bundle(tmp_path / "broken", broken=LAYERS), threads=1)
    with pytest.raises(CompexportError, match=f"{R1}: (logits|entropy) of its exits hold NaN or infinity"):
        evaluate(runtime, examples(20))
